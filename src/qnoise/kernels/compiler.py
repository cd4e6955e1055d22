"""C source made into a library by the machine's own compiler, once, and kept where nobody else can write.

It runs ``$CC``, ``cc``, ``gcc`` or ``clang``. The library is kept in ``$XDG_CACHE_HOME/qnoise/native`` or
``~/.cache/qnoise/native``, a directory of mode 0700. It is used only if it belongs to this user and neither it nor a
directory above it can be written by others; otherwise the library is built in a private temporary directory, for this
process alone. The file name holds a hash of source, flags, compiler and processor, and the hash of the file itself, so
that a library for another machine or a damaged one is not loaded. It appears by one rename.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

_FLAGS = (
    "-std=gnu11", "-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-ffp-contract=off", "-fno-fast-math",
    "-fno-strict-aliasing", "-fvisibility=hidden", "-fPIC", "-shared", "-pthread",
)  # fmt: skip
# The processor's own instructions and torch's own threads, where the compiler knows how to ask for them.
_PROCESSORS = (("-march=native",), ("-mcpu=native",), ())
_TUNINGS = tuple((*processor, *threads) for threads in (("-fopenmp",), ()) for processor in _PROCESSORS)


def compiled(file: Path, bind: Callable[[Path], ctypes.CDLL]) -> tuple[ctypes.CDLL, str]:
    """A library and how it was made: from the cache, or built now by the first compiler that can.

    Args:
        file: the C source, all in one file.
        bind: loads the library of a path and declares its functions.

    Raises:
        OSError: there is no compiler, or none of them built a library that loads.
    """
    source = file.read_bytes()
    directory = _cache_directory()
    failures: list[str] = []
    for compiler in _compilers():
        try:
            version = _run([*compiler, "--version"]).splitlines()[0].strip()
        except (OSError, IndexError) as error:
            failures.append(str(error))
            continue
        for tuning in _TUNINGS:
            flags = [*_FLAGS, *tuning]
            parts = (source, *(part.encode() for part in (*compiler, *flags, version, _processor())))
            key = hashlib.blake2b(b"\0".join(parts), digest_size=12).hexdigest()
            label = f"compiled by {version}, {' '.join(tuning) or 'portable code'}"
            # A library that cannot be kept, or not be run from where it is kept, serves this process alone.
            for place in dict.fromkeys((directory, None)):
                try:
                    command = [*compiler, *flags, str(file)]
                    return _cached(place, key, bind) or _built(place, key, command, bind), label
                except OSError as error:
                    failures.append(str(error))
    raise OSError("; ".join(dict.fromkeys(failures)) or "no C compiler found ($CC, cc, gcc, clang)")


def _compilers() -> Iterator[list[str]]:
    """Commands that may compile C: $CC (it alone, if set), or what is installed."""
    chosen = shlex.split(os.environ.get("CC", ""))
    if chosen:
        yield chosen
        return
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            yield [path]


def _run(command: list[str]) -> str:
    """What a command prints.

    Raises:
        OSError: it is missing, fails, or takes more than two minutes; the text holds its last words.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, errors="replace")
    except subprocess.TimeoutExpired:
        raise OSError(f"{command[0]} did not finish within two minutes") from None
    if done.returncode:
        words = " ".join(done.stderr.split())
        raise OSError(f"{command[0]} failed with exit code {done.returncode}: {words[:300]}")
    return done.stdout


def _processor() -> str:
    """What -march=native depends on."""
    text = f"{platform.system()} {platform.machine()}"
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            wanted = ("model name", "flags", "Features", "CPU part", "CPU implementer")
            first = file.read().split("\n\n")[0].splitlines()
            return "\n".join([text, *(line for line in first if line.startswith(wanted))])
    except OSError:
        return f"{text} {platform.processor()}"


def _cache_directory() -> Path | None:
    """The user's own directory for compiled code, made if need be; None where there is no safe one."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG rules: a relative path is ignored
        base = os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(base):
        return None
    directory = Path(os.path.realpath(base), "qnoise", "native")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
        return directory if _is_private(directory) and os.access(directory, os.W_OK) else None
    except OSError:
        return None


def _is_private(directory: Path) -> bool:
    """True if nobody but this user and root can put a file there, or another directory in its place."""
    own = directory.lstat()
    if not stat.S_ISDIR(own.st_mode) or own.st_uid != os.geteuid() or own.st_mode & 0o022:
        return False
    for parent in directory.parents:
        above = parent.lstat()
        # In a sticky directory (/tmp) others cannot rename what is not theirs.
        writable = above.st_mode & 0o022 and not above.st_mode & stat.S_ISVTX
        if stat.S_ISLNK(above.st_mode) or above.st_uid not in (0, os.geteuid()) or writable:
            return False
    return True


def _cached(directory: Path | None, key: str, bind: Callable[[Path], ctypes.CDLL]) -> ctypes.CDLL | None:
    """A library built earlier. A file that is not what its name says, or does not load, is removed."""
    if directory is None:
        return None
    for path in sorted(directory.glob(f"{key}-*.so")):
        try:
            info = path.lstat()
            own = stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid() and not info.st_mode & 0o022
            # A truncated library can end the process that opens it, so its hash is compared first.
            if own and path.stem == f"{key}-{_digest(path)}":
                return bind(path)
        except OSError:
            pass
        path.unlink(missing_ok=True)
    return None


def _built(directory: Path | None, key: str, command: list[str], bind: Callable[[Path], ctypes.CDLL]) -> ctypes.CDLL:
    """Compile, give the file its name by one rename, load it."""
    with tempfile.TemporaryDirectory(prefix="qnoise-", dir=directory) as name:
        made = Path(name, "native.so")
        _run([*command, "-o", str(made)])
        if directory is None:
            return bind(made)  # the mapping outlives the file
        made.chmod(0o600)
        path = directory / f"{key}-{_digest(made)}.so"
        made.replace(path)
        return bind(path)


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=12).hexdigest()
