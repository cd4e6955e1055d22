"""`qnoise env`: versions, devices, and which code serves fake quantization on each."""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import qnoise
from qnoise import ops

_PACKAGES = {
    "torch": "everything",
    "numpy": "everything",
    "triton": "GPU kernels; plain PyTorch serves without it",
    "safetensors": "checkpoints, qnoise scan",
    "transformers": "its models, qnoise repair, qnoise export",
    "peft": "adapters",
    "huggingface_hub": "models that are not here yet",
    "accelerate": "Trainer, device_map, load_packed",
    "compressed-tensors": "qnoise export, and loading what it wrote",
    "trl": "TRL's trainers",
    "matplotlib": "figures",
}
"""Name -> what it is needed for."""


def add_env(commands: Any) -> None:
    """Add the command to those of a parser (what `add_subparsers` returned). It sets `run`, which takes the options."""
    parser = commands.add_parser(
        "env",
        help="versions, devices and active backends",
        description="Versions, devices, and which code serves fake quantization on each.",
        epilog="example: qnoise env --json > environment.json",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run_env)


def run_env(options: argparse.Namespace) -> int:
    """Print what was found; returns the exit status."""
    found = environment()
    print(json.dumps(found, indent=1) if options.json else _text(found))
    return 0


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


def _text(found: dict[str, Any]) -> str:
    lines = [f"qnoise {found['qnoise']}, Python {found['python']}, {found['threads']} threads"]
    for name, installed in found["packages"].items():
        lines.append(f"  {name:<20} {installed or f'not installed (needed for: {_PACKAGES[name]})'}")
    for name, device in found["devices"].items():
        lines += [f"{name}: {device['hardware'] or 'unknown hardware'}", f"  fake quantization: {device['backend']}"]
    if len(found["devices"]) == 1:
        lines.append("no GPU that this torch can use: everything runs on the CPU")
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
