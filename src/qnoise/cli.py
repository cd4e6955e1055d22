"""The `qnoise` command, also `python -m qnoise`.

qnoise env          versions, devices, and which code serves fake quantization on each
qnoise env --json   the same for a script
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import qnoise
from qnoise import ops

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0, or 2 for arguments it does not know."""
    parser = argparse.ArgumentParser(prog="qnoise", description="Train language models through low-bit quantization.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    env = commands.add_parser(
        "env",
        help="versions, devices and active backends",
        description="Versions, devices, and which code serves fake quantization on each.",
        epilog="example: qnoise env --json > environment.json",
    )
    env.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    found = environment()
    print(json.dumps(found, indent=1) if given.json else _text(found))
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
