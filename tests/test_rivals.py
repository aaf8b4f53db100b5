"""A frozen model that is not slower than what PyTorch itself makes of its dense form. No claims about time: what is measured is given."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lcnn_compile import LcnnWarning, LookupConfig, convert, freeze
from lcnn_compile.export import rivals
from lcnn_compile.export.engines import ENGINES
from lcnn_compile.kernels import cpu, measured

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the C++ kernels are unavailable")


@pytest.fixture
def times(monkeypatch, tmp_path):
    """What is "measured", by engine; and how often."""
    monkeypatch.delenv("LCNN_TUNE")
    monkeypatch.setenv("LCNN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(measured, "measure", lambda problem, kernel: {"lookup": 1.0, "factored": 2.0, "dense": 3.0})
    measured.facts_file.cache_clear()
    given, asked = {}, []

    def measure(run, dense, inputs):
        run(*inputs), dense()
        asked.append(1)
        return dict(given)

    monkeypatch.setattr(rivals, "_measured", measure)
    yield given, asked
    measured.facts_file.cache_clear()


def converted(**fields):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    x = torch.randn(2, 3, 9, 11)
    return convert(model, LookupConfig(dictionary_size=3, **fields), calibration=[x]), x


def close(frozen, model, x):
    with torch.no_grad():
        torch.testing.assert_close(frozen(x).double(), copy.deepcopy(model).double()(x.double()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_fastest_engine_runs_the_dense_form(times, engine):
    given, asked = times
    given |= {"ours": 1.0, **dict.fromkeys(ENGINES, 0.9), engine: 0.5}
    model, x = converted()
    with pytest.warns(LcnnWarning, match=rf"kept dense: {engine} takes 500.00 ms a call here, lookups 1000.00 ms"):
        frozen = freeze(model, x)
    assert not frozen.alone
    assert frozen.left_over == [frozen.kept_dense]
    y = frozen(x)
    assert y.stride() == model(x).stride()
    twin = pickle.loads(pickle.dumps(frozen))
    assert twin.kept_dense == frozen.kept_dense
    for batch in (x, torch.randn(5, 3, 9, 11)):
        close(frozen, model, batch)
        close(twin, model, batch)
    with pytest.warns(LcnnWarning, match="kept dense"):
        freeze(model, x)
    assert len(asked) == 1  # it is remembered


@pytest.mark.parametrize("others", [{}, {"eager": 0.99, "Inductor": 1.5}])
def test_lookups_stay_where_nothing_is_faster(times, others):
    given, asked = times
    given |= {"ours": 1.0, **others}
    model, x = converted()
    frozen = freeze(model, x)
    assert frozen.alone
    assert (frozen.kept_dense, asked) == ("", [1])
    close(frozen, model, x)


@pytest.mark.parametrize("why", ["lowering", "precision", "writes", "LCNN_TUNE"])
def test_what_the_user_has_chosen_is_not_measured(times, why, monkeypatch):
    given, asked = times
    given |= {"ours": 1.0, "eager": 0.1}
    model, x = converted(**{"lowering": {"lowering": "lookup"}, "precision": {"precision": "bfloat16"}}.get(why, {}))
    if why == "LCNN_TUNE":
        monkeypatch.setenv("LCNN_TUNE", "0")
    if why == "writes":
        model = Writing(model)
    freeze(model, x)
    assert not asked


class Writing(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        y = self.model(x)
        x.mul_(2)
        return y


def test_far_engines_are_not_compiled(monkeypatch):
    """Only eager PyTorch runs where it takes many times as long."""

    def slow(graph):
        return lambda x: sum(x.sum() for _ in range(3000))

    def never(graph):
        raise AssertionError

    monkeypatch.setattr(rivals, "ENGINES", dict.fromkeys(ENGINES, never) | {"eager": slow, "eager, channels_last": slow})
    found = rivals._measured(lambda x: x, lambda: None, [torch.ones(3)])
    assert set(found) == {"ours"}
