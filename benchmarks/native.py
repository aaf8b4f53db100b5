"""What an exported ResNet-18 costs to serve: start to first result, memory, shared pages, threads; beside ONNX Runtime in eight bits.

    python benchmarks/native.py            # writes benchmarks/results/native.json

Every process is started anew, with its files in the page cache. Python's processes import numpy and the engine, nothing else. No time is
reported where the result differs from that of the frozen model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lcnn_compile import freeze
from lcnn_compile.bench.cpu.measure import in_bytes
from lcnn_compile.bench.hardware import describe, versions
from lcnn_compile.bench.networks import build, example_input
from lcnn_compile.bench.settings import SETTINGS, lookup_network
from lcnn_compile.export import export_native
from lcnn_compile.kernels.cpu.build import instruction_set

RESULTS = Path(__file__).parent / "results" / "native.json"
RUNS, CALLS = 11, 40
SERVE = """
import sys, numpy as np
from lcnn_native import Model
model = Model(sys.argv[1])
x = np.fromfile(sys.argv[2], np.float32).reshape(-1, *model.inputs[0].shape[1:])
model(x)[0].tofile(sys.argv[3])
"""
ONNX = """
import sys, numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
x = np.fromfile(sys.argv[2], np.float32).reshape(-1, *session.get_inputs()[0].shape[1:])
session.run(None, {session.get_inputs()[0].name: x})[0].tofile(sys.argv[3])
"""
WAIT = "print('ready', flush=True); sys.stdin.read()"


LAUNCH = """
import json, os, subprocess, sys, time
for line in sys.stdin:
    command, folder = json.loads(line)
    start = time.perf_counter()
    child = subprocess.Popen(command, cwd=folder)
    _, status, usage = os.wait4(child.pid, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), 1e3 * (time.perf_counter() - start), usage.ru_maxrss / 1024]), flush=True)
"""


class Launcher:
    """A small process that starts others: the peak of memory that the system states includes that of the process it was forked from."""

    def __init__(self) -> None:
        command = [sys.executable, "-S", "-c", LAUNCH]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, command: Sequence[str], folder: Path) -> dict[str, float]:
        """Milliseconds from start to end, and the peak of resident memory in MiB."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([list(command), str(folder)]) + "\n")
        self._process.stdin.flush()
        code, milliseconds, peak = json.loads(self._process.stdout.readline())
        if code:
            raise RuntimeError(f"{command[0]} failed")
        return {"milliseconds": milliseconds, "peak MiB": peak}

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def in_turns(commands: dict[str, Sequence[str]], folder: Path, wanted: dict[str, np.ndarray[Any, Any] | None]) -> dict[str, Any]:
    """Medians of processes that take turns; the first run of each is not counted."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    process = Launcher()
    for run in range(RUNS + 1):
        for name, command in commands.items():
            found = process(command, folder)
            result = np.fromfile(folder / "y.bin", np.float32)
            expected = wanted[name]
            if expected is not None and not np.array_equal(result, expected.reshape(-1)):
                raise RuntimeError(f"{name} gives another result than the frozen model")
            if run:
                rows[name].append(found)
    process.close()
    return {name: {key: statistics.median(row[key] for row in found) for key in found[0]} for name, found in rows.items()}


def lookups(precision: str, x: torch.Tensor) -> nn.Module:
    """ResNet-18 with lookups of random weights; in eight bits the layers that stay dense are so too."""
    torch.manual_seed(0)
    model = lookup_network("resnet18", build("resnet18"), SETTINGS["ours"]).eval()
    return in_bytes(model, x) if precision == "int8" else model


def onnx_int8(folder: Path, x: torch.Tensor) -> Path:
    """The dense network, quantized statically by ONNX Runtime."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([{"x": x.numpy()}, {"x": torch.randn_like(x).numpy()}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    dense, made = folder / "dense.onnx", folder / "int8.onnx"
    torch.onnx.export(build("resnet18"), (x,), str(dense), input_names=["x"], dynamo=True, external_data=False)
    quantize_static(str(dense), str(made), Reader(), per_channel=True)
    return made


