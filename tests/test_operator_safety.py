"""No tensor that a caller can pass makes a kernel read or write out of bounds: wrong arguments are errors in Python."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcnn_compile import LcnnError, LookupWeight
from lcnn_compile.kernels import backward
from lcnn_compile.kernels.arguments import Geometry, Weight
from lcnn_compile.kernels.operator import lookup_conv2d, lookup_conv2d_inference

BACKWARD = torch.ops.lcnn.lookup_conv2d_backward.default
TENSORS = ("grad", "input", "dictionary", "coefficients", "indices", "positions", "offsets", "filters", "bias", "residual")
NUMBERS = (0, -1, 2, 3, 100, 2**15, 2**31 - 1, 2**31, 2**33, 2**62, -(2**62), 2**63 - 1)
VALUES = (-1, -2, 5, 6, 100, 2**31 - 1, -(2**31))
KINDS = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.bool, torch.complex64, torch.uint8)


def arguments():
    lookups = torch.randn(10, 5, 3, 2) * (torch.rand(10, 5, 3, 2) < 0.4)
    weight = LookupWeight.from_lookup_tensor(torch.randn(1, 5, 6), lookups, group_size=3)
    return {
        "input": torch.randn(2, 6, 9, 8),
        **weight.tensors(),
        "bias": torch.randn(10),
        "out_channels": 10,
        "kernel_size": [3, 2],
        "stride": [1, 1],
        "padding": [0, 0, 0, 0],
        "dilation": [1, 1],
        "lowering": "lookup",
        "activation": "none",
        "residual": None,
        "residual_last": False,
    }


def one_value(t, rng):
    t = t.clone(memory_format=torch.contiguous_format)
    if t.numel():
        t.view(-1)[rng.randrange(t.numel())] = rng.choice(VALUES)
    return t


def one_element(t, *shape):
    """A view of one element as a tensor of any size, as ``expand`` makes it."""
    return torch.zeros(1, dtype=t.dtype).expand(shape)


CHANGES = {
    "cut": lambda t, rng: t[: rng.randrange(3)],
    "one more dimension": lambda t, rng: t.unsqueeze(0),
    "another dtype": lambda t, rng: t.to(rng.choice(KINDS)),
    "another device": lambda t, rng: t.to("meta"),
    "flat": lambda t, rng: t.flatten(),
    "empty": lambda t, rng: t.new_empty([0] * t.dim()),
    "no dimension": lambda t, rng: t.new_zeros(()),
    "repeated": lambda t, rng: t.expand(3, *t.shape),
    "overlapping": lambda t, rng: one_element(t, *t.shape),
    "huge last dimension": lambda t, rng: one_element(t, *t.shape[:-1], 2 ** rng.choice([31, 33])),
    "huge first dimension": lambda t, rng: one_element(t, 2**40, *t.shape[1:]),
    "sparse": lambda t, rng: t.to_sparse(),
    "transposed": lambda t, rng: t.transpose(0, -1),
    "strides of zero": lambda t, rng: t.as_strided(t.shape, [0] * t.dim()),
    "strides of one": lambda t, rng: t.as_strided(t.shape, [min(1, s) for s in t.stride()]),
    "scaled": lambda t, rng: (t * rng.choice([-1, 2, 1000, 2**20])).to(t.dtype),
    "one value": one_value,
    "nothing": lambda t, rng: None,
}


def spoil(given, rng):
    """Change one argument; what was done."""
    name = rng.choice(list(given))
    value = given[name]
    if name in TENSORS:
        if not isinstance(value, torch.Tensor):
            value = torch.randn(2, 10, 7, 7)
        how = rng.choice(list(CHANGES))
        ordinary = value.dim() and value.numel() < 10**6 and value.layout == torch.strided and value.device.type == "cpu"
        given[name] = CHANGES[how](value, rng) if ordinary else value
        return f"{name}: {how}"
    if isinstance(value, list):
        value = list(value)
        how = rng.randrange(5)
        if how == 0:
            value.pop()
        elif how == 1:
            value.append(1)
        else:
            value[rng.randrange(len(value))] = rng.choice(NUMBERS)
        given[name] = value
    elif name == "out_channels":
        given[name] = rng.choice([0, -1, 9, 11, 2**40, 2**63 - 1])
    elif isinstance(value, str):
        given[name] = rng.choice(["lookup", "factored", "dense", "auto", "", "evil", "relu", "silu"])
    else:
        given[name] = not value
    return f"{name}: {given[name]}"


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.sampled_from([lookup_conv2d, lookup_conv2d_inference]))
def test_spoiled_arguments_are_refused_or_right(seed, count, operator):
    rng = random.Random(seed)
    torch.manual_seed(seed % 1000)
    given = arguments()
    given["lowering"] = rng.choice(["lookup", "factored", "dense", "auto"])
    done = [spoil(given, rng) for _ in range(count)]
    try:
        y = operator(*given.values())
    except (RuntimeError, TypeError, NotImplementedError, IndexError, OverflowError):
        return  # LcnnError is a RuntimeError; the dispatcher has its own
    # What was not refused must be the value that the dense form gives.
    truth = lookup_conv2d(*{**given, "lowering": "dense"}.values())
    torch.testing.assert_close(y, truth, atol=2e-2, rtol=2e-2, equal_nan=True, msg=str(done))


@given(st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_spoiled_arguments_of_the_backward_operator_are_refused_or_right(seed, count):
    rng = random.Random(seed)
    torch.manual_seed(seed % 1000)
    forward = arguments()
    names = ("input", "dictionary", "coefficients", "indices", "positions", "offsets", "filters", "out_channels", "kernel_size")
    names = (*names, "stride", "padding", "dilation")
    given = {"grad": torch.randn(2, 10, 7, 7), **{name: forward[name] for name in names}}
    done = [spoil(given, rng) for _ in range(count)]
    try:
        found = BACKWARD(*given.values(), [True] * 3)
    except (RuntimeError, TypeError, NotImplementedError, IndexError, OverflowError):
        return
    # What was not refused must be what the factored form gives in float64.
    x, *weight = [v.double() if v.is_floating_point() else v for v in list(given.values())[1:8]]
    truth = backward.factored(given["grad"].double(), x, Weight(*weight), Geometry(*list(given.values())[8:]), [True] * 3)
    for ours, exact in zip(found, truth, strict=True):
        scale = float(exact.abs().max()) if exact.numel() else 0.0
        torch.testing.assert_close(ours.double(), exact, atol=2e-2 * scale, rtol=2e-2, equal_nan=True, msg=str(done))


@pytest.mark.parametrize("lowering", ["lookup", "factored", "dense", "auto"])
@pytest.mark.parametrize("name", ["stride", "dilation", "padding", "kernel_size"])
@pytest.mark.parametrize("value", [2**31, 2**62, 2**63 - 1])
def test_huge_numbers_are_refused(name, value, lowering):
    given = {**arguments(), "lowering": lowering}
    given[name] = [*given[name][:-1], value]
    with pytest.raises(LcnnError):
        lookup_conv2d(*given.values())


@pytest.mark.parametrize("lowering", ["lookup", "factored", "dense", "auto"])
@pytest.mark.parametrize("channels", [2**40, 9, 11, 0, -1])
def test_another_number_of_filters_is_refused(channels, lowering):
    with pytest.raises(LcnnError):
        lookup_conv2d(*{**arguments(), "out_channels": channels, "bias": None, "lowering": lowering}.values())


@pytest.mark.parametrize("lowering", ["lookup", "factored", "dense", "auto"])
@pytest.mark.parametrize("channels", [1, 5, 7, 12])
def test_another_number_of_channels_is_refused(channels, lowering):
    with pytest.raises(LcnnError, match="channels"):
        lookup_conv2d(*{**arguments(), "input": torch.randn(2, channels, 9, 8), "lowering": lowering}.values())


@pytest.mark.parametrize("lowering", ["lookup", "factored", "dense"])
def test_the_largest_stride(lowering):
    given = {**arguments(), "lowering": lowering}
    first = lookup_conv2d(*given.values())[:, :, :1, :1]
    torch.testing.assert_close(lookup_conv2d(*{**given, "stride": [2**31 - 1] * 2}.values()), first, atol=1e-4, rtol=1e-4)


def test_an_output_larger_than_any_memory_is_refused():
    given = {**arguments(), "padding": [2**31 - 1] * 4}
    with pytest.raises(LcnnError, match="more than any memory"):
        lookup_conv2d(*given.values())


@pytest.mark.parametrize("name", [n for n in TENSORS if n not in ("grad", "input")])
def test_tensors_of_another_device_are_refused(name):
    given = arguments()
    given["residual"] = torch.randn(2, 10, 7, 7)
    given[name] = given[name].to("meta")
    with pytest.raises(LcnnError):
        lookup_conv2d(*given.values())


def test_the_weight_is_checked_again_after_it_has_changed():
    given = arguments()
    lookup_conv2d(*given.values())
    given["indices"][0] = 5
    for lowering in ("lookup", "factored", "dense"):
        with pytest.raises(LcnnError, match="indices range"):
            lookup_conv2d(*{**given, "lowering": lowering}.values())


@pytest.mark.parametrize("lowering", ["lookup", "factored", "dense", "auto"])
@pytest.mark.parametrize("name", TENSORS[1:])
def test_tensors_whose_memory_was_freed_are_refused(name, lowering):
    given = {**arguments(), "residual": torch.randn(2, 10, 7, 7), "lowering": lowering}
    given[name] = given[name].clone()
    given[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"memory|storage|allocated"):
        lookup_conv2d(*given.values())


@pytest.mark.parametrize("lowering", ["lookup", "auto"])
def test_kernels_of_more_positions_than_can_be_planned(lowering):
    # Planning such a kernel in the C++ code takes for ever: the factored lowering takes it, or there is no memory.
    given = {**arguments(), "lowering": lowering, "kernel_size": [1, 60_000], "padding": [0, 0, 30_000, 30_000]}
    given["positions"] = given["positions"] * 9_000
    truth = lookup_conv2d(*{**given, "lowering": "dense"}.values())
    torch.testing.assert_close(lookup_conv2d(*given.values()), truth, atol=1e-4, rtol=1e-4)
    given |= {"kernel_size": [2**31 - 1, 1], "padding": [2**31 - 1, 0, 0, 0]}
    with pytest.raises(RuntimeError):
        lookup_conv2d(*given.values())


@pytest.mark.parametrize("name", ["input", "dictionary", "coefficients", "bias"])
@pytest.mark.parametrize("lowering", ["lookup", "factored", "dense"])
def test_values_that_are_negated_when_read(name, lowering):
    given = {**arguments(), "lowering": lowering}
    negated = {**given, name: torch._neg_view(-given[name])}
    assert negated[name].is_neg()
    torch.testing.assert_close(lookup_conv2d(*negated.values()), lookup_conv2d(*given.values()))


@pytest.mark.parametrize("lowering", ["lookup", "factored", "dense", "auto"])
@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        *(("indices", place, value) for place in (0, -1) for value in (-1, 5, 2**31 - 1, -(2**31))),
        *(("positions", place, value) for place in (0, -1) for value in (-1, 6, 2**31 - 1, -(2**31))),
        ("offsets", 0, 1),
        ("offsets", 0, -1),
        ("offsets", 1, 2**31 - 1),
        ("offsets", 1, -5),
        ("offsets", -1, 10**6),
        ("filters", (0, 0), 1),
        ("filters", (0, 0), 10),
        ("filters", (0, 0), -2),
        ("filters", (0, 0), -1),
        ("filters", (3, 2), 3),
    ],
    ids=str,
)
def test_one_integer_out_of_range(name, place, value, lowering):
    given = {**arguments(), "lowering": lowering}
    given[name] = given[name].clone()
    given[name][place] = value
    with pytest.raises(LcnnError):
        lookup_conv2d(*given.values())
