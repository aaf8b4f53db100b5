"""The benchmarks at tiny sizes: right counts, refusal of wrong results, tables and files. No claims about time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from lcnn_compile.bench import macs
from lcnn_compile.bench.cpu import report, training
from lcnn_compile.bench.cpu.engines import ENGINES, Engine, Runnable, run_torch
from lcnn_compile.bench.cpu.layers import OURS, LayerShape, layer_case, sizes
from lcnn_compile.bench.cpu.measure import LOOKUP_ENGINES, Case, measure
from lcnn_compile.bench.cpu.network_bench import SETTINGS_OF
from lcnn_compile.bench.cpu.probe import Peak
from lcnn_compile.bench.cpu.scaling import roofline
from lcnn_compile.bench.cpu.summary import INT8, compare
from lcnn_compile.bench.cpu.targets import TARGETS, judge
from lcnn_compile.bench.hardware import describe, versions
from lcnn_compile.bench.networks import NETWORKS, build
from lcnn_compile.bench.settings import SETTINGS, dense_twin, lookup_network
from lcnn_compile.errors import ConfigError
from lcnn_compile.modules import LookupModule
from lcnn_compile.timing import Burst, Timing, alternate

EAGER, LOOKUP = ENGINES["eager"], LOOKUP_ENGINES["lcnn eager"]


def tiny_case() -> Case:
    return layer_case(LayerShape(8, 8, 6), {"a": sizes(18, 4), "b": sizes(9, 1, 2)}, batch=2)


def test_layers_are_timed_and_compared() -> None:
    rows = measure(tiny_case(), [EAGER], 0.0, [LOOKUP])
    assert [(row.setting, row.engine) for row in rows] == [("dense", "eager"), ("a", "lcnn eager"), ("b", "lcnn eager")]
    assert all(row.seconds is not None and not row.failed and row.error <= row.allowed for row in rows)
    assert [row.lookups for row in rows] == [None, 1, 1]
    first, second = compare(rows)
    assert first.mac_ratio == pytest.approx(8 * 8 * 9 / (8 * 2 + 8 * 18))
    assert second.mac_ratio == pytest.approx(8 * 8 * 9 / (8 * 2 + 8 * 9))
    assert first.efficiency == pytest.approx(first.speedup / first.mac_ratio)


def test_lookups_that_round_are_compared_apart() -> None:
    rows = measure(tiny_case(), [EAGER], 0.0, [LOOKUP, LOOKUP_ENGINES["lcnn bf16"]])
    exact, rounded = rows[1:3]
    assert (rounded.engine, rounded.exact) == ("lcnn bf16", False)
    assert rounded.error is not None
    assert 1e-4 < rounded.error < 0.02
    exact.seconds, rounded.seconds, rows[0].seconds = 2.0, 1.0, 6.0
    comparison = compare(rows)[0]
    assert (comparison.speedup, comparison.speedup_bf16, comparison.error_bf16) == (3.0, 6.0, rounded.error)
    rows.append(replace(rows[0], engine=INT8, exact=False, seconds=3.0))
    comparison = compare(rows)[0]
    assert (comparison.speedup, comparison.speedup_int8, comparison.speedup_bf16_int8) == (3.0, 1.5, 3.0)


def test_a_wrong_lookup_gets_no_time() -> None:
    def prepare(model: nn.Module, example: Tensor, folder: Path) -> Runnable:
        return run_torch(lambda x: model(x) * 1.0001, example)

    rows = measure(tiny_case(), [EAGER], 0.0, [Engine("slightly off", True, (), prepare)])
    assert rows[0].seconds is not None
    assert all(row.failed and row.reason.startswith("wrong") for row in rows[1:])
    comparison = compare(rows)[0]
    assert comparison.speedup is None
    assert "wrong" in comparison.reason


@pytest.mark.parametrize(
    "result", [torch.full((2, 8, 6, 6), float("nan")), torch.zeros(2, 8, 5, 6), torch.full((2, 8, 6, 6), float("inf"))]
)
def test_garbage_is_wrong(result: Tensor) -> None:
    engine = Engine("garbage", True, (), lambda model, example, folder: run_torch(lambda x: result, example))
    assert all(row.failed for row in measure(tiny_case(), [EAGER], 0.0, [engine])[1:])


def test_missing_and_failing_engines_are_listed() -> None:
    def fail(model: nn.Module, example: Tensor, folder: Path) -> Runnable:
        raise NotImplementedError("no such layer")

    engines = [EAGER, Engine("absent", True, ("no_such_package",), fail), Engine("broken", True, (), fail)]
    rows = measure(tiny_case(), engines, 0.0, [LOOKUP])
    assert [row.reason for row in rows[:3]] == ["", "missing: no_such_package", "failed: NotImplementedError: no such layer"]
    assert compare(rows)[0].best_dense == "eager"


@pytest.mark.parametrize(
    ("name", "multiply_adds"),
    [
        *(("alexnet", 714e6), ("resnet18", 1814e6), ("mobilenet", 569e6), ("narrow", 211.6e6)),
        *(("mobilenet_v2", 300e6), ("mobilenet_v3", 217e6), ("densenet121", 2834e6)),
    ],
)
def test_networks_have_the_published_cost(name: str, multiply_adds: float) -> None:
    assert macs.count(build(name), torch.zeros(1, 3, 224, 224)) == pytest.approx(multiply_adds, rel=0.01)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("unet", (1, 3, 64, 64)), ("detector", (1, 144, 84)), ("edsr", (1, 3, 128, 128)), ("compact_sr", (1, 3, 256, 256))],
)
def test_networks_that_give_more_than_a_class(name: str, shape: tuple[int, ...]) -> None:
    with torch.no_grad():
        y = build(name)(torch.zeros(1, 3, 64, 64))
    assert y.shape == shape


@pytest.mark.parametrize(("name", "frozen"), [("inductor", True), ("inductor without freezing", False)])
def test_inductor_freezes_where_its_name_says_so(name: str, frozen: bool, tmp_path: Path) -> None:
    torch.compiler.reset()
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3)).eval()
    x = torch.randn(1, 3, 12, 12)

    def run() -> Tensor:
        # The first engine's code is of a model of the same classes, and must not serve the second.
        ENGINES["inductor without freezing" if frozen else "inductor"].prepare(model, x, tmp_path).call()
        runnable = ENGINES[name].prepare(model, x, tmp_path)
        return runnable.output()

    with torch.no_grad():
        y, code = run_and_get_code(run)
    assert torch.allclose(y, model(x), atol=1e-5)
    assert frozen == ("extern_kernels.convolution" not in code[-1])
    assert frozen == ("sqrt" not in code[-1])


def test_unknown_network() -> None:
    with pytest.raises(ConfigError, match="allowed are"):
        build("lenet")


def test_lookup_networks_have_the_sizes_of_their_settings() -> None:
    assert set(SETTINGS_OF) == set(NETWORKS)
    model = lookup_network("resnet18", build("resnet18"), SETTINGS["ours"])
    layers = [module for module in model.modules() if isinstance(module, LookupModule)]
    assert len(layers) == 21
    assert (layers[0].dictionary_size, layers[0].lookup_weight().taps) == (3, 64 * 54)
    stage = next(m for m in layers if m.dictionary.shape[2] == 512 and m.kernel_size == (3, 3))
    assert (stage.dictionary_size, stage.group_size, stage.lookup_weight().taps) == (128, 8, 512 * 54)
    assert not any(isinstance(module, LookupModule) for module in dense_twin(model).modules())


def test_alternating_bursts_call_every_candidate_equally() -> None:
    calls = {"a": 0, "b": 0}

    def call(name: str) -> None:
        calls[name] += 1

    timings = alternate({name: lambda name=name: call(name) for name in calls}, 0.0, (3, 3))
    assert calls == {"a": 1 + 3 * 7, "b": 1 + 3 * 7}
    assert all(0 < timing.low <= timing.median <= timing.high for timing in timings.values())


def test_quartiles_of_undisturbed_bursts() -> None:
    def bursts(*seconds: float, disturbed: bool = False) -> list[Burst]:
        return [Burst(value, disturbed) for value in seconds]

    assert Timing.of(bursts(4.0)) == Timing(4.0, 4.0, 4.0, 1)
    assert Timing.of(bursts(1.0, 2.0, 3.0, 4.0, 5.0)) == Timing(3.0, 2.0, 4.0, 5)
    assert Timing.of([*bursts(1.0, 2.0, 3.0), *bursts(9.0, 9.0, disturbed=True)]).median == 2.0
    assert Timing.of([*bursts(1.0), *bursts(3.0, disturbed=True)]) == Timing(2.0, 1.5, 2.5, 2)


def test_report(tmp_path: Path) -> None:
    rows = measure(tiny_case(), [EAGER], 0.0, [LOOKUP])
    console = Console(record=True, width=200)
    report.show(rows, "layers", console)
    assert "8→8 3×3 @6²" in console.export_text()
    report.write(tmp_path / "deep" / "layers.json", report.document("layers", "command", rows=[row.to_dict() for row in rows]))
    content = json.loads((tmp_path / "deep" / "layers.json").read_text())
    assert content["hardware"] == describe()
    assert content["versions"] == versions()
    assert content["rows"][1]["setting"] == "a"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["layers.json"]


def test_targets_name_cases_that_exist() -> None:
    from lcnn_compile.bench.cpu.layers import TARGETS as LAYERS

    known = {(shape.name, setting) for shape, settings in LAYERS.items() for setting in settings}
    known |= {(name, setting) for name, settings in SETTINGS_OF.items() for setting in settings}
    assert all((case, target.setting) in known for target in TARGETS for case in target.cases)
    assert judge([]) == []


def test_roofline_is_the_slowest_resource() -> None:
    layer = tiny_case().lookups["a"]
    assert isinstance(layer, LookupModule)
    peak = Peak(macs=1.0, loads=1e9, bandwidth={1024: 1e9, 1 << 30: 1e6})
    limits = roofline(layer.lookup_weight(), 2, 36, peak)
    assert limits.arithmetic == 72 * (8 * 2 + 8 * 18)
    assert (limits.bound, limits.seconds) == ("arithmetic", limits.arithmetic)
    assert peak.bytes_per_second(2048) == 1e6
    assert Peak.from_dict(json.loads(json.dumps(peak.to_dict()))) == peak


def test_a_step_of_training_is_checked_before_it_is_timed(monkeypatch) -> None:
    rows = training.run(quick=True)
    assert [(row["setting"], row["way"]) for row in rows[:3]] == [
        ("dense", "dense"),
        ("dense", "dense channels_last"),
        (OURS, "taps"),
    ]
    assert len(rows) == 6
    assert all(row["seconds"] > 0 and row["error"] < 1e-5 for row in rows)
    console = Console(width=200, record=True, quiet=True)
    training.show_training(rows, console)
    monkeypatch.setattr(training, "LIMIT", 0.0)
    assert all(row["seconds"] is None for row in training.run(quick=True))
