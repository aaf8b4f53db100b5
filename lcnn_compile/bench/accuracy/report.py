"""Times of finished cases, all in one run, and the table and plots of the accuracy benchmark."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lcnn_compile.bench.accuracy.cases import CASES, Case
from lcnn_compile.bench.accuracy.data import standardise, top1
from lcnn_compile.bench.accuracy.study import LOOKUPS, Study
from lcnn_compile.bench.cpu.engines import ENGINES, Runnable
from lcnn_compile.bench.cpu.measure import LOOKUP_ENGINES, rounding
from lcnn_compile.bench.cpu.report import milliseconds
from lcnn_compile.modules import lookup_modules
from lcnn_compile.timing import alternate

DENSE_ENGINES = ("inductor", "openvino")
ROUNDED = "-bfloat16"
"""Behind the name of a case: its network with lookups that round."""


@torch.no_grad()
def measure_times(study: Study, threads: int, batch: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Seconds per call of every finished case, in turns, each on its fastest engine: lookups compiled or frozen by us.

    Pruned networks run as dense ones: no engine here gains from scattered zeros.
    """
    torch.set_num_threads(threads)
    example = standardise(study.images.test[:batch]).contiguous()
    calls: dict[str, Runnable] = {}
    for case in CASES.values():
        if study.result(case) is None:
            continue
        folder = study.work / "engines" / case.name
        folder.mkdir(parents=True, exist_ok=True)
        torch.compiler.reset()
        if case.method in LOOKUPS:
            for engine in (LOOKUP_ENGINES["lcnn"], LOOKUP_ENGINES["lcnn frozen"]):
                calls[f"{case.name}|{engine.name}"] = engine.prepare(study.load(case), example, folder)
            rounded = LOOKUP_ENGINES["lcnn bf16"]
            calls[f"{case.name}{ROUNDED}|{rounded.name}"] = rounded.prepare(study.load(case), example, folder)
        elif case.method in ("int8", "bfloat16"):
            engine = ENGINES["openvino int8" if case.method == "int8" else "openvino bf16"]
            source = study.work / case.name if case.method == "int8" else folder
            calls[f"{case.name}|{engine.name}"] = engine.prepare(study.dense(), example, source)
        else:
            for engine in (ENGINES[name] for name in DENSE_ENGINES):
                if not engine.missing():
                    calls[f"{case.name}|{engine.name}"] = engine.prepare(study.load(case), example, folder)
    for runnable in calls.values():
        runnable.call()
    times: dict[str, dict[str, Any]] = {}
    for key, timing in alternate({key: runnable.call for key, runnable in calls.items()}, seconds).items():
        name, _, used = key.partition("|")
        entry = {"engine": used, "seconds": timing.median, "low": timing.low, "high": timing.high, "bursts": timing.bursts}
        if name not in times or entry["seconds"] < times[name]["seconds"]:
            times[name] = entry
    for name, entry in times.items():
        if name.endswith(ROUNDED):
            entry["top1"] = _rounded_top1(study, CASES[name.removesuffix(ROUNDED)])
    return times


def _rounded_top1(study: Study, case: Case) -> float:
    """Top-1 of a network with lookups whose kernels round to bfloat16."""
    model = rounding(study.load(case))
    for _, module in lookup_modules(model):
        module.lowering = "lookup"
    return top1(model, study.images)


def rows(study: Study, times: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every finished case with its loss of top-1, its reduction of multiply-adds and its time."""
    found = [(case, result) for case in CASES.values() if (result := study.result(case)) is not None]
    dense = next((result for case, result in found if case.name == "dense"), None)
    for case, result in list(found):
        spent = times.get(case.name + ROUNDED)
        if spent is not None:
            rounded = {**result, "case": case.name + ROUNDED, "precision": "bfloat16", "top1": spent["top1"]}
            found.append((case, rounded))
    return [
        {
            **result,
            "loss": None if dense is None else dense["top1"] - result["top1"],
            "reduction": None if dense is None else dense["macs"] / result["macs"],
            "time": times.get(result["case"]),
        }
        for case, result in found
    ]


def show(table_rows: list[dict[str, Any]], console: Console) -> None:
    """Print the table."""
    table = Table(title="CIFAR-10, top-1 on 10,000 test images")
    for heading in ("case", "top-1 %", "loss", "multiply-adds", "fewer", "ms", "speed-up", "engine"):
        table.add_column(heading, justify="left" if heading in ("case", "engine") else "right")
    base = next((row["time"] for row in table_rows if row["case"] == "dense"), None)
    for row in table_rows:
        spent, loss = row["time"], row["loss"]
        faster = f"{base['seconds'] / spent['seconds']:.2f}x" if base and spent else "–"
        table.add_row(
            row["case"],
            f"{row['top1']:.2f}",
            "–" if loss is None else f"{loss:.2f}",
            f"{row['macs'] / 1e6:.2f} M",
            "–" if row["reduction"] is None else f"{row['reduction']:.2f}x",
            milliseconds(spent["seconds"] if spent else None),
            faster,
            spent["engine"] if spent else "–",
        )
    console.print(table)


KINDS = {
    "lookups": ("lookups, post-training", "tab:blue", "o"),
    "lookups tuned": ("lookups, fine-tuned", "tab:green", "D"),
    "rounded": ("lookups, bfloat16", "tab:blue", "x"),
    "uniform lookups": ("lookups, uniform sizes", "tab:cyan", "o"),
    "scratch": ("lookups, from scratch", "tab:olive", "D"),
    "low rank": ("low rank", "tab:orange", "s"),
    "low rank tuned": ("low rank, fine-tuned", "tab:red", "s"),
    "pruned": ("pruned", "tab:gray", "^"),
    "pruned tuned": ("pruned, fine-tuned", "black", "^"),
    "int8": ("OpenVINO int8", "tab:purple", "*"),
    "bfloat16": ("OpenVINO bfloat16", "tab:pink", "*"),
    "dense": ("dense", "tab:brown", "P"),
    "dense tuned": ("dense, fine-tuned", "tab:brown", "X"),
}


def _kind(row: dict[str, Any]) -> str:
    """The key of KINDS that a case belongs to."""
    if row.get("precision") == "bfloat16":
        return "rounded"
    return f"{row['method']}{' tuned' if row['epochs'] and row['method'] != 'scratch' else ''}"


def plot(table_rows: list[dict[str, Any]], file: Path) -> bool:
    """Top-1 over multiply-adds and, where there are times, over time; False where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    timed = any(row["time"] for row in table_rows)
    figure = Figure(figsize=(12 if timed else 7, 4.8), layout="constrained")
    axes = figure.subplots(1, 2 if timed else 1, squeeze=False)[0]
    for place, axis in enumerate(axes):
        for kind, (label, colour, marker) in KINDS.items():
            mine = [r for r in table_rows if _kind(r) == kind]
            mine = [r for r in mine if (r["time"] if place else r["method"] not in ("int8", "bfloat16"))]
            values = [r["time"]["seconds"] * 1e3 if place else r["macs"] / 1e6 for r in mine]
            if values:
                axis.scatter(values, [r["top1"] for r in mine], label=label, c=colour, marker=marker, s=36)
        axis.set_xscale("log")
        axis.set_xlabel("milliseconds" if place else "million multiply-adds")
        axis.set_ylabel("top-1, %")
        axis.grid(True, which="both", alpha=0.25)
    axes[0].legend(fontsize=8, loc="lower right")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    return True
