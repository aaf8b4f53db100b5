"""Budgets in seconds: what sizes cost is interpolated from timings, and searches go by it."""

import pytest
import torch
from nets import SmallResNet, pictures, randomise
from test_learning_model import fit, images, small

from lcnn_compile import LookupConfig, convert
from lcnn_compile.config import LayerConfig
from lcnn_compile.conversion.plan import Plan
from lcnn_compile.errors import ConfigError, ConversionError
from lcnn_compile.fitting.costs import MultiplyAdds, Seconds
from lcnn_compile.fitting.processes import Processes
from lcnn_compile.geometry import geometry_of
from lcnn_compile.kernels import choose

SEARCHED = LayerConfig(dictionary_size="auto", sparsity="auto", group_size="auto")
PIXELS = {"0": (256, 256), "2": (256, 256), "4": (196, 256)}


def seconds(timer, most=144):
    geometry = {"a": geometry_of(torch.nn.Conv2d(32, 32, 3))}
    return Seconds(timer, geometry, lambda name, size: most, 0.5, Processes())


def test_seconds_are_those_of_a_timer_that_is_linear_and_four_layers_are_timed_for_each_group_size():
    calls = []

    def timer(name, size, taps, group_size):
        calls.append((name, size, taps, group_size))
        return 7.0 if not size else group_size * (1.0 + 0.25 * size + 0.125 * taps)

    costs = seconds(timer)
    for size, taps, group_size in [(2, 9, 1), (17, 101, 1), (5, 1, 8), (32, 288, 8)]:
        assert costs.lookup("a", size, taps, group_size) == pytest.approx(group_size * (1 + size / 4 + taps / 8), rel=1e-9)
    assert costs.dense("a") == costs.dense("a") == 7.0
    assert costs.other == 0.5
    assert len(calls) == len(set(calls)) == 9


@pytest.mark.parametrize(
    ("timer", "wanted"),
    [
        (lambda n, k, t, g: 3.0 + 0.1 * t - 0.001 * k, (False, True)),
        (lambda n, k, t, g: 3.0 + 0.1 * k - 0.001 * t, (True, False)),
        (lambda n, k, t, g: 2.0, (False, False)),
    ],
)
def test_noise_never_makes_vectors_or_taps_cheaper_than_nothing(timer, wanted):
    costs = seconds(timer)
    base = costs.lookup("a", 4, 20, 1)
    assert (costs.lookup("a", 8, 20, 1) > base * 1.0001, costs.lookup("a", 4, 60, 1) > base * 1.0001) == wanted
    assert costs.lookup("a", 8, 20, 1) >= base * 0.9999
    assert costs.lookup("a", 4, 60, 1) >= base * 0.9999


def test_multiply_adds_are_those_of_the_weight():
    conv = torch.nn.Conv2d(12, 20, 3, groups=2)
    costs = MultiplyAdds({"a": geometry_of(conv)}, {"a": (30, 50)}, 9)
    assert costs.dense("a") == 30 * conv.weight.numel()
    assert costs.lookup("a", 3, 7, 4) == 50 * 12 * 3 + 30 * 20 * 7
    assert costs.other == 9


def times(per_tap):
    """Dense 1 ns a multiply-add; lookups the same, and taps by group size."""

    def timer(name, size, taps, group_size):
        n, m = {"0": (16, 3), "2": (16, 16), "4": (12, 16)}[name]
        outputs, inputs = PIXELS[name]
        return 1e-9 * (
            m * size * inputs + per_tap.get(group_size, per_tap[16]) * n * taps * outputs if size else 9 * m * n * outputs
        )

    return timer


@pytest.mark.parametrize(("per_tap", "wanted"), [({1: 1, 4: 1, 8: 1, 16: 1}, {1}), ({1: 9, 4: 5, 8: 1, 16: 5}, {8})])
def test_the_group_size_that_is_worth_its_time_is_found(per_tap, wanted):
    timer = times(per_tap)
    fitted = fit(small(), SEARCHED, images(16).split(8), target_speedup=2.5, timer=timer, other=1e-6, pixels=PIXELS)
    replaced = {name: f.weight for name, f in fitted.items() if not f.reason}
    assert {weight.group_size for weight in replaced.values()} == wanted
    before = 1e-6 + sum(timer(name, 0, 0, 1) for name in PIXELS)
    after = 1e-6 + sum(
        timer(name, w.dictionary_size, w.taps / w.out_channels, w.group_size)
        if (w := replaced.get(name))
        else timer(name, 0, 0, 1)
        for name in PIXELS
    )
    assert 2.5 <= before / after * (1 + 1e-9) < 3


