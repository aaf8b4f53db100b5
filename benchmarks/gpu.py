"""Lookup convolutions on a GPU: values, then layers, then networks against the best dense result, in under nine minutes.

    python benchmarks/gpu.py [--out FOLDER] [--seconds 520] [--only check|layer|network …] [--rehearse]

Needs neither installation nor network. What one step breaks, the others survive; what does not fit into the time is named.
JSON goes to --out, $OUT or here: gpu.jsonl while it runs, gpu.json at the end. --rehearse tries all of it on a CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console

from lcnn_compile.bench.gpu import summary as gpu_summary
from lcnn_compile.bench.gpu.compile import compile_ahead
from lcnn_compile.bench.gpu.session import Session, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--seconds", type=float, default=520)
    parser.add_argument("--only", nargs="*", default=[], choices=("check", "layer", "network"))
    parser.add_argument("--rehearse", action="store_true", help="try the programme on a CPU; its times mean nothing")
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs an NVIDIA GPU and a PyTorch built for CUDA; none is visible (--rehearse needs none)")
    session = Session(arguments.out, arguments.seconds, arguments.rehearse, arguments.only)
    if not arguments.rehearse:
        compile_ahead(session.jobs, torch.cuda.get_device_capability(), seconds=100)
    try:
        session.run()
    finally:
        record = gpu_summary.document(read(session.log))
        gpu_summary.write(record, arguments.out / "gpu.json")
        gpu_summary.show(record, Console(width=110))
    rows = record["rows"]
    sys.exit(not rows or any(row["kind"] == "check" and not row["agrees"] for row in rows))


if __name__ == "__main__":
    main()
