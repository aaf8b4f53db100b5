"""The GPU benchmark without a GPU: on a CPU that stands in for one, on a GPU of mocks, and with workers that crash and hang."""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from lcnn_compile.bench.gpu import cases as gpu_cases
from lcnn_compile.bench.gpu import chains as gpu_chains
from lcnn_compile.bench.gpu import floors as gpu_floors
from lcnn_compile.bench.gpu import layers as gpu_layers
from lcnn_compile.bench.gpu import machine as gpu_machine
from lcnn_compile.bench.gpu import session as gpu_session
from lcnn_compile.bench.gpu import summary as gpu_summary
from lcnn_compile.bench.gpu import whole as gpu_whole
from lcnn_compile.bench.gpu import worker as gpu_worker
from lcnn_compile.bench.gpu.budget import Budget, at_most
from lcnn_compile.bench.gpu.cases import NARROW, NARROW_SIZES, SIZES, Job, Layer, Sizes, layer_job
from lcnn_compile.bench.gpu.machine import Gpu, Rehearsal, allowed, set_mode


@pytest.fixture(autouse=True)
def _modes_come_back_and_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


def rows_of(log):
    return gpu_summary.document(gpu_session.read(log))


def worker(tmp_path, machine=None, seconds=300.0):
    return gpu_worker.Worker(machine or Rehearsal(), tmp_path / "gpu.jsonl", Budget(time.time() + seconds))


def small(kind, *names):
    chosen = [job for job in gpu_worker.select((kind,), True) if job.kind == kind]
    return [job for job in chosen if not names or any(name in job.name for name in names)]


def test_most_wanted_jobs_come_first_and_none_twice():
    found = list(gpu_cases.jobs())
    names = [(job.kind, job.name) for job in found]
    assert len(set(names)) == len(names)
    kinds = [job.kind for job in found]
    assert kinds.index("ceilings") > kinds.index("check")
    assert kinds.index("layer") > kinds.index("ceilings")
    wanted = {(layer.name, mode) for layer in gpu_cases.WIDE for mode in ("float16", "float32")}
    early = found[: kinds.index("network")]
    assert wanted <= {(job.arguments["layer"].name, job.arguments["mode"]) for job in early if job.kind == "layer"}
    every = {(j.arguments["mode"], j.arguments["format"], j.arguments["batch"]) for j in found if j.kind == "layer"}
    assert {(m, f, b) for m in gpu_cases.MODES for f in gpu_cases.FORMATS for b in (1, 8, 64, 256)} <= every


def test_checks_agree_and_a_wrong_kernel_is_seen(tmp_path, monkeypatch):
    (job,) = small("check", "64->64@15 g1/27 float32")
    run = worker(tmp_path)
    rows = run.measure(job)
    assert [row["agrees"] for row in rows] == [True, True]
    forward = gpu_layers.LookupConv2d.forward
    monkeypatch.setattr(
        gpu_layers.LookupConv2d, "forward", lambda self, x: forward(self, x) * (1 if x.dtype == torch.float64 else 1.001)
    )
    assert not any(row["agrees"] for row in run.measure(job))


def test_layers_are_timed_against_the_best_dense_format(tmp_path):
    run = worker(tmp_path)
    (job, *_) = small("layer", "b64 float16")
    rows = run.measure(job)
    assert [row["sizes"] for row in rows] == [sizes.name for sizes in SIZES]
    for row in rows:
        assert row["speedup"] == pytest.approx(min(row["dense_ms"].values()) / row["ms"]["lookup"])
        assert set(row["over_floor"]) == {"dictionary", "lookups", "call"}
        assert set(row["dense_ms"]) == {"eager contiguous", "eager channels_last", "max-autotune"}
    json.dumps(rows)


