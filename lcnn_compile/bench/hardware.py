"""What a measurement has to be read with: processor, caches, memory, versions, threads."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "lcnn-compile", "numpy", "onnx", "onnxruntime", "openvino", "nncf")
INTERESTING_FLAGS = re.compile(r"^(avx|fma|f16c|sse4|amx|neon|asimd|sve|i8mm|bf16)")


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _field(name: str) -> str:
    found = re.search(rf"^{name}\s*:\s*(.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return found.group(1).strip() if found else ""


def _caches() -> dict[str, str]:
    caches = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(str(folder / name)).strip() for name in ("level", "type", "size"))
        caches[f"L{level}{'' if kind == 'Unified' else kind[0].lower()}"] = size
    return caches


def describe() -> dict[str, Any]:
    """Hardware and versions, plain JSON; nothing that identifies the machine or its user."""
    memory = re.search(r"MemTotal:\s*(\d+)", _read("/proc/meminfo"))
    flags = (_field("flags") or _field("Features")).split()
    return {
        "cpu": _field("model name") or platform.processor() or platform.machine(),
        "family": _field("cpu family"),
        "model": _field("model"),
        "flags": sorted(flag for flag in flags if INTERESTING_FLAGS.match(flag)),
        "caches": _caches(),
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory.group(1)) / 2**20, 1) if memory else None,
        "system": f"{platform.system()} {platform.machine()}",
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def versions() -> dict[str, str]:
    """Python and the packages that matter; "missing" where one is not installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found
