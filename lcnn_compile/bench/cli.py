"""The commands: ``python -m lcnn_compile.bench layers|networks|scaling|training|resources|all``; also ``lcnn-compile bench``."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console

from lcnn_compile.bench import resources as measurements
from lcnn_compile.bench.cpu.engines import ENGINES
from lcnn_compile.bench.cpu.measure import Row
from lcnn_compile.bench.cpu.network_bench import QUICK, SETTINGS_OF
from lcnn_compile.bench.cpu.profile import show_profile
from lcnn_compile.bench.cpu.report import document, plot_comparisons, show, wide_console, write
from lcnn_compile.bench.cpu.scaling_report import plot_scaling, show_scaling
from lcnn_compile.bench.cpu.summary import compare
from lcnn_compile.bench.cpu.training import show_training
from lcnn_compile.bench.jobs import BenchmarkError, Job, spawn
from lcnn_compile.errors import ConfigError

app = typer.Typer(help="Time lookup layers and networks against dense engines.", no_args_is_help=True)

Out = Annotated[Path, typer.Option(help="Folder for JSON files and plots.")]
Threads = Annotated[list[int], typer.Option(help="Thread counts; repeat the option for several.")]
Batches = Annotated[list[int], typer.Option("--batch", help="Batch sizes; repeat the option for several.")]
Engines = Annotated[list[str], typer.Option("--engine", help="Dense engines; repeat for several, all by default.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result files' content; tables go to standard error.")]
Quick = Annotated[bool, typer.Option("--quick", help="A few cases, a few minutes.")]
RESULTS = Path("benchmarks/results")
THREADS, ONE, BATCHES = [1, 2], [1], [1, 8]
EVERY: list[str] = []


def _engines(names: list[str]) -> tuple[str, ...]:
    unknown = sorted(set(names) - set(ENGINES))
    if unknown:
        raise ConfigError(f"engines are {unknown}; allowed are {list(ENGINES)}")
    return tuple(names)


def _rows(jobs: list[Job], console: Console) -> list[Row]:
    """The rows of every job; one that dies is reported and the others go on."""
    rows: list[Row] = []
    with TemporaryDirectory() as folder:
        for job in jobs:
            with console.status(f"{job.benchmark} {job.case}, batch {job.batch}, {job.threads} thread(s)"):
                try:
                    rows += [Row(**row) for row in spawn(replace(job, folder=folder))]
                except BenchmarkError as error:
                    console.print(str(error), style="red", markup=False)
    return rows


def _console(as_json: bool) -> Console:
    return Console(stderr=True) if as_json else wide_console()


def _write(path: Path, content: dict[str, Any], as_json: bool) -> None:
    write(path, content)
    if as_json:
        print(json.dumps(content, ensure_ascii=False))


def _finish(benchmark: str, command: str, jobs: list[Job], out: Path, as_json: bool) -> None:
    console = _console(as_json)
    rows = _rows(jobs, console)
    comparisons = compare(rows)
    show(rows, benchmark, console)
    content: dict[str, Any] = {"rows": [row.to_dict() for row in rows], "comparisons": [c.to_dict() for c in comparisons]}
    _write(out / f"{benchmark}.json", document(benchmark, command, **content), as_json)
    plot_comparisons(comparisons, out / f"{benchmark}.png", benchmark)
    if not rows or any(row.failed for row in rows):
        raise typer.Exit(1)


def _command(
    name: str, threads: list[int], batches: list[int] | None, quick: bool, networks: list[str] = EVERY, engines: list[str] = EVERY
) -> str:
    options = (
        "".join(f" --network {n}" for n in networks)
        + "".join(f" --engine '{e}'" for e in engines)
        + "".join(f" --threads {t}" for t in threads)
        + "".join(f" --batch {b}" for b in batches or [])
    )
    return f"python -m lcnn_compile.bench {name}{options}{' --quick' if quick else ''}"


@app.command()
def layers(
    out: Out = RESULTS,
    threads: Threads = THREADS,
    batch: Batches = ONE,
    engine: Engines = EVERY,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Single layers."""
    jobs = [Job("layers", "", t, b, quick, _engines(engine)) for t in threads for b in batch]
    _finish("layers", _command("layers", threads, batch, quick, engines=engine), jobs, out, as_json)


