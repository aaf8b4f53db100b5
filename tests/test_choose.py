"""The choice of lowering: counts, estimates, and measurements that are made once."""

import dataclasses
import json

import pytest
import torch

from lcnn_compile.kernels import choose, measured
from lcnn_compile.kernels import operator as ops
from lcnn_compile.kernels.arguments import flat

PROBLEM = choose.Problem(
    batch=2,
    in_channels=16,
    out_channels=24,
    groups=2,
    dictionary_size=4,
    taps=24 * 9,
    group_size=4,
    size=(12, 10),
    kernel_size=(3, 3),
    stride=(2, 1),
    padding=(1, 1, 1, 1),
    dilation=(1, 1),
)


def test_multiply_adds():
    assert PROBLEM.out_pixels == 2 * 6 * 10
    dictionary = 16 * 4 * 2 * 120
    assert PROBLEM.macs() == {
        "lookup": dictionary + 24 * 9 * 120,
        "factored": dictionary + 4 * 24 * 9 * 120,
        "dense": 8 * 24 * 9 * 120,
    }
    pointwise = dataclasses.replace(PROBLEM, kernel_size=(1, 1), stride=(2, 2), padding=(0,) * 4)
    assert pointwise.in_pixels == 2 * 6 * 5


def test_estimates_follow_the_sizes():
    wide = dataclasses.replace(
        PROBLEM, in_channels=256, out_channels=256, groups=1, dictionary_size=64, taps=256 * 54, size=(28, 28)
    )
    assert choose.cheapest(wide, True) == "lookup"
    assert choose.cheapest(wide, False) == "factored"
    assert choose.cheapest(dataclasses.replace(wide, dictionary_size=256, taps=256 * 256 * 9), True) == "dense"
    assert choose.cheapest(dataclasses.replace(PROBLEM, size=(3, 3), taps=24 * 36), True) == "dense"


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("LCNN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("LCNN_TUNE", raising=False)
    measured.facts_file.cache_clear()
    measured.known.cache_clear()
    yield tmp_path
    measured.facts_file.cache_clear()
    measured.known.cache_clear()


def test_measured_once_and_remembered(store, monkeypatch):
    times = {"lookup": 3.0, "factored": 2.0, "dense": 5.0}
    asked = []
    monkeypatch.setattr(measured, "_caller", lambda arguments, name, precision: name)
    monkeypatch.setattr(measured, "_burst", lambda name: asked.append(name) or times[name])
    monkeypatch.setattr(measured, "HOPELESS", 1e9)
    assert measured.remembered(PROBLEM) is None
    assert choose.cheapest(PROBLEM, True, measure=True) == "factored"
    count = len(asked)
    assert choose.cheapest(PROBLEM, True, measure=True) == "factored"
    assert choose.cheapest(PROBLEM, True) == "factored"
    assert len(asked) == count == 3 * measured.ROUNDS
    assert [list(json.loads(p.read_text()).values()) for p in store.rglob("*.json")] == [[times]]


def test_random_calls_are_valid_and_leave_the_random_state_alone(store):
    before = torch.get_rng_state()
    found = measured.measure(PROBLEM, True)
    assert torch.equal(torch.get_rng_state(), before)
    assert min(found.values()) > 0
    y = ops.lookup_conv2d(*flat(measured.random_call(PROBLEM)))
    assert y.shape == (2, 24, 6, 10)


def test_an_unwritable_or_damaged_store_does_not_matter(store):
    measured.facts_file().parent.mkdir(parents=True)
    measured.facts_file().write_text("{")
    assert measured.measure(PROBLEM, True)
    measured.known.cache_clear()
    (store / "lowerings" / "x").mkdir()
    assert measured.remembered(PROBLEM)
