"""Bytes and operations of whole networks in half precision, counted: the least time of every layer, dense and as a chain.

Weights are read once, every other value is read and written as often as a kernel does that; what a cache keeps is not
credited. Beside the dense floor, where convolution and epilogue are one kernel, stands that of a compiler that adds a pass over
the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from lcnn_compile.bench.gpu.chains import graph_of, subject, with_lookups
from lcnn_compile.kernels.triton.chain_operator import chain
from lcnn_compile.passes.effects import Effects
from lcnn_compile.passes.fuse import fuse_epilogue
from lcnn_compile.passes.targets import CONV2D, example

ITEM = 2
"""Bytes of a number."""


class Ceilings(NamedTuple):
    """What a device reaches: bytes per second of a copy, operations per second of a matrix product."""

    copy: float
    matrix: float


@dataclass(frozen=True)
class Step:
    """One kernel, or one convolution of a compiler and the pass that follows it.

    Attributes:
        name: channels, filters, output side, kernel and stride.
        flop: operations.
        bytes: read and written.
        pass_bytes: of the pass after it that a compiler adds; 0 where there is none.
        lookups: whether it reads S.
        written: channels per output pixel that it writes.
    """

    name: str
    flop: int
    bytes: int
    pass_bytes: int = 0
    lookups: bool = False
    written: int = 0

    def seconds(self, ceilings: Ceilings, apart: bool = False) -> float:
        """The least time; ``apart``: with the pass."""
        least = max(self.bytes / ceilings.copy, self.flop / ceilings.matrix)
        return least + (self.pass_bytes / ceilings.copy if apart else 0.0)


def _name(channels: int, filters: int, shape: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...]) -> str:
    return f"{channels}->{filters}@{shape[2]} {kernel[0]}x{kernel[1]}{'/2' if stride[0] == 2 else ''}"


def _elements(node: Any) -> int:
    value = example(node) if isinstance(node, fx.Node) else None
    return 0 if value is None else value.numel()


class _Shapes(fx.Interpreter):
    """Leaves examples on the nodes."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            n.meta["example_value"] = value
        elif isinstance(value, tuple):
            n.meta["outputs"] = value
        return value


def _input(network: str, batch: int, lookups: bool) -> tuple[torch.nn.Module, Tensor]:
    model, (channels, side) = subject(network)
    model = with_lookups(model) if lookups else model
    x = torch.empty(batch, channels, side, side, dtype=torch.float16, device="meta", memory_format=torch.channels_last)
    return model.to("meta", torch.float16, memory_format=torch.channels_last), x  # type: ignore[call-overload]


@torch.no_grad()
def dense_steps(network: str, batch: int) -> list[Step]:
    """The convolutions of the dense network, batch norm folded."""
    model, x = _input(network, batch, False)
    gm = graph_of(model, x, "meta")
    effects = Effects(gm)
    for node in reversed(list(gm.graph.nodes)):
        if node.target in CONV2D:
            fuse_epilogue(gm, effects, node)
    steps = []
    for node in gm.graph.nodes:
        if node.target not in CONV2D:
            continue
        weight, y, source = (example(n) for n in (node.args[1], node, node.args[0]))
        assert weight is not None
        assert y is not None
        assert source is not None
        residual = _elements(node.kwargs.get("residual"))
        kernel, stride = tuple(weight.shape[2:]), tuple(node.args[3])
        # A 1x1 convolution with stride reads the pixels that it needs.
        read = source.numel() if kernel != (1, 1) else source.numel() // prod(stride)
        after = node.kwargs.get("activation", "none") != "none" or residual > 0
        steps.append(
            Step(
                _name(source.shape[1], y.shape[1], tuple(y.shape), kernel, stride),
                2 * y.numel() * weight[0].numel(),
                ITEM * (read + y.numel() + weight.numel() + residual),
                ITEM * 2 * y.numel() if after else 0,
                written=y.shape[1],
            )
        )
    return steps


@torch.no_grad()
def chain_steps(network: str, batch: int) -> list[Step]:
    """The calls of the chained network."""
    model, x = _input(network, batch, True)
    gm = graph_of(model, x, "meta")
    _Shapes(gm).run(x)
    steps = []
    for node in gm.graph.nodes:
        if node.target is not chain:
            continue
        input, weight, _, residual, next, n, k, kernel, stride, *_, keep = node.args
        y, s = node.meta["outputs"]
        source = example(input)
        assert source is not None
        pixels = s.numel() // k if k else y.numel() // n
        shape = tuple(s.shape if k else y.shape)
        read = source.numel() if tuple(kernel) != (1, 1) else source.numel() // prod(stride)
        taken = ITEM * (read + (y.numel() if keep else 0) + s.numel() + _elements(residual) + _elements(weight) + _elements(next))
        flop = 2 * pixels * n * (source.shape[1] * prod(kernel) + k)
        from_s = tuple(kernel) == (3, 3) and source.shape[1] not in (1, 3)
        name = _name(source.shape[1], n, shape, kernel, stride) + (f" +{k}" if k else "") + ("" if keep else ", no output")
        steps.append(Step(name, flop, taken, lookups=from_s, written=(n if keep else 0) + k))
    return steps


def middle_of_block(network: str = "resnet18", batch: int = 64) -> tuple[int, int]:
    """Bytes written and read between the two convolutions of a basic block without stride: dense with a fused epilogue, and as a chain."""
    dense = next(step for step in dense_steps(network, batch) if step.name == "64->64@56 3x3")
    chained = next(step for step in chain_steps(network, batch) if step.name == "16->64@56 3x3 +16, no output")
    pixels = batch * 56 * 56
    return 2 * ITEM * pixels * dense.written, 2 * ITEM * pixels * chained.written


def alone(step: Step, share: float = 0.25) -> tuple[Step, Step] | None:
    """The two steps of a dense 3x3 layer of 64 channels and more as lookups without neighbours, k a share of its channels."""
    channels, rest = step.name.split("->")
    filters, where = rest.split("@")
    c, n, k = int(channels), int(filters), int(int(channels) * share)
    if "3x3" not in where or c < 64:
        return None
    output = step.flop // (2 * 9 * c)
    source = output // n * (4 if where.endswith("/2") else 1)
    product = Step("product", 2 * source * c * k, ITEM * source * (c + k))
    return product, Step("lookups", 2 * output * 9 * k, ITEM * (source * k + output))


def cannot_win(steps: list[Step], ceilings: Ceilings) -> list[str]:
    """Names of layers whose lookups take at least as long as the dense layer, epilogues free, where neither neighbour helps."""
    found = []
    for step in steps:
        parts = alone(step)
        if parts is not None and sum(part.seconds(ceilings) for part in parts) >= step.seconds(ceilings):
            found.append(step.name)
    return list(dict.fromkeys(found))
