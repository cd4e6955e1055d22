"""`qnoise demo`: the recovery benchmark's demonstration, for which a clone of the repository is needed.

The task, the checkpoints and the trainer of the demonstration are in `benchmarks/`, beside the package and not in it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

_EPILOG = """\
example: qnoise demo --seeds 0 --out out/demo

In a folder of the clone this is `python -m benchmarks.recovery demo`, which has more options; `make demo` sets up an
environment first.

exit status: 0 done; 1 a run failed or is unfinished; 2 not done: no clone here, or a mistake in the arguments;
130 interrupted (--resume goes on from there).
"""


def add_demo(commands: Any) -> None:
    """Add the command to those of a parser (what `add_subparsers` returned). It sets `run`, which takes the options."""
    parser = commands.add_parser(
        "demo",
        help="a tiny RL run through 4 bits, arms side by side (in a clone of the repository)",
        description="Train a tiny policy by RL in full precision, through MXFP4 and with noise, and compare: a table, "
        "curves and a page. Minutes on two cores; needs no connection and no GPU.",
        epilog=_EPILOG,
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="seeds of each arm (0 1)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (one a core)")
    parser.add_argument("--out", metavar="FOLDER", help="where logs, table and page go (out/demo in the clone)")
    parser.add_argument("--resume", action="store_true", help="continue what an earlier call left")
    parser.set_defaults(run=run_demo)


def run_demo(options: argparse.Namespace) -> NoReturn:
    """Become the benchmark, run in the clone.

    Raises:
        FileNotFoundError: neither the current folder nor that of the package lies in a clone.
    """
    clone = find_clone(Path.cwd()) or find_clone(Path(__file__).resolve().parent)
    if clone is None:
        raise FileNotFoundError(
            "the demonstration is part of the repository, not of the installed package, and neither this folder nor "
            "the package lies in a clone. Clone the repository and run `make demo` there; scan, repair, export, env "
            "and formats need no clone"
        )
    words: list[str] = []
    if options.seeds is not None:
        words += ["--seeds", *map(str, options.seeds)]
    if options.workers is not None:
        words += ["--workers", str(options.workers)]
    if options.out is not None:
        words += ["--out", str(Path(options.out).absolute())]
    words += ["--resume"] * options.resume
    # In place of this process, so that Ctrl-C and the exit status are the benchmark's own. The variables are those of
    # `make demo`: it runs a process a core.
    for name, value in (("OMP_NUM_THREADS", "1"), ("TOKENIZERS_PARALLELISM", "false")):
        os.environ.setdefault(name, value)
    os.chdir(clone)
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.recovery", "demo", *words])


def find_clone(folder: Path) -> Path | None:
    """The folder or the parent of it that is a clone of this repository."""
    for each in (folder, *folder.parents):
        project, demo = each / "pyproject.toml", each / "benchmarks" / "recovery" / "__main__.py"
        if demo.is_file() and project.is_file() and 'name = "qnoise-torch"' in project.read_text(encoding="utf-8"):
            return each
    return None
