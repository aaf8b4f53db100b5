"""What sizes of a layer cost: multiply-adds, or seconds that are interpolated from a few timings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from lcnn_compile.fitting.processes import Processes
from lcnn_compile.geometry import Geometry

Timer = Callable[[str, int, int, int], float]
"""Seconds per sample of a layer with k vectors, so many taps per filter and group size g; of the dense layer for k = 0."""


class Costs(Protocol):
    """What a budget is counted in.

    Attributes:
        unit: "multiply-adds" or "seconds", per sample.
        other: of everything outside the layers that may change.
    """

    unit: str
    other: float

    def dense(self, name: str) -> float:
        """Of the layer as it is."""
        ...

    def lookup(self, name: str, size: int, taps: int, group_size: int) -> float:
        """Of k = ``size`` vectors and ``taps`` taps for each filter, in groups of ``group_size`` filters."""
        ...


class MultiplyAdds:
    """Multiply-adds per sample.

    Args:
        geometry: of each layer.
        pixels: (output, input) pixels of each layer per sample.
        other: multiply-adds outside the layers.
    """

    unit = "multiply-adds"

    def __init__(self, geometry: Mapping[str, Geometry], pixels: Mapping[str, tuple[int, int]], other: int = 0) -> None:
        self._geometry, self._pixels, self.other = geometry, pixels, float(other)

    def dense(self, name: str) -> float:
        """Of the layer as it is."""
        return float(self._geometry[name].macs * self._pixels[name][0])

    def lookup(self, name: str, size: int, taps: int, group_size: int) -> float:
        """m·k at every input pixel that is read, n·taps at every output pixel."""
        geometry, (outputs, inputs) = self._geometry[name], self._pixels[name]
        return float(geometry.in_channels * size * inputs + geometry.out_channels * taps * outputs)


class Seconds:
    """Seconds per sample on this machine.

    For each layer and group size four layers of random values are timed; between them time is linear in k and in taps, as
    the work of the two stages is.

    Args:
        timer: measures one layer.
        geometry: of each layer.
        most_taps: taps per filter up to which the layer may go.
        other: seconds outside the layers.
        processes: those that fit together: all go by the mean of their timings.
    """

    unit = "seconds"

    def __init__(
        self,
        timer: Timer,
        geometry: Mapping[str, Geometry],
        most_taps: Callable[[str, int], int],
        other: float,
        processes: Processes,
    ) -> None:
        self._timer, self._geometry, self._most_taps, self._processes = timer, geometry, most_taps, processes
        self._dense: dict[str, float] = {}
        self._models: dict[tuple[str, int], tuple[float, float, float]] = {}
        self.other = self._agreed(other)

    def _agreed(self, *seconds: float) -> float:
        mean = self._processes.sum(torch.tensor(seconds, dtype=torch.float64)) / self._processes.count
        return float(mean[0])

    def dense(self, name: str) -> float:
        """Of the layer as it is."""
        if name not in self._dense:
            self._dense[name] = self._agreed(self._timer(name, 0, 0, 1))
        return self._dense[name]

    def lookup(self, name: str, size: int, taps: int, group_size: int) -> float:
        """Of k = ``size`` vectors and ``taps`` taps for each filter, in groups of ``group_size`` filters."""
        key = name, group_size
        if key not in self._models:
            self._models[key] = self._measure(name, group_size)
        call, vector, tap = self._models[key]
        return call + vector * size + tap * taps

    def _measure(self, name: str, group_size: int) -> tuple[float, float, float]:
        """Seconds of a call, of each vector and of each tap, none below 0: least squares of relative errors."""
        geometry = self._geometry[name]
        few, many = max(1, geometry.channels // 16), max(1, geometry.channels // 4)
        most = max(2, self._most_taps(name, many))
        low = max(1, min(most // 4, few * geometry.area))
        sizes = [(few, low), (many, low), (many, max(low, most // 2)), (many, most)]
        times = [self._agreed(self._timer(name, *size, group_size)) for size in sizes]
        rows = torch.tensor([[1.0, size, taps] for size, taps in sizes], dtype=torch.float64)
        scale = 1 / torch.tensor(times, dtype=torch.float64).clamp(min=1e-12)
        columns = [0, 1, 2]
        while columns:
            # The one negative term goes first: noise may ask for one where a stage takes next to no time.
            found = torch.linalg.lstsq(rows[:, columns] * scale[:, None], torch.ones(len(sizes), 1, dtype=torch.float64)).solution
            if bool((found >= 0).all()):
                break
            columns.pop(int(found.argmin()))
        model = [0.0, 0.0, 0.0]
        for column, value in zip(columns, found.flatten().tolist(), strict=True):
            model[column] = value
        return model[0], model[1], model[2]
