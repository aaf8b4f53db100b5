"""What the benchmark on a GPU measures, the most wanted first, as plain data: a :class:`Job` is one thing that may fail alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lcnn_compile.config import LayerConfig

MODES = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
BATCHES = (64, 1, 8, 256)


@dataclass(frozen=True)
class Layer:
    """A 3x3 convolution with padding 1 on a square image of ``side`` pixels."""

    channels: int
    filters: int
    side: int
    stride: int = 1

    @property
    def name(self) -> str:
        """As in tables."""
        return f"{self.channels}->{self.filters}@{self.side}{'/2' if self.stride == 2 else ''}"

    def conv(self) -> nn.Conv2d:
        """The dense layer, random."""
        return nn.Conv2d(self.channels, self.filters, 3, self.stride, 1).eval()

    def shape(self, batch: int) -> tuple[int, int, int, int]:
        """Of an input."""
        return batch, self.channels, self.side, self.side


@dataclass(frozen=True)
class Sizes:
    """Sizes of a lookup layer: dictionary, as a number or a share of the channels, taps per filter, and group size.

    ``shuffled``: filters are grouped in another order than channels lie, as they are where groups are found by similarity.
    """

    dictionary: float | int
    taps: int
    group: int
    shuffled: bool = False

    @property
    def name(self) -> str:
        """As in tables."""
        return f"g{self.group}/{self.taps}{'/shuffled' if self.shuffled else ''}"

    def config(self) -> LayerConfig:
        """For nine kernel positions."""
        return LayerConfig(dictionary_size=self.dictionary, sparsity=self.taps / 9, group_size=self.group, lowering="lookup")


NARROW, NARROW_SIZES = Layer(64, 128, 224), Sizes(10, 9, 1)
"""The layer on which an earlier port reached 0.04x of a dense convolution."""
WIDE = (
    Layer(256, 256, 56), Layer(512, 512, 28), Layer(512, 512, 14), Layer(256, 512, 28), Layer(256, 256, 14), Layer(512, 512, 7)
)  # fmt: skip
"""3x3 layers of VGG-16 and ResNet-18 with 256 channels and more."""
SIZES = (Sizes(0.25, 192, 64), Sizes(0.25, 144, 16), Sizes(0.25, 27, 1))
CPU_SIZES = Sizes(0.25, 54, 8)
"""What ``convert`` gives without being asked."""
SHUFFLED = Sizes(0.25, 192, 64, True)
CHECKED = (
    (Layer(64, 64, 15), Sizes(0.25, 27, 1)),
    (Layer(64, 128, 28, 2), Sizes(0.25, 27, 1)),
    (Layer(64, 128, 7), Sizes(0.25, 96, 16)),
    (Layer(96, 192, 30, 2), Sizes(0.5, 120, 64)),
    (Layer(33, 40, 13), Sizes(7, 20, 8)),
    (Layer(32, 48, 9), Sizes(9, 20, 2)),
    (Layer(32, 48, 9), Sizes(9, 40, 16, True)),
)
CHECKED_BATCH = 5


@dataclass(frozen=True)
class Job:
    """One measurement: its kind, a name, the most seconds it may take, and the arguments of the function for its kind.

    ``keep`` is how many seconds must be left for more wanted jobs that come later in the list.
    """

    kind: str
    name: str
    seconds: float
    arguments: dict[str, Any] = field(default_factory=dict)
    keep: float = 0.0


def layer_job(
    layer: Layer, sizes: tuple[Sizes, ...], mode: str, format: str, batch: int, autotune: bool, keep: float = 0.0
) -> Job:
    """Time one layer, dense and at each of ``sizes``; ``autotune``: against torch.compile(mode="max-autotune") too."""
    arguments = {"layer": layer, "settings": sizes, "mode": mode, "format": format, "batch": batch, "autotune": autotune}
    return Job("layer", f"{layer.name} b{batch} {mode} {format}", 100, arguments, keep)


NETWORKS_NEED = 130.0
"""Seconds for the two networks in float16."""


def jobs() -> Iterator[Job]:
    """Everything, the most wanted first: values, the targets' cases with every baseline, networks, then the whole table."""
    for layer, sizes in CHECKED:
        for mode in MODES:
            yield Job("check", f"{layer.name} {sizes.name} {mode}", 60, {"layer": layer, "sizes": sizes, "mode": mode})
    yield Job("ceilings", "copy and matrix products", 30)
    first = [
        layer_job(NARROW, (NARROW_SIZES,), "float32", "contiguous", 1, True),
        *(layer_job(layer, SIZES, "float32", "contiguous", 64, False, NETWORKS_NEED) for layer in WIDE),
        *(layer_job(layer, SIZES, "float16", "channels_last", 64, True, NETWORKS_NEED) for layer in WIDE),
        layer_job(NARROW, (NARROW_SIZES,), "float32", "channels_last", 1, False, NETWORKS_NEED),
    ]
    yield from first
    for mode in ("float16", "float32"):
        for network in ("resnet18", "vgg16"):
            arguments = {"network": network, "mode": mode, "batch": 64, "settings": SIZES if mode == "float16" else SIZES[2:]}
            yield Job("network", f"{network} b64 {mode}", 400, arguments)
    seen = {job.name for job in first}
    for layer in WIDE[:3]:
        job = layer_job(layer, (CPU_SIZES, SHUFFLED), "float16", "channels_last", 64, False)
        yield replace(job, name=f"{job.name} as converted")
    for batch in BATCHES:
        for layer in WIDE[:3]:
            for mode in MODES:
                for format in FORMATS:
                    job = layer_job(layer, SIZES[:1], mode, format, batch, batch in (1, 64))
                    if job.name not in seen:
                        yield job


def rehearsal(job: Job) -> Job:
    """The same job at sizes that a CPU computes in no time, to try the programme itself."""
    small = dict(job.arguments)
    if "layer" in small:
        layer = small["layer"]
        small["layer"] = replace(layer, channels=min(layer.channels, 32), filters=min(layer.filters, 64), side=min(layer.side, 6))
    small.update({"batch": min(small["batch"], 2)} if "batch" in small else {})
    small.update({"network": "small", "side": 32} if "network" in small else {})
    return replace(job, arguments=small, keep=0.0)
