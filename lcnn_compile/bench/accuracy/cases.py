"""The cases of the accuracy benchmark and what each is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lcnn_compile.config import Budget
from lcnn_compile.errors import ConfigError

CYCLE = 20
Method = Literal["dense", "lookups", "uniform lookups", "scratch", "low rank", "pruned", "int8", "bfloat16"]


@dataclass(frozen=True)
class Case:
    """One network whose accuracy is measured.

    Attributes:
        name: of the case and its files.
        method: how the dense network is changed.
        speedup: reduction of its multiply-adds, or of its layers' time on one thread.
        group_size: g of lookups; "auto" where a search chooses it.
        epochs: of training after that; from scratch, in cycles of the learning rate of CYCLE epochs.
    """

    name: str
    method: Method
    speedup: float = 1.0
    group_size: int | Literal["auto"] = 8
    epochs: int = 0
    budget: Budget = "macs"

    @property
    def start(self) -> str:
        """The case that this one trains on from; "" for none."""
        plain = {"lookups": "lookups-{0:g}x", "low rank": "low-rank-{0:g}x", "pruned": "pruned-{0:g}x", "dense": "dense"}
        if self.method == "scratch":
            return f"scratch-{self.speedup:g}x-{CYCLE}-epochs" if self.epochs > CYCLE else ""
        return plain[self.method].format(self.speedup) if self.epochs and self.method in plain else ""


def _cases() -> list[Case]:
    speedups = (2.0, 4.0, 8.0, 16.0)
    cases = [Case("dense", "dense"), Case("int8", "int8"), Case("bfloat16", "bfloat16")]
    cases += [Case(f"lookups-{s:g}x", "lookups", s) for s in speedups]
    cases += [Case(f"lookups-{s:g}x-g{g}", "lookups", s, g) for g in (1, 4) for s in (4.0, 8.0)]
    cases += [Case(f"uniform-{s:g}x", "uniform lookups", s) for s in (4.0, 8.0)]
    groups: tuple[int | Literal["auto"], ...] = (1, 4, 8, 16, "auto")
    cases += [Case(f"lookups-time-4x-g{g}", "lookups", 4.0, g, budget="time") for g in groups]
    cases += [Case(f"{method.replace(' ', '-')}-{s:g}x", method, s) for method in ("low rank", "pruned") for s in speedups]
    cases += [
        Case("lookups-8x-5-epochs", "lookups", 8.0, epochs=5),
        Case("lookups-8x-20-epochs", "lookups", 8.0, epochs=20),
        Case("lookups-16x-20-epochs", "lookups", 16.0, epochs=20),
        Case("scratch-8x-20-epochs", "scratch", 8.0, epochs=20),
        Case("scratch-8x-40-epochs", "scratch", 8.0, epochs=40),
        Case("low-rank-8x-5-epochs", "low rank", 8.0, epochs=5),
        Case("pruned-8x-5-epochs", "pruned", 8.0, epochs=5),
        Case("dense-5-epochs", "dense", epochs=5),
    ]
    return cases


CASES = {case.name: case for case in _cases()}


def chosen(names: list[str]) -> list[Case]:
    """The cases of these names, all by default.

    Raises:
        ConfigError: for an unknown name.
    """
    unknown = sorted(set(names) - set(CASES))
    if unknown:
        raise ConfigError(f"cases are {unknown}; allowed are {list(CASES)}")
    return [CASES[name] for name in names or CASES]
