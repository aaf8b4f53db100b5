"""Random networks of lookups, dense layers, sums, activations and writes in place, as chains, against float64."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lcnn_compile import LookupConv2d
from lcnn_compile.backend import entry as backend
from lcnn_compile.backend import runtime
from lcnn_compile.kernels.triton.chain_operator import chain
from lcnn_compile.passes import chain_lookups, pool_first

CHANNELS = 16


class Random(nn.Module):
    """A straight program over values of one shape; all are in the output, as they were when they were last used."""

    def __init__(self, seed):
        super().__init__()
        draw = random.Random(seed)
        self.steps, self.layers = [], nn.ModuleList()
        for number in range(draw.randint(3, 12)):
            kind = draw.choice(
                ["lookup"]
                if number == 1
                else ["lookup"] * 5 + ["dense"] * 2 + ["norm", "relu", "relu_", "silu", "add", "add_", "view", "alias", "pool"]
            )
            layer = None
            if kind == "lookup":
                sizes = {"dictionary_size": draw.choice((4, 16, 20)), "sparsity": 2, "group_size": 8, "lowering": "lookup"}
                layer = LookupConv2d(CHANNELS, CHANNELS, 3, padding=1, bias=draw.random() < 0.5, **sizes)
            elif kind == "dense":
                kernel = draw.choice((1, 3))
                layer = nn.Conv2d(CHANNELS, CHANNELS, kernel, padding=kernel // 2, bias=draw.random() < 0.5)
            elif kind == "norm":
                layer = nn.BatchNorm2d(CHANNELS)
            self.layers.append(layer or nn.Identity())
            self.steps.append((kind, draw.randint(0, 3), draw.randint(0, 3), draw.random() < 0.3))

    def forward(self, x):
        values, rest = [x.clone()], 0
        for layer, (kind, first, second, forget) in zip(self.layers, self.steps, strict=True):
            a, b = values[-1 - first % len(values)], values[-1 - second % len(values)]
            if kind in ("lookup", "dense", "norm"):
                values.append(layer(a))
            elif kind == "relu":
                values.append(F.relu(a))
            elif kind == "relu_":
                values.append(F.relu(a, inplace=True))
            elif kind == "silu":
                values.append(F.silu(a))
            elif kind == "add":
                values.append(a + b)
            elif kind == "add_":
                a.add_(b)
            elif kind == "view":
                a[:, 2:9, 1:].mul_(0.5)
            elif kind == "alias":
                values.append(a[:, :, :, :])
            elif kind == "pool":
                values.append(F.max_pool2d(F.relu(a), 3, 1, 1))
            if forget and len(values) > 2:
                rest = rest + values.pop(0).float()
        return rest + sum(value.float() for value in values), values[-1]


@pytest.mark.parametrize("seed", range(20))
def test_random_networks(seed, monkeypatch):
    torch.manual_seed(seed)
    torch.compiler.reset()
    model = Random(seed).eval().requires_grad_(False)
    found = []

    def forced(gm):
        changed = pool_first(chain_lookups(gm, "cpu"), "cpu")
        found.extend(node for node in changed.graph.nodes if node.target is chain)
        return changed

    monkeypatch.setattr(runtime, "chain_lookups", forced)
    half = model.bfloat16()
    x = torch.randn(2, CHANNELS, 6, 7).bfloat16().contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(backend, "compile_with_inductor", lambda graph, *_: graph)
    with torch.no_grad():
        own = half(x.clone())
        y = torch.compile(half, backend=backend.lcnn)(x.clone())
        truth = half.double()(x.double())
    for a, b, t in zip(y, own, truth, strict=True):
        scale = t.double().norm()
        apart, allowed = (float((v.double() - t.double()).norm() / scale) for v in (a, b))
        assert apart <= 2 * allowed + 0.01, (seed, apart, allowed, model.steps)
    assert found
