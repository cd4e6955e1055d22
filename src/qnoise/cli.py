"""The `qnoise` command, also `python -m qnoise`.

qnoise env       versions, devices, and which code serves fake quantization on each
qnoise formats   the formats, their bits and their scale modes
qnoise scan      what formats do to the weights of a checkpoint
qnoise repair    which repair wins back most on a model

A command is a function in `COMMANDS`: it adds a parser, which sets `run`, a function from the options to the exit
status. What such a function imports beyond the package's own names, it imports when it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import qnoise
from qnoise import ops
from qnoise.repair_command import add_repair
from qnoise.scan_command import add_scan

_PACKAGES = (
    *("torch", "triton", "numpy", "transformers", "peft", "safetensors"),
    *("accelerate", "trl", "compressed-tensors"),
)


def environment() -> dict[str, Any]:
    """What this installation runs on.

    Returns:
        "qnoise" and "python" (versions), "packages" (name -> version, None if not installed), "threads" (of torch on
        the CPU) and "devices" (name -> "hardware", None where unknown, and "backend": what serves `fake_quantize`
        there and why no faster code does).
    """
    devices: dict[str, dict[str, str | None]] = {"cpu": {"hardware": processor(), "backend": ops.backend("cpu")}}
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    for index in range(torch.accelerator.device_count() if kind is not None else 0):
        device = f"{kind}:{index}"
        hardware = torch.cuda.get_device_name(index) if str(kind) == "cuda" else None
        devices[device] = {"hardware": hardware, "backend": ops.backend(device)}
    return {
        "qnoise": qnoise.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "threads": torch.get_num_threads(),
        "devices": devices,
    }


def add_env(commands: Any) -> None:
    """`qnoise env`."""
    parser = commands.add_parser(
        "env",
        help="versions, devices and active backends",
        description="Versions, devices, and which code serves fake quantization on each.",
        epilog="example: qnoise env --json > environment.json",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run_env)


def _run_env(options: argparse.Namespace) -> int:
    found = environment()
    print(json.dumps(found, indent=1) if options.json else _text(found))
    return 0


def add_formats(commands: Any) -> None:
    """`qnoise formats`."""
    parser = commands.add_parser(
        "formats",
        help="the formats, their bits and their scale modes",
        description="The formats that every fmt= takes. The first scale mode is the default.",
        epilog="example: qnoise formats --json",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run_formats)


def _run_formats(options: argparse.Namespace) -> int:
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
        for name, fmt in qnoise.FORMATS.items()
    }
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    print(f"{'format':<12} {'element':<8} {'block':>5}  {'scale':<11} {'bits':>5}  scale modes (first = default)")
    for name, fmt in qnoise.FORMATS.items():
        scale = fmt.scale + (" + fp32" if fmt.per_tensor_scale else "")
        print(
            f"{name:<12} {fmt.element.name:<8} {fmt.block_size:>5}  {scale:<11} {fmt.bits_per_element:>5g}  "
            f"{', '.join(fmt.scale_modes)}"
        )
    return 0


COMMANDS: tuple[Callable[[Any], None], ...] = (add_env, add_formats, add_scan, add_repair)
"""What adds each command, in the order of the help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit status: that of the command; 130 if it was interrupted. Arguments it does not know end the process
        with 2.
    """
    parser = argparse.ArgumentParser(prog="qnoise", description="Train language models through low-bit quantization.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for add in COMMANDS:
        add(commands)
    options = parser.parse_args(arguments)
    try:
        status = int(options.run(options))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("\nqnoise: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `qnoise formats | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _text(found: dict[str, Any]) -> str:
    lines = [f"qnoise {found['qnoise']}, Python {found['python']}, {found['threads']} threads"]
    lines += [f"  {name:<20} {version or 'not installed'}" for name, version in found["packages"].items()]
    for name, device in found["devices"].items():
        lines += [f"{name}: {device['hardware'] or 'unknown hardware'}", f"  fake quantization: {device['backend']}"]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str | None:
    """The CPU's name, or its architecture where the system does not tell; None where it tells neither."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or None


if __name__ == "__main__":
    sys.exit(main())
