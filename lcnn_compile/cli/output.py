"""Where a command writes: results to standard output, as text or as JSON, everything else to standard error."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

from rich.console import Console

from lcnn_compile.errors import LcnnWarning

WIDTH = 140
"""Columns of tables that go to a file."""


class Output:
    """The two streams of one command."""

    def __init__(self, results: TextIO, as_json: bool):
        self._results, self._as_json = results, as_json
        self.errors = Console(stderr=True)

    def result(self, shown: Any, data: dict[str, Any]) -> None:
        """The command's result: something that rich can print, or with --json the data."""
        if self._as_json:
            print(json.dumps(data), file=self._results, flush=True)
        else:
            console = Console(file=self._results)
            (console if console.is_terminal else Console(file=self._results, width=WIDTH)).print(shown)

    def note(self, text: str) -> None:
        """A remark for the user."""
        self.errors.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def output(as_json: bool) -> Iterator[Output]:
    """The streams; whatever the user's own code prints meanwhile goes to standard error, and our warnings are one line each."""
    results = sys.stdout
    made = Output(results, as_json)
    shown = warnings.showwarning

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: str | None = None) -> None:
        if issubclass(category, LcnnWarning):
            made.errors.print(f"warning: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        else:
            shown(message, category, filename, lineno, file, line)

    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.showwarning = show
        warnings.simplefilter("always", LcnnWarning)
        yield made
