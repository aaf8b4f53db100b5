"""Every kind of layer that has a lookup form, through the whole contract."""

import copy
import dataclasses
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layer_kinds import KINDS, layers
from torch import fx, nn

import lcnn_compile
from lcnn_compile import LayerConfig, LcnnError, LookupConfig, convert, explain, load, save
from lcnn_compile.backend.calibrating import _FITS
from lcnn_compile.export import export_program, to_dense
from lcnn_compile.geometry import geometry_of
from lcnn_compile.modules import LOOKUP_KINDS, lookup_layer
from lcnn_compile.testing import assert_close, assert_equivalent, lookup_weights

FULL = LayerConfig(dictionary_size=1.0, sparsity=None, group_size=3)
LOWERINGS = st.sampled_from(["lookup", "factored", "dense", "auto"])


@pytest.mark.parametrize("kind", KINDS)
@given(st.data(), LOWERINGS)
def test_full_size_is_the_dense_layer(kind, data, lowering):
    case = data.draw(layers(kind))
    layer = LOOKUP_KINDS[kind].from_conv(case.layer, LookupConfig(dictionary_size=1.0, sparsity=None, lowering=lowering))
    assert torch.equal(layer.dense_weight(), case.layer.weight)
    assert_equivalent(case.layer, layer, case.inputs)
    assert layer(case.inputs).is_contiguous()


