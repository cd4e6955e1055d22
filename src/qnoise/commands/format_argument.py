"""How a format is spelled on the command line: a name, alone or with what differs from its defaults."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qnoise.formats import FORMATS, ROTATIONS, ROUNDINGS, QuantSpec, unknown_name

SPELLING = """\
A format is a name of `qnoise formats`, alone or with what differs from its defaults: nvfp4:four_over_six,
mxfp4:mse,macro_block=128, mxfp4:hadamard, mxfp8_e4m3:residual=0.5."""


def format_spec(text: str) -> QuantSpec:
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
        raise argparse.ArgumentTypeError(f"{text!r}: {error}{_maybe_a_path(text)}") from None


def format_name(text: str) -> str:
    """The name of a format, and nothing but that.

    Raises:
        argparse.ArgumentTypeError: there is no such format.
    """
    if text not in FORMATS:
        raise argparse.ArgumentTypeError(f"{unknown_name('format', text, FORMATS)}{_maybe_a_path(text)}")
    return text


def _maybe_a_path(text: str) -> str:
    """`--fmt` takes all that follows it."""
    return " If it is the model, let it stand before --fmt." if "/" in text or Path(text).exists() else ""
