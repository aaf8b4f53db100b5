"""Dense convolutions as steps of programs, against PyTorch in float64."""

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from program_runs import assert_one_program, on_threads
from torch import nn

from lcnn_compile import LookupConfig, convert
from lcnn_compile.errors import KernelError
from lcnn_compile.kernels import cpu
from lcnn_compile.kernels.cpu.elementwise import merged
from lcnn_compile.kernels.cpu.program import Program
from lcnn_compile.kernels.cpu.steps import Concat, Depthwise, LookUp, Map, Recipe
from lcnn_compile.lookup import LookupWeight

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the C++ kernels are unavailable")

ACTIVATIONS = {"none": lambda y: y, "relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}


@given(
    batch=st.integers(0, 3),
    size=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    channels=st.integers(1, 5),
    multiplier=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*[st.integers(0, 3)] * 4),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    residual=st.sampled_from((None, False, True)),
    biased=st.booleans(),
)
def test_depthwise(batch, size, channels, multiplier, kernel, stride, pads, dilation, activation, residual, biased):
    torch.manual_seed(0)
    x, weight = torch.randn(batch, channels, *size), torch.randn(channels * multiplier, 1, *kernel)
    bias = torch.randn(channels * multiplier) if biased else None
    top, bottom, left, right = pads
    try:
        padded = F.pad(x.double(), (left, right, top, bottom))
        exact = F.conv2d(padded, weight.double(), None if bias is None else bias.double(), stride, 0, dilation, channels)
    except RuntimeError:
        return
    added = torch.randn(exact.shape)
    sizes = (channels, channels * multiplier, kernel, stride, pads, dilation)
    step = Depthwise(0, None if residual is None else 1, *sizes, activation, residual is True)
    if residual is not None and not residual:
        exact = exact + added
    exact = ACTIVATIONS[activation](exact)
    exact = exact + added if residual else exact
    # Also as a part of what is concatenated: the images lie apart.
    recipe = Recipe(2, (step, Concat((2, 1), 1)), (3,))
    assert Recipe.from_json(recipe.to_json()) == recipe
    one, two = on_threads(Program(recipe, [(weight, bias)]), x, added)
    assert torch.equal(one[0], two[0])
    torch.testing.assert_close(one[0].double(), torch.cat((exact, added.double()), 1), rtol=1e-5, atol=2e-5)


@given(
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 30), st.integers(1, 40)),
    channels=st.integers(1, 20),
    filters=st.integers(1, 20),
    groups=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*[st.integers(0, 3)] * 4),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    layout=st.booleans(),
)
def test_a_dense_convolution_is_a_lookup_of_the_input(
    batch, size, channels, filters, groups, kernel, stride, pads, dilation, layout
):
    torch.manual_seed(0)
    x, weight = torch.randn(batch, groups * channels, *size), torch.randn(groups * filters, channels, *kernel)
    bias, (top, bottom, left, right) = torch.randn(groups * filters), pads
    try:
        exact = F.conv2d(
            F.pad(x.double(), (left, right, top, bottom)), weight.double(), bias.double(), stride, 0, dilation, groups
        )
    except RuntimeError:
        return
    lossless = LookupWeight.lossless(weight, groups=groups, group_size=8)
    packed = cpu.packed_weight(tuple(lossless.tensors().values()), kernel)
    step = LookUp(0, None, groups * channels, groups * filters, kernel, stride, pads, dilation)
    x = x.transpose(2, 3).contiguous().transpose(2, 3) if layout else x
    for [y] in on_threads(Program(Recipe(1, (step,), (1,)), [(packed, bias)]), x):
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5 * (1 + channels * math.prod(kernel)) ** 0.5)


def test_what_does_not_fit_is_refused():
    step = Depthwise(0, None, 3, 6, (3, 3), (1, 1), (0,) * 4, (1, 1))
    made = Program(Recipe(1, (step,), (1,)), [(torch.randn(6, 1, 3, 3), None)])
    assert made(torch.randn(1, 3, 5, 5))[0].shape == (1, 6, 3, 3)
    for wrong in (torch.randn(1, 4, 5, 5), torch.randn(1, 3, 2, 5), torch.randn(3, 5, 5)):
        with pytest.raises(KernelError):
            made(wrong)
    with pytest.raises(KernelError, match="weight"):
        Program(Recipe(1, (step,), (1,)), [(torch.randn(6, 1, 3, 2), None)])(torch.randn(1, 3, 5, 5))