@pytest.mark.parametrize("kind", KINDS)
@given(st.data(), LOWERINGS)
def test_random_lookups_are_the_dense_layer_of_their_weight(kind, data, lowering):
    case = data.draw(layers(kind))
    geometry = geometry_of(case.layer)
    weight = data.draw(lookup_weights(geometry.in_channels, geometry.out_channels, geometry.kernel_size, geometry.groups))
    layer = lookup_layer(weight, case.layer, case.layer.bias, lowering)
    torch.testing.assert_close(layer.dense_weight(), geometry.own_weight(weight.dense_weight()), rtol=1e-5, atol=1e-5)
    # Rounding errors scale with the terms of P·D, which may cancel out in W.
    sizes = dataclasses.replace(weight, dictionary=weight.dictionary.abs(), coefficients=weight.coefficients.abs())
    bias, x = case.layer.bias, case.inputs
    with torch.no_grad():
        terms = lookup_layer(sizes, case.layer, None if bias is None else bias.abs()).to_conv()(x.abs())
        truth = layer.to_conv().double()(x.double())
        floor = layer.to_conv()(x).double() + 4 * torch.finfo(x.dtype).eps * (terms.max() if terms.numel() else 0.0)
        assert_close(layer(x), floor.float(), truth)
    again = lookup_layer(layer.lookup_weight(), layer.to_conv(), layer.bias, lowering)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), layer.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_none_has_gradients(kind):
    dimensions = int(kind.__name__[-2])
    layer = LOOKUP_KINDS[kind](4, 6, 2, stride=2, dictionary_size=2)
    x = torch.randn(0, 4, *[5] * dimensions, requires_grad=True)
    y = layer(x)
    assert y.shape == layer.to_conv()(x).shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not any(p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_gradients_are_those_of_the_dense_layer(kind, data):
    case = data.draw(layers(kind))
    geometry = geometry_of(case.layer)
    weight = data.draw(lookup_weights(geometry.in_channels, geometry.out_channels, geometry.kernel_size, geometry.groups))
    layer = lookup_layer(weight.to(torch.float64), case.layer, case.layer.bias)
    x = case.inputs.double().requires_grad_()
    y = layer(x)
    probe = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    names = ["dictionary", "coefficients", *(["bias"] if layer.bias is not None else [])]
    found = torch.autograd.grad((y * probe).sum(), [x, *(getattr(layer, name) for name in names)])
    dense = layer.to_conv()
    tensors = {"weight": layer.dense_weight(), **({"bias": layer.bias} if layer.bias is not None else {})}
    z = torch.func.functional_call(dense, tensors, (x,))
    wanted = torch.autograd.grad((z * probe).sum(), [x, *(getattr(layer, name) for name in names)])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_random_initialisation_copies_pickles_and_prints(kind):
    torch.manual_seed(3)
    args = (64, 32, 4)
    layer = LOOKUP_KINDS[kind](*args, padding=1, dictionary_size=0.5)
    dense = kind(*args, padding=1)
    assert float(layer.dense_weight().var()) == pytest.approx(float(dense.weight.var()), rel=0.25)
    assert float(layer.bias.abs().max()) <= float(dense.weight.abs().max())
    assert layer.weight.shape == dense.weight.shape
    small = LOOKUP_KINDS[kind](6, 4, 3, 2, groups=2, bias=False, dictionary_size=2, sparsity=2, group_size=1)
    x = torch.randn(2, 6, *[7] * (len(dense.weight.shape) - 2))
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(other(x), small(x))
    assert "groups=2, bias=False, dictionary_size=2" in repr(small)
    assert getattr(lcnn_compile, type(layer).__name__) is type(layer)
    traced = fx.symbolic_trace(small, {"output_size": None} if "Transpose" in kind.__name__ else None)
    torch.testing.assert_close(traced(x), small(x))
    with pytest.raises(LcnnError, match="Expected"):
        small(torch.randn(3, 3, 3, 3, 3, 6))
    with pytest.raises(LcnnError, match=kind.__name__):
        LOOKUP_KINDS[kind](6, 4, 3, groups=4)


@pytest.mark.parametrize("extra", [(0, 0), (1, 2), (0, 1)])
def test_output_size_of_transposed_layers(extra):
    dense = nn.ConvTranspose2d(5, 4, (4, 3), (2, 3), (1, 0), output_padding=(1, 1))
    layer = LOOKUP_KINDS[nn.ConvTranspose2d].from_conv(dense, FULL)
    x = torch.randn(2, 5, 6, 7)
    size = [(6 - 1) * 2 - 2 + 4 + extra[0], (7 - 1) * 3 + 3 + extra[1]]
    reference = copy.deepcopy(dense).double()(x.double(), size)
    assert_close(layer(x, output_size=size), dense(x, size), reference)
    with pytest.raises(LcnnError, match="output_size 40"):
        layer(x, output_size=[40, 40])


class Signal(nn.Module):
    """1-d convolutions, as audio networks have them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(8, 12, 5, stride=2, padding=2)
        self.norm = nn.BatchNorm1d(12)
        self.dilated = nn.Conv1d(12, 12, 3, padding="same", dilation=2, padding_mode="reflect")
        self.up = nn.ConvTranspose1d(12, 6, 4, stride=2, padding=1)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        return self.up(x + torch.relu(self.dilated(x)))


class Pictures(nn.Module):
    """An encoder and a decoder of transposed convolutions."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(12, 8, 3, stride=2, padding=1, output_padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2, bias=False)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.up(torch.relu(self.down(x))))))


class Video(nn.Module):
    """3-d convolutions, strided in time and in space."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv3d(6, 8, 3, padding=1)
        self.strided = nn.Conv3d(8, 10, (2, 3, 3), stride=(2, 2, 1), padding=(0, 1, 1), bias=False)
        self.time = nn.Conv3d(10, 8, (3, 1, 1), padding=(1, 0, 0), padding_mode="replicate")

    def forward(self, x):
        return self.time(torch.relu(self.strided(torch.relu(self.first(x)))))


NETWORKS = {Signal: (8, 32), Pictures: (8, 9, 11), Video: (6, 6, 8, 7)}


def network(kind):
    torch.manual_seed(0)
    model = kind().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


def smooth(kind, count, seed=0):
    """Inputs whose neighbours are alike, as in signals, pictures and films."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *NETWORKS[kind], generator=generator)
    for dim in range(2, x.dim()):
        x = x + x.roll(1, dim) + x.roll(2, dim)
    return x


@pytest.mark.parametrize("kind", NETWORKS)
def test_convert_explain_save_and_load(kind, tmp_path):
    model = network(kind)
    lossless = convert(model, LookupConfig(dictionary_size=1.0, sparsity=None), calibration=[smooth(kind, 4)])
    assert_equivalent(model, lossless, smooth(kind, 3, 1), factor=16)
    assert all(row.error < 1e-9 for row in lossless.lcnn_report)
    config = LookupConfig(dictionary_size=0.5, sparsity=3, group_size=4)
    planned = explain(model, config, example_inputs=(smooth(kind, 1),))
    converted = convert(model, config, calibration=[smooth(kind, 6), smooth(kind, 6, 2)])
    for a, b in zip(planned, converted.lcnn_report, strict=True):
        layer = converted.get_submodule(b.name)
        assert b.kind == type(model.get_submodule(b.name)).__name__
        assert type(layer) is LOOKUP_KINDS[type(model.get_submodule(b.name))]
        assert (a.name, a.replaced, a.dictionary_size, a.taps, a.macs_before, a.macs_after) == (
            (b.name, b.replaced, b.dictionary_size, b.taps, b.macs_before, b.macs_after)
        )
        assert b.bytes_after == layer.lookup_weight().nbytes() + (0 if layer.bias is None else 4 * layer.bias.numel())
        assert 0 < b.error < 0.9
    save(converted, tmp_path / "m.safetensors")
    loaded = load(kind().eval(), tmp_path / "m.safetensors")
    x = smooth(kind, 3, 3)
    assert torch.equal(loaded(x), converted(x))
    dense = to_dense(loaded)
    assert_equivalent(dense, loaded, x, factor=16)
    assert not any(isinstance(m, lcnn_compile.modules.LookupModule) for m in dense.modules())


def test_multiply_adds_of_each_kind():
    """Counted by hand: dense, and with k vectors and t taps per filter."""
    config = LookupConfig(dictionary_size=2, sparsity=1, group_size=1)
    for layer, size, before, after in (
        (nn.Conv1d(4, 6, 3, stride=2), (9,), 4 * 6 * 3 * 4, 2 * 4 * 9 + 6 * 3 * 4),
        (nn.Conv3d(4, 6, 3), (5, 5, 5), 4 * 6 * 27 * 27, 2 * 12 * (3 * 25) + 6 * 9 * 27),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (5, 4), 4 * 6 * 9 * 20, 2 * 4 * 20 + 6 * 9 * 20),
    ):
        row = convert(layer, config, calibration=[torch.randn(3, 4, *size)]).lcnn_report[0]
        assert (row.macs_before, row.macs_after) == (before, after)


