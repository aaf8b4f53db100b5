"""Write the measured tables of README.md and of the pages in docs/, and the README's picture, from results/*.json.

    python benchmarks/readme.py            # rewrite what stands between the markers, draw the picture
    python benchmarks/readme.py --check    # exit code 1 if a table is not what the results say

A table stands between ``<!-- measured: NAME -->`` and ``<!-- measured: end -->``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import readme_gpu
import readme_native
import readme_zoo

from lcnn_compile.bench.accuracy.report import ROUNDED
from lcnn_compile.bench.cpu.probe import Peak
from lcnn_compile.bench.cpu.scaling_report import plot_scaling

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *(ROOT / "docs" / name for name in ("benchmarks.md", "deployment.md", "gpu.md", "zoo.md")))
PICTURE, CURVES = ROOT / "docs" / "images" / "measured.png", ROOT / "docs" / "images" / "scaling.png"
BLOCK = re.compile(r"(<!-- measured: (?P<name>[\w-]+) -->\n).*?(<!-- measured: end -->)", re.DOTALL)
NETWORKS = {
    **{"vgg16": "VGG-16", "resnet18": "ResNet-18", "resnet50": "ResNet-50", "alexnet": "AlexNet", "mobilenet": "MobileNet"},
    **{"mobilenet_v2": "MobileNetV2", "mobilenet_v3": "MobileNetV3-Large", "densenet121": "DenseNet-121", "unet": "U-Net, 256²"},
    **{"detector": "C2f detector, 320²", "edsr": "EDSR x2, 128²", "compact_sr": "Real-ESRGAN compact x4, 128²"},
}
SETTINGS = {
    "ours": "k = m/4, 54 taps, g = 8",
    "paper-fast": "the paper's fast sizes",
    "paper-accurate": "the paper's accurate sizes",
}
METHODS = {
    "dense": ("dense", "black", "P"),
    "lookups": ("lookups", "#2b6cb0", "o"),
    "uniform lookups": ("lookups, uniform sizes", "#63b3ed", "o"),
    "scratch": ("lookups from scratch", "#2c7a7b", "D"),
    "low rank": ("low rank", "#dd6b20", "s"),
    "pruned": ("pruned", "#718096", "^"),
    "int8": ("OpenVINO int8", "#805ad5", "*"),
    "bfloat16": ("OpenVINO bfloat16", "#d53f8c", "*"),
}
LOW_PRECISION = ("int8", "bfloat16")
ROUNDED_COLOUR = "#38a169"

Rows = list[dict[str, Any]]


def documents(pattern: str) -> list[dict[str, Any]]:
    """The result files that match, oldest first."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))]
    return sorted(found, key=lambda document: document["date"])


def latest(pattern: str) -> dict[str, Any]:
    """The newest result file that matches; empty where there is none."""
    return (documents(pattern) or [{}])[-1]


def comparisons(pattern: str) -> Rows:
    """Every case, setting, thread count and batch once, as measured last."""
    found = {
        (row["case"], row["setting"], row["threads"], row["batch"]): row
        for document in documents(pattern)
        for row in document["comparisons"]
    }
    return list(found.values())


def times(value: float | None) -> str:
    """A ratio with three digits at most, or a dash."""
    return "–" if value is None else f"{value:.2f}x" if value < 3 else f"{value:.1f}x"


