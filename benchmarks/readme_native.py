"""The tables of ``benchmarks/native.py``: what an exported network costs to serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "native.json"
PROCESSES = {
    "C, int8": "C, `liblcnn.so`, eight bits",
    "C, float32": "C, `liblcnn.so`, float32",
    "Python, int8": "Python, `lcnn_native.py`, eight bits",
    "Python, float32": "Python, `lcnn_native.py`, float32",
    "Python, ONNX Runtime int8": "Python, ONNX Runtime, eight bits (the dense network)",
}
FILES = {"int8": "model.lcnn, int8", "float32": "model.lcnn, float32"}


def results() -> dict[str, Any]:
    """The last run."""
    found: dict[str, Any] = json.loads(RESULTS.read_text())
    return found


def processes() -> str:
    """Start to first result, and peak of memory, for each way to serve."""
    found = results()
    lines = ["| process | start to first result | peak memory | model file |", "| --- | ---: | ---: | ---: |"]
    for name, shown in PROCESSES.items():
        row = found["start to first result"][name]
        file = found["files MiB"]["ONNX, int8" if "ONNX" in name else FILES[name.partition(", ")[2]]]
        lines.append(f"| {shown} | {row['milliseconds']:.0f} ms | {row['peak MiB']:.0f} MiB | {file:.1f} MiB |")
    return "\n".join(lines) + "\n"


def shared() -> str:
    """What two processes share, and what many threads of one do."""
    found = results()
    model = found["two processes, float32, MiB"]
    calls = found["calls per second, int8"]
    one, several = calls["one thread"], next(value for name, value in calls.items() if name != "one thread")
    cores, kind = found["hardware"]["cores"], found["hardware"]["cpu"]
    return (
        f"Two processes that serve the float32 model have its {model['model resident']:.1f} MiB once in memory: each is charged "
        f"{model['model proportional']:.1f} (PSS). Eight threads on one model make {several / one:.2f} times the calls of one thread on {cores} cores.\n"
        f"ResNet-18, one image of 224², k = m/4, 54 taps, g = 8, random weights; {kind}, kernels `{found['instruction set']}`, one thread for a call; "
        "medians of processes that take turns; `python benchmarks/native.py`.\n"
    )


TABLES = {"native": processes, "native-shared": shared}
