"""Which block sizes a layer runs with: measured on its first call, remembered on disk, guessed where nothing can be measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton.errors import TritonError

from lcnn_compile.kernels.store import known, remember
from lcnn_compile.kernels.triton_dictionary import DictionaryConfig, empty_planes, input_vector, launch_dictionary
from lcnn_compile.kernels.triton_forward import CHUNK, ForwardConfig, launch_lookups, precision, run
from lcnn_compile.kernels.triton_fused import FusedConfig, band_of
from lcnn_compile.kernels.triton_grouped import GroupedConfig
from lcnn_compile.kernels.triton_lookup import LookupConfig
from lcnn_compile.kernels.triton_pack import Epilogue, Geometry, Packed, padded_group
from lcnn_compile.kernels.triton_store import may_measure, milliseconds, store_of

T = TypeVar("T")


ROOMS = ((128 << 10, 2), (256 << 10, 1))
"""Bytes of S of a fused program and programs per multiprocessor; on an H100 they too fill half of the cache."""


def dictionary_configs(size: int, element_size: int) -> list[DictionaryConfig]:
    """Configurations for a dictionary of ``size`` vectors, the safest first."""
    vectors = min(128, max(16, 1 << (size - 1).bit_length()))
    if element_size == 4:
        return [
            DictionaryConfig(min(vectors, 64), 32, 128, 8, 3),
            DictionaryConfig(min(vectors, 32), 32, 128, 4, 3),
            DictionaryConfig(min(vectors, 64), 16, 64, 4, 4),
        ]
    return [
        DictionaryConfig(vectors, 32, 128, 8, 4),
        DictionaryConfig(vectors, 64, 128, 8, 3),
        DictionaryConfig(min(vectors, 64), 32, 64, 4, 4),
    ]


def lookup_configs(element_size: int) -> list[LookupConfig]:
    """Configurations where g = 1: many small programs, or few large ones that keep S in their own cache."""
    lanes = 16 // element_size
    return [
        # A fourth tap in flight makes Triton 3.6 spill float32.
        LookupConfig(8, 64 * lanes, 1, 3 if element_size == 4 else 4, 4),
        LookupConfig(4, 128 * lanes, 1, 4, 4),
        LookupConfig(32, 32 * lanes, 8, 4, 8),
        LookupConfig(16, 32 * lanes, 16, 4, 8),
    ]


def grouped_configs(size: int, element_size: int) -> list[GroupedConfig]:
    """Configurations for groups of ``size`` filters: a group per program, or several that find S in their own cache.

    That cache is what shared memory leaves: fewer stages keep more of S in it.
    """
    if element_size == 4:
        return [GroupedConfig(16, 128, 1, 4, 4), GroupedConfig(32, 64, 1, 4, 4), GroupedConfig(16, 128, 8, 4, 4)]
    if padded_group(size) < 64:
        return [
            GroupedConfig(32, 128, 1, 4, 4),
            GroupedConfig(32, 256, 1, 4, 4),
            GroupedConfig(32, 256, 16, 8, 4),
            GroupedConfig(64, 128, 4, 4, 4),
            GroupedConfig(32, 256, 32, 8, 2),
        ]
    return [
        GroupedConfig(32, 128, 1, 4, 4),
        GroupedConfig(64, 128, 1, 4, 4),
        GroupedConfig(64, 256, 1, 8, 4),
        GroupedConfig(64, 128, 4, 4, 4),
        GroupedConfig(32, 256, 8, 8, 2),
    ]


def fused_config(
    dictionary: DictionaryConfig, lookups: LookupConfig | GroupedConfig, element_size: int, room: int, programs: int
) -> FusedConfig:
    """Both stages in one program: S takes smaller blocks, as registers hold the state of both."""
    vectors = min(dictionary.block_vectors, 128 // element_size)
    return FusedConfig(DictionaryConfig(vectors, 32, 64, lookups.warps, 2), lookups, room, programs)


def _candidates(x: Tensor, weight: Packed, groups: int) -> tuple[list[DictionaryConfig], list[Any]]:
    size = x.element_size()
    first = dictionary_configs(weight.dictionary.shape[0] // groups, size)
    second = lookup_configs(size) if weight.group_size == 1 else grouped_configs(weight.group_size, size)
    return first, list(second)


def guess(x: Tensor, weight: Packed, groups: int) -> ForwardConfig:
    """The configuration that is fair everywhere."""
    first, second = _candidates(x, weight, groups)
    return ForwardConfig(first[0], second[0], CHUNK)


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Median time of a launch; infinite where the configuration does not compile or fit this device."""
    try:
        return milliseconds(call, device)
    except torch.OutOfMemoryError:
        raise
    except (TritonError, RuntimeError):
        return float("inf")


