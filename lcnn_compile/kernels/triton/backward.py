"""Gradient of the coefficients: products of S and the output's gradient, at the taps alone, summed over all pixels.

Every program sums its own range of pixels and every sum has one order, so the result is the same at every run.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcnn_compile.kernels.triton.dictionary import DictionaryConfig, launch_dictionary
from lcnn_compile.kernels.triton.forward import precision
from lcnn_compile.kernels.triton.pack import INT32, Packed, Sizes, vector
from lcnn_compile.kernels.triton.tiles import PIXELS, output_arguments, output_pixels, tap_offsets

CHUNK = 256 << 20
"""Bytes of S at a time."""


class BackwardConfig(NamedTuple):
    """Block sizes over taps and pixels, programs wanted at least, warps, and pipeline depth."""

    block_taps: int
    block_pixels: int
    programs: int
    warps: int
    stages: int


@triton.jit(do_not_specialize=["F", "T", *PIXELS, "pixel_blocks", "tap_blocks", "splits"])
def coefficients_kernel(
    p_s,
    p_codes,
    p_offsets,
    p_filters,
    p_grad,
    p_out,
    F,
    T,
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
    pixel_blocks,
    tap_blocks,
    splits,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ROW_BITS: tl.constexpr,
    G: tl.constexpr,
    B_G: tl.constexpr,
    B_T: tl.constexpr,
    B_P: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One block of taps of a filter group, some of its filters, and one of ``splits`` ranges of pixels."""
    pid = tl.program_id(0)
    i_split = pid % splits
    pid = pid // splits
    i_t = pid % tap_blocks
    pid = pid // tap_blocks
    i_f = pid // tl.cdiv(G, B_G)
    o_g = pid % tl.cdiv(G, B_G) * B_G + tl.arange(0, B_G)
    o_t = tl.load(p_offsets + i_f) + i_t * B_T + tl.arange(0, B_T)
    m_t = o_t < tl.load(p_offsets + i_f + 1)
    codes = tl.load(p_codes + o_t, mask=m_t, other=0)
    o_plane = tap_offsets(codes, ROWS * PITCH, DILATION_H * PITCH, WIDE, LANES, ROW_BITS)
    channels = tl.load(p_filters + i_f * G + o_g, mask=o_g < G, other=-1)
    o_c = channels.to(tl.int64) * y_c
    if VEC > 1:
        o_c = tl.multiple_of(o_c, VEC)
    acc = tl.zeros([B_T, B_G], tl.float32)
    for i_p in tl.range(i_split, pixel_blocks, splits, num_stages=STAGES):
        o_s, o_y, m_p = output_pixels(i_p, images, image, OH, OW, PITCH, STRIDE_H, y_n, y_h, y_w, LANES, VEC, B_P)
        s = tl.load(p_s + o_plane[:, None] + o_s[None, :], mask=m_t[:, None], other=0.0)
        m_y = (channels >= 0)[:, None] & m_p[None, :]
        if VEC > 1:
            m_y = tl.max_constancy(m_y, [1, VEC])
        grad = tl.load(p_grad + (o_c[:, None] + o_y[None, :]), mask=m_y, other=0.0)
        acc = tl.dot(s, tl.trans(grad), acc, input_precision=PRECISION)
    o_out = (i_split * T + o_t).to(tl.int64)[:, None] * G + o_g[None, :]
    tl.store(p_out + o_out, acc, mask=m_t[:, None] & (o_g < G)[None, :])


def coefficient_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Packed,
    groups: int,
    where: Sizes,
    dictionary: DictionaryConfig,
    config: BackwardConfig | None = None,
) -> Tensor:
    """float32 [T, g] from the gradient of y [N, n, OH, OW] and x [N, m, H, W], both contiguous or channels_last."""
    taps, channels = weight.taps, weight.taps.filters
    count, padded = channels.shape
    total = taps.codes.shape[0]
    result = torch.zeros(total, padded, dtype=torch.float32, device=x.device)
    if total == 0:
        return result[:, : weight.group_size]
    planes = weight.dictionary.shape[0]
    image = where.image(planes)
    chunk = max(1, min(x.shape[0], CHUNK // (image * x.element_size()), (INT32 - 1) // image))
    block = min(32 if x.element_size() == 4 else 64, max(16, padded))
    aligned = gcd(vector(x.element_size()), where.out_width, *grad.stride()[:3]) if grad.stride(3) == 1 else 1
    # A pointer per element of the gradient, where no vectors of it can be read, takes the registers of 8 warps.
    warps = 8 if block == 64 and aligned == 1 else 4
    config = config or BackwardConfig(32, 32 if x.element_size() == 4 else 128, 1024, warps, 3)
    tap_blocks = -(-max(1, taps.longest) // config.block_taps)
    programs = count * -(-padded // block) * tap_blocks
    # Columns past the output's width are multiplied by a gradient of 0, so they must not hold garbage.
    room = torch.zeros(chunk * image, dtype=x.dtype, device=x.device)
    for first in range(0, x.shape[0], chunk):
        part = x[first : first + chunk]
        images = part.shape[0]
        pixel_blocks = -(-images * where.out_height * where.pitch // config.block_pixels)
        splits = max(1, min(pixel_blocks, config.programs // programs))
        sums = torch.empty(splits, total, padded, dtype=torch.float32, device=x.device)
        s = room[: images * image]
        launch_dictionary(part, weight.dictionary, s, groups, where, precision(x.dtype), dictionary)
        coefficients_kernel[(programs * splits,)](
            s,
            taps.codes,
            taps.offsets,
            channels,
            grad[first : first + chunk],
            sums,
            count,
            total,
            pixel_blocks=pixel_blocks,
            tap_blocks=tap_blocks,
            splits=splits,
            **output_arguments(grad[first : first + chunk], where, image),
            PRECISION=precision(x.dtype),
            VEC=aligned,
            G=padded,
            B_G=block,
            B_T=config.block_taps,
            B_P=config.block_pixels,
            STAGES=config.stages,
            num_warps=config.warps,
        )
        result += sums.sum(0)
    return result[:, : weight.group_size]
