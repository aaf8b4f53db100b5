"""Reports: sums, the table, times, pictures and the HTML file."""

import re
import time
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from nets import SmallResNet, pictures, randomise
from rich.console import Console
from torch import nn

from lcnn_compile import LcnnError, LookupConfig, LookupConv2d, LookupWeight, convert, explain
from lcnn_compile.report import LayerReport, Report, plot_dictionary, plot_pareto, time_layers
from lcnn_compile.report.html import size
from lcnn_compile.report.plots import dictionary_figure, layers_figure, pareto_figure, usage_of
from lcnn_compile.report.table import percent, times

ROWS = (
    LayerReport(
        "stem", "Conv2d", False, macs_before=2_000_000, macs_after=2_000_000, bytes_before=500, bytes_after=500, reason="<narrow>"
    ),
    LayerReport("a", "Conv2d", True, 16, 54, 8, 0.0123, 8_000_000, 1_000_000, 4000, 1000, "lookup", "", 4e-3, 1e-3),
    LayerReport("b.0", "Conv2d", True, 8, 27.5, 4, 0.2, 6_000_000, 3_000_000, 3000, 2000, "factored", "", 2e-3, 1e-3),
)
REPORT = Report(ROWS, title="lcnn: <Net> & more")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    dense = randomise(SmallResNet(8))
    config = LookupConfig(dictionary_size=0.5, sparsity=2, group_size=3)
    return dense, convert(dense, config, calibration=[pictures(4)]).eval()


def shown(report, width=200):
    console = Console(width=width, force_terminal=False, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report)
    return console.export_text()


def test_sums_and_summary():
    assert REPORT.macs() == (16_000_000, 6_000_000)
    assert REPORT.nbytes() == (7500, 3500)
    assert REPORT.seconds() == pytest.approx((6e-3, 2e-3))
    text = REPORT.summary()
    assert text.startswith("2 of 3 layers replaced, 16.0 → 6.0 million multiply-adds per sample (2.67x fewer)")
    assert text.endswith("6.00 → 2.00 ms in these layers (3.00x faster)")
    assert "ms" not in Report(ROWS[:1]).summary()
    assert Report(tuple(LayerReport(**row) for row in REPORT.to_dict()["layers"]), REPORT.title) == REPORT


def test_the_table_shows_what_is_known_and_the_sums():
    lines = shown(REPORT).splitlines()
    (head,) = (line.split() for line in lines if line.startswith(" layer"))
    assert head == ["layer", "k", "taps", "g", "error", "MMACs", "fewer", "ms", "faster", "kB", "lowering"]
    (row,) = (line.split() for line in lines if line.startswith(" b.0"))
    assert row == [
        "b.0",
        "8",
        "27.5",
        "4",
        "20.00",
        "%",
        "6.00",
        "→",
        "3.00",
        "2.0x",
        "2.00",
        "→",
        "1.00",
        "2.0x",
        "3",
        "→",
        "2",
        "factored",
    ]
    (total,) = (line.split() for line in lines if line.startswith(" sum"))
    assert total == ["sum", "≤", "20.00", "%", "16.00", "→", "6.00", "2.7x", "6.00", "→", "2.00", "3.0x", "8", "→", "4"]
    (dense,) = (line.split() for line in lines if line.startswith(" stem"))
    assert dense == ["stem", "2.00", "0", "left", "dense"]
    plain = shown(explain(SmallResNet(8)))
    assert "ms" not in plain.split("sum")[0]
    assert "error" not in plain


@pytest.mark.parametrize(("value", "text"), [(0.0, "0.00 %"), (0.0123, "1.23 %"), (0.00004, "0.004 %"), (1.5, "150.00 %")])
def test_percent(value, text):
    assert percent(value) == text


def test_numbers_with_prefixes():
    values = (None, 7, 999, 1230, 999_900, 18_874_368, 2.5e9)
    assert [size(value) for value in values] == ["", "7", "999", "1.23 k", "1000 k", "18.9 M", "2.5 G"]
    assert (times(6, 2), times(None, 2), times(6, None)) == ("3.0x", "", "")


