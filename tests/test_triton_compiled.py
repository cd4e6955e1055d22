"""What the compilers make of the Triton kernels for GPUs that are not here; see benchmarks/kernel_artefacts.py."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
if sys.platform != "linux":
    pytest.skip("Triton's compilers are for Linux", allow_module_level=True)

import triton

from benchmarks.kernel_artefacts import (
    TARGETS,
    Artefact,
    compiled,
    faults,
    grown,
    others,
    quantizers,
    read_recorded,
    recorded_kernels,
    row,
    shortest_path,
    with_noise,
)
from qnoise import formats
from qnoise.formats import E2M1, E3M2, FORMATS, BlockFormat, ElementFormat, QuantSpec
from qnoise.kernels.gpu.launch import supports

# ALU instructions an element on sm_90, bf16. At 4.3 TB/s the copy of a bf16 tensor leaves time for 13.8.
GOALS = {
    "fake_quantize mxfp4 bf16": 9,
    "fake_quantize nvfp4 bf16": 10,
    "pack mxfp4 bf16": 10,
    "pack nvfp4 bf16": 10,
}


def check(kernel, target: str) -> Artefact:
    artefact = compiled(kernel, target)
    assert not faults(kernel, artefact), kernel.name
    before = read_recorded().get((target, kernel.name))
    if before is not None and triton.__version__ == read_version():
        assert not grown(row(kernel, artefact), before), kernel.name
    if artefact.nvidia and kernel.name.startswith(("fake_quantize", "pack")):
        # The interpreted tests replace the reduction that has to see a NaN in a block.
        assert "max.NaN.f32" in artefact.text
    if target == "sm_90" and kernel.name in GOALS:
        assert row(kernel, artefact)["alu_per_element"] <= GOALS[kernel.name]
    return artefact


def read_version() -> str:
    from benchmarks.files import read_json
    from benchmarks.kernel_artefacts import RESULT

    return read_json(RESULT)["triton"]


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_the_4_bit_formats_on_sm_90(fmt: str) -> None:
    for kernel in quantizers(QuantSpec(fmt), "bf16"):
        check(kernel, "sm_90")


def test_rotation_and_noise_on_sm_90() -> None:
    """They add shuffles, sums and products: no memory of the program, and no product fused with a sum."""
    plain = check(quantizers(QuantSpec("nvfp4"), "bf16")[0], "sm_90")
    rotated = check(quantizers(QuantSpec("nvfp4", rotation="hadamard"), "bf16")[0], "sm_90")
    noisy, noisy_amax = (check(kernel, "sm_90") for kernel in with_noise(QuantSpec("nvfp4"), "bf16"))
    assert plain.shared == rotated.shared == noisy.shared == 0
    assert plain.path["FFMA"] == rotated.path["FFMA"] == noisy.path["FFMA"]
    assert rotated.path["SHFL"] > plain.path["SHFL"]
    assert noisy.accesses()["load 128"] == 3 * plain.accesses()["load 128"]  # z is fp32, x bf16
    assert noisy_amax.path["FFMA"] == 0
    check(quantizers(QuantSpec("mxfp4", rotation="hadamard"), "bf16")[1], "sm_90")


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_other_targets(target: str) -> None:
    check(quantizers(QuantSpec("nvfp4"), "bf16")[1], target)


def test_kernels_without_a_format() -> None:
    for kernel in others("bf16"):
        check(kernel, "sm_90")


def test_everything_is_recorded() -> None:
    names = {(target, kernel.name) for target in TARGETS for kernel in recorded_kernels(target)}
    assert names == set(read_recorded())


@pytest.mark.slow
@pytest.mark.timeout(1200)  # some 250 kernels, half a second each on a machine of its own
@pytest.mark.parametrize("target", TARGETS)
def test_all_of_it(target: str) -> None:
    for fmt, block in FORMATS.items():
        for dtype in ("bf16", "fp32"):
            for mode in block.scale_modes:
                for rounding in ("nearest", "half_away", "stochastic") if mode == block.scale_modes[0] else ["nearest"]:
                    kernels = quantizers(QuantSpec(fmt, mode, rounding), dtype)
                    for kernel in kernels if (mode, rounding) == (block.scale_modes[0], "nearest") else kernels[:2]:
                        check(kernel, target)
            if dtype == "bf16" or fmt in ("mxfp4", "nvfp4"):
                for kernel in quantizers(QuantSpec(fmt, rotation="hadamard"), dtype):
                    check(kernel, target)
    for kernel in with_noise(QuantSpec("nvfp4"), "fp32"):
        check(kernel, target)
    for kernel in others("fp32"):
        check(kernel, target)


GOOD = Artefact("sm_90", "ld.global.v4.b32 st.global.v4.b32", 128, 0, 32, 0, Counter({"FMUL": 3}))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("div.full.f32 %f1", "approximate division"),
        ("div.approx.f32 %f1", "approximate division"),
        ("rcp.approx.ftz.f32", "approximate reciprocal"),
        ("mul.ftz.f32", "flushing"),
        ("div.s32 %r1", "integer division"),
        ("ld.local.b32", "local memory"),
        ("fma.rn.f32 %f1", "contracted"),
        ("ld.global.b16 %r1", "less than 128 bits: load 16"),
        ("st.global.v2.b32 %r1", "less than 128 bits: store 64"),
    ],
)
def test_faults_are_seen(text: str, fault: str) -> None:
    kernel = quantizers(QuantSpec("mxfp4"), "bf16")[0]
    assert not faults(kernel, GOOD)
    (found,) = faults(kernel, replace(GOOD, text=f"{GOOD.text} {text}"))[:1]
    assert fault in " ".join(faults(kernel, replace(GOOD, text=f"{GOOD.text} {text}"))), found


def test_other_faults_are_seen() -> None:
    kernel = quantizers(QuantSpec("mxfp4"), "bf16")[0]
    assert "spilled" in faults(kernel, replace(GOOD, local=8))[0]
    assert faults(kernel, replace(GOOD, path=Counter({"FFMA": 1}))) == ["a product and a sum were contracted"]
    assert faults(kernel, replace(GOOD, text="")) == ["no access of 128 bits"]
    amd = replace(GOOD, target="gfx942", text="global_load_dwordx4 v[0:3] global_store_byte v1")
    assert faults(kernel, amd) == ["accesses of less than 128 bits: store 8"]
    before = {"instructions_per_element": 10.0, "alu_per_element": 5.0, "registers": 30, "fused": 4}
    assert not grown(before | {"registers": 33}, before)
    more = {"instructions_per_element": 11.1, "alu_per_element": 5.6, "registers": 34, "fused": 5}
    assert len(grown(more, before)) == 4


def test_the_shortest_path() -> None:
    """A slow path behind a branch is left out, a loop is run once, a predicated exit does not end the way."""
    listing = """
        /*0000*/                   LDG.E.128 R4, [R2] ;
        /*0010*/               @P0 EXIT ;
        /*0020*/               @P1 BRA `(.L_x_1) ;
        /*0030*/                   MUFU.RCP R1, R2 ;
        /*0040*/                   MUFU.RCP R1, R2 ;
.L_x_1:
        /*0050*/                   FMUL R1, R1, R2 ;
        /*0060*/              @!P2 BRA `(.L_x_1) ;
        /*0070*/                   STG.E.128 [R2], R4 ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2) ;
        /*00a0*/                   NOP ;
