"""torch.compile(backend="lcnn") on graphs that write: states, counters, statistics, random numbers, shared memory."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import pictures
from torch import nn

from lcnn_compile.backend import runtime
from lcnn_compile.backend.sandbox import copies, record, same_modes, without_effects
from lcnn_compile.conversion.untouched import random_state, untouched

pytestmark = pytest.mark.usefixtures("backend_reset")
LOSSLESS = {"dictionary_size": 1.0, "sparsity": None, "lowering": "lookup"}
SMALL = {"dictionary_size": 2, "sparsity": 1, "lowering": "lookup"}


def same_life(model, calls, options=LOSSLESS, tolerance=1e-4, twin=None):
    """The compiled model and an untouched twin answer alike in every call, and own the same tensors after each."""
    twin = copy.deepcopy(model) if twin is None else twin
    compiled = torch.compile(model, backend="lcnn", options=options)
    with torch.no_grad():
        for number, inputs in enumerate(calls):
            given, expected = ([x.clone() for x in inputs] for _ in range(2))
            found, want = compiled(*given), twin(*expected)
            if options is LOSSLESS:
                torch.testing.assert_close(found, want, atol=tolerance, rtol=tolerance, msg=f"call {number}")
                torch.testing.assert_close(given, expected, atol=tolerance, rtol=tolerance, msg=f"inputs of call {number}")
                for name, value in twin.state_dict().items():
                    torch.testing.assert_close(
                        model.state_dict()[name], value, atol=tolerance, rtol=tolerance, msg=f"{name}, {number}"
                    )


class Body(nn.Module):
    """Two convolutions between which something happens."""

    def __init__(self, channels=8):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 4, 3)


class Counter(Body):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        return self.b(self.a(x).relu()) * self.calls


class Stream(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(4, 8, 3), nn.Conv1d(8, 4, 1)
        self.register_buffer("past", torch.zeros(2, 4, 2))

    def forward(self, x):
        whole = torch.cat([self.past, x], -1)
        self.past.copy_(whole[..., -2:])
        return self.b(self.a(whole).relu_())


class Average(Body):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8, 1, 1))

    def forward(self, x):
        y = self.a(x)
        self.mean.mul_(0.9).add_(y.mean((0, 2, 3), keepdim=True)[0], alpha=0.1)
        return self.b(y - self.mean)


class WritesItsInput(Body):
    def forward(self, x):
        x[:, :, ::2].mul_(0.5)
        return self.b(self.a(x).relu()) + x[:, :1, 1:-1, 1:-1]


class WritesItsWeight(Body):
    def forward(self, x):
        self.a.weight.mul_(0.9)
        return self.b(self.a(x).relu())


class SharedBuffers(Body):
    """One buffer is a view of another; the graph writes the first and reads the second."""

    def __init__(self):
        super().__init__()
        self.register_buffer("whole", torch.ones(8, 1, 1))
        self.register_buffer("front", self.whole[:4])

    def forward(self, x):
        self.whole.add_(0.25)
        y = self.a(x)
        return self.b(torch.cat([y[:, :4] * self.front, y[:, 4:]], 1))


class WeightInABuffer(Body):
    """The filters of the second layer lie in a buffer that the graph writes through another name."""

    def __init__(self):
        super().__init__()
        self.register_buffer("store", torch.randn(4 * 8 * 9))
        self.register_buffer("filters", self.store.view(4, 8, 3, 3))

    def forward(self, x):
        y = F.conv2d(self.a(x).relu(), self.filters)
        self.store.mul_(0.9)
        return y + F.conv2d(self.a(x), self.filters)


def twin_of(model):
    """A copy in which views stay views."""
    twin = copy.deepcopy(model)
    if isinstance(model, SharedBuffers):
        twin.front = twin.whole[:4]
    if isinstance(model, WeightInABuffer):
        twin.filters = twin.store.view(4, 8, 3, 3)
    return twin


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize(
    "kind", [Counter, Stream, Average, WritesItsInput, WritesItsWeight, SharedBuffers, WeightInABuffer], ids=lambda k: k.__name__
)
def test_every_write_happens_once(kind, batches):
    model = kind().eval()
    calls = [(torch.randn(2, 4, 9) if kind is Stream else pictures(2),) for _ in range(5)]
    options = {**LOSSLESS, "calibration_batches": batches}
    twin = twin_of(model)
    compiled = torch.compile(model, backend="lcnn", options=options)
    with torch.no_grad():
        for (x,) in calls:
            given, expected = x.clone(), x.clone()
            torch.testing.assert_close(compiled(given), twin(expected), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(given, expected)
            torch.testing.assert_close(model.state_dict(), twin.state_dict(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_running_statistics_in_training_mode(norm):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8, track_running_stats=True), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3))
    same_life(model.train(), [(pictures(4),) for _ in range(4)])


def test_power_iterations_of_spectral_norm_are_made_once_per_call():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3)), nn.Conv2d(8, 4, 1)
    )
    same_life(model.train(), [(pictures(4),) for _ in range(4)])


def test_random_numbers_are_as_after_the_dense_call():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(0.5), nn.Conv2d(8, 4, 3)).train()
    compiled = torch.compile(model, backend="lcnn", options=SMALL)
    x = pictures(4)
    with torch.no_grad():
        torch.manual_seed(1)
        random.seed(1)
        want, following = model(x), (torch.rand(3), random.random())
        torch.manual_seed(1)
        random.seed(1)
        assert torch.equal(compiled(x), want)
        assert torch.equal(torch.rand(3), following[0])
        assert random.random() == following[1]


def test_a_state_does_not_lead_to_new_derivations(monkeypatch):
    derived = []
    passes = runtime.Lowered._passes
    monkeypatch.setattr(runtime.Lowered, "_passes", lambda self, *rest: derived.append(1) or passes(self, *rest))
    model = Average().eval()
    compiled = torch.compile(model, backend="lcnn", options=LOSSLESS)
    with torch.no_grad():
        for _ in range(6):
            compiled(pictures(2))
    assert len(derived) == 1


def test_a_weight_that_changes_between_all_calls_becomes_data(monkeypatch):
    derived = []
    passes = runtime.Lowered._passes
    monkeypatch.setattr(runtime.Lowered, "_passes", lambda self, *rest: derived.append(1) or passes(self, *rest))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    compiled = torch.compile(model, backend="lcnn", options=LOSSLESS)
    with torch.no_grad():
        for _ in range(12):
            x = pictures(2)
            torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)
            model[1].running_mean.add_(0.1)
    assert len(derived) <= 2 + runtime.RESTLESS


def test_filters_that_change_between_all_calls_are_not_fitted_each_time(caplog):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    compiled = torch.compile(model, backend="lcnn", options=LOSSLESS)
    x = pictures(2)
    with torch.no_grad():
        for _ in range(8):
            torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)
            model[0].weight.mul_(0.9)
            model[2].bias.add_(0.1)
        assert sum("fitting" in record.message for record in caplog.records) == 1
        for _ in range(3):
            torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)
    assert sum("fitting" in record.message for record in caplog.records) == 2


def test_a_changed_bias_is_noticed():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    compiled = torch.compile(model, backend="lcnn", options=LOSSLESS)
    x = pictures(2)
    with torch.no_grad():
        for _ in range(2):
            compiled(x)
        model[0].bias.add_(1)
        for _ in range(3):
            torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)


def test_inputs_that_come_to_share_memory():
    model = Body().eval()

    def function(x, y):
        x.mul_(2)
        return model.b(model.a(x).relu()) + y[:, :1, 1:-1, 1:-1]

    compiled = torch.compile(function, backend="lcnn", options=LOSSLESS)
    with torch.no_grad():
        for overlap in (False, False, True, False, True):
            found, want = pictures(5), None
            want = found.clone()
            pair = (lambda t: (t[:2], t[1:3])) if overlap else (lambda t: (t[:2].clone(), t[3:5].clone()))
            torch.testing.assert_close(compiled(*pair(found)), function(*pair(want)), atol=1e-4, rtol=1e-4)


def test_a_view_of_a_filter_as_an_input_that_is_written():
    model = Body().eval()

    def function(x, w):
        w.mul_(0.5)
        return model.b(model.a(x).relu())

    compiled = torch.compile(function, backend="lcnn", options=LOSSLESS)
    with torch.no_grad():
        for own in (True, True, False, False, True):
            x = pictures(2)
            twin = copy.deepcopy(model)
            w = torch.ones(3) if own else model.a.weight[0]
            (torch.ones(3) if own else twin.a.weight[0]).mul_(0.5)
            want = twin.b(twin.a(x).relu())
            torch.testing.assert_close(compiled(x, w), want, atol=1e-4, rtol=1e-4)


def test_calibration_sees_the_modes_of_the_call_and_leaves_none_behind():
    class Mixed(Body):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                y = self.a(x)
            return self.b(y.float())

    model = Mixed().eval()
    compiled = torch.compile(model, backend="lcnn", options=LOSSLESS)
    x = pictures(2)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(x), model(x), atol=0.05, rtol=0.05)
            assert not torch.is_autocast_enabled("cpu")
            assert model.b(model.a(x)).dtype == torch.float32
        torch.testing.assert_close(compiled(x.double().float()), model(x), atol=0.05, rtol=0.05)


def test_copies_keep_strides_values_and_shared_memory():
    base = torch.arange(24.0).view(4, 6)
    values = [base, base[1:3, ::2], torch.ones(3, 1).expand(3, 4), base.t().contiguous().t(), 5, None, torch.ones(2).conj()]
    made = copies(values)
    for old, new in zip(values, made, strict=True):
        if isinstance(old, torch.Tensor):
            assert torch.equal(old, new)
            assert old.stride() == new.stride()
            assert old.data_ptr() != new.data_ptr()
        else:
            assert old is new
    made[0].zero_()
    assert not made[1].any()
    assert base.sum() == 276
    alone = copies([base[1:3, ::2]])[0]
    assert torch.equal(alone, base[1:3, ::2])
    with torch.inference_mode():
        inside = copies([torch.ones(2)])[0]
    assert not inside.is_inference()


@pytest.mark.parametrize("quietly", [without_effects, lambda: untouched(nn.Identity())])
def test_random_numbers_are_afterwards_as_before(quietly):
    def draw():
        return float(torch.rand(())), random.random(), float(np.random.rand())

    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(5)
    wanted = draw()
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(5)
    with quietly():
        assert draw() == wanted
        draw()
    assert draw() == wanted


def test_calibration_runs_without_autocast_and_gradients():
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad(), without_effects():
        assert not torch.is_autocast_enabled("cpu")
        assert not torch.is_grad_enabled()
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32


def test_a_recorded_call_is_the_same_each_time():
    x = torch.ones(3)

    def function(x):
        x += 1
        return x + torch.rand(3)

    call = record([x])
    first, second = call.run(function), call.run(function)
    assert torch.equal(first, second)
    assert torch.equal(x, torch.ones(3))


def test_modes_and_random_numbers_are_put_back_after_an_interruption():
    restore = random_state()
    expected = torch.rand(2)
    restore()

    def interrupted():
        torch.autocast("cpu", torch.float16).__enter__()
        torch.set_grad_enabled(False)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), same_modes():
        interrupted()
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.rand(2), expected)
