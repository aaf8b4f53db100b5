"""S = D ∗ x, written once per kernel column, shifted by it: a matrix product that reads the input in any memory format."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcnn_compile.kernels.triton.pack import INT32, Sizes, vector
from lcnn_compile.kernels.triton.tiles import let_next_start, starts_early


class DictionaryConfig(NamedTuple):
    """Block sizes over dictionary vectors, channels and pixels, and how a program is run."""

    block_vectors: int
    block_channels: int
    block_pixels: int
    warps: int
    stages: int


@triton.jit
def source_pixels(i_p, images, H, W, ROWS, WIDE, PITCH, TOP, LEFT, x_n, x_h, x_w, VEC: tl.constexpr, B_P: tl.constexpr):
    """B_P padded pixels: image, row, column, offset in x (int64), whether they lie in x, and whether they exist at all.

    Columns are numbered so that those of x come first and its padding last: a vector of a row of x stays a vector.
    """
    q = i_p * B_P + tl.arange(0, B_P)
    row = q // PITCH
    w = q % PITCH
    n = row // ROWS
    r = row % ROWS
    h = r - TOP
    column = w + LEFT
    column = tl.where(column >= WIDE, column - WIDE, column)
    m_p = (n < images) & (w < WIDE)
    m_x = (n < images) & (h >= 0) & (h < H) & (w < W)
    o_x = n.to(tl.int64) * x_n + h.to(tl.int64) * x_h + w * x_w
    if VEC > 1:
        o_x = tl.max_contiguous(tl.multiple_of(o_x, VEC), VEC)
        m_x = tl.max_constancy(m_x, VEC)
    return n, r, column, o_x, m_x, m_p


@triton.jit
def dictionary_block(
    p_x,
    p_d,
    i_k,
    o_x,
    m_x,
    K,
    M,
    x_c,
    PRECISION: tl.constexpr,
    VEC: tl.constexpr,
    B_K: tl.constexpr,
    B_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Block i_k of B_K vectors, counted over all convolution groups, times the pixels at o_x of x; 0 where m_x is false.

    Returns the float32 tile, its planes of S, and which of them exist.
    """
    i_group = i_k // tl.cdiv(K, B_K)
    o_k = i_k % tl.cdiv(K, B_K) * B_K + tl.arange(0, B_K)
    first = i_group.to(tl.int64) * M * x_c
    p_x += tl.multiple_of(first, VEC) if VEC > 1 else first
    p_d += i_group * K * M
    acc = tl.zeros([B_K, o_x.shape[0]], tl.float32)
    for start in tl.range(0, M, B_M, num_stages=STAGES):
        o_m = start + tl.arange(0, B_M)
        o_c = o_m.to(tl.int64) * x_c
        m_mx = (o_m < M)[:, None] & m_x[None, :]
        if VEC > 1:
            o_c = tl.multiple_of(o_c, VEC)
            m_mx = tl.max_constancy(m_mx, [1, VEC])
        x = tl.load(p_x + (o_c[:, None] + o_x[None, :]), mask=m_mx, other=0.0)
        d = tl.load(p_d + o_k[:, None] * M + o_m[None, :], mask=(o_k < K)[:, None] & (o_m < M)[None, :], other=0.0)
        acc = tl.dot(d, x, acc, input_precision=PRECISION)
    return acc, i_group * K + o_k, o_k < K


@triton.jit
def store_shifted(s, p_s, planes, n, r, column, m_k, m_p, image, PLANE, PITCH, KW, STRIDE_W, DILATION_W, WIDE: tl.constexpr):
    """Store a tile [vectors, pixels] of S into the KW shifted copies of each of its ``planes`` (rows of the whole D)."""
    o_k = (planes.to(tl.int64) if WIDE else planes) * (KW * PLANE)
    o_p = n * image + r * PITCH
    for c in range(KW):
        shifted = column - c * DILATION_W
        w = shifted // STRIDE_W
        m_w = m_p & (shifted >= 0) & (w * STRIDE_W == shifted) & (w < PITCH)
        o_w = tl.max_contiguous(o_p + w, 8)
        tl.store(p_s + (o_k + c * PLANE)[:, None] + o_w[None, :], s, mask=m_k[:, None] & m_w[None, :])