def markdown(headings: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A Markdown table; all columns but the first two to the right."""
    names = list(headings)
    rule = ["---", "---", *["---:"] * (len(names) - 2)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (names, rule, *lines)) + "\n"


def faster(row: dict[str, Any]) -> str:
    """The speed-up of our fastest form, and in brackets that of ``torch.compile`` where it is another."""
    compiled = row.get("speedup_compiled")
    rest = "" if compiled is None or compiled == row["speedup"] else f" ({times(compiled)})"
    return f"**{times(row['speedup'])}**{rest}"


def against_int8(row: dict[str, Any]) -> str:
    """int8's time over ours: of float32, and behind a slash of bfloat16."""
    rounded = row.get("speedup_bf16_int8")
    return times(row["speedup_int8"]) + (f" / {times(rounded)}" if rounded else "")


def speed_table(rows: Rows, what: str, batch: int = 1, most: int = 2) -> str:
    """Speed-ups per case and setting, a column for each number of threads; bfloat16 and int8 beside it up to ``most`` threads."""
    rows = [row for row in rows if row["batch"] == batch]
    threads = sorted({row["threads"] for row in rows})
    few = [n for n in threads if n <= most]
    rounded = any(row.get("speedup_bf16") for row in rows)
    lines: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["case"], row["setting"]), {})[row["threads"]] = row
    heading = [what, "sizes", "fewer multiply-adds", *(f"{n} thread{'s' * (n > 1)}" for n in threads)]
    if rounded:
        heading += [f"bfloat16, {n} thread{'s' * (n > 1)}" for n in few]
    if any(row["speedup_int8"] for row in rows):
        heading += [f"against int8, {n} thread{'s' * (n > 1)}" for n in few]

    def cells(case: str, setting: str, found: dict[int, dict[str, Any]]) -> list[str]:
        ratio = next(iter(found.values()))["mac_ratio"]
        cell = [NETWORKS.get(case, case), SETTINGS.get(setting, setting), f"{ratio:.1f}x"]
        cell += [faster(found[n]) if n in found else "–" for n in threads]
        if rounded:
            cell += [f"**{times(found[n]['speedup_bf16'])}**" if n in found else "–" for n in few]
        return cell + [against_int8(found[n]) if n in found else "–" for n in few][: len(heading) - len(cell)]

    return markdown(heading, (cells(*key, found) for key, found in lines.items()))


def eight_bits(pattern: str) -> str:
    """Every engine as times faster than the best float32 one: int8, lookups in float32, lookups in eight bits."""
    rows = [row for row in comparisons(pattern) if row.get("speedup_bytes") and row["setting"] in ("ours", "paper-fast")]
    lines = []
    for row in rows:
        int8, ours = row.get("speedup_bytes_int8"), row["speedup_bytes"]
        error = (
            f"{row['error_int8']:.2g} / {row['error_bytes']:.2g}" if row.get("error_int8") else f"– / {row['error_bytes']:.2g}"
        )
        dense = times(ours / int8) if int8 else "–"
        cells = [NETWORKS.get(row["case"], row["case"]), SETTINGS.get(row["setting"], row["setting"]), dense]
        lines.append([*cells, f"**{times(row['speedup'])}**", f"**{times(ours)}**", f"**{times(int8)}**", error])
    heading = [
        "network",
        "sizes",
        "OpenVINO int8",
        "lookups, float32",
        "lookups, int8",
        "these against OpenVINO int8",
        "distance from float64: OpenVINO int8 / ours",
    ]
    return markdown(heading, lines) if lines else ""


def networks_short() -> str:
    """The README's table: the settings that people would choose."""
    rows = [row for row in comparisons("networks*.json") if row["setting"] in ("ours", "paper-fast")]
    return speed_table([row for row in rows if row["case"] in NETWORKS], "network", most=1)


def networks_full(pattern: str = "networks*.json") -> str:
    """Every network, setting and batch."""
    rows = comparisons(pattern)
    batches = sorted({row["batch"] for row in rows})
    return "\n".join(f"Batch {batch}:\n\n{speed_table(rows, 'network', batch)}" for batch in batches)


def layers(pattern: str = "layers*.json") -> str:
    """Every single layer."""
    rows = comparisons(pattern)
    return speed_table(rows, "layer") if rows else ""


def machine(pattern: str = "networks*.json") -> str:
    """One sentence: what the networks were measured on."""
    found = documents(pattern)
    if not found:
        return ""
    document = found[-1]
    hardware, versions = document["hardware"], document["versions"]
    return (
        f"{hardware['cpu']} ({hardware['capability']}), {hardware['cores']} cores, {hardware['system']}, torch {versions['torch']}, "
        f"ONNX Runtime {versions['onnxruntime']}, OpenVINO {versions['openvino']}; {document['date'][:10]}; "
        f"`{document['command']}`.\n"
    )


