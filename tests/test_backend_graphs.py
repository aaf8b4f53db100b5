"""torch.compile(backend="lcnn") on every kind of graph: computed weights, symbolic numbers, odd names, failing passes."""

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from nets import pictures
from torch import nn

from lcnn_compile import LcnnWarning, LookupConfig, convert
from lcnn_compile.backend import calibrating, runtime

pytestmark = pytest.mark.usefixtures("backend_reset")
LOSSLESS = {"dictionary_size": 1.0, "sparsity": None, "lowering": "lookup"}
SMALL = {"dictionary_size": 2, "sparsity": 1, "lowering": "lookup"}


def same(compiled, model, *calls, tolerance=1e-4):
    with torch.no_grad():
        for call in calls:
            torch.testing.assert_close(compiled(*call), model(*call), atol=tolerance, rtol=tolerance)


def replaced(caplog):
    return [record.message for record in caplog.records if "layers replaced" in record.message]


class Convs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3)
        self.w = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x):
        return F.conv2d(self.b(self.a(x).relu()), self.w * 0.1)


def test_a_computed_weight_leaves_the_plain_ones_replaceable(caplog):
    model = Convs().eval()
    compiled = torch.compile(model, backend="lcnn", options=SMALL)
    x = pictures(2, 12, 4)
    with torch.no_grad():
        first = compiled(x)
        assert torch.equal(first, model(x))
        assert not torch.allclose(compiled(x), first)
    assert len(replaced(caplog)) > 0


def test_each_reason_is_told_where_nothing_can_be_replaced():
    model = Convs().eval()

    def computed(x):
        return F.conv2d(x, model.w * 2)

    def given(x, w):
        return F.conv_transpose2d(x, w)

    x = pictures(2, 12, 4)
    for function, inputs, reason in (
        (computed, (x,), "computed at every call"),
        (given, (x, model.w * 1), "an input of the graph"),
    ):
        torch.compiler.reset()
        compiled = torch.compile(function, backend="lcnn")
        with torch.no_grad(), pytest.warns(LcnnWarning, match=reason):
            compiled(*inputs)
        same(compiled, function, inputs)


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, 4, 6, 6))
        self.a, self.b = nn.Conv2d(4, 8, 3, padding=1), nn.ConvTranspose2d(8, 4, 2, 2)

    def forward(self, scale=None):
        x = self.start if scale is None else self.start * scale[:, None, None, None]
        return self.b(self.a(x).relu())


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.a = nn.Embedding(10, 4), nn.Conv1d(4, 8, 3)

    def forward(self, x):
        return self.a(self.embed(x).transpose(1, 2))


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Generator(), ()),
        (Generator(), (torch.ones(1),)),
        (Tokens(), (torch.arange(10)[None],)),
        (nn.Sequential(nn.Conv2d(4, 8, 3)), (pictures(1, 9, 4)[0],)),
    ],
    ids=["none", "one number", "integers", "one image"],
)
def test_any_kind_of_input_calibrates(model, inputs, caplog):
    compiled = torch.compile(model.eval(), backend="lcnn", options=LOSSLESS)
    same(compiled, model, *[inputs] * 3)
    assert len(replaced(caplog)) > 0


def test_constant_inputs_wait_with_a_word(caplog):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    compiled = torch.compile(model, backend="lcnn", options=LOSSLESS)
    with pytest.warns(LcnnWarning, match="inputs of its calls are constant"):
        same(compiled, model, *[(torch.zeros(2, 4, 8, 8),)] * (calibrating.PATIENCE + 2))
    assert not replaced(caplog)
    same(compiled, model, *[(pictures(2, 8, 4),)] * 2)
    assert len(replaced(caplog)) > 0


@pytest.mark.parametrize("kind", ["dense", "converted"])
def test_constants_that_dynamo_makes_symbolic(kind):
    norm = nn.BatchNorm2d(8, eps=1e-3)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), norm, nn.LeakyReLU(0.3), nn.Conv2d(8, 4, 3)).eval()
    made = model if kind == "dense" else convert(model, LookupConfig(**LOSSLESS), calibration=[pictures(2, 9, 4)])
    compiled = torch.compile(made, backend="lcnn", options=LOSSLESS if kind == "dense" else None, dynamic=True)
    same(compiled, model, *[(pictures(n, size, 4),) for n, size in ((2, 9), (3, 9), (1, 12), (5, 11))])
    norm.eps = 0.5  # the same module in both
    if kind == "dense":
        same(compiled, model, *[(pictures(3, 10, 4),)] * 3)


