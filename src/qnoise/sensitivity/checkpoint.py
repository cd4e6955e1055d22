"""Safetensors files read one chunk at a time, and nothing believed that a file says of itself.

The format (github.com/huggingface/safetensors, "Format"): 8 bytes little-endian length of the header, the header as
JSON (tensor name -> dtype, shape, data_offsets), then the data. A checkpoint may come from anybody. So the header is
bounded and checked against the size of the file before anything is read by it, a shard index can name only files that
lie in the checkpoint's own folder (or, as the hub's cache does it, in the `blobs` beside it), and data is read in
chunks, so that no size a header claims is ever allocated.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qnoise.sensitivity.figures import chunk_places, row_chunks
from qnoise.sensitivity.rows import Finding

MAX_HEADER = 16 << 20
MAX_INDEX = 64 << 20
INDEX_NAME = "model.safetensors.index.json"

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint, not read yet.

    Attributes:
        name: as stored.
        file: the file that holds it.
        dtype: safetensors' name of it, such as "BF16".
        shape: its shape.
        start: offset of its data in the file, in bytes.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None for what is no plain floating-point dtype."""
        return _FLOATS.get(self.dtype)

    def chunks(self) -> Iterator[Tensor]:
        """The matrix (shape flattened to two dimensions) in chunks; each is valid until the next is taken.

        Raises:
            ValueError: the file ends early, or the dtype is no floating-point one.
        """
        dtype = self.torch_dtype
        if dtype is None:
            raise ValueError(f"{self.file}: tensor {self.name!r} is stored as {self.dtype}, not as floating point")
        width = self.shape[-1] if self.shape else 1
        rows = math.prod(self.shape) // width if width else 0
        buffer = bytearray()
        with self.file.open("rb") as file:
            file.seek(self.start)
            for down, across in chunk_places(rows, width):
                shape = down.stop - down.start, across.stop - across.start
                size = shape[0] * shape[1] * dtype.itemsize
                if len(buffer) < size:
                    buffer = bytearray(size)
                view = memoryview(buffer)[:size]
                if file.readinto(view) != size:
                    raise ValueError(f"{self.file}: the file ends inside tensor {self.name!r}")
                yield torch.frombuffer(view, dtype=dtype).view(shape)

    def transposed_chunks(self) -> Iterator[Tensor]:
        """Each of the matrices of a three-dimensional tensor transposed, in chunks of rows. One matrix is in memory.

        Raises:
            ValueError: as for `chunks`.
        """
        count, rows, width = self.shape
        for index in range(count):
            start = self.start + index * rows * width * (self.torch_dtype or torch.float32).itemsize
            matrix = torch.empty(rows, width, dtype=self.torch_dtype)
            # A matrix is no longer than the file says it has: `_checked`.
            one = replace(self, shape=(rows, width), start=start)
            for (down, across), chunk in zip(chunk_places(rows, width), one.chunks(), strict=True):
                matrix[down, across] = chunk
            yield from row_chunks(matrix.T.contiguous())


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint in the order of their names, and what is wrong with it."""

    path: Path
    tensors: tuple[StoredTensor, ...]
    findings: tuple[Finding, ...]

    def fingerprint(self) -> str:
        """A hash of names, shapes, places, file sizes and times: another one means another checkpoint."""
        digest = hashlib.blake2b(digest_size=16)
        files = {}
        for tensor in self.tensors:
            if tensor.file not in files:
                status = tensor.file.stat()
                files[tensor.file] = (status.st_size, status.st_mtime_ns)
            digest.update(repr((tensor.name, tensor.dtype, tensor.shape, tensor.start, files[tensor.file])).encode())
        return digest.hexdigest()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The tensors of a safetensors file, of a directory of them, or of a shard index.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: no safetensors there; a header or index that contradicts itself, the file, or the folder.
    """
    if sys.byteorder != "little":
        raise ValueError("safetensors are little-endian and this machine is not; scan a loaded model instead")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist. scan takes a model, a safetensors file, a directory of them or a shard index; a "
            "model on a hub has to be downloaded first (huggingface_hub.snapshot_download)"
        )
    if path.is_file():
        if path.name.endswith(".index.json"):
            return _open_index(path)
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is no safetensors file; pickled checkpoints are never loaded: convert it first")
        return Checkpoint(path, tuple(_read_header(path)), ())
    if not path.is_dir():
        raise ValueError(f"{path} is neither a file nor a directory")
    if (path / INDEX_NAME).is_file():
        return _open_index(path / INDEX_NAME)
    files = sorted(path.glob("*.safetensors"))
    if (path / "model.safetensors") in files:
        files = [path / "model.safetensors"]
    if not files:
        held = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{path} holds no *.safetensors file and no {INDEX_NAME} (it holds: {held}). Pickled checkpoints are never "
            "loaded: convert them first"
        )
    found: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in _read_header(_inside(path, file.name, file)):
            if tensor.name in found:
                raise ValueError(f"{file}: tensor {tensor.name!r} is in {found[tensor.name].file.name} too")
            found[tensor.name] = tensor
    return Checkpoint(path, tuple(found[name] for name in sorted(found)), ())