@pytest.mark.parametrize(("ending", "activation", "residual", "last"), [
    ((("relu", (0,), ()),), "relu", False, False),
    ((("clamp", (0,), (0.0, 6.0)),), "relu6", False, False),
    ((("add", (0, 1), (1.0,)),), "none", True, False),
    ((("add", (1, 0), (1.0,)), ("silu", (2,), ())), "silu", True, False),
    ((("hardswish", (0,), ()), ("add", (2, 1), (1.0,))), "hardswish", True, True),
    ((("clamp", (0,), (0.0, 5.0)),), None, False, False),
    ((("add", (0, 1), (2.0,)),), None, True, False),
    ((("sub", (0, 1), (1.0,)),), None, True, False),
    ((("add", (0, 0), (1.0,)),), None, False, False),
    ((("add", (0, 1), (1.0,)), ("add", (2, 1), (1.0,))), None, True, False),
    ((("relu", (1,), ()), ("add", (0, 2), (1.0,))), None, True, False),
])  # fmt: skip
def test_what_follows_a_convolution_is_done_by_it(ending, activation, residual, last):
    torch.manual_seed(0)
    x, added, weight = torch.randn(2, 3, 9, 7), torch.randn(2, 3, 9, 7), torch.randn(3, 1, 3, 3)
    conv = Depthwise(0, None, 3, 3, (3, 3), (1, 1), (1,) * 4, (1, 1))
    after = Map((2, 1) if residual else (2,), (), (), ending)
    steps, *_ = merged((conv, after), 2, (3,), [(weight, None)], [(2, 3, 9, 7)] * 4)
    assert len(steps) == (2 if activation is None else 1)
    if activation is not None:
        assert (steps[0].activation, steps[0].residual, steps[0].residual_last) == (activation, 1 if residual else None, last)
    y = F.conv2d(x.double(), weight.double(), None, 1, 1, 1, 3)
    made = [y, added.double()] if residual else [y]
    for name, read, parameters in ending:
        operands = [made[r] for r in read]
        made.append({
            "relu": torch.relu, "silu": F.silu, "hardswish": F.hardswish, "clamp": lambda v, p=parameters: v.clamp(*p),
            "add": lambda a, b, p=parameters: a + p[0] * b, "sub": lambda a, b: a - b,
        }[name](*operands))  # fmt: skip
    [found] = Program(Recipe(2, (conv, after), (3,)), [(weight, None)])(x, added)
    torch.testing.assert_close(found.double(), made[-1], rtol=1e-5, atol=1e-5)


class Dense(nn.Module):
    """A lookup convolution, then dense layers."""

    def __init__(self, *layers, flat=False):
        super().__init__()
        self.conv, self.dense, self.flat = nn.Conv2d(3, 12, 3, padding=1), nn.Sequential(*layers), flat

    def forward(self, x):
        y = self.conv(x)
        return self.dense(y.flatten(2) if self.flat else y)


LAYERS = {
    "3x3": lambda: (nn.Conv2d(12, 17, 3, 2, 1), nn.ReLU()),
    "same": lambda: (nn.Conv2d(12, 17, (2, 4), padding="same", dilation=2), nn.SiLU()),
    "valid": lambda: (nn.Conv2d(12, 17, 3, padding="valid"),),
    "groups": lambda: (nn.Conv2d(12, 18, 3, 1, 1, groups=3), nn.GELU()),
    "depthwise": lambda: (nn.Conv2d(12, 12, 3, 2, 1, groups=12, bias=False), nn.BatchNorm2d(12), nn.Hardswish()),
    "depthwise twice": lambda: (nn.Conv2d(12, 24, 5, 1, 2, groups=12), nn.ReLU6()),
    "reflect": lambda: (nn.Conv2d(12, 7, 3, padding=1, padding_mode="reflect"),),
    "transposed": lambda: (nn.ConvTranspose2d(12, 7, 2, 2),),
    "transposed crop": lambda: (nn.ConvTranspose2d(12, 7, 3, 2, 1, 1),),
    "transposed groups": lambda: (nn.ConvTranspose2d(12, 9, (4, 3), (2, 3), (1, 2), (0, 1), 3, bias=False, dilation=(1, 2)),),
    "transposed plain": lambda: (nn.ConvTranspose2d(12, 7, 3),),
}
ROWS = {
    "row": lambda: (nn.Conv1d(12, 7, 3, 2, 1), nn.BatchNorm1d(7), nn.LeakyReLU(0.2)),
    "row same": lambda: (nn.Conv1d(12, 7, 4, padding="same", dilation=2),),
    "row depthwise": lambda: (nn.Conv1d(12, 12, 7, padding=3, groups=12), nn.GELU()),
    "row transposed": lambda: (nn.ConvTranspose1d(12, 7, 4, 2, 1),),
}


@pytest.mark.parametrize("name", [*LAYERS, *ROWS])
def test_dense_layers_are_part_of_the_program(name):
    torch.manual_seed(3)
    dense = Dense(*(LAYERS.get(name) or ROWS[name])(), flat=name in ROWS).eval()
    for module in dense.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    model = convert(dense, LookupConfig(dictionary_size=1.0, sparsity=None, lowering="lookup", include=("conv",)))
    x = torch.randn(2, 3, 10, 7)
    assert_one_program(dense, model, x, atol=5e-5)
