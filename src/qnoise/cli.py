"""The `qnoise` command, also `python -m qnoise`.

qnoise scan      what formats do to the weights of a checkpoint
qnoise repair    which repair wins back most on a model
qnoise export    a model, or an adapter on one, as a compressed-tensors checkpoint
qnoise demo      a tiny RL run through 4 bits, arms side by side
qnoise env       versions, devices, and which code serves fake quantization on each
qnoise formats   the formats, their bits and their scale modes

A command is a function in `COMMANDS`: it adds a parser, which sets `run`, a function from the options to the exit
status. What such a function imports beyond the package's own names, it imports when it runs. All commands write what
was asked for to the standard output and everything else to stderr, and `main` turns their errors into a line.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from qnoise.commands.demo import add_demo
from qnoise.commands.env import add_env, environment, processor
from qnoise.commands.export import add_export
from qnoise.commands.formats import add_formats
from qnoise.commands.repair import add_repair
from qnoise.commands.scan import add_scan
from qnoise.spelling import nearest

__all__ = ["COMMANDS", "environment", "main", "processor"]

COMMANDS: tuple[Callable[[Any], None], ...] = (add_scan, add_repair, add_export, add_demo, add_env, add_formats)
"""What adds each command, in the order of the help."""

_EPILOG = """\
example: qnoise scan ./model --fmt mxfp4 nvfp4 --out report.html

exit status: 0 done; 1 done, and something is wrong that the output tells (a damaged tensor, a run that failed);
2 not done: a mistake in the arguments, or something that is missing; 130 interrupted.
"""


class Parser(argparse.ArgumentParser):
    """Options are written in full, and help keeps its line breaks."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit status: that of the command; 2 with a line on stderr if it raised what a user can mend; 130 if it was
        interrupted. Arguments it does not know end the process with 2.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = "qnoise"
    try:
        try:
            options = _parse(arguments)
            name = f"qnoise {options.command}"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of libraries, to those who call them
                warnings.showwarning = lambda message, *_: _say(f"{name}: warning: {message}")
                return int(options.run(options))
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt as stopped:
        print(file=sys.stderr)  # below the ^C of the terminal
        _say("; ".join([f"{name}: interrupted", *map(str, stopped.args)]))
        return 130
    except BrokenPipeError:  # `qnoise formats | head`: nobody reads on
        _drop_output()
        return 0
    except (torch.OutOfMemoryError, MemoryError) as error:
        _say(f"{name}: out of memory: {error}")
        return 2
    except (ValueError, OSError, ImportError) as error:
        _say(f"{name}: {error}")
        _drop_output()
        return 2


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="qnoise",
        description="Train language models through low-bit quantization: measure, repair, export.",
        epilog=_EPILOG,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for add in COMMANDS:
        add(commands)
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands.choices:
        _refuse(parser, "command", arguments[0], list(commands.choices))
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        chosen = commands.choices[options.command]
        wrong = next((word for word in unknown if word.startswith("-")), unknown[0])
        known = sorted(set(re.findall(r"--[a-z][a-z-]*", chosen.format_usage())))
        _refuse(chosen, "option" if wrong.startswith("-") else "argument", wrong.partition("=")[0], known)
    return options


def _refuse(parser: argparse.ArgumentParser, kind: str, given: str, known: Sequence[str]) -> NoReturn:
    near = nearest(given, known)
    parser.error(f"no {kind} {given!r}; there are: {', '.join(known)}." + (f" Did you mean {near!r}?" if near else ""))


def _say(text: str) -> None:
    print(" ".join(text.split()), file=sys.stderr)


def _drop_output() -> None:
    """What is still in the buffer can go nowhere; Python would complain of it at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
