"""Layers, weights and networks made from a few plain values, which a failing test prints."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcnn_compile.lookup import LookupWeight, filter_table

LAYOUTS = ("contiguous", "channels_last", "strided", "broadcast", "transposed")
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Identity)
JOINS = ("", "shared", "functional", "branch", "concatenate", "pool", "wide pool")
HEADS = ("mean", "amax", "adaptive", "flatten")


def normal(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values of a seed, the same in every dtype up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values ([N, C, H, W]) in another layout in memory, NaN between them where there is room.

    "broadcast" repeats the first image and channel for all of them, with strides of zero.
    """
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "broadcast":
        return x[:1, :1].expand(x.shape)
    return x


@dataclass(frozen=True)
class ConvCase:
    """A convolution and an input that fits it.

    Attributes:
        arguments: keyword arguments of ``nn.Conv2d``.
        shape: of the input.
        seed: of all values.
        layout: of the input, one of LAYOUTS.
        dtype: of both.
    """

    arguments: dict[str, Any]
    shape: tuple[int, ...]
    seed: int = 0
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32

    @cached_property
    def conv(self) -> nn.Conv2d:
        """The layer."""
        conv = nn.Conv2d(**self.arguments, dtype=self.dtype)
        with torch.no_grad():
            for number, parameter in enumerate(conv.parameters(), 1):
                parameter.copy_(normal(self.seed + number, tuple(parameter.shape), self.dtype))
        return conv

    @cached_property
    def inputs(self) -> Tensor:
        """[N, m, H, W]."""
        return laid_out(normal(self.seed, self.shape, self.dtype), self.layout)


def random_lookup_weight(
    in_channels: int,
    out_channels: int,
    kernel_size: tuple[int, int],
    *,
    dictionary_size: int,
    group_size: int,
    taps: int,
    groups: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> LookupWeight:
    """A lookup weight with 0 to ``taps`` different taps per filter group and filters in random order."""
    generator = torch.Generator().manual_seed(seed)
    per_group, columns = out_channels // groups, dictionary_size * kernel_size[0] * kernel_size[1]
    order = torch.cat([torch.randperm(per_group, generator=generator) + i * per_group for i in range(groups)])
    filters = filter_table(out_channels, group_size, groups, order)
    counts = torch.randint(0, min(columns, taps) + 1, (filters.shape[0],), generator=generator)
    chosen = torch.cat([torch.randperm(columns, generator=generator)[: int(c)] for c in counts]).to(torch.int32)
    members = (filters >= 0).repeat_interleave(counts, 0)
    coefficients = torch.randn(tuple(members.shape), generator=generator, dtype=torch.float64) * members
    dictionary = torch.randn((groups, dictionary_size, in_channels // groups), generator=generator, dtype=torch.float64)
    area = kernel_size[0] * kernel_size[1]
    return LookupWeight(
        dictionary=dictionary.to(dtype),
        coefficients=coefficients.to(dtype),
        indices=chosen // area,
        positions=chosen % area,
        offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32),
        filters=filters,
        kernel_size=kernel_size,
    )


class RandomNetwork(nn.Module):
    """A network of given steps.

    Each step is a convolution with batch norm before or after it and an activation, then, by ``join``, a module shared by
    all steps, a functional convolution on a parameter, a second branch added or concatenated, or pooling; then perhaps a
    residual addition. ``head`` says how pixels become numbers: one of HEADS.
    """

    def __init__(self, channels: int, steps: list[dict[str, Any]], head: str = "mean"):
        super().__init__()
        self.steps, self.reduction = steps, head
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.layers = nn.ModuleList(self._layer(channels, step) for step in steps)
        self.shared = nn.Conv2d(channels, channels, 3, padding=1)
        self.narrow = nn.Conv2d(2 * channels, channels, 1)
        self.kernel = nn.Parameter(torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5)
        self.head = nn.Linear(channels, 4)

    def _layer(self, channels: int, step: dict[str, Any]) -> nn.Module:
        conv = nn.Conv2d(
            channels,
            channels,
            step.get("kernel", 3),
            padding="same",
            groups=2 if step["grouped"] else 1,
            bias=step["bias"],
            padding_mode=step.get("padding_mode", "zeros"),
        )
        parts: list[nn.Module] = [nn.BatchNorm2d(channels)] if step["norm_first"] else []
        parts += [conv, nn.BatchNorm2d(channels)] if step["norm"] else [conv]
        kind = ACTIVATIONS[step["activation"]]
        return nn.Sequential(*parts, kind() if kind is nn.Identity else kind(inplace=step["inplace"]))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] to [N, 4]."""
        x = self.stem(x)
        for step, layer in zip(self.steps, self.layers, strict=True):
            y = layer(x)
            if step["join"] == "shared":
                y = self.shared(y)
            elif step["join"] == "functional":
                y = F.conv2d(y, self.kernel, None, padding=1)
            elif step["join"] == "branch":
                y = y + self.shared(x)
            elif step["join"] == "concatenate":
                y = self.narrow(torch.cat([y, self.shared(x)], 1))
            elif step["join"] == "pool":
                x, y = F.avg_pool2d(x, 2, 1), F.max_pool2d(y, 2, 1)
            elif step["join"] == "wide pool":
                x, y = F.max_pool2d(x, (2, 3), 1, (0, 1)), F.avg_pool2d(y, (2, 3), 1, (0, 1))
            x = F.relu(x + y) if step["residual"] else y
        return self.head(self._numbers(F.dropout(x, training=self.training)))

    def _numbers(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C]."""
        if self.reduction == "amax":
            return x.amax((2, 3))
        if self.reduction == "adaptive":
            return F.adaptive_avg_pool2d(x, 1).flatten(1)
        if self.reduction == "flatten":
            return F.adaptive_max_pool2d(F.max_pool2d(x, 3, 2), 1).flatten(1)
        return x.mean((2, 3))


@dataclass(frozen=True)
class NetworkCase:
    """A network in evaluation mode, batch statistics drawn too, and an input that fits it.

    Attributes:
        channels, steps: arguments of :class:`RandomNetwork`.
        shape: of the input.
        seed: of all values.
        head: the third argument.
    """

    channels: int
    steps: list[dict[str, Any]]
    shape: tuple[int, int, int, int]
    seed: int = 0
    head: str = "mean"

    @cached_property
    def model(self) -> nn.Module:
        """The network."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = RandomNetwork(self.channels, self.steps, self.head).eval()
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.normal_(module.running_mean, std=0.3)  # type: ignore[arg-type]
                    nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
                    nn.init.uniform_(module.weight, 0.5, 1.5)
        return model

    @cached_property
    def inputs(self) -> Tensor:
        """[N, 3, H, W]."""
        return normal(self.seed, self.shape)
