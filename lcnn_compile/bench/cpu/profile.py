"""Where the time of a compiled lookup network goes, and what part of it is not arithmetic."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lcnn_compile.bench.cpu.measure import LOOKUP_ENGINES
from lcnn_compile.bench.networks import build, example_input
from lcnn_compile.bench.settings import SETTINGS, lookup_network
from lcnn_compile.torch_private import profiled_kernels

CALLS = 20
# The first kind whose word occurs in an operator's name; generated kernels carry the names of what was fused into them.
KINDS = (
    ("lookup layers", ("lcnn::",)),
    ("generated kernels: pooling, elementwise, copies", ("cpp_fused",)),
    ("dense convolutions", ("conv",)),
    ("dense fully connected layers", ("mm", "linear")),
    ("memory", ("empty", "copy_", "clone", "resize_", "as_strided", "view", "detach", "contiguous")),
)
OTHER = "dispatch: guards, wrappers, Python"


def kind_of(name: str) -> str:
    """The kind of an operator or event."""
    return next((kind for kind, words in KINDS if any(word in name for word in words)), OTHER)


@torch.no_grad()
def run(case: str, batch: int) -> dict[str, Any]:
    """Milliseconds per call of "network setting", by kind and by operator and shape; the profiler's own cost included."""
    network, setting = case.split(" ")
    torch.manual_seed(0)
    model, example = lookup_network(network, build(network), SETTINGS[setting]), example_input(batch)
    with profiled_kernels(), TemporaryDirectory() as folder:
        call = LOOKUP_ENGINES["lcnn"].prepare(model, example, Path(folder)).call
        call()
    for _ in range(3):
        call()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    seconds = (time.perf_counter() - start) / CALLS
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        for _ in range(CALLS):
            call()
    kinds: dict[str, float] = {}
    operators = []
    for event in profiler.key_averages(group_by_input_shape=True):
        spent = event.self_cpu_time_total / CALLS / 1e3
        kinds[kind_of(event.key)] = kinds.get(kind_of(event.key), 0.0) + spent
        operators.append({"name": event.key, "shapes": str(event.input_shapes)[:120], "calls": event.count // CALLS, "ms": spent})
    operators.sort(key=lambda row: -row["ms"])
    return {"case": case, "batch": batch, "ms": seconds * 1e3, "kinds": kinds, "operators": operators[:40]}


def show_profile(result: dict[str, Any], console: Console) -> None:
    """Print both tables."""
    total = sum(result["kinds"].values())
    table = Table(title=f"{result['case']}, batch {result['batch']}: {result['ms']:.2f} ms, {total:.2f} under the profiler")
    table.add_column("kind")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    for kind, spent in sorted(result["kinds"].items(), key=lambda item: -item[1]):
        table.add_row(kind, f"{spent:.3f}", f"{spent / total:.0%}")
    console.print(table)
    table = Table()
    for heading in ("operator", "shapes"):
        table.add_column(heading, max_width=70, no_wrap=True)
    for heading in ("calls", "ms"):
        table.add_column(heading, justify="right")
    for row in result["operators"][:20]:
        table.add_row(row["name"], row["shapes"], str(row["calls"]), f"{row['ms']:.3f}")
    console.print(table)
