"""Many runs at once: one process a core, progress over all steps, and nothing lost when it stops.

Workers are stopped by ending their processes. That is safe at any moment, because a run on disk is always whole: logs
are cut back to the last checkpoint when it resumes, and checkpoints are renamed into place.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

from benchmarks.files import alone
from benchmarks.recovery.runs import Run


@dataclass
class Outcome:
    """Names of the runs that are done, faults of those that failed, and whether the user stopped the rest."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


def run_all(
    runs: Sequence[Run], *, workers: int, resume: bool, on_done: Callable[[Run], None] = lambda run: None
) -> Outcome:
    """Do the runs, `workers` at a time, with a progress bar over all their steps.

    `on_done` is called in this process as runs end, in whatever order they do, and for those that had ended before.

    With `resume`, finished runs are kept and unfinished ones continue from their last checkpoint.

    Raises:
        ValueError: a run on disk that should be resumed was made with other settings, or another process is at work in
            the folder (before anything starts).
    """
    with ExitStack() as held:
        for folder in sorted({run.folder for run in runs}):
            held.enter_context(alone(folder))
        return _run_all(runs, workers, resume, on_done)


def _run_all(runs: Sequence[Run], workers: int, resume: bool, on_done: Callable[[Run], None]) -> Outcome:
    from tqdm import tqdm

    outcome = Outcome()
    named = {run.name: run for run in runs}
    todo = []
    for run in runs:
        if resume and run.finished():
            outcome.done.append(run.name)
            on_done(run)
        else:
            todo.append(run)
    steps = {run.name: run.preset.steps if run.name in outcome.done else 0 for run in runs}
    total = sum(run.preset.steps for run in runs)

    context = multiprocessing.get_context("spawn")  # a fork would copy torch's thread pools half-alive
    tasks, events = context.Queue(), context.Queue()
    for run in todo:
        tasks.put(run)
    processes = [
        context.Process(target=_work, args=(tasks, events, resume), daemon=True) for _ in range(min(workers, len(todo)))
    ]
    for _ in processes:
        tasks.put(None)
    tasks.cancel_join_thread()
    busy: dict[int, str] = {}
    with tqdm(total=total, initial=sum(steps.values()), unit="step", smoothing=0.1, dynamic_ncols=True) as bar:
        try:
            for process in processes:
                process.start()
            while len(outcome.done) + len(outcome.failed) < len(runs):
                try:
                    kind, pid, name, value = events.get(timeout=0.5)
                except queue.Empty:
                    _bury_dead(processes, busy, outcome)
                    if not any(process.is_alive() for process in processes) and events.empty():
                        break
                    continue
                if kind == "started":
                    busy[pid] = name
                elif kind == "step":
                    bar.update(value - steps[name])
                    steps[name] = value
                    bar.set_postfix_str(name.split(".", 1)[1])
                elif kind == "done":
                    busy.pop(pid, None)
                    outcome.done.append(name)
                    on_done(named[name])
                else:
                    busy.pop(pid, None)
                    outcome.failed[name] = value
        except KeyboardInterrupt:
            outcome.interrupted = True
        finally:
            for process in processes:
                if process.is_alive() and (outcome.interrupted or busy):
                    process.terminate()
            for process in processes:
                if process.pid is not None:
                    process.join()
    return outcome


def _bury_dead(processes: Sequence[BaseProcess], busy: dict[int, str], outcome: Outcome) -> None:
    """A worker that the system ended (out of memory, say) leaves no message: its run is named here."""
    for process in processes:
        if not process.is_alive() and process.pid in busy:
            name = busy.pop(process.pid)
            outcome.failed[name] = f"its process ended with code {process.exitcode}; resume to continue it"


def _work(tasks: Any, events: Any, resume: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    from benchmarks.recovery.policy import quiet_transformers
    from benchmarks.recovery.train import train

    quiet_transformers()
    parent = os.getppid()

    def report(name: str, step: int) -> None:
        if os.getppid() != parent:  # the parent was ended by force; nobody reads on
            raise SystemExit(1)
        events.put(("step", os.getpid(), name, step))

    while (run := tasks.get()) is not None:
        name = run.name
        events.put(("started", os.getpid(), name, 0))
        try:
            train(run, resume=resume, on_step=partial(report, name))
            events.put(("done", os.getpid(), name, 0))
        except Exception:  # one broken run must not take the others with it; its traceback is reported
            events.put(("failed", os.getpid(), name, traceback.format_exc()))
