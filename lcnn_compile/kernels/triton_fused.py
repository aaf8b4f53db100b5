"""S and its lookups in one launch: every program forms the S of a band of rows in room of its own, then reads it.

That room is small and is used again for the next band, so S never leaves the chip's caches. A multiprocessor's own stores
are seen by its own loads after a barrier. Bands overlap by the kernel's height, so S is formed more than once at their edges.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcnn_compile.kernels.triton_dictionary import DictionaryConfig, dictionary_block, input_vector, source_pixels, store_shifted
from lcnn_compile.kernels.triton_grouped import GroupedConfig, block_filters, channel_vector, grouped_block
from lcnn_compile.kernels.triton_lookup import LookupConfig, lookup_block
from lcnn_compile.kernels.triton_pack import INT32, ROW_BITS, Epilogue, Geometry, Packed, vector
from lcnn_compile.kernels.triton_tiles import output_pixels


class FusedConfig(NamedTuple):
    """Block sizes of both stages, bytes of S in a band, and programs per multiprocessor; warps are those of the lookups."""

    dictionary: DictionaryConfig
    lookups: LookupConfig | GroupedConfig
    room: int
    programs: int


@triton.jit(
    do_not_specialize=[
        "images",
        "K",
        "vector_blocks",
        "H",
        "W",
        "OH",
        "OW",
        "WIDE_X",
        "PITCH_X",
        "ROWS",
        "PITCH",
        "TOP",
        "LEFT",
        "STRIDE_H",
        "STRIDE_W",
        "DILATION_H",
        "DILATION_W",
        "KW",
        "image",
        "band_images",
        "band_rows",
    ]
)
def fused_kernel(
    p_x,
    p_d,
    p_s,
    p_codes,
    p_c,
    p_offsets,
    p_filters,
    p_bias,
    p_residual,
    p_y,
    images,
    K,
    M,
    F,
    size,
    vector_blocks,
    H,
    W,
    OH,
    OW,
    WIDE_X,
    PITCH_X,
    ROWS,
    PITCH,
    TOP,
    LEFT,
    STRIDE_H,
    STRIDE_W,
    DILATION_H,
    DILATION_W,
    KW,
    image,
    band_images,
    band_rows,
    x_n,
    x_c,
    x_h,
    x_w,
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
    VEC_X: tl.constexpr,
    VEC: tl.constexpr,
    VEC_C: tl.constexpr,
    ROW_BITS: tl.constexpr,
    G: tl.constexpr,
    B_K: tl.constexpr,
    B_M: tl.constexpr,
    B_X: tl.constexpr,
    STAGES_X: tl.constexpr,
    B_F: tl.constexpr,
    B_T: tl.constexpr,
    B_P: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Every num_programs-th band: band_images whole images, or band_rows rows of one."""
    pid = tl.program_id(0)
    p_s += tl.multiple_of(pid.to(tl.int64) * band_images * image, LANES)
    row_bands = tl.cdiv(OH, band_rows)
    for i_band in range(pid, tl.cdiv(images, band_images) * row_bands, tl.num_programs(0)):
        n0 = i_band // row_bands * band_images
        h0 = i_band % row_bands * band_rows
        here = min(band_images, images - n0)
        rows = min(band_rows, OH - h0)
        first_x = n0.to(tl.int64) * x_n
        first_y = n0.to(tl.int64) * y_n + h0.to(tl.int64) * y_h
        # A hint replaces what the compiler knows, which is more than nothing where channels are innermost.
        if VEC_X > 1:
            first_x = tl.multiple_of(first_x, VEC_X)
        if VEC > 1:
            first_y = tl.multiple_of(first_y, VEC)
        for i in range(0, tl.cdiv(here * ROWS * PITCH_X, B_X) * vector_blocks):
            n, r, column, o_x, m_x, m_p = source_pixels(
                i // vector_blocks, here, H, W, ROWS, WIDE_X, PITCH_X, TOP - h0 * STRIDE_H, LEFT, x_n, x_h, x_w, VEC_X, B_X
            )
            s, planes, m_k = dictionary_block(
                p_x, p_d, i % vector_blocks, o_x + first_x, m_x, K, M, x_c, PRECISION, VEC_X, B_K, B_M, STAGES_X
            )
            s = s.to(p_s.dtype.element_ty)
            store_shifted(s, p_s, planes, n, r, column, m_k, m_p, image, ROWS * PITCH, PITCH, KW, STRIDE_W, DILATION_W)
        tl.debug_barrier()
        blocks = tl.cdiv(F, B_F) if G == 1 else F * (G // B_F)
        for i in range(0, tl.cdiv(here * rows * PITCH, B_P) * blocks):
            o_s, o_y, m_p = output_pixels(i // blocks, here, image, rows, OW, PITCH, STRIDE_H, y_n, y_h, y_w, LANES, VEC, B_P)
            if G == 1:
                lookup_block(
                    p_s, p_c, p_offsets, p_filters, p_bias, p_residual, p_y, i % blocks, F, ROWS * PITCH, DILATION_H * PITCH,
                    o_s, o_y + first_y, m_p, y_c, ORDERED, WIDE, RESIDUAL_LAST, ACTIVATION, LANES, VEC, ROW_BITS, B_F, B_T,
                )  # fmt: skip
            else:
                grouped_block(
                    p_s, p_codes, p_c, p_offsets, p_filters, p_bias, p_residual, p_y, i % blocks, size, ROWS * PITCH,
                    DILATION_H * PITCH, o_s, o_y + first_y, m_p, y_c, ORDERED, RESIDUAL_LAST, ACTIVATION, PRECISION, WIDE,
                    LANES, VEC, VEC_C, ROW_BITS, G, B_F, B_T, STAGES,
                )  # fmt: skip
        tl.debug_barrier()


class Band(NamedTuple):
    """What one program keeps in its room: whole images, or output rows of one image; ``where`` has the rows of S they need."""

    images: int
    rows: int
    where: Geometry


def band_of(where: Geometry, images: int, planes: int, room: int) -> Band | None:
    """As much as fits into ``room`` elements of S, or None where four rows do not: their overlap would cost more than S itself."""
    if where.image(planes) <= room:
        return Band(min(images, room // where.image(planes)), where.out_height, where)
    row = planes * where.kernel_width * where.pitch
    reach = where.rows - (where.out_height - 1) * where.stride[0]
    rows = (room // row - reach) // where.stride[0] + 1
    if rows < 4:
        return None
    return Band(1, rows, where._replace(rows=(rows - 1) * where.stride[0] + reach))


def launch_fused(
    x: Tensor,
    y: Tensor,
    weight: Packed,
    groups: int,
    epilogue: Epilogue,
    where: Geometry,
    precision: str,
    band: Band,
    config: FusedConfig,
) -> None:
    """Write y [N, n, H, W] from x [N, m, H, W] in one launch of at most ``config.programs`` programs per multiprocessor."""
    planes, channels = weight.dictionary.shape
    size = planes // groups
    image = band.where.image(planes)
    bands = -(-x.shape[0] // band.images) * -(-where.out_height // band.rows)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    programs = min(bands, processors * config.programs)
    s = torch.empty(programs * band.images * image, dtype=x.dtype, device=x.device)
    count, padded = weight.taps.filters.shape
    lookups = config.lookups
    lanes = input_vector(x, where)
    fused_kernel[(programs,)](
        x,
        weight.dictionary,
        s,
        weight.taps.codes,
        weight.coefficients,
        weight.taps.offsets,
        weight.taps.filters,
        epilogue.bias,
        epilogue.residual,
        y,
        x.shape[0],
        size,
        channels,
        count,
        weight.group_size,
        groups * -(-size // config.dictionary.block_vectors),
        where.height,
        where.width,
        where.out_height,
        where.out_width,
        where.padded_width,
        -(-where.padded_width // lanes) * lanes,
        band.where.rows,
        where.pitch,
        where.top,
        where.left,
        *where.stride,
        *where.dilation,
        where.kernel_width,
        image,
        band.images,
        band.rows,
        *x.stride(),
        *y.stride(),
        ORDERED=weight.taps.ordered,
        **epilogue.flags(y),
        PRECISION=precision,
        WIDE=band.images * image >= INT32,
        LANES=vector(x.element_size()),
        VEC_X=lanes,
        VEC_C=channel_vector(weight.group_size, y),
        ROW_BITS=ROW_BITS,
        G=padded,
        B_K=config.dictionary.block_vectors,
        B_M=config.dictionary.block_channels,
        B_X=config.dictionary.block_pixels,
        STAGES_X=config.dictionary.stages,
        B_F=lookups.block_filters if isinstance(lookups, LookupConfig) else block_filters(padded, y),
        B_T=lookups.unroll if isinstance(lookups, LookupConfig) else lookups.block_taps,
        B_P=lookups.block_pixels,
        STAGES=1 if isinstance(lookups, LookupConfig) else lookups.stages,
        num_warps=lookups.warps,
        # Left alone, the assembler spills a little for the sake of a third program per multiprocessor.
        maxnreg=min(248, 2048 // lookups.warps),
    )
