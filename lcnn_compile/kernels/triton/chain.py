"""Convolutions over few channels in channels_last, and the next layer's 1x1 product before the output leaves the chip.

One program holds a block of pixels. It forms the convolution for all filters, a block of them after another, adds bias and
residual, activates, and multiplies what it has by the next matrix (the next layer's dictionary), so that the output itself need
not be written, nor read again. S in channels_last needs no shifted copies: a tap moves by whole pixels, which stay aligned.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcnn_compile.kernels.arguments import Geometry
from lcnn_compile.kernels.triton.epilogue import finish
from lcnn_compile.kernels.triton.pack import vector
from lcnn_compile.kernels.triton.tiles import let_next_start, starts_early, wait_for_last


class ChainConfig(NamedTuple):
    """Block sizes over pixels, filters and channels, warps, pipeline depth, and whether a whole row of the window, kw·C numbers
    side by side in memory, is one step."""

    block_pixels: int
    block_filters: int
    block_channels: int
    warps: int
    stages: int
    row: bool = False


class Window(NamedTuple):
    """Kernel size, stride, padding before the first row and column, and dilation."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    first: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, geometry: Geometry) -> Window:
        """That of a convolution."""
        _, kernel, stride, padding, dilation = geometry
        return cls(kernel, stride, (padding[0], padding[2]), dilation)


class Tail(NamedTuple):
    """What follows the convolution: ``activation(y + bias + residual)``, or the residual after it; then ``next`` [n, k′], if any."""

    bias: Tensor | None
    residual: Tensor | None
    activation: str
    residual_last: bool
    next: Tensor | None


