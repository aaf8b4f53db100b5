"""What a GPU benchmark found, as one JSON document and as a short closing table against the targets."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lcnn_compile.bench.gpu.cases import NARROW, SIZES, WIDE

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """One target: what it asks, and what was reached; None where nothing was measured."""

    name: str
    least: float
    reached: float | None
    detail: str = ""
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """Whether it was reached; None where nothing was measured."""
        if self.reached is None:
            return None
        return self.reached <= self.least if self.at_most else self.reached >= self.least


def document(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Events of a session's log as one record: device, rows, and what was left out and why."""
    record: dict[str, Any] = {"device": {}, "rows": [], "skipped": [], "failures": []}
    for event in events:
        record["rows"] += event.get("rows", [])
        record["skipped"] += event.get("reasons", [])
        if event["event"] == "device":
            record["device"] = {key: value for key, value in event.items() if key not in ("event", "job")}
        elif event["event"] == "failed":
            record["failures"].append(event["trace"])
    for row in record["rows"]:
        if "ceilings" in row:
            record["device"]["ceilings"] = row["ceilings"]
    return record


def _best(name: str, least: float, rows: Rows) -> Verdict:
    """Rows of one layer: the fastest lookups against the fastest dense result, whatever row it was measured for."""
    if not rows:
        return Verdict(name, least, None)
    best = min(rows, key=lambda row: row["ms"]["lookup"])
    ways = {milliseconds: way for row in rows for way, milliseconds in row["dense_ms"].items()}
    detail = f"{best['sizes']} {best['format']} against {ways[min(ways)]}"
    return Verdict(name, least, min(ways) / best["ms"]["lookup"], detail)


def verdicts(rows: Rows) -> list[Verdict]:
    """The targets on an H100: ratios to the fastest dense result of the same dtype in the same run, and time over floor."""
    layers = [row for row in rows if row["kind"] == "layer"]
    narrow = [row for row in layers if (row["layer"], row["mode"]) == (NARROW.name, "float32")]
    found = [_best(f"{NARROW.name} b1 k=10 float32", 4.0, narrow)]
    names = {sizes.name for sizes in SIZES}
    for mode, least in (("float16", 2.5), ("float32", 6.0)):
        for layer in WIDE:
            chosen = [row for row in layers if (row["layer"], row["mode"], row["batch"]) == (layer.name, mode, 64)]
            chosen = [row for row in chosen if row["sizes"] in names]
            found.append(_best(f"{layer.name} b64 {mode}", least, chosen))
    for network in ("resnet18", "vgg16"):
        reached = [r["speedup"] for r in rows if r["kind"] == "network" and (r["network"], r["mode"]) == (network, "float16")]
        found.append(Verdict(f"{network} b64 float16", 2.0, max(reached, default=None)))
    for kernel in ("dictionary", "lookups", "call"):
        ratios = [row["over_floor"][kernel] for row in layers if kernel in row["over_floor"]]
        worst = f"worst {max(ratios):.2f} of {len(ratios)}" if ratios else ""
        median = statistics.median(ratios) if ratios else None
        found.append(Verdict(f"{kernel}: time over floor, median", 1.6, median, worst, at_most=True))
    return found


def show(record: dict[str, Any], console: Console) -> None:
    """Print the closing table: short, for it may be all that is seen."""
    checks = [row for row in record["rows"] if row["kind"] == "check"]
    wrong = [row["case"] for row in checks if not row["agrees"]]
    console.print(f"{len(checks)} checks against float64, {len(wrong)} wrong{': ' + ', '.join(wrong) if wrong else ''}")
    table = Table("target", "asked", "reached", "met", "how")
    for verdict in verdicts(record["rows"]):
        reached = "-" if verdict.reached is None else f"{verdict.reached:.2f}"
        met = {True: "yes", False: "no", None: "not measured"}[verdict.met]
        table.add_row(verdict.name, f"{'<=' if verdict.at_most else '>='} {verdict.least}", reached, met, verdict.detail)
    console.print(table)
    if record["skipped"]:
        console.print(f"{len(record['skipped'])} left out (all in gpu.json); the first:")
        for reason in record["skipped"][:6]:
            console.print(f"  {reason}", markup=False, highlight=False)


def write(record: dict[str, Any], path: Path) -> None:
    """Write the record, whole or not at all."""
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(record, indent=1))
    os.replace(draft, path)
