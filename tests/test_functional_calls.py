"""Convolutions that models call as functions: taken where they stand, or left dense with the reason; the model stays what it is."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from nets import Functional, pictures
from torch import fx, nn

from lcnn_compile import LcnnError, LcnnWarning, LookupConfig, LookupConv2d, convert, explain, freeze, load, save
from lcnn_compile.modules import FunctionalWeight, lookup_modules
from lcnn_compile.passes import lift_functional_convolutions
from lcnn_compile.testing import assert_equivalent

FULL = LookupConfig(dictionary_size=1.0, sparsity=None)
SMALL = LookupConfig(dictionary_size=3, sparsity=2, group_size=4)


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape) * 0.2)


class Base(nn.Module):
    """A layer, a weight and a bias."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.w, self.b = parameter(8, 8, 3, 3), parameter(8)
        self.build()

    def build(self):
        pass


class Called(Base):
    def features(self, x):
        return F.conv2d(x, self.w, self.b, padding=1)

    def forward(self, x):
        return self.features(self.conv(x)).relu()


class CalledTwice(Base):
    def forward(self, x):
        return F.conv2d(F.conv2d(self.conv(x), self.w, padding="same"), weight=self.w, bias=self.b, stride=[2, 2])


class BiasOfTwo(Base):
    def build(self):
        self.v = parameter(8, 8, 1, 1)

    def forward(self, x):
        return F.conv2d(F.conv2d(x, self.w, self.b, 1, 1), self.v, self.b) + self.b.view(-1, 1, 1)


class BiasComputed(Base):
    def forward(self, x):
        return F.conv2d(x, self.w, self.b.exp())


class OfAnotherModule(Base):
    """A layer that is never called keeps the weight."""

    def build(self):
        self.owner = nn.ModuleDict({"a": nn.Conv2d(8, 8, 3)})

    def forward(self, x):
        keeper = self.owner["a"]
        return F.conv2d(F.pad(self.conv(x), (1, 1, 1, 1), mode="reflect"), keeper.weight, keeper.bias, 2)


class InLists(Base):
    def build(self):
        self.list, self.dict = nn.ParameterList([parameter(8, 8, 1, 1), self.w]), nn.ParameterDict({"k": parameter(4, 8, 1, 1)})

    def forward(self, x):
        for w in self.list:
            x = F.conv2d(x, w, padding="same").relu()
        return F.conv2d(x, self.dict["k"])


class InNoGrad(Base):
    def forward(self, x):
        with torch.no_grad():
            y = F.conv2d(x, self.w, padding=1)
        return self.conv(x) + y


