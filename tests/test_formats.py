"""The table of formats and the specs that name its rows."""

import dataclasses
import json

import pytest
import torch

from qnoise import formats
from qnoise.formats import E2M1, E4M3, FORMATS, BlockFormat, ElementFormat, QuantSpec, as_spec, register_format


def test_the_table():
    bits = {name: block.bits_per_element for name, block in FORMATS.items()}
    assert bits == {
        "mxfp4": 4.25,
        "mxfp6_e2m3": 6.25,
        "mxfp6_e3m2": 6.25,
        "mxfp8_e4m3": 8.25,
        "mxfp8_e5m2": 8.25,
        "mxint8": 8.25,
        "nvfp4": 4.5,
    }
    for name, block in FORMATS.items():
        assert block.name == name
        nv = name == "nvfp4"
        assert (block.block_size, block.scale, block.per_tensor_scale) == (
            (16, "e4m3", True) if nv else (32, "e8m0", False)
        )
        assert block.scale_modes[0] == ("two_level" if nv else "floor")
    assert [FORMATS[n].element.emax for n in FORMATS] == [2, 2, 4, 8, 15, 0, 2]


def test_the_table_is_read_only():
    with pytest.raises(TypeError):
        FORMATS["mine"] = FORMATS["mxfp4"]


def test_a_format_is_one_row(monkeypatch):
    monkeypatch.setattr(formats, "_TABLE", table := dict(FORMATS))
    monkeypatch.setattr(formats, "FORMATS", table)
    mine = BlockFormat("mxfp4_b16", E2M1, 16, "e8m0", False, ["even", "floor"])
    register_format(mine)
    register_format(dataclasses.replace(mine))
    assert QuantSpec("mxfp4_b16").scale_mode == "even"
    assert QuantSpec("mxfp4_b16").block_format.bits_per_element == 4.5
    with pytest.raises(ValueError, match="'mxfp4_b16' exists already"):
        register_format(dataclasses.replace(mine, block_size=8))
    with pytest.raises(TypeError, match="BlockFormat, got str"):
        register_format("mxfp4")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"name": "MX FP4"}, ValueError, "lower-case"),
        ({"block_size": 24}, ValueError, "block_size=24 must be a power of two"),
        ({"block_size": 2}, ValueError, "block_size=2 must be"),
        ({"scale": "fp16"}, ValueError, "'e8m0' or 'e4m3'"),
        ({"scale": "e4m3"}, ValueError, "needs per_tensor_scale=True"),
        ({"per_tensor_scale": True}, ValueError, "needs per_tensor_scale=False"),
        ({"scale_modes": ()}, ValueError, "scale_modes is empty"),
        ({"scale_modes": "floor"}, TypeError, "tuple of names"),
        ({"scale_modes": ("flor",)}, ValueError, "Did you mean 'floor'"),
        ({"element": "e2m1"}, TypeError, "ElementFormat, got str"),
    ],
)
def test_a_row_that_no_quantizer_implements_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(FORMATS["mxfp4"], **change)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("e2m2", 5, 2, 2, 0, 6.0), "bits=5 cannot be packed"),
        (("e2m2", 6, 2, 2, 0, 6.0), r"takes 5\)"),
        (("e2m1", 4, 2, 1, 0, float("inf")), "finite"),
        (("e2m1", 4, 2, 1, 0, 6.5), "not on the grid"),
    ],
)
def test_an_element_that_contradicts_itself_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ElementFormat(*fields)


def test_specs_are_values():
    spec = QuantSpec("nvfp4")
    assert spec == QuantSpec("nvfp4", "two_level", "even")
    assert hash(spec) == hash(QuantSpec("nvfp4", "two_level", "nearest"))
    assert spec != QuantSpec("nvfp4", "mse")
    assert spec.block_format is FORMATS["nvfp4"]
    assert spec.rounding == "nearest"
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.fmt = "mxfp4"


def test_specs_survive_json():
    for spec in (
        QuantSpec(),
        QuantSpec("nvfp4", "mse", "stochastic"),
        QuantSpec("mxfp4", None, "nearest", 128, 0.5, "hadamard"),
    ):
        assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert QuantSpec.from_dict({"fmt": "mxint8"}) == QuantSpec("mxint8")
    with pytest.raises(ValueError, match="Did you mean 'rounding'"):
        QuantSpec.from_dict({"roundig": "nearest"})


