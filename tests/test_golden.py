"""Bit-for-bit comparison with the outputs of other projects; see tests/golden/README.md."""

import io
import json
import lzma
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from qnoise.formats import E2M1, E2M3, E3M2, E4M3, E5M2, FORMATS
from qnoise.functional import fake_quantize, quantize
from qnoise.packing import unpack
from qnoise.rounding import round_magnitude

GOLDEN = Path(__file__).parent / "golden"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())
CASES, CODES = MANIFEST["cases"], MANIFEST["codes"]
RULES = sorted({(c["fmt"], c["scale_mode"], c["rounding"]) for c in CASES})


@pytest.fixture(scope="module")
def vectors():
    with np.load(io.BytesIO(lzma.decompress((GOLDEN / "golden.npz.xz").read_bytes()))) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def mismatches(got, case, vectors):
    want = vectors[case["y"]].to(got.dtype).float()
    got = got.float()
    different = ~((got == want) | (got.isnan() & want.isnan()))
    if case["compare"] == "rtol":
        # One unit in the last place of bf16 where the fp32 results may differ by one of theirs.
        rtol = case["rtol"] if case["fp32"] else 0.008
        different &= ~((got - want).abs() <= rtol * torch.maximum(got.abs(), want.abs()))
    if "mask" in case:
        different &= vectors[case["mask"]]
    allowed = case.get("max_bad_frac", 0) * want.numel()
    count = int(different.sum())
    return count if count > allowed else 0


def test_no_case_is_missing():
    assert Counter(c["tier"] for c in CASES) == {"core": 612, "edge": 86, "half_away": 30}
    assert {c["fmt"] for c in CASES} == set(FORMATS)
    assert len(CODES) == 46


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rule", RULES, ids="-".join)
def test_fake_quantize_matches(rule, dtype, vectors):
    wrong, compared = {}, 0
    for case in CASES:
        if (case["fmt"], case["scale_mode"], case["rounding"]) != rule:
            continue
        x = vectors[case["x"]]
        if not torch.equal(x.to(dtype).float().nan_to_num(7.0), x.nan_to_num(7.0)):
            continue  # the inputs of this family are not representable in dtype
        got = fake_quantize(x.to(dtype), rule[0], rule[1], rounding=rule[2])
        assert got.shape == x.shape
        assert got.dtype == dtype
        compared += 1
        if count := mismatches(got, case | {"fp32": dtype == torch.float32}, vectors):
            wrong[case["family"]] = f"{count} of {x.numel()} differ from {case['peer']}"
    assert compared >= 3
    assert not wrong


@pytest.mark.parametrize("element", [E2M1, E2M3, E3M2, E4M3, E5M2], ids=lambda e: e.name)
def test_element_rounding_matches_ml_dtypes(element, vectors):
    x, want = vectors[f"elem/x/{element.name}"], vectors[f"elem/ml_dtypes/{element.name}"]
    # Beyond the largest value the 8-bit casts differ by design (NaN, Inf or saturation).
    inside = x.isfinite() & (x.abs() <= element.max) if element.bits == 8 else x.isfinite()
    assert inside.sum() > 100
    got = torch.copysign(round_magnitude(x.abs(), element), x)
    assert torch.equal(got[inside], want[inside])


@pytest.mark.parametrize("name", CODES)
def test_codes_and_scales_match_torchao(name, vectors):
    fmt, mode, family = name.split("/", 2)
    q = quantize(vectors[f"x/{family}"], fmt, mode)
    codes = unpack(q.codes, q.spec.block_format.element.bits)
    want = vectors[f"codes/torchao/{name}"]
    assert torch.equal(codes.reshape(want.shape), want)
    scale = q.scales.view(torch.uint8)
    assert torch.equal(scale.flatten(), vectors[f"scale/torchao/{name}"].flatten())
    if q.per_tensor_scale is not None:
        # Stored as amax / 2688 there and as 2688 / amax here: each is rounded once.
        torch.testing.assert_close(q.per_tensor_multiplier, vectors[f"pts/torchao/{name}"], rtol=2.0**-23, atol=0)
