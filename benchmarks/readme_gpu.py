"""The tables of GPU times in README.md and docs/gpu.md, from results/gpu.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent / "results" / "gpu.json"
SIZES = {
    "g1/9": "k = 10, 9 taps, g = 1",
    "g1/27": "k = m/4, 27 taps, g = 1",
    "g8/54": "k = m/4, 54 taps, g = 8",
    "g16/144": "k = m/4, 144 taps, g = 16",
    "g64/192": "k = m/4, 192 taps, g = 64",
    "g64/192/shuffled": "the same, filters grouped in any order",
}
FORMATS = {"contiguous": "contiguous", "channels_last": "channels last"}
MODES = ("float32", "float16")
NETWORKS = {"vgg16": "VGG-16", "resnet18": "ResNet-18"}

Row = dict[str, Any]


def record() -> Row:
    """The results; empty before anything was measured."""
    found: Row = json.loads(FILE.read_text()) if FILE.exists() else {}
    return found


def table(headings: list[str], lines: list[list[str]]) -> str:
    """A Markdown table; numbers, which end in x or µs, to the right."""
    right = [all(line[i].rstrip("*").endswith(("x", " µs", "–")) for line in lines) for i in range(len(headings))]
    rule = ["---:" if numbers else "---" for numbers in right]
    return "\n".join("| " + " | ".join(line) + " |" for line in (headings, rule, *lines)) + "\n"


def best_dense(rows: list[Row], row: Row) -> tuple[float, str]:
    """The fastest dense result for the layer, dtype and batch of a row, whichever memory format it was measured beside."""
    same = [other for other in rows if all(other[key] == row[key] for key in ("layer", "mode", "batch"))]
    return min((milliseconds, way) for other in same for way, milliseconds in other["dense_ms"].items())


def layers(wanted: Callable[[Row], bool]) -> str:
    """Layers that are wanted, one line each."""
    rows = [row for row in record().get("rows", []) if row["kind"] == "layer"]
    lines = []
    for row in filter(wanted, rows):
        dense, way = best_dense(rows, row)
        ours = row["ms"]["lookup"]
        name = f"{row['layer'].replace('->', '→').replace('@', ' @')}²"
        line = [
            name,
            str(row["batch"]),
            row["mode"],
            FORMATS[row["format"]],
            SIZES[row["sizes"]],
            way.replace("channels_last", "channels last"),
        ]
        lines.append([*line, f"{1e3 * dense:.1f} µs", f"{1e3 * ours:.1f} µs", f"**{dense / ours:.2f}x**"])
    heading = ["3×3 layer", "batch", "dtype", "format", "sizes", "best dense", "dense", "lookups", "faster"]
    return table(heading, lines) if lines else ""


def short() -> str:
    """The README's: a line per layer, a column per dtype, each at its fastest sizes and memory format."""
    rows = [row for row in record().get("rows", []) if row["kind"] == "layer" and "shuffled" not in row["sizes"]]
    found: dict[str, dict[str, str]] = {}
    for row in sorted(rows, key=lambda row: -row["ms"]["lookup"]):
        if row["batch"] == (1 if "224" in row["layer"] else 64):
            name = f"{row['layer'].replace('->', '→').replace('@', ' 3×3 @')}², batch {row['batch']}"
            found.setdefault(name, {})[row["mode"]] = f"{best_dense(rows, row)[0] / row['ms']['lookup']:.2f}x"
    lines = [[name, *(f"**{ratios[mode]}**" if mode in ratios else "–" for mode in MODES)] for name, ratios in found.items()]
    return table(["layer", *MODES], lines) + "\n" + networks() if lines else ""


def networks() -> str:
    """Both networks in both dtypes."""
    found: dict[str, dict[str, float]] = {}
    for row in record().get("rows", []):
        if row["kind"] == "network":
            found.setdefault(f"{NETWORKS[row['network']]}, batch {row['batch']}", {})[row["mode"]] = row["speedup"]
    lines = [[name, *(f"**{ratios[mode]:.2f}x**" for mode in MODES)] for name, ratios in found.items()]
    return table(["network", *MODES], lines) if lines else ""


def machine() -> str:
    """One sentence: what it was measured on."""
    found = record().get("device")
    if not found:
        return ""
    names = ("torch", "cudnn", "triton", "python")
    versions = ", ".join(f"{name} {found[name]}" for name in names)
    copy, products = found["ceilings"]["copy"] / 1e12, found["ceilings"]["float16"] / 1e12
    return f"{found['gpu']}, CUDA {found['cuda']}, {versions}; a copy ran at {copy:.1f} TB/s, a product in half precision at {products:.0f} TFLOP/s.\n"


TABLES: dict[str, Callable[[], str]] = {
    "gpu": short,
    "gpu-layers": lambda: layers(lambda row: row["batch"] != 1 or "224" in row["layer"]),
    "gpu-batch-1": lambda: layers(lambda row: row["batch"] == 1 and "224" not in row["layer"]),
    "gpu-networks": networks,
    "gpu-machine": machine,
}
