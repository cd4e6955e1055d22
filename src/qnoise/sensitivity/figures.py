"""The figures of one tensor, gathered over pieces of it: memory for one piece, whatever the size of the tensor.

`metrics.py` defines the error figures; here they are sums over chunks of rows. Beside them stand figures of the tensor
itself, which say why a format suits it or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from qnoise.formats import FORMATS, ElementFormat, QuantSpec
from qnoise.functional import fake_quantize, quantize, rotate
from qnoise.kernels import error_sums
from qnoise.metrics import decibels, shares
from qnoise.reference import block_scales
from qnoise.rounding import round_magnitude
from qnoise.scales import Scales

CHUNK = 1 << 18
"""Elements worked on at a time: a few buffers of this size stay in a processor's cache."""
SAMPLE = 1 << 16
"""Elements that the histograms are made of."""
BINS = 48
"""Bins of a histogram."""


_PLACE = {name: place for place, name in enumerate(error_sums.FIELDS)}


def row_chunks(x: Tensor) -> Iterator[Tensor]:
    """A matrix in chunks of whole rows, about `CHUNK` elements each; a row longer than that comes in pieces."""
    for rows, columns in chunk_places(*x.shape):
        yield x[rows, columns]


def chunk_places(rows: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Where the chunks of a matrix lie, in the order of its memory."""
    step = max(1, CHUNK // max(1, width))
    for start in range(0, rows, step):
        for left in range(0, width, CHUNK):
            yield slice(start, min(start + step, rows)), slice(left, min(left + CHUNK, width))


@dataclass
class Histogram:
    """Counts of a sample of the elements, in units of the scale of their block.

    Attributes:
        magnitudes: counts of |x| / scale in `BINS` equal bins from 0 to 4/3 of the element's largest value; the last
            holds what is larger.
        errors: counts of (x_hat - x) / scale in `BINS` equal bins from -`width` to `width`; the outer two hold what
            lies beyond.
        width: 0.625 of the element's largest step.
    """

    magnitudes: list[int]
    errors: list[int]
    width: float


@dataclass
class Figures:
    """Sums over the rows added so far, and the figures that follow from them.

    Args:
        spec: the format.
        channels: "row" if a row is an output channel (weights), "column" if an element of a row belongs to a channel
            (activations: a row is a token).
        sample_every: every so many rows one enters the histograms.
    """

    spec: QuantSpec
    channels: str = "row"
    sample_every: int = 1
    _rows: int = 0
    _totals: Tensor = field(default_factory=error_sums.new_totals)
    _elements: int = 0
    _tops: dict[float, int] = field(default_factory=dict)
    _row_energies: list[Tensor] = field(default_factory=list)
    _column_energies: Tensor | None = None
    _sampled: int = 0
    _histogram: Histogram | None = None

    @property
    def left_out(self) -> int:
        """Elements in blocks with NaN or Inf."""
        return int(self._total("left_out"))

    @property
    def count(self) -> int:
        """Elements in the other blocks."""
        return self._elements - self.left_out

    @property
    def parted(self) -> bool:
        """Whether the error can be split into the three parts of `metrics.split_error`."""
        return self.spec.rounding == "nearest" and self.spec.rotation is None and self.spec.residual is None

    @torch.no_grad()
    def add(self, x: Tensor, amax: Tensor | None = None) -> None:
        """Add rows.

        Args:
            x: (R, K), floating point; blocks lie along K.
            amax: what fixes the per-tensor scale: 0-d, or (R, 1); None for formats without one. Of the rotated rows,
                where the spec rotates.

        A block with NaN or Inf is left out of every figure; `left_out` counts its elements.
        """
        if not x.numel():
            return
        self._elements += x.numel()
        with torch.autocast(x.device.type, enabled=False):
            rows, hat, scales = self._quantized(x, amax)
            if error_sums.serves(rows, self.spec):
                self._add_compiled(rows, hat, scales)
            else:
                self._add_eager(rows, hat, scales)
            if self.spec.rotation is not None:
                self._add_clipped_of_rotated(rows, scales)
        self._rows += x.shape[0]

    def _quantized(self, x: Tensor, amax: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x and x_hat, both fp32 or both bf16 and contiguous; the scale of each block, fp32 (R, blocks)."""
        generator = torch.Generator().manual_seed(self._rows) if self.spec.rounding == "stochastic" else None
        # What quantizes fp16 and fp64 starts with this conversion and ends with a cast back.
        rows = (x if x.dtype in (torch.float32, torch.bfloat16) else x.float()).contiguous()
        if self.spec.storable:
            packed = quantize(rows, self.spec, amax=amax, generator=generator)
            scales = Scales(packed.scale_codes, packed.per_tensor_scale).value()
            hat = packed.dequantize()
        else:
            hat = fake_quantize(rows, self.spec, amax=amax, generator=generator)
            scales = block_scales(rows, self.spec, amax=amax)[:, :: self.spec.block_format.block_size]
        if rows.dtype != x.dtype:
            hat = hat.to(x.dtype).to(rows.dtype)
        return rows, hat.contiguous(), scales.contiguous()

    def _add_compiled(self, x: Tensor, hat: Tensor, scales: Tensor) -> None:
        if self.channels == "column" and self._column_energies is None:
            self._column_energies = torch.zeros(2, x.shape[1], dtype=torch.float64)
        if self.spec.rotation is not None:
            scales = torch.full_like(scales, torch.inf)  # clipping is about what is quantized: counted elsewhere
        per_row = error_sums.add(
            x, hat, scales, self.spec, self._totals, parts=self.parted, columns=self._column_energies
        )
        self._row_energies.append(per_row[:, [_PLACE["x2"], _PLACE["e2"]]].T.contiguous())
        least = 0.99 * self._total("top")
        if least > 0:
            counts = error_sums.values_from(hat, per_row, least)
            if counts is None:
                reached = hat[per_row[:, _PLACE["top"]] >= least].float().abs()
                counts = _occurrences(reached, least)
            self._keep_tops(counts)
        width, size = x.shape[1], self.spec.block_format.block_size
        picked = self._picked(x.shape[0])
        if picked is not None:
            blocks, blocks_hat = (_blocked(t[picked].float(), size) for t in (x, hat))
            bad = ~torch.isfinite(blocks.abs().amax(-1, keepdim=True))
            blocks, blocks_hat = (t.masked_fill(bad, 0.0) for t in (blocks, blocks_hat))
            safe = scales[picked].masked_fill(bad.squeeze(-1), 1.0)
            self._sample(blocks.abs(), blocks_hat - blocks, safe, _lengths(width, size))

    def _add_eager(self, x: Tensor, hat: Tensor, scales: Tensor) -> None:
        width, size = x.shape[1], self.spec.block_format.block_size
        blocks, hat = (_blocked(t.float(), size) for t in (x, hat))
        lengths = _lengths(width, size).to(x.device)
        magnitude = blocks.abs()
        peaks = magnitude.amax(-1)
        bad = ~torch.isfinite(peaks)
        if bad.any():
            mask = bad.unsqueeze(-1)
            blocks, hat, magnitude = (t.masked_fill(mask, 0.0) for t in (blocks, hat, magnitude))
            peaks, scales = peaks.masked_fill(bad, 0.0), scales.masked_fill(bad, 1.0)
            self._sum("left_out", (bad * lengths).sum(), 1.0)
        unit = _unit(peaks)
        if unit != 1.0:
            blocks, hat, magnitude, peaks, scales = (t / unit for t in (blocks, hat, magnitude, peaks, scales))
        self._add_blocks(blocks, hat, magnitude, peaks, scales, lengths, width, unit)
        self._sum("blocks", torch.count_nonzero(~bad), 1.0)

    def _add_clipped_of_rotated(self, x: Tensor, scales: Tensor) -> None:
        """Elements beyond the largest value of their block, as they are quantized: in the rotated basis, in which a
        short block has the length of a whole one."""
        size = self.spec.block_format.block_size
        rotated = rotate(x, self.spec).unflatten(-1, (-1, size)).abs()
        over = rotated > _round_down(scales, self.spec.block_format.element.max).unsqueeze(-1)
        over &= torch.isfinite(rotated.amax(-1, keepdim=True))
        self._sum("clipped", torch.count_nonzero(over), 1.0)
        self._sum("clipped_blocks", torch.count_nonzero(over.any(-1)), 1.0)

    def _add_blocks(
        self,
        x: Tensor,
        hat: Tensor,
        size: Tensor,
        peaks: Tensor,
        scales: Tensor,
        lengths: Tensor,
        width: int,
        unit: float,
    ) -> None:
        """Sums over blocks without NaN or Inf, all in units of `unit`; products are summed by BLAS, without buffers."""
        element = self.spec.block_format.element
        blocks, block_size = peaks.shape, x.shape[-1]
        x, hat, size = x.reshape(-1), hat.reshape(-1), size.reshape(-1)
        error = hat - x
        loss = error.abs()
        square, error_square = x.square(), error.square()
        energy = (square.view(-1, block_size) @ x.new_ones(block_size)).view(blocks)
        noise = error_square.view(blocks[0], -1) @ x.new_ones(blocks[1] * block_size)
        self._sum("x", x.sum(), unit)
        self._sum("x2", energy.sum(), unit**2)
        self._sum("x3", torch.dot(square, x), unit**3)
        self._sum("x4", torch.dot(square, square), unit**4)
        self._sum("e2", noise.sum(), unit**2)
        self._sum("abs_error", loss.sum(), unit)
        relative = loss / size
        self._sum("relative", relative.masked_fill_((size == 0) & (loss == 0), 0.0).sum(), 1.0)
        self._sum("dead", torch.count_nonzero((x != 0) & (hat == 0)), 1.0)
        if self.spec.rotation is None:
            limit = _round_down(scales, element.max)
            self._sum("clipped", torch.count_nonzero(size.view(-1, block_size) > limit.view(-1, 1)), 1.0)
            self._sum("clipped_blocks", torch.count_nonzero(peaks > limit), 1.0)
        filled = energy > 0
        self._sum("crest", (peaks / torch.sqrt(energy / lengths))[filled].sum(), 1.0)
        self._sum("filled_blocks", torch.count_nonzero(filled), 1.0)
        self._max("amax", peaks, unit)
        self._max("max_abs_error", loss, unit)
        self._max("top", hat.abs(), unit)
        if self._total("top") > 0:
            least = 0.99 * self._total("top")
            self._keep_tops(_occurrences(hat.abs().double() * unit, least))
        if self.parted:
            self._add_parts(x, hat, size, square, peaks, element, unit)
        self._row_energies.append(torch.stack([energy.sum(-1), noise]).double().cpu() * unit**2)
        if self.channels == "column":
            columns = torch.stack([t.view(blocks[0], -1).sum(0)[:width] for t in (square, error_square)])
            columns = columns.double().cpu() * unit**2
            self._column_energies = columns if self._column_energies is None else self._column_energies + columns
        picked = self._picked(blocks[0])
        if picked is not None:
            size, error = (t.view(*blocks, block_size)[picked] for t in (size, error))
            self._sample(size, error, scales[picked], lengths)

    def _add_parts(
        self, x: Tensor, hat: Tensor, size: Tensor, square: Tensor, peaks: Tensor, element: ElementFormat, unit: float
    ) -> None:
        """Sums of the three parts of the error, see `metrics.split_error`: e_S = hat - ideal, and ideal - x is e_D
        where the ideal scale rounds to zero and e_G elsewhere."""
        scale = peaks / torch.full_like(peaks, element.max)
        scale = scale.masked_fill(scale == 0, 1.0).view(-1, 1)
        units = (size.view(len(scale), -1) / scale).view(-1)
        dead = (units < 2.0 ** (element.emin - element.mantissa_bits - 1)).to(x.dtype)
        ideal = torch.copysign(
            (_rounded(units, element, len(units) // len(scale)).view(len(scale), -1) * scale).view(-1), x
        )
        bias, loss = hat - ideal, ideal - x
        # On the dead elements e_D is -x and e_S is hat.
        dead_energy, dead_product = torch.dot(dead, square), -torch.dot(dead, x * hat)
        self._sum("bias", torch.dot(bias, bias), unit**2)
        self._sum("deadzone", dead_energy, unit**2)
        self._sum("grid", torch.dot(loss, loss) - dead_energy, unit**2)
        self._sum("bias_grid", torch.dot(bias, loss) - dead_product, unit**2)
        self._sum("bias_dead", dead_product, unit**2)

    def _sum(self, name: str, value: Tensor, unit: float) -> None:
        self._totals[_PLACE[name]] += value.item() * unit

    def _max(self, name: str, values: Tensor, unit: float) -> None:
        self._totals[_PLACE[name]] = max(self._total(name), values.amax().item() * unit)

    def _total(self, name: str) -> float:
        return self._totals[_PLACE[name]].item()

    def _keep_tops(self, counts: dict[float, int]) -> None:
        """Add the counts of the values near the largest |x_hat| so far: few, because a format has few values."""
        least = 0.99 * self._total("top")
        self._tops = {value: n for value, n in self._tops.items() if value >= least}
        for value, n in counts.items():
            self._tops[value] = self._tops.get(value, 0) + n

    def _picked(self, rows: int) -> slice | None:
        """Which of the next rows enter the histograms; None if none does."""
        first = -self._rows % self.sample_every
        if first >= rows or self._sampled >= SAMPLE or not self.spec.plain:
            return None
        return slice(first, None, self.sample_every)

    def _sample(self, size: Tensor, error: Tensor, scales: Tensor, lengths: Tensor) -> None:
        """Of rows that were picked: |x| and the error, (rows, blocks, block_size), the scales and lengths of blocks."""
        room = SAMPLE - self._sampled
        inside = torch.arange(size.shape[-1], device=size.device) < lengths.unsqueeze(-1)
        inside = inside & (scales > 0).unsqueeze(-1)
        unit = scales.unsqueeze(-1).expand_as(size)[inside][:room]
        element = self.spec.block_format.element
        edge, width = element.max * 4 / 3, 0.625 * 2.0 ** (element.emax - element.mantissa_bits)
        magnitudes = _counts(size[inside][:room] / unit, 0.0, edge)
        errors = _counts(error[inside][:room] / unit, -width, width)
        self._sampled += unit.numel()
        if self._histogram is None:
            self._histogram = Histogram(magnitudes, errors, width)
        else:
            for old, new in ((self._histogram.magnitudes, magnitudes), (self._histogram.errors, errors)):
                old[:] = [a + b for a, b in zip(old, new, strict=True)]

    @property
    def histogram(self) -> Histogram | None:
        """Of a sample; None if nothing was added."""
        return self._histogram

    def result(self) -> dict[str, float]:
        """The figures. `docs/scan.md` lists what each of them is.

        Those of `metrics.error_report` (for activations, `sqnr_db` is the mean over the tokens and `pooled_sqnr_db`
        that of all elements together; for weights the two are equal), and of the tensor itself: `rms`, `amax`, `norm`
        (its L2 norm), `kurtosis` (3 for a gaussian), `block_crest` (mean over the blocks of amax / rms inside the
        block), `clipped_blocks` (share of blocks with a clipped element), `mean_abs_error`, `row_sqnr_db` (mean over
        the rows), `worst_channel` and `worst_channel_sqnr_db`, `at_maximum` (share of |x_hat| within 1 % of its
        largest, which published scans call saturation).
        """
        get, n = self._total, max(1, self.count)
        signal, noise = get("x2"), get("e2")
        rows = torch.cat(self._row_energies, 1) if self._row_energies else torch.zeros(2, 0, dtype=torch.float64)
        channels = rows if self.channels == "row" else self._column_energies
        by_row = _decibels(rows)
        pooled = decibels(signal, noise)
        row_mean = _mean(by_row)
        worst, worst_db = _worst(channels)
        return {
            "sqnr_db": row_mean if self.channels == "column" else pooled,
            "pooled_sqnr_db": pooled,
            "relative_rms": math.sqrt(noise / signal) if signal else 0.0,
            "mean_relative_error": get("relative") / n,
            "mean_abs_error": get("abs_error") / n,
            "max_abs_error": get("max_abs_error"),
            "deadzone": get("dead") / n,
            "clipped": get("clipped") / n,
            "clipped_blocks": get("clipped_blocks") / max(1.0, get("blocks")),
            "at_maximum": sum(self._tops.values()) / n,
            "norm": math.sqrt(signal),
            "rms": math.sqrt(signal / n),
            "amax": get("amax"),
            "kurtosis": self._kurtosis(),
            "block_crest": get("crest") / max(1.0, get("filled_blocks")),
            "row_sqnr_db": row_mean,
            "worst_channel": float(worst),
            "worst_channel_sqnr_db": worst_db,
        }

    def decomposition(self) -> dict[str, float]:
        """The shares and cosines of `metrics.decompose`, in the scale mode of the spec; empty where they are not
        defined: unless it rounds to nearest, with a rotation, and with a residual."""
        if not self.parted:
            return {}
        names = ("e2", "bias", "deadzone", "grid", "bias_grid", "bias_dead")
        return shares(*(self._total(name) for name in names))

    def _kurtosis(self) -> float:
        """E(x - m)^4 / var^2; 0 for a constant."""
        if not self.count:
            return 0.0
        m, second, third, fourth = (self._total(name) / self.count for name in ("x", "x2", "x3", "x4"))
        variance = second - m * m
        if variance <= 1e-12 * second:
            return 0.0
        return (fourth - 4 * m * third + 6 * m * m * second - 3 * m**4) / variance**2


@lru_cache
def _with_unit_scale(element: ElementFormat, block_size: int) -> QuantSpec | None:
    """A spec whose blocks hold whole blocks of `block_size`, and whose scale is 1 if the largest magnitude of each of
    these is `element.max`."""
    return next(
        (
            QuantSpec(name, "floor")
            for name, each in FORMATS.items()
            if each.element == element
            and each.scale == "e8m0"
            and "floor" in each.scale_modes
            and each.block_size % block_size == 0
        ),
        None,
    )


def _rounded(units: Tensor, element: ElementFormat, block_size: int) -> Tensor:
    """`round_magnitude` of blocks in units of their ideal scale; by a quantizer where one does the same, faster."""
    spec = _with_unit_scale(element, block_size)
    if spec is None:
        return round_magnitude(units, element)
    return fake_quantize(units, spec, out=units)


def _blocked(rows: Tensor, size: int) -> Tensor:
    """(R, K) as (R, blocks, size), padded with zeros."""
    padding = -rows.shape[1] % size
    return (torch.nn.functional.pad(rows, (0, padding)) if padding else rows).unflatten(1, (-1, size))


def _lengths(width: int, size: int) -> Tensor:
    """How many elements each block of a row has, fp32."""
    lengths = torch.full((-(-width // size),), float(size))
    lengths[-1] -= -width % size
    return lengths


def _occurrences(magnitudes: Tensor, least: float) -> dict[float, int]:
    """How often each of the magnitudes that are at least `least` occurs."""
    values, counts = torch.unique(magnitudes[magnitudes >= least].double(), return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _unit(peaks: Tensor) -> float:
    """A power of two to divide by, so that fourth powers stay inside fp32; 1 for tensors of usual magnitude."""
    top = peaks.amax().item()
    if top == 0.0 or 1e-6 < top < 1e8:
        return 1.0
    return 2.0 ** math.frexp(top)[1]


def _round_down(scales: Tensor, largest: float) -> Tensor:
    """The largest fp32 number that is at most `largest` * scale: |x| exceeds one exactly where it exceeds the other."""
    exact = scales.double() * largest
    limit = exact.float()
    return torch.where(limit.double() > exact, torch.nextafter(limit, torch.zeros_like(limit)), limit)


def _counts(values: Tensor, low: float, high: float) -> list[int]:
    inner = values.clamp(low, high)
    return [int(count) for count in torch.histc(inner.float().cpu(), BINS, low, high).tolist()]


def _decibels(energies: Tensor) -> Tensor:
    """SQNR of each column of (signal, noise), of those that have a signal."""
    signal, noise = energies
    return (10 * torch.log10(signal / noise))[signal > 0]


def _mean(by_row: Tensor) -> float:
    """Mean of the finite values: a row without error says nothing of the others. +inf if all are so."""
    finite = by_row[torch.isfinite(by_row)]
    return finite.mean().item() if finite.numel() else math.inf


def _worst(energies: Tensor | None) -> tuple[int, float]:
    """Index and SQNR of the channel of least SQNR; -1 and +inf if no channel has a signal."""
    if energies is None or not energies.numel() or not (energies[0] > 0).any():
        return -1, math.inf
    signal, noise = energies
    by_channel = torch.where(signal > 0, 10 * torch.log10(signal / noise), math.inf)
    worst = int(by_channel.argmin())
    return worst, by_channel[worst].item()