def test_a_time_out_of_reach_is_told_in_seconds():
    with pytest.raises(ConversionError, match=r"cannot be reached: .* seconds are outside"):
        fit(small(), SEARCHED, images().split(4), target_speedup=9, timer=times({1: 1, 4: 1, 8: 1, 16: 1}), other=1.0)


def test_within_max_error_the_fastest_sizes_are_taken():
    slow_ones = times({1: 50, 4: 1, 8: 50, 16: 50})
    config = LayerConfig("auto", "auto", "auto", max_error=0.2)
    fitted = fit(small(), config, images(32).split(8), timer=slow_ones)
    assert {f.weight.group_size for f in fitted.values() if not f.reason} == {4}


def test_convert_reaches_the_time_that_was_asked_for(monkeypatch):
    monkeypatch.setenv("LCNN_TUNE", "0")  # estimates instead of measurements: the same wherever the test runs
    model, data = randomise(SmallResNet(64)).eval(), pictures(16).split(8)
    config = LookupConfig(target_speedup=1.5, budget="time", group_size="auto")
    converted = convert(model, config, calibration=data)
    plan = Plan(model, config, data[0])
    before = after = plan.other("time")
    for row in converted.lcnn_report:
        if row.name in plan.configs:
            dense = plan.seconds(row.name, 0, 0, 1)
            before += dense
            after += plan.seconds(row.name, row.dictionary_size, round(row.taps), row.group_size) if row.replaced else dense
    assert 1.45 <= before / after < 2.5
    assert any(row.replaced for row in converted.lcnn_report)


def test_seconds_of_a_layer_are_those_of_its_problem_times_how_often_it_runs(monkeypatch):
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(16, 16, 3, padding=1)
            self.rows = torch.nn.Linear(16, 8)

        def forward(self, x):
            return self.rows(self.conv(self.conv(x)).flatten(2).transpose(1, 2))

    asked = []

    def measured(problem, kernel):
        asked.append(problem)
        return {"dense": 5.0, "lookup": 2.0, "factored": 3.0}

    monkeypatch.setattr(choose, "seconds", measured)
    plan = Plan(Twice(), LookupConfig(target_speedup=2.0, budget="time"), torch.randn(3, 16, 6, 7))
    assert plan.seconds("conv", 0, 0, 1) == 10.0
    assert plan.seconds("conv", 4, 20, 8) == 4.0
    problem = asked[-1]
    assert (problem.batch, problem.dictionary_size, problem.taps, problem.group_size) == (1, 4, 320, 8)
    assert (problem.size, problem.padding, problem.in_channels) == ((6, 7), (1, 1, 1, 1), 16)
    assert plan.other("time") == 5.0  # the linear layer: 42 rows taken together
    assert asked[-1].batch == 42
    with pytest.raises(ConversionError, match="conv: budget='time' needs a layer to run"):
        Plan(Twice(), LookupConfig(), None).seconds("conv", 0, 0, 1)


@pytest.mark.parametrize(
    "options", [{}, {"budget": "time"}, {"target_speedup": 2.0}, {"dictionary_size": "auto", "max_error": 0.1}]
)
def test_group_sizes_are_only_searched_where_time_counts(options):
    with pytest.raises(ConfigError, match="group_size is 'auto', which needs budget='time'"):
        LookupConfig(group_size="auto", **options)
    with pytest.raises(ConfigError, match=r"layers\['a'\]: group_size is 'auto'"):
        LookupConfig(layers={"a": {"group_size": "auto"}}, **options)


def test_budgets_are_validated_and_kept():
    config = LookupConfig(target_speedup=2.0, budget="time", group_size="auto")
    assert LookupConfig.from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match=r"budget is 'watts'; allowed is one of \('macs', 'time'\)"):
        LookupConfig(budget="watts")
    with pytest.raises(ConfigError, match='group_size is 0; allowed is an int >= 1, or "auto"'):
        LookupConfig(group_size=0)
