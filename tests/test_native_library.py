"""The compiled CPU path is built once, kept safely, and turned off where it is not the reference's."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import stat
import threading

import pytest
import torch

from qnoise.formats import FORMATS
from qnoise.kernels import compiler, native

COMPILER = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
pytestmark = pytest.mark.skipif(not COMPILER, reason="no C compiler is installed")

SOURCE = native._SOURCE.read_text()

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
    monkeypatch.setattr(compiler, "_built", lambda *_: pytest.fail("compiled a second time"))
    native._open()


def test_another_source_compiler_or_processor_is_another_library(stub, monkeypatch):
    native._open()
    native._SOURCE.write_text(STUB + "int more;\n")
    native._open()
    assert len(list(stub.iterdir())) == 2
    monkeypatch.setattr(compiler, "_processor", lambda: "another")
    native._open()
    assert len(list(stub.iterdir())) == 3
    monkeypatch.setattr(compiler, "_FLAGS", (*compiler._FLAGS, "-DX"))
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
    assert compiler._cache_directory() == stub
    spoil(stub)
    assert compiler._cache_directory() is None
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
    assert compiler._cache_directory() is None


def test_a_sticky_parent_is_safe_enough(stub, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o1777)
    assert compiler._cache_directory() == stub


def test_never_in_the_working_directory(stub, tmp_path, monkeypatch):
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    for relative in ("", "cache", "./cache", "."):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert compiler._cache_directory() == home / ".cache" / "qnoise" / "native"
    monkeypatch.setenv("HOME", "home")
    assert compiler._cache_directory() is None
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
    monkeypatch.setattr(compiler, "_FLAGS", ("-O0", "-ffp-contract=off", "-fPIC", "-shared", "-pthread"))
    monkeypatch.setattr(compiler, "_TUNINGS", ((),))
    native._SOURCE.write_text(SOURCE.replace(right, wrong))
    state = native._find()
    assert state.library is None
    assert "differs from the reference in" in state.status


def test_the_source_as_it_is_passes_that_check(stub, monkeypatch):
    monkeypatch.setattr(compiler, "_FLAGS", ("-O0", "-ffp-contract=off", "-fPIC", "-shared", "-pthread"))
    monkeypatch.setattr(compiler, "_TUNINGS", ((),))
    native._SOURCE.write_text(SOURCE)
    assert native._find().library is not None
    assert set(FORMATS) >= {"mxfp4", "nvfp4"}
