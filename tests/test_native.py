"""The compiled CPU path gives the bits of the reference, and is built, kept and loaded safely."""

from __future__ import annotations

import io
import lzma
import multiprocessing
import os
import shutil
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import fuzz
from qnoise import formats, reference
from qnoise.formats import E2M1, E3M2, E4M3, FORMATS, INT8, MX_SCALE_MODES, NV_SCALE_MODES, BlockFormat, QuantSpec
from qnoise.kernels import native

COMPILER = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
pytestmark = pytest.mark.skipif(not COMPILER, reason="no C compiler is installed")

NEAREST = [spec for spec in fuzz.PLAIN if spec.rounding == "nearest"]
SOURCE = native._SOURCE.read_text()


def name(spec):
    return f"{spec.fmt}-{spec.scale_mode}"


def differences(x, spec, amax=None, seed=(5, 2**63 + 11)):
    return [what for what, *_ in fuzz.mismatches(x, spec, amax, seed)]


def test_it_is_active_where_there_is_a_compiler():
    assert native.available(), native.status()
    assert native.status().startswith("on: ")


def test_modes_of_the_first_caller_do_not_matter(monkeypatch):
    monkeypatch.setattr(native, "_state", None)
    with torch.device("meta"), torch.inference_mode(), FakeTensorMode():
        assert native.available(), native.status()


# ---- bits ----


@pytest.mark.parametrize("lap", range(8))
def test_bit_patterns(lap):
    """Each lap is one dtype and one kind of input, for every format, scale mode and rounding."""
    found = fuzz.fuzz(first=lap * len(fuzz.SPECS), rounds=len(fuzz.SPECS), elements=1 << 10)
    assert found["values"] > 90_000
    assert not found["differences"], "\n".join(found["reports"])


@pytest.mark.slow
def test_many_more_bit_patterns():
    found = fuzz.fuzz(values=2e7, seed=1)
    assert not found["differences"], "\n".join(found["reports"])


