"""For tests that press Ctrl-C."""

from __future__ import annotations

import signal


def heed_interrupts() -> None:
    """In a child process, before it runs: a shell starts its background jobs, and all that descends from them, with
    SIGINT ignored, and Python then ignores it too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
