"""Lookups that a group of filters shares (g > 1): [g, taps] · [taps, pixels] on matrix units, rows of S gathered by tap."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lcnn_compile.kernels.arguments import Epilogue
from lcnn_compile.kernels.triton.epilogue import store_tile
from lcnn_compile.kernels.triton.pack import Packed, Sizes, flags, vector
from lcnn_compile.kernels.triton.tiles import (
    PIXELS,
    output_arguments,
    output_pixels,
    starts_early,
    tap_offsets,
    wait_for_last,
)


class GroupedConfig(NamedTuple):
    """Block sizes over taps and pixels, warps, and pipeline depth."""

    block_taps: int
    block_pixels: int
    warps: int
    stages: int


@triton.jit
def grouped_tile(
    p_s,
    p_codes,
    p_c,
    start,
    end,
    o_g,
    o_s,
    plane,
    row_step,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    LANES: tl.constexpr,
    ROW_BITS: tl.constexpr,
    G: tl.constexpr,
    B_T: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Σ over taps start to end of a filter group, for its filters o_g at the pixels o_s, in float32."""
    acc = tl.zeros([o_g.shape[0], o_s.shape[0]], tl.float32)
    for t in tl.range(start, end, B_T, num_stages=STAGES):
        o_t = t + tl.arange(0, B_T)
        m_t = o_t < end
        codes = tl.load(p_codes + o_t, mask=m_t, other=0)
        o_plane = tap_offsets(codes, plane, row_step, WIDE, LANES, ROW_BITS)
        s = tl.load(p_s + o_plane[:, None] + o_s[None, :], mask=m_t[:, None], other=0.0)
        c = tl.load(p_c + o_t.to(tl.int64)[:, None] * G + o_g[None, :], mask=m_t[:, None], other=0.0)
        acc = tl.dot(tl.trans(c), s, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["F", *PIXELS])
def grouped_kernel(
    p_s,
    p_codes,
    p_c,
    p_offsets,
    p_filters,
    p_bias,
    p_residual,
    p_y,
    F,
    size,
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
    RESIDUAL_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    VEC_C: tl.constexpr,
    ROW_BITS: tl.constexpr,
    G: tl.constexpr,
    B_G: tl.constexpr,
    B_T: tl.constexpr,
    B_P: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One filter group, or a part of B_G filters of a larger one, on one block of output pixels."""
    pid = tl.program_id(0)
    blocks = F * (G // B_G)
    o_s, o_y, m_p = output_pixels(pid // blocks, images, image, OH, OW, PITCH, STRIDE_H, y_n, y_h, y_w, LANES, VEC, B_P)
    i_f = pid % blocks // (G // B_G)
    o_g = pid % (G // B_G) * B_G + tl.arange(0, B_G)
    first, m_c = i_f * size, o_g < size
    if VEC_C > 1:
        first = tl.multiple_of(first, VEC_C)
        m_c = tl.max_constancy(m_c, VEC_C)
    start = tl.load(p_offsets + i_f)
    end = tl.load(p_offsets + i_f + 1)
    plane, row_step = ROWS * PITCH, DILATION_H * PITCH
    wait_for_last(EARLY)
    acc = grouped_tile(p_s, p_codes, p_c, start, end, o_g, o_s, plane, row_step, PRECISION, WIDE, LANES, ROW_BITS, G, B_T, STAGES)
    channels = first + o_g
    if not ORDERED:
        channels = tl.load(p_filters + i_f * G + o_g)
        m_c = channels >= 0
    store_tile(acc, p_y, p_bias, p_residual, channels, m_c, y_c, o_y, m_p, RESIDUAL_LAST, ACTIVATION, VEC)


def block_filters(padded: int, y: Tensor) -> int:
    """Filters of a program, of groups of ``padded``: Hopper's units take 64 rows and more of float32 only with taps innermost,
    which would cost S its wide loads."""
    return min(padded, 32 if y.element_size() == 4 else 128)


def channel_vector(size: int, y: Tensor) -> int:
    """Channels of a filter group of ``size`` that one store may write: 1 where channels are not innermost."""
    return gcd(vector(y.element_size()), size) if y.stride(1) == 1 else 1


def launch_grouped(
    s: Tensor, weight: Packed, y: Tensor, epilogue: Epilogue, where: Sizes, precision: str, config: GroupedConfig
) -> None:
    """Write y [images, n, H, W] from S of as many images; g must be more than 1."""
    count, padded = weight.taps.filters.shape
    block = block_filters(padded, y)
    pixels = y.shape[0] * where.out_height * where.pitch
    image = s.numel() // y.shape[0]
    early = starts_early(s)
    grid = (count * (padded // block) * -(-pixels // config.block_pixels),)
    grouped_kernel[grid](
        s,
        weight.taps.codes,
        weight.coefficients,
        weight.taps.offsets,
        weight.taps.filters,
        epilogue.bias,
        epilogue.residual,
        y,
        count,
        weight.group_size,
        **output_arguments(y, where, image),
        ORDERED=weight.taps.ordered,
        **flags(epilogue, y),
        VEC_C=channel_vector(weight.group_size, y),
        PRECISION=precision,
        G=padded,
        B_G=block,
        B_T=config.block_taps,
        B_P=config.block_pixels,
        STAGES=config.stages,
        EARLY=early,
        num_warps=config.warps,
        launch_pdl=early,
    )
