"""Which nodes of a graph pad or resize, and as what steps of a program."""

from __future__ import annotations

from typing import Any

from torch import fx

from lcnn_compile.errors import KernelError
from lcnn_compile.kernels.cpu.resampling import PADDINGS
from lcnn_compile.kernels.cpu.steps import Pad, Resize
from lcnn_compile.passes.step_form import Form, operation_on_images
from lcnn_compile.passes.targets import same_shape

_MODES = {
    **{"nearest": "nearest", "nearest-exact": "nearest-exact", "linear": "linear", "bilinear": "linear", "bicubic": "bicubic"},
    **{
        "area": "mean",
        "nearest1d": "nearest",
        "nearest2d": "nearest",
        "linear1d": "linear",
        "bilinear2d": "linear",
        "bicubic2d": "bicubic",
    },
}
_PAD_NAMES = {"constant_pad_nd": "constant", "reflection_pad1d": "reflect", "reflection_pad2d": "reflect", "replication_pad1d": "replicate", "replication_pad2d": "replicate"}  # fmt: skip


def resampling(node: fx.Node) -> Form | None:
    """The form of a padding or a resizing; None for others."""
    found = operation_on_images(node)
    if found is None:
        return None
    name, given, x, shape, out = found
    if name == "pad" or name in _PAD_NAMES:
        step: Any = _pad(name, given, len(shape))
    elif name == "interpolate" or name.startswith("upsample_"):
        step = _resize(name, given, out)
    else:
        return None
    try:
        known = step is not None and same_shape(step(0).shape([shape]), out)
    except KernelError:
        return None
    return Form((x,), lambda emit, values: emit(step(values[0]))) if known else None


def _pad(name: str, given: dict[str, Any], rank: int) -> Any:
    pads = given.get("pad", given.get("padding"))
    mode, value = given.get("mode", _PAD_NAMES.get(name)), given.get("value")
    if not isinstance(pads, list | tuple) or not all(isinstance(p, int) for p in pads) or mode not in PADDINGS:
        return None
    pads = [*pads, *[0] * (4 - len(pads))]
    if any(pads[4:]) or not isinstance(value, int | float | None) or (rank == 3 and any(pads[2:])):
        return None
    sizes = (pads[0], pads[1], pads[2], pads[3])
    return lambda v: Pad(v, sizes, mode, float(value or 0))


def _resize(name: str, given: dict[str, Any], out: tuple[Any, ...]) -> Any:
    mode = _MODES.get(given.get("mode", name.removeprefix("upsample_")))
    scales = next((given[key] for key in ("scale_factors", "scale_factor", "scales") if given.get(key) is not None), None)
    if "scales_h" in given:
        scales = None if given["scales_h"] is None else (given["scales_h"], given["scales_w"])
    if given.get("recompute_scale_factor") or mode == "mean" or given.get("size") is not None:
        scales = None
    if isinstance(scales, int | float):
        scales = (scales,) * (len(out) - 2)
    if mode is None or (scales is not None and not all(isinstance(scale, int | float) for scale in scales)):
        return None
    size = tuple(out[2:]) if all(isinstance(v, int) for v in out[2:]) else None
    if size is None and scales is None:
        return None
    factors = None if scales is None else tuple(float(scale) for scale in scales)
    flags = (bool(given.get("align_corners")), bool(given.get("antialias")))
    return lambda v: Resize(v, mode, size, factors, *flags)
