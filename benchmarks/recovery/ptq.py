"""What each format costs without any RL, and what each repair wins back: `python -m benchmarks.recovery ptq`.

Every row is measured on the three shipped policies: greedy accuracy on problems of the stream "test", and the KL
divergence from full precision on text of the stream "dev", which the full-precision policy wrote. Repairs calibrate
on text of the stream "rl". So nothing that is measured was calibrated on, and what is chosen by KL is not chosen by the
accuracy that is reported.

The result is a file of JSON lines: the settings, then a line for each row and policy. Lines that are there are
kept, so that a run that was stopped goes on, and rows can be added.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.environment import environment, git_commit
from benchmarks.files import drop_half_line, read_jsonl
from benchmarks.recovery.arms import Adapter
from benchmarks.recovery.data import Example, word_examples
from benchmarks.recovery.evaluate import evaluate
from benchmarks.recovery.outcomes import pack
from benchmarks.recovery.policy import load_policy, model_path, weights_hash
from benchmarks.recovery.prepare import with_adapter, written
from qnoise import FakeQuantLinear, QuantSpec
from qnoise.repairs.cost import stored_bits, weight_error
from qnoise.repairs.divergence import Reference, divergence, keep
from qnoise.repairs.recipe import Recipe
from qnoise.spelling import nearest

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

SCHEMA = "qnoise-ptq-1"
MAX_NEW_TOKENS = 44


@dataclass(frozen=True)
class Settings:
    """Sizes of the measurement. `policies` are the seeds of the shipped checkpoints."""

    policies: tuple[int, ...] = (0, 1, 2)
    problems: int = 2000  # of the stream "test", for accuracy
    kl_texts: int = 500  # of the stream "dev", for the divergence
    calibration_texts: int = 160  # of the stream "rl"


QUICK = Settings(policies=(0,), problems=64, kl_texts=16, calibration_texts=16)


@dataclass(frozen=True)
class Row:
    """A way to fewer bits: fields of the QuantSpec (None: full precision), repairs in order, and the adapter."""

    name: str
    spec: dict[str, Any] | None
    steps: tuple[str, ...] = ()
    adapter: Adapter | None = None


def _row(
    fmt: str,
    mode: str | None = None,
    *steps: str,
    lora: str | None = None,
    turns: int = 1,
    distilled: int = 0,
    lr: float = 3e-3,
    **fields: Any,
) -> Row:
    spec = {"fmt": fmt, **({"scale_mode": mode} if mode else {}), **fields}
    words = [fmt, mode, *(f"{key}={value}" for key, value in fields.items())]
    name = " ".join(word for word in words if word)
    start = f"lora {lora}" if turns == 1 else f"lora {lora} x{turns}"
    more = [*steps, *([start] if lora else []), *([f"distilled {distilled}"] if distilled else [])]
    return Row(" + ".join([name, *more]), spec, steps, Adapter(lora, distilled, lr=lr, turns=turns) if lora else None)


REFERENCE = "full precision"
BASELINE = "mxfp4"
ROWS = (
    Row(REFERENCE, None),
    _row("mxfp4"),
    *(_row("mxfp4", mode) for mode in ("rceil", "ceil", "even", "mse")),
    _row("nvfp4"),
    *(_row("nvfp4", mode) for mode in ("four_over_six", "four_over_six_mae", "four_over_six_absmax", "mse")),
    _row("mxfp6_e2m3"),
    _row("mxfp8_e4m3"),
    _row("mxfp4", macro_block=128),
    _row("mxfp4", "mse", macro_block=128),
    _row("mxfp4", residual=0.5),
    _row("mxfp4", residual=1.0),
    _row("mxfp4", rotation="hadamard"),
    _row("nvfp4", rotation="hadamard"),
    _row("nvfp4", "mse", rotation="hadamard"),
    _row("mxfp4", None, "gptq"),
    _row("mxfp4", "mse", "gptq"),
    _row("nvfp4", None, "gptq"),
    _row("nvfp4", "mse", "gptq"),
    _row("mxfp4", None, "fold_scales"),
    _row("nvfp4", "mse", "fold_scales"),
    _row("mxfp4", "mse", "fold_scales", "gptq"),
    _row("nvfp4", "mse", "fold_scales", "gptq"),
    _row("mxfp4", "mse", "gptaq"),
    _row("nvfp4", "mse", "gptaq"),
    _row("mxfp4", "mse", "fold_scales", "gptaq"),
    _row("nvfp4", "mse", "fold_scales", "gptaq"),
    _row("mxfp4", "mse", "fold_scales", "gptaq", lora="weighted"),
    _row("nvfp4", "mse", "fold_scales", "gptaq", lora="weighted"),
    _row("mxfp4", lora="residual"),
    _row("mxfp4", lora="weighted"),
    _row("mxfp4", lora="principal"),
    _row("nvfp4", "mse", lora="weighted"),
    _row("nvfp4", "mse", "gptq", lora="weighted"),
    _row("nvfp4", "mse", "fold_scales", "gptq", lora="weighted"),
    _row("mxfp4", lora="zero", distilled=60),
    _row("mxfp4", "mse", "gptq", lora="zero", distilled=60),
    _row("nvfp4", lora="zero", distilled=60),
    _row("nvfp4", "mse", "gptq", lora="zero", distilled=60),
    _row("nvfp4", "mse", "fold_scales", "gptq", lora="zero", distilled=60),
    _row("nvfp4", "mse", "fold_scales", "gptq", lora="weighted", distilled=60),
    # A start that is right already is undone by the rate that suits a start at zero.
    _row("mxfp4", lora="principal", turns=5),
    _row("nvfp4", "mse", lora="principal", turns=5),
    _row("mxfp4", lora="principal", turns=5, distilled=60, lr=1e-4),
    _row("nvfp4", "mse", lora="principal", turns=5, distilled=60, lr=1e-4),
)  # fmt: skip


def chosen(names: Sequence[str]) -> list[Row]:
    """The rows of these names; all without names.

    Raises:
        ValueError: there is no such row.
    """
    known = {row.name: row for row in ROWS}
    for name in names:
        if name not in known:
            near = nearest(name, known)
            raise ValueError(f"no row {name!r}{f', did you mean {near!r}?' if near else ''}; see ptq --list")
    return [known[name] for name in names] or list(ROWS)


def run(
    path: Path | None, rows: Sequence[Row], settings: Settings, command: str, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Measure what is not in the file yet; the lines of all rows asked for, in their order.

    A row that fails is reported and left out: the others are measured.

    Raises:
        ValueError: the file holds a measurement with other settings, or is damaged.
    """
    done = _read(path, settings, command)
    names = {row.name for row in rows}
    benches = {policy: Bench(policy, settings) for policy in settings.policies}
    for row in rows:
        for policy, bench in benches.items():
            if (row.name, policy) in done:
                continue
            try:
                line = bench.measure(row)
            except (ValueError, TypeError) as error:
                say(f"failed: {row.name}, policy {policy}: {type(error).__name__}: {error}")
                continue
            done[row.name, policy] = line
            _append(path, line)
            say(
                f"policy {policy}  {row.name:58} {100 * line['flexible']:6.2f} %  KL {line['kl']:.5f}  "
                f"{line['seconds']:.1f} s"
            )
    return [line for (name, _), line in done.items() if name in names]


