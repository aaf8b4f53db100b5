"""Timing candidates against each other: short warm bursts, alternating, medians.

Single calls that alternate with another candidate measure the cache which that one emptied, and one long run each measures
the machine's mood at that minute. So each candidate gets a burst (two warm-up calls, five timed ones), bursts take turns,
each round in another order, and the median over rounds of the bursts' medians counts.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

WARM_UP, TIMED = 2, 5
# Calls longer than this fill every cache anew whatever ran before: one warm-up and two timed calls do.
LONG_CALL = 0.25


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median over bursts, with the quartiles of the bursts' medians."""

    median: float
    low: float
    high: float
    bursts: int

    @classmethod
    def of(cls, bursts: list[float]) -> Timing:
        """Summarise the bursts' medians."""
        low, middle, high = statistics.quantiles(bursts, n=4, method="inclusive") if len(bursts) > 1 else bursts * 3
        return cls(middle, low, high, len(bursts))


def _burst(call: Callable[[], object], warm_up: int, timed: int) -> float:
    for _ in range(warm_up):
        call()
    seconds = []
    for _ in range(timed):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def once(call: Callable[[], object]) -> float:
    """Seconds of a single call."""
    return _burst(call, 0, 1)


def alternate(
    calls: Mapping[str, Callable[[], object]], seconds: float = 10.0, rounds: tuple[int, int] = (3, 25)
) -> dict[str, Timing]:
    """Time every call for about ``seconds`` in all, in at least ``rounds[0]`` and at most ``rounds[1]`` rounds."""
    long = {name: once(call) > LONG_CALL for name, call in calls.items()}
    bursts: dict[str, list[float]] = {name: [] for name in calls}
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
