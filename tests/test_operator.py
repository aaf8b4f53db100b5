"""torch.ops.lcnn.lookup_conv2d: values, gradients and registration."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lcnn_compile import LcnnError, LookupConv2d, LookupWeight
from lcnn_compile.kernels import reference
from lcnn_compile.kernels.operator import LOWERINGS, lookup_conv2d
from lcnn_compile.testing import assert_close, lookup_layers, lookup_weights

LOWERING = st.sampled_from([*LOWERINGS, "auto"])


def call(weight, x, bias=None, stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), lowering="lookup", **epilogue):
    args = (x, *weight.tensors().values(), bias, weight.out_channels, weight.kernel_size, stride, padding, dilation)
    return lookup_conv2d(*args, lowering, **epilogue)


def weight_of(out_channels=10, vectors=5, channels=6, kernel=(3, 2), groups=1, group_size=3, dtype=torch.float32):
    lookups = torch.randn(out_channels, vectors, *kernel, dtype=dtype)
    lookups[torch.rand(lookups.shape) < 0.6] = 0
    dictionary = torch.randn(groups, vectors, channels // groups, dtype=dtype)
    return LookupWeight.from_lookup_tensor(dictionary, lookups, group_size=group_size)


@given(lookup_layers(), LOWERING)
def test_every_lowering_is_as_exact_as_a_dense_convolution(case, lowering):
    layer, x = case
    layer.lowering = lowering
    conv = layer.to_conv()
    with torch.no_grad():
        exact = reference.dense_weight(layer.dictionary.double(), layer.lookup_weight().to(torch.float64).lookup_tensor())
        conv64 = layer.to_conv().double()
        conv64.weight.copy_(exact)
        result = layer(x)
        own, truth = conv(x), conv64(x.double())
        # The error of S scales with the terms of the sum, not with the sum, which may cancel.
        conv64.weight.copy_(exact.abs())
        scale = conv64(x.double().abs()).abs().max() if truth.numel() else torch.tensor(0.0)
    assert result.shape == own.shape
    if x.is_contiguous():
        assert result.is_contiguous()
    if truth.numel():
        floor = own + 8 * torch.finfo(torch.float32).eps * scale.float()
        assert_close(result, floor, truth, name=f"{lowering} of {layer}")


@given(lookup_weights(in_channels=5), LOWERING, st.sampled_from(list(reference.ACTIVATIONS)), st.booleans(), st.booleans())
def test_epilogues(weight, lowering, activation, with_residual, residual_last):
    x, bias = torch.randn(2, 5, 9, 8), torch.randn(weight.out_channels)
    plain = F.conv2d(x.double(), weight.to(torch.float64).dense_weight(), bias.double())
    residual = torch.randn(plain.shape) if with_residual else None
    wide = None if residual is None else residual.double()
    truth = reference.apply_epilogue(plain, None, wide, activation, residual_last)
    own = reference.apply_epilogue(F.conv2d(x, weight.dense_weight(), bias), None, residual, activation, residual_last)
    result = call(weight, x, bias, lowering=lowering, activation=activation, residual=residual, residual_last=residual_last)
    assert_close(result, own, truth, factor=16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_other_dtypes(dtype, lowering):
    weight = weight_of().to(dtype)
    x, bias = torch.randn(2, 6, 11, 7, dtype=dtype), torch.randn(10, dtype=dtype)
    exact = weight.to(torch.float64).dense_weight()
    truth = F.conv2d(x.double(), exact, bias.double())
    assert_close(call(weight, x, bias, lowering=lowering), F.conv2d(x, exact.to(dtype), bias), truth)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (1, 0, 2, 1)])
def test_gradients(groups, padding):
    weight = weight_of(vectors=3, groups=groups, dtype=torch.float64)
    x = torch.randn(1, 6, 5, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(10, dtype=torch.float64, requires_grad=True)
    dictionary, coefficients, *rest = weight.tensors().values()
    member = (weight.filters >= 0)[reference.tap_filter_groups(weight.offsets, coefficients.shape[0])]

    def function(x, dictionary, coefficients, bias):
        return lookup_conv2d(x, dictionary, coefficients * member, *rest, bias, 10, (3, 2), (2, 1), padding, (1, 2))

    inputs = (x, dictionary.clone().requires_grad_(), coefficients.clone().requires_grad_(), bias)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_registration():
    weight = weight_of()
    dictionary, coefficients, *rest = weight.tensors().values()
    x = torch.randn(2, 6, 9, 8)
    for grad in (False, True):
        factors = (dictionary.clone().requires_grad_(grad), coefficients.clone().requires_grad_(grad))
        for bias in (None, torch.randn(10, requires_grad=grad)):
            args = (x.clone().requires_grad_(grad), *factors, *rest, bias, 10, (3, 2), (2, 1), (1, 0, 2, 1), (1, 2), "lookup")
            torch.library.opcheck(torch.ops.lcnn.lookup_conv2d, args)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(
        torch.ops.lcnn.lookup_conv2d, (last, dictionary, coefficients, *rest, None, 10, (3, 2), (1, 1), (0,) * 4, (1, 1))
    )


def test_epilogues_have_no_gradient():
    weight = weight_of()
    weight.dictionary.requires_grad_()
    with pytest.raises(LcnnError, match="for inference"):
        call(weight, torch.randn(1, 6, 8, 8), activation="relu")


def test_the_inference_operator_is_the_same_without_gradients():
    weight, x, bias = weight_of(), torch.randn(2, 6, 9, 8), torch.randn(10)
    args = (x, *weight.tensors().values(), bias, 10, (3, 2), (1, 1), (0,) * 4, (1, 1), "lookup", "silu")
    assert torch.equal(torch.ops.lcnn.lookup_conv2d_inference(*args), lookup_conv2d(*args))
    torch.library.opcheck(torch.ops.lcnn.lookup_conv2d_inference, args)
    assert not torch.ops.lcnn.lookup_conv2d_inference(x.requires_grad_(), *args[1:]).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    layer = LookupConv2d(6, 10, 3, padding=1)
    x = torch.randn(2, 6, 8, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert x.grad.dtype == torch.float32
    assert layer.dictionary.grad.isfinite().all()
    torch.testing.assert_close(y.float(), layer(x), atol=0.05, rtol=0.05)


def test_changed_weights_are_noticed():
    layer = LookupConv2d(6, 10, 3, lowering="lookup")
    x = torch.randn(1, 6, 8, 8)

    def check():
        torch.testing.assert_close(layer(x), layer.to_conv()(x), atol=1e-5, rtol=1e-5)

    with torch.no_grad():
        check()
        layer.coefficients.mul_(2)
        check()
        layer.dictionary.data = torch.randn_like(layer.dictionary)
        check()
        layer.coefficients = nn.Parameter(torch.randn_like(layer.coefficients) * (layer.coefficients != 0))
        check()
        layer.load_state_dict(LookupConv2d(6, 10, 3).state_dict())
        check()
        layer.load_state_dict(LookupConv2d(6, 10, 3).state_dict(), assign=True)
        check()


def test_bad_calls_are_errors():
    weight = weight_of()
    x = torch.randn(1, 6, 8, 8)
    bad = {
        "input channels": lambda: call(weight, torch.randn(1, 5, 8, 8)),
        "dimensions": lambda: call(weight, torch.randn(6, 8, 8)),
        "dtype": lambda: call(weight, x.double()),
        "too small": lambda: call(weight, torch.randn(1, 6, 2, 1)),
        "stride": lambda: call(weight, x, stride=(0, 1)),
        "dilation": lambda: call(weight, x, dilation=(1, -1)),
        "padding": lambda: call(weight, x, padding=(-1, 0, 0, 0)),
        "padding length": lambda: call(weight, x, padding=(1, 1)),
        "kernel length": lambda: lookup_conv2d(x, *weight.tensors().values(), None, 10, (3,), (1, 1), (0,) * 4, (1, 1)),
        "kernel size": lambda: lookup_conv2d(x, *weight.tensors().values(), None, 10, (2, 2), (1, 1), (0,) * 4, (1, 1)),
        "out_channels": lambda: lookup_conv2d(x, *weight.tensors().values(), None, 11, (3, 2), (1, 1), (0,) * 4, (1, 1)),
        "bias": lambda: call(weight, x, torch.randn(9)),
        "residual": lambda: call(weight, x, residual=torch.randn(1, 10, 8, 8)),
        "activation": lambda: call(weight, x, activation="gelu"),
        "lowering": lambda: call(weight, x, lowering="fast"),
    }
    for name, function in bad.items():
        with pytest.raises(LcnnError):
            pytest.fail(f"{name}: {function().shape}")


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("indices", lambda t: t.index_fill(0, torch.tensor([1]), 5)),
        ("indices", lambda t: t.index_fill(0, torch.tensor([0]), -1)),
        ("positions", lambda t: t.index_fill(0, torch.tensor([2]), 6)),
        ("offsets", lambda t: t.flip(0)),
        ("offsets", lambda t: t + 1),
        ("offsets", lambda t: t[:-1]),
        ("filters", lambda t: t.index_fill(0, torch.tensor([0]), 3)),
        ("filters", lambda t: t - 2),
        ("filters", lambda t: t + 100),
        ("indices", lambda t: t.long()),
        ("coefficients", lambda t: t[:-1]),
        ("coefficients", lambda t: t.double()),
        ("dictionary", lambda t: t[0]),
        ("dictionary", lambda t: t[:, :0]),
    ],
)
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_bad_weights_never_reach_a_kernel(field, change, lowering):
    weight = weight_of()
    tensors = {**weight.tensors(), field: change(getattr(weight, field)).contiguous()}
    with pytest.raises(LcnnError):
        lookup_conv2d(torch.randn(1, 6, 8, 8), *tensors.values(), None, 10, (3, 2), (1, 1), (0,) * 4, (1, 1), lowering)


@pytest.mark.parametrize("lowering", ["lookup", "factored", "dense", "backend"])
@pytest.mark.parametrize("channels", [3, 16])
def test_pixels_that_a_strided_pointwise_convolution_skips(lowering, channels):
    layer = LookupConv2d(channels, 20, 1, stride=(2, 3), bias=True, dictionary_size=3, sparsity=2, group_size=4)
    exact = layer.to_conv().double()
    x = torch.randn(3, channels, 11, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    truth = x.detach().double().requires_grad_()
    layer.lowering = "factored" if lowering == "backend" else lowering
    if lowering == "backend":
        with torch.no_grad():
            y = torch.compile(layer.eval(), backend="lcnn")(x)
        torch.testing.assert_close(y.double(), exact(truth), rtol=1e-4, atol=1e-5)
        return
    y, wanted = layer(x), exact(truth)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(y)
    y.backward(grad)
    wanted.backward(grad.double())
    torch.testing.assert_close(x.grad.double(), truth.grad, rtol=1e-4, atol=1e-5)
    weight = layer.lookup_weight().detach()
    p = torch.zeros(20, 3, dtype=torch.float64)
    owner = torch.repeat_interleave(torch.arange(len(weight.offsets) - 1), weight.offsets.diff().long())
    for member in range(4):
        p[weight.filters[owner, member].long(), weight.indices.long()] = weight.coefficients[:, member].double()
    g = exact.weight.grad[:, :, 0, 0]
    torch.testing.assert_close(layer.dictionary.grad[0].double(), p.T @ g, rtol=1e-4, atol=1e-4)
