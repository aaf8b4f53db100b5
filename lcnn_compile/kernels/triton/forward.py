"""The forward pass on a GPU: S of all images, or of as many as stay in the cache, their lookups, and on to the next."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lcnn_compile.kernels.arguments import Epilogue
from lcnn_compile.kernels.triton.dictionary import DictionaryConfig, empty_planes, launch_dictionary
from lcnn_compile.kernels.triton.grouped import GroupedConfig, launch_grouped
from lcnn_compile.kernels.triton.lookup import LookupConfig, launch_lookup
from lcnn_compile.kernels.triton.pack import INT32, Packed, Sizes
from lcnn_compile.kernels.triton.permute import launch_permute

CHUNK = 24 << 20
"""Bytes of S formed before they are read, so that they are still in the second-level cache; half of an H100's."""
WHOLE = 2**40
"""More bytes than S ever has. The larger launches have been worth more than the cache on an H100, most often."""


class ForwardConfig(NamedTuple):
    """How one layer runs: both kernels' block sizes, and the bytes of S that are formed before they are read."""

    dictionary: DictionaryConfig
    lookups: LookupConfig | GroupedConfig
    chunk: int


def images_at_once(x: Tensor, planes: int, where: Sizes, chunk: int) -> int:
    """Images whose S takes at most ``chunk`` bytes and offsets of 32 bits; at least one."""
    image = where.image(planes)
    return max(1, min(x.shape[0], chunk // (image * x.element_size()), (INT32 - 1) // image))


def precision(dtype: torch.dtype) -> str:
    """How matrix units multiply: float32 as TF32 where torch allows it for convolutions, else as three TF32 products."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "tf32x3"  # type: ignore[attr-defined]


def launch_lookups(
    s: Tensor,
    weight: Packed,
    y: Tensor,
    epilogue: Epilogue,
    where: Sizes,
    digits: str,
    config: LookupConfig | GroupedConfig,
) -> None:
    """Write y from S of as many images, whatever the group size and the order of its filters."""
    if isinstance(config, LookupConfig):
        launch_lookup(s, weight, y, epilogue, where, config)
        return
    taps = weight.taps
    if taps.ordered or y.stride(1) != 1:
        launch_grouped(s, weight, y, epilogue, where, digits, config)
        return
    shape = (y.shape[0], taps.filters.shape[0] * weight.group_size, *y.shape[2:])
    t = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last)
    grouped = weight._replace(taps=taps._replace(ordered=True))
    launch_grouped(s, grouped, t, Epilogue(None, None, "none", False), where, digits, config)
    launch_permute(t, taps.places, y, epilogue)


def run(
    x: Tensor,
    y: Tensor,
    weight: Packed,
    groups: int,
    epilogue: Epilogue,
    where: Sizes,
    config: ForwardConfig,
) -> Tensor:
    """Write y [N, n, H, W], contiguous or channels_last, and return it."""
    planes = weight.dictionary.shape[0]
    image = where.image(planes)
    chunk = images_at_once(x, planes, where, config.chunk)
    digits = precision(x.dtype)
    room = empty_planes(x, planes, chunk, where)
    for first in range(0, x.shape[0], chunk):
        part = slice(first, first + chunk)
        target = y[part]
        s = room[: target.shape[0] * image]
        launch_dictionary(x[part], weight.dictionary, s, groups, where, digits, config.dictionary)
        residual = None if epilogue.residual is None else epilogue.residual[part]
        tail = epilogue._replace(residual=residual)
        launch_lookups(s, weight, target, tail, where, digits, config.lookups)
    return y