class Slow(nn.Module):
    """Waits in its forward, twice as long in the second model."""

    def __init__(self, seconds):
        super().__init__()
        self.a, self.b, self.seconds = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), seconds
        self.a.register_forward_pre_hook(self.wait)

    def wait(self, module, args):
        time.sleep(self.seconds)

    def forward(self, x):
        return self.b(self.a(self.a(x)))


def test_times_are_of_each_layer_with_all_its_calls():
    rows = tuple(LayerReport(name, "Conv2d", True) for name in ("a", "b", "elsewhere"))
    fast, slow = Slow(0.002), Slow(0.01)
    for model in (fast, slow):
        model.a._forward_pre_hooks.clear()
        model.a.forward = lambda x, seconds=model.seconds, conv=model.b: (time.sleep(seconds), x)[1]
    found = time_layers(Report(rows, "t"), slow, fast, torch.zeros(1, 3, 4, 4))
    assert found["a"].seconds_before >= 0.02
    assert 0.004 <= found["a"].seconds_after < found["a"].seconds_before
    assert 0 < found["b"].seconds_before < 0.02
    assert found["elsewhere"].seconds_before is None
    assert found.title == "t"
    assert not slow.b._forward_hooks


def test_times_of_a_converted_network(network):
    dense, lookup = network
    found = time_layers(lookup.lcnn_report, dense, lookup, pictures(2))
    assert all(row.seconds_before > 0 and row.seconds_after > 0 for row in found)
    assert [(row.name, row.error) for row in found] == [(row.name, row.error) for row in lookup.lcnn_report]


def test_usage_counts_every_multiply_add():
    """Two convolution groups; taps, owners and strengths by hand."""
    weight = LookupWeight(
        dictionary=torch.tensor([[[3.0, 4.0], [0.0, 2.0]], [[1.0, 0.0], [0.0, 1.0]]]),
        coefficients=torch.tensor([[1.0, 2.0], [-2.0, 0.0], [5.0, 0.0]]),
        indices=torch.tensor([0, 0, 1], dtype=torch.int32),
        positions=torch.tensor([0, 1, 1], dtype=torch.int32),
        offsets=torch.tensor([0, 2, 3], dtype=torch.int32),
        filters=torch.tensor([[1, 0], [2, 3]], dtype=torch.int32),
        kernel_size=(1, 2),
    )
    usage = usage_of(LookupConv2d.from_weight(weight, nn.Conv2d(4, 4, (1, 2), groups=2), None))
    torch.testing.assert_close(usage.dictionary, torch.tensor([[0.6, 0.8], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]))
    assert usage.uses.tolist() == [4, 0, 0, 2]
    expected = torch.zeros(4, 4)
    expected[0, 1], expected[0, 0], expected[3, 2] = 5 * 5**0.5, 10.0, 5.0
    torch.testing.assert_close(usage.strength, expected)
    torch.testing.assert_close(usage.positions, torch.tensor([[2 / 6, 4 / 6]]))