@triton.jit
def convolve_block(
    p_x,
    p_w,
    base,
    h_0,
    w_0,
    m_p,
    o_n,
    H,
    W,
    C,
    C_PADDED,
    N_PADDED,
    KH: tl.constexpr,
    KW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    WHOLE: tl.constexpr,
    ROW: tl.constexpr,
    VEC: tl.constexpr,
    PRECISION: tl.constexpr,
    B_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """[pixels, filters], float32: the convolution of the pixels whose windows begin at row h_0, column w_0, for filters o_n.

    ROW: the B_C numbers that begin at a window's first pixel are one step, a row of the window, instead of a pixel's channels;
    what goes beyond the window meets zeros of the weight.
    """
    acc = tl.zeros([base.shape[0], o_n.shape[0]], tl.float32)
    o_c = tl.arange(0, B_C)
    blocks = C_PADDED // B_C
    for i in tl.range(0, KH * KW * blocks, num_stages=STAGES):
        i_tap = i // blocks
        r = i_tap // KW * DH
        c = i_tap % KW * DW
        first = i % blocks * B_C
        h, w = h_0 + r, w_0 + c
        if ROW:
            o_x = (base + r * W) * C
            o_w = (w_0 * C)[:, None] + o_c[None, :]
            m_x = (m_p & (h >= 0) & (h < H))[:, None] & (o_w >= 0) & (o_w < W * C)
            if VEC > 1:
                o_x = tl.multiple_of(o_x, VEC)
                m_x = tl.max_constancy(m_x, [1, VEC])
        else:
            inside = m_p & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            o_x = (base + (r * W + c)) * C + first
            m_x = inside[:, None]
            if not WHOLE:
                m_x = m_x & (first + o_c < C)[None, :]
        x = tl.load(p_x + o_x[:, None] + o_c[None, :], mask=m_x, other=0.0)
        weight = tl.load(p_w + (i * B_C + o_c)[:, None] * N_PADDED + o_n[None, :])
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["pixels", "H", "W", "OH", "OW", "TOP", "LEFT"])
def chain_kernel(
    p_x,
    p_w,
    p_bias,
    p_residual,
    p_y,
    p_d,
    p_next,
    pixels,
    H,
    W,
    OH,
    OW,
    TOP,
    LEFT,
    C,
    C_PADDED,
    N,
    N_PADDED,
    M,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    RESIDUAL_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    ROW: tl.constexpr,
    VEC: tl.constexpr,
    ALL_FILTERS: tl.constexpr,
    EARLY: tl.constexpr,
    COUNT: tl.constexpr,
    B_P: tl.constexpr,
    B_N: tl.constexpr,
    B_C: tl.constexpr,
    B_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A block of pixels, for all filters where there is a next matrix (p_d), else for one block of them."""
    let_next_start(EARLY)
    pid = tl.program_id(0)
    blocks = N_PADDED // B_N // COUNT
    i_p, i_n = pid // blocks, pid % blocks
    o_p = i_p * B_P + tl.arange(0, B_P)
    m_p = o_p < pixels
    row = o_p // OW
    h_0 = row % OH * SH - TOP
    w_0 = o_p % OW * SW - LEFT
    base = (row // OH * H + h_0) * W + w_0
    if p_d is not None:
        o_m = tl.arange(0, B_M)
        s = tl.zeros([B_P, B_M], tl.float32)
    wait_for_last(EARLY)
    for j in range(COUNT):
        o_n = (i_n + j) * B_N + tl.arange(0, B_N)
        acc = convolve_block(
            p_x,
            p_w,
            base,
            h_0,
            w_0,
            m_p,
            o_n,
            H,
            W,
            C,
            C_PADDED,
            N_PADDED,
            KH,
            KW,
            DH,
            DW,
            WHOLE,
            ROW,
            VEC,
            PRECISION,
            B_C,
            STAGES,
        )
        m_y = m_p[:, None]
        if not ALL_FILTERS:
            m_y = m_y & (o_n < N)[None, :]
        o_y = o_p[:, None] * N + o_n[None, :]
        if p_bias is not None:
            acc += tl.load(p_bias + o_n).to(tl.float32)[None, :]
        acc = finish(acc, p_residual, o_y, m_y, RESIDUAL_LAST, ACTIVATION)
        y = acc.to(p_x.dtype.element_ty)
        if p_y is not None:
            tl.store(p_y + o_y, y, mask=m_y)
        if p_d is not None:
            d = tl.load(p_d + o_n[:, None] * B_M + o_m[None, :])
            s = tl.dot(y, d, s, input_precision=PRECISION)
    if p_d is not None:
        tl.store(p_next + o_p[:, None] * M + o_m[None, :], s.to(p_next.dtype.element_ty), mask=m_p[:, None] & (o_m < M)[None, :])


def launch_chain(
    x: Tensor,
    weight: Tensor,
    window: Window,
    tail: Tail,
    y: Tensor | None,
    s: Tensor | None,
    out_channels: int,
    size: tuple[int, int],
    precision: str,
    config: ChainConfig,
) -> None:
    """Write y [N, n, OH, OW] and s [N, k′, OH, OW], either of which may be None, both channels_last as x [N, C, H, W] is.

    ``weight``, ``tail.bias`` and ``tail.next`` are packed as :mod:`lcnn_compile.kernels.triton.chain_pack` says, but for configurations by
    ``row``, where the weight is [kh·B_C, n′]; ``size`` is (OH, OW).
    """
    pixels = x.shape[0] * size[0] * size[1]
    area = window.kernel[0] * (1 if config.row else window.kernel[1])
    padded, filters = weight.shape[0] // area, weight.shape[1]
    early = starts_early(x)
    channels, wide = x.shape[1], x.shape[3]
    # Numbers of a row that are aligned, and inside x or outside together.
    vec = gcd(vector(x.element_size()), window.stride[1] * channels, wide * channels, window.first[1] * channels)
    blocks = filters // config.block_filters
    count = 1 if s is None else blocks
    chain_kernel[(-(-pixels // config.block_pixels) * (blocks // count),)](
        x,
        weight,
        tail.bias,
        tail.residual,
        y,
        tail.next if s is not None else None,
        s,
        pixels,
        *x.shape[2:],
        *size,
        *window.first,
        x.shape[1],
        padded,
        out_channels,
        filters,
        0 if s is None else s.shape[1],
        window.kernel[0],
        1 if config.row else window.kernel[1],
        *window.stride,
        *window.dilation,
        RESIDUAL_LAST=tail.residual_last,
        ACTIVATION=tail.activation,
        PRECISION=precision,
        WHOLE=padded == x.shape[1],
        ROW=config.row,
        VEC=vec,
        ALL_FILTERS=filters == out_channels,
        EARLY=early,
        COUNT=count,
        B_P=config.block_pixels,
        B_N=config.block_filters,
        B_C=config.block_channels,
        B_M=16 if s is None or tail.next is None else tail.next.shape[1],
        STAGES=config.stages,
        num_warps=config.warps,
        launch_pdl=early,
    )


@triton.jit(do_not_specialize=["count"])
def four_kernel(p_x, p_y, count, C: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers of y, pixels of four channels, from x, pixels of C; zeros for the channels that x has not."""
    o_y = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c = o_y % 4
    x = tl.load(p_x + o_y // 4 * C + c, mask=(o_y < count) & (c < C), other=0.0)
    tl.store(p_y + o_y, x, mask=o_y < count)


def four_channels(x: Tensor) -> Tensor:
    """[N, 4, H, W] from [N, C, H, W] of fewer channels, filled up with zeros; channels_last both."""
    shape = (x.shape[0], 4, *x.shape[2:])
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    four_kernel[(-(-y.numel() // 2048),)](x, y, y.numel(), C=x.shape[1], BLOCK=2048, num_warps=8)
    return y
