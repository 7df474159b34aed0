"""How refusal works inside a chat model, on the command line.

commands:
  app       open the page (`app --help` says more)
  find      find a model's refusal direction, and say of every candidate which rule discarded it
  chat      talk with the model unchanged, with the direction removed, and with it added, side by side
  evaluate  complete harmful and harmless prompts with and without the direction, and give the rates
  export    write a checkpoint in whose weights the direction is removed or added

MODEL is a folder or a hub id (Qwen/Qwen2.5-0.5B-Instruct); without one it is the embedded toy model. A direction that
is needed and not given is found first; a search that was made before is recalled from the cache.
"""

import argparse
import io
import sys
from collections.abc import Sequence

EPILOG = """\
examples:
  python -m refusal_core find
  python -m refusal_core find Qwen/Qwen2.5-0.5B-Instruct --out qwen
  python -m refusal_core find ./my-model --harmful bad.txt --harmless good.txt --json > found.json
  python -m refusal_core evaluate Qwen/Qwen2.5-0.5B-Instruct --prompts jailbreakbench
  python -m refusal_core find --harmful 'hub:owner/name/data/train.csv#text&label=1' --harmless alpaca
  python -m refusal_core chat Qwen/Qwen2.5-0.5B-Instruct --direction qwen/direction.safetensors
  python -m refusal_core evaluate --n 20 --json | jq .rates
  python -m refusal_core evaluate --n 20 --strengths --exported toy-without
  python -m refusal_core export Qwen/Qwen2.5-0.5B-Instruct --out qwen-without
  python -m refusal_core export --variant projected-norm-preserving --out toy-without

exit status:
  0    done
  1    it cannot be done; the reason and the remedy are on stderr
  2    the command line is not understood
  130  interrupted

Searches are kept in the user's cache folder, or in REFUSAL_CACHE if that is set.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 for an expected failure, 2 for usage, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file on Windows takes no ‖r‖
            stream.reconfigure(errors="replace")
    parser = argparse.ArgumentParser(
        prog="python -m refusal_core",
        usage="%(prog)s COMMAND [MODEL] [options]",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    try:
        if given[:1] in (["-h"], ["--help"]):
            parser.parse_args(given)
        if given[:1] == ["app"]:
            from refusal_core.ui import server  # with gradio, for which no other command waits

            return server.main(given[1:])
        from refusal_core import commands  # with torch, for which --help does not wait

        return commands.run(parser, given)
    except KeyboardInterrupt:
        print("\nInterrupted: nothing is left half-written.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
