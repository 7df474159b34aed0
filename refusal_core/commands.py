"""The commands of the command line, what their options are, and what they print."""

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import huggingface_hub

from refusal_core.chat_model import ORGANISM, ChatModel, ModelError
from refusal_core.directions import Direction, DirectionError
from refusal_core.endpoints import add_endpoints, evaluate_endpoints, read_endpoints
from refusal_core.evaluation import Report, Strengths, by_strength, evaluate, paper_rows, unseen
from refusal_core.findings import UNWRITTEN, as_json, find_or_recall, funnel, load_found, save_found
from refusal_core.formats import load_direction
from refusal_core.generation import MAX_NEW_TOKENS
from refusal_core.hub import HARMFUL, NAMES
from refusal_core.metrics import finite
from refusal_core.orthogonalize import NEEDS_MEAN, VARIANTS, check_new, export
from refusal_core.placement import add_placement, read_placement
from refusal_core.prompts import PromptError, PromptSet, Split, load_prompts, pinned, whole
from refusal_core.selection import KL_LIMIT, LAYER_SHARE, CandidateScore, Found, Rule, find_direction
from refusal_core.terminal import chat, followed

DISCARDED: dict[Rule, str] = {
    "zero": "numerically zero: harmful and harmless prompts are the same there",
    "layer": f"in the last {1 - LAYER_SHARE:.0%} of the layers",
    "late": "read at the last token, above the layers where other positions score highest (COSMIC)",
    "induce": "adding it does not make harmless prompts start like a refusal (induce < 0)",
    "kl": f"removing it changes harmless replies (kl > {KL_LIMIT})",
    "nan": "a score is not a number",
}


def run(parser: argparse.ArgumentParser, given: Sequence[str]) -> int:
    """Does what the command line `given` asks for; returns the exit status, 0 or 1 for an expected failure.

    `parser` gets the commands here, and ends the program with status 2 for what it does not understand.
    """
    try:
        _add_commands(parser)
        options = parser.parse_args(given)
        if (options.harmful is None) != (options.harmless is None):
            parser.error("--harmful and --harmless go together: a direction is the difference of two classes")
        if not sys.stderr.isatty():
            huggingface_hub.utils.disable_progress_bars()
        options.prompts = pinned(options.prompts)
        if options.harmful is not None:
            options.harmful, options.harmless = pinned(options.harmful), pinned(options.harmless)
        return RUN[options.command](options)
    except (ModelError, PromptError, DirectionError) as error:
        print(error, file=sys.stderr)
        return 1


