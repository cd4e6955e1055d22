"""`qnoise scan`: what formats do to the weights of a checkpoint, as a page, as Markdown and as JSON.

qnoise scan PATH --fmt mxfp4 nvfp4                    the Markdown report on the standard output
qnoise scan ORG/NAME --fmt nvfp4 --out report.html    of a model on the hub, as a page
qnoise scan PATH --json - | jq .rows                  for a script
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qnoise.formats import ROTATIONS, ROUNDINGS, QuantSpec

if TYPE_CHECKING:
    from qnoise.sensitivity import ScanReport

_EPILOG = """\
example: qnoise scan ./model --fmt mxfp4 nvfp4:four_over_six --out report.html

A format is a name of `qnoise formats`, alone or with what differs from its defaults: nvfp4:four_over_six,
mxfp4:mse,macro_block=128, mxfp4:hadamard, mxfp8_e4m3:residual=0.5.

exit status: 0 the report is complete; 1 it is not, because something in the checkpoint is missing or damaged (the
report says what); 2 no report: a mistake in the arguments, or a checkpoint that cannot be read; 130 interrupted
(tensors that were finished are kept in OUT.part, and the same command goes on from there).
"""


def add_scan(commands: Any) -> None:
    """Add the command to those of a parser (what `add_subparsers` returned). It sets `run`, which takes the options."""
    parser = commands.add_parser(
        "scan",
        help="what formats do to the weights of a checkpoint",
        description="Quantize every weight of a checkpoint, one at a time, compare, and report. Files are read a piece "
        "at a time: the memory needed does not grow with the model.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint",
        metavar="PATH_OR_HUB_ID",
        help="a safetensors file, a folder of them, a shard index, or ORG/NAME of a model on the hub",
    )
    parser.add_argument(
        "--fmt", nargs="+", type=_spec, default=[QuantSpec()], metavar="FORMAT", help="formats to compare (mxfp4)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a page (.html), Markdown (.md) or JSON (.json)")
    parser.add_argument("--json", metavar="FILE", help="write JSON too; - for the standard output")
    parser.add_argument("--markdown", action="store_true", help="print Markdown (done anyway without --out and --json)")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="rows of the Markdown's ranking (20)")
    parser.add_argument("--include", nargs="+", metavar="GLOB", help="only modules with these names")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="GLOB", help="leave these modules out")
    parser.add_argument("--thresholds", choices=["gaussian", "classic"], default="gaussian", help="what is an issue")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="where finished tensors are kept (OUT.part)")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a model on the hub")
    parser.set_defaults(run=run_scan)


def run_scan(options: argparse.Namespace) -> int:
    """Do what the options say.

    Returns:
        The exit status: 0, 1 for a report with serious findings, 2 if there is none, 130 if interrupted.
    """
    part = None
    try:
        _check_outputs(options)
        part = options.resume or (None if options.out is None else options.out.with_name(options.out.name + ".part"))
        report = _report(options, part)
        _write(options, report)
    except (ValueError, OSError, ImportError) as error:
        print(f"qnoise scan: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = part is not None and part.is_file()
        what = f"what is finished is kept in {part}: the same command goes on from there" if kept else "nothing is kept"
        print(f"\nqnoise scan: interrupted; {what}", file=sys.stderr)
        return 130
    if options.resume is None and part is not None:
        part.unlink(missing_ok=True)
    return int(any(finding.serious for finding in report.findings))


def _report(options: argparse.Namespace, part: Path | None) -> ScanReport:
    from qnoise.sensitivity import scan

    return scan(
        checkpoint_path(options.checkpoint, options.revision),
        options.fmt,
        include=options.include,
        exclude=options.exclude,
        thresholds=options.thresholds,
        resume=part,
    )


def checkpoint_path(where: str, revision: str | None = None) -> Path:
    """A local path as it is; what is none, and could be ORG/NAME, downloaded from the hub (safetensors only).

    Raises:
        FileNotFoundError: neither a path nor a name; or not to be had: the hub's reason stands in the text.
        ImportError: a name, and huggingface_hub is not installed.
    """
    path = Path(where)
    if path.exists():
        return path
    parts = where.split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~") or where.endswith(".safetensors"):
        raise FileNotFoundError(f"{where} does not exist, and is no ORG/NAME of a model on the hub either")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError(
            f"{where} does not exist here, and huggingface_hub, which could fetch it, is missing"
        ) from None
    try:
        return Path(
            snapshot_download(where, revision=revision, allow_patterns=["*.safetensors", "*.safetensors.index.json"])
        )
    except Exception as error:  # of many kinds: no connection, no such model, no access
        reason = " ".join(str(error).split())[:300]
        raise FileNotFoundError(
            f"{where} does not exist here and cannot be had from the hub ({type(error).__name__}: {reason}). Give the "
            "path of a model that is there already, or check name and connection"
        ) from None


def _check_outputs(options: argparse.Namespace) -> None:
    """Before the work, not after it: is there a place for the report?"""
    if options.out is not None and options.out.suffix not in (".html", ".md", ".json"):
        raise ValueError(f"--out {options.out}: the name must end in .html, .md or .json")
    if options.json == "-" and options.markdown:
        raise ValueError("--json - and --markdown both want the standard output; give --json a file")
    if options.top < 1:
        raise ValueError(f"--top {options.top} must be at least 1")
    for path in (options.out, None if options.json in (None, "-") else Path(options.json)):
        if path is not None:
            if path.is_dir():
                raise ValueError(f"{path} is a folder; name a file")
            path.parent.mkdir(parents=True, exist_ok=True)


def _write(options: argparse.Namespace, report: ScanReport) -> None:
    if options.out is not None:
        written = {".html": report.to_html, ".json": report.to_json}.get(options.out.suffix)
        text = report.to_markdown(top=options.top) if written is None else written()
        options.out.write_text(text + "\n", encoding="utf-8")
    if options.json == "-":
        print(report.to_json())
        return
    if options.json is not None:
        Path(options.json).write_text(report.to_json() + "\n", encoding="utf-8")
    if options.markdown or (options.out is None and options.json is None):
        print(report.to_markdown(top=options.top))
    else:
        print(report.recommendation)


def _spec(text: str) -> QuantSpec:
    """`nvfp4`, `nvfp4:four_over_six`, `mxfp4:mse,macro_block=128`.

    Raises:
        argparse.ArgumentTypeError: there is no such format, or it cannot have what is asked.
    """
    name, _, rest = text.partition(":")
    fields: dict[str, Any] = {}
    try:
        for word in filter(None, rest.split(",")):
            key, equals, value = word.partition("=")
            if equals:
                if key not in ("macro_block", "residual"):
                    raise ValueError(f"{key!r} takes no number; macro_block and residual do")
                fields[key] = int(value) if key == "macro_block" else float(value)
            elif word in ROTATIONS:
                fields["rotation"] = word
            else:
                fields["rounding" if word in ROUNDINGS else "scale_mode"] = word
        return QuantSpec(name, **fields)
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
