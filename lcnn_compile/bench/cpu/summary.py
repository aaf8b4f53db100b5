"""From rows to comparisons: which dense engine is best, how much faster lookups are, and what part of the MAC ratio that is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lcnn_compile.bench.cpu.measure import Row

INT8 = "openvino int8"


@dataclass(frozen=True)
class Comparison:
    """One lookup model against the dense model that it replaces, in the same run.

    Attributes:
        best_dense: the fastest exact dense engine.
        engine: our faster engine.
        speedup: its time ratio to the best dense one; None where either has no time.
        speedup_compiled: the same for the model under ``torch.compile``.
        speedup_int8: time ratio to OpenVINO's int8.
        speedup_bf16, speedup_bf16_int8: of lookups that round to bfloat16, to the best dense engine and to int8.
        error_bf16: their distance from float64, relative to its norm.
        speedup_bytes, speedup_bytes_int8, error_bytes: the same of networks of lookups in eight bits.
        error_int8: of OpenVINO's.
        mac_ratio: dense multiply-adds over ours.
        efficiency: speedup / mac_ratio.
        reason: why there is no time.
    """

    case: str
    setting: str
    threads: int
    batch: int
    best_dense: str
    dense_seconds: float | None
    engine: str
    seconds: float | None
    speedup: float | None
    speedup_compiled: float | None
    speedup_inductor: float | None
    speedup_int8: float | None
    speedup_bf16: float | None
    speedup_bf16_int8: float | None
    error_bf16: float | None
    mac_ratio: float
    efficiency: float | None
    reason: str
    speedup_bytes: float | None = None
    speedup_bytes_int8: float | None = None
    error_bytes: float | None = None
    error_int8: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def _fastest(rows: Iterable[Row]) -> Row | None:
    return min((row for row in rows if row.seconds is not None), key=lambda row: row.seconds or 0.0, default=None)


def _ratio(numerator: Row | None, denominator: Row | None) -> float | None:
    if numerator is None or denominator is None or numerator.seconds is None or denominator.seconds is None:
        return None
    return numerator.seconds / denominator.seconds


def _compare(dense: Sequence[Row], ours: Sequence[Row]) -> Comparison:
    first = ours[0]
    best, mine = _fastest(row for row in dense if row.exact), _fastest(row for row in ours if row.exact)
    rounded, int8 = (
        _fastest(row for row in ours if row.engine == "lcnn bf16"),
        _fastest(row for row in dense if row.engine == INT8),
    )
    eight = _fastest(row for row in ours if row.engine == "lcnn int8")
    speedup, mac_ratio = _ratio(best, mine), dense[0].macs / first.macs
    return Comparison(
        first.case,
        first.setting,
        first.threads,
        first.batch,
        best.engine if best else "",
        best.seconds if best else None,
        mine.engine if mine else "",
        mine.seconds if mine else None,
        speedup,
        _ratio(best, _fastest(row for row in ours if row.engine == "lcnn")),
        _ratio(_fastest(row for row in dense if row.engine.startswith("inductor")), mine),
        _ratio(int8, mine),
        _ratio(best, rounded),
        _ratio(int8, rounded),
        rounded.error if rounded else None,
        mac_ratio,
        speedup / mac_ratio if speedup else None,
        "" if mine else "; ".join(f"{row.engine} {row.reason}" for row in ours),
        _ratio(best, eight),
        _ratio(int8, eight),
        eight.error if eight else None,
        int8.error if int8 else None,
    )


def compare(rows: Iterable[Row]) -> list[Comparison]:
    """One comparison for each case, thread count, batch and setting, in the order of the rows."""
    measured: dict[tuple[str, int, int], dict[str, list[Row]]] = {}
    for row in rows:
        measured.setdefault((row.case, row.threads, row.batch), {}).setdefault(row.setting, []).append(row)
    return [
        _compare(settings["dense"], ours)
        for settings in measured.values()
        for setting, ours in settings.items()
        if setting != "dense" and "dense" in settings
    ]


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean of positive values; NaN of none."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan
