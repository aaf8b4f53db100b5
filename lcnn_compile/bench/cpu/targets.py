"""What the benchmark has to show, one thread and batch 1: each target with the comparisons it is judged by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lcnn_compile.bench.cpu.layers import OURS, PAPER
from lcnn_compile.bench.cpu.summary import Comparison, geometric_mean

Quantity = Literal["speedup", "efficiency", "speedup_int8", "speedup_bf16_int8", "speedup_inductor"]
LAYERS = ("64→64 3×3 @56²", "128→128 3×3 @28²", "256→256 3×3 @14²", "512→512 3×3 @7²")


@dataclass(frozen=True)
class Target:
    """At least ``least`` for the geometric mean of ``quantity`` over ``cases`` at ``setting``."""

    cases: tuple[str, ...]
    setting: str
    quantity: Quantity
    least: float


TARGETS = (
    Target(("64→128 3×3 @224²",), "k=10 9 taps g=1", "speedup", 12),
    Target(LAYERS, PAPER, "efficiency", 0.6),
    Target(LAYERS, OURS, "efficiency", 1.0),
    Target(("64→64 3×3 @224²",), OURS, "speedup", 5),
    Target(("128→128 3×3 @112²",), OURS, "speedup", 9),
    Target(("vgg16",), "ours", "speedup", 8),
    Target(("resnet18",), "paper-fast", "speedup", 8),
    Target(("resnet18",), "ours", "speedup", 5),
    Target(("alexnet",), "paper-fast", "speedup", 10),
    Target(("resnet18",), "ours", "speedup_int8", 1.2),
    Target(("vgg16",), "ours", "speedup_int8", 1.2),
    Target(("alexnet",), "ours", "speedup_int8", 1.2),
    Target(("resnet18",), "ours", "speedup_bf16_int8", 1.2),
    Target(("vgg16",), "ours", "speedup_bf16_int8", 1.2),
    Target(("alexnet",), "ours", "speedup_bf16_int8", 1.2),
    Target(("mobilenet",), "ours", "speedup_inductor", 0.97),
    Target(("narrow",), "ours", "speedup_inductor", 0.97),
)


def judge(comparisons: Iterable[Comparison], threads: int = 1, batch: int = 1) -> list[tuple[Target, float]]:
    """Each target whose cases were all measured, with what was reached."""
    found = {(c.case, c.setting): c for c in comparisons if (c.threads, c.batch) == (threads, batch)}
    judged = []
    for target in TARGETS:
        values = [getattr(found.get((case, target.setting)), target.quantity, None) for case in target.cases]
        if all(value is not None for value in values):
            judged.append((target, geometric_mean(value for value in values if value is not None)))
    return judged
