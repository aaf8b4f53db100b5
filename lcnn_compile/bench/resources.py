"""Start-up times and peak memory, each measured in a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from lcnn_compile.bench.cpu import memory, start
from lcnn_compile.bench.jobs import Job, spawn


def starts(threads: int) -> list[dict[str, Any]]:
    """Every case twice: with empty caches, then with what the first start left there."""
    rows = []
    for case in start.CASES:
        with tempfile.TemporaryDirectory() as cache:
            places = {"XDG_CACHE_HOME": cache, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
            cold, warm = (spawn(Job("start", case, threads), places)["first"] for _ in range(2))
        rows.append({"case": case, "threads": threads, "first_use": cold, "later_start": warm})
    return rows


def peaks(networks: Sequence[str], threads: int) -> list[dict[str, Any]]:
    """MiB before there is a model and while it runs, for each network and configuration."""
    cases = [f"{network} {configuration}" for network in networks for configuration in memory.CONFIGURATIONS]
    return [{"case": case, **spawn(Job("memory", case, threads))} for case in cases]


def show_resources(starts: Sequence[dict[str, Any]], peaks: Sequence[dict[str, Any]], console: Console) -> None:
    """Print both tables."""
    table = Table(title="seconds to the first result")
    table.add_column("what")
    for heading in ("threads", "first use", "later start"):
        table.add_column(heading, justify="right")
    for row in starts:
        table.add_row(row["case"], str(row["threads"]), f"{row['first_use']:.2f}", f"{row['later_start']:.2f}")
    console.print(table)
    table = Table(title="resident memory at the peak of warm calls on one image, over the process without a model")
    table.add_column("what")
    table.add_column("MiB", justify="right")
    for row in peaks:
        table.add_row(row["case"], f"{row['running'] - row['before']:.0f}")
    console.print(table)
