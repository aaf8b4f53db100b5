"""lcnn_compile.testing: what a user pastes works, and its messages say what is wrong."""

import copy
import re
import textwrap

import pytest
import torch
from hypothesis import given, settings
from nets import SmallResNet, pictures, randomise

from lcnn_compile import testing
from lcnn_compile.testing import (
    ConvCase,
    NetworkCase,
    SourceCase,
    assert_close,
    assert_equivalent,
    assert_same_calls,
    conv_layers,
    minimise,
    networks,
    source_networks,
)


def test_the_example_of_the_docstring():
    code = textwrap.dedent(re.search(r"\n\n(    from hypothesis.*?)\n\nThe rule", testing.__doc__, re.DOTALL)[1])
    names = {}
    exec(code, names)
    names["test_lookup_layer"]()


@pytest.mark.parametrize("layer", ["stem.0", "layers.0.conv2", "layers.1.down.0", "fc"])
def test_the_layer_that_diverges_first_is_named(layer):
    model = randomise(SmallResNet(8))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_submodule(layer).weight.mul_(1.01)
    with pytest.raises(AssertionError, match=rf"first layer to diverge is '{re.escape(layer)}', by [\d.e+-]+ where [\d.e+-]+ is"):
        assert_equivalent(model, other, pictures(2))
    assert_equivalent(model, copy.deepcopy(model), pictures(2))


def test_other_shapes_dtypes_and_values_that_are_not_finite():
    model, x = torch.nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)
    for other in (
        lambda x: model(x)[:, :3],
        lambda x: model(x).double(),
        lambda x: model(x) * torch.nan,
        lambda x: (model(x),) * 2,
    ):
        with pytest.raises(AssertionError):
            assert_equivalent(model, other, x)
    with pytest.raises(AssertionError, match=r"at \(1, 0\)"):
        assert_close(torch.tensor([[1.0], [2.1]]), torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [2.0]]).double())


@settings(max_examples=10)
@given(conv_layers(), networks())
def test_what_is_printed_makes_the_same_case_again(conv, network):
    names = {"torch": torch, "ConvCase": ConvCase, "NetworkCase": NetworkCase}
    again = eval(repr(conv), names)
    assert torch.equal(again.conv.weight, conv.conv.weight)
    assert torch.equal(again.inputs, conv.inputs)
    assert again.inputs.stride() == conv.inputs.stride()
    rebuilt = eval(repr(network), names)
    with torch.no_grad():
        assert torch.equal(rebuilt.model(rebuilt.inputs), network.model(network.inputs))


class Writer(torch.nn.Module):
    """What calls may leave behind: an output, an input, a buffer, random numbers, memory in common."""

    def __init__(self, output=1.0, write=1.0, count=1, draw=True, view=True, more=False):
        super().__init__()
        self.output, self.write, self.count, self.draw, self.view, self.more = output, write, count, draw, view, more
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += self.count
        x[:, 0] = self.write
        y = torch.rand(3).sum() if self.draw else torch.zeros(())
        z = x[:, :2] if self.view else x[:, :2].clone()
        return x.sum() * self.output, z[:1] if self.more else z, y * 0


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"output": 1.001}, r"output \[0\] of call 0 is off by"),
        ({"write": 2.0}, r"input \[0\]\[0\] of call 0 is off by"),
        ({"count": 2}, r"calls \(buffer\) after call 1 is off by 2 "),
        ({"draw": False}, "random numbers"),
        ({"view": False}, r"memory of output \[1\] of call 0 is \[\], not \['input"),
        ({"more": True}, r"output \[1\] of call 0 is torch.float32 \(1, 2\), not torch.float32 \(2, 2\)"),
    ],
)
def test_all_that_calls_leave_behind_is_compared(other, said):
    calls = [(torch.randn(2, 4),), (torch.randn(2, 4),)]
    before = copy.deepcopy(calls)
    assert_same_calls(Writer(), Writer(), calls)
    with pytest.raises(AssertionError, match=said):
        assert_same_calls(Writer(), Writer(**other), calls)
    assert all(torch.equal(a, b) for [a], [b] in zip(calls, before, strict=True))


def test_rounding_errors_of_layers_are_allowed_and_no_more():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 4, 3)).eval()
    calls = [(torch.randn(2, 3, 8, 8),)]
    for scale, right in ((1e-7, True), (1e-3, False)):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[0].weight.mul_(1 + scale)
        if right:
            assert_same_calls(model, other, calls)
        else:
            with pytest.raises(AssertionError):
                assert_same_calls(model, other, calls)


@settings(max_examples=10)
@given(source_networks())
def test_a_network_in_source_text_is_the_same_again(case):
    again = eval(repr(case), {"SourceCase": SourceCase})
    assert again == case
    assert_same_calls(case.build(), again.build(), again.calls())
    compile(str(case), "case", "exec")


def test_a_failing_network_loses_what_it_can():
    case = SourceCase(
        ("self.a = nn.Conv2d(3, 3, 1)", "self.b = nn.ReLU()"),
        "x",
        ("y = self.a(x)", "z = self.b(x)", "with torch.no_grad():\n    z.add_(1)", "y = y + 1"),
        "(y, z)",
        "(t(n, 3, 4, 4),), {}",
        True,
    )
    small = minimise(case, lambda c: "self.a(x)" in c.source)
    assert (small.layers, small.statements, small.returned) == (case.layers[:1], case.statements[:1], "y")
    assert small.batches == (2,)
    assert not small.training
