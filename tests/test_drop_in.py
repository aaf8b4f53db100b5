"""LookupConv2d at full dictionary in the place of nn.Conv2d, through the cases by which PyTorch tests nn.Conv2d."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lcnn_compile import LcnnError, LookupConfig, LookupConv2d
from lcnn_compile.testing import assert_close

FULL = LookupConfig(dictionary_size=1.0, sparsity=None)
LOWERINGS = ("auto", "lookup", "factored", "dense")
# (name, arguments of the layer, shape of the input), as in PyTorch's lists of module tests.
CASES = [
    ("plain", (3, 4, (3, 2)), {}, (2, 3, 7, 5)),
    ("strided", (3, 4, (3, 3), (2, 2)), {}, (2, 3, 6, 6)),
    ("padding", (3, 4, (3, 3), (2, 2), (1, 1)), {}, (2, 3, 6, 6)),
    ("dilated", (3, 2, (3, 3), (2, 2), (1, 1), (2, 2)), {}, (2, 3, 8, 8)),
    ("no_bias", (3, 4, (3, 2), 1, 0, 1, 1, False), {}, (2, 3, 6, 5)),
    ("zero_batch", (3, 4, (3, 2)), {}, (0, 3, 7, 5)),
    ("groups", (4, 6, (3, 2), 1, 0, 1, 2), {}, (2, 4, 6, 5)),
    ("groups_thnn", (4, 6, (3, 2), 1, 0, 1, 2), {}, (2, 4, 6, 5)),
    ("depthwise", (4, 4, (3, 3)), {"groups": 4}, (2, 4, 6, 6)),
    ("depthwise_with_multiplier", (4, 8, (3, 3)), {"groups": 4}, (2, 4, 6, 6)),
    ("depthwise_strided", (4, 4, (3, 3), (2, 2)), {"groups": 4}, (2, 4, 6, 6)),
    ("depthwise_padded", (4, 4, (3, 3), (1, 1), (1, 1)), {"groups": 4}, (2, 4, 6, 6)),
    ("depthwise_dilated", (4, 4, (2, 2)), {"groups": 4, "dilation": (2, 2)}, (2, 4, 5, 5)),
    ("pad_valid", (2, 4, (3, 4)), {"padding": "valid"}, (2, 2, 6, 5)),
    ("pad_same", (2, 4, (3, 4)), {"padding": "same"}, (2, 2, 6, 5)),
    ("pad_same_dilated", (2, 4, (3, 4)), {"padding": "same", "dilation": 2}, (2, 2, 6, 5)),
    ("circular_stride2_pad2", (2, 3, (3, 3), 2, 2), {"padding_mode": "circular"}, (2, 2, 3, 4)),
    ("reflect_stride2_pad2", (2, 3, (3, 3), 2, 2), {"padding_mode": "reflect"}, (2, 2, 3, 4)),
    ("replicate_stride2_pad2", (2, 3, (3, 3), 2, 2), {"padding_mode": "replicate"}, (2, 2, 3, 4)),
    ("reflect_same", (2, 3, (4, 3)), {"padding": "same", "padding_mode": "reflect"}, (2, 2, 6, 5)),
    ("one_by_one", (8, 4, 1), {}, (2, 8, 5, 5)),
    ("one_pixel", (8, 4, 1), {}, (2, 8, 1, 1)),
    ("kernel_as_large_as_the_input", (3, 4, 5), {}, (2, 3, 5, 5)),
    ("seven_by_seven", (3, 8, 7, 2, 3), {}, (1, 3, 23, 20)),
    ("unbatched", (3, 4, (3, 2)), {}, (3, 7, 5)),
    ("unbatched_circular", (3, 4, 3), {"padding": 1, "padding_mode": "circular"}, (3, 7, 5)),
    ("one_input_channel", (1, 64, 3), {"padding": 1, "bias": False}, (1, 1, 30, 30)),
    ("tall_stride", (1, 16, (5, 2), (2, 1), (0, 1)), {}, (1, 1, 41, 21)),
    ("stride_past_the_kernel", (3, 4, 2, 5), {}, (2, 3, 13, 12)),
    ("padding_past_the_input", (3, 4, 3), {"padding": 6}, (1, 3, 2, 2)),
]
NAMES = [case[0] for case in CASES]


def pair(args, kwargs, dtype=torch.float32, lowering="auto"):
    conv = nn.Conv2d(*args, **kwargs).to(dtype)
    return conv, LookupConv2d.from_conv(conv, FULL.replace(lowering=lowering))


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_values_in_every_layout(case, lowering):
    _, args, kwargs, shape = case
    conv, layer = pair(args, kwargs, lowering=lowering)
    wide = copy.deepcopy(conv).double()
    x = torch.randn(shape)
    inputs = [x, torch.stack([x, x.new_full(shape, torch.nan)], -1)[..., 0], x.transpose(-1, -2).contiguous().transpose(-1, -2)]
    if x.dim() == 4:
        inputs.append(x.contiguous(memory_format=torch.channels_last))
    with torch.no_grad():
        for value in inputs:
            y = layer(value)
            assert_close(y, conv(value), wide(value.double()), name=case[0])
            assert y.dtype == x.dtype
            if x.dim() == 4 and len(x) and min(*x.shape[1:], *y.shape[1:]) > 1:
                assert y.is_contiguous() == conv(value).is_contiguous()


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_gradients_are_those_of_the_dense_layer(case):
    _, args, kwargs, shape = case
    conv, layer = pair(args, kwargs, torch.float64)
    x, z = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    z.data.copy_(x.data)
    z.requires_grad_()
    grad = torch.randn_like(conv(x))
    conv(x).backward(grad)
    layer(z).backward(grad)
    torch.testing.assert_close(z.grad, x.grad)
    if conv.bias is not None:
        torch.testing.assert_close(layer.bias.grad, conv.bias.grad)
    # At full dictionary D is the identity, so that the gradient of the coefficients is the dense weight's.
    with torch.no_grad():
        encoded = layer.lookup_weight()
        gradient = type(encoded)(
            **{**encoded.tensors(), "coefficients": layer.coefficients.grad}, kernel_size=encoded.kernel_size
        )
        torch.testing.assert_close(gradient.dense_weight(), conv.weight.grad)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c[0] != "seven_by_seven" and c[0] != "one_input_channel"], ids=lambda c: c[0]
)
def test_gradcheck(case):
    _, args, kwargs, shape = case
    layer = pair(args, kwargs, torch.float64)[1]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(layer, (x,), fast_mode=True)
    torch.autograd.gradgradcheck(layer, (x,), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_dtypes(case, dtype):
    _, args, kwargs, shape = case
    conv, layer = pair(args, kwargs, dtype)
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        y = layer(x)
        assert y.dtype == dtype
        assert_close(y, conv(x), conv.double()(x.double()), name=case[0])


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_own_constructor_copies_and_state(case):
    _, args, kwargs, shape = case
    factory = {"device": "cpu", "dtype": torch.float64}
    layer = LookupConv2d(*args, **kwargs, dictionary_size=1.0, sparsity=None, **factory)
    x = torch.randn(shape, dtype=torch.float64)
    y = layer(x)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    torch.testing.assert_close(y, layer.to_conv()(x))
    other = LookupConv2d(*args, **kwargs, dictionary_size=1.0, sparsity=None, **factory)
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.float().double()):
        torch.testing.assert_close(twin(x), y, atol=1e-5, rtol=1e-5)
    meta = LookupConv2d(*args, **kwargs, dictionary_size=1.0, sparsity=None, device="meta")
    assert {t.device.type for t in (*meta.parameters(), *meta.buffers())} == {"meta"}
    assert meta(torch.empty(shape, device="meta")).shape == y.shape
    assert layer.eval().training is False
    assert "LookupConv2d(" in repr(layer)
    assert str(layer)


def test_same_padding_of_even_kernels_and_other_dilations():
    for size, dilation in (((5, 10), 1), ((3, 4), 1), ((3, 4), (1, 2)), ((4, 4), (3, 2))):
        x = torch.rand(1, 1, 9, 20)
        layer = LookupConv2d(1, 1, size, padding="same", dilation=dilation, dictionary_size=1.0, sparsity=None)
        torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, padding="same", dilation=dilation))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"padding": "foo"}, ValueError, "padding"),
        ({"padding": "same", "stride": 2}, ValueError, "padding='same' is not supported"),
        ({"padding": "same", "stride": (1, 3)}, ValueError, "padding='same' is not supported"),
        ({"groups": 0}, ValueError, "groups must be a positive integer"),
        ({"groups": -1}, ValueError, "groups must be a positive integer"),
        ({"in_channels": 4, "groups": 3}, ValueError, "in_channels must be divisible by groups"),
        ({"groups": 3, "out_channels": 4}, ValueError, "out_channels must be divisible by groups"),
        ({"padding_mode": "mirror"}, ValueError, "padding_mode"),
    ],
)
def test_constructor_errors(arguments, error, message):
    given = {"in_channels": 3, "out_channels": 33, "kernel_size": 10, **arguments}
    with pytest.raises(error, match=message):
        nn.Conv2d(**given)
    with pytest.raises(error, match=message) as caught:
        LookupConv2d(**given)
    assert isinstance(caught.value, LcnnError)


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 0},
        {"kernel_size": (1, 2, 3)},
        {"kernel_size": True},
        {"kernel_size": 1.5},
        {"kernel_size": "3"},
        {"out_channels": 0},
        {"in_channels": 0},
        {"in_channels": torch.tensor(3)},
        {"groups": True},
        {"stride": 1.5},
        {"stride": (3.0, 3)},
        {"stride": (1, 2, 3)},
        {"stride": None},
        {"padding": 1.5},
        {"padding": (3.0, 3)},
        {"padding": b"same"},
        {"padding": 2**63},
        {"padding": "same", "dilation": (3,)},
        {"dilation": True},
        {"dilation": (1, 2, 3)},
    ],
    ids=str,
)
def test_arguments_that_are_no_convolution(arguments):
    # PyTorch lets most of these pass until the layer is called; no fraction may be cut to an int in silence.
    with pytest.raises(LcnnError):
        LookupConv2d(**{"in_channels": 3, "out_channels": 4, "kernel_size": 3, **arguments})


@pytest.mark.parametrize(
    ("arguments", "shape", "message"),
    [
        (
            {"kernel_size": 10},
            (1, 3, 1, 1),
            "Calculated padded input size per channel: (1 x 1). Kernel size: (10 x 10). "
            "Kernel size can't be greater than actual input size",
        ),
        ({"kernel_size": 4, "stride": -1}, (1, 3, 4, 4), "non-positive stride is not supported"),
        ({"kernel_size": 4, "stride": 0}, (1, 3, 4, 4), "non-positive stride is not supported"),
        ({"kernel_size": 3}, (1, 10, 1, 28, 28), "Expected 3D (unbatched) or 4D (batched) input to"),
        ({"kernel_size": 3}, (28, 28), "Expected 3D (unbatched) or 4D (batched) input to"),
        ({"kernel_size": 3}, (1, 4, 8, 8), "channels"),
        ({"kernel_size": 3}, (3, 2, 8), "Kernel size can't be greater than actual input size"),
        ({"kernel_size": 3, "dilation": 4}, (2, 3, 8, 9), "Kernel size can't be greater than actual input size"),
    ],
)
def test_call_errors(arguments, shape, message):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        nn.Conv2d(3, 33, **arguments)(torch.empty(shape))
    with pytest.raises(RuntimeError, match=re.escape(message)) as caught:
        LookupConv2d(3, 33, **arguments)(torch.empty(shape))
    assert isinstance(caught.value, LcnnError)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.cfloat, torch.int64])
def test_inputs_of_another_dtype(dtype):
    with pytest.raises(RuntimeError):
        nn.Conv2d(3, 4, 3)(torch.ones(1, 3, 8, 8).to(dtype))
    with pytest.raises(RuntimeError):
        LookupConv2d(3, 4, 3)(torch.ones(1, 3, 8, 8).to(dtype))


def test_empty_batches_have_zero_gradients():
    layer = LookupConv2d(4, 4, 3, stride=2, padding=1, groups=4, dictionary_size=1.0, sparsity=None)
    x = torch.randn(0, 4, 4, 4, requires_grad=True)
    layer(x).backward(torch.rand(0, 4, 2, 2))
    assert x.grad.shape == x.shape
    assert all(not p.grad.any() for p in layer.parameters())


def test_backward_twice_needs_the_graph():
    y = LookupConv2d(3, 3, 3, dictionary_size=1.0, sparsity=None)(torch.randn(2, 3, 5, 5))
    y.sum().backward()
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        y.sum().backward()


def test_groups_are_separate_convolutions():
    layer = pair((4, 6, 3), {"groups": 2, "bias": False})[1]
    weight = layer.dense_weight()
    x = torch.randn(2, 4, 6, 6)
    halves = [F.conv2d(x[:, :2], weight[:3]), F.conv2d(x[:, 2:], weight[3:])]
    torch.testing.assert_close(layer(x), torch.cat(halves, 1))


def test_to_empty_and_moves():
    layer = LookupConv2d(3, 4, 3, dictionary_size=1.0, sparsity=None)
    state = copy.deepcopy(layer.state_dict())
    x = torch.randn(1, 3, 8, 8)
    y = layer(x)
    empty = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    empty.load_state_dict(state)
    assert torch.equal(empty(x), y)


def test_in_sequential_with_norms_under_training():
    conv = nn.Conv2d(3, 6, 3, padding=1)
    dense = nn.Sequential(copy.deepcopy(conv), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
    lookup = nn.Sequential(LookupConv2d.from_conv(conv, FULL), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
    x = torch.randn(4, 3, 9, 8)
    for model in (dense, lookup):
        model(x).square().mean().backward()
    torch.testing.assert_close(lookup[1].weight.grad, dense[1].weight.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lookup[1].running_var, dense[1].running_var)
