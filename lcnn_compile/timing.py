"""Timing candidates against each other: short warm bursts, alternating, medians.

Single calls that alternate with another candidate measure the cache which that one emptied, and one long run each measures
the machine's mood at that minute. So each candidate gets a burst (two warm-up calls, five timed ones), bursts take turns,
each round in another order, and the median over rounds of the bursts' medians counts. On a busy machine, bursts in which
another process took the core away are left out as long as enough others remain.
"""

from __future__ import annotations

import gc
import random
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

WARM_UP, TIMED = 2, 5
# Calls longer than this fill every cache anew whatever ran before: one warm-up and two timed calls do.
LONG_CALL = 0.25
ENOUGH = 3


class Burst(NamedTuple):
    """The median of a burst's calls, and whether another process took the core away meanwhile."""

    seconds: float
    disturbed: bool


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median over bursts, with the quartiles of the bursts' medians, and how many bursts counted."""

    median: float
    low: float
    high: float
    bursts: int

    @classmethod
    def of(cls, bursts: Sequence[Burst]) -> Timing:
        """Summarise; disturbed bursts count only where fewer than ENOUGH are not."""
        calm = [burst.seconds for burst in bursts if not burst.disturbed]
        seconds = calm if len(calm) >= ENOUGH else [burst.seconds for burst in bursts]
        low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
        return cls(middle, low, high, len(seconds))


def preemptions() -> int:
    """How often another process has taken the core away from this one so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _burst(call: Callable[[], object], warm_up: int, timed: int) -> Burst:
    for _ in range(warm_up):
        call()
    seconds = []
    before = preemptions()
    for _ in range(timed):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return Burst(statistics.median(seconds), preemptions() > before)


def once(call: Callable[[], object]) -> float:
    """Seconds of a single call."""
    return _burst(call, 0, 1).seconds


def alternate(
    calls: Mapping[str, Callable[[], object]], seconds: float = 10.0, rounds: tuple[int, int] = (3, 25)
) -> dict[str, Timing]:
    """Time every call for about ``seconds`` in all, in at least ``rounds[0]`` and at most ``rounds[1]`` rounds."""
    long = {name: once(call) > LONG_CALL for name, call in calls.items()}
    bursts: dict[str, list[Burst]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        deadline = time.perf_counter() + seconds
        for number in range(rounds[1]):
            shuffle.shuffle(order)
            for name in order:
                bursts[name].append(_burst(calls[name], *((1, 2) if long[name] else (WARM_UP, TIMED))))
            if number + 1 >= rounds[0] and time.perf_counter() > deadline:
                break
    finally:
        if collecting:
            gc.enable()
    return {name: Timing.of(values) for name, values in bursts.items()}
