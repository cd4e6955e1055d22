"""Times of a GPU, read from its own events.

A GPU works behind the processor that gives it work. Two events of its stream, before and after the calls, tell how long
it was at them; but where a call takes the GPU less time than the processor needs to ask for it, the GPU waits in
between, and what is read is the speed of Python. So the GPU is first kept busy for as long as the processor needs to
hand over all the calls, which is seen from doing them once: after that they lie ready, one behind the other. What the
processor needs for them is the other figure.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

CYCLES_PER_SECOND = 2e9
"""About the clock of a GPU; a slower one is kept busy longer than it need be."""
LONGEST_WAIT = 0.25
"""Seconds. A longer call fills the GPU by itself."""


class Event(Protocol):
    """What `torch.cuda.Event` is here."""

    def record(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds until `end`."""


def _event() -> Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-any-return, no-untyped-call]


def _sleep(cycles: int) -> None:
    torch.cuda._sleep(cycles)


@dataclass(frozen=True)
class DeviceClock:
    """Seconds of a GPU's time, and of processor time of this process, for calls that lie ready."""

    event: Callable[[], Event] = _event
    synchronize: Callable[[], None] = torch.cuda.synchronize
    sleep: Callable[[int], None] = _sleep
    wall: Callable[[], float] = time.perf_counter
    cpu: Callable[[], float] = time.process_time
    # A GPU takes about a thousand launches before the processor has to wait
    most_calls: int = 100

    def time(self, run: Callable[[], None], before: Callable[[], object] | None) -> tuple[float, float]:
        if before is not None:
            before()
        self.synchronize()
        asked = self.wall()
        run()
        asked = self.wall() - asked
        if before is not None:
            before()
        self.synchronize()  # there is room for all the launches
        start, end = self.event(), self.event()
        self.sleep(int(CYCLES_PER_SECOND * min(2 * asked, LONGEST_WAIT)))
        cpu = self.cpu()
        start.record()
        run()
        end.record()
        cpu = self.cpu() - cpu
        self.synchronize()
        return start.elapsed_time(end) / 1e3, cpu
