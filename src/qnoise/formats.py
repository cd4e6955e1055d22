"""Names and numbers of the block-scaled formats: what a format is, and which ones exist.

A format is one row of the table at the end of this file. Nothing here computes on tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any

from .spelling import nearest

ROUNDINGS: tuple[str, ...] = ("nearest", "half_away", "stochastic")
"""Roundings of an element: ties to even, ties away from zero, and an unbiased draw."""

MX_SCALE_MODES: tuple[str, ...] = ("floor", "rceil", "ceil", "even", "mse")
"""Rules for a power-of-two (E8M0) block scale; the first is the OCP MX v1.0 rule."""

NV_SCALE_MODES: tuple[str, ...] = (
    "two_level",
    "single_level",
    "four_over_six",
    "four_over_six_mae",
    "four_over_six_absmax",
    "mse",
)
"""Rules for an E4M3 block scale under an fp32 per-tensor scale; the first is NVIDIA's rule."""

MACRO_BLOCK = 128
"""Elements that share a factor of ``QuantSpec.macro_block`` (arXiv 2603.08713), one byte for each of them."""

ROTATIONS: tuple[str, ...] = ("hadamard",)
"""Rotations of a block before it is quantized."""


def unknown_name(kind: str, name: object, allowed: Iterable[str]) -> ValueError:
    """A ``ValueError`` that lists the names which exist and the nearest spelling of ``name``."""
    names = list(allowed)
    near = nearest(name, names)
    hint = f" Did you mean {near!r}?" if near else ""
    return ValueError(f"unknown {kind} {name!r}; choose one of: {', '.join(names)}.{hint}")


@dataclass(frozen=True)
class ElementFormat:
    """The grid of one element, before the block scale multiplies it.

    Floating-point elements have a sign bit, ``exponent_bits`` and ``mantissa_bits``; ``emin`` is the
    exponent of the smallest normal value, so the smallest step is ``2**(emin - mantissa_bits)``. An element
    with ``exponent_bits == 0`` is an integer in two's complement times ``2**-mantissa_bits`` (MXINT8: n/64,
    |n| <= 127). ``max`` is the largest finite magnitude; larger values saturate to it.

    Raises:
        ValueError: the fields contradict each other.
    """

    name: str
    bits: int
    exponent_bits: int
    mantissa_bits: int
    emin: int
    max: float

    def __post_init__(self) -> None:
        if self.bits not in (4, 6, 8):
            raise ValueError(f"element {self.name!r}: bits={self.bits} cannot be packed; use 4, 6 or 8")
        # An integer element spends one bit on the sign and one on the integer part.
        expected = 1 + (self.exponent_bits or 1) + self.mantissa_bits
        if min(self.exponent_bits, self.mantissa_bits) < 0 or self.bits != expected:
            raise ValueError(
                f"element {self.name!r}: bits={self.bits} do not hold a sign, {self.exponent_bits} exponent "
                f"bits and {self.mantissa_bits} mantissa bits (that takes {expected})"
            )
        if not (math.isfinite(self.max) and self.max >= 1):
            raise ValueError(f"element {self.name!r}: max={self.max} must be finite and at least 1")
        step = 2.0 ** (max(self.emax, self.emin) - self.mantissa_bits)
        if self.max % step:
            raise ValueError(f"element {self.name!r}: max={self.max} is not on the grid, whose last step is {step}")

    @property
    def emax(self) -> int:
        """Exponent of the largest finite value: ``floor(log2(max))``."""
        return math.frexp(self.max)[1] - 1

    @property
    def is_integer(self) -> bool:
        """True for two's complement elements, which have no negative zero."""
        return self.exponent_bits == 0


