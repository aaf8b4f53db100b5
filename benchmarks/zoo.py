"""Architectures of timm and torchvision, losslessly as lookups, against the dense networks; ``make zoo``.

    python benchmarks/zoo.py                              # everything that is not known to be right
    python benchmarks/zoo.py --only 'timm/resnet*' --again
    python benchmarks/zoo.py --ways convert,freeze --compiler eager

With k = m and all taps a lookup network is the dense network, so each result is held against float64 and may be at most a small factor
farther from it than float32 PyTorch is. Ways: convert; compile the converted network at two shapes; compile the dense network in one
line, until after calibration; freeze; export (pt2, onnx). Each architecture has a process, a limit of time and one of memory. Results are
written after every step, so an interrupted run goes on; all go to ``benchmarks/results/zoo-torch-VERSION.json``. Where a way fails for
the dense network without us too, it is "upstream".
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import traceback
from functools import cache
from pathlib import Path
from typing import Any

import torch
import zoo_models
import zoo_ways

ROOT = Path(__file__).resolve().parent.parent
VERSION = torch.__version__.partition("+")[0]
RESULTS = ROOT / "benchmarks" / "results" / f"zoo-torch-{VERSION}.json"
ROWS = ROOT / "zoo-output" / VERSION


def path_of(name: str) -> Path:
    """The file of one architecture."""
    return ROWS / f"{name.replace('/', '-').replace(' ', '-')}.json"


def read(name: str) -> dict[str, Any]:
    """What is known of one architecture: from this run, or as committed."""
    path = path_of(name)
    if path.exists():
        return json.loads(path.read_text())
    return next((row for row in committed() if row["name"] == name), {"name": name, "ways": {}})


@cache
def committed() -> list[dict[str, Any]]:
    """The results of earlier runs."""
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []


def write(row: dict[str, Any]) -> None:
    """Keep what is known of one architecture."""
    path = path_of(row["name"])
    path.with_suffix(".part").write_text(json.dumps(row, indent=1))
    path.with_suffix(".part").replace(path)


def note(name: str, way: str, found: dict[str, Any], commit: str) -> None:
    """Keep the result of one way."""
    row = read(name)
    row["ways"][way] = found | {"commit": commit}
    write(row)
    text = " ".join(
        str(found[key]) for key in ("state", "ratio", "seconds", "replaced", "dense_layers", "alone", "message") if key in found
    )
    print(f"{name} {way}: {text}", flush=True)


def work(case: zoo_models.Case, ways: list[str], compiler: str, commit: str, gibibytes: float) -> None:
    """All asked of one architecture; in a process of its own."""
    limit = int(gibibytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(1)
    try:
        zoo = zoo_ways.Zoo(case, compiler)
    except Exception as error:
        traceback.print_exc()
        for way in ways:
            note(
                case.name,
                way,
                {"state": "failed", "message": f"the dense network cannot be made: {zoo_ways.first_line(error)}"},
                commit,
            )
        return
    for way in ways:
        path_of(case.name).with_suffix(".doing").write_text(way)
        note(case.name, way, zoo.row(way) | {"compiler": compiler}, commit)


def run(case: zoo_models.Case, ways: list[str], options: argparse.Namespace, commit: str) -> None:
    """One architecture within its limits; what ends the process is noted, and the other ways go on."""
    context = multiprocessing.get_context("fork")
    left = list(ways)
    while left:
        process = context.Process(target=work, args=(case, left, options.compiler, commit, options.memory))
        process.start()
        process.join(options.seconds)
        stopped = process.is_alive()
        if stopped:
            process.kill()
            process.join()
        done = read(case.name)["ways"]
        if not process.exitcode:
            return
        doing = path_of(case.name).with_suffix(".doing")
        way = doing.read_text() if doing.exists() else left[0]
        why = f"stopped after {options.seconds} s" if stopped else f"the process ended with {process.exitcode}"
        if way in left:
            note(case.name, way, {"state": "stopped" if stopped else "failed", "message": why}, commit)
            left = left[left.index(way) + 1 :]
        else:
            left = [way for way in left if way not in done]


def collect() -> None:
    """Write all results into one file."""
    names = [case.name for case in zoo_models.CASES]
    rows = [read(case.name) | {"family": case.family} for case in zoo_models.CASES if path_of(case.name).exists()]
    rows = [row for row in rows if row["ways"]]
    known = {row["name"] for row in rows}
    rows += [row for row in committed() if row["name"] not in known and row["name"] in names]
    rows.sort(key=lambda row: names.index(row["name"]))
    import timm
    import torchvision

    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__}
    document = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "make zoo",
        "versions": versions | {"python": platform.python_version()},
        "factor": zoo_ways.FACTOR,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


def rank(name: str, rules: list[str]) -> int:
    """Place of the first rule that a name matches: what is asked for first is run first."""
    return next((i for i, rule in enumerate(rules) if fnmatch.fnmatch(name, rule)), len(rules))


def main() -> int:
    """Run what is asked for; exit code 1 where a result is wrong or a failure is ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="a glob of names; may be repeated, in the order to run")
    parser.add_argument("--ways", default=",".join(zoo_ways.WAYS[:-1]), help=f"of {','.join(zoo_ways.WAYS)}")
    parser.add_argument("--compiler", choices=("inductor", "eager"), default="inductor", help="what compiles the rest of a graph")
    parser.add_argument("--again", action="store_true", help="run what is right too")
    parser.add_argument("--seconds", type=float, default=900, help="limit of one architecture")
    parser.add_argument("--memory", type=float, default=8, help="limit of one architecture, GiB")
    options = parser.parse_args()
    os.environ.setdefault("LCNN_TUNE", "0")
    ROWS.mkdir(parents=True, exist_ok=True)
    ways = options.ways.split(",")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    bad = 0
    for case in sorted(zoo_models.CASES, key=lambda case: rank(case.name, options.only)):
        if options.only and not any(fnmatch.fnmatch(case.name, rule) for rule in options.only):
            continue
        settled = {way for way, found in read(case.name)["ways"].items() if found["state"] in ("right", "dense", "upstream")}
        left = [way for way in ways if options.again or way not in settled]
        if left:
            run(case, left, options, commit)
        states = {found["state"] for way, found in read(case.name)["ways"].items() if way in ways}
        bad += bool(states & {"wrong", "failed", "stopped", "warned"})
    collect()
    print(f"{bad} architectures are not right")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
