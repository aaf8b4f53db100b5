"""Peak resident memory of a network while it runs, dense and lookup, each in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from lcnn_compile.bench.cpu.engines import ENGINES
from lcnn_compile.bench.cpu.measure import LOOKUP_ENGINES
from lcnn_compile.bench.networks import build, example_input
from lcnn_compile.bench.settings import SETTINGS, lookup_network

CONFIGURATIONS = ("dense eager", "dense inductor", "ours lcnn", "paper-fast lcnn")


def _status(field: str) -> float:
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) / 1024 if found else float("nan")


def _settle() -> None:
    """Return freed memory to the system and start a new high-water mark (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


@torch.no_grad()
def peak(case: str) -> dict[str, float]:
    """MiB of "network setting engine": before there is a model, and at the peak of three warm calls on one image."""
    network, setting, engine = case.split(" ")
    example = example_input(1)
    _settle()
    before = _status("VmRSS")
    model = build(network)
    if setting != "dense":
        model = lookup_network(network, model, SETTINGS[setting])
    engines = ENGINES if setting == "dense" else LOOKUP_ENGINES
    with TemporaryDirectory() as folder:
        runnable = engines[engine].prepare(model, example, Path(folder))
    runnable.call()
    _settle()
    for _ in range(3):
        runnable.call()
    return {"before": before, "running": _status("VmHWM")}
