"""Which block sizes a layer runs with: measured on its first call, remembered on disk, guessed where nothing can be measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton.errors import TritonError

from lcnn_compile.kernels.arguments import Epilogue
from lcnn_compile.kernels.store import known, remember
from lcnn_compile.kernels.triton.dictionary import DictionaryConfig, empty_planes, input_vector, launch_dictionary
from lcnn_compile.kernels.triton.forward import CHUNK, WHOLE, ForwardConfig, images_at_once, launch_lookups, precision, run
from lcnn_compile.kernels.triton.grouped import GroupedConfig
from lcnn_compile.kernels.triton.lookup import LookupConfig
from lcnn_compile.kernels.triton.pack import Packed, Sizes, flags, padded_group
from lcnn_compile.kernels.triton.store import may_measure, milliseconds, store_of

T = TypeVar("T")


def dictionary_configs(size: int, element_size: int) -> list[DictionaryConfig]:
    """Configurations for a dictionary of ``size`` vectors, the safest first."""
    vectors = min(64, max(16, 1 << (size - 1).bit_length()))
    if element_size == 4:
        few = min(vectors, 32)
        return [DictionaryConfig(few, 32, 64, 4, 3), DictionaryConfig(few, 32, 128, 4, 3)]
    return [
        DictionaryConfig(vectors, 64, 64, 4, 4),
        DictionaryConfig(vectors, 64, 128, 4, 3),
        DictionaryConfig(vectors, 128, 64, 4, 3),
    ]


def lookup_configs(element_size: int) -> list[LookupConfig]:
    """Configurations where g = 1."""
    lanes = 16 // element_size
    return [
        LookupConfig(16, 32 * lanes, 4, 4),
        LookupConfig(16, 64 * lanes, 4, 8),
        # A fourth tap in flight makes Triton 3.6 spill float32.
        LookupConfig(8, 64 * lanes, 3 if element_size == 4 else 4, 4),
    ]


def grouped_configs(size: int, element_size: int) -> list[GroupedConfig]:
    """Configurations for groups of ``size`` filters."""
    if element_size == 4:
        return [GroupedConfig(16, 128, 4, 4), GroupedConfig(32, 64, 4, 4)]
    if padded_group(size) < 64:
        return [GroupedConfig(32, 128, 4, 4), GroupedConfig(32, 256, 4, 4)]
    return [GroupedConfig(32, 128, 4, 6), GroupedConfig(64, 128, 4, 4), GroupedConfig(32, 64, 4, 6)]


def _candidates(x: Tensor, weight: Packed, groups: int) -> tuple[list[DictionaryConfig], list[Any]]:
    size = x.element_size()
    first = dictionary_configs(weight.dictionary.shape[0] // groups, size)
    second = lookup_configs(size) if weight.group_size == 1 else grouped_configs(weight.group_size, size)
    return first, list(second)


def guess(x: Tensor, weight: Packed, groups: int) -> ForwardConfig:
    """The configuration that is fair everywhere."""
    first, second = _candidates(x, weight, groups)
    return ForwardConfig(first[0], second[0], WHOLE)


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


def measure(x: Tensor, y: Tensor, weight: Packed, groups: int, epilogue: Epilogue, where: Sizes) -> ForwardConfig:
    """The fastest configuration for this call; overwrites y. S by its kernel alone, lookups right after it, then whole calls by chunk."""
    first, second = _candidates(x, weight, groups)
    planes = weight.dictionary.shape[0]
    images = images_at_once(x, planes, where, WHOLE)
    s = empty_planes(x, planes, images, where)
    part, target = x[:images], y[:images]
    tail = epilogue if epilogue.residual is None else epilogue._replace(residual=epilogue.residual[:images])
    digits = precision(x.dtype)
    dictionary = _fastest(first, lambda c: launch_dictionary(part, weight.dictionary, s, groups, where, digits, c), x.device)

    def launch(config: LookupConfig | GroupedConfig) -> None:
        launch_dictionary(part, weight.dictionary, s, groups, where, digits, dictionary)
        launch_lookups(s, weight, target, tail, where, digits, config)

    lookups = _fastest(second, launch, x.device)
    whole = [ForwardConfig(dictionary, lookups, WHOLE)]
    if images_at_once(x, planes, where, CHUNK) < images:
        whole.append(ForwardConfig(dictionary, lookups, CHUNK))
    return _fastest(whole, lambda config: run(x, y, weight, groups, epilogue, where, config), x.device)


def candidates(x: Tensor, y: Tensor, weight: Packed, groups: int, epilogue: Epilogue, where: Sizes) -> list[Callable[[], object]]:
    """Launches of every kernel that :func:`measure` may try for this call, to have them compiled before."""
    first, second = _candidates(x, weight, groups)
    forms: list[ForwardConfig] = [ForwardConfig(dictionary, second[0], WHOLE) for dictionary in first]
    forms += [ForwardConfig(first[0], lookups, WHOLE) for lookups in second[1:]]
    return [partial(run, x, y, weight, groups, epilogue, where, form) for form in forms]


def _stored(config: ForwardConfig) -> list[Any]:
    return [list(part) if isinstance(part, tuple) else part for part in config]


def _restored(stored: list[Any], group_size: int) -> ForwardConfig:
    first, second, chunk = stored
    form = LookupConfig if group_size == 1 else GroupedConfig
    return ForwardConfig(DictionaryConfig(*first), form(*second), chunk)


_chosen: dict[tuple[Any, ...], ForwardConfig] = {}


def configuration(x: Tensor, y: Tensor, weight: Packed, groups: int, epilogue: Epilogue, where: Sizes) -> ForwardConfig:
    """The configuration for this call; the first of its kind on a device measures, where it can.

    Calls whose number of pixels has as many bits are of one kind, so images of any size need few measurements; nor does the
    epilogue matter.
    """
    taps = weight.taps
    pixels = (x.shape[0] * where.out_height * where.out_width).bit_length()
    sizes = (weight.dictionary.shape, groups, taps.filters.shape, taps.longest, taps.ordered, pixels)
    vectors = (input_vector(x, where), flags(epilogue, y)["VEC"], y.stride(3) == 1)
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
