"""Assertions of numerical equivalence by the distance to float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lcnn_compile.torch_private import module_of, pytree

FACTOR = 4.0


def error(result: Tensor, reference: Tensor) -> float:
    """Largest distance to the float64 ``reference``; infinite where shapes differ or a value is not finite."""
    if result.shape != reference.shape:
        return float("inf")
    distance = (result.double() - reference).abs()
    return float(distance.nan_to_num(float("inf")).max()) if distance.numel() else 0.0


def tolerance(own: Tensor, reference: Tensor, factor: float = FACTOR) -> float:
    """What a result may differ from ``reference``: ``factor`` times PyTorch's ``own`` error, at least a few units of rounding."""
    if not reference.numel():
        return 0.0
    # Nothing is wider than float64, so there the reference has rounding errors of its own, of sums in another order.
    unit = torch.finfo(own.dtype).eps * (32 if own.dtype == torch.float64 else 1)
    return factor * max(error(own, reference), unit * float(reference.abs().max()))


def assert_close(result: Tensor, own: Tensor, reference: Tensor, *, factor: float = FACTOR, name: str = "result") -> None:
    """Assert that ``result`` is as close to the float64 ``reference`` as PyTorch's ``own`` result, times ``factor``."""
    found, allowed = error(result, reference), tolerance(own, reference, factor)
    if not found <= allowed:
        at = ""
        if result.shape == reference.shape:
            worst = int((result.double() - reference).abs().nan_to_num(float("inf")).argmax())
            at = f" at {tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), reference.shape))}"
        raise AssertionError(
            f"{name} of shape {tuple(result.shape)} ({result.dtype}) differs by {found:.3g}{at} from the float64 reference "
            f"of shape {tuple(reference.shape)}; allowed is {allowed:.3g}, {factor:g} times PyTorch's own error"
        )


def assert_equivalent(model: nn.Module, compiled: Any, inputs: Any, *, factor: float = FACTOR) -> None:
    """Assert that ``compiled(*inputs)`` computes what ``model(*inputs)`` does, as exactly as PyTorch's own result times ``factor``.

    Args:
        model: the original; it is run as it is and as a copy in float64.
        compiled: what stands for it: a compiled, converted or hand-made callable.
        inputs: one tensor, or the tuple of all inputs.
        factor: how much farther from float64 than PyTorch's own result is allowed.

    Raises:
        AssertionError: naming the first layer that diverges, where both are modules with layers of the same names.
    """
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    wide = copy.deepcopy(model).double()
    wide_args = pytree.tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, args)
    with torch.no_grad():
        reference, own, result = (pytree.tree_leaves(f(*a)) for f, a in ((wide, wide_args), (model, args), (compiled, args)))
    if len(result) != len(own):
        raise AssertionError(f"{len(result)} outputs; the original has {len(own)}")
    for number, (r, o, w) in enumerate(zip(result, own, reference, strict=True)):
        if not isinstance(o, Tensor):
            continue
        if isinstance(r, Tensor) and (r.shape, r.dtype) != (o.shape, o.dtype):
            raise AssertionError(f"output {number} is {r.dtype} {tuple(r.shape)}; the original is {o.dtype} {tuple(o.shape)}")
        try:
            assert_close(r, o, w, factor=factor, name=f"output {number}")
        except AssertionError as failure:
            raise AssertionError(f"{failure}{_first_divergence(model, wide, compiled, args, wide_args, factor)}") from None


def _first_divergence(model: nn.Module, wide: nn.Module, compiled: Any, args: Any, wide_args: Any, factor: float) -> str:
    """Where the two part, as a phrase; "" where it cannot be told."""
    other = module_of(compiled)
    if not isinstance(other, nn.Module):
        return ""
    seen = [_outputs(m, a) for m, a in ((model, args), (wide, wide_args), (other, args))]
    for name in seen[2]:
        if name in seen[0] and name in seen[1]:
            found, allowed = error(seen[2][name], seen[1][name]), tolerance(seen[0][name], seen[1][name], factor)
            if not found <= allowed:
                return f"; the first layer to diverge is {name!r}, by {found:.3g} where {allowed:.3g} is allowed"
    return "; no layer diverges when both run eagerly, so compilation is to blame"


def _outputs(model: nn.Module, args: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():

        def keep(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            if isinstance(output, Tensor) and name and name not in found:
                found[name] = output.detach().clone()

        handles.append(module.register_forward_hook(keep))
    try:
        with torch.no_grad():
            model(*args)
    finally:
        for handle in handles:
            handle.remove()
    return found
