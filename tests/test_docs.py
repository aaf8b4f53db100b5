"""Every snippet of README.md and docs/ runs, every relative link leads somewhere, and tables say what was measured."""

import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from unittest import SkipTest

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from typer.testing import CliRunner

from lcnn_compile import LcnnError, LookupConfig
from lcnn_compile.cli import cli

ROOT = Path(__file__).parent.parent
PAGES = sorted(page for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")))
LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)|(?:src|href)=\"(?P<source>[^\"]+)\"")
KNOWN = {"python", "console", "json", "text", "cpp", "toml", "toctree", "eval-rst", "bash"}


def run_console(example):
    """Run the lines that call our own command line; targets of make must exist; nothing else may stand there."""
    for line in example.parsed.replace("\\\n", " ").splitlines():
        if not line.startswith("$ "):
            continue
        command, *arguments = shlex.split(line[2:], comments=True)
        if command == "lcnn-compile":
            result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
            assert result.exit_code == 0, f"{line}\n{result.output}"
        elif command == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(arguments) <= set(targets), line
        elif command == "pip":
            extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
            assert set(",".join(re.findall(r"\[([\w,]+)\]", line)).split(",")) <= {*extras, ""}, line
        else:
            raise AssertionError(f"a console block may call lcnn-compile, make and pip, not {command!r}")


def run_json(example):
    """Every JSON block is a configuration."""
    LookupConfig.from_dict(json.loads(example.parsed))


def available(*packages):
    return all(find_spec(package) for package in packages)


sybil = Sybil(
    parsers=[
        PythonCodeBlockParser(),
        CodeBlockParser("console", run_console),
        CodeBlockParser("json", run_json),
        SkipParser(),
    ]
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_snippets_run(page, tmp_path, monkeypatch, backend_reset):
    monkeypatch.chdir(tmp_path)
    document = sybil.parse(page)
    document.namespace["available"] = available
    with torch.random.fork_rng(devices=[]):
        for example in document.examples():
            with suppress(SkipTest):  # one example, not the page
                example.evaluate()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_say_their_language(page):
    fences = re.findall(r"^```+\{?([\w-]*)", page.read_text(), re.MULTILINE)
    assert set(fences[::2]) <= KNOWN


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    for found in LINK.finditer(re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)):
        target = found["target"] or found["source"]
        if not re.match(r"(https?:|mailto:|#)", target):
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize(
    "block", ["python\nassert 1 + 1 == 3", "console\n$ lcnn-compile explain nowhere:build", 'json\n{"sparsity": -1}']
)
def test_a_snippet_that_fails_is_seen(block, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"```{block}\n```\n")
    (example,) = sybil.parse(page).examples()
    with pytest.raises((AssertionError, LcnnError)):
        example.evaluate()


def test_tables_say_what_was_measured():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "readme.py"), "--check"], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
