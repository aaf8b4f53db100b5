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

TRACE = FILE.with_name("gpu-trace.json")
KINDS = {
    "convolutions": ("fprop", "implicit_gemm", "Memset", "nhwcAddPadding"),
    "lookups": ("dictionary_kernel", "grouped_kernel"),
    "passes of the compiler": ("triton_", "batch_norm", "max_pool", "vectorized_elementwise"),
    "copies": ("elementwise_kernel",),
}
"""What kernels do, by parts of their names; the first that fits counts."""
CHAINS = {
    "s1 16->64@56 +S": "16 → 64 @56² → 16",
    "s1 16->64@56 +res +S": "16 → 64 @56² + residual → 16",
    "s1 16->64@56": "16 → 64 @56²",
    "s2 16->128@56/2 +S": "16 → 128 @56²/2 → 32",
    "s2 32->128@28 +S": "32 → 128 @28² → 32",
    "s2 32->128@28 +res+S": "32 → 128 @28² + residual → 32",
    "s2 32->128@28": "32 → 128 @28²",
    "s3 32->256@28/2 +S": "32 → 256 @28²/2 → 64",
    "s3 64->256@14 +S": "64 → 256 @14² → 64",
    "s3 64->256@14": "64 → 256 @14²",
    "s4 64->512@14/2": "64 → 512 @14²/2",
    "s4 128->512@7 +S": "128 → 512 @7² → 128",
    "s4 128->512@7": "128 → 512 @7²",
    "v 16->64@224": "16 → 64 @224²",
    "v 64->256@56": "64 → 256 @56²",
    "v 128->512@28": "128 → 512 @28²",
}

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


def _trace() -> Row:
    found: Row = json.loads(TRACE.read_text()) if TRACE.exists() else {}
    return found


def traces() -> str:
    """Whole ResNet-18s: time of a graph, kernels, and what they spend their time on."""
    lines = []
    for name, found in _trace().get("traces", {}).items():
        spent = dict.fromkeys((*KINDS, "other"), 0.0)
        for kernel in found["by_kernel"]:
            kind = next((kind for kind, parts in KINDS.items() if any(part in kernel["kernel"] for part in parts)), "other")
            spent[kind] += kernel["us"]
        lines.append([name, f"{1e3 * found['ms']:.0f} µs", str(found["kernels"]), *(f"{us:.0f} µs" for us in spent.values())])
    return table(["ResNet-18", "graph", "kernels", *KINDS, "other"], lines) if lines else ""


def chains() -> str:
    """Single kernels of chains beside cuDNN on the same shapes."""
    lines = [
        [CHAINS[row["name"]], "y and S" if row["keep"] and "+S" in row["name"] else "y" if row["keep"] else "S",
         f"{row['us']:.1f} µs", f"{row['cudnn_us']:.1f} µs", f"{row['cudnn_relu_us']:.1f} µs"]
        for row in _trace().get("chains", []) if row["name"] in CHAINS
    ]  # fmt: skip
    headings = ["3×3 over S, bias, ReLU", "written", "chain", "cuDNN, convolution alone", "cuDNN with bias and ReLU"]
    return table(headings, lines) if lines else ""


TABLES: dict[str, Callable[[], str]] = {
    "gpu": short,
    "gpu-layers": lambda: layers(lambda row: row["batch"] != 1 or "224" in row["layer"]),
    "gpu-batch-1": lambda: layers(lambda row: row["batch"] == 1 and "224" not in row["layer"]),
    "gpu-networks": networks,
    "gpu-machine": machine,
    "gpu-traces": traces,
    "gpu-chains": chains,
}
