"""What the distributions hold and what versions the project is built with."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import lcnn_compile

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NAME = re.compile(r"[A-Za-z0-9_.-]+")


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_everything_that_is_not_python_is_package_data():
    package = ROOT / "lcnn_compile"
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["lcnn_compile"]
    files = [str(f.relative_to(package)) for f in package.rglob("*") if f.is_file() and f.suffix not in (".py", ".pyc")]
    assert {"py.typed", "kernels/cpu/src/interface.cpp"} <= set(files)
    assert [f for f in files if not any(fnmatch.fnmatch(f, pattern) for pattern in patterns)] == []


ALONE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
from lcnn_compile.cli import app
"""
SERVED = """
from pathlib import Path
import torch, lcnn_compile
assert Path(lcnn_compile.__file__).is_relative_to(Path.cwd())
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Conv2d(5, 7, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(7, 6, 3)).eval()
x = torch.randn(3, 5, 9, 7)
config = lcnn_compile.LookupConfig(dictionary_size=1.0, sparsity=None)
converted = lcnn_compile.convert(model, config, calibration=[x])
lcnn_compile.save(converted, "model.lcnn")
frozen = lcnn_compile.freeze(lcnn_compile.load(model, "model.lcnn"), x)
with torch.no_grad():
    torch.testing.assert_close(frozen(x), model(x), atol=1e-4, rtol=1e-4)
assert not [name for name in sys.modules if name.startswith("lcnn_compile.bench")]
"""


def test_a_model_is_served_without_the_benchmarks(tmp_path):
    """The package as it is, but for the folder that only ``lcnn-compile bench`` needs."""
    shutil.copytree(ROOT / "lcnn_compile", tmp_path / "lcnn_compile", ignore=shutil.ignore_patterns("bench", "__pycache__"))

    def run(*lines, words=()):
        code = "\n".join((ALONE, *lines))
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)

    served = run(SERVED)
    assert served.returncode == 0, served.stderr
    shown = run("app()", words=["--help"])
    assert shown.returncode == 0, shown.stderr
    assert all(command in shown.stdout for command in ("convert", "export", "bench"))
    refused = run("app()", words=["bench", "layers", "--quick"])
    assert refused.returncode == 2, refused.stdout
    assert "lcnn-compile[bench]" in refused.stderr


def test_what_the_project_needs_is_pinned():
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = {
        canonical(NAME.match(need)[0]) for group in (PROJECT["project"]["dependencies"], *extras.values()) for need in group
    }
    pinned = {canonical(name) for name in pins()}
    assert wanted - {"lcnn-compile"} <= pinned


def test_commits_are_checked_by_the_pinned_versions():
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    found = re.findall(r"([\w-]+)==([\w.]+)", text)
    assert found
    assert {name: pins()[name] for name, _ in found} == dict(found)


def test_the_architecture_page_has_every_room_in_the_order_of_the_contract():
    contract = PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    # `aot` is no room: it is a name of version 0.1.
    layers = [[name.strip() for name in layer.split("|") if name.strip() != "aot"] for layer in contract]
    ground = layers.index(["batches"])
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)/?`(?:, `(\w+)`)? \|", page.split("\n## ")[1], re.MULTILINE)
    assert [name for row in rows for name in row if name] == [name for layer in layers[:ground] for name in layer]
    picture = (ROOT / "docs" / "images" / "architecture.svg").read_text()
    for name in (name for layer in layers for name in layer if name not in ("progress", "timing")):
        assert re.search(rf"\b{name}\b", picture), name


def test_every_folder_says_what_it_may_import():
    folders = [path for path in (ROOT / "lcnn_compile").rglob("__init__.py") if path.parent != ROOT / "lcnn_compile"]
    assert len(folders) > 15
    assert [str(path) for path in folders if "ay import" not in path.read_text().split('"""')[1]] == []


def test_no_file_repeats_the_name_of_its_folder():
    files = (ROOT / "lcnn_compile").rglob("*.*")
    assert [str(path) for path in files if path.stem == path.parent.name or path.stem.startswith(f"{path.parent.name}_")] == []


def test_the_version_is_in_the_changelog():
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert first == lcnn_compile.__version__


PRIVATE = re.compile(
    r"\btorch(?:\.\w+)*\._[a-zA-Z]\w*|\bfrom torch[\w.]* import [^\n]*\b_\w+|\bnn(?:\.\w+)+\._[a-zA-Z]\w*|\.(?:_modules|_parameters|_buffers|_version)\b"
)


def test_what_is_private_in_torch_is_touched_in_one_file():
    package = ROOT / "lcnn_compile"
    touched = {
        f"{path.relative_to(package)}: {found}"
        for path in package.rglob("*.py")
        if path.name != "torch_private.py"
        for line in path.read_text().splitlines()
        if "``" not in line
        for found in PRIVATE.findall(line)
    }
    assert touched == set()
    assert PRIVATE.findall((package / "torch_private.py").read_text())
