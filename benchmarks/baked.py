"""A base, the baked base, and the baked base with adapters: `python -m benchmarks.baked`.

Scans of a shipped policy in every arrangement in which it can be served. An adapter has random weights of a seed (rank
4, on all linears); its size is set so that it changes a weight by `--share` of its norm, about as much as 4 bits do.
Writes benchmarks/results/baked.json, from which `make results` renders the table of docs/scan.md.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qnoise
from benchmarks.environment import environment
from benchmarks.files import RESULTS, write_json

ROOT = Path(__file__).resolve().parents[1]
POLICY = "benchmarks/recovery/checkpoints/words-0"
FMTS = ("mxfp4", "nvfp4")


def base() -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(ROOT / POLICY, dtype=torch.float32)


def adapted(model: nn.Module, seed: int, share: float) -> nn.Module:
    """The model under a random adapter that changes each weight by `share` of its norm."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    wrapped = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    with torch.no_grad():
        for module in wrapped.modules():
            if hasattr(module, "get_delta_weight"):
                delta = module.get_delta_weight("default")
                module.lora_B["default"].weight.mul_(share * module.base_layer.weight.norm() / delta.norm())
    return wrapped


def arrangements(fmt: str, seeds: list[int], share: float) -> Iterator[tuple[str, str, qnoise.ScanReport]]:
    """(arrangement, kind of rows that are served, report)."""
    baked = qnoise.bake(qnoise.patch_model(base(), fmt))
    yield "base", "weight", qnoise.scan(base(), fmt)
    yield "baked base", "weight", qnoise.scan(baked, fmt)
    for seed in seeds:
        model = adapted(baked, seed, share)
        report = qnoise.scan(model, fmt)
        yield f"baked base, beside it adapter {seed}", "weight", report
        yield f"baked base + adapter {seed}, as trained", "merged", report
        merged = model.merge_and_unload()
        yield f"baked base + adapter {seed}, merged", "weight", qnoise.scan(merged, fmt)
        again = qnoise.bake(qnoise.patch_model(merged, fmt))
        yield f"baked base + adapter {seed}, merged and quantized again", "weight", qnoise.scan(again, fmt)


def row(fmt: str, arrangement: str, kind: str, report: qnoise.ScanReport) -> dict[str, Any]:
    """The weights of one arrangement taken together."""
    rows = report.select(kind=kind)
    energy = [each.figures["norm"] ** 2 for each in rows]
    noise = sum(e * each.figures["relative_rms"] ** 2 for e, each in zip(energy, rows, strict=True))
    return {
        "fmt": fmt,
        "arrangement": arrangement,
        "rows": kind,
        "tensors": len(rows),
        "exact": sum(math.isinf(each.figures["sqnr_db"]) for each in rows),
        "sqnr_db": 10 * math.log10(sum(energy) / noise) if noise else None,
        "deadzone": sum(each.figures["deadzone"] * each.numel for each in rows) / sum(each.numel for each in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--share", type=float, default=0.1)
    arguments = parser.parse_args()
    rows = [
        row(fmt, *arrangement) for fmt in FMTS for arrangement in arrangements(fmt, arguments.seeds, arguments.share)
    ]
    seeds = " ".join(map(str, arguments.seeds))
    result = {
        "schema": 1,
        "command": f"python -m benchmarks.baked --seeds {seeds} --share {arguments.share:g}",
        "policy": POLICY,
        "seeds": arguments.seeds,
        "environment": environment(),
        "rows": rows,
    }
    write_json(RESULTS / "baked.json", result)
    for each in rows:
        shown = "no error" if each["sqnr_db"] is None else f"{each['sqnr_db']:.2f} dB"
        print(f"{each['fmt']:<6} {each['arrangement']:<55} {shown}")


if __name__ == "__main__":
    main()
