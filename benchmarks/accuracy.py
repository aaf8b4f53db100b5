"""CIFAR-10 accuracy at many budgets: ``python benchmarks/accuracy.py run|time|report --data FOLDER --work FOLDER``.

``run`` works case by case and can be stopped at any time; ``time`` measures all finished cases in one run, on a quiet machine;
``report`` writes the JSON file, the table and the plot.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from lcnn_compile.bench.accuracy import report as accuracy_report
from lcnn_compile.bench.accuracy.cases import chosen
from lcnn_compile.bench.accuracy.study import Study
from lcnn_compile.bench.cpu.report import document, wide_console, write

app = typer.Typer(help=__doc__, no_args_is_help=True)
Data = Annotated[Path, typer.Option(help="Folder with cifar10_jpeg.npz, cifar10_net.py and cifar10_dense.safetensors.")]
Work = Annotated[Path, typer.Option(help="Folder for results and checkpoints.")]


@app.command()
def run(data: Data, work: Work, case: Annotated[list[str], typer.Option(help="Cases; all by default.")] = [], threads: int = 2):  # noqa: B006
    """Work out the cases that are not finished."""
    torch.set_num_threads(threads)
    console, study = Console(), Study(data, work)
    for one in chosen(case):
        found = study.run(one)
        console.print(f"{one.name}: top-1 {found['top1']:.2f} %, {found['macs'] / 1e6:.2f} M multiply-adds", highlight=False)


@app.command()
def time(data: Data, work: Work, threads: int = 1, batch: int = 1, seconds: float = 30.0):
    """Time all finished cases in turns."""
    times = accuracy_report.measure_times(Study(data, work), threads, batch, seconds)
    (work / "times.json").write_text(json.dumps({"threads": threads, "batch": batch, "cases": times}, indent=1))


@app.command()
def report(data: Data, work: Work, out: Path = Path("benchmarks/results")):
    """Write accuracy.json and accuracy.png, and print the table."""
    file = work / "times.json"
    measured = json.loads(file.read_text()) if file.exists() else {"cases": {}}
    rows = accuracy_report.rows(Study(data, work), measured["cases"])
    accuracy_report.show(rows, wide_console())
    conditions = {key: measured[key] for key in ("threads", "batch") if key in measured}
    write(out / "accuracy.json", document("accuracy", "python benchmarks/accuracy.py", timing=conditions, rows=rows))
    accuracy_report.plot(rows, out / "accuracy.png")


if __name__ == "__main__":
    app()
