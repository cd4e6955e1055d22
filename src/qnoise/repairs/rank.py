"""Which repair is best for the model at hand: measured by what it does to the function, not to the weights.

Each candidate is applied, measured against the model as it was, and taken off again. The order is that of the KL
divergence of the predictions. The error of the weights is shown and decides nothing: GPTQ raises it, on purpose, and
lowers the divergence.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from qnoise.formats import FORMATS, MACRO_BLOCK, QuantSpec, as_spec
from qnoise.patch import patch_config
from qnoise.repairs.cost import stored_bits, weight_error
from qnoise.repairs.divergence import Reference, divergence, keep
from qnoise.repairs.recipe import Recipe
from qnoise.repairs.self_teacher import as_mapping
from qnoise.sensitivity.batches import batches
from qnoise.sensitivity.plain_json import dumps, loads

SCHEMA = "qnoise-ranking-1"


@dataclass(frozen=True)
class RankingRow:
    """A recipe, and what was measured of it.

    Attributes:
        recipe: what was applied.
        bits: bits per quantized weight with everything that is stored for it, the fp32 scale of a tensor included.
        kl: KL(full precision || repaired), nats per token.
        output_error: relative RMS of the logits' error, centred per token.
        agreement: share of tokens whose likeliest next token is that of full precision.
        weight_error: relative RMS over the quantized weights. Never ranked by.
        seconds: wall time of patching and repairing.
        metric: what `evaluate` returned, or None.
    """

    recipe: Recipe
    bits: float
    kl: float
    output_error: float
    agreement: float
    weight_error: float
    seconds: float
    metric: float | None = None


@dataclass(frozen=True)
class Ranking:
    """Candidates, best first.

    Attributes:
        rows: in the order of their KL divergence; what gave no finite one stands last.
        left_out: recipe -> why it was not measured.
        budget: bits per weight that were allowed.
        tokens: number of tokens the divergence is a mean over.
        baseline: value of `evaluate` on the model as it was, or None.
    """

    rows: tuple[RankingRow, ...]
    left_out: Mapping[str, str]
    budget: float
    tokens: int
    baseline: float | None = None
    calibration: Any = field(default=None, repr=False, compare=False)

    @property
    def best(self) -> RankingRow:
        return self.rows[0]

    def apply(self, model: nn.Module, inputs: Any = None) -> Callable[[], None]:
        """Apply the best recipe to the model and return what takes it off again.

        Args:
            model: the model that was ranked, or another that is not patched.
            inputs: what to calibrate on; None: what the ranking calibrated on, which `to_json` does not keep.
        """
        return self.best.recipe.apply(model, self.calibration if inputs is None else inputs)

    def to_markdown(self) -> str:
        metric = any(row.metric is not None for row in self.rows)
        header = ["recipe", "bits", "KL", "output error", "same top token", "weight error", "seconds"]
        lines = [header + ["metric"] * metric]
        if metric and self.baseline is not None:
            lines.append(["full precision", "–", "0", "0", "100 %", "0", "–", f"{self.baseline:.4g}"])
        for row in self.rows:
            cells = [
                str(row.recipe), f"{row.bits:.3f}", f"{row.kl:.3g}", f"{row.output_error:.3f}",
                f"{100 * row.agreement:.1f} %", f"{row.weight_error:.3f}", f"{row.seconds:.1f}",
            ]  # fmt: skip
            lines.append(cells + ([f"{row.metric:.4g}"] if row.metric is not None else ["–"] * metric))
        lines.insert(1, ["---"] * len(lines[0]))
        table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        notes = [
            f"KL to full precision: nats per token, mean over {self.tokens:,} tokens; at most {self.budget:g} bits."
        ]
        notes += [f"Left out: {name}: {why}" for name, why in self.left_out.items()]
        return table + "\n\n" + "\n".join(notes)

    __str__ = to_markdown

    def to_json(self, indent: int | None = None) -> str:
        rows = [{**vars(row), "recipe": row.recipe.to_dict()} for row in self.rows]
        values = {
            "schema": SCHEMA,
            "budget": self.budget,
            "tokens": self.tokens,
            "baseline": self.baseline,
            "rows": rows,
            "left_out": dict(self.left_out),
        }
        return dumps(values, indent)

    @classmethod
    def from_json(cls, text: str) -> Ranking:
        """The ranking that `to_json` wrote.

        Raises:
            ValueError: no JSON, another schema, or a field that is missing or strange.
        """
        values: Any = loads(text)
        schema = values.get("schema") if isinstance(values, dict) else None
        if schema != SCHEMA:
            raise ValueError(f"this is no ranking: schema is {schema!r}, read is {SCHEMA!r}")
        try:
            rows = tuple(
                RankingRow(
                    Recipe.from_dict(row["recipe"]),
                    **{name: float(row[name]) for name in _NUMBERS},
                    metric=None if row["metric"] is None else float(row["metric"]),
                )
                for row in values["rows"]
            )
            baseline = None if values["baseline"] is None else float(values["baseline"])
            left_out = {str(name): str(why) for name, why in values["left_out"].items()}
            return cls(rows, left_out, float(values["budget"]), int(values["tokens"]), baseline)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this ranking is damaged: {type(error).__name__}: {error}") from None


_NUMBERS = ("bits", "kl", "output_error", "agreement", "weight_error", "seconds")


def rank(
    model: nn.Module,
    inputs: Any,
    *,
    fmt: str | QuantSpec | Sequence[str | QuantSpec] | None = None,
    budget: float = 4.5,
    evaluate: Callable[[nn.Module], float] | None = None,
    candidates: Sequence[Recipe | QuantSpec | str] | None = None,
    measure_on: Any = None,
    progress: bool | None = None,
) -> Ranking:
    """Measure candidate repairs on a language model, and say which keeps its predictions best.

    Nothing stays applied: parameters, buffers and modules are as they were, bit for bit, also after an error. The
    log-probabilities of full precision are kept meanwhile: tokens x vocabulary x 4 bytes on the CPU.

    GPTQ serves frozen weights: call `model.requires_grad_(False)` first, or its recipes are among those left out, with
    the reason.

    Args:
        model: gives logits (batch, tokens, vocabulary); not patched; PEFT adapters stay on.
        inputs: batches of token ids (batch, tokens), or of mappings of keyword arguments with "input_ids"; one, or an
            iterable. `self_generated` makes some. "attention_mask" and "labels" (-100: does not count) are heeded.
        fmt: format or formats to choose candidates for; None: all within the budget. A `QuantSpec` stands for its
            format.
        budget: most bits per weight, block scales included. The fp32 scale that NVFP4 keeps for each tensor, 32 bits in
            all, does not count against it, but is counted in `RankingRow.bits`.
        evaluate: a metric of the model as it is, measured for full precision and each candidate; it is shown and does
            not rank.
        candidates: recipes, specs or format names, instead of the usual ones.
        measure_on: batches to measure on. None: every second batch of `inputs` (of a single one, the second half of
            its rows) is left for it, and repairs calibrate on the rest: what fits the calibration is not measured
            on it.
        progress: show a progress bar on stderr; None: if it is a terminal.

    Returns:
        The ranking; `ranking.apply(model)` applies the best.

    Raises:
        ValueError: the model is patched; inputs that cannot be split in two; no candidate within the budget, or none
            that could be measured (with the reasons).
        TypeError: the model gives no logits of that shape, or a batch is of another kind.
    """
    if patch_config(model) is not None:
        raise ValueError("the model is patched; rank measures against full precision: call qnoise.unpatch_model first")
    calibration, measured = _split(inputs) if measure_on is None else (list(batches(inputs)), list(batches(measure_on)))
    chosen, left_out = _within(budget, _candidates(fmt, budget) if candidates is None else candidates)
    reference = keep(model, measured)
    baseline = None if evaluate is None else float(evaluate(model))
    rows = []
    for recipe in _with_progress(chosen, progress):
        try:
            rows.append(_measure(model, recipe, calibration, reference, evaluate))
        except _Refused as refusal:
            left_out[str(recipe)] = str(refusal)
    if not rows:
        raise ValueError("no candidate could be measured. " + "; ".join(f"{k}: {why}" for k, why in left_out.items()))
    # A divergence that is NaN or infinite is no small one.
    rows.sort(key=lambda row: (not row.kl < float("inf"), row.kl, row.output_error))
    tokens = sum(map(len, reference.log_probs))
    return Ranking(tuple(rows), left_out, budget, tokens, baseline, calibration)


class _Refused(Exception):
    """A repair does not serve this model or format, and says why."""


def _measure(
    model: nn.Module,
    recipe: Recipe,
    calibration: Sequence[Any],
    reference: Reference,
    evaluate: Callable[[nn.Module], float] | None,
) -> RankingRow:
    start = time.perf_counter()
    try:
        undo = recipe.apply(model, calibration)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise _Refused(str(error)) from error
    try:
        seconds = time.perf_counter() - start
        moved = divergence(model, reference)
        return RankingRow(
            recipe,
            stored_bits(model),
            moved.kl,
            moved.output_error,
            moved.agreement,
            weight_error(model),
            seconds,
            None if evaluate is None else float(evaluate(model)),
        )
    finally:
        undo()


def _candidates(fmt: Any, budget: float) -> list[Recipe]:
    """The usual candidates: every scale mode, then what changes the weights, then what the data decides."""
    names = (
        [name for name, each in FORMATS.items() if each.bits_per_element <= budget]
        if fmt is None
        else [as_spec(each).fmt for each in ([fmt] if isinstance(fmt, str | QuantSpec) else fmt)]
    )
    recipes = []
    for name in dict.fromkeys(names):
        modes = [mode for mode in FORMATS[name].scale_modes if mode != "single_level"]
        best = "mse" if "mse" in modes else modes[0]
        recipes += [Recipe(QuantSpec(name, mode)) for mode in modes]
        if FORMATS[name].scale == "e8m0":
            recipes.append(Recipe(QuantSpec(name, best, macro_block=MACRO_BLOCK)))
        recipes += [Recipe(QuantSpec(name, best, rotation="hadamard")), Recipe(QuantSpec(name, residual=1.0))]
        for mode in dict.fromkeys((modes[0], best)):
            recipes += [Recipe(QuantSpec(name, mode), steps) for steps in (("gptq",), ("fold_scales",))]
        recipes += [Recipe(QuantSpec(name, best), ("fold_scales", last)) for last in ("gptq", "gptaq")]
    return recipes


def _within(budget: float, candidates: Sequence[Recipe | QuantSpec | str]) -> tuple[list[Recipe], dict[str, str]]:
    chosen, left_out = [], {}
    for each in candidates:
        recipe = each if isinstance(each, Recipe) else Recipe(as_spec(each))
        bits = recipe.spec.bits_per_element
        if bits <= budget:
            chosen.append(recipe)
        else:
            left_out[str(recipe)] = f"{bits:g} bits per weight"
    if not chosen:
        said = "; ".join(f"{name}: {why}" for name, why in left_out.items()) or "there are no candidates"
        raise ValueError(f"nothing fits a budget of {budget:g} bits per weight ({said})")
    return list(dict.fromkeys(chosen)), left_out


def _split(inputs: Any) -> tuple[list[Any], list[Any]]:
    """(to calibrate on, to measure on)."""
    given = list(batches(inputs))
    if len(given) > 1:
        return given[::2], given[1::2]
    if given:
        count = len(as_mapping(given[0])["input_ids"])
        if count > 1:
            return [_rows(given[0], slice(0, count // 2), count)], [_rows(given[0], slice(count // 2, None), count)]
    raise ValueError(
        "inputs holds fewer than two sequences: repairs calibrate on one part and are measured on another. Give more, "
        "or measure_on="
    )


def _rows(batch: Any, rows: slice, count: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[rows]
    return {
        name: value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == count else value
        for name, value in batch.items()
    }


def _with_progress(recipes: Sequence[Recipe], progress: bool | None) -> Iterator[Recipe]:
    if progress is None:
        progress = sys.stderr.isatty()
    if not progress:
        yield from recipes
        return
    from tqdm.auto import tqdm

    with tqdm(recipes, unit="recipe", desc="rank") as bar:
        for recipe in bar:
            bar.set_postfix_str(str(recipe), refresh=True)
            yield recipe
