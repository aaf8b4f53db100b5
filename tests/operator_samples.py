"""The analysis of writes and aliases against what PyTorch's operators really do, on the samples of its own test-suite.

Run by test_operators_effects.py in a process of its own: PyTorch's test-suite changes global flags of the process that imports it.
"""

import sys
import warnings

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lcnn_compile import LcnnError
from lcnn_compile.passes.effects import Effects

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

SAMPLES = 2
PLAIN = (int, float, bool, complex, str, type(None), fx.Node, slice, torch.dtype, torch.device, torch.memory_format, torch.layout)


def storage(tensor):
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def one_call(kind, target, args, kwargs):
    """A graph of a single call, its node and its tensors; None where an argument is no plain value."""
    graph, tensors = fx.Graph(), []

    def lift(value):
        tensors.append(value)
        return graph.placeholder(f"t{len(tensors)}")

    args, kwargs = pytree.tree_map_only(Tensor, lift, (tuple(args), dict(kwargs)))
    if kind == "call_function" and not hasattr(target, "__name__"):
        return None
    if not all(isinstance(leaf, PLAIN) for leaf in pytree.tree_leaves((args, kwargs))):
        return None
    node = getattr(graph, kind)(target, args, kwargs)
    graph.output(node)
    return fx.GraphModule(nn.Module(), graph), node, tensors


def what_was_missed(kind, target, args, kwargs):
    """What a call does that the analysis does not say; None where the call cannot be made."""
    made = one_call(kind, target, args, kwargs)
    if made is None:
        return None
    gm, node, tensors = made
    try:
        effects = Effects(gm, root_of=lambda place: place)
    except LcnnError:
        return []  # refused
    versions, state = [t._version for t in tensors], torch.get_rng_state()
    places = dict(zip(gm.graph.find_nodes(op="placeholder"), tensors, strict=True))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), places.__getitem__)
    try:
        call = getattr(tensors[0], target) if kind == "call_method" else target
        result = call(*(args[1:] if kind == "call_method" else args), **kwargs)
    except Exception:
        # Samples fit the operator, not always each of its forms.
        return None
    outputs = {storage(leaf) for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)}
    missed = []
    for (place, tensor), version in zip(places.items(), versions, strict=True):
        if tensor._version != version and place not in effects.written(node):
            missed.append("a write")
        if storage(tensor) in outputs and place not in effects.memory(node):
            missed.append("an alias")
    if not torch.equal(state, torch.get_rng_state()) and not effects.has_effect(node):
        missed.append("random numbers")
    return missed


def forms(op, sample):
    """The ways to call an operator: as a function and a method, in place and not."""
    args = (sample.input, *sample.args)
    yield "call_function", op.op, args
    if op.method_variant is not None:
        yield "call_method", getattr(op.method_variant, "__name__", op.name), args
    if op.inplace_variant is not None and isinstance(sample.input, Tensor):
        name = getattr(op.inplace_variant, "__name__", f"{op.name}_")
        yield "call_method", name, (sample.input.clone(), *sample.args)
        if hasattr(torch, name):
            yield "call_function", getattr(torch, name), (sample.input.clone(), *sample.args)


def main(part, parts):
    """Check a share of all operators; the process fails with a list of what was missed."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    missed, calls = {}, 0
    for op in op_db[part::parts]:
        try:
            samples = list(op.sample_inputs("cpu", torch.float32, requires_grad=False))[:SAMPLES]
        except Exception:
            continue  # operators of other builds
        for sample in samples:
            for kind, target, args in forms(op, sample):
                found = what_was_missed(kind, target, args, sample.kwargs)
                calls += found is not None
                if found:
                    missed[op.name, kind] = found
    assert not missed, missed
    assert calls > 300, calls


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
