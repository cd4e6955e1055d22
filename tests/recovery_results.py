"""Made-up result files of the recovery study: truth known, numbers round."""

from __future__ import annotations

import json

import numpy as np

from benchmarks.recovery.outcomes import pack
from benchmarks.recovery.study.rows import SCHEMA, config_hash

CHECKPOINTS = ("a", "b", "c")


def preset(task, split="test", **fields):
    return {"name": f"small-{task}", "task": task, "model": f"checkpoints/{task}", "split": split, "lr": 1e-3, **fields}


def arm(name):
    fmt = next((fmt for fmt in ("mxfp4", "nvfp4") if name.startswith(fmt)), None)
    noise = ["rollout"] if "+aqn" in name or "+rin" in name else []
    tuning = "full" if "-full" in name else "lora"
    return {"name": name, "fmt": fmt, "tuning": tuning, "noise_during": noise, "preset": {}}


def evaluation(right, length=20.0):
    """`right`: (problems,) of 0 and 1, the same for flexible and strict."""
    return {"problems": len(right), "flexible": pack(right), "strict": pack(right), "length": length}


def row(stage, name, seed, final, *, initial=None, checkpoint=None, task="words", split=None, sampled=None, **fields):
    """A run that ends with these outcomes, sampled ones the same unless given."""
    split = split or ("dev" if stage == "tuning" else "test")
    checkpoint = checkpoint or f"{task}-{CHECKPOINTS[seed % 3]}"
    config = {"preset": preset(task, split), "arm": arm(name), "seed": seed, "weights": f"of {checkpoint}"}
    config["preset"] |= fields.pop("preset", {})
    initial = final if initial is None else initial
    steps, noise = range(4), [0.0, 0.01, 0.001, 0.001]
    line = {
        "schema": SCHEMA, "stage": stage, "arm": name, "seed": seed, "checkpoint": checkpoint, "config": config,
        "config_hash": config_hash(config), "code_hash": "c0de", "commit": "ab" * 20, "versions": {"torch": "2.13.0"},
        "device": "a processor", "command": "the command",
        "initial": {"greedy": evaluation(initial), "sampled": evaluation(initial)},
        "final": {"greedy": evaluation(final), "sampled": evaluation(final if sampled is None else sampled)},
        "curves": {
            "reward": [0.1 * step for step in steps], "entropy": [0.5, 0.4, 0.3, 0.2],
            "mismatch_kl": [None, 1e-4, 2e-4, 3e-4], "response_length": [20.0] * 4,
            "clip_fraction": [None, 0.0, 0.01, 0.02], "sigma": noise if "+aqn" in name else [0.0] * 4,
            "truncated": [0.1, 0.0, 0.0, 0.0], "flexible": [0.3, 0.4, 0.5, 0.6], "samples": [256, 384, 256, 256],
        },
        "cost": {
            "prepare_seconds": 20.0 * ("recipe" in name), "prepare_tokens": 1000 * ("recipe" in name),
            "step_seconds": 2.0, "rollout_tokens": 10_000, "train_tokens": 20_000, "cpu_seconds": 100.0 + seed,
        },
        "bits_per_weight": {"mxfp4": 4.25, "nvfp4": 4.5}.get(arm(name)["fmt"], 16.0), "trainable_parameters": 10,
        "parameters": 100, "peak_memory_mb": 50.0 + seed,
    }  # fmt: skip
    return line | fields


def write(folder, lines):
    """Into a file for each stage."""
    folder.mkdir(parents=True, exist_ok=True)
    for stage in {line["stage"] for line in lines}:
        text = "".join(json.dumps(line) + "\n" for line in lines if line["stage"] == stage)
        (folder / f"{stage}.jsonl").write_text(text)


def policies(accuracies, seeds, problems, *, discordance=0.1, run_sd=0.0, stream=0):
    """(arm, seed) -> (problems,) outcomes: arms of these true accuracies that agree on most problems."""
    rng = np.random.default_rng(stream)
    ability = rng.random(problems)
    found = {}
    for seed in seeds:
        shared = rng.random(problems)
        for name, accuracy in accuracies.items():
            own = np.where(rng.random(problems) < discordance, rng.random(problems), 0.5 * (ability + shared))
            level = np.quantile(own, np.clip(accuracy + rng.normal(0, run_sd), 0.01, 0.99))
            found[name, seed] = (own <= level).astype(int).tolist()
    return found