def test_which_specs_depend_on_more_than_their_block():
    assert QuantSpec("nvfp4").per_tensor_scale
    assert QuantSpec("nvfp4", "four_over_six").per_tensor_scale
    assert not QuantSpec("nvfp4", "single_level").per_tensor_scale
    assert not QuantSpec("mxfp4").per_tensor_scale


def test_what_is_done_around_the_quantizer_is_part_of_the_value():
    plain = QuantSpec("mxfp4")
    around = [
        QuantSpec("mxfp4", macro_block=128),
        QuantSpec("mxfp4", residual=0.5),
        QuantSpec("mxfp4", residual=1),
        QuantSpec("mxfp4", rotation="hadamard"),
        QuantSpec("mxfp4", "even", "stochastic", 128, 0.5, "hadamard"),
    ]
    assert len({plain, *around}) == 6
    assert plain.plain
    assert not any(spec.plain for spec in around)
    assert QuantSpec("mxfp4", residual=1) == QuantSpec("mxfp4", residual=1.0)
    assert [str(spec) for spec in around] == [
        "mxfp4 (macro_block=128)",
        "mxfp4 (residual=0.5)",
        "mxfp4 (residual=1)",
        "mxfp4 (hadamard)",
        "mxfp4 (even, stochastic, macro_block=128, residual=0.5, hadamard)",
    ]


def test_true_bits():
    """A byte for 128 elements is 1/16 bit; two passes store everything twice."""
    bits = {str(spec): spec.bits_per_element for spec in (
        QuantSpec("mxfp4"), QuantSpec("nvfp4", "mse", rotation="hadamard"), QuantSpec("mxfp4", macro_block=128),
        QuantSpec("mxfp4", residual=0.5), QuantSpec("mxfp4", macro_block=128, residual=0.5, rotation="hadamard"),
    )}  # fmt: skip
    assert list(bits.values()) == [4.25, 4.5, 4.3125, 8.5, 8.625]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"macro_block": 64}, ValueError, "macro_block=64 must be 128"),
        ({"macro_block": True}, TypeError, "macro_block must be 128 or None, got True"),
        ({"fmt": "nvfp4", "macro_block": 128}, ValueError, "E4M3.*scale_mode='mse'"),
        ({"residual": 0}, ValueError, r"residual=0 must lie in \(0, 1\]"),
        ({"residual": 1.5}, ValueError, r"residual=1.5 must lie in \(0, 1\]"),
        ({"residual": float("nan")}, ValueError, "residual=nan must lie"),
        ({"residual": "0.5"}, TypeError, "residual must be a number"),
        ({"rotation": "hadamart"}, ValueError, "unknown rotation.*Did you mean 'hadamard'"),
    ],
)
def test_fields_that_no_quantizer_implements_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        QuantSpec(**arguments)


def test_a_macro_block_holds_whole_blocks(monkeypatch):
    monkeypatch.setitem(formats._TABLE, "long", dataclasses.replace(FORMATS["mxfp4"], name="long", block_size=256))
    with pytest.raises(ValueError, match="macro_block=128 must hold whole blocks, and those of 'long' are 256 long"):
        QuantSpec("long", macro_block=128)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mxpf4",), "mxfp8_e5m2.*Did you mean 'mxfp4'"),
        (("MXFP4",), "Did you mean 'mxfp4'"),
        (("mxfp4", "two_level"), "scale_mode for format 'mxfp4'.*floor, rceil, ceil, even, mse"),
        (("nvfp4", "two_levels"), "Did you mean 'two_level'"),
        (("mxfp4", None, "stochastik"), "Did you mean 'stochastic'"),
    ],
)
def test_unknown_names_list_the_known_ones(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantSpec(*arguments)


def test_as_spec():
    spec = QuantSpec("mxfp4", "even")
    assert as_spec(spec) is spec
    assert as_spec("mxfp4") == QuantSpec("mxfp4")
    with pytest.raises(TypeError, match="got BlockFormat"):
        as_spec(FORMATS["mxfp4"])
    with pytest.raises(TypeError, match="got int"):
        QuantSpec(4)


def test_e4m3_is_that_of_torch():
    limits = torch.finfo(torch.float8_e4m3fn)
    assert (limits.max, limits.tiny) == (E4M3.max, 2.0**E4M3.emin)