class Bench:
    """One policy, with the texts that are the same for all rows."""

    def __init__(self, policy: int, settings: Settings) -> None:
        self.policy, self.settings = policy, settings
        self.path = model_path("checkpoints/words-{checkpoint}", policy)
        self.problems = word_examples("test", 0, settings.problems)

    def _load(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        model, tokenizer = load_policy(self.path, torch.float32)
        return model.requires_grad_(False), tokenizer

    def _texts(self, examples: Sequence[Example], batch_size: int) -> list[dict[str, Tensor]]:
        model, tokenizer = self._load()
        return written(
            model, tokenizer, examples, max_new_tokens=MAX_NEW_TOKENS, batch_size=batch_size, seed=self.policy
        )

    @cached_property
    def reference(self) -> Reference:
        texts = self._texts(word_examples("dev", 1000 + self.policy, self.settings.kl_texts), 250)
        return keep(self._load()[0], texts)

    @cached_property
    def calibration(self) -> list[dict[str, Tensor]]:
        return self._texts(word_examples("rl", 1000 + self.policy, self.settings.calibration_texts), 80)

    @lru_cache(maxsize=8)  # noqa: B019  # a few benches live as long as the run
    def distillation(self, adapter: Adapter) -> list[dict[str, Tensor]]:
        """A batch for each step."""
        examples = word_examples("rl", 2000 + self.policy, adapter.steps * adapter.batch)
        return self._texts(examples, adapter.batch)

    def measure(self, row: Row) -> dict[str, Any]:
        """The line of a row."""
        self.reference, self.calibration  # noqa: B018  # not in the seconds of the first row
        if row.adapter is not None and row.adapter.steps:
            self.distillation(row.adapter)
        model, tokenizer = self._load()
        torch.manual_seed(self.policy)
        clock = time.process_time()
        model = self.prepared(model, row)
        seconds = time.process_time() - clock
        quantized = sum(m.weight.numel() for m in model.modules() if isinstance(m, FakeQuantLinear))
        adapter = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
        moved = divergence(model, self.reference)
        result = evaluate(model, tokenizer, self.problems, max_new_tokens=MAX_NEW_TOKENS, batch_size=500)
        return {
            "event": "row",
            "row": row.name,
            "policy": self.policy,
            "recipe": json.loads(json.dumps(dataclasses.asdict(row))),
            "bits_per_weight": stored_bits(model) if quantized else 16.0,
            "adapter_bits_per_weight": 16 * adapter / quantized if quantized else 0.0,
            "seconds": seconds,
            "flexible": result.flexible_accuracy,
            "strict": result.strict_accuracy,
            "kl": moved.kl,
            "output_error": moved.output_error,
            "agreement": moved.agreement,
            "tokens": moved.tokens,
            "weight_error": weight_error(model),
            "outcomes": pack(result.flexible),
            "commit": git_commit(),
        }

    def prepared(self, model: Any, row: Row) -> Any:
        """The model of a row: patched, repaired, with its adapter."""
        if row.spec is None:
            return model
        Recipe(QuantSpec(**row.spec), row.steps).apply(model, self.calibration)
        if row.adapter is None:
            return model
        adapter = row.adapter
        return with_adapter(model, adapter, lambda: self.calibration, lambda: self.distillation(adapter))


def _settings_line(settings: Settings, command: str) -> dict[str, Any]:
    weights = {str(p): weights_hash(model_path("checkpoints/words-{checkpoint}", p)) for p in settings.policies}
    line = {
        "event": "settings",
        "schema": SCHEMA,
        "settings": dataclasses.asdict(settings),
        "weights": weights,
        "command": command,
        "environment": environment(),
    }
    return json.loads(json.dumps(line))


def _read(path: Path | None, settings: Settings, command: str) -> dict[tuple[str, int], dict[str, Any]]:
    header = _settings_line(settings, command)
    if path is None or not path.is_file():
        _append(path, header)
        return {}
    drop_half_line(path)
    lines = read_jsonl(path)
    if not lines or lines[0].get("schema") != SCHEMA:
        raise ValueError(f"{path} is no result of this benchmark; name another file")
    for key in ("settings", "weights"):
        if lines[0][key] != header[key]:
            raise ValueError(f"{path} was measured with other {key} ({lines[0][key]}); name another file or delete it")
    return {(line["row"], line["policy"]): line for line in lines[1:]}


def _append(path: Path | None, line: dict[str, Any]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
