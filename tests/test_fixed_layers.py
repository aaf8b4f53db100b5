"""Recurrent layers and attention are in the totals of reports and budgets, counted by the arithmetic of their definitions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lcnn_compile import LookupConfig, convert, explain
from lcnn_compile.errors import ConversionError


class Reader(nn.Module):
    """Convolutions, then a recurrent layer over columns, as text recognisers have."""

    def __init__(self, kind=nn.LSTM, first=True, **options):
        super().__init__()
        torch.manual_seed(0)
        self.first = first
        self.conv = nn.Conv2d(1, 24, 3, padding=1)
        self.wide = nn.Conv2d(24, 24, 3, padding=1)
        self.rnn = kind(24, 10, batch_first=first, **options)

    def forward(self, x):
        columns = F.relu(self.wide(F.relu(self.conv(x)))).mean(2).transpose(1, 2)
        return self.rnn(columns if self.first else columns.transpose(0, 1))[0]


LINES = F.interpolate(torch.randn(3, 1, 3, 5, generator=torch.Generator().manual_seed(1)), size=(8, 21), mode="bicubic")


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("both", [True, False])
def test_recurrent_layers_count_every_step(kind, gates, first, both):
    report = explain(Reader(kind, first, bidirectional=both, num_layers=2), example_inputs=(LINES,))
    row = report["rnn"]
    directions = 2 if both else 1
    wanted = 21 * directions * gates * 10 * ((24 + 10) + (10 * directions + 10))
    assert (row.kind, row.replaced, row.macs_before, row.macs_after) == (kind.__name__, False, wanted, wanted)
    assert row.reason == "recurrent layers have no lookup form"
    convolutions = 8 * 21 * 9 * (24 + 24 * 24)
    assert report.macs()[0] == convolutions + wanted


def test_cells_count_every_call():
    class Stepper(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRUCell(5, 7)

        def forward(self, x):
            state = None
            for step in range(4):
                state = self.cell(x[:, step], state)
            return state

    assert explain(Stepper(), example_inputs=(torch.randn(2, 4, 5),))["cell"].macs_before == 4 * 3 * 7 * (5 + 7)


def test_attention_counts_projections_and_products_once():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = nn.MultiheadAttention(12, 3, kdim=8, vdim=6, batch_first=True)

        def forward(self, x, k, v):
            y = self.own(x, k, v)[0]
            return F.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None])

    report = explain(Attends(), example_inputs=(torch.randn(2, 5, 12), torch.randn(2, 9, 8), torch.randn(2, 9, 6)))
    assert report["own"].macs_before == 5 * 12 * 12 + 9 * 8 * 12 + 9 * 6 * 12 + 5 * 12 * 12 + 2 * 5 * 9 * 12
    assert report["scaled_dot_product_attention"].macs_before == 5 * 5 * (12 + 12)


def test_a_budget_counts_what_cannot_change():
    config = LookupConfig(target_speedup=2.0, group_size=4)
    model = Reader(bidirectional=True).eval()
    report = convert(model, config, calibration=[LINES]).lcnn_report
    before, after = report.macs()
    assert before == 8 * 21 * 9 * (24 + 24 * 24) + 21 * 2 * 4 * 10 * 34
    assert before / after >= 2.0
    planned = explain(model, config, example_inputs=(LINES,))
    assert f"{before / 2e6:.1f} million" in planned.remarks[0]
    assert planned["wide"].reason == "sizes found by a search when it is converted"
    heavy = Reader(nn.GRU, bidirectional=True, num_layers=40).eval()
    [remark] = explain(heavy, LookupConfig(target_speedup=50.0), example_inputs=(LINES,)).remarks
    assert "cannot be reached" in remark
    with pytest.raises(ConversionError, match="cannot be reached"):
        convert(heavy, LookupConfig(target_speedup=50.0, group_size=4), calibration=[LINES])
