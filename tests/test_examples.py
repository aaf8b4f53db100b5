"""The examples run, and their lookup networks are as good as they say."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lcnn_compile import LookupConfig, convert
from lcnn_compile.export import export_native

FOLDER = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    """Import an example as it imports its neighbours."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_super_resolution(example, capsys):
    dense, converted, distilled = example("super_resolution").main(width=12, steps=8, epochs=1, compiled=False)
    assert dense > 10
    assert min(converted, distilled) > dense - 2
    assert "ConvTranspose2d" not in capsys.readouterr().out.split("million multiply-adds")[-1]


def test_audio(example, capsys):
    dense, lookup = example("audio").main(width=16, steps=12, compiled=False)
    assert dense > 0.3
    assert lookup > dense - 0.2
    assert "lookup" in capsys.readouterr().out


def test_few_shot(example, capsys):
    found = example("few_shot").main(resamples=2, trials=1, rates=((0.003, 0.0), (0.003, 0.01)), iterations=40)
    assert [len(scores) for scores in found.values()] == [2, 2]
    assert all(score > 25 for scores in found.values() for score in scores)  # of five classes
    assert "difference over 2 resamples" in capsys.readouterr().out


def test_few_iterations(example, capsys):
    [scores] = example("few_iteration").main(steps=(6,), seeds=2, iterations=6).values()
    assert set(scores) == {"random", "carried over", "carried over and frozen"}
    assert all(0 < value <= 100 for values in scores.values() for value in values)
    assert "6 lookup layers after 6 iterations" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["transformers_resnet", "transformers_convnext", "transformers_detector"])
def test_transformers(example, name):
    pytest.importorskip("transformers")
    assert example(name).main(width=16, size=64, compiled=False) < 0.5


def test_web_service(example, tmp_path):
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    torch.manual_seed(0)
    model = convert(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval(), LookupConfig(dictionary_size=1.0, sparsity=None)
    )
    export_native(model, tmp_path, torch.randn(1, 3, 9, 9))
    found = example("web_service").measure(tmp_path, threads=1, clients=2, seconds=0.5)
    assert found["requests per second"] > 0
