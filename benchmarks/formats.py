"""Error of every format and scale mode on gaussian data: `python -m benchmarks.formats`.

Normal values of standard deviation 0.02 (the size of language-model weights), in bf16; `--rows` x 4096
of them per seed. Writes benchmarks/results/formats.json, from which `make results` renders the README's table.
"""

from __future__ import annotations

import argparse
import statistics

import torch

import qnoise
from benchmarks.environment import environment
from benchmarks.files import RESULTS, write_json

SIGMA = 0.02
FIGURES = ("sqnr_db", "relative_rms", "mean_relative_error", "deadzone", "clipped")


def measure(fmt: str, scale_mode: str, seeds: list[int], rows: int) -> dict[str, object]:
    """Mean and spread (standard deviation over seeds) of each figure."""
    reports = []
    for seed in seeds:
        x = SIGMA * torch.randn(rows, 4096, generator=torch.Generator().manual_seed(seed))
        x = x.bfloat16().float()
        spec = qnoise.QuantSpec(fmt, scale_mode)
        reports.append(qnoise.metrics.error_report(x, qnoise.fake_quantize(x, spec), spec))
    row: dict[str, object] = {"fmt": fmt, "scale_mode": scale_mode}
    for figure in FIGURES:
        values = [report[figure] for report in reports]
        row[figure] = statistics.fmean(values)
        row[f"{figure}_sd"] = statistics.stdev(values)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    arguments = parser.parse_args()
    rows = [
        measure(name, mode, arguments.seeds, arguments.rows)
        for name, fmt in qnoise.FORMATS.items()
        for mode in fmt.scale_modes
    ]
    seeds = " ".join(map(str, arguments.seeds))
    result = {
        "schema": 1,
        "command": f"python -m benchmarks.formats --rows {arguments.rows} --seeds {seeds}",
        "sigma": SIGMA,
        "seeds": arguments.seeds,
        "environment": environment(),
        "rows": rows,
    }
    write_json(RESULTS / "formats.json", result)
    for row in rows:
        print(f"{row['fmt']:<11} {row['scale_mode']:<14} {row['sqnr_db']:6.2f} dB")


if __name__ == "__main__":
    main()
