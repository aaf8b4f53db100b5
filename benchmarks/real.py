"""Real pretrained networks, converted without labels and measured on other data: benchmarks/results/real.json, and its table in docs/real.md.

    python benchmarks/real.py                 # everything that is not in the results yet
    python benchmarks/real.py pitch --again   # some networks anew
    python benchmarks/real.py --table         # only the table

Every way runs in a process of its own, whose peak memory is noted; times are ratios of the fastest of many short bursts in turns, one thread.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from real_cases import CASES
from real_data import run
from real_models import STORE
from real_ways import CONVERSIONS, ENGINES, engine, load_converted
from torch import Tensor

from lcnn_compile.fitting.output_error import Reference

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "real.json"
BURSTS, CALLS = 12, 2


def results() -> dict[str, dict[str, dict[str, object]]]:
    """What was measured so far: case, way, figures."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def record(case: str, way: str, figures: dict[str, object]) -> None:
    """Add figures of one way."""
    found = results()
    found.setdefault(case, {}).setdefault(way, {}).update(figures)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def measure_one(name: str, way: str) -> None:
    """Convert in this process, keep the result, and note metric, multiply-adds, seconds of processor time, memory."""
    case = CASES[name]
    model, started, clock = case.build(), time.process_time(), time.perf_counter()
    figures: dict[str, object] = {}
    if way == "dense":
        calls: Callable[[Tensor], Tensor] = model
    elif way in CONVERSIONS:
        made = CONVERSIONS[way](model, case, STORE / f"{name}-{way}.safetensors")
        before, after = made.lcnn_report.macs()
        figures = {"fewer": before / max(1, after), "replaced": len(made.lcnn_report.replaced), "layers": len(made.lcnn_report)}
        if made.lcnn_report.output_error is not None:
            figures["output_error"] = made.lcnn_report.output_error.worst
        figures["remarks"] = list(made.lcnn_report.remarks)
        calls = made
    else:
        calls = engine(way, model, case)
    figures["seconds"] = round(time.process_time() - started, 1)
    figures["wall"] = round(time.perf_counter() - clock, 1)
    figures["gigabytes"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    step = case.example().shape[0] if way not in CONVERSIONS and way != "dense" else 8
    seen: list[Tensor] = []

    def answer(x: Tensor) -> Tensor:
        seen.append(run(calls, x, step))
        return seen[-1]

    figures["metric"] = case.evaluate(answer)
    # How far the outputs on the test data are from the dense network's: the same measure as max_output_error's.
    file = STORE / f"{name}-outputs.pt"
    if way == "dense":
        torch.save(seen, file)
    elif file.exists():
        figures["test_error"] = Reference([torch.load(file)]).measure([seen]).worst
    record(name, way, figures)


def measure_times(name: str) -> None:
    """Time every way that was converted, in turns, and note how much faster than dense with Inductor each is."""
    case = CASES[name]
    x, model = case.example(), case.build()
    known = results()[name]
    runners: dict[str, Callable[[Tensor], object]] = {"inductor": torch.compile(model)}
    for way in known:
        if way in CONVERSIONS:
            runners[way] = load_converted(case, x, STORE / f"{name}-{way}.safetensors")
        elif way in ENGINES:
            runners[way] = engine(way, case.build(), case)
    seconds: dict[str, list[float]] = {way: [] for way in runners}
    with torch.no_grad():
        for call in runners.values():
            for _ in range(3):
                call(x)
        for _ in range(BURSTS):
            for way, call in runners.items():
                call(x)
                start = time.perf_counter()
                for _ in range(CALLS):
                    call(x)
                seconds[way].append((time.perf_counter() - start) / CALLS)
    for way, found in seconds.items():
        if way != "inductor":
            pairs = [a / b for a, b in zip(seconds["inductor"], found, strict=True)]
            record(name, way, {"faster": min(seconds["inductor"]) / min(found), "faster_pairs": statistics.median(pairs)})


def table() -> str:
    """The results as Markdown: one table per network."""
    parts = []
    for name, ways in results().items():
        parts.append(f"### {name}: {CASES[name].metric}\n")
        parts.append("| way | metric | fewer multiply-adds | faster than Inductor | conversion | memory | error of the outputs |")
        parts.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for way in ["dense", *CONVERSIONS, *ENGINES]:
            if (f := ways.get(way)) is None:
                continue
            cells = [f"{f['metric']:.2f}" if "metric" in f else "failed"]
            cells.append(f"{f['fewer']:.2f}x" if "fewer" in f else "")
            cells.append(f"{f['faster']:.2f}x" if "faster" in f else "")
            cells.append(f"{f['seconds']:.0f} s" if way != "dense" and "seconds" in f else "")
            cells.append(f"{f['gigabytes']:.1f} GB" if way != "dense" and "gigabytes" in f else "")
            cells.append(f"{f['test_error']:.1g}" if "test_error" in f else "")
            parts.append(f"| {way} | " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help=f"of {list(CASES)}")
    parser.add_argument("--ways", nargs="*", default=["dense", *CONVERSIONS, *ENGINES])
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--one", action="store_true", help="in this process: one case, one way")
    parser.add_argument("--time", action="store_true", help="only times")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if given.one:
        measure_one(given.cases[0], given.ways[0])
    elif given.time:
        for name in given.cases or list(results()):
            measure_times(name)
    elif not given.table:
        for name in given.cases or list(CASES):
            for way in given.ways:
                if way in results().get(name, {}) and not given.again:
                    continue
                command = [sys.executable, __file__, name, "--ways", way, "--one"]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    record(name, way, {"failed": (done.stderr.strip().splitlines() or ["no word"])[-1][:300]})
                print(name, way, results()[name][way], flush=True)
    else:
        page = HERE.parent / "docs" / "real.md"
        head, _, rest = page.read_text().partition("<!-- measured: real -->\n")
        page.write_text(f"{head}<!-- measured: real -->\n{table()}<!-- end -->{rest.partition('<!-- end -->')[2]}")


if __name__ == "__main__":
    main()
