"""Tensors derived from a weight, kept as long as the weight stays what it was.

The cache belongs to the parameter, not to the module: tied blocks are distinct modules with one parameter. An entry is
served while the parameter's storage, version counter, dtype and layout are those it was computed from. Writes
that torch cannot see (`w.data.add_()`, as PEFT merges) leave all of these alone. Two checks are there for them:
`touch`, called when the weight is handed out and may be written to, has the next look-up compare a fingerprint of all
its bits; `check_sample`, called on `train()` and `eval()`, compares a few hundred of its elements.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class _Entry:
    """What is known of one parameter. `serial` rises whenever the parameter was found changed."""

    __slots__ = (
        "dtype", "fingerprint", "owner", "pointer", "sample", "serial", "shape", "storage", "storage_id", "stride",
        "suspect", "valid", "values", "version",
    )  # fmt: skip

    def __init__(self, weight: Tensor) -> None:
        number = id(weight)
        # An id is given to another object once its owner is dead, and then nothing of it may be left here.
        self.owner = weakref.ref(weight, lambda _: _ENTRIES.pop(number, None))
        self.valid = False
        self.sample: Tensor | None = None
        self.fingerprint: tuple[Tensor, Tensor] | None = None
        self.suspect = False
        self.serial = 0
        self.values: dict[Hashable, tuple[Hashable, Tensor]] = {}

    def describes(self, weight: Tensor) -> bool:
        """Whether the weight is, as far as torch tells, what it was."""
        return (
            self.valid
            and self.version == weight._version
            and self.pointer == weight.data_ptr()
            and self.storage_id == weight.untyped_storage()._cdata
            and self.dtype is weight.dtype
            and self.shape == weight.shape
            and self.stride == weight.stride()
        )

    def describe(self, weight: Tensor) -> None:
        """Take the weight as it is now, and forget what was derived from it."""
        storage = weight.untyped_storage()
        # The weak reference keeps the address of the storage from being given to another one.
        self.storage, self.storage_id = StorageWeakRef(storage), storage._cdata
        self.version, self.pointer, self.dtype = weight._version, weight.data_ptr(), weight.dtype
        self.shape, self.stride = weight.shape, weight.stride()
        self.sample = self.fingerprint = None
        self.values.clear()
        self.serial += 1
        self.valid = True


_ENTRIES: dict[int, _Entry] = {}


def cacheable(weight: Tensor) -> bool:
    """Whether torch tells of writes to this tensor, and it is an ordinary one with memory of its own.

    Not while a compiler or a function transform traces: what it sees are stand-ins.
    """
    return (
        not torch.compiler.is_compiling()
        and type(weight) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(weight)
        and not weight.is_inference()
        and weight.device.type != "meta"
        and weight.layout == torch.strided
    )


def derived(weight: Tensor, slot: Hashable, key: Hashable, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """`compute(weight)`, or its kept result if neither the weight nor `key` has changed since.

    One result is kept per slot. It is computed outside inference mode and without grad, so that it can be saved for a
    later backward whoever asked for it first. A weight that is not `cacheable` is computed each time.
    """
    entry = _fresh_entry(weight)
    if entry is None:
        with torch.no_grad():
            return compute(weight)
    kept = entry.values.get(slot)
    if kept is None or kept[0] != key:
        with torch.inference_mode(False), torch.no_grad():
            kept = (key, compute(weight))
            if entry.sample is None:
                entry.sample = _sample(weight)
        entry.values[slot] = kept
    return kept[1]


def serial(weight: Tensor) -> int | None:
    """A number that changes when the weight does; a key for what depends on several weights.

    None for a weight that is not `cacheable`.
    """
    entry = _fresh_entry(weight)
    return None if entry is None else entry.serial


def touch(weight: Tensor) -> None:
    """The weight is being handed out, and may be written to unseen: compare all its bits at the next look-up."""
    entry = _entry(weight)
    if entry is None or entry.suspect or not entry.values or not entry.describes(weight):
        return
    if entry.fingerprint is None:
        entry.fingerprint = fingerprint(weight)
    entry.suspect = True


def check_sample(weight: Tensor) -> None:
    """Forget what was derived from the weight if a few hundred of its elements are not what they were then."""
    entry = _entry(weight)
    if entry is None or entry.sample is None or not entry.describes(weight):
        return
    if not torch.equal(_bits(_sample(weight)), _bits(entry.sample)):
        entry.valid = False


def forget(weight: Tensor) -> None:
    """Drop whatever was derived from the weight."""
    entry = _entry(weight)
    if entry is not None:
        entry.valid = False
        entry.values.clear()


def cached_nbytes(weight: Tensor) -> int:
    """Bytes held by results of the weight's own size derived from it."""
    entry = _entry(weight)
    values = entry.values.values() if entry is not None else ()
    return sum(value.nbytes for _, value in values if value.shape == weight.shape)


@torch.no_grad()
def fingerprint(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Hashes of all its bits by row and by column: one of the whole does not see rows or columns change places."""
    # uint64 of torch's own making cannot be pickled by it everywhere.
    return torch.hash_tensor(weight, dim=1).view(torch.int64), torch.hash_tensor(weight, dim=0).view(torch.int64)


def same_bits(weight: Tensor, taken: tuple[Tensor, Tensor]) -> bool:
    """Whether the weight has the bits it had when that fingerprint was taken, on whatever device."""
    return all(torch.equal(a, b.to(a.device)) for a, b in zip(fingerprint(weight), taken, strict=True))


def _entry(weight: Tensor) -> _Entry | None:
    entry = _ENTRIES.get(id(weight))
    return entry if entry is not None and entry.owner() is weight else None


def _fresh_entry(weight: Tensor) -> _Entry | None:
    """The entry of the weight, true to what it is now; None if it is not `cacheable`."""
    entry = _ENTRIES.get(id(weight))
    if entry is None or entry.owner() is not weight:
        if not cacheable(weight):
            return None
        entry = _ENTRIES[id(weight)] = _Entry(weight)
    if not entry.describes(weight):
        # Its memory may have become of another kind.
        if not cacheable(weight):
            return None
        entry.describe(weight)
    elif entry.suspect and not (entry.fingerprint and same_bits(weight, entry.fingerprint)):
        entry.describe(weight)
    entry.suspect = False
    return entry


def _bits(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _sample(weight: Tensor) -> Tensor:
    return weight.detach()[tuple(slice(None, None, max(1, size // 16)) for size in weight.shape)].clone()
