"""LookupWeight: encoding, counting and validation."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcnn_compile import LcnnError, LookupWeight
from lcnn_compile.lookup import filter_table
from lcnn_compile.testing import lookup_weights


def slow_dense_weight(weight):
    """W by the definition: W[o, :, r, c] = Σ C · D[I], tap by tap."""
    kh, kw = weight.kernel_size
    w = torch.zeros(weight.out_channels, weight.in_channels // weight.groups, kh, kw, dtype=torch.float64)
    per_group = weight.filters.shape[0] // weight.groups
    for j, members in enumerate(weight.filters.tolist()):
        for t in range(int(weight.offsets[j]), int(weight.offsets[j + 1])):
            vector = weight.dictionary[j // per_group, weight.indices[t]].double()
            r, c = divmod(int(weight.positions[t]), kw)
            for i, o in enumerate(members):
                if o >= 0:
                    w[o, :, r, c] += weight.coefficients[t, i].double() * vector
    return w


@given(st.sampled_from([1, 2]).flatmap(lambda groups: lookup_weights(groups=groups)))
def test_dense_weight_is_the_definition(weight):
    weight.validate()
    torch.testing.assert_close(weight.to(torch.float64).dense_weight(), slow_dense_weight(weight), atol=1e-12, rtol=1e-12)


@given(lookup_weights(), st.integers(1, 20))
def test_encoding_round_trip(weight, group_size):
    lookups = weight.lookup_tensor()
    again = LookupWeight.from_lookup_tensor(weight.dictionary, lookups, group_size=group_size).validate()
    assert torch.equal(again.lookup_tensor(), lookups)


@given(lookup_weights(), st.randoms())
def test_permuting_the_dictionary_changes_nothing(weight, random):
    order = list(range(weight.dictionary_size))
    random.shuffle(order)
    wide = weight.to(torch.float64)
    permuted = wide.permute_dictionary(torch.tensor(order)).validate()
    torch.testing.assert_close(permuted.dense_weight(), wide.dense_weight())


@given(lookup_weights(), st.integers(-20, 20))
def test_balancing_makes_norms_alike_and_rounds_nothing(weight, exponent):
    lopsided = dataclasses.replace(weight, dictionary=weight.dictionary * 2.0**exponent)
    balanced = lopsided.balanced().validate()
    assert torch.equal(balanced.dense_weight(), lopsided.dense_weight())
    norms = balanced.dictionary.double().norm(), balanced.coefficients.double().norm()
    assert min(norms) == 0 or max(norms) <= 2.001 * min(norms)


@pytest.mark.parametrize(("groups", "group_size"), [(1, 1), (1, 8), (2, 4), (5, 2)])
def test_lossless_is_bit_exact(groups, group_size):
    dense = torch.randn(10, 6, 3, 2)
    weight = LookupWeight.lossless(dense, groups=groups, group_size=group_size).validate()
    assert torch.equal(weight.dense_weight(), dense)
    assert weight.taps == dense.numel()


def test_counts():
    weight = LookupWeight.lossless(torch.randn(10, 6, 3, 3), group_size=4)
    assert weight.macs(100, 50) == 6 * 6 * 50 + 10 * 54 * 100
    taps = 3 * 54
    assert weight.nbytes() == 4 * (6 * 6 + taps * 4 + 2 * taps + 4 + 3 * 4)
    assert (weight.group_size, weight.dictionary_size, weight.in_channels, weight.out_channels) == (4, 6, 6, 10)


def test_filter_table_keeps_convolution_groups_apart():
    table = filter_table(10, 4, 2)
    assert table.tolist() == [[0, 1, 2, 3], [4, -1, -1, -1], [5, 6, 7, 8], [9, -1, -1, -1]]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("indices", torch.tensor([9] * 24, dtype=torch.int32), "0 to 5"),
        ("positions", torch.tensor([9] * 24, dtype=torch.int32), "0 to 1"),
        ("filters", torch.tensor([[0, 1], [2, 2]], dtype=torch.int32), "exactly once"),
        ("offsets", torch.tensor([0, 25, 24], dtype=torch.int32), "ascend"),
        ("kernel_size", (0, 2), "positive"),
        ("dictionary", torch.zeros(1, 6, 6, dtype=torch.int32), "dtype"),
    ],
)
def test_validate_names_what_is_wrong(field, value, message):
    weight = LookupWeight.lossless(torch.randn(4, 6, 2, 1), group_size=2).validate()
    weight = dataclasses.replace(weight, **{field: value})
    with pytest.raises(LcnnError, match=f"layer7: .*({message})"):
        weight.validate("layer7")