@dataclass(frozen=True)
class BlockFormat:
    """An element format, how many elements share a scale, and what that scale is.

    Attributes:
        name: the name used everywhere as ``fmt``.
        element: the grid of one element.
        block_size: elements that share one scale, along the contraction axis; a power of two, at least 4.
        scale: ``"e8m0"`` (a power of two) or ``"e4m3"`` (8-bit float with subnormals), one byte a block.
        per_tensor_scale: True if one fp32 number scales all the block scales (NVFP4).
        scale_modes: the rules that may choose the block scale; the first is the default.

    Raises:
        TypeError: ``element`` or ``scale_modes`` is of the wrong kind.
        ValueError: a field has a value that no quantizer here implements.
    """

    name: str
    element: ElementFormat
    block_size: int
    scale: str
    per_tensor_scale: bool
    scale_modes: tuple[str, ...]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ValueError(f"format name {self.name!r} must be lower-case letters, digits and underscores")
        if not isinstance(self.element, ElementFormat):
            raise TypeError(
                f"format {self.name!r}: element must be an ElementFormat, got {type(self.element).__name__}"
            )
        if self.block_size < 4 or self.block_size & (self.block_size - 1):
            raise ValueError(f"format {self.name!r}: block_size={self.block_size} must be a power of two, at least 4")
        if self.scale not in ("e8m0", "e4m3"):
            raise ValueError(f"format {self.name!r}: scale={self.scale!r} must be 'e8m0' or 'e4m3'")
        if self.per_tensor_scale != (self.scale == "e4m3"):
            raise ValueError(
                f"format {self.name!r}: scale={self.scale!r} needs per_tensor_scale={self.scale == 'e4m3'}; "
                "an E8M0 scale reaches every fp32 magnitude by itself and an E4M3 scale does not"
            )
        if isinstance(self.scale_modes, str):
            raise TypeError(f"format {self.name!r}: scale_modes must be a tuple of names, got {self.scale_modes!r}")
        object.__setattr__(self, "scale_modes", tuple(self.scale_modes))  # a list would not hash
        known = NV_SCALE_MODES if self.per_tensor_scale else MX_SCALE_MODES
        if not self.scale_modes:
            raise ValueError(f"format {self.name!r}: scale_modes is empty; choose from: {', '.join(known)}")
        for mode in self.scale_modes:
            if mode not in known:
                raise unknown_name(f"scale mode for {self.scale} scales (format {self.name!r})", mode, known)

    @property
    def bits_per_element(self) -> float:
        """Stored bits per element with the block scale spread over its block, e.g. 4.25 for ``mxfp4``."""
        return self.element.bits + 8 / self.block_size


E2M1 = ElementFormat("e2m1", 4, 2, 1, emin=0, max=6.0)
E2M3 = ElementFormat("e2m3", 6, 2, 3, emin=0, max=7.5)
E3M2 = ElementFormat("e3m2", 6, 3, 2, emin=-2, max=28.0)
E4M3 = ElementFormat("e4m3", 8, 4, 3, emin=-6, max=448.0)
E5M2 = ElementFormat("e5m2", 8, 5, 2, emin=-14, max=57344.0)
INT8 = ElementFormat("int8", 8, 0, 6, emin=0, max=127 / 64)

_TABLE: dict[str, BlockFormat] = {}

FORMATS: Mapping[str, BlockFormat] = MappingProxyType(_TABLE)
"""Every format by name. Read-only; :func:`register_format` adds one."""


def register_format(fmt: BlockFormat) -> None:
    """Add ``fmt`` to :data:`FORMATS`. Adding an equal format again changes nothing.

    Raises:
        TypeError: ``fmt`` is not a :class:`BlockFormat`.
        ValueError: another format already has this name.
    """
    if not isinstance(fmt, BlockFormat):
        raise TypeError(f"register_format takes a BlockFormat, got {type(fmt).__name__}")
    if _TABLE.setdefault(fmt.name, fmt) != fmt:
        raise ValueError(f"a different format named {fmt.name!r} exists already; choose another name")


