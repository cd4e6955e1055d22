"""Codes, their order in the bytes, and the tensor that holds them."""

import pytest
import torch

from qnoise.formats import E2M1, E2M3, E3M2, E4M3, E5M2, FORMATS, INT8
from qnoise.functional import fake_quantize, quantize
from qnoise.packing import decode, encode, pack, unpack


def test_order_of_the_bits():
    codes = torch.tensor([0x1, 0xF, 0x8, 0x2], dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [0xF1, 0x28]
    codes = torch.tensor([0b000001, 0b111111, 0b100000, 0b101010], dtype=torch.uint8)
    word = sum(int(code) << (6 * i) for i, code in enumerate(codes))
    assert pack(codes, 6).tolist() == list(word.to_bytes(3, "little"))
    assert pack(codes, 8).tolist() == codes.tolist()


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_unpack_inverts_pack(bits):
    codes = torch.randint(0, 2**bits, (5, 3, 64), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (5, 3, 64 * bits // 8)
    assert torch.equal(unpack(packed, bits), codes)


def test_codes_of_the_8_bit_floats_are_those_of_torch():
    code = torch.arange(256).to(torch.uint8)
    for element, dtype in ((E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)):
        want = code.view(dtype).float()
        finite = want.isfinite()
        assert torch.equal(decode(code, element)[finite], want[finite])
        assert decode(code, element)[~finite].isnan().all()


def test_values_of_the_4_and_6_bit_floats():
    assert decode(torch.arange(8), E2M1).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    # One value of each kind: the smallest subnormal, the smallest normal, the largest (OCP MX v1.0, tables 4 and 5).
    assert decode(torch.tensor([0x01, 0x08, 0x1F]), E2M3).tolist() == [0.125, 1.0, 7.5]
    assert decode(torch.tensor([0x01, 0x04, 0x1F]), E3M2).tolist() == [0.0625, 0.25, 28.0]
    assert decode(torch.tensor([0x81, 0xFF, 0x7F]), INT8).tolist() == [-127 / 64, -1 / 64, 127 / 64]


@pytest.mark.parametrize("element", [E2M1, E2M3, E3M2, E4M3, E5M2, INT8], ids=lambda e: e.name)
def test_encode_inverts_decode(element):
    code = torch.arange(2**element.bits).to(torch.uint8)
    if element.is_integer:
        code = code[code != 128]  # -128 is never written
    values = decode(code, element)
    known = ~values.isnan()
    assert torch.equal(encode(values.abs(), values.signbit(), element)[known], code[known])


@pytest.mark.parametrize("fmt", FORMATS)
def test_layout_of_a_ragged_tensor(fmt):
    block = FORMATS[fmt]
    x = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0))
    q = quantize(x, fmt, axis=1)
    blocks = -(-50 // block.block_size)
    assert q.shape == x.shape
    assert (q.axis, q.fmt, q.spec.fmt) == (1, fmt, fmt)
    assert q.codes.dtype == torch.uint8
    assert q.codes.shape == (2, 3, blocks * block.block_size * block.element.bits // 8)
    assert q.scales.shape == (2, 3, blocks)
    assert q.scales.dtype == (torch.float8_e4m3fn if block.scale == "e4m3" else torch.float8_e8m0fnu)
    assert q.nbytes == q.codes.numel() + q.scales.numel() + (4 if block.per_tensor_scale else 0)
    padding = unpack(q.codes, block.element.bits)[..., 50:]
    assert not padding.any()
    assert torch.equal(q.dequantize(), fake_quantize(x, fmt, axis=1))
    assert q.dequantize().is_contiguous()


def test_bytes_per_element_of_whole_blocks():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    for fmt, block in FORMATS.items():
        extra = 4 if block.per_tensor_scale else 0
        assert quantize(x, fmt).nbytes == x.numel() * block.bits_per_element / 8 + extra


def test_dequantize_casts_once_from_fp32():
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1), dtype=torch.bfloat16)
    q = quantize(x, "nvfp4")
    assert q.dequantize().dtype == torch.bfloat16
    assert torch.equal(q.dequantize(torch.float32).bfloat16(), q.dequantize())
    assert q.dequantize(torch.float64).dtype == torch.float64
    with pytest.raises(TypeError, match="torch.int8"):
        q.dequantize(torch.int8)


def test_per_tensor_scale_is_the_divisor():
    x = torch.tensor([[1.0, -3.0], [0.5, 2.0]])
    q = quantize(x, "nvfp4")
    assert q.per_tensor_scale == 448 * 6 / 3
    assert q.per_tensor_multiplier == 1 / q.per_tensor_scale
    assert quantize(x, "nvfp4", "four_over_six").per_tensor_scale == 256 * 6 / 3
    assert quantize(x, "nvfp4", "single_level").per_tensor_scale == 1
    assert quantize(x, "mxfp4").per_tensor_scale is None
    assert quantize(x, "mxfp4").per_tensor_multiplier is None


def test_to_moves_every_tensor():
    q = quantize(torch.ones(2, 32), "nvfp4").to("meta")
    assert {q.codes.device.type, q.scales.device.type, q.per_tensor_scale.device.type} == {"meta"}
    assert q.shape == (2, 32)


def test_scale_bytes_of_nan_blocks():
    x = torch.ones(1, 64)
    x[0, 40] = torch.nan
    assert quantize(x, "mxfp4").scales.view(torch.uint8).tolist() == [[125, 255]]
    q = quantize(x, "nvfp4")
    assert q.scales.view(torch.uint8)[0, 2] & 0x7F == 0x7F
    assert not unpack(q.codes, 4)[0, 32:48].any()  # the codes of such a block are defined, too
