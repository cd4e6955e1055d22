"""Codes in bytes: elements to codes and back, codes to packed bytes and back, and the tensor that holds
them.

Code of a floating-point element: sign bit, exponent field, mantissa, as in OCP Microscaling v1.0 section
5.3; of an integer element: two's complement. Packing is little-endian, low bits first: two 4-bit codes to
a byte (the first in the low nibble), four 6-bit codes to three bytes, one 8-bit code to a byte.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .formats import ElementFormat, QuantSpec
from .rounding import BIAS, MANTISSA


@dataclass(frozen=True, eq=False)
class BlockQuantized:
    """A quantized tensor as it would be stored: packed codes and block scales.

    The block axis is the last axis of ``codes`` and ``scales``, whatever ``axis`` was; the other axes keep
    their order. A row that does not fill its last block is padded with zeros in ``codes``; ``shape`` is the
    logical shape.

    Attributes:
        codes: uint8, (..., blocks * block_size * element bits / 8), see the module's text for the order of
            bits.
        scale_codes: uint8, (..., blocks): the bytes of E8M0 or E4M3 numbers, NaN for a block with NaN or Inf.
            :attr:`scales` shows them as numbers.
        per_tensor_scale: fp32, 0-d or (..., 1), or None for E8M0 formats. It is the **divisor** gs of the
            rule ``value = code * (scale / gs)``, as compressed-tensors stores it;
            :attr:`per_tensor_multiplier` is 1 / gs.
        shape: logical shape of the tensor that was quantized.
        spec: how it was quantized; with a rotation, codes and scales are those of the rotated tensor.
        axis: which axis of ``shape`` the blocks lie along, >= 0 (0 for a 0-d tensor).
        dtype: dtype of the tensor that was quantized, and of :meth:`dequantize` by default.
    """

    codes: Tensor
    scale_codes: Tensor
    per_tensor_scale: Tensor | None
    shape: torch.Size
    spec: QuantSpec
    axis: int
    dtype: torch.dtype

    @property
    def fmt(self) -> str:
        """Name of the format."""
        return self.spec.fmt

    @property
    def scales(self) -> Tensor:
        """The block scales as ``torch.float8_e8m0fnu`` or ``torch.float8_e4m3fn``, (..., blocks); a view."""
        e4m3 = self.spec.block_format.scale == "e4m3"
        return self.scale_codes.view(torch.float8_e4m3fn if e4m3 else torch.float8_e8m0fnu)

    @property
    def per_tensor_multiplier(self) -> Tensor | None:
        """``1 / per_tensor_scale`` in fp32, the form in which some engines store it. Dequantizing with it
        can differ
        from :meth:`dequantize` in the last bit."""
        return None if self.per_tensor_scale is None else 1.0 / self.per_tensor_scale

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held, padding included."""
        held = (self.codes, self.scale_codes, self.per_tensor_scale)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values, of shape ``shape``, computed in fp32 and cast once to ``dtype`` (default: the dtype
        that was quantized). Equal to ``fake_quantize`` of the original bit for bit, the sign of zero
        included.

        Raises:
            TypeError: ``dtype`` is not a floating-point dtype.
        """
        dtype = self.dtype if dtype is None else dtype
        if not dtype.is_floating_point:
            raise TypeError(f"cannot dequantize to {dtype}; choose a floating-point dtype")
        gs = self.per_tensor_scale
        return torch.ops.qnoise.dequantize(
            self.codes,
            self.scale_codes,
            self.codes.new_empty(0, dtype=torch.float32) if gs is None else gs,
            self.spec.fmt,
            self.spec.scale_mode,
            self.shape,
            self.axis,
            dtype,
            self.spec.rotation,
        )

    def to(self, device: torch.device | str) -> BlockQuantized:
        """The same tensor on another device."""
        gs = self.per_tensor_scale
        return replace(
            self,
            codes=self.codes.to(device),
            scale_codes=self.scale_codes.to(device),
            per_tensor_scale=None if gs is None else gs.to(device),
        )


def encode(rounded: Tensor, negative: Tensor, element: ElementFormat) -> Tensor:
    """Codes of magnitudes that lie on the grid of ``element``.

    Args:
        rounded: fp32 magnitudes on the grid; NaN is encoded as 0 (its block's scale is NaN).
        negative: bool, the sign.
        element: the grid.

    Returns:
        uint8 codes, one a byte, same shape.
    """
    magnitude = torch.nan_to_num(rounded, nan=0.0)
    if element.is_integer:
        count = (magnitude * 2.0**element.mantissa_bits).to(torch.int32)
        return (torch.where(negative, -count, count) & (2**element.bits - 1)).to(torch.uint8)
    binade = ((magnitude.view(torch.int32) >> MANTISSA) - BIAS).clamp(min=element.emin) - element.emin
    ladder = torch.ldexp(magnitude, element.mantissa_bits - element.emin - binade).to(torch.int32)
    # The ladder of a normal binade starts at 2**mantissa_bits: that is the first unit of the exponent field.
    code = (binade << element.mantissa_bits) + ladder
    return (code | (negative.to(torch.int32) << (element.bits - 1))).to(torch.uint8)


def decode(codes: Tensor, element: ElementFormat) -> Tensor:
    """fp32 values of uint8 codes, one a byte. Codes above ``element.max`` are never written and give NaN."""
    return _values(element).to(codes.device)[codes.to(torch.int64)]


def _values(element: ElementFormat) -> Tensor:
    """The value of every code, in the order of the codes; on the CPU, whatever the default device is."""
    if element.is_integer:
        count = torch.arange(2**element.bits, dtype=torch.float32, device="cpu")
        half = 2 ** (element.bits - 1)
        return torch.where(count < half, count, count - 2 * half) * 2.0**-element.mantissa_bits
    code = torch.arange(2 ** (element.bits - 1), device="cpu")
    field, mantissa = code >> element.mantissa_bits, code & (2**element.mantissa_bits - 1)
    ladder = torch.where(field > 0, mantissa + 2**element.mantissa_bits, mantissa).to(torch.float32)
    values = torch.ldexp(ladder, field.clamp(min=1) - 1 + element.emin - element.mantissa_bits)
    values = torch.where(values > element.max, torch.nan, values)
    return torch.cat([values, -values])


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of ``bits`` bits, one a byte, to packed bytes along the last axis, a multiple of 4 long."""
    if bits == 8:
        return codes
    if bits == 4:
        return codes[..., 0::2] | (codes[..., 1::2] << 4)
    a, b, c, d = (codes[..., i::4] for i in range(4))
    return torch.stack([a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2)], dim=-1).flatten(-2)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`pack`."""
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    x, y, z = (packed[..., i::3] for i in range(3))
    codes = [x & 63, (x >> 6) | ((y & 15) << 2), (y >> 4) | ((z & 3) << 4), z >> 2]
    return torch.stack(codes, dim=-1).flatten(-2)
