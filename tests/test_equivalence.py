"""Properties of lookup convolutions: every lowering against float64, linearity, symmetries, gradients, round trips."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lcnn_compile import LookupConfig, LookupConv2d, LookupWeight
from lcnn_compile.kernels import reference
from lcnn_compile.kernels.operator import LOWERINGS, lookup_conv2d
from lcnn_compile.lookup import filter_table
from lcnn_compile.testing import assert_close, assert_equivalent, conv_layers, lookup_layers, lookup_weights, random_tensor
from lcnn_compile.testing.cases import LAYOUTS, laid_out
from lcnn_compile.torch_private import pads_of

LOWERING = st.sampled_from([*LOWERINGS, "auto"])
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FULL = LookupConfig(dictionary_size=1.0, sparsity=None)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def exact(layer, x):
    """The layer's function in float64, and the size of the terms that its rounding errors scale with."""
    wide, magnitude = layer.to_conv().double(), layer.to_conv().double()
    weight = layer.lookup_weight().to(torch.float64)
    with torch.no_grad():
        wide.weight.copy_(weight.dense_weight())
        magnitude.weight.copy_(reference.dense_weight(weight.dictionary.abs(), weight.lookup_tensor().abs()))
        if magnitude.bias is not None:
            magnitude.bias.abs_()
        return wide(x.double()), magnitude(x.double().abs())


@given(lookup_layers(max_kernel=7, dtypes=DTYPES), LOWERING, st.integers(1, 3))
def test_every_lowering_dtype_and_thread_count(case, lowering, threads):
    layer, x = case
    layer.lowering = lowering
    torch.set_num_threads(threads)
    with torch.no_grad():
        result, own = layer(x), layer.to_conv()(x)
    truth, terms = exact(layer, x)
    assert (result.shape, result.dtype) == (own.shape, x.dtype)
    if truth.numel():
        # The weight of the dense layer is rounded once more than P and D are, S once more than the dense layer's sums.
        floor = own.double() + 4 * torch.finfo(x.dtype).eps * terms.max()
        assert_close(result, floor.to(x.dtype), truth, name=f"{lowering} of {layer}")


@given(
    lookup_weights(in_channels=6, groups=2),
    LOWERING,
    st.sampled_from(list(reference.ACTIVATIONS)),
    st.sampled_from([None, "first", "last"]),
    st.booleans(),
    st.sampled_from(LAYOUTS),
    st.sampled_from(DTYPES),
    st.tuples(
        st.sampled_from([0, 1, 2]), st.tuples(*[st.integers(0, 3)] * 4), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2)
    ),
    st.data(),
)
def test_epilogues_in_every_layout(weight, lowering, activation, residual, with_bias, layout, dtype, settings, data):
    batch, pads, threads, stride, dilation = settings
    torch.set_num_threads(threads)
    weight = weight.to(dtype)
    x = laid_out(random_tensor(data.draw, (batch, 6, 10, 9), dtype), layout)
    bias = random_tensor(data.draw, (weight.out_channels,), dtype) if with_bias else None
    top, bottom, left, right = pads

    def dense(convert):
        padded = F.pad(convert(x), (left, right, top, bottom))
        dense_weight = weight.to(convert(x).dtype).dense_weight()
        return F.conv2d(padded, dense_weight, None if bias is None else convert(bias), stride, 0, dilation, 2)

    plain = dense(torch.Tensor.double)
    added = laid_out(random_tensor(data.draw, tuple(plain.shape), dtype), layout) if residual else None
    last = residual == "last"
    truth = reference.apply_epilogue(plain, None, None if added is None else added.double(), activation, last)
    own = reference.apply_epilogue(dense(lambda t: t), None, added, activation, last)
    terms = F.conv2d(
        F.pad(x.double().abs(), (left, right, top, bottom)),
        reference.dense_weight(weight.dictionary.double().abs(), weight.to(torch.float64).lookup_tensor().abs()),
        None, stride, 0, dilation, 2,
    )  # fmt: skip
    floor = own.double() + 4 * torch.finfo(dtype).eps * (terms.max() if terms.numel() else 0.0)
    geometry = (weight.kernel_size, (stride, stride), pads, (dilation, dilation))
    args = (x, *weight.tensors().values(), bias, weight.out_channels, *geometry)
    assert_close(lookup_conv2d(*args, lowering, activation, added, last), floor.to(dtype), truth, factor=16)


@given(lookup_layers(dtypes=[torch.float64]), LOWERING, st.data())
def test_linear_in_the_input(case, lowering, data):
    layer, x = case
    layer.lowering, layer.bias = lowering, None
    z = random_tensor(data.draw, x.shape, torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(2.5 * x - z), 2.5 * layer(x) - layer(z), atol=1e-9, rtol=1e-9)


