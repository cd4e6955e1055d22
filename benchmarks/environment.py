"""Where a result was made: versions, commit, code, memory."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "peft", "numpy", "safetensors", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of Python and of everything that may change a number."""
    import qnoise

    found = {"python": platform.python_version(), "qnoise": qnoise.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def device() -> str:
    """The processor or GPU a run used."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        for line in cpu_info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def git_commit() -> str:
    """The commit of the working tree, with `+changes` where files differ from it; "unknown" without git."""
    try:
        commit = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--", "src", "benchmarks", ":!benchmarks/results")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit + ("+changes" if changes else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
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