class Reads(Base):
    """Casts and questions about dtype and shape."""

    def forward(self, x):
        x = self.conv(x)[:, : self.w.shape[1]] * self.w.numel() + self.w.new_zeros(1)
        return F.conv2d(x, self.w.to(x.dtype), self.b, padding=self.w.size(-1) // 2)


class Tied(Base):
    def build(self):
        self.one, self.two = Inner(), Inner()
        self.two.w = self.one.w

    def forward(self, x):
        return self.two(self.one(x).relu())


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = parameter(8, 4, 3, 3)

    def forward(self, x):
        return F.conv2d(x, self.w, padding=1, groups=2)


class Up(Base):
    def build(self):
        self.w = parameter(8, 6, 3, 3)

    def forward(self, x):
        return F.conv_transpose2d(x, self.w, stride=2, padding=1, output_padding=1)


class Sound(Base):
    def build(self):
        self.w, self.up = parameter(6, 8, 5), parameter(6, 8, 4)

    def forward(self, x):
        return F.conv_transpose1d(F.conv1d(x.flatten(2), self.w, dilation=2), self.up, None, 2, 1)


class Volume(Base):
    def build(self):
        self.w = parameter(8, 2, 2, 3, 3)

    def forward(self, x):
        return F.conv3d(x.unflatten(1, (2, 4)), self.w, self.b, padding=1, stride=(1, 2, 2))


class Unbatched(Base):
    def forward(self, x):
        return torch.stack([F.conv2d(image, self.w, self.b) for image in x])


TAKEN = {
    **{Called: 2, CalledTwice: 3, BiasOfTwo: 2, BiasComputed: 1, OfAnotherModule: 2, InLists: 3, InNoGrad: 2, Reads: 2, Tied: 1},
    **{Up: 1, Sound: 2, Volume: 1, Unbatched: 1},
}
"""Networks, and how many layers of each are replaced."""


def build(factory):
    return factory().eval(), torch.randn(3, 8, 10, 10)


def converted(model, config, x):
    return convert(model, config.replace(exclude=("conv",)) if not has_run(model) else config, calibration=[x, x.flip(0)])


def has_run(model):
    return not isinstance(model, BiasOfTwo | BiasComputed | InLists | Tied | Up | Sound | Volume | Unbatched)


@pytest.mark.parametrize("factory", TAKEN)
def test_calls_are_taken_in_the_models_own_class(factory, tmp_path):
    model, x = build(factory)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = converted(model, FULL, x)
    assert type(found) is factory
    assert len(found.lcnn_report.replaced) == TAKEN[factory]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for row in found.lcnn_report.replaced:
        assert found.get_submodule(row.name) in [layer for _, layer in lookup_modules(found)]
    assert "w" not in found.state_dict() or factory is InLists or not any(r.name.startswith("w.") for r in found.lcnn_report)
    assert_equivalent(model, found, x, factor=64)
    for again in (copy.deepcopy(found), pickle.loads(pickle.dumps(found)), _saved(found)):
        torch.testing.assert_close(again(x), found(x))
    save(found, tmp_path / "model.safetensors")
    loaded = load(factory().eval(), tmp_path / "model.safetensors")
    assert type(loaded) is factory
    assert list(loaded.state_dict()) == list(found.state_dict())
    torch.testing.assert_close(loaded(x), found(x))


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("factory", [Called, CalledTwice, BiasOfTwo, OfAnotherModule, Reads, Up])
def test_one_graph_of_lookups(factory, backend_reset):
    model, x = build(factory)
    found = converted(model, SMALL, x)
    calls = []

    def look(gm, inputs):
        calls.extend(node for node in gm.graph.nodes if "lookup_conv2d" in str(node.target))
        return gm.forward

    with torch.no_grad():
        want = found(x)
        torch.testing.assert_close(torch.compile(found, backend=look, fullgraph=True)(x), want)
        assert len(calls) == TAKEN[factory]
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(found, backend="lcnn", fullgraph=True)(x), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(freeze(found, x)(x), want, rtol=1e-4, atol=1e-4)
        strict = torch.export.export(found, (x,), strict=True).module()
        torch.testing.assert_close(strict(x), want)


class Whole(Called):
    """Everything that a trace would lose."""

    def build(self):
        self.classes, self.calls = 7, []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        self.calls.append(len(x))
        y = F.dropout(self.features(self.conv(x)), 0.5, self.training)
        return (y, self.w.square().sum()) if self.training else y


def test_hooks_methods_attributes_modes_and_state_stay():
    model, x = build(Whole)
    model.register_forward_hook(lambda module, args, output: output if module.training else output + 100)
    found = convert(model, FULL, calibration=[x, x])
    assert (found.classes, found.calls, found.count.item()) == (7, [], 0)
    torch.testing.assert_close(found(x), model(x))
    torch.testing.assert_close(found.features(x), model.features(x), rtol=1e-4, atol=1e-4)
    y, penalty = found.train()(x)
    assert not torch.equal(y, found(x)[0])
    torch.testing.assert_close(penalty, model.w.square().sum())
    assert all(module.training for module in found.modules())


def test_the_state_of_random_numbers_stays():
    model, x = build(Called)
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    convert(model, SMALL, calibration=[x])
    assert torch.equal(torch.rand(1), want)


def test_lookups_learn_where_the_calls_are_made():
    model, x = build(Called)
    found = convert(model, SMALL, calibration=[x]).train()
    optimiser = torch.optim.Adam(found.parameters(), 0.02)
    target = model(x).detach()
    losses = []
    for _ in range(15):
        loss = F.mse_loss(found(x), target) + 1e-3 * found.w.square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in found.parameters())
        optimiser.step()
    assert losses[-1] < 0.8 * losses[0]
    # The bias that the call passes is the layer's own.
    assert found.b is found.w.conv2d.bias
    assert torch.equal(found.state_dict()["b"], found.state_dict()["w.conv2d.bias"])


