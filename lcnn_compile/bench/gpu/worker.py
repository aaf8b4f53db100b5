"""The process that measures: jobs one after another, each result written out at once, so that nothing is lost with the process.

    python -m lcnn_compile.bench.gpu.worker LOG FIRST DEADLINE [--rehearse] [--only KIND …]

Every line of LOG is one event in JSON: ``start``, ``rows``, ``skipped``, ``done`` or ``failed``, with the number of the job.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lcnn_compile.bench.gpu import layers as gpu_layers
from lcnn_compile.bench.gpu import networks as gpu_networks
from lcnn_compile.bench.gpu.budget import Budget, at_most
from lcnn_compile.bench.gpu.cases import Job, jobs, rehearsal
from lcnn_compile.bench.gpu.machine import Gpu, Machine, Rehearsal
from lcnn_compile.errors import LcnnWarning

KINDS = ("check", "ceilings", "layer", "network")
DATASHEET = {
    "copy": 3.0e12,
    "l2": 5.5e12,
    "l1": 2.96e13,
    "float32": 6.0e13,
    "tf32": 4.0e14,
    "float16": 8.0e14,
    "bfloat16": 8.0e14,
}
"""An H100's, until this device's are measured."""
DEAD = 70
"""Exit code of a worker whose GPU is gone."""
LEAST = 12.0
"""Seconds below which no job is begun."""


def select(only: Sequence[str], rehearse: bool) -> list[Job]:
    """The jobs of these kinds (all, if none is named), in order."""
    chosen = [job for job in jobs() if not only or job.kind in only or job.kind == "ceilings"]
    return _small(chosen) if rehearse else chosen


def _small(chosen: list[Job]) -> list[Job]:
    """Two or three of each kind, at sizes for a CPU."""
    of_kind = {kind: [job for job in chosen if job.kind == kind] for kind in KINDS}
    halves = [job for job in of_kind["layer"] if job.arguments["mode"] == "float16"]
    taken = [*of_kind["check"][:4], *of_kind["ceilings"], *of_kind["layer"][:1], *halves[:2], *of_kind["network"][:1]]
    return [rehearsal(job) for job in taken]


class Worker:
    """Runs jobs on a machine and appends what comes of them to ``log``."""

    def __init__(self, machine: Machine, log: Path, budget: Budget):
        self.machine, self.log, self.budget = machine, log, budget
        self.ceilings = self._known_ceilings() or DATASHEET

    def _known_ceilings(self) -> dict[str, float] | None:
        """As an earlier process measured them."""
        if not self.log.exists():
            return None
        events = [json.loads(line) for line in self.log.read_text().splitlines()]
        found = [row["ceilings"] for event in events for row in event.get("rows", []) if "ceilings" in row]
        return found[-1] if found else None

    def write(self, event: str, number: int, **values: Any) -> None:
        """Append one event."""
        with self.log.open("a") as file:
            file.write(json.dumps({"event": event, "job": number, **values}) + "\n")

    def measure(self, job: Job) -> list[dict[str, Any]]:
        """The rows of one job."""
        if job.kind == "ceilings":
            self.ceilings = self.machine.ceilings()
            print({name: f"{rate:.3g}" for name, rate in self.ceilings.items()}, flush=True)
            return [{"ceilings": self.ceilings}]
        functions: dict[str, Callable[..., list[dict[str, Any]]]] = {
            "check": gpu_layers.check, "layer": gpu_layers.layer, "network": gpu_networks.network
        }  # fmt: skip
        more = {"ceilings": self.ceilings} if job.kind == "layer" else {}
        return functions[job.kind](self.machine, self.budget, **job.arguments, **more)

    def run(self, chosen: Sequence[Job], first: int) -> int:
        """Measure from job number ``first`` on; the exit code."""
        for number in range(first, len(chosen)):
            job = chosen[number]
            if self.budget.left() < LEAST + job.keep:
                self.write("skipped", number, reasons=[f"{job.kind} {job.name}: no time left"])
                continue
            self.write("start", number, seconds=job.seconds)
            self.budget.skipped.clear()
            try:
                with at_most(min(job.seconds, self.budget.left())):
                    rows = [{"kind": job.kind, **row} for row in self.measure(job)]
                self.write("rows", number, rows=rows)
                self.write("done", number)
            except Exception as error:
                self.budget.skip(f"{job.kind} {job.name}", error)
                self.write("failed", number, trace=traceback.format_exc(limit=-6))
                print(f"FAILED {self.budget.skipped[-1]}", flush=True)
                if not self.machine.usable():
                    self.write("skipped", number, reasons=self.budget.skipped)
                    return DEAD
            if self.budget.skipped:
                self.write("skipped", number, reasons=self.budget.skipped)
            gc.collect()
            if self.machine.device == "cuda":
                torch.cuda.empty_cache()
        return 0


def main() -> None:
    """Run as a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("log", type=Path)
    parser.add_argument("first", type=int)
    parser.add_argument("deadline", type=float)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--only", nargs="*", default=[])
    arguments = parser.parse_args()
    # Kernels of ours that fall back would be timed as something else.
    warnings.filterwarnings("error", category=LcnnWarning, message=".*Triton kernels cannot run.*")
    torch.backends.cudnn.benchmark = True
    machine: Machine = Rehearsal() if arguments.rehearse else Gpu()
    worker = Worker(machine, arguments.log, Budget(arguments.deadline))
    worker.write("device", arguments.first, **machine.describe())
    if arguments.first == 0:
        print(machine.describe(), flush=True)
    sys.exit(worker.run(select(arguments.only, arguments.rehearse), arguments.first))


if __name__ == "__main__":
    main()
