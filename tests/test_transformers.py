"""Vision networks of Hugging Face transformers, built from configurations, through convert, the backend and files."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lcnn_compile import LookupConfig, convert, explain, load, save
from lcnn_compile.testing import assert_equivalent

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

NAMES = ("resnet", "convnext", "detector")


def build(name):
    return __import__(f"transformers_{name}").build(16)


def images(count):
    return {"pixel_values": torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(count))}


@pytest.mark.parametrize("name", NAMES)
def test_convert_explain_save_and_load(name, tmp_path):
    model = build(name)
    config = LookupConfig(dictionary_size=0.5, sparsity=4, group_size=4)
    planned = {row.name: row for row in explain(model, config, example_inputs=images(1))}
    converted = convert(model, config, calibration=[images(4)])
    assert converted.lcnn_report.replaced
    for row in converted.lcnn_report:
        assert planned[row.name].macs_before == row.macs_before
        layer = model.get_submodule(row.name)
        if row.replaced:
            assert row.error is not None
            assert 0 <= row.error < float("inf")
            assert row.macs_after == planned[row.name].macs_after
        elif isinstance(layer, nn.Conv2d):
            assert "depthwise" in row.reason or "too few input channels" in row.reason
        else:
            assert "include" in row.reason or "attention" in row.reason
    save(converted, tmp_path / "m.safetensors")
    loaded = load(build(name), tmp_path / "m.safetensors")
    with torch.no_grad():
        for a, b in zip(loaded(**images(2)).to_tuple(), converted(**images(2)).to_tuple(), strict=True):
            assert not isinstance(a, torch.Tensor) or torch.equal(a, b)


@pytest.mark.parametrize("name", ["resnet", "convnext"])
def test_lossless_conversion(name):
    model = build(name)
    converted = convert(model, LookupConfig(dictionary_size=1.0, sparsity=None), calibration=[images(2)])
    x = images(2)["pixel_values"]
    assert_equivalent(model, converted, (x,), factor=64)


def test_backend(backend_reset):
    model = build("resnet")
    converted = convert(model, LookupConfig(dictionary_size=0.5, sparsity=4), calibration=[images(4)])
    compiled = torch.compile(converted, backend="lcnn")
    assert_equivalent(converted, compiled, (images(2)["pixel_values"],), factor=64)