def accuracy_rows(pattern: str = "accuracy*.json") -> Rows:
    """Every case of the accuracy benchmark, as measured last; none before it has run."""
    rows: Rows = latest(pattern).get("rows", [])
    return rows


def accuracy(rows: Rows) -> str:
    """Top-1, multiply-adds and time of every network of the accuracy benchmark; lookups that round stand beside their network."""
    dense = next((row for row in rows if row["case"] == "dense"), None)
    if dense is None:
        return ""
    rounded = {row["case"].removesuffix(ROUNDED): row for row in rows if row.get("precision") == "bfloat16"}

    def measured(row: dict[str, Any] | None) -> list[str]:
        spent, base = row and row.get("time"), dense.get("time")
        if not row or not spent or not base:
            return ["–", "–"]
        return [f"{1e3 * spent['seconds']:.2f} ms", times(base["seconds"] / spent["seconds"])]

    lines = []
    for row in (row for row in rows if row.get("precision") != "bfloat16"):
        fewer = "–" if row["method"] in LOW_PRECISION else times(row["reduction"])
        cells = [name_of(row), f"{row['top1']:.1f} %", fewer, *measured(row)]
        if rounded:
            twin = rounded.get(row["case"])
            cells += [f"{twin['top1']:.1f} %" if twin else "–", *measured(twin)]
        lines.append(cells)
    heading = ["network", "top-1", "fewer multiply-adds", "time", "faster"]
    return markdown(heading + ["bfloat16: top-1", "time", "faster"] * bool(rounded), lines)


def accuracy_short() -> str:
    """The README's table: dense, int8 and lookups of eight filters per group."""
    rows = [row for row in accuracy_rows() if row["method"] in ("dense", "lookups", "int8") and ordinary(row)]
    return accuracy([row for row in rows if row["method"] != "dense" or not row["epochs"]])


def ordinary(row: dict[str, Any]) -> bool:
    """Whether a case has eight filters per group and a budget of multiply-adds."""
    return row["group_size"] == 8 and row.get("budget", "macs") == "macs"


def training(pattern: str) -> str:
    """A step of training of single layers: lookups at their taps against the faster dense one."""
    rows: Rows = latest(pattern).get("rows", [])
    times_of: dict[tuple[str, str, int], float] = {}
    for row in rows:
        if row["seconds"] is not None:
            key = (row["case"], "dense" if row["setting"] == "dense" else f"{row['setting']}|{row['way']}", row["threads"])
            times_of[key] = min(row["seconds"], times_of.get(key, row["seconds"]))
    threads = sorted({row["threads"] for row in rows})
    lines = []
    for case, batch, setting in dict.fromkeys((r["case"], r["batch"], r["setting"]) for r in rows if r["setting"] != "dense"):
        cells = [case, setting, str(batch)]
        for way in ("taps", "factored"):
            for count in threads:
                dense, ours = times_of.get((case, "dense", count)), times_of.get((case, f"{setting}|{way}", count))
                cells.append(times(dense / ours if dense and ours else None))
        lines.append(cells)
    heading = [f"{way}, {n} thread{'s' * (n > 1)}" for way in ("at the taps", "factored") for n in threads]
    return markdown(["layer", "sizes", "batch", *heading], lines) if lines else ""


def scaling_alone() -> dict[str, Any]:
    """The scaling benchmark's result for one thread; empty where there is none."""
    return next((result for result in latest("scaling*.json").get("results", []) if result["threads"] == 1), {})


