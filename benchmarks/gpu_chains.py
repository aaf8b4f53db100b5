"""Half precision on a GPU: whole networks and pairs of layers as chains, against the best dense result of the same run.

    python benchmarks/gpu_chains.py [--out FOLDER] [--seconds 240] [--only NAME …] [--rehearse]

Needs neither installation nor network. Every job is written to gpu-chains.json as it ends, so that what one breaks, or no time
is left for, the others survive. --rehearse tries all of it on a CPU, by the operator's reference.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import traceback
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from lcnn_compile.bench.gpu.budget import Budget
from lcnn_compile.bench.gpu.chains import compile_share
from lcnn_compile.bench.gpu.machine import Gpu, Machine, Rehearsal
from lcnn_compile.bench.gpu.whole import check, whole

DENSE = ("frozen", "inductor")
JOBS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "resnet18": ("resnet18", 64, (*DENSE, "eager")),
    "pair": ("pair 64@56", 64, (*DENSE, "eager")),
    "vgg16": ("vgg16", 64, DENSE),
    "resnet50": ("resnet50", 64, DENSE),
    "resnet18-1": ("resnet18", 1, DENSE),
    "autotune": ("resnet18", 64, ("max-autotune",)),
}
"""What is measured, the most wanted first: network, batch, and the ways to run it dense."""


class Record:
    """What was found so far, on disk whole at any moment."""

    def __init__(self, path: Path, device: dict[str, Any]):
        self.path, self.found = path, {"device": device, "rows": [], "skipped": [], "failures": []}

    def save(self) -> None:
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(self.found, indent=1))
        os.replace(draft, self.path)


def ahead(names: list[str], workers: int) -> tuple[ProcessPoolExecutor, dict[str, list[Future[int]]]]:
    """Start to compile the kernels of these jobs, the first ones first."""
    major, minor = torch.cuda.get_device_capability()
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    tasks: dict[str, list[Future[int]]] = {}
    for dtype in (torch.float16, torch.bfloat16):
        shares = ("checks", 5, dtype, 10 * major + minor)
        tasks.setdefault("checks", []).extend(pool.submit(compile_share, *shares, part, workers) for part in range(workers))
    for name in names:
        network, batch, _ = JOBS[name]
        shares = (network, batch, torch.float16, 10 * major + minor)
        tasks[name] = [pool.submit(compile_share, *shares, part, workers) for part in range(workers)]
    return pool, tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--only", nargs="*", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--rehearse", action="store_true", help="try the programme on a CPU; its times mean nothing")
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu_chains.py needs an NVIDIA GPU and a PyTorch built for CUDA (--rehearse needs none)")
    budget = Budget(time.time() + arguments.seconds)
    machine: Machine = Rehearsal() if arguments.rehearse else Gpu()
    record = Record(arguments.out / "gpu-chains.json", machine.describe())
    print(record.found["device"], flush=True)
    pool, tasks = (None, {}) if arguments.rehearse else ahead(arguments.only, max(1, (os.cpu_count() or 2) - 2))
    torch.backends.cudnn.benchmark = False
    modes = ("bfloat16",) if arguments.rehearse else ("float16", "bfloat16")
    for task in tasks.get("checks", []):
        task.result(timeout=max(1, budget.left()))
    record.found["checks"] = checks = [row for mode in modes for row in check(machine, mode)]
    record.save()
    torch.backends.cudnn.benchmark = True
    print(f"[{budget.left():.0f} s left] {len(checks)} checks, {sum(not row['agrees'] for row in checks)} wrong", flush=True)
    for name in arguments.only:
        network, batch, ways = JOBS[name]
        if budget.left() < 15:
            budget.skip(name)
            break
        try:
            failed = sum(task.result(timeout=max(1, budget.left())) for task in tasks.get(name, []))
            print(f"[{budget.left():.0f} s left] {name}; {failed} kernels did not compile", flush=True)
            small: dict[str, Any] = {"batch": min(batch, 2), "side": 32} if arguments.rehearse else {"batch": batch}
            record.found["rows"] += whole(
                machine, budget, network, "bfloat16" if arguments.rehearse else "float16", ways=ways, **small
            )
        except Exception as error:
            record.found["failures"].append(traceback.format_exc(limit=-8))
            budget.skip(name, error)
            print(f"FAILED {budget.skipped[-1]}", flush=True)
        record.found["skipped"] = budget.skipped
        record.save()
        gc.collect()
        if not arguments.rehearse:
            torch.cuda.empty_cache()
    if pool is not None:
        pool.shutdown(wait=False, cancel_futures=True)
    print(f"{'':24}{'dense':>10}{'lookups':>10}")
    for row in record.found["rows"]:
        dense = min(row["dense_ms"].values(), default=float("nan"))
        print(
            f"{row['network'] + ' b' + str(row['batch']):24}{dense:10.4f}{row['ms']['lookup']:10.4f}  {row['speedup'] or 0:.2f}x"
        )
    print("\n".join(budget.skipped), flush=True)
    sys.exit(not record.found["rows"] or not all(row["agrees"] for row in checks))


if __name__ == "__main__":
    main()
