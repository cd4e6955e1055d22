"""Microbenchmarks, and the tables made from them: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import micro, render
from benchmarks.files import RESULTS
from benchmarks.micro.measure import GateError
from benchmarks.micro.run import run


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="check and time; appends to benchmarks/results/")
    one.add_argument("names", nargs="*", metavar="NAME", help="which (see `list`); all if none is given")
    one.add_argument("--only", nargs="+", default=[], metavar="NAME=VALUE", help="cases with these parameters")
    one.add_argument("--quick", action="store_true", help="small and few: a minute for all; writes only with --out")
    one.add_argument("--out", type=Path, metavar="FOLDER", help="append there instead of to benchmarks/results/")
    commands.add_parser("list", help="what there is to run")
    two = commands.add_parser("results", help="render the tables of README.md and docs/ from the committed results")
    two.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a table differs")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 for a failed check, 2 for a mistake in the arguments."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_args(words)
    try:
        if options.command == "list":
            for name in micro.ENTRIES:
                print(f"{name:<16} {micro.entry(name).TITLE}")
        elif options.command == "results":
            return render.results(render.documents(), options.check)
        else:
            out = options.out or (None if options.quick else RESULTS)
            typed = shlex.join(["python", "-m", "benchmarks", *words])
            only = dict(word.partition("=")[::2] for word in options.only)
            run(options.names or micro.ENTRIES, only=only, quick=options.quick, out=out, command=typed)
    except GateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
