"""What a compiled graph derives from weights has fixed sizes, and what a tracer asserts stays out of graphs."""

import pytest
import torch
from nets import randomise
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import compile_fx

from lcnn_compile import LookupConfig, convert
from lcnn_compile.backend import runtime
from lcnn_compile.passes import fold_batch_norm
from lcnn_compile.testing import assert_equivalent

LOSSLESS = LookupConfig(dictionary_size=1.0, sparsity=None, lowering="lookup")


def separable():
    """A depthwise convolution whose batch norm is folded: its weight is neither a parameter nor of Dynamo's making."""
    middle = [nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.SiLU()]
    return randomise(nn.Sequential(nn.Conv2d(3, 16, 3), nn.SiLU(), *middle, nn.Conv2d(16, 16, 1), nn.SiLU(), *middle)).eval()


@pytest.mark.usefixtures("backend_reset")
def test_derived_tensors_have_no_symbols(monkeypatch):
    seen = []

    def fake_sizes(graph, inputs):
        seen.extend(node.meta["val"].shape for node in graph.graph.find_nodes(op="placeholder") if "val" in node.meta)
        return graph.forward

    monkeypatch.setattr(compile_fx, "compile_fx", lambda graph, inputs, **_: aot_autograd(fw_compiler=fake_sizes)(graph, inputs))
    # Programs take depthwise layers too: what stays for Inductor is looked at here.
    monkeypatch.setattr(runtime, "gather_programs", lambda graph: graph)
    model = separable()
    x = torch.randn(2, 3, 16, 20)
    assert_equivalent(model, torch.compile(convert(model, LOSSLESS), backend="lcnn"), x, factor=8)
    weights = [shape for shape in seen if len(shape) == 4 and shape[1:] == (1, 3, 3)]
    assert len(weights) == 2
    assert all(type(size) is int for shape in weights for size in shape)


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d])
def test_a_transposed_layer_in_a_graph_asserts_nothing(kind):
    model = convert(nn.Sequential(kind(6, 4, 2, stride=2), nn.ReLU()), LOSSLESS)

    class Leaves(fx.Tracer):
        def is_leaf_module(self, module, name):
            return not isinstance(module, nn.Sequential)

    graph = fold_batch_norm(fx.GraphModule(model, Leaves().trace(model)))
    assert not [node for node in graph.graph.nodes if "assert" in str(node.target)]
    x = torch.randn(2, 6, *[7] * (2 if kind is nn.ConvTranspose2d else 1))
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x))