def shared(folder: Path, python: Sequence[str]) -> dict[str, float]:
    """Of two processes that serve one model: resident and proportional MiB of the model file's pages, and of all, in one of them."""
    children = [subprocess.Popen(python, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()
        found = {"model resident": 0.0, "model proportional": 0.0, "all proportional": 0.0}
        inside = False
        for line in Path(f"/proc/{children[0].pid}/smaps").read_text().splitlines():
            words = line.split()
            if words[0].endswith(":"):
                if words[0] == "Pss:":
                    found["all proportional"] += int(words[1]) / 1024
                if inside and words[0] in ("Rss:", "Pss:"):
                    found["model resident" if words[0] == "Rss:" else "model proportional"] += int(words[1]) / 1024
            else:
                inside = line.endswith("model.lcnn")
        return found
    finally:
        for child in children:
            child.communicate("")


def throughput(folder: Path, x: torch.Tensor, threads: int = 8) -> dict[str, float]:
    """Calls per second on one model: by one thread, and by several at once, in turns."""
    sys.path.insert(0, str(folder))
    from lcnn_native import Model

    found: dict[str, list[float]] = {"one thread": [], f"{threads} threads": []}
    with Model(folder / "model.lcnn") as model:
        array = x.numpy()

        def work(count: int) -> None:
            for _ in range(count):
                model(array)

        for _ in range(5):
            start = time.perf_counter()
            work(CALLS)
            found["one thread"].append(CALLS / (time.perf_counter() - start))
            workers = [threading.Thread(target=work, args=(CALLS // threads,)) for _ in range(threads)]
            start = time.perf_counter()
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            found[f"{threads} threads"].append(CALLS // threads * threads / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    """Export, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    x = example_input(1)
    result: dict[str, Any] = {"hardware": describe(), "versions": versions(), "instruction set": instruction_set(), "threads": 1}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        x.numpy().tofile(folder / "x.bin")
        (folder / "serve.py").write_text(SERVE)
        (folder / "onnx_run.py").write_text(ONNX)
        (folder / "wait.py").write_text(SERVE + WAIT)
        commands: dict[str, Sequence[str]] = {}
        wanted: dict[str, np.ndarray[Any, Any] | None] = {}
        sizes = {}
        for precision in ("int8", "float32"):
            model = lookups(precision, x)
            made = folder / precision
            export_native(model, made, x)
            sizes[f"model.lcnn, {precision}"] = (made / "model.lcnn").stat().st_size / 2**20
            subprocess.run(
                ["cc", "-O2", "example.c", "-o", "example", "-L.", "-llcnn", "-Wl,-rpath,$ORIGIN"], cwd=made, check=True
            )
            expected = freeze(model, x)(x).numpy()
            commands[f"C, {precision}"] = [str(made / "example"), str(made / "model.lcnn"), "x.bin", "y.bin"]
            commands[f"Python, {precision}"] = [sys.executable, "serve.py", str(made / "model.lcnn"), "x.bin", "y.bin"]
            wanted |= {f"C, {precision}": expected, f"Python, {precision}": expected}
        os.environ["PYTHONPATH"] = str(folder / "int8")
        onnx = onnx_int8(folder, x)
        sizes["ONNX, int8"] = onnx.stat().st_size / 2**20
        commands["Python, ONNX Runtime int8"] = [sys.executable, "onnx_run.py", str(onnx), "x.bin", "y.bin"]
        wanted["Python, ONNX Runtime int8"] = None
        sizes["liblcnn.so"] = (folder / "int8" / "liblcnn.so").stat().st_size / 2**20
        result["files MiB"] = sizes
        result["start to first result"] = in_turns(commands, folder, wanted)
        for precision in ("int8", "float32"):
            wait = [sys.executable, "wait.py", str(folder / precision / "model.lcnn"), "x.bin", "y.bin"]
            result[f"two processes, {precision}, MiB"] = shared(folder, wait)
        result["calls per second, int8"] = throughput(folder / "int8", x)
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key not in ("hardware", "versions")}, indent=1))


if __name__ == "__main__":
    main()
