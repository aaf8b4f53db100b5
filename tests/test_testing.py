"""lcnn_compile.testing: what a user pastes works, and its messages say what is wrong."""

import copy
import re
import textwrap

import pytest
import torch
from hypothesis import given, settings
from nets import SmallResNet, pictures, randomise

from lcnn_compile import testing
from lcnn_compile.testing import ConvCase, NetworkCase, assert_close, assert_equivalent, conv_layers, networks


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
