"""`qnoise formats`: the formats, their bits and their scale modes."""

from __future__ import annotations

import argparse
import json
from typing import Any

from qnoise.formats import FORMATS


def add_formats(commands: Any) -> None:
    """Add the command to those of a parser (what `add_subparsers` returned). It sets `run`, which takes the options."""
    parser = commands.add_parser(
        "formats",
        help="the formats, their bits and their scale modes",
        description="The formats that every --fmt and every fmt= takes. The first scale mode is the default.",
        epilog="example: qnoise formats --json | jq '.nvfp4.scale_modes'",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object: name -> its properties")
    parser.set_defaults(run=run_formats)


def run_formats(options: argparse.Namespace) -> int:
    """Print the table; returns the exit status."""
    found = {
        name: {
            "element": fmt.element.name,
            "block_size": fmt.block_size,
            "scale": fmt.scale,
            "per_tensor_scale": fmt.per_tensor_scale,
            "bits_per_element": fmt.bits_per_element,
            "largest": fmt.element.max,
            "scale_modes": list(fmt.scale_modes),
        }
        for name, fmt in FORMATS.items()
    }
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    print(f"{'format':<12} {'element':<8} {'block':>5}  {'scale':<11} {'bits':>5}  scale modes (first = default)")
    for name, fmt in FORMATS.items():
        scale = fmt.scale + (" + fp32" if fmt.per_tensor_scale else "")
        print(
            f"{name:<12} {fmt.element.name:<8} {fmt.block_size:>5}  {scale:<11} {fmt.bits_per_element:>5g}  "
            f"{', '.join(fmt.scale_modes)}"
        )
    return 0
