"""What a converted linear knows of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from qnoise.formats import QuantSpec, as_spec
from qnoise.nn.patched import PatchRecord
from qnoise.packing import BlockQuantized
from qnoise.spelling import check_choice

if TYPE_CHECKING:
    from qnoise.nn.linear import FakeQuantLinear

Storage = Literal["auto", "dynamic", "cached", "packed"]
STORAGES = ("auto", "dynamic", "cached", "packed")


@dataclass(frozen=True, eq=False)
class Pin:
    """Codes that stand for Q(W), and what tells whether W is still the weight they were made of."""

    quantized: BlockQuantized
    dtype: torch.dtype
    # Of the weight, and of the weight rounded to narrower dtypes, as sharding with mixed precision hands it out
    fingerprints: dict[torch.dtype, tuple[Tensor, Tensor]]
    # Whether the codes also make good what was lost before the linear, and so are not those nearest to W
    asymmetric: bool = False


@dataclass
class LinearRecord(PatchRecord):
    """State of a converted linear. `scale_group` are the linears that share one per-tensor scale, itself included."""

    weight_spec: QuantSpec | None = None
    act_spec: QuantSpec | None = None
    # What fixes the per-tensor scale of the input; None: each token's own amax
    act_amax: float | None = None
    storage: str = "auto"
    scale_group: tuple[FakeQuantLinear, ...] = ()
    # amax of the weight when it was patched, for a time when the weight itself is out of reach (offloaded, sharded)
    patched_amax: Tensor | None = None
    pin: Pin | None = None


def new_record(name: str, fmt: str | QuantSpec | None, act_fmt: str | QuantSpec | None, storage: str) -> LinearRecord:
    check_choice("storage", storage, STORAGES)
    return LinearRecord(
        name=name,
        stock_class=nn.Linear,
        weight_spec=None if fmt is None else as_spec(fmt),
        act_spec=None if act_fmt is None else as_spec(act_fmt),
        storage=storage,
    )


def named(record: LinearRecord) -> str:
    return record.name or "this linear"