@dataclass(frozen=True)
class QuantSpec:
    """How to quantize: a format, the rule for its scales, the rounding of its elements, and what is done around them.

    ``scale_mode=None`` is replaced by the format's default, so equal specs compare and hash equal.
    ``rounding="even"`` is accepted as another name of ``"nearest"``.

    The last three change the format that is deployed: it needs kernels that know of them. They compose with each
    other, with every scale mode and with every rounding, unless an error below says otherwise; ``reference.py`` tells
    the order of operations.

    Attributes:
        fmt: a name in :data:`FORMATS`.
        scale_mode: the rule for the block scale.
        rounding: a name in :data:`ROUNDINGS`.
        macro_block: 128 for macro-block scaling (arXiv 2603.08713, 2605.20402): 128 neighbours share a factor f = 1 +
            m with an 8-bit mantissa m, and x_hat = Q(f x) / f. It adds 8 / 128 bit an element. The factor brings the
            largest of the 128 to the top of the grid; with ``scale_mode="mse"``, which takes whatever has the least
            squared error, it is searched among 16 instead. For E8M0 scales only.
        residual: alpha in (0, 1] for a second pass over what the first one left (outlier fallback, arXiv 2605.20402):
            x1 = Q(x), x2 = Q(x - x1), x_hat = x1 + alpha x2. Two tensors are stored and multiplied, so this takes
            twice the bits: 8.5 an element for ``mxfp4``. alpha = 1 has the least error; 0.5 is what that paper trains
            with.
        rotation: ``"hadamard"`` to quantize each block in the basis of the Hadamard transform of its size and to turn
            the result back: x_hat = H Q(H x). No bits are added. It spreads an outlier over its block, which helps
            formats with a coarse scale on heavy tails and hurts ``nvfp4`` in its ``two_level`` mode there.

    Raises:
        TypeError: a field of the wrong kind.
        ValueError: a name that does not exist, a scale mode that the format does not have, a number outside its range,
            or ``macro_block`` for a format that cannot use it.
    """

    fmt: str = "mxfp4"
    scale_mode: str | None = None
    rounding: str = "nearest"
    macro_block: int | None = None
    residual: float | None = None
    rotation: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.fmt, str):
            raise TypeError(f"fmt must be a format name, got {type(self.fmt).__name__}: {self.fmt!r}")
        if self.fmt not in FORMATS:
            raise unknown_name("format", self.fmt, FORMATS)
        modes = FORMATS[self.fmt].scale_modes
        if self.scale_mode is None:
            object.__setattr__(self, "scale_mode", modes[0])
        elif self.scale_mode not in modes:
            raise unknown_name(f"scale_mode for format {self.fmt!r}", self.scale_mode, modes)
        object.__setattr__(self, "rounding", canonical_rounding(self.rounding))
        self._check_macro_block()
        if self.residual is not None:
            if isinstance(self.residual, bool) or not isinstance(self.residual, int | float):
                raise TypeError(f"residual must be a number in (0, 1] or None, got {self.residual!r}")
            if not 0 < self.residual <= 1:
                raise ValueError(
                    f"residual={self.residual!r} must lie in (0, 1]: the share of the second pass that is added; "
                    "None leaves that pass out"
                )
            object.__setattr__(self, "residual", float(self.residual))
        if self.rotation is not None and self.rotation not in ROTATIONS:
            raise unknown_name("rotation", self.rotation, [*ROTATIONS, "None"])

    def _check_macro_block(self) -> None:
        block, macro = self.block_format, self.macro_block
        if macro is None:
            return
        if isinstance(macro, bool) or not isinstance(macro, int):
            raise TypeError(f"macro_block must be {MACRO_BLOCK} or None, got {macro!r}")
        if macro != MACRO_BLOCK:
            raise ValueError(f"macro_block={macro} must be {MACRO_BLOCK} (or None)")
        if block.scale != "e8m0":
            raise ValueError(
                f"macro_block is for formats with power-of-two (E8M0) scales, and the scales of {self.fmt!r} are E4M3 "
                "numbers, which have a mantissa of their own; use scale_mode='mse' for better scales"
            )
        if macro % block.block_size:
            raise ValueError(
                f"macro_block={macro} must hold whole blocks, and those of {self.fmt!r} are {block.block_size} long"
            )

    def __str__(self) -> str:
        """The name, with what differs from its defaults: ``nvfp4``, ``mxfp4 (even, stochastic, hadamard)``."""
        own = (
            "" if self.scale_mode == self.block_format.scale_modes[0] else self.scale_mode,
            "" if self.rounding == "nearest" else self.rounding,
            "" if self.macro_block is None else f"macro_block={self.macro_block}",
            "" if self.residual is None else f"residual={self.residual:g}",
            self.rotation,
        )
        shown = ", ".join(filter(None, own))
        return f"{self.fmt} ({shown})" if shown else self.fmt

    @property
    def block_format(self) -> BlockFormat:
        """The row of :data:`FORMATS` that ``fmt`` names."""
        return _TABLE[self.fmt]  # the compiler does not look through the read-only view

    @property
    def per_tensor_scale(self) -> bool:
        """True if the result depends on an amax beyond the block (NVFP4, except in ``single_level`` mode)."""
        return self.block_format.per_tensor_scale and self.scale_mode != "single_level"

    @property
    def bits_per_element(self) -> float:
        """Stored bits per element: those of the format, 8 / 128 more for ``macro_block``, and all twice for
        ``residual``. E.g. 4.25 for ``mxfp4``, 4.3125 with ``macro_block=128``, 8.5 with ``residual``."""
        bits = self.block_format.bits_per_element
        if self.macro_block is not None:
            bits += 8 / self.macro_block
        return bits if self.residual is None else 2 * bits

    @property
    def storable(self) -> bool:
        """True if packed codes and scales hold all of it: no factors of macro-blocks, no second pass."""
        return self.macro_block is None and self.residual is None

    @property
    def plain(self) -> bool:
        """True if nothing is done around the quantizer: no macro-block, no residual, no rotation."""
        return self.storable and self.rotation is None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON; :meth:`from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantSpec:
        """The spec that :meth:`to_dict` wrote; keys left out take their defaults.

        Raises:
            ValueError: a key or a value that does not exist.
        """
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise unknown_name("key of a QuantSpec", key, known)
        return cls(**values)


def canonical_rounding(rounding: str) -> str:
    """``rounding`` under its own name: ``"even"`` becomes ``"nearest"``.

    Raises:
        ValueError: no such rounding.
    """
    if rounding == "even":
        return "nearest"
    if rounding not in ROUNDINGS:
        raise unknown_name("rounding", rounding, ROUNDINGS)
    return rounding


def as_spec(fmt: str | QuantSpec) -> QuantSpec:
    """``fmt`` as a :class:`QuantSpec`: a name gets the format's default scale mode and nearest rounding.

    Raises:
        TypeError: neither a name nor a spec.
        ValueError: no such format.
    """
    if isinstance(fmt, QuantSpec):
        return fmt
    if isinstance(fmt, str):
        return QuantSpec(fmt)
    raise TypeError(f"fmt must be a format name or a QuantSpec, got {type(fmt).__name__}: {fmt!r}")


for _name, _element in {
    "mxfp4": E2M1,
    "mxfp6_e2m3": E2M3,
    "mxfp6_e3m2": E3M2,
    "mxfp8_e4m3": E4M3,
    "mxfp8_e5m2": E5M2,
    "mxint8": INT8,
}.items():
    register_format(BlockFormat(_name, _element, 32, "e8m0", False, MX_SCALE_MODES))
register_format(BlockFormat("nvfp4", E2M1, 16, "e4m3", True, NV_SCALE_MODES))
