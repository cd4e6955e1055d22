"""Peak memory of one contender, in a process of its own.

The second call is measured: the first one leaves behind what stays anyway (pages of libraries, tables, a compiled
file). Memory is the resident memory of the process as Linux counts it, read before the call and at its highest since
(the high-water mark is set back through /proc/self/clear_refs), so temporaries that live for a moment are seen. The
parent sets glibc's thresholds so that every block above 64 KiB goes back to the system when it is freed: otherwise the
second call would find the first one's pages already resident, and seem to need nothing.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def peak_bytes(call: Callable[[], object], before: Callable[[], object] | None = None) -> int:
    """Bytes the second call needs at its peak above what was resident before it; its result is counted.

    Raises:
        OSError: the system has no /proc/self/clear_refs (it is Linux's).
    """
    for _ in range(2):
        if before is not None:
            before()
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        resident = _status("VmRSS")
        result = call()
        peak = _status("VmHWM")
        del result
    return peak - resident


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def measure_peak(entry: str, index: int, contender: str, quick: bool) -> int:
    """Peak bytes of a contender of the index-th case of an entry, measured in a fresh process.

    Raises:
        RuntimeError: that process failed; its last words are shown.
    """
    command = [sys.executable, "-m", "benchmarks.micro.peak", entry, str(index), contender, str(int(quick))]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **MALLOC}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"peak memory of {contender!r} ({' '.join(command[1:])}) failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return int(found["peak_bytes"])


def main(entry: str, index: int, name: str, quick: bool) -> None:
    from benchmarks import micro

    for number, case in enumerate(micro.entry(entry).cases(quick)):
        if number < index:
            continue
        torch.set_num_threads(case.parameters.get("threads", 1))
        contender = next(c for c in case.contenders if c.name == name)
        if contender.call is None:
            raise ValueError(f"{name} does not run here: {contender.absent}")
        print(json.dumps({"peak_bytes": peak_bytes(contender.call, contender.before)}))
        return
    raise ValueError(f"{entry} has no case number {index}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] == "1")
