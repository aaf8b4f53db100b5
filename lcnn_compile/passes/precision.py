"""Pass: let the lookup convolutions of a graph round their operands."""

from __future__ import annotations

from torch import fx

from lcnn_compile.errors import ConfigError
from lcnn_compile.kernels.cpu import PRECISIONS
from lcnn_compile.passes.find import is_lookup
from lcnn_compile.passes.functional import to_functional


def set_precision(gm: fx.GraphModule, precision: str) -> fx.GraphModule:
    """Give every lookup convolution this precision, "float32" or "bfloat16". Changed in place and returned.

    Raises:
        ConfigError: for another precision.
    """
    if precision not in PRECISIONS:
        raise ConfigError(
            f"precision is {precision!r}; allowed are {PRECISIONS}: layers of bytes have ranges, which a conversion finds"
        )
    to_functional(gm)
    for node in gm.graph.nodes:
        if is_lookup(node):
            node.args = node.args[:17]
            node.kwargs = {**node.kwargs, "precision": precision}
    gm.recompile()
    return gm
