"""Where filters are grouped in another order than channels lie and channels are innermost: lookups write group by group, and
this puts the channels into their places. Scattered 2-byte stores from the lookups themselves would cost several times more."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lcnn_compile.kernels.arguments import Epilogue
from lcnn_compile.kernels.triton.epilogue import finish


@triton.jit(do_not_specialize=["pixels"])
def permute_kernel(
    p_t,
    p_places,
    p_bias,
    p_residual,
    p_y,
    pixels,
    N,
    WIDTH,
    RESIDUAL_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    B_P: tl.constexpr,
    B_C: tl.constexpr,
):
    """B_C channels of B_P pixels: from their places among WIDTH to their places among N, and the epilogue on the way."""
    o_c = tl.program_id(1) * B_C + tl.arange(0, B_C)
    o_p = (tl.program_id(0) * B_P + tl.arange(0, B_P)).to(tl.int64)
    m_c = o_c < N
    m_y = (o_p < pixels)[:, None] & m_c[None, :]
    places = tl.load(p_places + o_c, mask=m_c, other=0)
    y = tl.load(p_t + o_p[:, None] * WIDTH + places[None, :], mask=m_y, other=0.0).to(tl.float32)
    o_y = o_p[:, None] * N + o_c[None, :]
    if p_bias is not None:
        y += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    y = finish(y, p_residual, o_y, m_y, RESIDUAL_LAST, ACTIVATION)
    tl.store(p_y + o_y, y.to(p_y.dtype.element_ty), mask=m_y)


def launch_permute(t: Tensor, places: Tensor, y: Tensor, epilogue: Epilogue) -> None:
    """Write y [N, n, H, W] from t [N, n′, H, W], channel c from ``places[c]`` (int32 [n]); both channels_last."""
    count, channels, high, wide = y.shape
    pixels = count * high * wide
    block = min(256, triton.next_power_of_2(channels))
    rows = 4096 // block
    permute_kernel[(-(-pixels // rows), -(-channels // block))](
        t,
        places,
        epilogue.bias,
        epilogue.residual,
        y,
        pixels,
        channels,
        t.shape[1],
        RESIDUAL_LAST=epilogue.residual_last,
        ACTIVATION=epilogue.activation,
        B_P=rows,
        B_C=block,
        num_warps=4,
    )
