"""Time of a GPU benchmark: how much is left, and a limit for one step within it."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Budget:
    """Time up to a moment (of :func:`time.time`, so that processes can share it), and what was left out for lack of it."""

    def __init__(self, deadline: float):
        self.deadline = deadline
        self.skipped: list[str] = []

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.time()

    def skip(self, what: str, why: object = "no time left") -> None:
        """Note that something was left out, with the reason: a sentence, or the exception."""
        reason = f"{type(why).__name__}: {why}" if isinstance(why, BaseException) else str(why)
        self.skipped.append(f"{what}: {' '.join(reason.split())[:300]}")


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds, as soon as Python code runs."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
