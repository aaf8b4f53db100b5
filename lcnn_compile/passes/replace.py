"""Pass: put lookup convolutions in the place of dense ones."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx

from lcnn_compile.errors import ConversionError
from lcnn_compile.geometry import kind_of
from lcnn_compile.lookup import LookupWeight
from lcnn_compile.modules import lookup_layer, replace_module
from lcnn_compile.passes.lift import lift_functional_convolutions


def replace_convolutions(
    gm: fx.GraphModule, weights: Mapping[str, tuple[LookupWeight, Tensor | None]], lowering: str = "auto"
) -> fx.GraphModule:
    """Replace the named convolutions by lookup convolutions with the given weights and biases.

    Names are those of modules; a convolution that is called as a function on a parameter becomes a module
    first (see :func:`lift_functional_convolutions`). Changed in place and returned.

    Raises:
        ConversionError: for a name that is no layer of the graph that has a lookup form.
        WeightError: for a weight that does not fit its layer.
    """
    lift_functional_convolutions(gm)
    modules = dict(gm.named_modules())
    for name, (weight, bias) in weights.items():
        old = modules.get(name)
        if old is None or kind_of(old) is None:
            known = [n for n, module in modules.items() if kind_of(module) is not None]
            raise ConversionError(f"{name!r} is no convolution of the graph; there are {known}")
        replace_module(gm, old, lookup_layer(weight, old, bias, lowering))
    gm.recompile()
    return gm
