"""The tables of docs/zoo.md, from results/zoo-torch-*.json: the newest torch in full, others in the summary and among what is not right."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
WAYS = {"convert": "convert", "compile": "compile", "dense": "one line", "freeze": "freeze", "pt2": "export", "onnx": "ONNX"}
COMPILED = ("compile", "dense", "freeze")
"""The ways on which a compiler gets what lookups leave."""
REASONS = {"depthwise": "depthwise", "linear layers": "linear"}
"""The beginnings of the commonest reasons, in a word; linear layers are not converted unless they are named."""

Row = dict[str, Any]


def records() -> list[Row]:
    """The results of each version of torch, the newest first."""
    found: list[Row] = [json.loads(path.read_text()) for path in RESULTS.glob("zoo-torch-*.json")]
    return sorted(
        found, key=lambda record: [int(part) for part in re.findall(r"\d+", record["versions"]["torch"])[:3]], reverse=True
    )


def ways_of(rows: list[Row]) -> list[str]:
    """The ways that some row has gone."""
    return [way for way in WAYS if any(way in row["ways"] for row in rows)]


def short(reason: str) -> str:
    """A reason in a word or two, where it has one."""
    kind, own, _ = reason.partition(" has a forward of its own")
    return f"{kind} of its own" if own else next((word for start, word in REASONS.items() if reason.startswith(start)), reason)


def cell(found: Row | None) -> str:
    """How one way went: seconds where the result is right, with an i where Inductor compiled the rest."""
    if found is None:
        return "–"
    if found["state"] == "right":
        return f"{found['seconds']:.0f} s" + (" i" if with_inductor(found) else "")
    return {"upstream": "upstream", "stopped": "too slow", "dense": "dense"}.get(found["state"], f"**{found['state']}**")


def with_inductor(found: Row) -> bool:
    """Whether Inductor compiled what lookups leave of a graph; a network that is one program needs no compiler."""
    return found["way"] in COMPILED and found.get("compiler") == "inductor" and not found.get("alone")


def table() -> str:
    """Every architecture: layers replaced, layers dense and why, whether it is one program, and each way's seconds."""
    if not records():
        return ""
    rows = records()[0]["rows"]
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
                *(cell(seen[way] | {"way": way} if way in seen else None) for way in ways),
            ]
        )
    rule = ["---"] * 2 + ["---:"] + ["---"] * 2 + ["---:"] * (len(headings) - 5)
    return "\n".join("| " + " | ".join(line) + " |" for line in (headings, rule, *lines)) + "\n"


def summary() -> str:
    """How many there are of each state, with what they were run."""
    return "\n\n".join(paragraph(record) for record in records()) + "\n"


def paragraph(record: Row) -> str:
    """The sum of one version's results."""
    rows = record["rows"]
    parts = []
    for way in ways_of(rows):
        states = Counter(row["ways"][way]["state"] for row in rows if way in row["ways"])
        parts.append(f"{WAYS[way]}: " + ", ".join(f"{count} {state}" for state, count in states.most_common()))
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    compiled = [
        found | {"way": way} for row in rows for way, found in row["ways"].items() if way in COMPILED and "ratio" in found
    ]
    inductor = sum(map(with_inductor, compiled))
    return (
        f"**torch {record['versions']['torch'].partition('+')[0]}**: {len(rows)} architectures. {'; '.join(parts)}. "
        f"Inductor compiled {inductor} of {len(compiled)} (i in the table), the others ran without it. {versions}; {record['date'][:10]}."
    )


def messages() -> str:
    """What is not right, and why."""
    lines = [
        f"| {record['versions']['torch'].partition('+')[0]} | {row['name']} | {WAYS[way]} | {found['state']} | "
        f"{found.get('message', '').replace('|', '/')[:200]} |"
        for record in records()
        for row in record["rows"]
        for way, found in row["ways"].items()
        if found["state"] not in ("right", "dense")
    ]
    head = ["| torch | architecture | way | state | what PyTorch or lcnn_compile says |", "| --- | --- | --- | --- | --- |"]
    return "\n".join([*head, *lines]) + "\n" if lines else "Nothing.\n"


TABLES: dict[str, Callable[[], str]] = {"zoo": table, "zoo-summary": summary, "zoo-messages": messages}
