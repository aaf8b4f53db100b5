"""The calls of ``lcnn::chain`` that a network makes in half precision, found without a GPU, and their kernels compiled before."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from lcnn_compile.bench.gpu.cases import Sizes
from lcnn_compile.bench.networks import NETWORKS, RESOLUTION, build
from lcnn_compile.bench.settings import random_lookup
from lcnn_compile.kernels.triton.chain_operator import chain
from lcnn_compile.kernels.triton.chain_pack import pack_bias, pack_next, pack_weight
from lcnn_compile.modules import LookupModule
from lcnn_compile.passes import chain_lookups, fold_batch_norm, fold_factors, fuse_epilogues, to_functional

SIZES = Sizes(0.25, 192, 64)
"""Of every 3x3 layer: the time of a chain does not depend on taps."""


CHECKED: tuple[tuple[int, int, int, tuple[int, int], int, int, bool], ...] = (
    (16, 64, 16, (15, 13), 3, 1, True),
    (32, 128, 32, (14, 9), 3, 2, True),
    (64, 256, 64, (7, 7), 3, 1, False),
    (128, 512, 128, (7, 5), 3, 1, True),
    (3, 64, 0, (30, 22), 7, 2, False),
    (3, 24, 16, (9, 14), 3, 1, False),
    (33, 40, 7, (11, 6), 1, 1, True),
)
"""Channels, filters, channels of the product, size, kernel, stride and whether there is a residual, of calls with odd sizes."""


def wide(module: nn.Module) -> bool:
    """Whether a layer of a network gets lookups: 3x3, on 64 channels and more."""
    return isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.in_channels >= 64 and module.groups == 1


def with_lookups(model: nn.Module, sizes: Sizes = SIZES) -> nn.Module:
    """The model, changed: random lookups in every wide layer, to be run as lookups."""
    for name, module in list(model.named_modules()):
        if wide(module):
            assert isinstance(module, nn.Conv2d)
            layer = random_lookup(module, sizes.config()).to(module.weight.device, module.weight.dtype)
            model.set_submodule(name, layer)
    return model.eval()


class Pair(nn.Module):
    """Two 3x3 layers, each with its ReLU, between values that somebody else made and reads."""

    def __init__(self, channels: int = 64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, 1, 1), nn.ReLU(), nn.Conv2d(channels, channels, 3, 1, 1), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the same."""
        y: Tensor = self.layers(x)
        return y


def subject(network: str) -> tuple[nn.Module, tuple[int, int]]:
    """The dense model of that name, and channels and pixels of a side of its input; "pair 64@56": 64 channels, 56 pixels."""
    if network in NETWORKS:
        return build(network), (3, RESOLUTION)
    channels, side = (int(part) for part in network.removeprefix("pair ").split("@"))
    return Pair(channels).eval(), (channels, side)


class _Noting(fx.Interpreter):
    """Leaves examples on the nodes and keeps the calls."""

    def __init__(self, gm: fx.GraphModule):
        super().__init__(gm)
        self.calls: list[tuple[Any, ...]] = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            n.meta["example_value"] = value
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is chain:
            self.calls.append(args)
        return super().call_function(target, args, kwargs)


@torch.no_grad()
def graph_of(model: nn.Module, x: Tensor, device: str) -> fx.GraphModule:
    """The model's graph with its chains, as the backend forms it on a GPU; ``x`` is an input, on any device."""
    gm = to_functional(fx.symbolic_trace(model))
    _Noting(gm).run(x)
    gm = fuse_epilogues(fold_factors(fold_batch_norm(gm)))
    _Noting(gm).run(x)
    return chain_lookups(gm, device)


@lru_cache(maxsize=8)
def calls(network: str, batch: int, dtype: torch.dtype) -> list[Any]:
    """Every call of a network, or of "checks", on meta tensors, each kind once."""
    from lcnn_compile.kernels.triton.chain import Tail, Window  # needs Triton
    from lcnn_compile.kernels.triton.chain_tune import Call

    if network == "checks":
        return _checks(batch, dtype)
    model, (channels, side) = subject(network)
    model = with_lookups(model).to("meta", dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.empty(batch, channels, side, side, dtype=dtype, device="meta", memory_format=torch.channels_last)
    gm = graph_of(model, x, "meta")
    noting = _Noting(gm)
    with torch.no_grad():
        noting.run(x)
    found: dict[Any, Call] = {}
    for input, weight, bias, residual, next, n, k, kernel, stride, padding, dilation, activation, last, keep in noting.calls:
        window = Window(tuple(kernel), tuple(stride), (padding[0], padding[2]), tuple(dilation))
        size = tuple(
            (length + 2 * first - gap * (taps - 1) - 1) // step + 1
            for length, first, gap, taps, step in zip(input.shape[2:], window.first, dilation, kernel, stride, strict=True)
        )
        call = Call(input, weight, window, Tail(bias, residual, activation, last, next), (batch, n, *size), keep, k)
        kind = (tuple(input.shape), window, n, k, keep, bias is None, residual is None, activation)
        found.setdefault(kind, call)
    return list(found.values())


def _checks(batch: int, dtype: torch.dtype) -> list[Any]:
    from lcnn_compile.kernels.triton.chain import Tail, Window  # needs Triton
    from lcnn_compile.kernels.triton.chain_tune import Call

    found = []
    for channels, filters, k, size, kernel, stride, added in CHECKED:
        high, columns = ((length - 1) // stride + 1 for length in size)
        shape = (batch, filters, high, columns)
        x, residual = (
            torch.empty(form, dtype=dtype, device="meta", memory_format=torch.channels_last)
            for form in ((batch, channels, *size), shape)
        )
        weight, bias, matrix = (
            torch.empty(form, dtype=dtype, device="meta")
            for form in ((filters, channels, kernel, kernel), (filters,), (max(k, 1), filters))
        )
        window = Window((kernel, kernel), (stride, stride), (kernel // 2, kernel // 2), (1, 1))
        tail = Tail(pack_bias(bias), residual if added else None, "relu", False, pack_next(matrix) if k else None)
        found.append(Call(x, pack_weight(weight), window, tail, shape, True, k))
    return found


def compile_share(network: str, batch: int, dtype: torch.dtype, capability: int, part: int, parts: int) -> int:
    """Compile every ``parts``-th kernel, from ``part`` on, into Triton's cache on disk; how many failed."""
    from lcnn_compile.kernels.triton.ahead import compiling  # needs Triton
    from lcnn_compile.kernels.triton.chain_tune import launches

    torch.set_num_threads(1)
    tasks = [launch for call in calls(network, batch, dtype) for launch in launches(call)]
    failed = 0
    with compiling(capability):
        for launch in tasks[part::parts]:
            try:
                launch()
            except Exception:
                failed += 1  # too large for the device, say: the plan loses when it is measured
    return failed


def lookups_in(model: nn.Module) -> int:
    """How many layers are lookup layers."""
    return sum(isinstance(module, LookupModule) for module in model.modules())
