"""The real networks as cases: what each is calibrated on, and what figure of merit it has on other data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import real_data as data
import real_models as models
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One network.

    Attributes:
        build: makes it, dense, with its weights.
        calibration: unlabelled inputs, a batch each.
        evaluate: the metric of a function that runs the network on many inputs; more is better.
        example: what it is timed on.
        metric: what ``evaluate`` returns, and its unit.

    """

    build: Callable[[], nn.Module]
    calibration: Callable[[], list[Tensor]]
    evaluate: Callable[[Callable[[Tensor], Tensor]], float]
    example: Callable[[], Tensor]
    metric: str


Runner = Callable[[Tensor], Tensor]


@cache
def _test(make: Callable[..., tuple[Tensor, object]], count: int, *options: int) -> tuple[Tensor, object]:
    return make(count, 0, True, *options)


def _case(
    build: Callable[[], nn.Module],
    make: Callable[..., tuple[Tensor, object]],
    score: Callable[..., float],
    metric: str,
    count: int,
    batch: int,
    test: int,
    *options: int,
    timed: int = 1,
) -> Case:
    def evaluate(run: Runner) -> float:
        inputs, truth = _test(make, test, *options)
        return score(run(inputs), truth)

    return Case(
        build,
        lambda: list(make(count, 0, False, *options)[0].split(batch)),
        evaluate,
        lambda: make(timed, 7, True, *options)[0],
        metric,
    )


CASES = {
    "pitch": _case(
        partial(models.pitch, "full"), data.frames, data.pitch_accuracy, "pitch right within 50 cents, %", 192, 32, 400
    ),
    "pitch, tiny": _case(
        partial(models.pitch, "tiny"), data.frames, data.pitch_accuracy, "pitch right within 50 cents, %", 512, 64, 2000, timed=8
    ),
    "text lines": _case(models.recogniser, data.lines, data.character_accuracy, "characters right, %", 64, 16, 300),
    "text detector": _case(models.detector, data.pages, data.word_score, "F-measure of words, %", 24, 4, 32),
    "up-scaler": _case(models.upscaler, data.crops, data.decibels, "dB against the truth", 32, 8, 24, 2, 156, 7),
    "restorer": _case(models.restorer, data.crops, data.decibels, "dB against the truth", 32, 8, 24, 4, 64),
}
"""By name; every one with weights from a package."""
