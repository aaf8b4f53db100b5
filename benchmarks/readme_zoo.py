"""The tables of docs/zoo.md, from results/zoo.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent / "results" / "zoo.json"
WAYS = {"convert": "convert", "compile": "compile", "dense": "one line", "freeze": "freeze", "pt2": "export", "onnx": "ONNX"}
REASONS = {"depthwise": "depthwise", "linear layers": "linear"}
"""The beginnings of the commonest reasons, in a word; linear layers are not converted unless they are named."""

Row = dict[str, Any]


def record() -> Row:
    """The results; empty before anything was run."""
    found: Row = json.loads(FILE.read_text()) if FILE.exists() else {}
    return found


def ways_of(rows: list[Row]) -> list[str]:
    """The ways that some row has gone."""
    return [way for way in WAYS if any(way in row["ways"] for row in rows)]


def short(reason: str) -> str:
    """A reason in a word or two, where it has one."""
    kind, own, _ = reason.partition(" has a forward of its own")
    return f"{kind} of its own" if own else next((word for start, word in REASONS.items() if reason.startswith(start)), reason)


def cell(found: Row | None) -> str:
    """How one way went: seconds where the result is right."""
    if found is None:
        return "–"
    if found["state"] == "right":
        return f"{found['seconds']:.0f} s"
    return {"upstream": "upstream", "stopped": "too slow", "dense": "dense"}.get(found["state"], f"**{found['state']}**")


def table() -> str:
    """Every architecture: layers replaced, layers dense and why, whether it is one program, and each way's seconds."""
    rows = record().get("rows", [])
    if not rows:
        return ""
    ways = ways_of(rows)
    headings = ["architecture", "family", "lookups", "dense", "one program", "worst error", *(WAYS[way] for way in ways)]
    lines = []
    for row in rows:
        seen = row["ways"]
        converted, frozen = seen.get("convert", {}), seen.get("freeze", {})
        dense = Counter[str]()
        for reason, count in converted.get("dense_layers", {}).items():
            dense[short(reason)] += count
        ratios = [found["ratio"] for found in seen.values() if found["state"] == "right"]
        lines.append(
            [
                row["name"],
                row["family"],
                str(converted.get("replaced", "–")),
                ", ".join(f"{count} {word}" for word, count in dense.most_common()) or "–",
                {True: "yes", False: "no"}.get(frozen.get("alone"), "–"),  # type: ignore[call-overload]
                f"{max(ratios):.1f}" if ratios else "–",
                *(cell(seen.get(way)) for way in ways),
            ]
        )
    rule = ["---"] * 2 + ["---:"] + ["---"] * 2 + ["---:"] * (len(headings) - 5)
    return "\n".join("| " + " | ".join(line) + " |" for line in (headings, rule, *lines)) + "\n"


def summary() -> str:
    """How many there are of each state, with what they were run."""
    document = record()
    rows = document.get("rows", [])
    if not rows:
        return ""
    lines = []
    for way in ways_of(rows):
        states = Counter(row["ways"][way]["state"] for row in rows if way in row["ways"])
        lines.append(f"{WAYS[way]}: " + ", ".join(f"{count} {state}" for state, count in states.most_common()))
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    compilers = Counter(
        found.get("compiler") for row in rows for way, found in row["ways"].items() if way in ("compile", "dense")
    )
    eager = f" {compilers['eager']} of {compilers.total()} compilations ran without Inductor." if compilers["eager"] else ""
    return f"{len(rows)} architectures. {'; '.join(lines)}.{eager} {versions}; {document['date'][:10]}.\n"


def messages() -> str:
    """What is not right, and why."""
    lines = [
        f"| {row['name']} | {WAYS[way]} | {found['state']} | {found.get('message', '').replace('|', '/')[:200]} |"
        for row in record().get("rows", [])
        for way, found in row["ways"].items()
        if found["state"] not in ("right", "dense")
    ]
    return (
        "\n".join(["| architecture | way | state | what PyTorch or lcnn_compile says |", "| --- | --- | --- | --- |", *lines])
        + "\n"
    )


TABLES: dict[str, Callable[[], str]] = {"zoo": table, "zoo-summary": summary, "zoo-messages": messages}
