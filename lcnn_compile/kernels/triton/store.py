"""Measuring on a GPU: when it is possible, how it is done, and where the results are kept: one file per device, Triton and
version of these kernels."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import triton

from lcnn_compile.files import digest
from lcnn_compile.kernels.store import cache_folder
from lcnn_compile.torch_private import occupy_gpu

AHEAD = 2_000_000
"""Clock cycles that a GPU idles before a timed call, a millisecond: launches are all queued by then, so that the time
of the kernels counts and not that of the interpreter that launches them."""
SHORT, LONG = 15, 5
"""Repetitions of calls below a millisecond, and of others."""


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Median time that a call's kernels take, each time with nothing of its own left in the second-level cache."""
    sweep = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)
    call()

    def once() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        sweep.zero_()
        occupy_gpu(AHEAD)
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    first = once()
    return statistics.median(once() for _ in range(SHORT if first < 1 else LONG))


def may_measure(device: torch.device) -> bool:
    """Whether a measurement is possible now: on a GPU, no graph being captured, and LCNN_TUNE not 0."""
    return device.type == "cuda" and os.environ.get("LCNN_TUNE") != "0" and not torch.cuda.is_current_stream_capturing()


@cache
def _digest() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return digest((), sources)


def store_of(device: torch.device) -> Path:
    """The file for this device."""
    name = f"{torch.cuda.get_device_name(device)}-triton-{triton.__version__}"
    return cache_folder() / "triton" / f"{''.join(c if c.isalnum() else '-' for c in name)}-{_digest()}.json"