def test_what_no_layer_takes_is_done_with_the_dense_weight():
    model, x = build(Called)
    found = convert(model, SMALL, calibration=[x])
    dense = found.w.conv2d.dense_weight()
    for call in (
        lambda w: F.conv2d(x, w, found.b, stride=3),
        lambda w: F.conv2d(x, w * 2 + 1 / (1 - w), dilation=2),
        lambda w: F.conv_transpose2d(x, w),
        lambda w: (2 * w - w[:1]).pow(2).sum() + w.norm() + torch.linalg.vector_norm(w) + w.flatten().mean(),
        lambda w: torch.cat([w, -w]).half().float(),
        lambda w: x[:, :1, :3, :3] @ w[0, 0] / len(w),
    ):
        torch.testing.assert_close(call(found.w), call(dense))
    assert (found.w.shape, found.w.dim(), found.w.numel(), found.w.dtype) == (dense.shape, 4, 576, torch.float32)
    assert found.w.double().dtype == torch.float64
    with torch.no_grad():
        found.b.add_(1)
        torch.testing.assert_close(found.features(x), F.conv2d(x, dense, found.b, padding=1), rtol=1e-4, atol=1e-4)
    found.b = nn.Parameter(torch.zeros(8))
    torch.testing.assert_close(found.features(x), F.conv2d(x, dense, padding=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.mul_(2),
        lambda w: nn.init.kaiming_normal_(w),
        lambda w: w.__setitem__(0, 0.0),
        lambda w: w.__iadd__(1),
        lambda w: torch.add(w.shape[0], 1, out=w),
        lambda w: setattr(w, "data", torch.zeros(8, 8, 3, 3)),
    ],
)
def test_writes_are_refused_and_a_new_parameter_is_dense_again(write):
    model, x = build(Called)
    found = convert(model, SMALL, calibration=[x])
    with pytest.raises((LcnnError, TypeError)):
        write(found.w)
    found.w = nn.Parameter(torch.zeros(8, 8, 3, 3))
    torch.testing.assert_close(found.features(x), found.b.view(-1, 1, 1).expand(3, 8, 10, 10))


class Scaled(Base):
    def forward(self, x):
        return F.conv2d(self.conv(x), self.w * 0.5, self.b)


class Correlation(Base):
    def forward(self, x):
        y = self.conv(x)
        return F.conv2d(y, y[:2, :, :3, :3])


class Blurred(Base):
    def build(self):
        self.register_buffer("blur", torch.ones(8, 1, 3, 3) / 9)
        self.w = parameter(8, 1, 3, 3)

    def forward(self, x):
        return F.conv2d(F.conv2d(self.conv(x), self.blur, groups=8), self.w, groups=8)


class Masked(Base):
    def build(self):
        self.register_buffer("ones", torch.ones(1, 8, 3, 3))

    def forward(self, x):
        return self.conv(x) / F.conv2d((x > 0).float(), self.ones, padding=1).clamp(min=1)


class Penalised(Base):
    def forward(self, x):
        return F.conv2d(self.conv(x), self.w), self.w.abs().sum()


class Clipped(Base):
    def forward(self, x):
        with torch.no_grad():
            self.w.clamp_(-0.1, 0.1)
        return F.conv2d(self.conv(x), self.w)


class Hidden(Base):
    def build(self):
        self.__dict__["hidden"] = [self.w]

    def forward(self, x):
        return F.conv2d(self.conv(x), self.hidden[0])


class AsksForATensor(Base):
    def forward(self, x):
        return F.conv2d(self.conv(x), self.w) if isinstance(self.w, torch.Tensor) else x


class OfALayer(Base):
    def forward(self, x):
        return F.conv2d(self.conv(x), self.conv.weight)


class ManyDilations(Base):
    def forward(self, x):
        x = self.conv(x)
        for d in range(1, 12):
            x = F.conv2d(x, self.w, padding=d, dilation=d)
        return x


class OwnGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return F.conv2d(x, w)


class OwnGradientInTwoSteps(torch.autograd.Function):
    @staticmethod
    def forward(x, w):
        return F.conv2d(x, w)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)


class InTwoSteps(Base):
    def forward(self, x):
        return OwnGradientInTwoSteps.apply(self.conv(x), self.w)


class InAFunction(Base):
    def forward(self, x):
        return OwnGradient.apply(self.conv(x), self.w)


class Mapped(Base):
    def build(self):
        self.w = parameter(8, 8, 3, 3)

    def forward(self, x):
        return torch.vmap(lambda image: F.conv2d(image[None], self.w)[0])(self.conv(x))


class MappedLayer(Base):
    def build(self):
        self.own = nn.Conv2d(8, 8, 3)

    def forward(self, x):
        return torch.vmap(self.own)(self.conv(x)) + F.conv2d(x, self.w)


class Volumes(Base):
    def build(self):
        self.w = parameter(8, 2, 1, 2, 2)

    def forward(self, x):
        return F.conv_transpose3d(self.conv(x).unsqueeze(2), self.w)


LEFT = {
    Scaled: ("conv2d", "computed at every call"),
    Correlation: ("conv2d", "comes from the data"),
    Blurred: ("w.conv2d", "depthwise"),
    Masked: ("ones.conv2d", "buffer"),
    Penalised: ("w.conv2d", "read by Tensor.abs"),
    Clipped: ("w.conv2d", "read by Tensor.clamp_"),
    Hidden: ("w.conv2d", "other ways than as an attribute"),
    AsksForATensor: ("w.conv2d", "returns something else"),
    OfALayer: ("conv.weight.conv2d", "that of a layer"),
    ManyDilations: ("w.conv2d", "11 different"),
    InTwoSteps: ("w.conv2d", "autograd.Function"),
    InAFunction: ("w.conv2d", "autograd.Function"),
    Mapped: ("w.conv2d", "torch.vmap"),
    Volumes: ("w.conv_transpose3d", "no lookup form"),
}


