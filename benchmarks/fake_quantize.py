"""Time of `fake_quantize` against a copy of the same tensor: `python -m benchmarks.fake_quantize`.

Contenders run in turn, round after round, on one thread; a row is the median over rounds of the ratio to the `copy_` of
the same round, with its quartiles, so that a machine that slows down slows both. Results first have to be right: each
contender is compared with the reference before it is timed. Appends to benchmarks/results/fake_quantize.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

import qnoise
from benchmarks.environment import environment
from benchmarks.files import RESULTS

FORMATS = ("mxfp4", "nvfp4", "mxfp6_e2m3", "mxfp8_e4m3", "mxint8")


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048, help="rows and columns of the tensor")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dry-run", action="store_true", help="print, and append nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(arguments.size, arguments.size, generator=torch.Generator().manual_seed(0)).to(dtype)
        out = torch.empty_like(x)
        ratios: dict[str, list[float]] = {name: [] for name in FORMATS}
        for name in FORMATS:
            packed = qnoise.quantize(x, name).dequantize()
            if not torch.equal(qnoise.fake_quantize(x, name, out=out), packed):
                raise RuntimeError(f"{name}: fake_quantize and quantize -> dequantize differ; nothing is timed")
        for _ in range(arguments.rounds):
            copy = seconds(lambda x=x, out=out: out.copy_(x))
            for name in FORMATS:
                ratios[name].append(seconds(lambda n=name, x=x, out=out: qnoise.fake_quantize(x, n, out=out)) / copy)
        for name, values in ratios.items():
            low, middle, high = statistics.quantiles(values, n=4)
            row = {
                "schema": 1,
                "benchmark": "fake_quantize",
                "fmt": name,
                "dtype": str(dtype).removeprefix("torch."),
                "size": arguments.size,
                "rounds": arguments.rounds,
                "threads": 1,
                "times_copy": middle,
                "times_copy_quartiles": [low, high],
                "command": f"python -m benchmarks.fake_quantize --size {arguments.size} --rounds {arguments.rounds}",
                "environment": environment(),
            }
            print(f"{row['dtype']:<9} {name:<11} {middle:6.1f} x copy_  (quartiles {low:.1f} to {high:.1f})")
            if not arguments.dry_run:
                with (RESULTS / "fake_quantize.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
