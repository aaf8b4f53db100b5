"""What the kernels share: where a block of output pixels lies, which planes of S taps read, and when the next kernel may start."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lcnn_compile.kernels.triton.pack import INT32, ROW_BITS, Sizes, vector


def starts_early(x: Tensor) -> bool:
    """Whether a kernel may be launched before the one it waits for has ended, which hides its launch: from Hopper on."""
    if x.is_cuda:
        return torch.cuda.get_device_capability(x.device) >= (9, 0)
    driver = triton.runtime.driver
    return driver._active is not None and driver.active.get_current_target().arch >= 90


@triton.jit
def let_next_start(EARLY: tl.constexpr):
    """From here on the next kernel may be launched; what it reads of this one it waits for by :func:`wait_for_last`."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def wait_for_last(EARLY: tl.constexpr):
    """Until the kernel before has ended and all that it wrote is visible."""
    if EARLY:
        gdc_wait()


PIXELS = ["images", "image", "OH", "OW", "ROWS", "PITCH", "STRIDE_H", "DILATION_H"]
"""Of :func:`output_arguments`, those that differ from call to call: no kernel is compiled anew for their values.

Every kernel lists them, for Triton compiles anew for numbers in a tuple (findings/triton_specializes_tuples.sh).
"""


def output_arguments(y: Tensor, where: Sizes, image: int) -> dict[str, int | bool]:
    """Arguments of a kernel that goes over the pixels of y [images, n, OH, OW] and reads ``image`` elements of S for each image."""
    strides = dict(zip(("y_n", "y_c", "y_h", "y_w"), y.stride(), strict=True))
    return {
        "images": y.shape[0],
        "image": image,
        "OH": where.out_height,
        "OW": where.out_width,
        "ROWS": where.rows,
        "PITCH": where.pitch,
        "STRIDE_H": where.stride[0],
        "DILATION_H": where.dilation[0],
        **strides,
        "WIDE": image >= INT32,
        "LANES": vector(y.element_size()),
        "ROW_BITS": ROW_BITS,
    }


@triton.jit
def output_pixels(
    i_p, images, image, OH, OW, PITCH, STRIDE_H, y_n, y_h, y_w, LANES: tl.constexpr, VEC: tl.constexpr, B_P: tl.constexpr
):
    """Offsets of B_P output pixels in S (int32) and in the output (int64), and which of them exist.

    A row takes PITCH pixels, a multiple of LANES; those from OW on, and those past the last image, exist only in S: they
    read something valid and are not stored. VEC pixels at a time are contiguous and aligned in the output.
    """
    q = i_p * B_P + tl.arange(0, B_P)
    row = q // PITCH
    w = q % PITCH
    n = row // OH
    h = row % OH
    m_p = (n < images) & (w < OW)
    o_s = tl.where(n < images, n * image + h * STRIDE_H * PITCH + w, 0)
    o_y = n.to(tl.int64) * y_n + h.to(tl.int64) * y_h + w * y_w
    o_s = tl.max_contiguous(tl.multiple_of(o_s, LANES), LANES)
    if VEC > 1:
        o_y = tl.max_contiguous(tl.multiple_of(o_y, VEC), VEC)
        m_p = tl.max_constancy(m_p, VEC)
    return o_s, o_y, m_p


@triton.jit
def tap_offsets(codes, plane, row_step, WIDE: tl.constexpr, LANES: tl.constexpr, ROW_BITS: tl.constexpr):
    """Offsets in S of the planes, shifted by kernel rows, that ``codes`` name; int64 where WIDE."""
    i_plane = codes >> ROW_BITS
    o_t = (i_plane.to(tl.int64) if WIDE else i_plane) * plane + (codes & ((1 << ROW_BITS) - 1)) * row_step
    return tl.multiple_of(o_t, LANES)
