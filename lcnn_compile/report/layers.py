"""What became of every layer: plain data, with its sums."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from torch import nn

from lcnn_compile.fitting.output_error import OutputError
from lcnn_compile.report.plots import layers_figure, save_figure
from lcnn_compile.report.table import report_table


@dataclass(frozen=True)
class LayerReport:
    """One convolution or linear layer of a model.

    Attributes:
        name: qualified name of the layer.
        kind: its type's name, or the function that was called.
        replaced: whether it is a lookup layer now.
        dictionary_size: k, None where it stays dense.
        taps: taps per filter, averaged over filters, None where it stays dense.
        group_size: filters that share indices, None where it stays dense.
        error: relative output error ‖y − ŷ‖² / ‖y − mean(y)‖² on calibration data, rounding included; None where none was given.
        macs_before, macs_after: multiply-adds per sample; None where the layer's input size is not known.
        bytes_before, bytes_after: bytes of weight and bias.
        lowering: how it is computed: "lookup", "factored" or "dense".
        precision: "bfloat16" where lookups may round their operands, "int8" where it computes in bytes, be it dense or a lookup layer.
        reason: why it stays dense, or a remark.
        output_error: relative error of the network's outputs that this layer alone is expected to cause, from its error and the
            derivative of the outputs; None where no search has asked for it.
        seconds_before, seconds_after: seconds in one run of the eager dense and lookup model on the example inputs, as
            :func:`~lcnn_compile.report.times.time_layers` measured them; None where it did not.
    """

    name: str
    kind: str
    replaced: bool
    dictionary_size: int | None = None
    taps: float | None = None
    group_size: int | None = None
    error: float | None = None
    macs_before: int | None = None
    macs_after: int | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    lowering: str = "dense"
    reason: str = ""
    seconds_before: float | None = None
    seconds_after: float | None = None
    precision: str = "float32"
    output_error: float | None = None


@dataclass(frozen=True)
class Report:
    """All layers of a conversion or of a dry run, in the order in which the model runs them.

    Attributes:
        layers: a row for each.
        title: what was converted.
        output_error: of the network's outputs, measured on calibration samples that were held out; None where it was not.
        remarks: about the whole network: which data were used, what was given up and why.
    """

    layers: tuple[LayerReport, ...]
    title: str = "lcnn"
    output_error: OutputError | None = None
    remarks: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @overload
    def __getitem__(self, key: int | str) -> LayerReport: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[LayerReport, ...]: ...
    def __getitem__(self, key: int | str | slice) -> LayerReport | tuple[LayerReport, ...]:
        """A layer by position or by name."""
        if isinstance(key, str):
            for layer in self.layers:
                if layer.name == key:
                    return layer
            raise KeyError(key)
        return self.layers[key]

    @property
    def replaced(self) -> tuple[LayerReport, ...]:
        """The layers that are lookup layers."""
        return tuple(layer for layer in self.layers if layer.replaced)

    @property
    def changed(self) -> tuple[LayerReport, ...]:
        """The layers that are lookup layers, or are computed in bytes."""
        return tuple(layer for layer in self.layers if layer.replaced or layer.precision == "int8")

    def macs(self) -> tuple[int, int]:
        """Multiply-adds per sample before and after, over the layers whose input size is known."""
        known = [(r.macs_before, r.macs_after) for r in self.layers]
        return sum(before or 0 for before, _ in known), sum(after or 0 for _, after in known)

    def nbytes(self) -> tuple[int, int]:
        """Bytes of weights before and after."""
        return sum(r.bytes_before for r in self.layers), sum(r.bytes_after for r in self.layers)

    def seconds(self) -> tuple[float, float]:
        """Seconds before and after, over the layers that were timed in both models; zeros where none was."""
        timed = [(r.seconds_before, r.seconds_after) for r in self.layers if r.seconds_before and r.seconds_after]
        return sum(before for before, _ in timed), sum(after for _, after in timed)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values."""
        plain: dict[str, Any] = {
            "title": self.title,
            "layers": [asdict(layer) for layer in self.layers],
            "remarks": list(self.remarks),
        }
        if self.output_error is not None:
            plain["output_error"] = asdict(self.output_error)
        return plain

    def totals(self) -> dict[str, Any]:
        """Sums before and after as plain values: layers, multiply-adds, bytes, seconds (0 where not known)."""
        names = ("macs_before", "macs_after", "bytes_before", "bytes_after", "seconds_before", "seconds_after")
        values = dict(zip(names, (*self.macs(), *self.nbytes(), *self.seconds()), strict=True))
        return {"totals": {"layers": len(self.layers), "replaced": len(self.replaced), **values}}

    def to_json(self) -> str:
        """The report as a JSON object."""
        return json.dumps(self.to_dict())

    def summary(self) -> str:
        """One sentence: how many layers, multiply-adds and bytes."""
        before, after = self.macs()
        text = f"{len(self.replaced)} of {len(self.layers)} layers replaced"
        if in_bytes := sum(row.precision == "int8" for row in self.layers):
            text += f", {in_bytes} in eight bits"
        if before:
            text += (
                f", {before / 1e6:.1f} → {after / 1e6:.1f} million multiply-adds per sample ({before / max(after, 1):.2f}x fewer)"
            )
        size = self.nbytes()
        text += f", {size[0] / 1e6:.2f} → {size[1] / 1e6:.2f} MB of weights"
        times = self.seconds()
        if times[0]:
            text += f", {1e3 * times[0]:.2f} → {1e3 * times[1]:.2f} ms in these layers ({times[0] / times[1]:.2f}x faster)"
        return text

    def notes(self) -> list[str]:
        """One line per remark, with the layers that it is about."""
        about: dict[str, list[str]] = {}
        for r in self.layers:
            if r.reason:
                about.setdefault(r.reason, []).append(r.name or "(the model)")
        return [*self.remarks, *(f"{', '.join(names)}: {reason}" for reason, names in about.items())]

    def to_html(
        self,
        path: str | os.PathLike[str],
        model: nn.Module | None = None,
        *,
        layers: Sequence[str] | None = None,
        points: Any = (),
    ) -> None:
        """Write one self-contained HTML file: totals, a sortable table, pictures where matplotlib is installed.

        Args:
            path: the file.
            model: the converted model, to show its dictionaries and how its filters use them.
            layers: names of the layers to show so; by default the lookup layers, up to twelve.
            points: of :func:`lcnn_compile.learning.sweep`, to show the Pareto curve.

        Raises:
            LcnnError: if the file cannot be written, or a name is no lookup layer of the model.
        """
        from lcnn_compile.report.html import write_html  # a faster start: jinja2

        write_html(self, path, model, layers, points)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a picture (.png, .svg or .pdf): error, multiply-adds and, where measured, time of every layer.

        Needs matplotlib (the extra ``plot``).

        Raises:
            LcnnError: if matplotlib is not installed, or the file cannot be written.
        """
        save_figure(layers_figure(self), path)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield report_table(self, options.max_width)
        yield from (Text(note, style="dim") for note in self.notes())
        yield Text(self.summary())

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=110).print(self)
        return out.getvalue()
