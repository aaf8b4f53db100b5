"""ONNX of weights that a model reads as tensors beside the convolutions that look them up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcnn_compile import LookupConfig, convert
from lcnn_compile.export import export_onnx
from lcnn_compile.kernels.reference import tap_filter_groups


class Reused(nn.Module):
    """A layer whose weight another call uses with other settings."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + F.conv2d(x, self.layer.weight, self.layer.bias, padding=2, dilation=2)


def test_weight_that_is_formed_in_the_graph_is_written(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, x = Reused().eval(), torch.randn(2, 6, 9, 9)
    same = convert(model, LookupConfig(dictionary_size=1.0, sparsity=None, lowering="lookup"), calibration=[x])
    assert same.lcnn_report.replaced
    path = tmp_path / "model.onnx"
    export_onnx(same, path, x)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    wanted = model.double()(x.double()).detach()
    torch.testing.assert_close(torch.from_numpy(found).double(), wanted, atol=1e-5, rtol=1e-5)


def test_groups_of_taps_skip_empty_groups() -> None:
    offsets = torch.tensor([0, 0, 2, 2, 5, 5], dtype=torch.int32)
    assert tap_filter_groups(offsets, 5).tolist() == [1, 1, 3, 3, 3]
    assert tap_filter_groups(torch.tensor([0, 0]), 0).tolist() == []
