"""LookupConv2d and LookupLinear as drop-ins."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from torch import fx, nn

from lcnn_compile import LcnnError, LookupConfig, LookupConv2d, LookupLinear
from lcnn_compile.testing import assert_equivalent, conv_layers

FULL = LookupConfig(dictionary_size=1.0, sparsity=None)


@given(conv_layers())
def test_full_size_is_the_dense_convolution(case):
    layer = LookupConv2d.from_conv(case.conv, FULL)
    assert torch.equal(layer.dense_weight(), case.conv.weight)
    assert_equivalent(case.conv, layer, case.inputs)
    assert_equivalent(case.conv, layer.to_conv(), case.inputs)


@pytest.mark.parametrize(
    "kwargs", [{}, {"groups": 2}, {"padding": "same", "padding_mode": "circular"}, {"bias": False, "stride": 2}]
)
def test_state_copy_pickle_and_repr(kwargs):
    layer = LookupConv2d(6, 10, 3, dictionary_size=4, sparsity=2.5, group_size=3, **kwargs)
    x = torch.randn(2, 6, 9, 8)
    y = layer(x)
    fresh = LookupConv2d(6, 10, 3, dictionary_size=4, sparsity=2.5, group_size=3, **kwargs)
    fresh.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert torch.equal(other(x), y)
    assert layer.coefficients.shape[0] == layer.filters.shape[0] * min(round(2.5 * 9), layer.dictionary_size * 9)
    assert "dictionary_size=" in repr(layer)
    assert ("bias=False" in repr(layer)) == (layer.bias is None)


def test_unbatched_and_wrong_dimensions():
    layer = LookupConv2d(6, 4, 3)
    x = torch.randn(6, 8, 8)
    torch.testing.assert_close(layer(x), layer(x[None])[0])
    with pytest.raises(LcnnError, match="Expected 3D"):
        layer(torch.randn(8, 8))


def test_initialisation_has_the_variance_of_a_dense_one():
    torch.manual_seed(1)
    dense = nn.Conv2d(64, 256, 3).weight.detach().var()
    lookup = LookupConv2d(64, 256, 3).dense_weight().detach().var()
    assert float(lookup) == pytest.approx(float(dense), rel=0.25)


def test_trains():
    layer, target = LookupConv2d(8, 8, 3, padding=1, dictionary_size=4, group_size=4), nn.Conv2d(8, 8, 3, padding=1)
    x = torch.randn(16, 8, 6, 6)
    optimiser = torch.optim.Adam(layer.parameters(), 0.02)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target(x).detach()).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    "change", [{"in_channels": 5, "groups": 2}, {"padding_mode": "mirror"}, {"stride": 2, "padding": "same"}]
)
def test_arguments_that_a_convolution_refuses(change):
    with pytest.raises(LcnnError):
        LookupConv2d(**{"in_channels": 6, "out_channels": 4, "kernel_size": 3, **change})


@pytest.mark.parametrize(
    "change", [{"dictionary_size": 0}, {"dictionary_size": 1.5}, {"sparsity": 0}, {"group_size": 0}, {"lowering": "x"}]
)
def test_sizes_out_of_range(change):
    with pytest.raises(LcnnError, match=next(iter(change))):
        LookupConv2d(6, 4, 3, **change)


def test_symbolic_tracing():
    model = nn.Sequential(
        LookupConv2d(3, 8, 3, padding_mode="reflect", padding=1), nn.ReLU(), nn.Flatten(), LookupLinear(8 * 36, 5)
    )
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (0, 6)])
def test_linear(shape):
    dense = nn.Linear(6, 10)
    layer = LookupLinear.from_linear(dense, FULL)
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), dense(x))
    torch.testing.assert_close(layer.to_linear()(x), dense(x))
    small = LookupLinear(6, 10, dictionary_size=3, sparsity=2)
    torch.testing.assert_close(small(x), torch.nn.functional.linear(x, small.dense_weight(), small.bias))
    with pytest.raises(LcnnError, match=r"\[\*, 6\]"):
        layer(torch.randn(7))