def test_shuffled_filters_compute_the_dense_layer_of_their_order(tmp_path):
    layer, sizes = gpu_cases.CHECKED[-1]
    module = gpu_layers.lookup_of(layer, sizes, "cpu", torch.float32)
    natural = torch.arange(module.filters.numel(), dtype=torch.int32).view_as(module.filters)
    assert not torch.equal(module.filters, natural)
    assert torch.equal(module.filters.flatten().sort().values, natural.flatten())
    rows = worker(tmp_path).measure(Job("check", "", 9, {"layer": layer, "sizes": sizes, "mode": "float32"}))
    assert [row["agrees"] for row in rows] == [True, True]


def test_wrong_lookups_get_no_time(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_layers, "dense_times", lambda *_: {"eager": 1.0})
    monkeypatch.setattr(
        gpu_layers.LookupConv2d, "to_conv", lambda self: torch.nn.Conv2d(32, 64, 3, padding=1, dtype=torch.float16)
    )
    run = worker(tmp_path)
    (job, *_) = small("layer", "b64 float16")
    assert run.measure(job) == []
    assert len(run.budget.skipped) == 3
    assert all("wrong values" in reason for reason in run.budget.skipped)


def test_a_network_at_its_fastest_layers(tmp_path, monkeypatch):
    times = iter([3.0, 2.0] + [9.0] * 100)
    monkeypatch.setattr(Rehearsal, "milliseconds", lambda self, call, inputs: (call(inputs[0]), next(times))[1])
    (job,) = small("network")
    run = worker(tmp_path)
    (row,) = run.measure(job)
    ((name, entry),) = row["layers"].items()
    assert (name, entry["taken"]) == ("2", "g64/192 lookup")
    assert list(row["dense_ms"]) == ["eager", "inductor", "max-autotune"]
    assert row["speedup"] == pytest.approx(min(row["dense_ms"].values()) / row["ms"]["lookup"])


def test_a_network_that_is_faster_dense_is_not_fitted(tmp_path, monkeypatch):
    times = iter([1.0] + [9.0] * 100)
    monkeypatch.setattr(Rehearsal, "milliseconds", lambda self, call, inputs: (call(inputs[0]), next(times))[1])
    monkeypatch.delattr(torch, "compile")
    run = worker(tmp_path)
    (row,) = run.measure(small("network")[0])
    assert (row["speedup"], row["ms"]) == (1.0, {})
    assert "no layer is faster" in run.budget.skipped[0]


def test_one_failing_job_costs_that_job_alone(tmp_path, monkeypatch):
    run = worker(tmp_path)
    good = small("layer", "b1 float32 contiguous")
    bad = Job("layer", "impossible", 5, {**good[0].arguments, "settings": 7})
    assert run.run([bad, *good], 0) == 0
    record = rows_of(run.log)
    assert [row["kind"] for row in record["rows"]] == ["layer"]
    assert "impossible: TypeError" in record["skipped"][0]
    assert "TypeError" in record["failures"][0]


def test_a_dead_gpu_ends_the_worker_and_too_little_time_skips(tmp_path, monkeypatch):
    run = worker(tmp_path)
    bad = Job("layer", "impossible", 5, {})
    monkeypatch.setattr(Rehearsal, "usable", lambda self: False)
    assert run.run([bad, bad], 0) == gpu_worker.DEAD
    assert [event["job"] for event in gpu_session.read(run.log) if event["event"] == "start"] == [0]
    late = worker(tmp_path, seconds=3)
    assert late.run([bad], 0) == 0
    assert gpu_session.read(run.log)[-1]["reasons"] == ["layer impossible: no time left"]


def test_ceilings_outlive_the_process_that_measured_them(tmp_path):
    first = worker(tmp_path)
    assert first.ceilings is gpu_worker.DATASHEET
    first.run(small("ceilings"), 0)
    assert worker(tmp_path).ceilings == Rehearsal().ceilings()


SCRIPT = """
import json, os, sys, time
log, first = sys.argv[1], int(sys.argv[2])
def write(event, job, **more):
    with open(log, "a") as file:
        file.write(json.dumps({"event": event, "job": job, **more}) + "\\n")
for job in range(first, 5):
    write("start", job, seconds=0.2)
    if job == 1:
        os._exit(9)
    if job == 3:
        time.sleep(60)
    write("rows", job, rows=[{"kind": "layer", "job": job}])
    write("done", job)
"""


