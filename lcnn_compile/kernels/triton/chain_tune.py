"""Which way a chain runs: one kernel for convolution and product or one for each, by Triton or by cuDNN; measured at its first call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.errors import TritonError

from lcnn_compile.kernels.prepared import Prepared
from lcnn_compile.kernels.reference import output_size
from lcnn_compile.kernels.store import known, remember
from lcnn_compile.kernels.triton.chain import ChainConfig, Tail, Window, four_channels, launch_chain
from lcnn_compile.kernels.triton.chain_pack import unpack_weight
from lcnn_compile.kernels.triton.forward import precision
from lcnn_compile.kernels.triton.store import may_measure, milliseconds, store_of

SHARED, LARGE = 96 << 10, 220 << 10
"""Bytes of shared memory that a program of four warps and a larger one may take; a GPU that has less refuses and the plan loses."""
BLOCKS = {
    64: ((64, 64, 4, 4), (128, 64, 4, 4)),
    128: ((64, 128, 4, 4), (128, 128, 8, 3), (128, 128, 4, 4)),
    256: ((64, 128, 4, 4), (64, 256, 8, 3), (128, 256, 8, 3)),
}
"""Pixels, filters, warps and stages that are tried in half precision for up to so many filters, the safest first."""
BLOCKS_32 = ((64, 32, 4, 3), (64, 64, 4, 3))


class Plan(NamedTuple):
    """How a call runs.

    Attributes:
        first: what forms the convolution; None: cuDNN.
        apart: whether the 1x1 product has a kernel of its own, so that y is written in any case.
        second: what forms the product then; None: cuDNN.
    """

    first: ChainConfig | None
    apart: bool = False
    second: ChainConfig | None = None


class Call(NamedTuple):
    """One call of the operator, checked: the input, its packed weight, what is wanted of ``shape`` (that of y) and of k channels."""

    x: Tensor
    weight: Tensor
    window: Window
    tail: Tail
    shape: tuple[int, int, int, int]
    keep: bool
    next_channels: int

    def empty(self, channels: int) -> Tensor:
        """Room for an output of so many channels."""
        shape = (self.shape[0], channels, *self.shape[2:])
        return torch.empty(shape, dtype=self.x.dtype, device=self.x.device, memory_format=torch.channels_last)


_dense_weight = Prepared(lambda weight, *sizes: unpack_weight(weight, *sizes).contiguous(memory_format=torch.channels_last))
_dense_next = Prepared(lambda matrix, n, k: matrix[:n, :k].t()[:, :, None, None].contiguous(memory_format=torch.channels_last))
_bias = Prepared(lambda bias, n: bias[:n].clone())


def _rows(weight: Tensor, kernel_rows: int, numbers: int, block: int) -> Tensor:
    """[kh·block, n′]: each row of the window, ``numbers`` side by side in memory, filled up to ``block``."""
    return F.pad(weight.view(kernel_rows, numbers, -1), (0, 0, 0, block - numbers)).flatten(0, 1).contiguous()


def _narrow_rows(weight: Tensor, channels: int, kernel: tuple[int, int], more: int, block: int) -> Tensor:
    """The same for an input of four channels, of which the weight knows fewer, and ``more`` columns of zeros before the window."""
    taps = weight.view(*kernel, -1, weight.shape[1])[:, :, :channels]
    taps = F.pad(taps, (0, 0, 0, 4 - channels, more, 0)).flatten(1, 2)
    return F.pad(taps, (0, 0, 0, block - taps.shape[1])).flatten(0, 1).contiguous()


_row_weight, _narrow_weight = Prepared(_rows), Prepared(_narrow_rows)


def _more_columns(call: Call) -> int:
    """Columns of zeros before a window over four channels, so that it begins at a multiple of 16 bytes."""
    return call.window.first[1] % 2 if call.window.stride[1] % 2 == 0 else 0


def _narrow(call: Call) -> int:
    """Numbers in a row of the window, a power of two, where the input has so few channels that a row is best one step; else 0."""
    if call.x.shape[1] > 4 or call.window.kernel[1] == 1 or call.window.dilation[1] > 1 or call.x.element_size() == 4:
        return 0
    row = 1 << (4 * (call.window.kernel[1] + _more_columns(call)) - 1).bit_length()
    return max(16, row) if row <= 128 else 0


def configs(channels: int, filters: int, both: bool, row: int, item: int) -> Iterator[ChainConfig]:
    """Block sizes for C′ channels and n′ filters, the safest first; ``both``: the product too; ``row``: kw where rows may be steps."""
    depth = next(size for size in ((32, 16) if item == 4 else (64, 32, 16)) if channels % size == 0)
    steps = [(depth, False)]
    whole = 1 << (channels * row - 1).bit_length()
    if row > 1 and item < 4 and whole <= 128:
        steps.append((whole, True))
    blocks = BLOCKS_32 if item == 4 else BLOCKS[64 if filters <= 64 else 128 if filters % 256 else 256]
    for pixels, columns, warps, stages in blocks:
        columns = min(columns, filters)
        if filters % columns or (both and (filters > 256 or (filters > columns and warps == 4 and columns >= 128))):
            continue  # of the latter, the first are slow and the others spill
        for size, is_row in steps:
            deep = 2 if size > 64 else stages
            room = item * (deep * size * (pixels + columns) + pixels * columns)
            if room <= (LARGE if warps == 8 or columns >= 128 else SHARED):
                yield ChainConfig(pixels, columns, size, warps, deep, is_row)


def narrow_configs(row: int, filters: int) -> Iterator[ChainConfig]:
    """Block sizes where a row of a window over few channels, ``row`` numbers, is one step."""
    columns = min(64, filters)
    for pixels, warps, stages in ((64, 4, 4), (128, 4, 4), (128, 4, 3), (256, 8, 3)):
        yield ChainConfig(pixels, columns, row, warps, stages, True)


def plans(call: Call) -> list[Plan]:
    """Every way to run a call that may be fastest, the safest first, each once."""
    window, next = call.window, call.tail.next
    channels, filters = call.weight.shape[0] // (window.kernel[0] * window.kernel[1]), call.weight.shape[1]
    item = call.x.element_size()
    row = window.kernel[1] if window.dilation[1] == 1 and channels == call.x.shape[1] else 1
    narrow = _narrow(call)
    alone: list[ChainConfig | None] = list(
        narrow_configs(narrow, filters) if narrow else configs(channels, filters, False, row, item)
    )
    if _cudnn_can(call):
        alone.append(None)
    if next is None:
        return list(dict.fromkeys(map(Plan, alone)))
    products: list[ChainConfig | None] = [*list(configs(filters, next.shape[1], False, 1, item))[:1], None]
    found = [
        Plan(config) for config in (narrow_configs(narrow, filters) if narrow else configs(channels, filters, True, row, item))
    ]
    found += [Plan(config, True, product) for config in alone for product in products]
    return list(dict.fromkeys(found))


def _cudnn_can(call: Call) -> bool:
    """Whether cuDNN has convolution and epilogue in one call: padding alike on both sides, a ReLU after the residual, a bias."""
    tail, window = call.tail, call.window
    (top, left), size = window.first, tuple(call.x.shape[2:])
    if output_size(size, window.kernel, window.stride, (top, top, left, left), window.dilation) != call.shape[2:]:
        return False
    plain = tail.activation == "none" and tail.residual is None
    fused = tail.activation == "relu" and tail.bias is not None and (tail.residual is None or not tail.residual_last)
    return call.x.is_cuda and (plain or fused)


def _by_cudnn(call: Call) -> Tensor:
    tail, window, n = call.tail, call.window, call.shape[1]
    weight = _dense_weight((call.weight,), call.x.shape[1], n, window.kernel)
    bias = tail.bias if tail.bias is None or tail.bias.shape[0] == n else _bias((tail.bias,), n)
    settings = (window.stride, window.first, window.dilation, 1)
    if tail.activation == "none":
        y = F.conv2d(call.x, weight, bias, *settings)
    elif tail.residual is None:
        y = torch.ops.aten.cudnn_convolution_relu(call.x, weight, bias, *settings)
    else:
        y = torch.ops.aten.cudnn_convolution_add_relu(call.x, weight, tail.residual, 1.0, bias, *settings)
    return y.contiguous(memory_format=torch.channels_last)


def _by_triton(call: Call, config: ChainConfig, keep: bool, product: bool) -> tuple[Tensor | None, Tensor | None]:
    y = call.empty(call.shape[1]) if keep else None
    s = call.empty(call.next_channels) if product else None
    x, weight, window = call.x, call.weight, call.window
    kh, kw = window.kernel
    if config.row and _narrow(call):
        more, (top, left) = _more_columns(call), window.first
        weight = _narrow_weight((weight,), x.shape[1], window.kernel, more, config.block_channels)
        x, window = four_channels(x), window._replace(kernel=(kh, kw + more), first=(top, left + more))
    elif config.row:
        weight = _row_weight((weight,), kh, kw * x.shape[1], config.block_channels)
    digits = precision(x.dtype)
    launch_chain(x, weight, window, call.tail, y, s, call.shape[1], call.shape[2:], digits, config)
    return y, s


def run(call: Call, plan: Plan) -> tuple[Tensor | None, Tensor | None]:
    """y and the product; None for y where it is not wanted and was not needed, and for a product that there is not."""
    next = call.tail.next
    if not plan.apart and plan.first is not None:
        return _by_triton(call, plan.first, call.keep, next is not None)
    y = _by_cudnn(call) if plan.first is None else _by_triton(call, plan.first, True, False)[0]
    if next is None:
        return y, None
    assert y is not None
    if plan.second is None:
        return y, F.conv2d(y, _dense_next((next,), call.shape[1], call.next_channels))
    s = call.empty(call.next_channels)
    point, nothing = Window((1, 1), (1, 1), (0, 0), (1, 1)), Tail(None, None, "none", False, None)
    launch_chain(y, next, point, nothing, s, None, call.next_channels, call.shape[2:], precision(y.dtype), plan.second)
    return y, s


def _milliseconds(call: Call, plan: Plan) -> float:
    """Of a call; infinite where the plan does not compile or fit this device."""
    try:
        return milliseconds(partial(run, call, plan), call.x.device)
    except torch.OutOfMemoryError:
        raise
    except (TritonError, RuntimeError):
        return float("inf")


def _restored(stored: list[Any]) -> Plan:
    first, apart, second = stored
    return Plan(None if first is None else ChainConfig(*first), apart, None if second is None else ChainConfig(*second))


_chosen: dict[tuple[Any, ...], Plan] = {}


def plan_for(call: Call) -> Plan:
    """The fastest plan for calls of this kind: measured at the first of them, where that is possible, and kept on disk.

    Batches whose sizes have as many bits are of one kind.
    """
    x, tail = call.x, call.tail
    epilogue = (tail.bias is None, tail.residual is None, tail.activation, tail.residual_last)
    what = (call.shape[1:], call.keep, call.next_channels if tail.next is not None else 0)
    key = (x.device, x.dtype, precision(x.dtype), x.shape[0].bit_length(), tuple(x.shape[1:]), call.window, epilogue, what)
    found = _chosen.get(key)
    if found is not None:
        return found
    choices = plans(call)
    if not x.is_cuda:
        return choices[0]
    path, name = store_of(x.device), f"chain {tuple(str(part) for part in key[1:])}"
    stored = known(path).get(name)
    if stored is not None:
        found = _restored(stored)
    elif may_measure(x.device):
        times = {plan: _milliseconds(call, plan) for plan in choices}
        found = min(times, key=lambda plan: times[plan])
        remember(
            path,
            name,
            [
                None if found.first is None else list(found.first),
                found.apart,
                None if found.second is None else list(found.second),
            ],
        )
    else:
        return choices[0]
    _chosen[key] = found
    return found


def chosen() -> dict[str, str]:
    """The plans chosen so far in this process, by what tells their calls apart."""
    return {" ".join(str(part) for part in key[1:]): str(plan) for key, plan in _chosen.items()}


def launches(call: Call) -> list[Callable[[], object]]:
    """Calls that together launch every kernel of the plans, to have them compiled before."""
    chosen = [plan for plan in plans(call) if plan.first is not None and not (plan.apart and plan.second is None)]
    seen: set[Any] = set()
    wanted: list[Callable[[], object]] = []
    for plan in chosen:
        parts = {(plan.first, plan.apart), plan.second}
        if parts - seen:
            seen |= parts
            wanted.append(partial(run, call, plan))
    return wanted
