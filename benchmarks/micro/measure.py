"""What a microbenchmark is, and how one is timed.

A case is checked first, then its contenders run in turn, round after round, in one process, in an order that is
shuffled anew in each round. A ratio is taken to the first contender *of the same round*, so that a machine that slows
down slows both sides of it; what is reported is the median over rounds, with the interval that covers the true median.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from benchmarks.micro.device_clock import DeviceClock

MINIMUM_SECONDS = 1e-3
"""A contender faster than this is called several times in a row, and its time divided."""


@dataclass(frozen=True)
class Contender:
    """One way of doing the operation.

    Attributes:
        name: as it stands in the tables.
        call: does it once. None if it cannot run here.
        absent: why it cannot run here ("torchao is not installed"); exactly one of `call` and `absent` is given.
        before: done untimed before each call (clearing gradients, say); its contender is called once per round.
        rounds: at most so many rounds, for what takes seconds; None for those of the case.
        bytes_moved: bytes the operation has to read and write. Where the first contender states its own, the rate
            of the others is given as a share of the first one's rate (of a copy: the share of the bound).
        figures: further numbers to be kept beside the times ("operator calls", "error"), JSON-able.
        foreign: it is another library's: if its first call fails, the reason is kept and the others go on. A failure
            of our own ends the run.
    """

    name: str
    call: Callable[[], object] | None
    absent: str | None = None
    before: Callable[[], object] | None = None
    rounds: int | None = None
    bytes_moved: int | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    foreign: bool = False

    def __post_init__(self) -> None:
        if (self.call is None) == (self.absent is None):
            raise ValueError(f"contender {self.name!r}: give either `call`, or `absent` with the reason")


def optional(name: str, make: Callable[[], Callable[[], object]], **more: Any) -> Contender:
    """A foreign contender whose call `make` returns; an absent one, with the reason, where `make` fails.

    Args:
        name: of the contender.
        make: imports the library and returns the call.
        more: further fields of the contender.
    """
    try:
        return Contender(name, make(), foreign=True, **more)
    except Exception as error:  # whatever another library raises is the reason it is not in the table
        return Contender(name, None, absent=reason(error))


def reason(error: Exception) -> str:
    """Why another library does not run, in one line."""
    if isinstance(error, ModuleNotFoundError):
        return f"module {error.name} is not installed"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


@dataclass(frozen=True)
class Case:
    """One group of rows: contenders that do the same work.

    Attributes:
        operation: what is done; the result goes to benchmarks/results/<operation>.jsonl.
        parameters: what tells this case from the others of the operation (fmt, dtype, shape, ...), JSON-able.
            "threads" (1 if missing) is the number of torch's threads while the case is checked and timed.
        contenders: the first is what ratios refer to, and has to run here.
        check: raises if a result is wrong. Nothing of the case is timed before it has passed.
        rounds: number of rounds; 0 for a case that is there for its memory only. At least 6 for a 95 % interval.
        memory_unit: bytes (or elements) in multiples of which the peak memory of each contender is given; None if
            memory is not measured. It is measured in a fresh process that runs through `cases` up to this one, so
            such cases come first in their file, and build their tensors only when they are reached.
        device: "cpu", or "cuda": then times are those of the GPU, read from its events (`device_clock.py`).
    """

    operation: str
    parameters: dict[str, Any]
    contenders: Sequence[Contender]
    check: Callable[[], None]
    rounds: int = 30
    memory_unit: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        names = [contender.name for contender in self.contenders]
        if not names or self.contenders[0].call is None:
            raise ValueError(f"{self.title}: the first contender, to which ratios refer, has to run here")
        if len(set(names)) < len(names):
            raise ValueError(f"{self.title}: two contenders have one name, in {names}")

    @property
    def title(self) -> str:
        """Operation and parameters in one line."""
        return " ".join([self.operation, *(f"{key}={value}" for key, value in self.parameters.items())])


class Timer(Protocol):
    """Where times are read.

    Attributes:
        most_calls: at most so many calls in a row for one reading.
    """

    @property
    def most_calls(self) -> int: ...

    def time(self, run: Callable[[], None], before: Callable[[], object] | None) -> tuple[float, float]:
        """Seconds that `run` takes, and seconds of processor time of this process; `before` is not counted."""


@dataclass(frozen=True)
class Clock:
    """Seconds of wall time, and of processor time of this process with all its threads."""

    wall: Callable[[], float] = time.perf_counter
    cpu: Callable[[], float] = time.process_time
    most_calls: int = 1000

    def time(self, run: Callable[[], None], before: Callable[[], object] | None) -> tuple[float, float]:
        if before is not None:
            before()
        wall, cpu = self.wall(), self.cpu()
        run()
        return self.wall() - wall, self.cpu() - cpu


class GateError(Exception):
    """A case gave a wrong result, so nothing is timed."""


def check(case: Case) -> None:
    """Run the case's check.

    Raises:
        GateError: whatever the check raised, with the case named.
    """
    torch.set_num_threads(case.parameters.get("threads", 1))
    try:
        case.check()
    except Exception as error:
        raise GateError(f"{case.title}: the check failed, so nothing is timed: {error!r}") from error


def measure(case: Case, rounds: int | None = None, clock: Timer | None = None) -> list[dict[str, Any]]:
    """Time the contenders of a case that has been checked.

    Args:
        case: the case.
        rounds: an upper limit on the rounds of everyone; None for the case's own.
        clock: where the time is read; None for the one of the case's device.

    Returns:
        One row a contender, in their order. Of one that ran: `wall_ms` and `cpu_ms` per call (median, p20, p80),
        `ratio` and `cpu_ratio` to the first contender of the same round (median, p20, p80, and `low` and `high`,
        the ends of the 95 % interval of the median, None below 6 rounds), `rounds`, `calls_per_round`, and where
        `bytes_moved` is known `gb_per_s` and `share_of_bound`. Of one that did not: `absent`, the reason.
    """
    torch.set_num_threads(case.parameters.get("threads", 1))
    clock = clock or (DeviceClock() if case.device == "cuda" else Clock())
    case, calls = _warmed_up(case, rounds, clock)
    runs = {c.name: _runs(case, c, rounds) for c in case.contenders if c.call is not None}
    walls: dict[str, list[float]] = {name: [] for name in calls}
    cpus: dict[str, list[float]] = {name: [] for name in calls}
    order = [c for c in case.contenders if c.name in calls]
    shuffle = random.Random(0).shuffle
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for done in range(max(runs.values(), default=0)):
            shuffle(order)
            for contender in order:
                if done < runs[contender.name]:
                    wall, cpu = _seconds(contender, calls[contender.name], clock)
                    walls[contender.name].append(wall)
                    cpus[contender.name].append(cpu)
    finally:
        if enabled:
            gc.enable()
    return [_row(case, contender, runs, calls, walls, cpus) for contender in case.contenders]


def _runs(case: Case, contender: Contender, limit: int | None) -> int:
    """How many rounds the contender takes part in."""
    return min(n for n in (case.rounds, contender.rounds, limit) if n is not None)


def _warmed_up(case: Case, rounds: int | None, clock: Timer) -> tuple[Case, dict[str, int]]:
    """Calls per round of each contender that takes part; a foreign one that fails is absent in the case returned."""
    calls, contenders = {}, []
    for contender in case.contenders:
        if contender.call is not None and _runs(case, contender, rounds):
            try:
                calls[contender.name] = _calls_per_round(contender, clock)
            except Exception as error:
                if not contender.foreign:
                    raise
                contender = replace(contender, call=None, absent=reason(error))
        contenders.append(contender)
    return replace(case, contenders=contenders), calls


def _calls_per_round(contender: Contender, clock: Timer) -> int:
    """One call to warm up, one to see how long it takes."""
    _seconds(contender, 1, clock)
    if contender.before is not None or contender.rounds is not None:
        return 1
    wall, _ = _seconds(contender, 1, clock)
    return 1 if wall >= MINIMUM_SECONDS else min(clock.most_calls, math.ceil(MINIMUM_SECONDS / max(wall, 1e-9)))


def _seconds(contender: Contender, calls: int, clock: Timer) -> tuple[float, float]:
    """Wall and processor seconds of one call."""
    call = contender.call
    assert call is not None  # an absent contender has no calls per round

    def run() -> None:
        for _ in range(calls):
            call()

    wall, cpu = clock.time(run, contender.before)
    return wall / calls, cpu / calls


def _row(
    case: Case,
    contender: Contender,
    runs: dict[str, int],
    calls: dict[str, int],
    walls: dict[str, list[float]],
    cpus: dict[str, list[float]],
) -> dict[str, Any]:
    row: dict[str, Any] = {"contender": contender.name}
    if contender.figures:
        row["figures"] = contender.figures
    if contender.absent is not None:
        return row | {"absent": contender.absent}
    if contender.name not in calls:
        return row
    first = case.contenders[0]
    wall, cpu = walls[contender.name], cpus[contender.name]
    ratios = paired(wall, walls[first.name])
    row |= {
        "rounds": runs[contender.name],
        "calls_per_round": calls[contender.name],
        "wall_ms": spread([1e3 * value for value in wall]),
        "cpu_ms": spread([1e3 * value for value in cpu]),
        "ratio": spread(ratios) | interval(ratios),
    }
    # A clock of processor time that ticks coarsely shows 0 for a short call: then there is no such ratio.
    if all(cpus[first.name]):
        ratios = paired(cpu, cpus[first.name])
        row["cpu_ratio"] = spread(ratios) | interval(ratios)
    if contender.bytes_moved is not None:
        row["bytes_moved"] = contender.bytes_moved
        row["gb_per_s"] = contender.bytes_moved / row["wall_ms"]["median"] / 1e6
        if first.bytes_moved is not None:
            row["share_of_bound"] = contender.bytes_moved / first.bytes_moved / row["ratio"]["median"]
    return row


def paired(values: Sequence[float], references: Sequence[float]) -> list[float]:
    """Each value over the reference of its round; the shorter list decides how many rounds there are."""
    return [value / reference for value, reference in zip(values, references, strict=False)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile (linear between neighbours)."""
    ordered = sorted(values)

    def quantile(share: float) -> float:
        place = share * (len(ordered) - 1)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    return {"median": statistics.median(ordered), "p20": quantile(0.2), "p80": quantile(0.8)}


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """The 95 % interval of the median from order statistics (David and Nagaraja, Order Statistics, section 7.1): no
    shape of the distribution is assumed.

    The k-th smallest and k-th largest of n values enclose the median with probability 1 - 2 P(B < k), B binomial
    (n, 1/2); k is the largest for which that is at least 0.95. Below n = 6 there is none, and both ends are None.
    """
    n = len(values)
    ordered = sorted(values)
    tail, k = 0.0, 0
    while k < n:
        tail += math.comb(n, k) / 2**n
        if 2 * tail > 0.05:
            break
        k += 1
    if k == 0:
        return {"low": None, "high": None}
    return {"low": ordered[k - 1], "high": ordered[n - k]}
