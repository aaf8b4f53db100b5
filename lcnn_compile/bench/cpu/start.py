"""Start-up: the seconds before the first result."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from lcnn_compile.bench.cpu.engines import ENGINES
from lcnn_compile.bench.cpu.layers import OURS, TARGETS, LayerShape, layer_case
from lcnn_compile.bench.cpu.measure import LOOKUP_ENGINES
from lcnn_compile.bench.networks import build, example_input
from lcnn_compile.bench.settings import SETTINGS, lookup_network

CASES = ("kernel", "resnet18 lcnn", "resnet18 inductor")


@torch.no_grad()
def first_call(case: str) -> dict[str, float]:
    """Seconds of the first and the second call in this process: of one small lookup layer, or "network engine"."""
    if case == "kernel":
        shape = LayerShape(64, 64, 56)
        layer = layer_case(shape, {OURS: TARGETS[shape][OURS]})
        model, example, engine = layer.lookups[OURS], layer.example, LOOKUP_ENGINES["lcnn eager"]
    else:
        network, name = case.split(" ")
        model, example, engine = build(network), example_input(1), {**ENGINES, **LOOKUP_ENGINES}[name]
        if name in LOOKUP_ENGINES:
            model = lookup_network(network, model, SETTINGS["ours"])
    with TemporaryDirectory() as folder:
        start = time.perf_counter()
        runnable = engine.prepare(model, example, Path(folder))
        runnable.call()
        first = time.perf_counter() - start
    start = time.perf_counter()
    runnable.call()
    return {"first": first, "second": time.perf_counter() - start}