@pytest.mark.parametrize("factory", LEFT)
def test_what_stays_dense_says_why_and_keeps_nothing_else_dense(factory):
    model, x = build(factory)
    keys = [key for key in model.state_dict() if not key.startswith("conv.")]
    found = convert(model, FULL, calibration=[x])
    assert type(found) is factory
    assert [row.name for row in found.lcnn_report.replaced] == ["conv"]
    name, reason = LEFT[factory]
    assert reason in found.lcnn_report[name].reason
    assert found.lcnn_report[name].macs_before > 0
    assert [key for key in found.state_dict() if not key.startswith("conv.")] == keys
    assert not any(isinstance(m, FunctionalWeight) for m in found.modules())
    planned = explain(model, FULL, example_inputs=(x,))
    assert [(r.name, r.replaced, r.reason) for r in planned] == [(r.name, r.replaced, r.reason) for r in found.lcnn_report]
    with torch.no_grad():
        torch.testing.assert_close(found(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_layer_that_a_transform_calls_stays_dense_alone():
    model, x = build(MappedLayer)
    found = convert(model, FULL, calibration=[x])
    assert [row.name for row in found.lcnn_report.replaced] == ["conv", "w.conv2d"]
    assert "torch.vmap" in found.lcnn_report["own"].reason
    torch.testing.assert_close(found(x), model(x), rtol=1e-4, atol=1e-4)


def test_where_nothing_is_replaced_each_reason_is_named():
    class Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.v = parameter(8, 1, 3, 3), parameter(8, 8, 3, 3)

        def forward(self, x):
            return F.conv2d(F.conv2d(x, self.w, groups=8), self.v / 2)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", LcnnWarning)
        convert(Only(), SMALL, calibration=[torch.randn(2, 8, 6, 6)])
    [text] = [str(w.message) for w in seen if issubclass(w.category, LcnnWarning)]
    assert "replaced nothing: 0 of 2" in text
    assert "depthwise" in text
    assert "computed at every call" in text


def test_rules_choose_calls_by_name_and_a_weight_may_be_looked_up_in_one_call_only():
    model, x = build(CalledTwice)
    found = convert(model, FULL.replace(exclude=("w.conv2d_1",)), calibration=[x])
    assert [row.name for row in found.lcnn_report.replaced] == ["conv", "w.conv2d"]
    assert torch.equal(found.w.conv2d_1.weight, model.w)
    assert torch.equal(found.w.dense(), model.w)
    assert_equivalent(model, found, x, factor=64)
    none = convert(model, FULL.replace(exclude=("w.*",)), calibration=[x])
    assert list(none.state_dict())[:2] == ["w", "b"]
    assert isinstance(none.w, nn.Parameter)
    assert [name for name, _ in none.named_parameters(recurse=False)] == ["w", "b"]


def test_images_of_bytes_calibrate():
    class Bytes(Called):
        def forward(self, x):
            return super().forward(x.float() / 255)

    model, x = Bytes().eval(), torch.randint(0, 256, (4, 8, 9, 9), dtype=torch.uint8)
    for images in (x, x.long()):
        torch.testing.assert_close(convert(model, FULL, calibration=[images])(images), model(images), rtol=1e-4, atol=1e-4)


def test_converted_twice_and_by_halves():
    model, x = build(Called)
    half = convert(model, FULL.replace(exclude=("conv",)), calibration=[x])
    both = convert(half, FULL, calibration=[x])
    assert [row.name for row in both.lcnn_report.replaced] == ["conv"]
    assert isinstance(both.w.conv2d, LookupConv2d)
    assert_equivalent(model, both, x, factor=64)


def test_scripted_modules_are_left_alone():
    class Scripted(Called):
        def build(self):
            self.head = torch.jit.script(nn.Conv2d(8, 4, 1))

        def forward(self, x):
            return self.head(super().forward(x))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model, x = build(Scripted)
        found = convert(model, FULL, calibration=[x])
    assert len(found.lcnn_report.replaced) == 2
    torch.testing.assert_close(found(x), model(x), rtol=1e-4, atol=1e-4)


def test_graphs_of_converted_models_call_the_layers():
    model, x = build(Called)
    found = convert(model, SMALL, calibration=[x])
    gm = fx.symbolic_trace(found)
    torch.testing.assert_close(gm(x), found(x))
    lift_functional_convolutions(gm)
    assert [node.target for node in gm.graph.find_nodes(op="call_module", target="w.conv2d")] == ["w.conv2d"]
    torch.testing.assert_close(gm(x), found(x))


@pytest.mark.parametrize("factory", [Functional, Called, CalledTwice, BiasOfTwo, Up, Volume])
def test_files_of_traced_models_load_into_the_class(factory, tmp_path):
    model = factory().eval()
    x = pictures(2) if factory is Functional else torch.randn(3, 8, 10, 10)
    # What version 0.1 made of a model like this.
    traced = convert(fx.symbolic_trace(model), SMALL, calibration=[x])
    assert any("_conv" in name for name, _ in lookup_modules(traced))
    save(traced, tmp_path / "old.safetensors")
    loaded = load(model, tmp_path / "old.safetensors")
    assert type(loaded) is factory
    assert len(list(lookup_modules(loaded))) == len(list(lookup_modules(traced)))
    torch.testing.assert_close(loaded(x), traced(x), rtol=1e-4, atol=1e-5)
    again = load(fx.symbolic_trace(model), tmp_path / "old.safetensors")
    torch.testing.assert_close(again(x), traced(x))
    with pytest.raises(LcnnError, match="has no"):
        load(nn.Sequential(nn.Conv2d(3, 3, 3)), tmp_path / "old.safetensors")


def test_files_that_do_not_fit_are_refused(tmp_path):
    model, x = build(Called)
    save(convert(model, SMALL, calibration=[x]), tmp_path / "file.safetensors")
    other = Called()
    other.w = parameter(8, 4, 3, 3)
    for wrong in (other, nn.Conv2d(3, 3, 3), Up()):
        with pytest.raises(LcnnError):
            load(wrong, tmp_path / "file.safetensors")