@app.command()
def networks(
    network: Annotated[list[str], typer.Option(help="Networks; repeat for several, all by default.")] = EVERY,
    out: Out = RESULTS,
    threads: Threads = THREADS,
    batch: Batches = BATCHES,
    engine: Engines = EVERY,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Whole networks; with --json one line for each batch size."""
    unknown = sorted(set(network) - set(SETTINGS_OF))
    if unknown:
        raise ConfigError(f"networks are {unknown}; allowed are {list(SETTINGS_OF)}")
    names = network or list(QUICK if quick else SETTINGS_OF)
    chosen = _engines(engine)
    for b in batch:
        jobs = [Job("networks", name, t, b, quick, chosen) for name in names for t in threads]
        _finish(f"networks-batch{b}", _command("networks", threads, [b], quick, network, engine), jobs, out, as_json)


@app.command()
def scaling(out: Out = RESULTS, threads: Threads = THREADS, quick: Quick = False, as_json: Json = False) -> None:
    """One layer over batch, resolution, channels, taps and group size, beside the roofline."""
    console = _console(as_json)
    results = [spawn(Job("scaling", "", t, 1, quick)) for t in threads]
    show_scaling(results, console)
    _write(out / "scaling.json", document("scaling", _command("scaling", threads, None, quick), results=results), as_json)
    plot_scaling(results, out / "scaling.png")


@app.command()
def training(out: Out = RESULTS, threads: Threads = THREADS, quick: Quick = False, as_json: Json = False) -> None:
    """A step of training of single layers, forwards and backwards."""
    rows = [row for t in threads for row in spawn(Job("training", "", t, 1, quick))]
    show_training(rows, _console(as_json))
    _write(out / "training.json", document("training", _command("training", threads, None, quick), rows=rows), as_json)
    if any(row["seconds"] is None for row in rows):
        raise typer.Exit(1)


@app.command()
def resources(out: Out = RESULTS, threads: Threads = ONE, quick: Quick = False, as_json: Json = False) -> None:
    """Start-up times, and peak memory of whole networks."""
    starts = [row for t in threads for row in measurements.starts(t)]
    peaks = measurements.peaks(("resnet18",) if quick else ("alexnet", "vgg16", "resnet18", "resnet50"), threads[0])
    measurements.show_resources(starts, peaks, _console(as_json))
    content = {"starts": starts, "memory_mib": peaks}
    _write(out / "resources.json", document("resources", _command("resources", threads, None, quick), **content), as_json)


@app.command()
def profile(network: str, setting: str = "ours", threads: int = 1, batch: int = 1, as_json: Json = False) -> None:
    """Where the time of one compiled lookup network goes."""
    result = spawn(Job("profile", f"{network} {setting}", threads, batch))
    if as_json:
        print(json.dumps(result))
    else:
        show_profile(result, wide_console())


@app.command(name="all")
def everything(out: Out = RESULTS, threads: Threads = THREADS, quick: Quick = False, as_json: Json = False) -> None:
    """Layers, networks, scaling, training and resources, one after the other; with --json a line for each file."""
    pieces = (
        partial(layers, out, threads, ONE, EVERY, quick, as_json),
        partial(networks, EVERY, out, threads, ONE if quick else BATCHES, EVERY, quick, as_json),
        partial(scaling, out, threads, quick, as_json),
        partial(training, out, threads, quick, as_json),
        partial(resources, out, threads[:1], quick, as_json),
    )
    failed = False
    for piece in pieces:
        try:
            piece()
        except typer.Exit as exit:
            failed = failed or bool(exit.exit_code)
    if failed:
        raise typer.Exit(1)