"""
    assert shortest_path(listing) == Counter(["LDG", "EXIT", "BRA", "FMUL", "BRA", "STG", "EXIT"])


def test_a_loop_left_by_a_call() -> None:
    """ptxas ends a loop with a predicated CALL to a label, and puts slow paths into functions behind a branch."""
    listing = """
.L_x_2:
        /*0000*/                   FMUL R1, R1, R2 ;
        /*0010*/              @!P3 CALL.REL.NOINC `(.L_x_1) ;
        /*0020*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0030*/               @P2 BRA `(.L_x_5) ;
        /*0040*/                   CALL.REL.NOINC `($slow) ;
.L_x_5:
        /*0050*/                   EXIT ;
$slow:
        /*0060*/                   RET.REL.NODEC R2 `(_kernel) ;
"""
    assert shortest_path(listing) == Counter(["FMUL", "CALL", "BRA", "EXIT"])
    with pytest.raises(ValueError, match="no way leads"):
        shortest_path(listing.replace("CALL.REL.NOINC `(.L_x_1)", "CALL.REL.NOINC `($slow)"))


def test_which_formats_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(supports(QuantSpec(fmt, rotation=rotation)) for fmt in FORMATS for rotation in (None, "hadamard"))
    assert not supports(QuantSpec("mxfp4", macro_block=128))
    assert not supports(QuantSpec("nvfp4", residual=0.5, rotation="hadamard"))
    small = BlockFormat("test_gpu_block_4", E2M1, 4, "e8m0", False, ("floor",))
    wide = BlockFormat("test_gpu_emin", replace(E2M1, emin=2, max=24.0), 32, "e8m0", False, ("floor",))
    low = BlockFormat("test_gpu_low", ElementFormat("e1m2", 4, 1, 2, 0, 1.75), 16, "e4m3", True, ("two_level",))
    for fmt in (small, wide, replace(small, name="test_gpu_6_bits", element=E3M2, block_size=8), low):
        monkeypatch.setitem(formats._TABLE, fmt.name, fmt)
        assert not supports(QuantSpec(fmt.name))


def test_a_launch_needs_no_gpu_at_import() -> None:
    import subprocess

    code = "import sys, torch, qnoise.kernels.gpu.fake_quantize\nprint(torch.cuda.is_initialized())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
    assert not torch.cuda.is_initialized()