def scaling() -> str:
    """One layer as each of its sizes grows, one thread, with what bounds it and how near that it comes."""
    lines = []
    for point in scaling_alone().get("points", []):
        compared, limits = point["comparison"], point.get("roofline")
        cells = [point["axis"].replace("_", " "), str(point["value"]), times(compared["speedup"]), times(compared["mac_ratio"])]
        if limits:
            bound = max(("arithmetic", "loads", "traffic"), key=lambda name: limits[name])
            cells += [bound, f"{limits['reached']:.0%}"]
        lines.append(cells + ["–"] * (6 - len(cells)))
    return markdown(["grows", "to", "faster", "fewer multiply-adds", "bound by", "of that bound"], lines) if lines else ""


def peaks() -> str:
    """What the scaling benchmark found this processor to do at most, one thread."""
    peak = scaling_alone().get("peak")
    return f"{Peak.from_dict(peak)}.\n" if peak else ""


def starts() -> str:
    """Seconds to the first result, with empty caches and later."""
    rows = latest("resources*.json").get("starts", [])
    lines = [[r["case"], str(r["threads"]), f"{r['first_use']:.2f} s", f"{r['later_start']:.2f} s"] for r in rows]
    return markdown(["what", "threads", "first use", "later"], lines) if lines else ""


def memory() -> str:
    """Peak memory of warm calls on one image, over a process without a model."""
    used: dict[str, dict[str, float]] = {}
    for row in latest("resources*.json").get("memory_mib", []):
        network, _, configuration = row["case"].partition(" ")
        used.setdefault(network, {})[configuration] = row["running"] - row["before"]
    if not used:
        return ""
    columns = list(dict.fromkeys(name for row in used.values() for name in row))
    lines = [[NETWORKS[n], "MiB", *(f"{row[c]:.0f}" if c in row else "–" for c in columns)] for n, row in used.items()]
    return markdown(["network", "", *columns], lines)


def name_of(row: dict[str, Any]) -> str:
    """A case of the accuracy benchmark in words."""
    parts = [METHODS.get(row["method"], (row["method"],))[0]]
    if row["method"] not in ("dense", *LOW_PRECISION):
        counted = "time budget" if row.get("budget") == "time" else "budget"
        parts.append(f"{counted} {row['case'].split('x')[0].rpartition('-')[2]}x")
    if "lookups" in row["method"] and not ordinary(row):
        parts.append(f"g = {row['group_size']}")
    if row["epochs"]:
        parts.append(f"{row['epochs']} epochs")
    return ", ".join(parts)


TABLES: dict[str, Callable[[], str]] = {
    "networks": networks_short,
    "networks-full": networks_full,
    "layers": layers,
    "accuracy": accuracy_short,
    "accuracy-full": lambda: accuracy(accuracy_rows()),
    "machine": machine,
    "networks-zen4": lambda: networks_full("zen4/networks*.json"),
    "layers-zen4": lambda: layers("zen4/layers*.json"),
    "machine-zen4": lambda: machine("zen4/networks*.json"),
    "accuracy-zen4": lambda: accuracy(accuracy_rows("zen4/accuracy*.json")),
    "eight-bits": lambda: eight_bits("avx512-vnni/int8/networks*.json"),
    "machine-eight-bits": lambda: machine("avx512-vnni/int8/networks*.json"),
    "networks-vnni": lambda: networks_full("avx512-vnni/networks*.json"),
    "machine-vnni": lambda: machine("avx512-vnni/networks*.json"),
    "training": lambda: training("training*.json"),
    "scaling": scaling,
    "peaks": peaks,
    "starts": starts,
    "memory": memory,
    "networks-avx2": lambda: networks_full("avx2/networks*.json"),
    "layers-avx2": lambda: layers("avx2/layers*.json"),
    "machine-avx2": lambda: machine("avx2/networks*.json"),
    "accuracy-avx2": lambda: accuracy(accuracy_rows("avx2/accuracy*.json")),
    "training-avx2": lambda: training("avx2/training*.json"),
    **readme_gpu.TABLES,
    **readme_native.TABLES,
    **readme_zoo.TABLES,
}