def test_the_picture_of_a_report_has_the_right_bars(tmp_path):
    pytest.importorskip("matplotlib")
    figure = layers_figure(REPORT)
    errors, macs, seconds = figure.axes
    assert [bar.get_width() for bar in errors.patches] == pytest.approx([0, 1.23, 20.0])
    assert [bar.get_width() for bar in macs.patches] == pytest.approx([2, 8, 6, 0, 1, 3])
    assert [bar.get_width() for bar in seconds.patches] == pytest.approx([0, 4, 2, 0, 1, 1])
    assert [text.get_text() for text in macs.texts] == ["", "8.0x", "2.0x"]
    assert [label.get_text() for label in errors.get_yticklabels()] == ["stem", "a", "b.0"]
    assert len(layers_figure(Report(ROWS[:1])).axes) == 1
    for name, magic in (("r.png", b"\x89PNG"), ("r.svg", b"<?xml"), ("r.pdf", b"%PDF")):
        REPORT.plot(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(magic)
    with pytest.raises(LcnnError, match=r"r\.txt is no name of a picture"):
        REPORT.plot(tmp_path / "r.txt")


def points(metric=True):
    values = ((2.0, 0.01, 0.87), (8.0, 0.1, 0.8))
    return [
        SimpleNamespace(target=s, speedup=1.1 * s, error=e, metric=m if metric else None, report=REPORT) for s, e, m in values
    ]


def test_the_pareto_curve_has_the_points(tmp_path):
    pytest.importorskip("matplotlib")
    error, metric = pareto_figure(points()).axes
    (line,) = error.lines
    assert line.get_ydata().tolist() == pytest.approx([1.0, 10.0])
    assert line.get_xdata().tolist() == pytest.approx([2.2, 8.8])
    assert metric.lines[0].get_ydata().tolist() == pytest.approx([0.87, 0.8])
    assert len(pareto_figure(points(metric=False)).axes) == 1
    plot_pareto(points(), tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000
    with pytest.raises(LcnnError, match="at least one point"):
        plot_pareto([], tmp_path / "q.png")


def test_the_picture_of_a_dictionary(network, tmp_path):
    pytest.importorskip("matplotlib")
    layer = network[1].layers[0].conv1
    usage = usage_of(layer)
    figure = dictionary_figure(layer, "conv1")
    torch.testing.assert_close(torch.tensor(figure.axes[0].images[0].get_array()), usage.dictionary)
    assert [bar.get_width() for bar in figure.axes[1].patches] == usage.uses.tolist()
    plot_dictionary(layer, tmp_path / "d.png", "conv1")
    assert (tmp_path / "d.png").stat().st_size > 1000


class Page(HTMLParser):
    """Cells of every table row, and every address the page would fetch."""

    def __init__(self):
        super().__init__()
        self.rows, self.addresses, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for key, value in attributes if key in ("src", "href", "srcset")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def test_html_is_one_file_with_every_layer(network, tmp_path):
    pytest.importorskip("matplotlib")
    report = Report((*network[1].lcnn_report.layers, *ROWS), title=REPORT.title)
    report.to_html(tmp_path / "r.html", network[1], layers=["layers.0.conv1", "layers.1.conv2"], points=points())
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert [file.name for file in tmp_path.iterdir()] == ["r.html"]
    assert "lcnn: &lt;Net&gt; &amp; more" in text
    assert "&lt;narrow&gt;" in text
    page = Page()
    page.feed(text)
    assert page.addresses
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert page.tags.count("img") == 3
    assert not re.search(r"url\(|@import|https?://", text)
    names = [row[0] for row in page.rows]
    for row in report:
        assert any(name.startswith(row.name) for name in names)
    (shown,) = (row for row in page.rows if row[0] == "b.0")
    assert shown[:6] == ["b.0", "Conv2d", "8", "27.5", "4", "20.00 %"]
    assert shown[6:10] == ["6 M → 3 M", "2.0x", "2.00 → 1.00", "2.0x"]
    assert ["2x", "2.20x", "1.00 %", "0.87", "3.5 kB"] in page.rows


def test_html_without_matplotlib_times_errors_or_shapes(tmp_path, monkeypatch):
    monkeypatch.setattr("lcnn_compile.report.plots.available", lambda: False)
    dry = explain(SmallResNet(8))
    dry.to_html(tmp_path / "r.html", SmallResNet(8))
    text = (tmp_path / "r.html").read_text()
    assert "pip install &#39;lcnn-compile[plot]&#39;" in text or "pip install 'lcnn-compile[plot]'" in text
    page = Page()
    page.feed(text)
    assert page.rows[0] == ["layer", "type", "k", "taps", "g", "bytes", "lowering"]


def test_mistakes_are_named(network, tmp_path, monkeypatch):
    with pytest.raises(LcnnError, match=r"\['fc'\] are no lookup layers of the model; it has \['layers.0.conv1'"):
        REPORT.to_html(tmp_path / "r.html", network[1], layers=["fc"])
    with pytest.raises(LcnnError, match="need the converted model: pass model="):
        REPORT.to_html(tmp_path / "r.html", layers=["a"])
    with pytest.raises(LcnnError, match="cannot be written"):
        REPORT.to_html(tmp_path / "none" / "r.html")
    monkeypatch.setattr("lcnn_compile.report.plots.available", lambda: False)
    with pytest.raises(LcnnError, match=r"pip install 'lcnn-compile\[plot\]'"):
        REPORT.plot(tmp_path / "r.png")
    assert not list(tmp_path.iterdir())
