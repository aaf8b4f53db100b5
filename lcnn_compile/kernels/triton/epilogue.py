"""The epilogue of the kernels: bias, residual, activation and the store of a tile."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """The activation, on float32."""
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)
    elif ACTIVATION == "relu6":
        y = tl.where(y < 0, 0.0, tl.where(y > 6, 6.0, y))
    elif ACTIVATION == "silu":
        y = y / (1.0 + tl.exp(-y))
    elif ACTIVATION == "hardswish":
        gate = y + 3.0
        gate = tl.where(gate < 0, 0.0, tl.where(gate > 6, 6.0, gate))
        y = y * gate * 0.16666666666666666
    return y


@triton.jit
def finish(acc, p_residual, o_y, m_y, RESIDUAL_LAST: tl.constexpr, ACTIVATION: tl.constexpr):
    """Activation and residual, if any, of a float32 tile that lies at o_y of the output."""
    if p_residual is not None:
        residual = tl.load(p_residual + o_y, mask=m_y, other=0.0).to(tl.float32)
        acc = activate(acc, ACTIVATION) + residual if RESIDUAL_LAST else activate(acc + residual, ACTIVATION)
    else:
        acc = activate(acc, ACTIVATION)
    return acc


@triton.jit
def store_tile(
    acc,
    p_y,
    p_bias,
    p_residual,
    channels,
    m_c,
    y_c,
    o_y,
    m_p,
    RESIDUAL_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    VEC: tl.constexpr,
):
    """Bias, residual, activation, store, for a float32 tile [channels, pixels]."""
    m_y = m_c[:, None] & m_p[None, :]
    o_c = channels.to(tl.int64) * y_c
    if VEC > 1:
        o_c = tl.multiple_of(o_c, VEC)
        m_y = tl.max_constancy(m_y, [1, VEC])
    o_cy = o_c[:, None] + o_y[None, :]
    if p_bias is not None:
        acc += tl.load(p_bias + channels, mask=m_c, other=0.0).to(tl.float32)[:, None]
    acc = finish(acc, p_residual, o_cy, m_y, RESIDUAL_LAST, ACTIVATION)
    tl.store(p_y + o_cy, acc.to(p_y.dtype.element_ty), mask=m_y)
