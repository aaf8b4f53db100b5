"""``layer.weight``: questions about its form are free, reads are exact and differentiable, writes are never lost without a word."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import fusion, parametrizations, parametrize, prune

from lcnn_compile import LcnnError, LookupConfig, LookupConv1d, LookupConv2d, LookupConv3d, LookupLinear, convert
from lcnn_compile.modules import LookupConvTranspose1d, LookupConvTranspose2d, LookupModule

LAYERS = {
    "linear": (lambda: LookupLinear(8, 12), (3, 8)),
    "1d": (lambda: LookupConv1d(8, 12, 3, groups=2), (2, 8, 7)),
    "2d": (lambda: LookupConv2d(8, 12, 3), (2, 8, 7, 6)),
    "3d": (lambda: LookupConv3d(8, 12, 3), (1, 8, 4, 5, 6)),
    "transposed 1d": (lambda: LookupConvTranspose1d(8, 12, 4, 2, groups=2), (2, 8, 5)),
    "transposed 2d": (lambda: LookupConvTranspose2d(8, 12, 4, 2), (2, 8, 5, 4)),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param][0]()


class AsksForm(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        w = self.layer.weight
        assert isinstance(w, torch.Tensor)
        assert w.dim() == w.ndim
        assert w.numel() == w.shape.numel() == w.size().numel()
        zero = w.new_zeros(()) + torch.zeros_like(w).sum()
        if w.requires_grad:
            zero = zero * 2
        return self.layer(x.to(w.dtype).to(w.device)) + zero if not w.is_cuda else x


class AsksValues(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) * self.layer.weight.square().mean()


def test_form_without_values(layer, monkeypatch):
    dense, w = layer.to_dense().weight, layer.weight
    want = layer(torch.zeros(next(shape for make, shape in LAYERS.values() if type(make()) is type(layer))))
    monkeypatch.setattr(LookupModule, "dense_weight", lambda self: pytest.fail("values were formed"))
    for question in (
        *(
            lambda t, name=name: getattr(t, name)
            for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout")
        ),
        *(
            lambda t, name=name: getattr(t, name)()
            for name in ("size", "stride", "dim", "numel", "element_size", "is_contiguous")
        ),
        lambda t: (t.size(0), len(t), t.nbytes, t.type(), t.data.dtype, t.data.shape, t.data.size(), t.is_floating_point()),
        lambda t: [
            (x.shape, x.dtype, x.stride()) for x in (t.new_zeros(3), t.new_empty((2, 1)), torch.ones_like(t), torch.empty_like(t))
        ],
        lambda t: torch.zeros(2, dtype=torch.float64).to(t).dtype,
        lambda t: isinstance(t, torch.Tensor),
    ):
        assert question(w) == question(dense)
    assert torch.equal(
        AsksForm(layer)(torch.zeros(want.shape[0], *next(s for m, s in LAYERS.values() if type(m()) is type(layer))[1:])), want
    )
    half = copy.deepcopy(layer).half().to("meta")
    assert (half.weight.dtype, half.weight.device.type) == (torch.float16, "meta")


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("module", [AsksForm, AsksValues])
def test_in_compiled_and_exported_models(module, kind, backend_reset):
    make, shape = LAYERS[kind]
    model, x = module(make()).eval(), torch.randn(shape)
    want = model(x)
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)(x), want, rtol=1e-4, atol=1e-5
    )
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), want, rtol=1e-4, atol=1e-5)
    if module is AsksForm:
        assert not any("einsum" in str(node.target) or "index_put" in str(node.target) for node in program.graph.nodes)


def test_values_as_the_dense_layer_has_them(layer):
    dense, w = layer.to_dense(), layer.weight
    for read in (
        lambda t: t.clone(),
        lambda t: t.view(t.shape[0], -1),
        lambda t: t.flatten(1).norm(dim=1),
        lambda t: t[1:3].transpose(0, 1),
        lambda t: torch.cat([t, t]),
        lambda t: t.double() * 2 + t,
        lambda t: torch.from_numpy(t.detach().numpy().copy()),
        lambda t: torch.tensor(t.tolist()),
        lambda t: torch.stack(list(t.unbind(0))),
        lambda t: pickle.loads(pickle.dumps(t.detach())),
        lambda t: copy.deepcopy(t.data),
        lambda t: nn.Parameter(t.data),
        lambda t: nn.Parameter(t.detach().clone()),
    ):
        found, want = read(w), read(dense.weight)
        assert found.stride() == want.stride()
        assert torch.equal(found, want)
    assert f"{w.sum():.4f}" == f"{dense.weight.sum():.4f}"
    file = io.BytesIO()
    torch.save(w, file)
    assert torch.equal(torch.load(io.BytesIO(file.getvalue())), dense.weight)
    other = copy.deepcopy(dense)
    for copying in (
        lambda: other.weight.data.copy_(w),
        lambda: setattr(other.weight, "data", layer.weight.data),
        lambda: other.load_state_dict({**other.state_dict(), "weight": w}),
    ):
        nn.init.zeros_(other.weight)
        copying()
        assert torch.equal(other.weight, dense.weight)
        assert type(other.weight) is nn.Parameter
    (w.square().sum()).backward()
    assert layer.dictionary.grad.abs().sum() > 0
    assert layer.coefficients.grad.abs().sum() > 0


def test_freezing_a_weight_freezes_its_factors(layer):
    layer.weight.requires_grad = False
    assert not layer.dictionary.requires_grad
    assert not layer.coefficients.requires_grad
    assert not layer.weight.requires_grad
    layer.weight.requires_grad_(True)
    assert layer.dictionary.requires_grad
    assert layer.coefficients.requires_grad


def add(layer):
    layer.weight += 1


def add_data(layer):
    layer.weight.data += 1


def set_data(layer):
    layer.weight.data = torch.zeros(layer.weight.shape)


def set_items(layer):
    layer.weight.data[0] = 1


def assign(layer):
    layer.weight = nn.Parameter(torch.zeros(layer.weight.shape))


def delete(layer):
    del layer.weight


def initialise_convolutions(module):
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight)


def initialise_by_name(module):
    if type(module).__name__.startswith("Lookup"):
        module.weight.data.normal_(0, 0.02)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


WRITES = {
    **{function.__name__: function for function in (add, add_data, set_data, set_items, assign, delete)},
    "copy_": lambda m: m.weight.data.copy_(torch.zeros(m.weight.shape)),
    "mul_": lambda m: m.weight.detach().mul_(2),
    "of a view": lambda m: m.weight.data.view(-1)[:3].zero_(),
    "of a part": lambda m: m.weight.data.chunk(2)[0].fill_(1),
    "of itself in another form": lambda m: m.weight.data.contiguous().float().cpu().zero_(),
    "out": lambda m: torch.zeros(m.weight.shape, out=m.weight.data),
    "foreach": lambda m: torch._foreach_mul_([m.weight.data], 2.0),
    "renorm_": lambda m: m.weight.data.renorm_(2, 0, 1.0),
    "inplace": lambda m: nn.functional.relu(m.weight.data, inplace=True),
    **{
        name: (lambda m, name=name: getattr(nn.init, name)(m.weight))
        for name in (
            "kaiming_normal_",
            "kaiming_uniform_",
            "xavier_normal_",
            "uniform_",
            "zeros_",
            "trunc_normal_",
            "orthogonal_",
        )
    },
    "constant_": lambda m: nn.init.constant_(m.weight.data, 0.5),
    "weight norm": lambda m: parametrizations.weight_norm(m),
    "spectral norm": lambda m: parametrizations.spectral_norm(m),
    "old weight norm": lambda m: nn.utils.weight_norm(m),
    "old spectral norm": lambda m: nn.utils.spectral_norm(m),
    "parametrization": lambda m: parametrize.register_parametrization(m, "weight", Doubled()),
    "pruning": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "structured pruning": lambda m: prune.ln_structured(m, "weight", 0.5, 2, 0),
    "apply by type": lambda m: nn.Sequential(m).apply(initialise_convolutions),
    "apply by name": lambda m: nn.Sequential(m).apply(initialise_by_name),
    "a parameter of its own": lambda m: nn.Parameter(m.weight),
    "a hook": lambda m: m.weight.register_hook(print),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WRITES)
def test_writes_are_refused(layer, kind):
    x = torch.randn(next(shape for make, shape in LAYERS.values() if type(make()) is type(layer)))
    before, state = layer(x), set(layer.state_dict())
    with pytest.raises(LcnnError, match=r"Lookup.*weight"):
        WRITES[kind](layer)
    assert torch.equal(layer(x), before)
    assert set(layer.state_dict()) == state


def test_messages_name_the_layer_of_a_model():
    dense = nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))).eval()
    model = convert(dense, LookupConfig(dictionary_size=4), calibration=[torch.randn(2, 8, 6, 6)])
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(LcnnError, match=r"'0\.0'.*to_dense"):
            fusion.fuse_conv_bn_eval(copied[0][0], nn.BatchNorm2d(8).eval())
        with pytest.raises(LcnnError, match=r"'0\.0'.*to_dense"):
            copied[0][0].weight.data.mul_(2)


def test_what_does_not_touch_weights_is_left_alone():
    model, seen = nn.Sequential(LookupConv2d(8, 8, 3), nn.BatchNorm2d(8)), []

    def norms_only(module):
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.5)

    model.apply(seen.append)
    model.apply(norms_only)
    assert len(seen) == 3
    assert model[1].weight.tolist() == [0.5] * 8
    nn.init.constant_(model[0].bias, 0)
    assert model[0].bias.abs().sum() == 0
    assert [name for name, _ in model[0].named_parameters()] == ["dictionary", "coefficients", "bias"]
    assert not parametrize.is_parametrized(model[0])
    vector = nn.utils.parameters_to_vector(model.parameters())
    assert vector.numel() == sum(parameter.numel() for parameter in model.parameters())


def test_settings_changed_on_a_layer():
    layer, x = LookupConv2d(8, 8, 3, padding=1), torch.randn(2, 8, 9, 9)
    dense = layer.to_conv()
    for name, value in {"stride": (2, 2), "dilation": (2, 1), "padding": (2, 3)}.items():
        for module in (layer, dense):
            setattr(module, name, value)
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.to_conv()(x).shape, dense(x).shape)
    for name, value in {
        "in_channels": 4,
        "groups": 2,
        "kernel_size": (1, 1),
        "padding_mode": "circular",
        "stride": (1, 1, 1),
    }.items():
        with pytest.raises(LcnnError, match=name):
            setattr(layer, name, value)
    with pytest.raises(LcnnError, match="stride"):
        LookupConvTranspose2d(8, 8, 4, 2).stride = (1, 1)
