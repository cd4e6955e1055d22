"""Tensors derived from a weight, kept as long as the weight stays what it was.

The cache belongs to the parameter, not to the module: tied blocks are distinct modules with one parameter. An entry is
served while the parameter's storage, version counter, dtype, device and layout are those it was computed from. Writes
that torch cannot see (`w.data.add_()`, as PEFT merges) leave all of these alone. Two checks are there for them:
`touch`, called when the weight is handed out and may be written to, has the next look-up compare a fingerprint of all
its bits; `check_sample`, called on `train()` and `eval()`, compares a few hundred of its elements.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary


class _Entry:
    """What is known of one parameter. `serial` rises whenever the parameter was found changed."""

    def __init__(self) -> None:
        self.signature: tuple[Any, ...] | None = None
        # The weak reference keeps the address of the storage from being given to another one.
        self.storage: StorageWeakRef | None = None
        self.sample: Tensor | None = None
        self.fingerprint: tuple[Tensor, Tensor] | None = None
        self.suspect = False
        self.serial = 0
        self.values: dict[Hashable, tuple[Hashable, Tensor]] = {}


_ENTRIES: WeakIdKeyDictionary = WeakIdKeyDictionary()


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
    """`compute(weight.detach())`, or its kept result if neither the weight nor `key` has changed since.

    One result is kept per slot. It is computed outside inference mode and without grad, so that it can be saved for a
    later backward whoever asked for it first.
    """
    entry = _fresh_entry(weight)
    kept = entry.values.get(slot)
    if kept is None or kept[0] != key:
        with torch.inference_mode(False), torch.no_grad():
            kept = (key, compute(weight.detach()))
            entry.sample = _sample(weight)
        entry.values[slot] = kept
    return kept[1]


def serial(weight: Tensor) -> int:
    """A number that changes when the weight does; a key for what depends on several weights."""
    return _fresh_entry(weight).serial


def touch(weight: Tensor) -> None:
    """The weight is being handed out, and may be written to unseen: compare all its bits at the next look-up."""
    entry = _ENTRIES.get(weight)
    if entry is None or entry.suspect or not entry.values or entry.signature != _signature(weight):
        return
    if entry.fingerprint is None:
        entry.fingerprint = _fingerprint(weight)
    entry.suspect = True


def check_sample(weight: Tensor) -> None:
    """Forget what was derived from the weight if a few hundred of its elements are not what they were then."""
    entry = _ENTRIES.get(weight)
    if entry is None or entry.sample is None or entry.signature != _signature(weight):
        return
    if not torch.equal(_bits(_sample(weight)), _bits(entry.sample)):
        entry.signature = None


def forget(weight: Tensor) -> None:
    """Drop whatever was derived from the weight."""
    entry = _ENTRIES.get(weight)
    if entry is not None:
        entry.signature = None
        entry.values.clear()


def cached_nbytes(weight: Tensor) -> int:
    """Bytes held by results of the weight's own size derived from it."""
    entry = _ENTRIES.get(weight)
    values = entry.values.values() if entry is not None else ()
    return sum(value.nbytes for _, value in values if value.shape == weight.shape)


def _fresh_entry(weight: Tensor) -> _Entry:
    entry = _ENTRIES.get(weight)
    if entry is None:
        entry = _ENTRIES[weight] = _Entry()
    signature = _signature(weight)
    if entry.signature != signature or (entry.suspect and not _same_bits(weight, entry.fingerprint)):
        entry.signature, entry.storage = signature, StorageWeakRef(weight.untyped_storage())
        entry.sample = entry.fingerprint = None
        entry.values.clear()
        entry.serial += 1
    entry.suspect = False
    return entry


def _signature(weight: Tensor) -> tuple[Any, ...]:
    return (
        weight.untyped_storage()._cdata,
        weight.data_ptr(),
        weight._version,
        weight.dtype,
        weight.device,
        weight.shape,
        weight.stride(),
    )


def _bits(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _sample(weight: Tensor) -> Tensor:
    rows, columns = (max(1, size // 16) for size in weight.shape)
    return weight.detach()[::rows, ::columns].clone()


@torch.no_grad()
def _fingerprint(weight: Tensor) -> tuple[Tensor, Tensor]:
    # Hashes by row and by column: a hash of the whole does not see rows or columns change places.
    return torch.hash_tensor(weight, dim=1), torch.hash_tensor(weight, dim=0)


def _same_bits(weight: Tensor, fingerprint: tuple[Tensor, Tensor] | None) -> bool:
    if fingerprint is None:
        return False
    return all(torch.equal(a, b) for a, b in zip(_fingerprint(weight), fingerprint, strict=True))
