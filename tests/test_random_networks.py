"""Random networks in source text, every way of using them: several calls leave behind what the dense network's calls do."""

import os

import pytest
from hypothesis import event, given, reject, settings
from hypothesis import strategies as st
from ways import LOWERINGS, WAYS, Refused, wrong

from lcnn_compile.testing import SourceCase, source_networks

SLOW = {"compiled dynamic": 4, "dense dynamic": 4, "frozen": 4, "exported": 3, "compiled by Inductor": 1, "dense by Inductor": 1}


def examples(way):
    """Few where the suite runs, all of the profile where it fuzzes."""
    number = settings.default.max_examples
    if os.environ.get("HYPOTHESIS_PROFILE", "fast") == "fast":
        return SLOW.get(way, 8)
    return number if way not in SLOW else max(1, number // 10)


def check_of(way):
    @settings(max_examples=examples(way))
    @given(source_networks(), st.sampled_from(LOWERINGS))
    def check(case, lowering):
        try:
            assert not (found := wrong(case, way, lowering)), f"{way}, lowering {lowering!r}: {found}"
        except Refused as refusal:
            event(f"refused: {str(refusal)[:60]}")
            reject()

    return check


@pytest.mark.parametrize("way", WAYS)
def test_calls_leave_behind_what_the_dense_network_does(way):
    check_of(way)()


CONV = "self.conv = nn.Conv2d(4, 4, 3, padding=1)"
LAST = "(t(n, 4, 6, 6).to(memory_format=torch.channels_last),), {}"
FOUND = {
    # A write to the weight of a lookup layer vanished in a captured graph.
    "weight written": SourceCase((CONV,), "x", ("v = self.conv(x)", "with torch.no_grad():\n    self.conv.weight.mul_(0.5)"), "v", "(t(n, 4, 6, 6),), {}"),
    # A program takes two inputs in one memory for two tensors.
    "two names of an input": SourceCase((CONV,), "x, y", ("x += 1", "v = self.conv(y)"), "v", "((x := t(n, 4, 6, 6)), x), {}"),
    # Programs returned contiguous memory where the network has channels last: other elements at the same strides.
    "strides read": SourceCase((CONV,), "x", ("v = self.conv(x)", "w = v.as_strided((2, 5), (6, 1))"), "w", LAST),
    "strides read in the next graph": SourceCase((CONV,), "x", ("v = self.conv(x)", "torch._dynamo.graph_break()", "w = v.as_strided((2, 5), (6, 1))"), "w", LAST),
    # What was computed in place in inference mode became a new tensor of that mode, which nothing may write to behind it.
    "written in inference mode": SourceCase(
        (CONV,), "x", ("v = self.conv(x)", "w = torch.zeros(2, 3)", "with torch.inference_mode():\n    torch.sub(w, w, out=w)", "w[0].relu_()"), "v, w", "(t(n, 4, 6, 6),), {}"
    ),
    "view written": SourceCase((CONV,), "x", ("v = self.conv(x)", "v.permute(0, 2, 3, 1).view(-1)[::2] *= 0.5"), "v", LAST),
}  # fmt: skip


@pytest.mark.parametrize("way", ["converted", "passes", "compiled", "compiled dense", "frozen", "exported"])
@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_is_right_or_refused(name, way):
    try:
        found = wrong(FOUND[name], way)
    except Refused as refusal:
        said = str(refusal)
        expected = ("written to", "share memory", "traces something else", "cannot trace it")
        found = "" if any(text in said for text in expected) else said
    assert not found


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_layer_of_few_filters_keeps_the_memory_layout(lowering, kernel):
    # The filter bank that a layer was folded to had the layout of a sum of products, and gave it to the layer's output.
    case = SourceCase((f"self.conv = nn.Conv2d(4, 5, {kernel})",), "x", ("v = self.conv(x)",), "v", "(t(n, 4, 6, 6),), {}")
    assert not wrong(case, "compiled", lowering)


@pytest.mark.parametrize("way", ["converted", "compiled", "compiled dense"])
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("padding", ["0", "(1, 0)"])
def test_padding_modes_keep_the_memory_layout(mode, padding, way):
    layer = f"self.m0 = nn.Conv2d(4, 6, 1, padding={padding}, padding_mode={mode!r})"
    assert not wrong(SourceCase((layer,), "x", ("v = self.m0(x)",), "v", LAST), way)


@pytest.mark.parametrize("way", ["converted", "compiled", "compiled dense"])
@pytest.mark.parametrize("layer", ["Conv1d(8, 8, 1, 2)", "Conv1d(8, 8, 3, padding=1)", "ConvTranspose1d(8, 8, 3, 2)"])
def test_rows_keep_the_memory_layout_whatever_that_of_the_input(layer, way):
    transposed = "(t(3, 8, 8).transpose(-1, -2).contiguous().transpose(-1, -2),), {}"
    assert not wrong(SourceCase((f"self.m0 = nn.{layer}",), "x", ("v = self.m0(x)",), "v", transposed), way)
