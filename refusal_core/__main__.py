"""The command line: `python -m refusal_core find` prints a model's refusal direction, `app` opens the page."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from refusal_core.chat_model import ORGANISM, ChatModel, ModelError
from refusal_core.directions import DirectionError
from refusal_core.prompts import PromptError, load_prompts
from refusal_core.selection import Found, Progress, find_direction
from refusal_core.ui import server


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["app"]:
        return server.main(given[1:])
    options = _parser().parse_args(given)
    try:
        return _find(options)
    except (ModelError, PromptError, DirectionError) as error:
        print(error, file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m refusal_core", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("app", help="open the page (`app --help` says more)", add_help=False)
    find = commands.add_parser("find", help="find a model's refusal direction")
    find.add_argument("--model", default=str(ORGANISM), help="folder or hub id; default: the embedded toy model")
    find.add_argument("--prompts", default="embedded", help="a .jsonl, .json or .csv file; default: the embedded lists")
    find.add_argument("--out", type=Path, help="save the direction here, as safetensors")
    find.add_argument("--complete", action="store_true", help="measure every candidate, not only what the rule needs")
    find.add_argument("--seed", type=int, default=0, help="draws the prompts")
    return parser


def _find(options: argparse.Namespace) -> int:
    model = ChatModel.load(options.model)
    train, val = load_prompts("train", options.prompts), load_prompts("val", options.prompts)
    for event in find_direction(model, train, val, complete=options.complete, seed=options.seed):
        if isinstance(event, Progress):
            print(f"\r{event.stage} {event.done}/{event.total}\033[K", end="", file=sys.stderr)
        else:
            print("\r\033[K", end="", file=sys.stderr)
            _report(model, event)
            if options.out:
                event.direction.save(options.out)
                print(f"saved to {options.out}")
    return 0


def _report(model: ChatModel, found: Found) -> None:
    print("pos layer    ‖r‖  bypass  induce     kl  rule")
    for s in found.scores:
        numbers = " ".join("      –" if x is None else f"{x:7.2f}" for x in (s.norm, s.bypass, s.induce, s.kl))
        verdict = "chosen" if s == found.choice.chosen else found.choice.rejected.get(s, "")
        print(f"{s.pos:3} {s.layer:5} {numbers}  {verdict}")
    source = found.direction.source
    kept = ", ".join(f"{split} {cls} {k}/{n}" for (split, cls), (k, n) in found.counts.items())
    tokens = ", ".join(
        f"{model.tokenizer.decode([t])!r} {share:.0%}"
        for t, share in zip(found.refusal_tokens, found.refusal_shares, strict=True)
    )
    print(f"{model.name}: position {source.position}, input of layer {source.layer} of {model.n_layers}")
    print(f"prompts that the model treats as expected: {kept}")
    print(f"refusal tokens: {tokens}")
    if found.choice.relaxed:
        print(f"No candidate passed every rule; this one needs the rule {found.choice.relaxed!r} relaxed least.")


if __name__ == "__main__":
    sys.exit(main())
