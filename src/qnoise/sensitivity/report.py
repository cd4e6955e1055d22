"""`ScanReport`: the rows of a scan, and what can be made of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from qnoise.formats import QuantSpec, as_spec
from qnoise.sensitivity.localise import Localisation
from qnoise.sensitivity.plain_json import dumps, loads
from qnoise.sensitivity.rows import ACTIVATIONS, KINDS, Finding, ScanRow
from qnoise.sensitivity.thresholds import THRESHOLDS, issues
from qnoise.spelling import check_choice

if TYPE_CHECKING:
    from qnoise.noise_control import Multiplier
    from qnoise.sensitivity.comparison import Comparison
    from qnoise.sensitivity.plan import Plan
    from qnoise.sensitivity.recommendation import Recommendation

SCHEMA = "qnoise-scan-1"


@dataclass(frozen=True)
class LayerFigures:
    """The tensors of one kind in one layer, taken together.

    Attributes:
        stack: what the layers are entries of, such as "model.layers"; empty with `layer` None.
        layer: index; None for modules outside the layers.
        kind, spec: as in the rows.
        modules: number of tensors.
        figures: energies, counts and extremes added up: `sqnr_db` (for activations the mean over the tensors of what
            is a mean over tokens), `relative_rms`, `mean_relative_error`, `mean_abs_error`, `deadzone`, `clipped`,
            `clipped_blocks`, `at_maximum`, `max_abs_error`, `norm`, `pooled_sqnr_db`.
        worst: name of the tensor of least `sqnr_db`.
        issues: those of its rows, each once.
    """

    stack: str
    layer: int | None
    kind: str
    spec: QuantSpec
    modules: int
    figures: Mapping[str, float]
    worst: str
    issues: tuple[str, ...]


@dataclass(frozen=True)
class ScanReport:
    """What `qnoise.scan` found.

    Attributes:
        source: class of the model, or path of the checkpoint.
        thresholds: what the issues of the rows are judged by.
        rows: one for each tensor and format.
        findings: what is no figure: tensors left out and why, NaN weights, missing files, faults.
        localisation: what `localise=True` found out about faults; None without it.
    """

    source: str
    thresholds: str
    rows: tuple[ScanRow, ...]
    findings: tuple[Finding, ...] = ()
    localisation: Localisation | None = None

    @property
    def specs(self) -> tuple[QuantSpec, ...]:
        """The formats scanned, in their order."""
        return tuple(dict.fromkeys(row.spec for row in self.rows))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Which kinds of tensors there are, in the order of `KINDS`."""
        present = {row.kind for row in self.rows}
        return tuple(kind for kind in KINDS if kind in present)

    def select(self, kind: str | None = None, fmt: str | QuantSpec | None = None) -> tuple[ScanRow, ...]:
        """The rows of a kind and format; None: the first there is.

        Raises:
            ValueError: the report has no such kind or format.
        """
        kind = self.kinds[0] if kind is None and self.kinds else kind
        check_choice("kind", kind, self.kinds)
        spec = self.spec_of(fmt)
        return tuple(row for row in self.rows if row.kind == kind and row.spec == spec)

    def spec_of(self, fmt: str | QuantSpec | None) -> QuantSpec:
        """The spec of the report that `fmt` means; None: the first.

        Raises:
            ValueError: it was not scanned.
        """
        spec = self.specs[0] if fmt is None and self.specs else as_spec(fmt)  # type: ignore[arg-type]
        if spec not in self.specs:
            raise ValueError(
                f"{spec} was not scanned; the report has {', '.join(map(str, self.specs))}. "
                "Name it in the fmts of qnoise.scan"
            )
        return spec

    @property
    def layers(self) -> tuple[LayerFigures, ...]:
        """The rows of each layer taken together, by stack, kind and format; in the order of the layers."""
        groups: dict[tuple[Any, ...], list[ScanRow]] = {}
        for row in self.rows:
            groups.setdefault((row.stack, row.layer, row.kind, row.spec), []).append(row)
        order = {spec: at for at, spec in enumerate(self.specs)}

        def place(key: tuple[Any, ...]) -> tuple[Any, ...]:
            stack, layer, kind, spec = key
            return (KINDS.index(kind), order[spec], layer is None, stack, layer or 0)

        return tuple(
            LayerFigures(stack, layer, kind, spec, len(rows), *_together(rows, kind))
            for (stack, layer, kind, spec), rows in ((key, groups[key]) for key in sorted(groups, key=place))
        )

    def judged(self, thresholds: str) -> ScanReport:
        """The same figures, with the issues of other thresholds ("gaussian" or "classic")."""
        check_choice("thresholds", thresholds, THRESHOLDS)
        rows = tuple(
            replace(
                row,
                issues=issues(row.figures, row.gaussian, row.numel, row.spec, thresholds),
            )
            for row in self.rows
        )
        return replace(self, rows=rows, thresholds=thresholds)

    @property
    def recommendation(self) -> Recommendation:
        """What to do, and why."""
        from qnoise.sensitivity.recommendation import recommend

        return recommend(self)

    def multipliers(
        self, kind: str, *, fmt: str | QuantSpec | None = None, of: str | None = None
    ) -> dict[str | int, Multiplier]:
        """Factors on sigma by layer, for `NoiseScheduler(multipliers=...)`.

        Args:
            kind: "targeted", "variable", "proportional", "inverse", "ceiling" or "zones"; `docs/scan.md` defines each.
            fmt: the format whose errors count; None: the first scanned.
            of: the kind of rows whose errors count; None: outputs of the layers if there are any, else weights.

        Raises:
            ValueError: no such kind, format or rows; no layers.
        """
        from qnoise.sensitivity.multipliers import multipliers

        return multipliers(self, kind, fmt, of)

    def plan(
        self,
        bits: float | None = None,
        candidates: Sequence[str | QuantSpec | None] | None = None,
        *,
        memory: float | None = None,
    ) -> Plan:
        """A format for each module that makes the measured error least within a budget.

        Args:
            bits: bits per weight to stay within, on average over the modules, block scales included.
            candidates: formats to choose from, all of them scanned; None among them stands for the stored dtype. None:
                all that were scanned.
            memory: bytes that the weights may take, instead of or beside `bits`.

        Returns:
            The plan: print it, save it as JSON, or apply it: `patch_model(model, fmt=plan)`.

        Raises:
            ValueError: no budget, or one below the smallest candidate; a candidate that was not scanned.
        """
        from qnoise.sensitivity.plan import make_plan

        return make_plan(self, bits, candidates, memory)

    def compare(self, other: ScanReport) -> Comparison:
        """This report as "before", `other` as "after"."""
        from qnoise.sensitivity.comparison import Comparison

        return Comparison(self, other)

    def to_json(self, indent: int | None = None) -> str:
        """Strict JSON with a schema name; infinities are the strings "Infinity" and "-Infinity"."""
        values = {
            "schema": SCHEMA,
            "source": self.source,
            "thresholds": self.thresholds,
            "rows": [row.to_dict() for row in self.rows],
            "findings": [asdict(finding) for finding in self.findings],
            **({} if self.localisation is None else {"localisation": self.localisation.to_dict()}),
        }
        return dumps(values, indent)

    @classmethod
    def from_json(cls, text: str) -> ScanReport:
        """The report that `to_json` wrote.

        Raises:
            ValueError: no JSON, another schema, or a field that is missing or of the wrong kind.
        """
        values = loads(text)
        schema = values.get("schema") if isinstance(values, dict) else None
        if schema != SCHEMA:
            raise ValueError(f"this is no scan report: schema is {schema!r}, read is {SCHEMA!r}")
        try:
            report = cls(
                str(values["source"]),
                str(values["thresholds"]),
                tuple(ScanRow.from_dict(row) for row in values["rows"]),
                tuple(Finding(str(f["name"]), str(f["what"]), bool(f["serious"])) for f in values["findings"]),
                Localisation.from_dict(values["localisation"]) if "localisation" in values else None,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this scan report is damaged: {type(error).__name__}: {error}") from None
        for row in report.rows:
            check_choice(f"kind of {row.name}", row.kind, KINDS)
        return report

    def to_srdd_json(self, *, fmt: str | QuantSpec | None = None, of: str | None = None) -> str:
        """The report in the classic schema of SRDD scans, on its definitions and its thresholds.

        Args:
            fmt: the format; None: the first scanned.
            of: the kind of rows; None: outputs of the layers, which is what SRDD scans look at, if there are any, else
                weights.

        Raises:
            ValueError: no such format or rows; no layers.
        """
        from qnoise.sensitivity.srdd import srdd_json

        return srdd_json(self, fmt, of)

    def to_markdown(self, top: int | None = 10) -> str:
        """The report as Markdown: the formats, what to do, the `top` worst tensors (None: all), the findings."""
        from qnoise.sensitivity.markdown import markdown

        return markdown(self, top)

    def to_html(self) -> str:
        """The report as one self-contained page: no script, nothing loaded from elsewhere."""
        from qnoise.sensitivity.html import page

        return page(self)

    def __str__(self) -> str:
        return self.to_markdown()


def main_rows(report: ScanReport) -> tuple[ScanRow, ...]:
    """The rows of the tensors that the formats are judged by: the weights; of a model whose adapters are merged, the
    merged ones."""
    kind = "weight" if "weight" in report.kinds else report.kinds[0]
    return tuple(row for row in report.rows if row.kind == kind)


def layer_kind(report: ScanReport, of: str | None) -> str:
    """The kind of rows that layers are judged by."""
    if of is not None:
        check_choice("of", of, report.kinds)
        return of
    return "output" if "output" in report.kinds else report.kinds[0]


def pooled_decibels(norms: Iterable[float], relatives: Iterable[float]) -> float:
    """SQNR of tensors taken together, from their norms and relative RMS errors."""
    pairs = list(zip(norms, relatives, strict=True))
    signal = sum(norm**2 for norm, _ in pairs)
    noise = sum((norm * relative) ** 2 for norm, relative in pairs)
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _together(rows: Sequence[ScanRow], kind: str) -> tuple[dict[str, float], str, tuple[str, ...]]:
    total = max(1, sum(row.numel for row in rows))

    def mean(name: str) -> float:
        return sum(row.figures[name] * row.numel for row in rows) / total

    pooled = pooled_decibels(*([row.figures[name] for row in rows] for name in ("norm", "relative_rms")))
    by_row = [row.figures["sqnr_db"] for row in rows]
    figures = {
        "sqnr_db": sum(by_row) / len(by_row) if kind in ACTIVATIONS else pooled,
        "pooled_sqnr_db": pooled,
        "relative_rms": 10 ** (-pooled / 20),
        **{
            name: mean(name)
            for name in ("mean_relative_error", "mean_abs_error", "deadzone", "clipped", "clipped_blocks", "at_maximum")
        },
        "max_abs_error": max(row.figures["max_abs_error"] for row in rows),
        "norm": math.sqrt(sum(row.figures["norm"] ** 2 for row in rows)),
    }
    worst = min(rows, key=lambda row: row.figures["sqnr_db"])
    return figures, worst.name, tuple(dict.fromkeys(issue for row in rows for issue in row.issues))
