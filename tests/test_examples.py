"""The examples run, and their lookup networks are as good as they say."""

import importlib
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("name", ["transformers_resnet", "transformers_convnext", "transformers_detector"])
def test_transformers(example, name):
    pytest.importorskip("transformers")
    assert example(name).main(width=16, size=64, compiled=False) < 0.5
