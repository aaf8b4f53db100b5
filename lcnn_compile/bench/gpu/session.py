"""One whole GPU benchmark: a worker process, started again after a crash or a hang with the job that follows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lcnn_compile
from lcnn_compile.bench.gpu.worker import select

GRACE = 15.0
"""Seconds by which a job may exceed its time before its process is ended."""
START = 90.0
"""Seconds a worker may take to begin its first job."""


def read(log: Path) -> list[dict[str, Any]]:
    """The events so far; a line half written is not there yet."""
    if not log.exists():
        return []
    lines = log.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def _append(log: Path, **event: Any) -> None:
    with log.open("a") as file:
        file.write(json.dumps(event) + "\n")


class Session:
    """Workers over the jobs of some kinds, until all are done or the time is up; everything is in ``out``/gpu.jsonl."""

    def __init__(self, out: Path, seconds: float, rehearse: bool = False, only: Sequence[str] = ()):
        self.log = out / "gpu.jsonl"
        self.deadline = time.time() + seconds
        self.options = [*(["--rehearse"] if rehearse else []), *(["--only", *only] if only else [])]
        self.jobs = select(only, rehearse)
        out.mkdir(parents=True, exist_ok=True)
        self.log.unlink(missing_ok=True)

    def command(self, first: int) -> list[str]:
        """What starts a worker at this job."""
        module = "lcnn_compile.bench.gpu.worker"
        return [sys.executable, "-m", module, str(self.log), str(first), str(self.deadline), *self.options]

    def run(self) -> None:
        """Go through all jobs."""
        root = str(Path(lcnn_compile.__file__).resolve().parents[1])
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
        first = idle = 0
        while first < len(self.jobs) and time.time() < self.deadline and idle < 2:
            process = subprocess.Popen(self.command(first), env=environment)
            reason = self._watch(process, first)
            last = self._last()
            ended = {event["job"] for event in read(self.log) if event["event"] in ("done", "failed", "skipped")}
            if last is not None and last >= first:
                if last not in ended:
                    job = self.jobs[last]
                    _append(self.log, event="failed", job=last, trace=reason)
                    _append(self.log, event="skipped", job=last, reasons=[f"{job.kind} {job.name}: {reason}"])
                first, idle = max([last, *ended]) + 1, 0
            elif ended and max(ended) >= first:
                first = max(ended) + 1
            else:
                idle += 1
                _append(self.log, event="skipped", job=first, reasons=[f"a worker did not begin: {reason}"])

    def _last(self) -> int | None:
        """The job that was begun last."""
        started = [event["job"] for event in read(self.log) if event["event"] == "start"]
        return started[-1] if started else None

    def _watch(self, process: subprocess.Popen[bytes], first: int) -> str:
        """Wait for the worker, ending it when a job exceeds its time; why it ended."""
        began, current, limit = time.time(), None, START
        while process.poll() is None:
            time.sleep(0.1)
            starts = [event for event in read(self.log) if event["event"] == "start" and event["job"] >= first]
            if starts and starts[-1]["job"] != current:
                began, current, limit = time.time(), starts[-1]["job"], starts[-1]["seconds"] + GRACE
            if time.time() > min(began + limit, self.deadline + GRACE):
                process.kill()
                process.wait()
                return f"its process was ended after {time.time() - began:.0f} s"
        return f"its process ended with code {process.returncode}"