@triton.jit(
    do_not_specialize=[
        "images",
        "K",
        "blocks",
        "H",
        "W",
        "ROWS",
        "WIDE",
        "PITCH_X",
        "PITCH",
        "TOP",
        "LEFT",
        "image",
        "KW",
        "STRIDE_W",
        "DILATION_W",
    ]
)
def dictionary_kernel(
    p_x,
    p_d,
    p_s,
    images,
    K,
    M,
    blocks,
    H,
    W,
    ROWS,
    WIDE,
    PITCH_X,
    PITCH,
    TOP,
    LEFT,
    x_n,
    x_c,
    x_h,
    x_w,
    image,
    KW,
    STRIDE_W,
    DILATION_W,
    PRECISION: tl.constexpr,
    WIDE_S: tl.constexpr,
    EARLY: tl.constexpr,
    VEC: tl.constexpr,
    B_K: tl.constexpr,
    B_M: tl.constexpr,
    B_P: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One block of vectors and padded pixels of S."""
    let_next_start(EARLY)
    pid = tl.program_id(0)
    n, r, column, o_x, m_x, m_p = source_pixels(
        pid // blocks, images, H, W, ROWS, WIDE, PITCH_X, TOP, LEFT, x_n, x_h, x_w, VEC, B_P
    )
    s, planes, m_k = dictionary_block(p_x, p_d, pid % blocks, o_x, m_x, K, M, x_c, PRECISION, VEC, B_K, B_M, STAGES)
    s = s.to(p_s.dtype.element_ty)
    store_shifted(s, p_s, planes, n, r, column, m_k, m_p, image, ROWS * PITCH, PITCH, KW, STRIDE_W, DILATION_W, WIDE_S)


def input_vector(x: Tensor, where: Sizes) -> int:
    """Pixels of a row of x that one aligned load may read: 1 where its channels are innermost."""
    if x.stride(3) != 1 or where.width == 1:
        return 1
    lanes = vector(x.element_size())
    return gcd(lanes, where.width, x.stride(0), x.stride(1), x.stride(2))


def launch_dictionary(
    x: Tensor, dictionary: Tensor, s: Tensor, groups: int, where: Sizes, precision: str, config: DictionaryConfig
) -> None:
    """Write S [images, planes, kw, rows, pitch] from x [images, m, H, W] and D [groups·k, m/groups], all of one dtype."""
    planes, channels = dictionary.shape
    size = planes // groups
    lanes = input_vector(x, where)
    pitch = -(-where.padded_width // lanes) * lanes
    blocks = groups * -(-size // config.block_vectors)
    pixels = x.shape[0] * where.rows * pitch
    dictionary_kernel[(blocks * -(-pixels // config.block_pixels),)](
        x,
        dictionary,
        s,
        x.shape[0],
        size,
        channels,
        blocks,
        where.height,
        where.width,
        where.rows,
        where.padded_width,
        pitch,
        where.pitch,
        where.top,
        where.left,
        *x.stride(),
        where.image(planes),
        where.kernel_width,
        where.stride[1],
        where.dilation[1],
        PRECISION=precision,
        WIDE_S=s.numel() >= INT32,
        EARLY=starts_early(x),
        VEC=lanes,
        B_K=config.block_vectors,
        B_M=config.block_channels,
        B_P=config.block_pixels,
        STAGES=config.stages,
        num_warps=config.warps,
    )


def empty_planes(x: Tensor, planes: int, images: int, where: Sizes) -> Tensor:
    """Room for S of ``images`` images."""
    return torch.empty(images * where.image(planes), dtype=x.dtype, device=x.device)
