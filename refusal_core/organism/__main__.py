"""Rebuild the embedded model and measure it: `python -m refusal_core.organism train | evaluate | prompts`."""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from refusal_core.chat_model import ORGANISM, ChatModel
from refusal_core.organism import evaluation, training
from refusal_core.prompts import EMBEDDED


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m refusal_core.organism", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train the model from scratch, or go on where a run stopped")
    train.add_argument("--work", type=Path, default=Path("organism-run"), help="folder for the state of the run")
    train.add_argument("--out", type=Path, default=Path("organism-run/checkpoint"), help="where the checkpoint goes")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train.add_argument("--share", type=float, default=1.0, help="train on this share of the tokens, to try things out")
    train.add_argument("--compile", action="store_true", help="torch.compile: faster, needs a C++ compiler")
    measure = commands.add_parser("evaluate", help="measure a checkpoint and write the table into its README.md")
    measure.add_argument("--checkpoint", type=Path, default=ORGANISM)
    measure.add_argument("--log", type=Path, help="write every judged reply to this .jsonl file")
    write = commands.add_parser("prompts", help="write the embedded prompts")
    write.add_argument("--out", type=Path, default=EMBEDDED)
    args = parser.parse_args()
    if args.command == "train":
        _train(args)
    elif args.command == "evaluate":
        _evaluate(args)
    else:
        evaluation.write_prompts(args.out)


def _train(args: argparse.Namespace) -> None:
    phases = tuple(replace(phase, tokens=int(phase.tokens * args.share)) for phase in training.PHASES)
    started, first, losses = time.time(), None, []
    for at in training.train(
        args.work, args.out, seed=args.seed, device=args.device, phases=phases, compile=args.compile
    ):
        first = first or at
        losses.append(at.loss)
        if at.step % 25 == 0:
            speed = (at.tokens - first.tokens) / (time.time() - started)
            mean = sum(losses) / len(losses)
            print(
                f"phase {at.phase} step {at.step} tokens {at.tokens:,} loss {mean:.4f} ({speed:,.0f} tokens/s)",
                flush=True,
            )
            losses = []


def _evaluate(args: argparse.Namespace) -> None:
    model = ChatModel.load(args.checkpoint)
    _, table, log = evaluation.evaluate(model)
    text = evaluation.as_markdown(table)
    print(text)
    (args.checkpoint / "README.md").write_text(evaluation.card(text, model), "utf-8")
    if args.log:
        args.log.write_text("".join(json.dumps(row) + "\n" for row in log), "utf-8")


if __name__ == "__main__":
    main()