def _open_index(path: Path) -> Checkpoint:
    index = _json(_read_bounded(path, MAX_INDEX), path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and isinstance(file, str) for name, file in weight_map.items()
    ):
        raise ValueError(f"{path}: weight_map must map tensor names to file names")
    findings, tensors = [], []
    by_file: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        by_file.setdefault(file, []).append(name)
    for file, names in sorted(by_file.items()):
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise ValueError(
                f"{path}: weight_map puts {names[0]!r} into {file!r}, which is no name of a safetensors file in the "
                "index's own folder"
            )
        shard = path.parent / file
        if not shard.exists():
            what = f"missing: it should hold {len(names)} tensors ({names[0]}{', ...' if len(names) > 1 else ''})"
            findings.append(Finding(file, what, serious=True))
            continue
        held = {tensor.name: tensor for tensor in _read_header(_inside(path.parent, file, path))}
        for name in names:
            if name in held:
                tensors.append(held[name])
            else:
                findings.append(Finding(name, f"not in {file}, where the index puts it", serious=True))
        if unlisted := sorted(held.keys() - set(names)):
            findings.append(Finding(file, f"holds {len(unlisted)} tensors the index does not put there; not scanned"))
    return Checkpoint(path.parent, tuple(sorted(tensors, key=lambda t: t.name)), tuple(findings))


def _inside(folder: Path, name: str, asked_by: Path) -> Path:
    """`folder / name`, if what it leads to is a file there, or among the blobs of the hub's cache."""
    real, root = (folder / name).resolve(), folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise ValueError(f"{asked_by}: {name!r} leads out of the checkpoint's folder, to {real}; copy the file there")
    return folder / name


def _read_header(path: Path) -> list[StoredTensor]:
    """Every tensor the header lists, checked against the file."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is no regular file")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise ValueError(f"{path} is no safetensors file: it has {size} bytes and claims a header of {length}")
        if length > MAX_HEADER:
            raise ValueError(f"{path}: its header of {length} bytes is longer than {MAX_HEADER}")
        header = _json(file.read(length), path)
    if not isinstance(header, dict):
        raise ValueError(f"{path}: its header is no JSON object")
    data = size - 8 - length
    tensors, places = [], []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if any("\ud800" <= c <= "\udfff" for c in name):
            raise ValueError(f"{path}: tensor name {name!r} is no valid Unicode")
        start, end, dtype, shape = _checked(path, name, entry, data)
        places.append((start, end, name))
        tensors.append(StoredTensor(name, path, dtype, shape, 8 + length + start))
    reached, previous = 0, ""
    for start, end, name in sorted(places):
        if start < reached:
            raise ValueError(f"{path}: tensors {previous!r} and {name!r} overlap")
        reached, previous = end, name
    return tensors


def _checked(path: Path, name: str, entry: Any, data: int) -> tuple[int, int, str, tuple[int, ...]]:
    """data_offsets, dtype and shape of an entry of a header."""

    def whole(values: Any) -> bool:
        return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in values)

    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or not whole(entry.get("shape")) or not whole(entry.get("data_offsets")):
        raise ValueError(f"{where} has no shape and data_offsets of whole numbers")
    offsets, shape, dtype = entry["data_offsets"], tuple(entry["shape"]), entry.get("dtype")
    if len(offsets) != 2 or not offsets[0] <= offsets[1] <= data:
        raise ValueError(f"{where} claims the bytes {offsets} of {data} that the file has; it is cut off or damaged")
    if len(shape) > 16 or not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{where} has dtype {dtype!r} and {len(shape)} dimensions; known are {', '.join(_BITS)}")
    if math.prod(shape) * _BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise ValueError(
            f"{where} of {dtype} and shape {list(shape)} does not fill the {offsets[1] - offsets[0]} bytes it claims"
        )
    return offsets[0], offsets[1], dtype, shape


def _read_bounded(path: Path, limit: int) -> bytes:
    if not stat.S_ISREG(path.stat().st_mode) or path.stat().st_size > limit:
        raise ValueError(f"{path} is no regular file of at most {limit} bytes")
    return path.read_bytes()


def _json(text: bytes, path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its JSON cannot be read: {error}") from None
