"""Pass: turn convolutions called as functions on a parameter into ``nn.Conv2d`` modules, so that they can be replaced."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from lcnn_compile.passes.targets import CONV2D, CONVOLUTION, attribute, bound, is_get_attr

_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def _geometry(node: fx.Node) -> dict[str, Any] | None:
    """input, weight, bias, stride, padding, dilation, groups of a convolution node; None where one is computed."""
    if node.target in CONV2D:
        values = bound(node, _NAMES, (None, None, None, 1, 0, 1, 1))
    elif node.target in CONVOLUTION:
        values = bound(node, (*_NAMES[:6], "transposed", "output_padding", "groups"), (None, None, None, 1, 0, 1, False, 0, 1))
        if values[6] is not False:
            return None
        del values[6:8]
    else:
        return None
    found = dict(zip(_NAMES, values, strict=True))
    static = all(not isinstance(v, fx.Node) for key in ("stride", "padding", "dilation") for v in _flat(found[key]))
    known = is_get_attr(found["weight"]) and (found["bias"] is None or is_get_attr(found["bias"]))
    return found if static and known and isinstance(found["groups"], int) else None


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _pair(value: Any) -> Any:
    if isinstance(value, str):
        return value
    values = _flat(value)
    return (values[0], values[-1])


def make_conv(weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int) -> nn.Conv2d:
    """An ``nn.Conv2d`` that shares ``weight`` [n, m/groups, kh, kw] and ``bias`` [n], parameters staying parameters."""
    n, m, kh, kw = weight.shape
    sizes = (m * groups, n, (kh, kw), _pair(stride), _pair(padding), _pair(dilation), groups)
    conv = nn.Conv2d(*sizes, bias=bias is not None, device="meta")
    conv.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, weight.requires_grad)
    if bias is not None:
        conv.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, bias.requires_grad)
    return conv


def lift_functional_convolutions(gm: fx.GraphModule) -> fx.GraphModule:
    """Replace every conv2d call on get_attr weights by a call of a new ``nn.Conv2d``.

    It is named as the owner of its weight where that is a bare container, else after the weight plus "_conv2d". The graph is changed in place and returned. Two calls with the same weight and geometry share one module.
    Convolutions whose weight or geometry is computed in the graph are left as they are.
    """
    made: dict[tuple[Any, ...], str] = {}
    for node in list(gm.graph.nodes):
        found = _geometry(node) if node.op == "call_function" else None
        if found is None or attribute(gm, found["weight"].target).dim() != 4:
            continue
        bias = found["bias"]
        key = (
            found["weight"].target,
            bias and bias.target,
            *(str(found[k]) for k in ("stride", "padding", "dilation", "groups")),
        )
        if key not in made:
            made[key] = _name(gm, str(found["weight"].target), None if bias is None else str(bias.target))
            tensors = [attribute(gm, found["weight"].target), None if bias is None else attribute(gm, bias.target)]
            geometry = [found[name] for name in ("stride", "padding", "dilation", "groups")]
            gm.add_submodule(made[key], make_conv(*tensors, *geometry).train(gm.training))
        with gm.graph.inserting_before(node):
            call = gm.graph.call_module(made[key], (found["input"],))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        gm.graph.erase_node(node)
    if made:
        _drop_dead_attributes(gm, set(made.values()))
        gm.graph.lint()
        gm.recompile()
    return gm


def _name(gm: fx.GraphModule, weight: str, bias: str | None) -> str:
    """The new module's name: the owner of weight and bias where it is a bare container of just these, else a new name."""
    owner, _, key = weight.rpartition(".")
    container = gm.get_submodule(owner)
    own = {f"{owner}.{name}" for name in (*container._parameters, *container._buffers)}
    bare = owner and type(container) is nn.Module and not container._modules
    if bare and key == "weight" and own == {weight, bias or weight} and bias in (None, f"{owner}.bias"):
        return owner
    if isinstance(container, nn.Conv2d):
        # A second convolution on a weight whose owner has become the first one.
        weight = owner
    taken = {name for name, _ in gm.named_modules()}
    name, number = f"{weight}_conv2d", 1
    while name in taken:
        name, number = f"{weight}_conv2d_{number}", number + 1
    return name


def _drop_dead_attributes(gm: fx.GraphModule, modules: set[str]) -> None:
    """Erase get_attr nodes without users, and the attributes that nothing reads any more, but for those of ``modules``."""
    dead = [node for node in gm.graph.nodes if node.op == "get_attr" and not node.users]
    for node in dead:
        gm.graph.erase_node(node)
    read = {node.target for node in gm.graph.nodes if node.op == "get_attr"}
    for target in {str(node.target) for node in dead} - read:
        parent, _, name = target.rpartition(".")
        owner = gm.get_submodule(parent)
        if parent in modules:
            continue
        if name in owner._parameters or name in owner._buffers:
            delattr(owner, name)