def written(text: str) -> str:
    """``text`` with every measured table as the results say; a table without results stays as it is."""

    def block(found: re.Match[str]) -> str:
        table = TABLES[found["name"]]()
        return f"{found[1]}{table}{found[3]}" if table else found[0]

    return BLOCK.sub(block, text)


def draw(path: Path) -> None:
    """The README's picture: speed of whole networks, and where it was measured, accuracy against time."""
    from matplotlib.figure import Figure

    timed = [row for row in accuracy_rows() if row.get("time")]
    figure = Figure(figsize=(13 if timed else 9, 3.4), layout="constrained")
    axes = figure.subplots(1, 2 if timed else 1, squeeze=False)[0]
    draw_speed(axes[0])
    if timed:
        draw_accuracy(axes[1], timed)
    figure.savefig(path, dpi=150)


def draw_accuracy(axes: Any, rows: Rows) -> None:
    """Top-1 against time of one network on CIFAR-10; lines join budgets of the same kind."""
    for method, (label, colour, marker) in METHODS.items():
        for tuned, rounded in itertools.product((False, True), repeat=2):
            mine = [r for r in rows if r["method"] == method and bool(r["epochs"]) == tuned and ordinary(r)]
            mine = [r for r in mine if (r.get("precision") == "bfloat16") == rounded and (method == "lookups" or not rounded)]
            points = sorted((1e3 * r["time"]["seconds"], r["top1"]) for r in mine)
            if points and not (tuned and method == "dense"):
                text = f"{label}, fine-tuned" if tuned and method != "scratch" else label
                full = tuned or method in ("dense", *LOW_PRECISION)
                shade = ROUNDED_COLOUR if rounded else colour
                text += ", bfloat16" * rounded
                style = {"color": shade, "marker": marker, "markerfacecolor": shade if full else "white"}
                axes.plot(*zip(*points, strict=True), label=text, linestyle="-" if full else ":", markersize=7, **style)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axes.set_xlabel("milliseconds per image, CIFAR-10 (1 thread, batch 1)")
    axes.set_ylabel("top-1, %")
    axes.set_ylim(bottom=max(min(row["top1"] for row in rows) - 1, max(row["top1"] for row in rows) - 15))
    axes.grid(True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_speed(axes: Any) -> None:
    """Speed-up of whole networks over the best float32 engine, beside int8."""
    rows = [r for r in comparisons("networks*.json") if r["setting"] == "ours" and r["batch"] == 1 and r["case"] in NETWORKS]
    rows = sorted((row for row in rows if row["threads"] == 1 and row["speedup"]), key=lambda row: row["speedup"])
    places = range(len(rows))
    int8 = [row["speedup"] / row["speedup_int8"] if row["speedup_int8"] else 0.0 for row in rows]
    for offset, values, colour, label in (
        (0.27, [row["speedup"] for row in rows], "#2b6cb0", "lookups, float32"),
        (0.0, [row.get("speedup_bf16") or 0.0 for row in rows], "#63b3ed", "lookups, bfloat16"),
        (-0.27, int8, "#cbd5e0", "OpenVINO int8"),
    ):
        bars = axes.barh([place + offset for place in places], values, 0.25, color=colour, label=label)
        axes.bar_label(bars, [times(value) if value else "" for value in values], padding=3, fontsize=8)
    axes.set_yticks(list(places), [NETWORKS[row["case"]] for row in rows])
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("times faster than the best float32 engine (1 thread, batch 1)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower right")


def main() -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a table is out of date")
    check = parser.parse_args().check
    stale = [page for page in PAGES if written(page.read_text()) != page.read_text()]
    if check:
        for page in stale:
            print(f"{page.relative_to(ROOT)} does not say what benchmarks/results does; run: make readme", file=sys.stderr)
        return 1 if stale else 0
    for page in stale:
        page.write_text(written(page.read_text()))
    draw(PICTURE)
    if curves := latest("scaling*.json"):
        plot_scaling(curves["results"], CURVES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