@pytest.mark.parametrize("spec", NEAREST, ids=name)
def test_every_bf16_number(spec):
    """All 65,536 patterns, beside their neighbours and beside numbers of other binades."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    finite = patterns[(patterns & 0x7F80) != 0x7F80]
    mixed = (finite * 48271 + finite.numel() // 2) % finite.numel()
    narrow = finite[(torch.arange(finite.numel()) % 32) * (finite.numel() // 32) + torch.arange(finite.numel()) // 32]
    for x in (patterns.view(256, 256), finite[mixed].view(255, 256), narrow.view(255, 256)):
        assert not differences(x.to(torch.int16).view(torch.bfloat16), spec)


def test_golden_inputs():
    archive = Path(__file__).parent / "golden" / "golden.npz.xz"
    with np.load(io.BytesIO(lzma.decompress(archive.read_bytes()))) as arrays:
        inputs = [torch.from_numpy(arrays[key]) for key in arrays.files if key.startswith("x/")]
    assert len(inputs) > 20
    for spec in NEAREST:
        for x in inputs:
            rows = x.reshape(-1, x.shape[-1])
            assert not differences(rows, spec), (spec, x.shape)


def test_errors_are_summed_by_halves():
    """Blocks in which two scales have errors so close that another order of the sum decides otherwise in some."""
    x = torch.rand(1 << 14, 32, generator=torch.Generator().manual_seed(0)) * 0.25
    x[:, 0], x[:, 1], x[:, 5], x[:, 20] = 4, 3.5, 0.25 + 2.0**-23, 0.25 + 2.0**-24
    assert not differences(x, QuantSpec("mxfp4", "mse"))


@pytest.mark.parametrize(
    "block",
    [
        BlockFormat("wide_e2m1", E2M1, 128, "e8m0", False, MX_SCALE_MODES),
        BlockFormat("short_e3m2", E3M2, 4, "e8m0", False, MX_SCALE_MODES),
        BlockFormat("short_int8", INT8, 8, "e8m0", False, MX_SCALE_MODES),
        BlockFormat("nv_e4m3", E4M3, 32, "e4m3", True, NV_SCALE_MODES),
        BlockFormat("nv_int8", INT8, 64, "e4m3", True, NV_SCALE_MODES),
        BlockFormat(
            "int4", formats.ElementFormat("int4", 4, 0, 2, emin=0, max=1.75), 32, "e8m0", False, MX_SCALE_MODES
        ),
    ],
    ids=lambda block: block.name,
)
def test_formats_of_a_user(block, monkeypatch):
    monkeypatch.setitem(formats._TABLE, block.name, block)
    specs = [QuantSpec(block.name, mode, rounding) for mode in block.scale_modes for rounding in formats.ROUNDINGS]
    macro = None if block.per_tensor_scale else 128
    specs += [QuantSpec(block.name, rotation="hadamard"), QuantSpec(block.name, macro_block=macro, residual=0.5)]
    for spec in specs:
        for kind in fuzz.INPUTS:
            x = fuzz.inputs(kind, 9, 3 * block.block_size + 5, torch.Generator().manual_seed(1))
            for dtype in fuzz.DTYPES:
                assert native.supports(spec, dtype)
                assert not differences(x.to(dtype), spec), (spec, kind, dtype)


@pytest.mark.parametrize("size", [4, 8, 64, 128, 256])
def test_rotations_and_macro_blocks_of_other_sizes(size, monkeypatch):
    """Tiles in fp32 hold fewer blocks the longer these are; rows of several tiles, with and without a tail."""
    block = BlockFormat(f"size_{size}", E2M1, size, "e8m0", False, MX_SCALE_MODES)
    monkeypatch.setitem(formats._TABLE, block.name, block)
    for columns in (9000, 8192):
        x = fuzz.inputs("normal", 2, columns, torch.Generator().manual_seed(1)).bfloat16()
        assert not differences(x, QuantSpec(block.name, "even", rotation="hadamard"))
        if size <= 128:
            assert not differences(x, QuantSpec(block.name, "mse", "stochastic", 128, 0.5, "hadamard"))


def test_what_it_leaves_to_others(monkeypatch):
    long = BlockFormat("long", E2M1, 512, "e8m0", False, MX_SCALE_MODES)
    far = BlockFormat("far", formats.ElementFormat("far", 8, 7, 0, -62, 2.0**63), 32, "e8m0", False, ("floor",))
    for block in (long, far):
        monkeypatch.setitem(formats._TABLE, block.name, block)
        assert not native.supports(QuantSpec(block.name), torch.float32)
    for dtype in (torch.float16, torch.float64, torch.int8):
        assert not native.supports(QuantSpec(), dtype)


@pytest.mark.parametrize("shape", [(301, 96), (301, 100), (1, 30_007)], ids=str)
def test_threads_do_not_change_a_bit(shape, monkeypatch):
    monkeypatch.setattr(native, "_ELEMENTS_PER_THREAD", 1000)
    x = fuzz.inputs("binades", *shape, torch.Generator().manual_seed(4))
    amax = torch.where(x.isfinite(), x, 0).abs().amax(-1, keepdim=True)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert native._threads(x) == threads
            for spec, given in (
                (QuantSpec("mxfp4", rounding="stochastic"), None),
                (QuantSpec("nvfp4"), amax),
                (QuantSpec("mxfp4", "even", "stochastic", 128, 0.5, "hadamard"), None),
                (QuantSpec("nvfp4", rotation="hadamard"), amax),
            ):
                assert not differences(x, spec, given)
            assert torch.equal(native.amax_rows(x), amax[:, 0])
            assert torch.equal(native.tensor_amax(x), amax.max())
    finally:
        torch.set_num_threads(before)
    assert native._threads(torch.empty(999)) == 1


@pytest.mark.parametrize("dtype", fuzz.DTYPES)
def test_maximum_over_finite_values(dtype):
    x = torch.tensor([[1.0, -3.0, torch.nan], [torch.inf, 2.0**-140, -torch.inf], [torch.nan] * 3, [0.0, -0.0, 0.0]])
    x = x.to(dtype)
    want = torch.tensor([3.0, 2.0**-140, 0.0, 0.0]).to(dtype).float()
    assert torch.equal(native.amax_rows(x), want)
    assert native.tensor_amax(x).item() == 3
    assert native.tensor_amax(torch.empty(0, 7, dtype=dtype)).item() == 0
    assert native.tensor_amax(x[0, 1]).item() == 3


def test_written_in_place_or_over_part_of_the_input():
    spec = QuantSpec("nvfp4", "four_over_six")
    divisor = torch.tensor(300.0)
    for dtype in fuzz.DTYPES:
        memory = torch.randn(40 * 70 + 3, generator=torch.Generator().manual_seed(0)).to(dtype)
        x = memory[: 40 * 70].view(40, 70)
        want = torch.empty_like(x)
        native.fake_quantize_rows(x, spec, divisor, None, want)
        for shift in (0, 1, 3):  # odd shifts are aligned to two or four bytes only
            again = memory.clone()
            out = again[shift : shift + 40 * 70].view(40, 70)
            native.fake_quantize_rows(again[: 40 * 70].view(40, 70), spec, divisor, None, out)
            assert torch.equal(out, want)


def test_subnormals_are_kept_in_a_thread_that_flushes_them():
    spec = QuantSpec("mxfp8_e5m2")
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 2.0**-130
    want, out = reference.fake_quantize(x, spec), torch.empty_like(x)
    assert (want != 0).any()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        native.fake_quantize_rows(x, spec, None, None, out)
        assert not (x * 1).abs().view(torch.int32).any()  # the mode of the thread is as it was
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(out, want)


def test_operands_that_do_not_fit_are_named():
    x, spec = torch.zeros(4, 64), QuantSpec("nvfp4")
    codes, scales = torch.zeros(4, 32, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.uint8)
    bad = [
        (lambda: native.fake_quantize_rows(x.half(), spec, None, None, x.half()), "x must be"),
        (lambda: native.fake_quantize_rows(x.t(), spec, None, None, x.t()), "not contiguous"),
        (lambda: native.fake_quantize_rows(x, spec, None, None, x.bfloat16()), "out must be"),
        (lambda: native.fake_quantize_rows(x, spec, torch.ones(3), None, x), "divisor must be"),
        (lambda: native.fake_quantize_rows(x, spec, torch.ones(4).double(), None, x), "divisor must be"),
        (lambda: native.fake_quantize_rows(x, QuantSpec("mxfp4", rounding="stochastic"), None, None, x), "seed"),
        (lambda: native.quantize_rows(x, spec, None, None, codes[:, :-1], scales), "codes must be"),
        (lambda: native.quantize_rows(x, spec, None, None, codes, scales[:3]), "scales must be"),
        (lambda: native.dequantize_rows(codes, scales.float(), None, spec, x), "scales must be"),
        (lambda: native.dequantize_rows(codes, scales, None, spec, x.double()), "out must be"),
        (lambda: native.amax_rows(x[0]), "amax_rows takes"),
    ]
    for call, words in bad:
        with pytest.raises(ValueError, match=words):
            call()


# ---- building, keeping, loading ----

STUB = """
#pragma GCC visibility push(default)
void qnoise_fake_quantize(void) {}
void qnoise_quantize(void) {}
void qnoise_dequantize(void) {}
void qnoise_amax(void) {}
void qnoise_rotated_tiles(void) {}
void qnoise_rotated_amax(void) {}
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A source that compiles at once, and a cache of its own."""
    source = tmp_path / "stub.c"
    source.write_text(STUB)
    monkeypatch.setattr(native, "_SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("QNOISE_NATIVE", raising=False)
    return tmp_path / "cache" / "qnoise" / "native"


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_built_once_into_a_private_directory(stub, monkeypatch):
    native._open()
    (made,) = stub.iterdir()
    assert made.suffix == ".so"
    assert mode_of(stub) == 0o700
    assert mode_of(made) == 0o600
    monkeypatch.setattr(native, "_built", lambda *_: pytest.fail("compiled a second time"))
    native._open()


def test_another_source_compiler_or_processor_is_another_library(stub, monkeypatch):
    native._open()
    native._SOURCE.write_text(STUB + "int more;\n")
    native._open()
    assert len(list(stub.iterdir())) == 2
    monkeypatch.setattr(native, "_processor", lambda: "another")
    native._open()
    assert len(list(stub.iterdir())) == 3
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-DX"))
    native._open()
    assert len(list(stub.iterdir())) == 4


def test_a_damaged_or_foreign_file_is_not_loaded(stub):
    native._open()
    (made,) = stub.iterdir()
    whole = made.read_bytes()
    loaded = []
    bind, native._bind = native._bind, lambda path: loaded.append(path.read_bytes()) or bind(path)
    try:
        for bad in (whole[:-100], whole[:2000], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
            # A new file each time: the old one is still mapped into this process.
            made.unlink()
            made.write_bytes(bad)
            made.chmod(0o600)
            native._open()
            assert loaded.pop() != bad
            assert not loaded
        (made,) = stub.iterdir()
        made.chmod(0o622)
        native._open()
        assert [mode_of(path) for path in stub.iterdir()] == [0o600]
    finally:
        native._bind = bind


def others_may_write(directory):
    directory.chmod(0o777)


def group_may_write(directory):
    directory.chmod(0o770)


def parent_may_be_written(directory):
    directory.parent.chmod(0o777)


def is_a_link(directory):
    directory.rename(directory.with_name("elsewhere"))
    directory.symlink_to(directory.with_name("elsewhere"))


@pytest.mark.parametrize("spoil", [others_may_write, group_may_write, parent_may_be_written, is_a_link])
def test_a_directory_others_can_write_is_not_used(spoil, stub):
    native._open()
    assert native._cache_directory() == stub
    spoil(stub)
    assert native._cache_directory() is None
    before = {path.name: path.stat().st_mtime_ns for path in stub.iterdir()}
    native._open()  # built for this process alone, somewhere private
    assert {path.name: path.stat().st_mtime_ns for path in stub.iterdir()} == before


def test_a_library_that_does_not_run_where_it_is_kept_is_built_elsewhere(stub, monkeypatch):
    def bind(path):
        if path.is_relative_to(stub):
            raise OSError("failed to map segment: mounted noexec")
        return real(path)

    real = native._bind
    monkeypatch.setattr(native, "_bind", bind)
    assert native._open()[0] is not None


def test_a_directory_of_another_user_is_not_used(stub, monkeypatch):
    native._open()
    monkeypatch.setattr(os, "geteuid", lambda: stub.stat().st_uid + 1)
    assert native._cache_directory() is None


def test_a_sticky_parent_is_safe_enough(stub, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o1777)
    assert native._cache_directory() == stub


def test_never_in_the_working_directory(stub, tmp_path, monkeypatch):
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    for relative in ("", "cache", "./cache", "."):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert native._cache_directory() == home / ".cache" / "qnoise" / "native"
    monkeypatch.setenv("HOME", "home")
    assert native._cache_directory() is None
    native._open()
    assert not list(work.iterdir())


def build_in_a_process(barrier, results):
    barrier.wait(60)
    try:
        native._open()
        results.put("loaded")
    except Exception as error:
        results.put(repr(error))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_processes_at_once(stub):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=build_in_a_process, args=(barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [results.get(timeout=120) for _ in processes] == ["loaded", "loaded"]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert all(path.suffix == ".so" for path in stub.iterdir())


def test_one_build_for_many_threads(monkeypatch):
    calls = []
    monkeypatch.setattr(native, "_state", None)
    monkeypatch.setattr(native, "_find", lambda: calls.append(1) or native._State(None, "off: a test"))
    threads = [threading.Thread(target=native.status) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1]
    assert not native.available()
    with pytest.raises(RuntimeError, match="off: a test"):
        native.tensor_amax(torch.zeros(3))


def script(path, text):
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def test_without_a_compiler_the_reason_is_told(stub, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", str(tmp_path / "missing"))
    assert "missing" in native._find().status
    broken = script(
        tmp_path / "broken", 'test "$1" = --version && echo broken 1.0 && exit\necho no such luck >&2; exit 3'
    )
    monkeypatch.setenv("CC", broken)
    state = native._find()
    assert state.library is None
    assert "exit code 3: no such luck" in state.status
    monkeypatch.setenv("CC", script(tmp_path / "empty", "echo empty 1.0"))  # succeeds and writes nothing
    assert native._find().library is None
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert native._find() == (None, "off: no C compiler found ($CC, cc, gcc, clang)")
    monkeypatch.setenv("QNOISE_NATIVE", "0")
    assert native._find() == (None, "off: QNOISE_NATIVE=0 is set")
    assert not list(stub.iterdir())


def test_flags_a_compiler_does_not_know_are_left_out(stub, tmp_path, monkeypatch):
    text = f'case "$*" in *native\\ *) echo unknown flag >&2; exit 1;; esac\nexec {COMPILER} "$@"'
    monkeypatch.setenv("CC", script(tmp_path / "plain", text))
    assert "native" not in native._open()[1]


def test_a_library_without_the_functions_is_refused(stub):
    native._SOURCE.write_text("int something_else;\n")
    state = native._find()
    assert state.library is None
    assert "no function qnoise_fake_quantize" in state.status


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(127 + 23 - mantissa_bits)", "(127 + 24 - mantissa_bits)"),
        ("open[b] & (sum[b] < best[b])", "open[b] & (sum[b] <= best[b])"),
        ("target[b] * 1.5f", "target[b] * 1.25f"),
        ("E4M3_MSE ? 17 : 2", "E4M3_MSE ? 9 : 2"),
        ("0x7fffu + ((bits >> 16) & 1u)", "0x6fffu"),
        (">= round_up_from", "> round_up_from"),
        ("k0 += 0x9E3779B9u", "k0 += 0x9E3779B7u"),
        ("remainder >= 0.5f", "remainder > 0.5f"),
        ("(is_integer && !(r > 0.0f) ? 0u : sign)", "sign"),
        ("p[1] & 15) << 2", "p[1] & 7) << 2"),
    ],
)
def test_a_wrong_bit_turns_it_off(right, wrong, stub, monkeypatch):
    """The check at load time sees small faults in the source."""
    assert SOURCE.count(right) == 1
    monkeypatch.setattr(native, "_FLAGS", ("-O0", "-ffp-contract=off", "-fPIC", "-shared", "-pthread"))
    monkeypatch.setattr(native, "_TUNINGS", ((),))
    native._SOURCE.write_text(SOURCE.replace(right, wrong))
    state = native._find()
    assert state.library is None
    assert "differs from the reference in" in state.status


def test_the_source_as_it_is_passes_that_check(stub, monkeypatch):
    monkeypatch.setattr(native, "_FLAGS", ("-O0", "-ffp-contract=off", "-fPIC", "-shared", "-pthread"))
    monkeypatch.setattr(native, "_TUNINGS", ((),))
    native._SOURCE.write_text(SOURCE)
    assert native._find().library is not None
    assert set(FORMATS) >= {"mxfp4", "nvfp4"}
