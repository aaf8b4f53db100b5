"""Measured choices on disk: one JSON file per device, Triton and version of these kernels, in LCNN_CACHE_DIR or the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from filelock import FileLock
from platformdirs import user_cache_dir


def may_measure(device: torch.device) -> bool:
    """Whether a measurement is possible now: on a GPU, no graph being captured, and LCNN_TUNE not 0."""
    return device.type == "cuda" and os.environ.get("LCNN_TUNE") != "0" and not torch.cuda.is_current_stream_capturing()


@cache
def _digest() -> str:
    sources = sorted(Path(__file__).parent.glob("triton_*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]


def store_of(device: torch.device) -> Path:
    """The file for this device."""
    folder = Path(os.environ.get("LCNN_CACHE_DIR") or user_cache_dir("lcnn_compile", appauthor=False))
    name = f"{torch.cuda.get_device_name(device)}-triton-{triton.__version__}"
    return folder / "triton" / f"{''.join(c if c.isalnum() else '-' for c in name)}-{_digest()}.json"


@cache
def known(path: Path) -> dict[str, Any]:
    """The choices on disk; an unreadable file counts as empty."""
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def remember(path: Path, key: str, choice: Any) -> None:
    """Add one choice to the file, whole or not at all; a folder that cannot be written is not worth failing for."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"), tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            known.cache_clear()
            json.dump({**known(path), key: choice}, file)
            file.flush()
            os.replace(file.name, path)
    except OSError:
        return
    known.cache_clear()
