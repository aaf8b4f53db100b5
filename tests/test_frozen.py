"""Frozen models against the models they were made of."""

import copy
import pickle
import subprocess
import sys
import warnings
from contextlib import nullcontext

import pytest
import torch
from nets import SmallResNet, randomise
from torch import nn
from torch._inductor.utils import run_and_get_code

from lcnn_compile import LcnnError, LookupConfig, LookupConv2d, convert, freeze
from lcnn_compile.export import engines, export_pt2
from lcnn_compile.kernels import cpu


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = SmallResNet(8)
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x, scale):
        return {"scores": self.net(x), "map": (self.conv(x) * scale, scale)}


def lookups(model, lowering="lookup", precision="float32"):
    batches = [torch.randn(4, 3, 16, 16)]
    config = LookupConfig(dictionary_size=0.5, sparsity=4, group_size=4, lowering=lowering, precision=precision)
    return convert(
        randomise(model).eval(),
        config,
        calibration=batches if not isinstance(model, TwoOutputs) else [(batches[0], torch.tensor(2.0))],
    )


@pytest.mark.parametrize("lowering", ["lookup", "factored"])
def test_frozen_is_the_model(lowering):
    model = lookups(SmallResNet(8), lowering)
    frozen = freeze(model, torch.randn(2, 3, 16, 16))
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 16, 16)
        with torch.no_grad():
            exact = model.double()(x.double())
            model.float()
        torch.testing.assert_close(frozen(x).double(), exact, rtol=1e-4, atol=1e-4)
    assert not frozen(x).requires_grad


@pytest.mark.skipif(not cpu.is_available(), reason="the C++ kernels are unavailable")
def test_rounding_leaves_one_program():
    model, x = lookups(SmallResNet(8), precision="bfloat16"), torch.randn(2, 3, 16, 16)
    frozen = freeze(model, x)
    with torch.no_grad():
        expected = model.eval()(x)
    assert frozen.alone == freeze(lookups(SmallResNet(8)), x).alone
    assert not any("batch_norm" in str(node.target) for node in frozen.graph.graph.nodes)
    torch.testing.assert_close(frozen(x), expected, rtol=0, atol=0.05 * float(expected.abs().max()))


@pytest.mark.skipif(not cpu.is_available(), reason="the C++ kernels are unavailable")
def test_programs_hold_linear_layers_and_factors():
    class Scaled(SmallResNet):
        def forward(self, x):
            return super().forward(x) * 0.125

    model, x = lookups(Scaled(8)), torch.randn(3, 3, 16, 16)
    frozen = freeze(model, x)
    # The first convolution may stay dense: that is measured.
    assert not any(word in str(node.target) for node in frozen.graph.graph.nodes for word in ("linear", "mul"))
    with torch.no_grad():
        exact = model.double()(x.double())
    torch.testing.assert_close(frozen(x).double(), exact, rtol=1e-4, atol=1e-5)


def test_structured_outputs_and_several_inputs():
    model = lookups(TwoOutputs())
    inputs = (torch.randn(2, 3, 16, 16), torch.tensor(-1.5))
    frozen = freeze(model, inputs)
    with torch.no_grad():
        expected = model(*inputs)
    found = frozen(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not cpu.is_available(), reason="the C++ kernels are unavailable")
