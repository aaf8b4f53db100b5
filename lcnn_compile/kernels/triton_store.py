"""Where measured choices of a GPU are kept: one file per device, Triton and version of these kernels; and when to measure."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path

import torch
import triton

from lcnn_compile.kernels.store import cache_folder


def may_measure(device: torch.device) -> bool:
    """Whether a measurement is possible now: on a GPU, no graph being captured, and LCNN_TUNE not 0."""
    return device.type == "cuda" and os.environ.get("LCNN_TUNE") != "0" and not torch.cuda.is_current_stream_capturing()


@cache
def _digest() -> str:
    sources = sorted(Path(__file__).parent.glob("triton_*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]


def store_of(device: torch.device) -> Path:
    """The file for this device."""
    name = f"{torch.cuda.get_device_name(device)}-triton-{triton.__version__}"
    return cache_folder() / "triton" / f"{''.join(c if c.isalnum() else '-' for c in name)}-{_digest()}.json"
