"""Outputs have the strides and dtypes that the dense layer gives: a ``.view`` behind a layer works where it worked."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from lcnn_compile import LookupConfig, convert

KINDS = {
    "1d": (nn.Conv1d(8, 12, 3), (2, 8, 9), None),
    "2d": (nn.Conv2d(8, 12, 3), (2, 8, 9, 7), torch.channels_last),
    "pointwise": (nn.Conv2d(8, 12, 1), (2, 8, 9, 7), torch.channels_last),
    "3d": (nn.Conv3d(8, 12, 3), (2, 8, 4, 5, 6), None),
    "transposed 1d": (nn.ConvTranspose1d(8, 12, 4, 2), (2, 8, 5), None),
    "transposed 2d": (nn.ConvTranspose2d(8, 12, 4, 2), (2, 8, 5, 4), torch.channels_last),
    "transposed without bias": (nn.ConvTranspose2d(8, 12, 4, 2, bias=False), (2, 8, 5, 4), torch.channels_last),
}


def pair(kind, lowering="lookup"):
    layer, shape, last = KINDS[kind]
    config = LookupConfig(dictionary_size=4, sparsity=2, lowering=lowering)
    made = convert(nn.Sequential(layer).eval(), config, calibration=[torch.randn(shape)]).eval()
    return layer, made, shape, last


@pytest.mark.parametrize("lowering", ["lookup", "factored", "dense", "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_strides(kind, lowering):
    layer, made, shape, last = pair(kind, lowering)
    for x in (torch.randn(shape), torch.randn(1, *shape[1:]), torch.randn(0, *shape[1:]), torch.randn(shape[1:])):
        for form in (torch.contiguous_format, last):
            if form is None or (form != torch.contiguous_format and x.dim() != len(shape)):
                continue
            given = x.contiguous(memory_format=form)
            for gradients in (False, True):
                with torch.set_grad_enabled(gradients):
                    assert strides(made(given)) == strides(layer(given))
            with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
                fake = made(mode.from_tensor(given))
            assert fake.stride() == made(given).stride()


def strides(y):
    """Those that a view depends on: of none of the elements, and of dimensions of one, they mean nothing."""
    return y.shape, [step for size, step in zip(y.shape, y.stride(), strict=True) if size > 1 and y.numel()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes_under_autocast(kind, dtype, backend_reset):
    layer, made, shape, _ = pair(kind)
    compiled = torch.compile(made, backend="lcnn")
    for x in (torch.randn(shape), torch.randn(shape).to(dtype)):
        with torch.autocast("cpu", dtype):
            y = made(x)
            assert y.dtype == layer(x).dtype
            y.float().sum().backward()
            assert all(p.grad.dtype == p.dtype for p in made.parameters())
            with torch.no_grad():
                assert compiled(x).dtype == compiled(x).dtype == y.dtype
                torch.testing.assert_close(compiled(x), y.detach(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes_of_cast_models(kind, dtype):
    _, made, shape, _ = pair(kind)
    x = torch.randn(shape)
    want = made.double()(x.double())
    found = made.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), want, rtol=0.05, atol=0.1)
