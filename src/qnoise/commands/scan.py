"""`qnoise scan`: what formats do to the weights of a checkpoint, as a page, as Markdown and as JSON.

qnoise scan PATH --fmt mxfp4 nvfp4                    the Markdown report on the standard output
qnoise scan ORG/NAME --fmt nvfp4 --out report.html    of a model on the hub, as a page
qnoise scan PATH --json | jq .rows                    for a script
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qnoise.commands.format_argument import SPELLING, format_spec
from qnoise.commands.model_argument import add_model, checkpoint_path
from qnoise.commands.output_argument import check_files
from qnoise.formats import QuantSpec

if TYPE_CHECKING:
    from qnoise.sensitivity import ScanReport

_EPILOG = f"""\
example: qnoise scan ./model --fmt mxfp4 nvfp4:four_over_six --out report.html

{SPELLING}

exit status: 0 the report is complete; 1 it is not, because something in the checkpoint is missing or damaged (the
report says what); 2 no report: a mistake in the arguments, or a checkpoint that cannot be read; 130 interrupted
(tensors that were finished are kept beside the first file of --out, and the same command goes on from there).
"""


def add_scan(commands: Any) -> None:
    """Add the command to those of a parser (what `add_subparsers` returned). It sets `run`, which takes the options."""
    parser = commands.add_parser(
        "scan",
        help="what formats do to the weights of a checkpoint",
        description="Quantize every weight of a checkpoint, one at a time, compare, and report. Files are read a piece "
        "at a time: the memory needed does not grow with the model.",
        epilog=_EPILOG,
    )
    add_model(parser, "a safetensors file, a folder of them, a shard index")
    parser.add_argument(
        "--fmt", nargs="+", type=format_spec, default=[QuantSpec()], metavar="FORMAT", help="to compare (mxfp4)"
    )
    parser.add_argument("--include", nargs="+", metavar="GLOB", help="only modules with these names")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="GLOB", help="leave these modules out")
    parser.add_argument(
        "--out", nargs="+", type=Path, default=[], metavar="FILE", help="write .html, .md or .json, one or several"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--markdown", action="store_true", help="print Markdown (done anyway without --out and --json)")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="rows of the Markdown's ranking (20)")
    parser.add_argument("--thresholds", choices=["gaussian", "classic"], default="gaussian", help="what is an issue")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="where finished tensors are kept (OUT.part)")
    parser.set_defaults(run=run_scan)


def run_scan(options: argparse.Namespace) -> int:
    """Do what the options say.

    Returns:
        The exit status: 0, or 1 for a report with serious findings.

    Raises:
        ValueError, OSError, ImportError: there is no report.
        KeyboardInterrupt: saying where finished tensors are kept.
    """
    _check_outputs(options)
    first = next(iter(options.out), None)
    part = options.resume or (None if first is None else first.with_name(first.name + ".part"))
    try:
        report = _report(options, part)
    except KeyboardInterrupt:
        kept = part is not None and part.is_file()
        what = f"what is finished is kept in {part}: the same command goes on from there" if kept else "nothing is kept"
        raise KeyboardInterrupt(what) from None
    _write(options, report)
    if options.resume is None and part is not None:
        part.unlink(missing_ok=True)
    return int(any(finding.serious for finding in report.findings))


def _report(options: argparse.Namespace, part: Path | None) -> ScanReport:
    from qnoise.sensitivity import scan

    return scan(
        checkpoint_path(options.model, options.revision),
        options.fmt,
        include=options.include,
        exclude=options.exclude,
        thresholds=options.thresholds,
        resume=part,
    )


def _check_outputs(options: argparse.Namespace) -> None:
    """Before the work, not after it: is there a place for the report?"""
    if options.json and options.markdown:
        raise ValueError("--json and --markdown both want the standard output; write one of them with --out")
    if options.top < 1:
        raise ValueError(f"--top {options.top} must be at least 1")
    check_files(options.out, (".html", ".md", ".json"))


def _write(options: argparse.Namespace, report: ScanReport) -> None:
    for path in options.out:
        written = {".html": report.to_html, ".json": report.to_json}.get(path.suffix)
        text = report.to_markdown(top=options.top) if written is None else written()
        path.write_text(text + "\n", encoding="utf-8")
    if options.json:
        print(report.to_json())
    elif options.markdown or not options.out:
        print(report.to_markdown(top=options.top))
    else:
        print(report.recommendation)
