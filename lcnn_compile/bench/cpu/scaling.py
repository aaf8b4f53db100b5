"""Time of one lookup layer as batch, resolution, channels, taps and group size grow, beside the roofline.

Three lower bounds for a lookup layer on a processor whose peaks were probed:

- arithmetic: all multiply-adds at the multiply-add peak;
- L1: one 64-byte load of 16 values for each tap of a filter group (which serves its g filters) and, in the dictionary
  stage, for each channel and DICTIONARY_BLOCK vectors;
- traffic: input, weights and output moved once, at the bandwidth of the cache or memory that holds them all.

The roofline is the largest of the three. What lies between it and the measured time is what overlaps badly: the halo of
each band is computed twice, coefficients are loaded too, vectors at the right edge are partly empty, and every call pays
for dispatch; ``overhead`` shows the last as the time of the same layer on a single pixel.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from lcnn_compile.bench.cpu.engines import ENGINES
from lcnn_compile.bench.cpu.layers import LayerShape, layer_case, sizes
from lcnn_compile.bench.cpu.measure import LOOKUP_ENGINES, measure
from lcnn_compile.bench.cpu.probe import Peak, probe
from lcnn_compile.bench.cpu.summary import compare
from lcnn_compile.lookup import LookupWeight
from lcnn_compile.modules import LookupModule

DICTIONARY_BLOCK = 8
LANES = 16


@dataclass(frozen=True)
class Point:
    """One layer to be timed; the base point of every sweep is the default."""

    batch: int = 1
    resolution: int = 28
    channels: int = 128
    taps: int = 54
    group_size: int = 8


SWEEPS: dict[str, tuple[int, ...]] = {
    "batch": (1, 2, 4, 8, 16),
    "resolution": (7, 14, 28, 56, 112, 224),
    "channels": (32, 64, 128, 256, 512),
    "taps": (9, 27, 54, 108, 216),
    "group_size": (1, 2, 4, 8, 16),
}
QUICK_SWEEPS: dict[str, tuple[int, ...]] = {"batch": (1, 4), "group_size": (1, 8)}
DENSE = ("eager", "eager channels_last", "openvino")


@dataclass(frozen=True)
class Roofline:
    """Seconds that each resource needs at the least."""

    arithmetic: float
    loads: float
    traffic: float

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(asdict(self), key=lambda name: getattr(self, name))

    @property
    def seconds(self) -> float:
        """The longest of the three."""
        return max(self.arithmetic, self.loads, self.traffic)


def roofline(weight: LookupWeight, batch: int, pixels: int, peak: Peak, threads: int = 1) -> Roofline:
    """Lower bounds for a stride-1 layer with so many pixels per image."""
    vectors = batch * pixels / LANES
    dictionary = weight.dictionary.numel()
    loads = (weight.coefficients.shape[0] + dictionary / DICTIONARY_BLOCK) * vectors
    moved = batch * pixels * (weight.in_channels + weight.out_channels) * 4 + weight.nbytes()
    bandwidth = peak.bytes_per_second(moved / threads)
    return Roofline(weight.macs(batch * pixels) / peak.macs, loads / peak.loads, moved / bandwidth)


def _points(quick: bool) -> list[tuple[str, Point]]:
    sweeps = QUICK_SWEEPS if quick else SWEEPS
    return [(axis, Point(**{axis: value})) for axis, values in sweeps.items() for value in values]


@torch.no_grad()
def run(quick: bool) -> dict[str, Any]:
    """Every sweep, with the roofline where the processor could be probed."""
    threads = torch.get_num_threads()
    peak = probe(threads)
    done: dict[Point, dict[str, Any]] = {}
    points = []
    for axis, point in _points(quick):
        if point not in done:
            torch.compiler.reset()
            done[point] = _time(point, peak, threads, 0.5 if quick else 2.0)
        points.append({"axis": axis, "value": getattr(point, axis), **done[point]})
    return {"threads": threads, "peak": peak.to_dict() if peak else None, "points": points, "overhead": _overhead()}


def _time(point: Point, peak: Peak | None, threads: int, seconds: float) -> dict[str, Any]:
    shape = LayerShape(point.channels, point.channels, point.resolution)
    case = layer_case(shape, {"lookup": sizes(point.taps, point.group_size)}, point.batch)
    rows = measure(case, [ENGINES[name] for name in DENSE], seconds, [LOOKUP_ENGINES["lcnn eager"]])
    (comparison,) = compare(rows)
    found: dict[str, Any] = {**asdict(point), "kernels": rows[-1].kernels, "comparison": comparison.to_dict()}
    layer = case.lookups["lookup"]
    if peak is not None and comparison.seconds and isinstance(layer, LookupModule):
        limits = roofline(layer.lookup_weight(), point.batch, point.resolution**2, peak, threads)
        part = limits.seconds / comparison.seconds
        found |= {"roofline": {**asdict(limits), "bound": limits.bound, "reached": part}}
    return found


def _overhead() -> float | None:
    """Seconds of a call that has next to nothing to compute."""
    case = layer_case(LayerShape(8, 8, 1), {"lookup": sizes(9, 8)})
    return measure(case, [], 0.2, [LOOKUP_ENGINES["lcnn eager"]])[0].seconds
