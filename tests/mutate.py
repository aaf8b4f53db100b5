"""Break the code in the ways of mutations.toml, one at a time in a copy of the tree, and see that the tests notice each.

``make mutate`` runs them all, for an hour or more; ``python tests/mutate.py WORD …`` those of the suites that are named, or whose
file or text contains a word.
A mutation whose old text is not found exactly once is an error: the table is out of date then. So is a suite that fails
before anything is broken. Ends with 1 where a mutation survives.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
TIMEOUT = 900


@dataclass(frozen=True)
class Mutation:
    """One way to break a file."""

    suite: str
    file: str
    old: str
    new: str

    def apply(self, tree: Path) -> str:
        """Break the file in ``tree``; what was in it before."""
        path = tree / "lcnn_compile" / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise SystemExit(
                f"{self.file} has this text {text.count(self.old)} times, not once; mend mutations.toml:\n{self.old}"
            )
        path.write_text(text.replace(self.old, self.new))
        return text

    def __str__(self) -> str:
        def short(text: str) -> str:
            return " ".join(text.split())[:70] or "(nothing)"

        return f"{self.file}: {short(self.old)}  ->  {short(self.new)}"


def read() -> tuple[dict[str, str], list[Mutation]]:
    """The suites and the mutations of the table, each checked against the tree."""
    table = tomllib.loads((ROOT / "tests" / "mutations.toml").read_text())
    found = [Mutation(suite, **entry) for suite, entries in table["mutations"].items() for entry in entries]
    for mutation in found:
        with tempfile.TemporaryDirectory() as name:
            copy = Path(name) / "lcnn_compile" / mutation.file
            copy.parent.mkdir(parents=True)
            shutil.copy(ROOT / "lcnn_compile" / mutation.file, copy)
            mutation.apply(Path(name))
    return table["suites"], found


def run(tree: Path, command: str) -> int:
    """pytest's exit status for a suite in ``tree``; negative where it crashed or hung."""
    compiler = tree / "cxx"
    compiler.write_text('#!/bin/sh\nexec c++ "$@" -O1\n')  # wrong code shows as well, in half the time
    compiler.chmod(0o755)
    places = {"PYTHONPATH": str(tree), "LCNN_CACHE_DIR": str(tree / "cache"), "CXX": str(compiler)}
    environment = {**os.environ, **places}
    pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(command)]
    try:
        done = subprocess.run(pytest, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return -1
    return 1 if "ERROR collecting" in done.stdout else done.returncode


def main(wanted: list[str]) -> int:
    """Run the mutations that contain one of the wanted words, or all; the number of survivors decides the exit status."""
    suites, mutations = read()
    if wanted:
        names = set(wanted) & set(suites)
        words = set(wanted) - names
        mutations = [m for m in mutations if m.suite in names or any(word in f"{m.file} {m.old}" for word in words)]
    survivors: list[Mutation] = []
    with tempfile.TemporaryDirectory(prefix="lcnn-mutate-") as name:
        tree = Path(name)
        for part in ("lcnn_compile", "tests", "examples"):
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        sound: set[str] = set()
        for number, mutation in enumerate(mutations, 1):
            suite = mutation.suite
            if suite not in sound and (status := run(tree, suites[suite])):
                raise SystemExit(f"the suite {suite!r} fails (status {status}) before anything is broken: {suites[suite]}")
            sound.add(suite)
            text = mutation.apply(tree)
            status = run(tree, suites[mutation.suite])
            (tree / "lcnn_compile" / mutation.file).write_text(text)
            if 2 <= status <= 5:
                raise SystemExit(f"pytest could not run {suites[mutation.suite]!r} (status {status}) for {mutation}")
            survivors += [] if status else [mutation]
            print(f"[{number}/{len(mutations)}] {'noticed' if status else 'SURVIVED'}  {mutation}", flush=True)
    print(f"{len(mutations) - len(survivors)} of {len(mutations)} mutations were noticed")
    for mutation in survivors:
        print(f"survived: [{mutation.suite}] {mutation}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