def test_weights_are_constants():
    layers = [LookupConv2d(*sizes, dictionary_size=4, sparsity=2, group_size=3) for sizes in ((5, 9, 3), (9, 7, 1))]
    for layer in layers:
        layer.lowering = "lookup"
    model = nn.Sequential(layers[0], nn.ReLU(), nn.MaxPool2d(2), layers[1]).eval()
    x = torch.randn(2, 5, 17, 14)
    frozen = freeze(model, x)
    assert frozen.alone
    before = frozen(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    assert torch.equal(frozen(x), before)
    with torch.no_grad():
        torch.testing.assert_close(freeze(model, x)(x), model(x), rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused():
    model = lookups(SmallResNet(8))
    frozen = freeze(model, torch.randn(2, 3, 16, 16))
    for wrong in (torch.randn(2, 3, 16, 17), torch.randn(2, 3, 16, 16).double(), torch.randn(3, 16, 16)):
        with pytest.raises(LcnnError, match="freeze it again"):
            frozen(wrong)
    with pytest.raises(LcnnError, match="takes"):
        frozen(torch.randn(2, 3, 16, 16), 3)
    with pytest.raises(LcnnError, match="lookup"):
        freeze(SmallResNet(8), torch.randn(2, 3, 16, 16))
    fixed = freeze(model, torch.randn(2, 3, 16, 16), dynamic_batch=False)
    with pytest.raises(LcnnError, match="freeze it again"):
        fixed(torch.randn(3, 3, 16, 16))


class Stream(nn.Module):
    """Keeps the end of a stream, counts, and decays a scale that stands behind a convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(4, 8, (1, 3)), nn.Conv2d(8, 4, 1)
        self.bn = nn.BatchNorm2d(8)
        self.register_buffer("past", torch.zeros(2, 4, 1, 2))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("scale", torch.ones(8), persistent=False)

    def forward(self, x):
        z = torch.cat([self.past, x], -1)
        self.past.copy_(z[..., -2:])
        self.calls += 1
        y = self.bn(self.conv(z)).relu_()
        y[:, :2].mul_(2.0)
        y = torch.nn.functional.batch_norm(y, self.past.new_zeros(8), self.scale)
        self.scale.mul_(0.5)
        return self.last(y), self.calls.clone()


def steps(model, batches):
    with torch.no_grad():
        return [model(x) for x in batches]


def test_state_goes_on_from_call_to_call(monkeypatch):
    batches = [torch.randn(2, 4, 1, 6) for _ in range(3)]
    dense = randomise(Stream())
    made = convert(dense, LookupConfig(dictionary_size=1.0, sparsity=None, lowering="lookup"))
    wanted = steps(copy.deepcopy(made), batches)
    constant = []
    monkeypatch.setattr(engines, "inductor_freezing", lambda: constant.append(1) or nullcontext())
    frozen = freeze(made, batches[0], dynamic_batch=False)
    torch.testing.assert_close(steps(frozen, batches[:2]), wanted[:2], rtol=1e-4, atol=1e-4)
    # A copy has the state of this moment, and a life of its own.
    twin = copy.deepcopy(frozen)
    torch.testing.assert_close(steps(frozen, batches[2:]), wanted[2:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(steps(twin, batches[2:]), wanted[2:], rtol=1e-4, atol=1e-4)
    assert not constant  # nothing that is written may be taken for one
    assert made.calls == 0
    assert not made.past.any()


@pytest.mark.parametrize("lowering", ["lookup", "factored", "dense"])
def test_writes_to_inputs(lowering):
    class Filling(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x, out):
            out[:, 1:].copy_(self.conv(x)[:, 1:])
            x.mul_(2)
            return out.sum(), out

    model = convert(Filling().eval(), LookupConfig(dictionary_size=1.0, sparsity=None, lowering=lowering))
    x, out = torch.randn(2, 4, 6, 6), torch.zeros(2, 4, 6, 6)
    frozen = freeze(model, (x, out))
    assert not out.any()
    ours, theirs = (x.clone(), out.clone()), (x.clone(), out.clone())
    with torch.no_grad():
        wanted = model(*theirs)
    torch.testing.assert_close(frozen(*ours), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with pytest.raises(LcnnError, match="share memory"):
        frozen(x, x)


def test_what_is_left_to_inductor_has_constant_weights():
    # The lookups of a graph that nothing of ours runs become dense convolutions; what stands between them is Inductor's.
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.Softshrink(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32)).eval()
    with torch.no_grad():
        model[3].running_var.uniform_(0.5, 2.0)
    x = torch.randn(2, 4, 9, 9)
    converted = convert(model, LookupConfig(dictionary_size=3, lowering="dense"), calibration=[x]).eval()
    frozen = freeze(converted, x)
    assert not frozen.alone
    for batch in (x, torch.randn(3, 4, 9, 9)):
        y, code = run_and_get_code(frozen, batch)
        torch.testing.assert_close(y, converted(batch), rtol=1e-4, atol=1e-5)
        assert "extern_kernels.convolution" not in code[-1]
        assert "sqrt" not in code[-1]


@pytest.mark.skipif(not cpu.is_available(), reason="the C++ kernels are unavailable")
def test_a_profile_names_the_steps():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, 2), nn.Flatten(), nn.Linear(36, 5)).eval()
    x = torch.randn(2, 4, 9, 9)
    frozen = freeze(convert(model, LookupConfig(exclude=("4",), dictionary_size=3, lowering="lookup"), calibration=[x]), x)
    rows = frozen.profile(x, calls=2)
    names = ["lookup convolution 4 to 8, 3x3, relu", "lookup convolution 8 to 4, 3x3, stride 2x2", "linear 36 to 5"]
    assert [row.name for row in rows] == names
    assert [row.shape for row in rows] == [(2, 8, 7, 7), (2, 4, 3, 3), (2, 5)]
    assert all(row.milliseconds > 0 for row in rows)
    with pytest.raises(LcnnError, match="freeze it again"):
        frozen.profile(x[:, :, 1:])
    other = freeze(convert(nn.Sequential(model[0], nn.Softshrink()), LookupConfig(dictionary_size=3), calibration=[x]), x)
    with pytest.raises(LcnnError, match="not one program"):
        other.profile(x)


@pytest.mark.parametrize("way", ["deepcopy", "copy", "pickle", "torch.save"])
@pytest.mark.parametrize("alone", [True, False])
def test_copies_give_the_same_bits(way, alone, tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), *([] if alone else [nn.Softshrink()])).eval()
    x = torch.randn(2, 4, 9, 9)
    frozen = freeze(convert(model, LookupConfig(dictionary_size=3, lowering="lookup"), calibration=[x]), x)
    assert frozen.alone == (alone and cpu.is_available())
    if way == "torch.save":
        torch.save(frozen, tmp_path / "frozen.pt")
        twin = torch.load(tmp_path / "frozen.pt", weights_only=False)
    else:
        ways = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda it: pickle.loads(pickle.dumps(it))}
        twin = ways[way](frozen)
    del model
    assert twin.alone == frozen.alone
    for batch in (x, x[:1], torch.randn(5, 4, 9, 9)):
        assert torch.equal(twin(batch), frozen(batch))
    with pytest.raises(LcnnError, match="freeze it again"):
        twin(x[:, :, 1:])


def test_a_pickled_model_works_in_another_process(tmp_path):
    x = torch.randn(2, 4, 9, 9)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    frozen = freeze(convert(model, LookupConfig(dictionary_size=3, lowering="lookup"), calibration=[x]), x)
    torch.save({"model": frozen, "x": x, "y": frozen(x)}, tmp_path / "all.pt")
    code = "import sys, torch; d = torch.load(sys.argv[1], weights_only=False); assert torch.equal(d['model'](d['x']), d['y'])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "all.pt")], check=True)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_behind_convolutions(kind):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.rnn = kind(8 * 6, 5, bidirectional=True, batch_first=True)

        def forward(self, x):
            y, state = self.rnn(self.conv(x).relu().flatten(1, 2).transpose(1, 2))
            return {"text": y, "state": state}

    model = convert(Reader().eval(), LookupConfig(dictionary_size=3, lowering="lookup"), example_inputs=torch.randn(2, 3, 6, 11))
    frozen = freeze(model, torch.randn(2, 3, 6, 11))
    for batch in (2, 3):
        x = torch.randn(batch, 3, 6, 11)
        with torch.no_grad():
            torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(LcnnError, match="freeze it again"):
        frozen(torch.randn(2, 3, 6, 12))


def test_autocast_around_it_has_no_effect():
    model, x = lookups(SmallResNet(8)), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        wanted = model.eval()(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        frozen = freeze(model, x)
        torch.testing.assert_close(frozen(x), wanted, rtol=1e-4, atol=1e-4)


def test_layers_without_channels():
    class Pruned(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.empty = nn.Conv2d(0, 8, 1)

        def forward(self, x):
            y = self.first(x)
            # PyTorch gives such a convolution no output channels either.
            return self.last(torch.cat([y, self.empty(y[:, :0])], 1))

    x = torch.randn(2, 3, 6, 6)
    model = convert(Pruned().eval(), LookupConfig(dictionary_size=3, lowering="lookup"), calibration=[x])
    with torch.no_grad():
        wanted = model(x)
    torch.testing.assert_close(freeze(model, x)(x), wanted, rtol=1e-4, atol=1e-4)


def test_numbers_and_sizes_come_back():
    class Sizes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x, ratio=0.5):
            return self.conv(x), x.shape, x.shape[0] * 2, ratio, x.dtype

    model = convert(Sizes().eval(), LookupConfig(dictionary_size=3, lowering="lookup"))
    frozen = freeze(model, torch.randn(2, 3, 6, 6))
    for batch in (1, 3):
        assert frozen(torch.randn(batch, 3, 6, 6))[1:] == (torch.Size([batch, 3, 6, 6]), 2 * batch, 0.5, torch.float32)


class Counts(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.conv, self.what, self.count, self.kept = LookupConv2d(3, 4, 3, dictionary_size=2), what, 0, None

    def forward(self, x):
        y = self.conv(x)
        if self.what == "number":
            self.count += 1
            return y, self.count
        if self.what == "factor":
            self.count += 1
            return y * self.count
        self.shape = y.shape  # what is the same at every call is no state
        return y + torch.rand_like(y)


@pytest.mark.parametrize("what", ["number", "factor"])
def test_a_state_in_python_is_refused(what):
    with pytest.raises(LcnnError, match="keeps a state in Python"):
        freeze(Counts(what).eval(), torch.randn(2, 3, 6, 6))


def test_random_numbers_and_what_stays_the_same_are_no_state():
    freeze(Counts("").eval(), torch.randn(2, 3, 6, 6))


class Streams(nn.Module):
    """A state that is put in the place of a buffer, in a submodule: what is returned may be the old one."""

    def __init__(self, way):
        super().__init__()
        self.inner, self.conv, self.way = nn.Module(), LookupConv2d(3, 3, 3, padding=1, dictionary_size=2), way
        self.inner.register_buffer("state", torch.zeros(2, 3, 4, 4))
        self.inner.register_buffer("other", torch.ones(2, 3, 4, 4))

    def forward(self, x):
        y, inner = self.conv(x), self.inner
        if self.way == "new":
            inner.state, y = y, y - inner.state
        elif self.way == "old returned":
            inner.state, y = y + inner.state, inner.state
        elif self.way == "swapped":
            inner.state, inner.other = inner.other, inner.state + y
        else:
            inner.state = torch.cat([inner.state, y])
        return y + inner.other


@pytest.mark.parametrize("way", ["new", "old returned", "swapped"])
def test_a_state_put_in_the_place_of_a_buffer_goes_on(way, tmp_path):
    model = Streams(way).eval()
    x, twin = torch.randn(2, 3, 4, 4), copy.deepcopy(model)
    frozen = freeze(model, x, dynamic_batch=False)
    export_pt2(model, tmp_path / "m.pt2", x, dynamic_batch=False)
    loaded = torch.export.load(tmp_path / "m.pt2").module()
    with torch.no_grad():
        for _ in range(3):
            want = twin(x)
            torch.testing.assert_close(frozen(x), want, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(loaded(x), want, atol=1e-5, rtol=1e-5)


def test_a_buffer_that_grows_is_refused():
    with pytest.raises(LcnnError, match=r"buffer 'state', torch.float32 \(2, 3, 4, 4\), is replaced by"):
        freeze(Streams("grown").eval(), torch.randn(2, 3, 4, 4), dynamic_batch=False)


def test_sizes_that_depend_on_data_do_not_keep_a_model_from_being_frozen():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (LookupConv2d(3, 3, 3, padding=1, dictionary_size=2) for _ in range(2))

        def forward(self, x):
            y = self.first(x)
            y[y < 0] *= 0.5
            return self.second(y)

    model, x = Masked().eval(), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(freeze(model, x)(x), model(x), atol=1e-5, rtol=1e-5)
