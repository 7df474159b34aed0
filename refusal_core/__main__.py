"""The command line: `python -m refusal_core` with a command.

app       open the page
find      find a model's refusal direction, and print every candidate with the rule that discarded it
evaluate  complete harmful and harmless prompts with and without the direction, and print the rates
export    write a checkpoint from whose weights the direction is removed
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from refusal_core.chat_model import ORGANISM, ChatModel, ModelError
from refusal_core.directions import Direction, DirectionError
from refusal_core.evaluation import Report, evaluate, paper_rows
from refusal_core.formats import load_direction
from refusal_core.generation import MAX_NEW_TOKENS
from refusal_core.orthogonalize import export
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
        return COMMANDS[options.command](options)
    except (ModelError, PromptError, DirectionError) as error:
        print(error, file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m refusal_core", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("app", help="open the page (`app --help` says more)", add_help=False)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", default=str(ORGANISM), help="folder or hub id; default: the embedded toy model")
    common.add_argument(
        "--prompts", default="embedded", help="a .jsonl, .json or .csv file; default: the embedded lists"
    )
    common.add_argument("--seed", type=int, default=0, help="draws the prompts")
    given = argparse.ArgumentParser(add_help=False)
    given.add_argument("--direction", type=Path, help="a direction saved by find; default: it is found now")
    find = commands.add_parser("find", parents=[common], help="find a model's refusal direction")
    find.add_argument("--out", type=Path, help="save the direction here, as safetensors")
    find.add_argument("--complete", action="store_true", help="measure every candidate, not only what the rule needs")
    rates = commands.add_parser("evaluate", parents=[common, given], help="judge replies with and without it")
    rates.add_argument("--n", type=int, default=100, help="how many test prompts of each class")
    rates.add_argument(
        "--max-new-tokens", type=int, choices=range(1, MAX_NEW_TOKENS + 1), default=64, metavar="N",
        help=f"the longest a reply may get, at most {MAX_NEW_TOKENS}",
    )  # fmt: skip
    rates.add_argument("--rules", choices=("paper", "default"), default="paper", help="the judge")
    rates.add_argument("--resume", type=Path, help="keep finished replies in this file, and go on from it")
    rates.add_argument("--json", type=Path, help="write everything, replies included, to this file")
    weights = commands.add_parser("export", parents=[common, given], help="write the edited checkpoint")
    weights.add_argument("--out", type=Path, required=True, help="a new folder")
    return parser


def _find(options: argparse.Namespace) -> int:
    model = ChatModel.load(options.model)
    found = _found(model, options, complete=options.complete)
    _print_candidates(model, found)
    if options.out:
        found.direction.save(options.out)
        print(f"saved to {options.out}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    model = ChatModel.load(options.model)
    direction = _direction(model, options)
    prompts = load_prompts("test", options.prompts).draw(options.n, options.seed)
    report = _last(
        evaluate(
            model,
            prompts,
            paper_rows(direction),
            rules=options.rules,
            max_new_tokens=options.max_new_tokens,
            resume=options.resume,
        )
    )
    assert isinstance(report, Report)
    print(report.as_markdown())
    if options.json:
        options.json.write_text(report.as_json(), "utf-8")
    return 0


def _export(options: argparse.Namespace) -> int:
    model = ChatModel.load(options.model)
    report = export(model, _direction(model, options), options.out)
    print(
        f"{report.path}: {report.edited} tensors edited; over {report.n_prompts} prompts the logits differ from the "
        f"hooks' by at most {report.max_logit_difference:.2e}, and {report.same_first_token:.0%} of the first tokens "
        "are the same"
    )
    return 0


COMMANDS = {"find": _find, "evaluate": _evaluate, "export": _export}


def _direction(model: ChatModel, options: argparse.Namespace) -> Direction:
    return load_direction(model, options.direction) if options.direction else _found(model, options).direction


def _found(model: ChatModel, options: argparse.Namespace, *, complete: bool = False) -> Found:
    train, val = load_prompts("train", options.prompts), load_prompts("val", options.prompts)
    found = _last(find_direction(model, train, val, complete=complete, seed=options.seed))
    assert isinstance(found, Found)
    return found


def _last(events: Iterable[Progress | Found | Report]) -> Progress | Found | Report | None:
    """The last of the events; the progress before it is shown on one line."""
    event = None
    for event in events:
        if isinstance(event, Progress):
            print(f"\r{event.stage} {event.done}/{event.total}\033[K", end="", file=sys.stderr)
    print("\r\033[K", end="", file=sys.stderr)
    return event


def _print_candidates(model: ChatModel, found: Found) -> None:
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