def _fastest(configs: Iterable[T], launch: Callable[[T], object], device: torch.device) -> T:
    return min(configs, key=lambda config: _milliseconds(lambda: launch(config), device))


def measure(
    x: Tensor, y: Tensor, weight: Packed, groups: int, epilogue: Epilogue, where: Geometry
) -> ForwardConfig | FusedConfig:
    """The fastest configuration for this call; overwrites y. S by its kernel alone, lookups right after it, then whole calls by chunk."""
    first, second = _candidates(x, weight, groups)
    planes = weight.dictionary.shape[0]
    images = max(1, min(x.shape[0], CHUNK // (where.image(planes) * x.element_size())))
    s = empty_planes(x, planes, images, where)
    part, target = x[:images], y[:images]
    tail = epilogue if epilogue.residual is None else epilogue._replace(residual=epilogue.residual[:images])
    digits = precision(x.dtype)
    dictionary = _fastest(first, lambda c: launch_dictionary(part, weight.dictionary, s, groups, where, digits, c), x.device)

    def launch(config: LookupConfig | GroupedConfig) -> None:
        launch_dictionary(part, weight.dictionary, s, groups, where, digits, dictionary)
        launch_lookups(s, weight, target, tail, where, digits, config)

    lookups = _fastest(second, launch, x.device)
    whole: list[ForwardConfig | FusedConfig] = [ForwardConfig(dictionary, lookups, CHUNK)]
    if images < x.shape[0]:
        whole.append(ForwardConfig(dictionary, lookups, 2**40))
    for room, programs in ROOMS:
        if band_of(where, x.shape[0], planes, room // x.element_size()) is not None:
            whole.append(fused_config(dictionary, lookups, x.element_size(), room, programs))
    return _fastest(whole, lambda config: run(x, y, weight, groups, epilogue, where, config), x.device)


def candidates(
    x: Tensor, y: Tensor, weight: Packed, groups: int, epilogue: Epilogue, where: Geometry
) -> list[Callable[[], object]]:
    """Launches of every kernel that :func:`measure` may try for this call, to have them compiled before."""
    first, second = _candidates(x, weight, groups)
    forms: list[ForwardConfig | FusedConfig] = [ForwardConfig(dictionary, second[0], 2**40) for dictionary in first]
    forms += [ForwardConfig(first[0], lookups, 2**40) for lookups in second[1:]]
    for room, programs in ROOMS:
        if band_of(where, x.shape[0], weight.dictionary.shape[0], room // x.element_size()) is not None:
            forms += [fused_config(*pair, x.element_size(), room, programs) for pair in product(first, second)]
    return [partial(run, x, y, weight, groups, epilogue, where, form) for form in forms]


def _stored(config: ForwardConfig | FusedConfig) -> list[Any]:
    return [list(part) if isinstance(part, tuple) else part for part in config]


def _restored(stored: list[Any], group_size: int) -> ForwardConfig | FusedConfig:
    first, second, *rest = stored
    form = LookupConfig if group_size == 1 else GroupedConfig
    blocks = (DictionaryConfig(*first), form(*second))
    return ForwardConfig(*blocks, *rest) if len(rest) == 1 else FusedConfig(*blocks, *rest)


_chosen: dict[tuple[Any, ...], ForwardConfig | FusedConfig] = {}


def configuration(
    x: Tensor, y: Tensor, weight: Packed, groups: int, epilogue: Epilogue, where: Geometry
) -> ForwardConfig | FusedConfig:
    """The configuration for this call; the first of its kind on a device measures, where it can.

    Calls whose number of pixels has as many bits are of one kind, so images of any size need few measurements; nor does the
    epilogue matter.
    """
    taps = weight.taps
    pixels = (x.shape[0] * where.out_height * where.out_width).bit_length()
    sizes = (weight.dictionary.shape, groups, taps.filters.shape, taps.longest, taps.ordered, pixels)
    vectors = (input_vector(x, where), epilogue.flags(y)["VEC"], y.stride(3) == 1)
    key = (x.device, x.dtype, precision(x.dtype), *sizes, where.kernel_width, where.stride, where.dilation, *vectors)
    found = _chosen.get(key)
    if found is not None:
        return found
    if not x.is_cuda:
        return guess(x, weight, groups)
    path, name = store_of(x.device), repr(tuple(str(part) for part in key[1:]))
    stored = known(path).get(name)
    if stored is not None:
        found = _restored(stored, weight.group_size)
    elif may_measure(x.device):
        found = measure(x, y, weight, groups, epilogue, where)
        remember(path, name, _stored(found))
    else:
        return guess(x, weight, groups)
    _chosen[key] = found
    return found
