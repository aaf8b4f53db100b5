"""Lookups where every filter has taps of its own (g = 1): vector units, one load of 16 bytes of S per tap and lanes."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lcnn_compile.kernels.arguments import Epilogue
from lcnn_compile.kernels.triton.epilogue import store_tile
from lcnn_compile.kernels.triton.pack import Packed, Sizes, flags
from lcnn_compile.kernels.triton.tiles import PIXELS, output_arguments, output_pixels, tap_offsets


class LookupConfig(NamedTuple):
    """Block sizes over filters and pixels, taps in flight, and warps."""

    block_filters: int
    block_pixels: int
    unroll: int
    warps: int


@triton.jit
def lookup_tile(
    p_s,
    p_table,
    p_offsets,
    o_f,
    o_s,
    F,
    plane,
    row_step,
    WIDE: tl.constexpr,
    LANES: tl.constexpr,
    ROW_BITS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Σ over the taps of the filters o_f at the pixels o_s, in float32; a filter out of taps repeats its last one times 0."""
    m_f = o_f < F
    FILTERS = tl.cdiv(F, 64) * 64  # columns of the table: pack.BLOCK at a time
    count = tl.load(p_offsets + o_f + 1, mask=m_f, other=0) - tl.load(p_offsets + o_f, mask=m_f, other=0)
    acc = tl.zeros([o_f.shape[0], o_s.shape[0]], tl.float32)
    for t in tl.range(0, tl.max(count, 0), loop_unroll_factor=UNROLL):
        entry = tl.load(p_table + t * FILTERS + o_f)
        c = (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        o_t = tap_offsets(entry.to(tl.int32), plane, row_step, WIDE, LANES, ROW_BITS)
        s = tl.load(p_s + o_t[:, None] + o_s[None, :])
        acc += c[:, None] * s.to(tl.float32)
    return acc


@triton.jit(do_not_specialize=PIXELS)
def lookup_kernel(
    p_s,
    p_table,
    p_offsets,
    p_filters,
    p_bias,
    p_residual,
    p_y,
    F,
    images,
    image,
    OH,
    OW,
    ROWS,
    PITCH,
    STRIDE_H,
    DILATION_H,
    y_n,
    y_c,
    y_h,
    y_w,
    ORDERED: tl.constexpr,
    WIDE: tl.constexpr,
    RESIDUAL_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ROW_BITS: tl.constexpr,
    B_F: tl.constexpr,
    B_P: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One block of filters on one block of output pixels."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(F, B_F)
    o_s, o_y, m_p = output_pixels(pid // blocks, images, image, OH, OW, PITCH, STRIDE_H, y_n, y_h, y_w, LANES, VEC, B_P)
    o_f = pid % blocks * B_F + tl.arange(0, B_F)
    plane, row_step = ROWS * PITCH, DILATION_H * PITCH
    acc = lookup_tile(p_s, p_table, p_offsets, o_f, o_s, F, plane, row_step, WIDE, LANES, ROW_BITS, UNROLL)
    channels, m_c = o_f, o_f < F
    if not ORDERED:
        channels = tl.load(p_filters + o_f, mask=m_c, other=-1)
        m_c = channels >= 0
    store_tile(acc, p_y, p_bias, p_residual, channels, m_c, y_c, o_y, m_p, RESIDUAL_LAST, ACTIVATION, VEC)


def launch_lookup(s: Tensor, weight: Packed, y: Tensor, epilogue: Epilogue, where: Sizes, config: LookupConfig) -> None:
    """Write y [images, n, H, W] from S of as many images; g must be 1."""
    count = weight.taps.filters.shape[0]
    pixels = y.shape[0] * where.out_height * where.pitch
    image = s.numel() // y.shape[0]
    grid = (-(-count // config.block_filters) * -(-pixels // config.block_pixels),)
    lookup_kernel[grid](
        s,
        weight.coefficients,
        weight.taps.offsets,
        weight.taps.filters,
        epilogue.bias,
        epilogue.residual,
        y,
        count,
        **output_arguments(y, where, image),
        ORDERED=weight.taps.ordered,
        **flags(epilogue, y),
        B_F=config.block_filters,
        B_P=config.block_pixels,
        UNROLL=config.unroll,
        num_warps=config.warps,
    )
