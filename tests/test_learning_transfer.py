"""Dictionaries that are frozen, and dictionaries from a network of another depth."""

import pytest
import torch
from torch import nn

from lcnn_compile import LookupConv2d
from lcnn_compile.errors import ConversionError
from lcnn_compile.learning import carry_dictionaries, freeze_dictionaries


def network(depth, size=4, channels=8):
    sizes = {"padding": 1, "dictionary_size": size, "sparsity": 2, "group_size": 2}
    layers = [LookupConv2d(channels, channels, 3, **sizes) for _ in range(depth)]
    return nn.Sequential(
        LookupConv2d(3, channels, 3, padding=1, dictionary_size=3, sparsity=1), *layers, nn.Conv2d(channels, 2, 1)
    )


def test_frozen_dictionaries_do_not_learn_and_thaw():
    model = freeze_dictionaries(network(2))
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(torch.randn(2, 3, 6, 6)).square().mean().backward()
    optimizer.step()
    moved = {name.rpartition(".")[2] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"coefficients", "bias", "weight"}
    freeze_dictionaries(model, frozen=False)
    assert all(p.requires_grad for p in model.parameters())


def test_dictionaries_are_carried_to_another_depth():
    source, target = network(5), network(3)
    assert carry_dictionaries(source, target) == {"0": "0", "1": "1", "2": "3", "3": "5"}
    for name, other in {"1": 1, "2": 3, "3": 5}.items():
        assert torch.equal(target.get_submodule(name).dictionary, source[other].dictionary)
        assert not torch.equal(target.get_submodule(name).coefficients, source[other].coefficients)
    assert carry_dictionaries(network(1), network(4))["4"] == "1"


def test_dictionaries_of_another_size_are_cut_or_fill_a_part():
    source, target = network(2, size=6), network(2, size=4)
    carry_dictionaries(source, target)
    assert torch.equal(target[1].dictionary, source[1].dictionary[:, :4])
    wider = network(2, size=7)
    kept = wider[1].dictionary[:, 6:].clone()
    carry_dictionaries(source, wider)
    assert torch.equal(wider[1].dictionary, torch.cat([source[1].dictionary, kept], 1))


def test_networks_that_do_not_match_are_refused():
    with pytest.raises(ConversionError, match="no lookup module"):
        freeze_dictionaries(nn.Conv2d(3, 3, 1))
    with pytest.raises(ConversionError, match="same kind"):
        carry_dictionaries(nn.Sequential(*network(2)[1:2]), nn.Sequential(*network(2, channels=6)[1:2]))