def test_rules_by_type():
    model = nn.ModuleDict({"a": network(Signal), "b": network(Pictures)})
    config = LookupConfig(
        dictionary_size=4, sparsity=2, include=(nn.ConvTranspose1d, nn.Conv2d), layers={nn.Conv2d: {"group_size": 2}}
    )
    rows = {row.name: row for row in explain(model, config)}
    assert [name for name, row in rows.items() if row.replaced] == ["a.up", "b.down"]
    assert rows["b.down"].group_size == 2
    rows = explain(model, config.replace(include=(), exclude=(nn.Conv1d, "type:torch.nn.modules.conv.ConvTranspose2d")))
    assert [row.name for row in rows if row.replaced] == ["a.up", "b.down"]


@pytest.mark.parametrize("kind", [Video])
def test_backend_on_converted_models(kind, backend_reset):
    model = network(kind)
    converted = convert(model, LookupConfig(dictionary_size=0.5, sparsity=3), calibration=[smooth(kind, 4)])
    compiled = torch.compile(converted, backend="lcnn")
    with torch.no_grad():
        assert_equivalent(converted, compiled, smooth(kind, 2, 1), factor=16)


@pytest.mark.parametrize("kind", [Signal, Pictures])
def test_backend_on_dense_models(kind, backend_reset):
    _FITS.clear()
    model = network(kind)
    options = {"dictionary_size": 1.0, "sparsity": None, "lowering": "lookup"}
    compiled = torch.compile(copy.deepcopy(model), backend="lcnn", options=options)
    x = smooth(kind, 2)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
        assert_equivalent(model, compiled, smooth(kind, 2, 1), factor=16)
    [fit] = _FITS.values()
    assert len(fit.layers) == 3
    _FITS.clear()


@pytest.mark.parametrize("kind", NETWORKS)
def test_export(kind):
    x = smooth(kind, 2)
    converted = convert(network(kind), LookupConfig(dictionary_size=0.5, sparsity=3), calibration=[x])
    for lowering in ("lookup", "factored"):
        program = export_program(converted, x, lowering=lowering)
        assert_equivalent(converted, program.module(), x, factor=16)
        assert_equivalent(converted, program.module(), smooth(kind, 3, 1), factor=16)


@pytest.mark.parametrize("kind", NETWORKS)
def test_fine_tuning(kind):
    model, x = network(kind), smooth(kind, 6)
    with torch.no_grad():
        wanted = model(x)
    converted = convert(model, LookupConfig(dictionary_size=0.4, sparsity=2), calibration=[x])
    optimiser = torch.optim.Adam(converted.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        loss = (converted(x) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
