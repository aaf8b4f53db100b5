"""``contiguous`` and ``reshape`` copy where they must: what is written to the copy, or to its source later, stays apart."""

import copy

import pytest
import torch
from torch import nn

from lcnn_compile import LookupConfig, convert


class Copies(nn.Module):
    def __init__(self, form, source):
        super().__init__()
        self.conv, self.form, self.source = nn.Conv2d(8, 8, 3, padding=1), form, source

    def forward(self, x):
        y = self.conv(x).to(memory_format=torch.channels_last)
        z = self.form(y)
        first = z.sum()
        (y if self.source else z).add_(1)
        return first, z, y


FORMS = [lambda y: y.contiguous(), lambda y: y.reshape(y.shape[0], -1), lambda y: y.flatten(1)]


@pytest.mark.parametrize("source", [False, True], ids=["copy", "source"])
@pytest.mark.parametrize("form", FORMS, ids=["contiguous", "reshape", "flatten"])
def test_copy_is_not_made_anew(form, source):
    torch.manual_seed(0)
    torch._dynamo.reset()
    dense, x = Copies(form, source).eval(), torch.randn(2, 8, 6, 6)
    config = LookupConfig(dictionary_size=1.0, sparsity=None, lowering="lookup")
    compiled = torch.compile(convert(copy.deepcopy(dense), config, calibration=[x]), backend="lcnn")
    with torch.no_grad():
        for got, expected in zip(compiled(x), copy.deepcopy(dense).double()(x.double()), strict=True):
            torch.testing.assert_close(got.double(), expected, atol=1e-3, rtol=1e-3)