def test_a_session_goes_on_after_crashes_and_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_session, "GRACE", 1.0)
    session = gpu_session.Session(tmp_path, 60, rehearse=True)
    session.jobs = session.jobs[:5]
    monkeypatch.setattr(session, "command", lambda first: [sys.executable, "-c", SCRIPT, str(session.log), str(first)])
    session.run()
    record = rows_of(session.log)
    assert [row["job"] for row in record["rows"]] == [0, 2, 4]
    assert "ended with code 9" in record["skipped"][0]
    assert "was ended after" in record["skipped"][1]


def test_a_session_whose_workers_never_begin_ends(tmp_path):
    session = gpu_session.Session(tmp_path, 60, rehearse=True)
    session.command = lambda first: [sys.executable, "-c", "raise SystemExit(4)"]
    session.run()
    assert ["did not begin" in reason for reason in rows_of(session.log)["skipped"]] == [True, True]


class FakeEvent:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def elapsed_time(self, end):
        return 12.0


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose every replay takes 12 ms."""
    properties = SimpleNamespace(
        name="mock", multi_processor_count=132, L2_cache_size=1 << 20, total_memory=1 << 30, clock_rate=1_000_000
    )
    graph = SimpleNamespace(replays=0)
    graph.replay = lambda: setattr(graph, "replays", graph.replays + 1)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "get_device_properties": lambda index: properties,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda s: nullcontext(),
        "synchronize": lambda: None,
        "CUDAGraph": lambda: graph,
        "graph": lambda g: nullcontext(),
        "Event": FakeEvent,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(Gpu, "device", "cpu")
    return SimpleNamespace(machine=Gpu(), graph=graph)


def test_inputs_exceed_the_cache_and_take_turns(gpu):
    inputs = gpu.machine.inputs((4, 64, 16, 16), torch.float16, torch.channels_last)
    assert len(inputs) == 16
    assert sum(x.numel() * 2 for x in inputs) >= 2 << 20
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in inputs)
    assert len({x.data_ptr() for x in inputs}) == 16
    assert len(gpu.machine.inputs((1, 8, 2, 2), torch.float16, torch.contiguous_format)) == gpu_machine.MOST_INPUTS


def test_time_is_the_median_replay_over_the_inputs(gpu):
    seen = []
    inputs = [torch.zeros(1) for _ in range(6)]
    assert gpu.machine.milliseconds(seen.append, inputs) == 2.0
    assert [id(x) for x in seen] == [id(x) for x in inputs[:2] * 2 + inputs]
    assert gpu.graph.replays == 1 + gpu_machine.REPLAYS


def test_choices_are_timed_without_launches_and_caches(gpu, monkeypatch):
    pytest.importorskip("triton")
    from lcnn_compile.kernels.triton import store as triton_store
    from lcnn_compile.kernels.triton import tune as triton_tune

    order = []
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"), raising=False)
    monkeypatch.setattr(FakeEvent, "synchronize", lambda self: None, raising=False)
    cpu = torch.device("cpu")
    assert triton_store.milliseconds(lambda: order.append("call"), cpu) == 12.0
    assert order == ["call"] + ["sleep", "call"] * (1 + triton_store.LONG)

    def fail(config):
        if config == "bad":
            raise RuntimeError("out of registers")

    assert triton_tune._fastest(["bad", "good"], fail, cpu) == "good"


def test_ceilings_and_description_of_a_gpu(gpu, monkeypatch):
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, device: randn(*[min(n, 64) for n in shape]))
    found = gpu.machine.ceilings()
    assert found["l1"] == 128 * 132 * 1e9
    assert found["tf32"] == pytest.approx(2 * 4096**3 / (6e-3))
    assert gpu.machine.usable()
    monkeypatch.setattr(gpu_machine.triton_ops, "_unusable", {"cuda:0": "no compiler"})
    assert not gpu.machine.usable()
    assert json.dumps(gpu.machine.describe())


def test_kernels_of_ours_are_summed():
    def event(key, microseconds):
        return SimpleNamespace(key=key, self_device_time_total=microseconds)

    events = [
        event("dictionary_kernel", 400.0),
        event("grouped_kernel", 800.0),
        event("cudnn", 9.0),
        event("permute_kernel", 4.0),
    ]
    assert gpu_machine.sum_kernels(events, 4) == {"dictionary": 0.1, "lookups": 0.2, "permute": 0.001}


def test_floors_are_counted():
    ceilings = {"copy": 1e12, "l2": 8e12, "l1": 1e13, "float32": 1e13, "tf32": 1e14, "float16": 1e15, "bfloat16": 1e15}
    found = gpu_floors.floors(Layer(256, 256, 56), Sizes(0.25, 192, 64), "float16", 64, ceilings)
    pixels = 64 * 56 * 56
    assert found["dictionary"].memory == 2 * 256 * pixels
    assert found["dictionary"].flop == 2 * 256 * 64 * pixels
    assert found["lookups"].l1 == 2 * pixels * (2 * 4 * 192 + 256)
    assert found["lookups"].l2 == 2 * pixels * (4 * 192 + 256)
    assert found["lookups"].flop == 2 * 256 * 192 * pixels
    assert found["lookups"].milliseconds == pytest.approx(1e3 * max(2 * 256 * pixels / 1e12, found["lookups"].l1 / 1e13))
    single = gpu_floors.floors(NARROW, NARROW_SIZES, "float32", 1, ceilings)["lookups"]
    assert single.l2 == 4 * 224**2 * 128
    assert (single.l1, single.bound) == (4 * 224**2 * 128 * 10, "memory")
    ratios = gpu_floors.over_floor({"dictionary": 1.0, "permute": 9.0}, 5.0, found)
    assert set(ratios) == {"dictionary", "call"}
    assert ratios["call"] == pytest.approx(5.0 / sum(floor.milliseconds for floor in found.values()))


def test_closing_table_judges_the_targets():
    def layer(name, mode, speedup, batch=64, over=None):
        row = {"kind": "layer", "layer": name, "mode": mode, "batch": batch, "ms": {"lookup": 1 / speedup}}
        return {
            **row,
            "dense_ms": {"eager": 1.0, "max-autotune": 1.25},
            "sizes": "g64/192",
            "format": "contiguous",
            "over_floor": over or {},
        }

    rows = [
        layer("256->256@56", "float16", 2.4), layer("256->256@56", "float16", 2.6), layer("256->256@56", "float16", 9.0, 8),
        {**layer("256->256@56", "float16", 9.0), "sizes": "g8/54"},
        {**layer("256->256@56", "float16", 1.0), "dense_ms": {"max-autotune": 0.5}, "sizes": "g16/144"},
        layer(NARROW.name, "float32", 3.9, 1, {"lookups": 1.5}),
        {"kind": "network", "network": "vgg16", "mode": "float16", "speedup": 2.1},
        {"kind": "check", "case": "bad one", "agrees": False},
    ]  # fmt: skip
    met = {verdict.name: (verdict.reached, verdict.met) for verdict in gpu_summary.verdicts(rows)}
    assert met["256->256@56 b64 float16"] == (pytest.approx(1.3), False), "the fastest dense result of all rows counts"
    assert met[f"{NARROW.name} b1 k=10 float32"] == (pytest.approx(3.9), False)
    assert met["vgg16 b64 float16"] == (2.1, True)
    assert met["resnet18 b64 float16"] == (None, None)
    assert met["lookups: time over floor, median"] == (1.5, True)
    console = Console(record=True, width=110)
    gpu_summary.show({"rows": rows, "skipped": ["layer x: [no] time"], "device": {}}, console)
    text = console.export_text()
    assert "1 wrong: bad one" in text
    assert "[no] time" in text
    assert len(text.splitlines()) < 40


def test_time_limit():
    with pytest.raises(TimeoutError), at_most(0.05):
        time.sleep(20)
    budget = Budget(time.time() + 10)
    budget.skip("a", ValueError("b\n c"))
    assert budget.skipped == ["a: ValueError: b c"]
    assert 9 < budget.left() <= 10


def test_modes_allow_tf32_alone():
    for mode, may in (("tf32", True), ("float32", False), ("float16", False)):
        assert set_mode(mode) == gpu_cases.MODES[mode]
        assert torch.backends.cudnn.allow_tf32 is may
        assert torch.backends.cuda.matmul.allow_tf32 is may


@pytest.mark.triton
def test_kernels_are_compiled_once_and_before(monkeypatch, tmp_path, capsys):
    pytest.importorskip("triton")
    from lcnn_compile.bench.gpu import compile as gpu_compile

    jobs = [layer_job(Layer(32, 64, 8), (Sizes(8, 20, 16),), "float16", format, 2, False) for format in gpu_cases.FORMATS]
    assert len(list(gpu_compile.calls(jobs))) == 2
    check = Job("check", "", 1, {"layer": Layer(32, 64, 8), "sizes": Sizes(8, 20, 16), "mode": "float16"})
    assert len(gpu_compile.distinct([check], 90)) == 4  # a launch of each direction in each format
    tasks = gpu_compile.distinct(jobs, 90)
    assert 8 <= len(tasks) <= 40
    assert gpu_compile.distinct(jobs + jobs, 90) == tasks
    monkeypatch.setattr(gpu_compile, "distinct", lambda jobs, capability: [tasks[0], (tasks[0][0], 10_000)])
    done, failures = gpu_compile.compile_ahead(jobs, (9, 0), 200, workers=1)
    assert done == 1
    assert len(failures) == 1
    assert "IndexError" in failures[0]
    assert "compiled 1 of 2 launches" in capsys.readouterr().out


@pytest.mark.triton
def test_wide_layers_of_a_network():
    from lcnn_compile.bench.gpu import compile as gpu_compile

    found = gpu_compile.wide_layers("resnet18")
    assert Layer(256, 512, 14, 2) in found
    assert len(found) == 7


def test_a_pair_as_chains(tmp_path):
    """The whole way on a CPU; what is wrong gets no time."""
    budget = Budget(time.time() + 300)
    [row] = gpu_whole.whole(Rehearsal(), budget, "pair 64@6", "float32", 2, ("eager", "frozen"))
    assert row["layers"] == 2
    assert set(row["dense_ms"]) == {"eager", "frozen"}
    assert row["speedup"] > 0
    assert row["error"] <= allowed("float32", row["dense_error"])
    assert not budget.skipped


def test_chains_are_checked_on_odd_shapes():
    rows = gpu_whole.check(Rehearsal(), "float32")
    assert len(rows) >= 5
    assert all(row["agrees"] for row in rows), rows


def test_wrong_chains_get_no_time(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: lambda x: model(x) + 1)
    with pytest.raises(ArithmeticError, match="no times"):
        gpu_whole.whole(Rehearsal(), Budget(time.time() + 300), "pair 64@6", "float32", 2, ("eager",))


def test_kernels_of_a_network_are_found_without_a_gpu():
    """Every kind of call once; the first reads S of a layer before it, its output is not written."""
    found = gpu_chains.calls("pair 64@12", 2, torch.float16)
    assert [(tuple(call.x.shape), call.shape[1], call.keep, call.next_channels) for call in found] == [
        ((2, 64, 12, 12), 16, True, 0),
        ((2, 16, 12, 12), 64, False, 16),
        ((2, 16, 12, 12), 64, True, 0),
    ]
    assert all(call.x.is_meta for call in found)
    launched = pytest.importorskip("lcnn_compile.kernels.triton.chain_tune").launches(found[1])
    assert len(launched) >= 4
