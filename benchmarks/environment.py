"""Where a result was made: versions, commit, code, memory."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qnoise import cli

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "peft", "numpy", "safetensors", "tokenizers")
PEERS = ("triton", "torchao", "compressed-tensors", "trl", "verl", "liger-kernel")
COMPILERS = ("cc", "gcc", "clang")


def versions() -> dict[str, str]:
    """Versions of Python and of everything that may change a number."""
    import qnoise

    return {"python": platform.python_version(), "qnoise": qnoise.__version__} | _versions(PACKAGES)


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """What else may change a time: peers, compilers, cores, the instruction set torch uses."""
    return {
        "peers": _versions(PEERS) | {"microxcaling": _source_version("mx")},
        "compilers": {name: _compiler(name) for name in COMPILERS},
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
    }


def _source_version(module: str) -> str:
    """The commit of a package that is used from its source tree, having no release."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        return "not installed"
    try:
        return _git("rev-parse", "HEAD", folder=Path(found.origin).parent)[:12]
    except (OSError, subprocess.SubprocessError):
        return "(a source tree without its commit)"


def _compiler(name: str) -> str:
    """First line of what the compiler says about itself."""
    try:
        done = subprocess.run([name, "--version"], capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "not installed"
    return done.stdout.partition("\n")[0]


def device() -> str:
    """The processor or GPU a run used."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return cli.processor() or ""


def place(kind: str) -> dict[str, Any]:
    """What tells one place of a run from another: the device, "cpu" or "cuda", which of our own backends serves there,
    and of a GPU what its speed depends on."""
    from qnoise import ops

    found: dict[str, Any] = {"backend": ops.backend(kind)}
    if kind != "cuda":
        return found | {"device": cli.processor() or ""}
    properties = torch.cuda.get_device_properties()
    return found | {
        "device": properties.name,
        "gpu": {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "driver": _driver(),
        },
    }


def _driver() -> str:
    """Version of the NVIDIA driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.partition("\n")[0].strip()


def git_commit() -> str:
    """The commit of the working tree, with `+changes` where files differ from it; "unknown" without git."""
    try:
        commit = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--", "src", "benchmarks", ":!benchmarks/results")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit + ("+changes" if changes else "")


def _git(*arguments: str, folder: Path = ROOT) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def code_hash() -> str:
    """Hash of the Python files that decide the numbers of a training run: the package and the recovery benchmark."""
    import qnoise

    digest = hashlib.blake2b(digest_size=8)
    for folder in (Path(qnoise.__file__).parent, Path(__file__).parent / "recovery"):
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """Versions, device and commit, to stand beside a result."""
    return {"versions": versions(), "device": device(), "commit": git_commit()}


def peak_memory_mb() -> float:
    """Peak memory so far, MB: allocated on the GPU, or resident in this process (it may hold several runs)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        import resource
    except ImportError:  # Windows has no such counter
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if platform.system() == "Darwin" else peak / 1e3
