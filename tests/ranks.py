"""For tests of several processes: one a rank, on the CPU, talking through gloo."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., None], world: int, meet: Path, *args: Any) -> None:
    """Call `function(rank, *args)` in `world` processes that form a group. `meet` is a file that is not there yet.

    What a rank raises is raised here, and ends the others.
    """
    mp.spawn(_rank, args=(function, world, f"file://{meet}", args), nprocs=world)


def _rank(rank: int, function: Callable[..., None], world: int, address: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    function(rank, *args)
    dist.barrier()
    dist.destroy_process_group()
    # The threads of gloo outlive the group where something still holds it, as sharded modules do. One that asks for
    # the GIL while the interpreter is being taken down is unwound through C++ that does not allow it: "terminate
    # called without an active exception". So the interpreter is not taken down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
