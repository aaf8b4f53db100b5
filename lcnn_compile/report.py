"""The per-layer table of a conversion."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, overload

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text


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
        error: relative output error ‖y − ŷ‖² / ‖y − mean(y)‖² on calibration data; None where none was given.
        macs_before, macs_after: multiply-adds per sample; None where the layer's input size is not known.
        bytes_before, bytes_after: bytes of weight and bias.
        lowering: how it is computed: "lookup", "factored" or "dense".
        reason: why it stays dense, or a remark.
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


@dataclass(frozen=True)
class Report:
    """All layers of a conversion or of a dry run, in the order in which the model runs them."""

    layers: tuple[LayerReport, ...]
    title: str = "lcnn"

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

    def macs(self) -> tuple[int, int]:
        """Multiply-adds per sample before and after, over the layers whose input size is known."""
        known = [(r.macs_before, r.macs_after) for r in self.layers]
        return sum(before or 0 for before, _ in known), sum(after or 0 for _, after in known)

    def nbytes(self) -> tuple[int, int]:
        """Bytes of weights before and after."""
        return sum(r.bytes_before for r in self.layers), sum(r.bytes_after for r in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values."""
        return {"title": self.title, "layers": [asdict(layer) for layer in self.layers]}

    def to_json(self) -> str:
        """The report as a JSON object."""
        return json.dumps(self.to_dict())

    def summary(self) -> str:
        """One sentence: how many layers, multiply-adds and bytes."""
        before, after = self.macs()
        text = f"{len(self.replaced)} of {len(self.layers)} layers replaced"
        if before:
            text += (
                f", {before / 1e6:.1f} → {after / 1e6:.1f} million multiply-adds per sample ({before / max(after, 1):.2f}x fewer)"
            )
        size = self.nbytes()
        return f"{text}, {size[0] / 1e6:.2f} → {size[1] / 1e6:.2f} MB of weights"

    def table(self) -> Table:
        """A rich table, one row per layer."""
        table = Table(title=self.title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
        table.add_column("layer", overflow="fold", min_width=8)
        for heading in ("k", "taps", "g", "error", "MMACs", "fewer", "kB"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("lowering", no_wrap=True)
        for r in self.layers:
            macs = "" if r.macs_before is None else f"{r.macs_before / 1e6:.2f}"
            fewer = ""
            if r.replaced and r.macs_before and r.macs_after:
                macs += f" → {r.macs_after / 1e6:.2f}"
                fewer = f"{r.macs_before / r.macs_after:.1f}x"
            table.add_row(
                r.name or "(the model)",
                _cell(r.dictionary_size),
                "" if r.taps is None else f"{r.taps:g}",
                _cell(r.group_size),
                "" if r.error is None else f"{100 * r.error:.2f} %",
                macs,
                fewer,
                f"{r.bytes_before / 1e3:.0f}" + (f" → {r.bytes_after / 1e3:.0f}" if r.replaced else ""),
                r.lowering if r.replaced else "left dense",
            )
        return table

    def notes(self) -> list[str]:
        """One line per remark, with the layers that it is about."""
        about: dict[str, list[str]] = {}
        for r in self.layers:
            if r.reason:
                about.setdefault(r.reason, []).append(r.name or "(the model)")
        return [f"{', '.join(names)}: {reason}" for reason, names in about.items()]

    def __rich__(self) -> Group:
        return Group(self.table(), *(Text(note, style="dim") for note in self.notes()), Text(self.summary()))

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=110).print(self)
        return out.getvalue()


def _cell(value: object) -> str:
    return "" if value is None else str(value)