def test_numbers_among_the_inputs():
    conv = nn.Conv2d(4, 8, 3).eval()

    def function(x, stride, padding, scale):
        y = F.conv2d(F.pad(x, (padding, padding)), conv.weight, conv.bias, stride=stride, padding=padding)
        return F.interpolate(y * scale, scale_factor=2)

    compiled = torch.compile(function, backend="lcnn", options=LOSSLESS)
    calls = [(1, 1, 0.5), (1, 1, 0.5), (1, 1, 0.7), (1, 1, 0.9), (2, 1, 0.9), (2, 2, 0.9), (2, 2, 0.3), (1, 1, 0.5)]
    same(compiled, function, *[(pictures(2, 9 + i % 3, 4), *numbers) for i, numbers in enumerate(calls)])


def test_one_weight_in_two_geometries_is_fitted_twice():
    weight = nn.Parameter(torch.randn(8, 4, 3, 3))

    def function(x, stride):
        return F.conv2d(x, weight, stride=stride).relu()

    compiled = torch.compile(function, backend="lcnn", options=LOSSLESS)
    same(compiled, function, *[(pictures(2, 9, 4), stride) for stride in (1, 1, 2, 2, 1, 2)])


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        names = ("in", "class", "a-b", "x y", 'q"u', "in_")
        self.convs = nn.ModuleDict({name: nn.Conv2d(4, 4, 3) for name in names})

    def forward(self, x):
        for conv in self.convs.values():
            x = conv(x).relu()
        return x


def test_names_that_no_code_can_hold(caplog):
    model = Named().eval()
    compiled = torch.compile(model, backend="lcnn", options={**LOSSLESS, "include": ("convs.in", "convs.a-b")})
    same(compiled, model, *[(pictures(2, 20, 4),)] * 3)
    [report] = set(replaced(caplog))
    assert "2 of 6 layers replaced" in report
    assert "convs.class " in report


@pytest.mark.parametrize("where", ["fold_batch_norm", "gather_programs"])
@pytest.mark.parametrize("kind", ["dense", "converted"])
def test_a_pass_that_fails_leaves_the_graph_to_inductor(where, kind, monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("a pass met its limits")

    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    made = model if kind == "dense" else convert(model, LookupConfig(**LOSSLESS), calibration=[pictures(2, 9, 4)])
    monkeypatch.setattr(runtime, where, fail)
    compiled = torch.compile(made, backend="lcnn", options=LOSSLESS if kind == "dense" else None)
    with pytest.warns(LcnnWarning, match="a pass met its limits"):
        same(compiled, model, *[(pictures(2, 9, 4),)] * 3)
    with torch.no_grad():
        made[1].running_mean.add_(1)
        if kind == "converted":
            model[1].running_mean.add_(1)
    same(compiled, model, (pictures(2, 9, 4),))


def test_a_fit_that_fails_leaves_the_graph_dense(monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("no fit")

    monkeypatch.setattr(calibrating, "convert_in_place", fail)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    compiled = torch.compile(model, backend="lcnn", options=LOSSLESS)
    with pytest.warns(LcnnWarning, match="no fit"):
        same(compiled, model, *[(pictures(2, 9, 4),)] * 3)
    with torch.no_grad():
        model[0].weight.mul_(2)
    same(compiled, model, (pictures(2, 9, 4),))


@pytest.mark.parametrize("kind", ["dense", "converted", "computed"])
def test_inductors_freezing_makes_nothing_stale(kind):
    model = (
        Convs().eval() if kind == "computed" else nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)).eval()
    )
    made = convert(model, LookupConfig(**LOSSLESS), calibration=[pictures(2, 9, 4)]) if kind == "converted" else model
    with torch._inductor.config.patch(freezing=True), warnings.catch_warnings():
        warnings.simplefilter("ignore", LcnnWarning)
        compiled = torch.compile(made, backend="lcnn", options=None if kind == "converted" else LOSSLESS)
        same(compiled, made, *[(pictures(2, 9, 4),)] * 3)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.mul_(1.5)
        same(compiled, made, *[(pictures(2, 9, 4),)] * 3, tolerance=1e-3)


def test_a_convolution_without_input_channels():
    class Pruned(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.w = nn.Conv2d(4, 8, 3), nn.Parameter(torch.zeros(4, 0, 3, 3))

        def forward(self, x):
            return self.a(x).sum() + F.conv2d(x[:, :0], self.w).sum()

    model = Pruned().eval()
    same(torch.compile(model, backend="lcnn", options=LOSSLESS), model, *[(pictures(2, 9, 4),)] * 3, tolerance=1e-3)


def test_threads_may_call_a_model_while_it_calibrates(backend_reset):
    """Tracing is global to a process: two at once, or one while another thread calls, left every later call failing."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    lossless = {"dictionary_size": 1.0, "sparsity": None, "lowering": "lookup"}
    fast = torch.compile(dense, backend="lcnn", options=lossless)
    failures = []

    def serve(seed):
        x = torch.randn(2, 6, 9, 9, generator=torch.Generator().manual_seed(seed))
        try:
            with torch.no_grad():
                for _ in range(4):
                    torch.testing.assert_close(fast(x), dense(x), atol=1e-4, rtol=1e-4)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    serve(9)
    assert not failures
