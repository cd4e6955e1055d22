"""Two reports beside each other: what a change of the model, the format or the adapter did."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qnoise.sensitivity.markdown import cell, number, signed, table

if TYPE_CHECKING:
    from qnoise.sensitivity.report import ScanReport
    from qnoise.sensitivity.rows import ScanRow


@dataclass(frozen=True)
class Comparison:
    """`before.compare(after)`. Rows are matched by name, kind and format.

    Where each report has one format and the two differ, rows are matched by name and kind: two formats on one model.
    """

    before: ScanReport
    after: ScanReport

    @property
    def pairs(self) -> tuple[tuple[ScanRow, ScanRow], ...]:
        """The rows both have, the largest loss of SQNR first."""
        after = {self._key(row): row for row in self.after.rows}
        both = [(row, after[self._key(row)]) for row in self.before.rows if self._key(row) in after]
        return tuple(sorted(both, key=lambda pair: change(*pair)))

    @property
    def only_before(self) -> tuple[ScanRow, ...]:
        """Rows without a partner in `after`."""
        after = {self._key(row) for row in self.after.rows}
        return tuple(row for row in self.before.rows if self._key(row) not in after)

    @property
    def only_after(self) -> tuple[ScanRow, ...]:
        """Rows without a partner in `before`."""
        before = {self._key(row) for row in self.before.rows}
        return tuple(row for row in self.after.rows if self._key(row) not in before)

    @property
    def changed(self) -> bool:
        """Whether any figure of a pair differs, or a row has no partner."""
        alone = self.only_before or self.only_after
        return bool(alone) or any(dict(a.figures) != dict(b.figures) for a, b in self.pairs)

    def to_markdown(self, top: int | None = 10) -> str:
        """The `top` largest losses and gains as a table (None: all pairs)."""
        pairs = self.pairs
        shown = pairs
        if top is not None and len(pairs) > 2 * top:
            shown = (*pairs[:top], *pairs[len(pairs) - top :])
        rows = [
            [
                f"`{cell(a.name)}`", a.kind, str(a.spec) if a.spec == b.spec else f"{a.spec} → {b.spec}",
                number(a.figures["sqnr_db"]), number(b.figures["sqnr_db"]), signed(change(a, b)),
                number(100 * a.figures["deadzone"]), number(100 * b.figures["deadzone"]),
            ]
            for a, b in shown
        ]  # fmt: skip
        header = ["tensor", "kind", "format", "SQNR dB before", "after", "change", "deadzone % before", "after"]
        lines = [table(header, rows), "", f"{len(shown)} of {len(pairs)} pairs."]
        for label, alone in (("before", self.only_before), ("after", self.only_after)):
            if alone:
                lines.append(f"{len(alone)} rows are in the report {label} only, first `{cell(alone[0].name)}`.")
        return "\n".join(lines)

    def to_html(self) -> str:
        """The comparison as one self-contained page with a plot."""
        from qnoise.sensitivity.html import comparison_page

        return comparison_page(self)

    def __str__(self) -> str:
        return self.to_markdown()

    def _key(self, row: ScanRow) -> tuple[object, ...]:
        one_each = len(self.before.specs) == 1 and len(self.after.specs) == 1
        return (row.name, row.kind) if one_each else (row.name, row.kind, row.spec)


def change(before: ScanRow, after: ScanRow) -> float:
    """SQNR after minus before, in dB; 0 if both are the same infinity."""
    a, b = before.figures["sqnr_db"], after.figures["sqnr_db"]
    return 0.0 if a == b or math.isnan(a) or math.isnan(b) else b - a
