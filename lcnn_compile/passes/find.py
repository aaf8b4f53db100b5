"""Pass: list the convolutions of a graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from lcnn_compile.geometry import kind_of
from lcnn_compile.kernels.arguments import Arguments, Weight
from lcnn_compile.kernels.operator import arguments, lookup_conv2d, lookup_conv2d_inference
from lcnn_compile.modules import LookupLinear, LookupModule
from lcnn_compile.passes.targets import CONVOLUTION, attribute, convolution_of, is_get_attr

LOOKUPS = (lookup_conv2d, lookup_conv2d.overloadpacket, lookup_conv2d_inference, lookup_conv2d_inference.overloadpacket)


@dataclass(frozen=True)
class Convolution:
    """A convolution in a graph.

    Attributes:
        node: its node.
        name: the module's qualified name, or that of its weight where it is called as a function, or the node's.
        lookup: whether it is a lookup convolution already.
    """

    node: fx.Node
    name: str
    lookup: bool


def find_convolutions(gm: fx.GraphModule) -> list[Convolution]:
    """Every convolution that has a lookup form, in the order of execution, dense or lookup, module or function call."""
    return list(_find(gm))


def _find(gm: fx.GraphModule) -> Iterator[Convolution]:
    for node in gm.graph.nodes:
        if node.op == "call_module":
            module = gm.get_submodule(node.target)
            lookup = isinstance(module, LookupModule)
            if (lookup and not isinstance(module, LookupLinear)) or kind_of(module) not in (None, nn.Linear):
                yield Convolution(node, str(node.target), lookup)
        elif convolution_of(node) or node.target in CONVOLUTION or is_lookup(node):
            weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
            name = str(weight.target) if isinstance(weight, fx.Node) and is_get_attr(weight) else node.name
            yield Convolution(node, name, is_lookup(node))


def arguments_of(node: fx.Node) -> Arguments:
    """The arguments of a lookup convolution; nodes stand where the operator gets tensors."""
    return arguments(*node.args, **node.kwargs)


def weight_of(gm: fx.GraphModule, node: fx.Node) -> Weight:
    """The weight of a lookup convolution whose tensors are attributes of the module."""
    return Weight(*(attribute(gm, tensor.target) for tensor in arguments_of(node).weight))  # type: ignore[attr-defined]


def precision_of(node: fx.Node) -> str:
    """The precision that a lookup convolution may compute in."""
    return arguments_of(node).precision


def ranges_of(node: fx.Node) -> fx.Node | None:
    """The ranges of a lookup convolution that computes in bytes."""
    call = arguments_of(node)
    return call.ranges if isinstance(call.ranges, fx.Node) and call.precision == "int8" else None


def is_lookup(node: fx.Node) -> bool:
    """Whether a node calls the lookup operator."""
    return node.op == "call_function" and node.target in LOOKUPS
