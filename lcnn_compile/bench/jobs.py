"""Benchmarks as jobs, each in a fresh process: thread counts are set once, and no engine inherits another's caches.

``python -m lcnn_compile.bench.jobs`` is the child: it reads a job as JSON from its standard input and writes the result,
JSON too, to the file the job names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lcnn_compile.errors import LcnnError


@dataclass(frozen=True)
class Job:
    """One piece of a benchmark.

    Attributes:
        benchmark: "layers", "networks", "scaling", "training", "memory", "start" or "profile".
        case: a network's name, or whatever else the benchmark needs to know.
        engines: names of dense engines; empty for all.
        folder: where engines keep converted models for later jobs of the same run; none are kept by default.
    """

    benchmark: str
    case: str = ""
    threads: int = 1
    batch: int = 1
    quick: bool = False
    engines: tuple[str, ...] = ()
    folder: str = ""


class BenchmarkError(LcnnError):
    """A benchmark's process that did not finish."""


def spawn(job: Job, environment: Mapping[str, str] | None = None) -> Any:
    """Run a job in a fresh process and return its result.

    Raises:
        BenchmarkError: with the end of its error output, if it does not finish.
    """
    threads = str(job.threads)
    # CI=true keeps OpenVINO's and NNCF's usage statistics at home.
    fixed = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "CI": "true"}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        child = subprocess.run(
            [sys.executable, "-m", "lcnn_compile.bench.jobs"],
            input=json.dumps({"job": asdict(job), "result": str(result)}),
            env={**os.environ, **fixed, **(environment or {})},
            capture_output=True,
            text=True,
        )
        if child.returncode or not result.exists():
            raise BenchmarkError(f"{job} ended with status {child.returncode}:\n{child.stderr[-2000:]}")
        return json.loads(result.read_text())


def perform(job: Job) -> Any:
    """Do the job in this process; plain JSON comes back."""
    import torch

    torch.set_num_threads(job.threads)
    # Below: a faster start, and less memory, of jobs that measure just these.
    if job.benchmark == "memory":
        from lcnn_compile.bench.cpu.memory import peak

        return peak(job.case)
    if job.benchmark == "start":
        from lcnn_compile.bench.cpu.start import first_call

        return first_call(job.case)
    if job.benchmark == "profile":
        from lcnn_compile.bench.cpu.profile import run

        return run(job.case, job.batch)
    if job.benchmark == "training":
        from lcnn_compile.bench.cpu import training

        return training.run(job.quick)
    from lcnn_compile.bench.cpu import layers, network_bench, scaling
    from lcnn_compile.bench.cpu.engines import ENGINES
    from lcnn_compile.bench.cpu.measure import LOOKUP_ENGINES, measure

    if job.benchmark == "scaling":
        return scaling.run(job.quick)
    engines = [ENGINES[name] for name in job.engines or ENGINES]
    if job.benchmark == "networks":
        cases, seconds = [network_bench.network_case(job.case, job.batch)], 12.0
        ours = [engine for name, engine in LOOKUP_ENGINES.items() if name != "lcnn eager"]
    else:
        cases, seconds = layers.cases(job.quick, (job.batch,)), 8.0
        ours = list(LOOKUP_ENGINES.values())
    rows = []
    for number, case in enumerate(cases):
        # Dynamo stops compiling a function after a few variants of it; every case starts afresh.
        torch.compiler.reset()
        folder = Path(job.folder, f"{job.case}{number}") if job.folder else None
        if folder is not None:
            folder.mkdir(exist_ok=True)
        rows += measure(case, engines, 3.0 if job.quick else seconds, ours, folder)
    return [row.to_dict() for row in rows]


def _main() -> None:
    order = json.load(sys.stdin)
    job = Job(**{**order["job"], "engines": tuple(order["job"]["engines"])})
    Path(order["result"]).write_text(json.dumps(perform(job)))


if __name__ == "__main__":
    _main()
