"""Never slower: a frozen model against what PyTorch's own engines make of its dense form, measured once and remembered."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from lcnn_compile.export.engines import ENGINES
from lcnn_compile.files import digest
from lcnn_compile.kernels.measured import facts_file
from lcnn_compile.kernels.store import known, remember
from lcnn_compile.timing import alternate

FAR = 2.5
"""Where eager PyTorch takes so many times as long in its default format, no engine of its own comes near: none was seen to be twice as fast as eager."""
NEAR = 2.0
"""The same for the better one of both formats."""
SECONDS = 2.0
"""Of timing, about, where it is close."""
MARGIN = 0.97
"""A rival wins where it takes less than this share of our time: the two times differ by so much from run to run."""


class Rival(NamedTuple):
    """An engine that is faster on the dense form.

    Attributes:
        engine: a key of ``ENGINES``.
        seconds: per call.
        ours: seconds of the lookups.
    """

    engine: str
    seconds: float
    ours: float

    def __str__(self) -> str:
        return (
            f"kept dense: {self.engine} takes {self.seconds * 1e3:.2f} ms a call here, lookups {self.ours * 1e3:.2f} ms; "
            'a lowering other than "auto" keeps the lookups'
        )


def faster_rival(
    run: Callable[..., Any], graph: fx.GraphModule, dense: Callable[[], fx.GraphModule], inputs: Sequence[Tensor]
) -> Rival | None:
    """The fastest engine of PyTorch's own, where it beats ``run`` on the dense form by more than times scatter; else None.

    Compiles the dense form only where eager PyTorch comes near. LCNN_TUNE=0 turns it off.

    Args:
        run: calls the model as it stands.
        graph: of that; its text and the inputs' shapes are what the result is remembered by.
        dense: makes the dense form, a graph with its weights that writes nothing.
        inputs: of both.
    """
    if os.environ.get("LCNN_TUNE") == "0" or any(not x.is_cpu for x in inputs):
        return None
    shapes = [(tuple(x.shape), x.stride(), str(x.dtype)) for x in inputs]
    sizes = [(name, tuple(t.shape)) for name, t in graph.named_buffers()]
    key = "whole " + digest((str(graph.graph), str(shapes), str(sizes), str(torch.get_num_threads())), [])
    found = known(facts_file()).get(key)
    if found is None:
        with torch.no_grad():
            found = _measured(run, dense, list(inputs))
        remember(facts_file(), key, found)
    ours, others = found["ours"], {name: seconds for name, seconds in found.items() if name in ENGINES}
    name = min(others, key=lambda engine: others[engine], default="")
    return Rival(name, found[name], ours) if name and others[name] < MARGIN * ours else None


def _once(call: Callable[[], object], calls: int) -> float:
    call()
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _measured(run: Callable[..., Any], dense: Callable[[], fx.GraphModule], inputs: list[Tensor]) -> dict[str, float]:
    """Seconds of "ours" and of the engines that come near."""
    graph = dense()
    ours = _once(lambda: run(*inputs), 3)
    eager = {name: ENGINES[name](graph) for name in ("eager", "eager, channels_last")}
    best = _once(lambda: eager["eager"](*inputs), 2)
    if best > FAR * ours:
        return {"ours": ours}
    best = min(best, _once(lambda: eager["eager, channels_last"](*inputs), 2))
    if best > NEAR * ours:
        return {"ours": ours}
    engines = {**eager, **{name: make(graph) for name, make in ENGINES.items() if name not in eager}}
    calls = {name: (lambda engine=engine: engine(*inputs)) for name, engine in engines.items()}
    timings = alternate({"ours": lambda: run(*inputs), **calls}, SECONDS, (3, 25))
    return {name: timing.median for name, timing in timings.items()}
