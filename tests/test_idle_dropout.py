"""Dropout in evaluation mode returns its input itself, so a write to its result is a write to what went in."""

import copy

import pytest
import torch
from torch import nn

from lcnn_compile import LookupConfig, convert, freeze


class DoubledBehindDropout(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.a, self.b, self.dropout = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), dropout

    def forward(self, x):
        y = self.a(x)
        self.dropout(y).mul_(2)
        return self.b(y), y


@pytest.mark.parametrize("dropout", [nn.Dropout(0.5), nn.Dropout2d(0.5), nn.Dropout(0.5, inplace=True), nn.AlphaDropout(0.5)])
def test_write_behind_idle_dropout_is_kept(dropout):
    torch.manual_seed(0)
    dense, x = DoubledBehindDropout(dropout).eval(), torch.randn(2, 8, 6, 6)
    config = LookupConfig(dictionary_size=1.0, sparsity=None, lowering="lookup")
    frozen = freeze(convert(copy.deepcopy(dense), config, calibration=[x]), (x,))
    wide = copy.deepcopy(dense).double()
    with torch.no_grad():
        for got, expected in zip(frozen(x), wide(x.double()), strict=True):
            torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-4)