def _add_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", help=argparse.SUPPRESS)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "model", nargs="?", default=str(ORGANISM), metavar="MODEL",
        help="folder or hub id; default: the embedded toy model",
    )  # fmt: skip
    common.add_argument("--revision", help="branch, tag or commit on the hub")
    add_placement(common)
    lists = common.add_argument_group("prompts")
    lists.add_argument(
        "--prompts", default="embedded", metavar="FILE",
        help=".jsonl, .json or .csv with the columns text and harmful, or a public list of the Hugging Face hub, which is "
        f"then fetched: {', '.join(name for name in NAMES if name in HARMFUL)}; default: the embedded lists",
    )  # fmt: skip
    lists.add_argument(
        "--harmful", metavar="FILE", help="instead, one file for each class: .txt with a prompt per line,"
    )
    lists.add_argument(
        "--harmless", metavar="FILE",
        help="or .jsonl, .json or .csv with the column text; or a public list (alpaca has harmless ones only), or any "
        "other: hub:owner/name/file#column",
    )  # fmt: skip
    lists.add_argument("--seed", type=int, default=0, help="draws the prompts; default: 0")
    common.add_argument("--no-cache", action="store_true", help="search anew, and keep nothing")
    given = argparse.ArgumentParser(add_help=False)
    given.add_argument(
        "--direction", type=Path, metavar="FILE",
        help="a direction: a file or a folder that find has saved, a GGUF control vector of one layer, or a run folder of the "
        "paper's code; default: find it",
    )  # fmt: skip
    machine = argparse.ArgumentParser(add_help=False)
    machine.add_argument("--json", action="store_true", help="one JSON document on stdout, and nothing else there")

    def add(name: str, says: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        prog = f"python -m refusal_core {name}"
        return commands.add_parser(name, parents=[common, *parents], prog=prog, help=says, description=says)

    find = add("find", "Find a model's refusal direction, and say of every candidate which rule discarded it.", machine)
    find.add_argument(
        "--out", type=Path, metavar="DIR",
        help="write direction.safetensors, activations.safetensors and found.json into this folder",
    )  # fmt: skip
    find.add_argument(
        "--by", choices=("rule", "cosmic"),
        help="who chooses: the paper's rule, or COSMIC, which needs no refusal tokens; default: the rule, and COSMIC where "
        "the rule has nothing to go by",
    )  # fmt: skip
    find.add_argument(
        "--positions", type=_count, metavar="N",
        help="read at the last N tokens of the chat template only; default: at all that are the same for every prompt",
    )  # fmt: skip
    find.add_argument("--complete", action="store_true", help="measure every candidate, not only what the rule needs")
    talk = add("chat", "Talk with three models side by side: unchanged, direction removed, direction added.", given)
    rates = add("evaluate", "Judge replies to test prompts, with and without the direction.", given, machine)
    for each, length in ((talk, 256), (rates, 64)):
        each.add_argument(
            "--max-new-tokens", type=_length, default=length, metavar="N",
            help=f"the longest a reply may get, at most {MAX_NEW_TOKENS}; default: {length}",
        )  # fmt: skip
    rates.add_argument("--n", type=_count, default=100, help="how many test prompts of each class; default: 100")
    rates.add_argument(
        "--on", metavar="LIST",
        help="test on all of this file or public list, such as jailbreakbench, but for what the direction was found with; "
        "default: the test split of --prompts",
    )  # fmt: skip
    rates.add_argument("--rules", choices=("paper", "default"), default="paper", help="the judge; default: the paper's")
    rates.add_argument(
        "--classifier", metavar="MODEL",
        help="a safety classifier of the Llama Guard family, to say of every reply whether it is unsafe, beside the judge",
    )  # fmt: skip
    rates.add_argument("--resume", type=Path, metavar="FILE", help="keep finished replies here, and go on from them")
    rates.add_argument(
        "--exported", action="append", default=[], metavar="DIR",
        help="a row more for weights that export has written, beside the hooks; may be given again",
    )  # fmt: skip
    rates.add_argument(
        "--strengths", action="store_true",
        help="measure refusals, next to five random directions, and the damage to harmless replies at every strength of "
        "removal and addition as well",
    )  # fmt: skip
    add_endpoints(rates)
    weights = add("export", "Write a checkpoint in whose weights the direction is removed or added.", given, machine)
    weights.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    weights.add_argument(
        "--variant", choices=VARIANTS, default="ablation",
        help="ablation and addition are the interventions, exactly; norm-preserving and projected approximate the "
        "ablation; default: ablation",
    )  # fmt: skip
    weights.add_argument(
        "--strength", type=_strength, default=1.0, metavar="S", help="of an addition, from -10 to 10; default: 1"
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def _length(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_NEW_TOKENS:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to {MAX_NEW_TOKENS}")
    return int(text)


def _strength(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not abs(number) <= 10:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from -10 to 10")
    return number


# -- commands --------------------------------------------------------------------------------------------------------


# What cannot be done is said before the work that it would be the end of.


def _find(options: argparse.Namespace) -> int:
    if options.out:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritten(options.out, error) from error
    model = _model(options)
    found = _found(model, options, by=options.by, n_positions=options.positions, complete=options.complete)
    if options.out:
        _save(found, options.out)
    if options.json:
        print(json.dumps(_named(model, found), allow_nan=False))
    else:
        _print_found(model, found)
        if options.out:
            print(f"saved in {options.out}")
    return 0


def _chat(options: argparse.Namespace) -> int:
    model = _model(options)
    direction, _ = _direction(model, options)
    chat(model, direction, max_new_tokens=options.max_new_tokens)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    listed = whole(pinned(options.on)) if options.on else None

    def test_prompts(found: Found | None) -> PromptSet:
        """Of a whole list those that the direction was not found with."""
        test = unseen(found, *listed) if listed else _prompts("test", options)
        return test.draw(options.n, options.seed)

    test_prompts(None)  # a class that is empty is said before the search
    how = {"rules": options.rules, "max_new_tokens": options.max_new_tokens, "resume": options.resume}
    if pair := read_endpoints(options):
        if options.classifier or options.exported or options.strengths:
            raise ModelError(
                "--classifier, --exported and --strengths need a model that is here: leave out the two servers."
            )
        report: Report = followed(evaluate_endpoints(pair, test_prompts(None), **how))
    else:
        report = _evaluate_here(options, test_prompts, how)
    print(report.as_json() if options.json else f"{report.in_words}\n\n{report.as_markdown()}")
    return 0


def _evaluate_here(
    options: argparse.Namespace, test_prompts: Callable[[Found | None], PromptSet], how: dict[str, Any]
) -> Report:
    for folder in options.exported:
        if not Path(folder).is_dir():
            raise ModelError(f"There is no folder {folder!r}: name one that export has written.")
    model = _model(options)
    classifier = ChatModel.load(options.classifier, **read_placement(options)) if options.classifier else None
    direction, found = _direction(model, options)
    prompts = test_prompts(found)
    if options.on and found is None:
        prompts = replace(prompts, source=f"{prompts.source}; whether the direction was found with some is not known")
    report: Report = followed(
        evaluate(model, prompts, paper_rows(direction), exported=options.exported, classifier=classifier, **how)
    )
    if not options.strengths:
        return report
    how = {"rules": options.rules, "max_new_tokens": options.max_new_tokens}
    measured: Strengths = followed(
        by_strength(model, prompts, direction, found.refusal_tokens if found is not None else (), **how)
    )
    return replace(report, damage=measured.damage, doses=measured.doses, refusals=measured.refusals)


def _export(options: argparse.Namespace) -> int:
    check_new(options.out)
    if options.strength != 1.0 and options.variant != "addition":
        raise ModelError(f"{options.variant!r} has no strength: leave --strength out, or take --variant addition.")
    model = _model(options)
    found = _found_with(options.direction) if options.direction else _found(model, options)
    direction = load_direction(model, options.direction) if options.direction else None
    if found is None or (direction is not None and found.direction.digest != direction.digest):
        found = None
        if options.variant in NEEDS_MEAN:
            raise DirectionError(
                f"The variant {options.variant!r} needs the mean of the harmless activations where the direction was read, "
                f"which {options.direction} does not hold: name the direction.safetensors in a folder that find --out has "
                "written, whole, or leave --direction out to find it anew."
            )
    mean = tokens = None
    if found is not None:
        direction, tokens = found.direction, found.refusal_tokens
        mean = found.harmless_mean(direction.source.position, direction.source.layer)
    assert direction is not None
    report = export(
        model,
        direction,
        options.out,
        variant=options.variant,
        harmless_mean=mean,
        strength=options.strength,
        refusal_tokens=tokens,
    )
    if options.json:
        print(json.dumps(finite(asdict(report)) | {"exact": report.exact}, allow_nan=False))
    else:
        print(report.in_words)
    return 0


RUN = {"find": _find, "chat": _chat, "evaluate": _evaluate, "export": _export}


# -- what commands share ---------------------------------------------------------------------------------------------


def _model(options: argparse.Namespace) -> ChatModel:
    return ChatModel.load(options.model, revision=options.revision, **read_placement(options))


def _prompts(split: Split, options: argparse.Namespace) -> PromptSet:
    return load_prompts(split, options.harmful or options.prompts, options.harmless)


def _direction(model: ChatModel, options: argparse.Namespace) -> tuple[Direction, Found | None]:
    """The direction, given or found, and the search that it is from; None of a file that stands alone."""
    if options.direction:
        return load_direction(model, options.direction), _found_with(options.direction)
    found = _found(model, options)
    return found.direction, found


def _found(model: ChatModel, options: argparse.Namespace, **how: Any) -> Found:
    """What is found with these options; `how` is as in `find_direction`."""
    search = find_direction if options.no_cache else find_or_recall
    return followed(search(model, _prompts("train", options), _prompts("val", options), seed=options.seed, **how))


def _found_with(direction: Path) -> Found | None:
    """The search in whose folder this direction was saved, None if the file stands alone."""
    with contextlib.suppress(DirectionError):
        return load_found(direction if direction.is_dir() else direction.parent)
    return None


def _save(found: Found, folder: Path) -> None:
    try:
        save_found(found, folder)
    except UNWRITTEN as error:
        raise _unwritten(folder, error) from error


def _unwritten(folder: Path, error: Exception) -> DirectionError:
    return DirectionError(f"{folder} cannot be written ({error}): name another folder.")


def _named(model: ChatModel, found: Found) -> dict:
    """What was found, with the texts of its tokens."""
    tokens = {"refusal_texts": [model.tokenizer.decode([token]) for token in found.refusal_tokens]}
    return {"model": model.description, **as_json(found), **tokens, "template_tokens": list(model.template_tokens)}


# -- tables ----------------------------------------------------------------------------------------------------------


def _print_found(model: ChatModel, found: Found) -> None:
    choice = found.choice
    scored = ("refuse", "comply", "kl") if found.direction.source.chosen_by else ("bypass", "induce", "kl")
    print("pos layer " + " ".join(f"{name:>7}" for name in ("‖r‖", *scored)) + "  rule")
    for s in found.scores:
        verdict = {choice.chosen: "chosen", choice.runner_up: "runner-up"}.get(s, choice.rejected.get(s, ""))
        print(f"{_row(s, scored)}  {verdict}")
    print(f"\n{model.description}")
    source = found.direction.source
    margin = "" if choice.margin is None else f", bypass {choice.margin:.2f} below the runner-up's"
    if source.chosen_by:
        margin = "" if choice.margin is None else f", similarity {choice.margin:.3f} above the runner-up's"
        print(f"chosen by {source.chosen_by}: the highest refuse + comply of the candidates that no rule discards")
    print(
        f"chosen: position {source.position} ({model.template_tokens[source.position]!r}), input of layer {source.layer} of "
        f"{model.n_layers}{margin}"
    )
    if choice.relaxed:
        print(
            f"No candidate passed every rule; this one needs the rule {choice.relaxed!r} relaxed least."
            + ("" if source.chosen_by else " `--by cosmic` chooses without refusal tokens.")
        )
    counts = funnel(choice, len(found.scores))
    print(f"\n{counts['candidates']:5} candidates")
    for rule, why in DISCARDED.items():
        print(f"{-counts[rule]:5} {why}")
    measured = sum(
        all(getattr(s, name) is not None for name in scored) for s in found.scores if s not in choice.rejected
    )
    print(f"{counts['left']:5} left, of which {measured} had to be measured whole")
    print(f"\nprompts: {found.prompts.source}")
    kept = ", ".join(f"{split} {cls} {k} of {n}" for (split, cls), (k, n) in found.counts.items())
    print(f"prompts, {'none left out' if source.chosen_by else 'those that the model treats as expected'}: {kept}")
    tokens = ", ".join(
        f"{model.tokenizer.decode([t])!r} {share:.0%}"
        for t, share in zip(found.refusal_tokens, found.refusal_shares, strict=True)
    )
    print(f"refusal tokens: {tokens or 'none that stand out'}")


def _row(s: CandidateScore, scored: Sequence[str]) -> str:
    values = [s.norm, *(getattr(s, name) for name in scored)]
    numbers = " ".join("      –" if x is None else f"{x:7.2f}" for x in values)
    return f"{s.pos:3} {s.layer:5} {numbers}"