@given(lookup_layers(dtypes=[torch.float64]), LOWERING, st.integers(0, 4), st.integers(0, 4))
def test_a_translated_input_gives_a_translated_output(case, lowering, down, right):
    layer, x = case
    layer = LookupConv2d.from_weight(layer.lookup_weight(), valid(layer), layer.bias, lowering)
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    x = F.pad(x, (reach[1], reach[1], reach[0], reach[0]))
    moved = F.pad(x, (right * layer.stride[1], 0, down * layer.stride[0], 0))
    with torch.no_grad():
        torch.testing.assert_close(layer(moved)[:, :, down:, right:], layer(x), atol=1e-10, rtol=1e-10)


def valid(layer):
    """The geometry of a layer without padding."""
    args = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, 0, layer.dilation, layer.groups)
    return torch.nn.Conv2d(*args, dtype=layer.dictionary.dtype)


@given(lookup_layers(dtypes=[torch.float64]), LOWERING, st.randoms(use_true_random=False))
def test_permuted_dictionary_filters_and_taps_change_nothing(case, lowering, random):
    layer, x = case
    weight = layer.lookup_weight().detach()
    order = list(range(weight.dictionary_size))
    random.shuffle(order)
    permuted = weight.permute_dictionary(torch.tensor(order))
    # The same filters in another order of filter groups, of members and of taps.
    per_group = weight.out_channels // weight.groups
    orders = [random.sample(range(per_group), per_group) for _ in range(weight.groups)]
    filters = torch.tensor([i * per_group + o for i, chosen in enumerate(orders) for o in chosen])
    table = filter_table(weight.out_channels, random.choice([1, 2, 5, 8]), weight.groups, filters)
    encoded = LookupWeight.from_lookup_tensor(weight.dictionary, weight.lookup_tensor(), filters=table)
    backwards = torch.cat(
        [torch.arange(int(a), int(b)).flip(0) for a, b in zip(encoded.offsets[:-1], encoded.offsets[1:], strict=True)]
    )
    flipped = dataclasses.replace(
        encoded, **{name: getattr(encoded, name)[backwards] for name in ("coefficients", "indices", "positions")}
    )
    with torch.no_grad():
        y = layer(x)
        for other in (permuted, encoded, flipped):
            again = LookupConv2d.from_weight(other.validate(), layer.to_conv(), layer.bias, lowering)
            torch.testing.assert_close(again(x), y, atol=1e-10, rtol=1e-10)


@given(lookup_layers(dtypes=[torch.float64]), st.data())
def test_gradients_are_those_of_the_dense_form(case, data):
    layer, x = case
    grad = random_tensor(data.draw, layer(x).shape, torch.float64)
    x = x.clone().requires_grad_()
    layer(x).backward(grad)
    found = [x.grad, layer.dictionary.grad, layer.coefficients.grad, *([] if layer.bias is None else [layer.bias.grad])]
    z = x.detach().clone().requires_grad_()
    inputs = [z, layer.dictionary, layer.coefficients, *([] if layer.bias is None else [layer.bias])]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(z, pads_of(layer.to_conv()), mode=mode)
    y = F.conv2d(padded, layer.dense_weight(), layer.bias, layer.stride, 0, layer.dilation, layer.groups)
    wanted = torch.autograd.grad(y, inputs, grad, allow_unused=True)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, atol=1e-9, rtol=1e-9)


@given(conv_layers(dtypes=DTYPES), LOWERING)
def test_dense_to_lookup_to_dense_is_bit_exact(case, lowering):
    layer = LookupConv2d.from_conv(case.conv, FULL.replace(lowering=lowering))
    back = layer.to_conv()
    assert torch.equal(back.weight, case.conv.weight)
    assert torch.equal(layer(case.inputs), layer(case.inputs))
    assert (back.bias is None) == (case.conv.bias is None)
    if case.conv.bias is not None:
        assert torch.equal(back.bias, case.conv.bias)
    assert_equivalent(case.conv, layer, case.inputs)
    assert torch.equal(LookupConv2d.from_conv(back, FULL).dense_weight(), case.conv.weight)


@given(lookup_weights(), st.sampled_from([1, 2, 3, 8, 40]))
def test_unpacking_and_packing_again(weight, group_size):
    lookups = weight.lookup_tensor()
    again = LookupWeight.from_lookup_tensor(weight.dictionary, lookups, group_size=group_size).validate()
    assert torch.equal(again.lookup_tensor(), lookups)
    assert torch.equal(again.dense_weight(), weight.dense_weight())
    assert again.taps >= int((lookups != 0).sum())
