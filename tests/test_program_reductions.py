"""Reductions, norms and softmax as steps of programs, against PyTorch in float64."""

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from program_runs import assert_one_program, same_on_threads
from torch import nn

from lcnn_compile import LookupConfig, convert
from lcnn_compile.errors import KernelError
from lcnn_compile.kernels import cpu
from lcnn_compile.kernels.cpu.program import Program
from lcnn_compile.kernels.cpu.steps import Concat, Normalize, Recipe, Reduce, Softmax

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the C++ kernels are unavailable")

NAN = math.nan
SHAPES = ((2, 3, 5, 7), (1, 33, 9), (3, 1, 1), (2, 70), (2, 5, 1, 37), (1, 4, 40, 41), (2, 600, 3), (0, 3, 4))


def in_the_middle(step, x, channels=3):
    """A step that reads and writes parts of larger values: the images of both lie apart."""
    more = torch.randn(x.shape[0], channels, *x.shape[2:])
    steps = (Concat((0, 1, 0), 1), *step(2))
    return Recipe(2, steps, (len(steps) + 1,)), more


@pytest.mark.parametrize("shape", SHAPES)
@given(kind=st.sampled_from(("mean", "sum", "max", "min", "squares", "variance")), data=st.data())
def test_reductions(shape, kind, data):
    torch.manual_seed(1)
    first = data.draw(st.integers(1, len(shape) - 1))
    end = data.draw(st.integers(first + 1, len(shape)))
    x = torch.randn(shape) + 3
    exact = x.double()
    dims = tuple(range(first, end))
    correction = data.draw(st.sampled_from((0.0, 1.0)))
    if kind == "variance" and math.prod(shape[first:end]) <= correction:
        return
    truth = {
        "mean": lambda: exact.mean(dims, keepdim=True),
        "sum": lambda: exact.sum(dims, keepdim=True),
        "max": lambda: exact.amax(dims, keepdim=True),
        "min": lambda: exact.amin(dims, keepdim=True),
        "squares": lambda: (exact * exact).sum(dims, keepdim=True),
        "variance": lambda: exact.var(dims, correction=correction, keepdim=True),
    }[kind]()
    [y] = same_on_threads(Program(Recipe(1, (Reduce(0, kind, first, end, correction),), (1,)), []), x)
    torch.testing.assert_close(y.double(), truth, rtol=2e-6, atol=1e-6)


def test_extremes_and_softmax_of_values_that_are_none():
    x = torch.randn(2, 5, 40)
    x[0, 1, 3], x[1, 4, 0], x[1, 2, 39] = NAN, math.inf, -math.inf
    for first, end in ((1, 2), (2, 3), (1, 3)):
        for kind, function in (("max", torch.amax), ("min", torch.amin)):
            [y] = Program(Recipe(1, (Reduce(0, kind, first, end),), (1,)), [])(x)
            torch.testing.assert_close(y, function(x, tuple(range(first, end)), keepdim=True), equal_nan=True)
        if end == first + 1:
            [y] = Program(Recipe(1, (Softmax(0, "softmax", first, end),), (1,)), [])(x)
            torch.testing.assert_close(y, x.softmax(first), equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["softmax", "log_softmax"])
def test_softmax(shape, kind):
    torch.manual_seed(2)
    x = torch.randn(shape) * 5
    for dim in range(1, len(shape)):
        [y] = same_on_threads(Program(Recipe(1, (Softmax(0, kind, dim, dim + 1),), (1,)), []), x)
        torch.testing.assert_close(y.double(), getattr(F, kind)(x.double(), dim), rtol=2e-6, atol=1e-6)


@given(
    shape=st.sampled_from(SHAPES),
    groups=st.sampled_from((None, 1, "all", 2, 3)),
    affine=st.sampled_from(("both", "weight", "bias", "none")),
    data=st.data(),
)
def test_norms(shape, groups, affine, data):
    torch.manual_seed(3)
    x = torch.randn(shape) * 2 + 5
    groups = shape[1] if groups == "all" else groups
    if groups is not None and shape[1] % groups:
        return
    first = data.draw(st.integers(1, len(shape) - 1)) if groups is None else 1
    end = data.draw(st.integers(first + 1, len(shape))) if groups is None else len(shape)
    over = shape[first:end] if groups is None else shape[1:2]
    weight = torch.rand(over) + 0.5 if affine in ("both", "weight") else None
    bias = torch.randn(over) if affine in ("both", "bias") else None
    step = Normalize(0, "normalize", first, end, 1e-3, groups)
    [y] = same_on_threads(Program(Recipe(1, (step,), (1,)), [(weight, bias)]), x)
    exact = x.double()
    if groups is None:
        dims = tuple(range(first, end))
        exact = (exact - exact.mean(dims, keepdim=True)) / (exact.var(dims, correction=0, keepdim=True) + 1e-3).sqrt()
        place = (*over, *[1] * (len(shape) - end))
    else:
        split = exact.reshape(shape[0], groups, math.prod(shape[1:]) // groups)
        split = (split - split.mean(2, keepdim=True)) / (split.var(2, correction=0, keepdim=True) + 1e-3).sqrt()
        exact, place = split.reshape(shape), (-1, *[1] * (len(shape) - 2))
    exact = exact * (1 if weight is None else weight.double().reshape(place))
    exact = exact + (0 if bias is None else bias.double().reshape(place))
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("step", [
    lambda x: (Softmax(x, "softmax", 1, 2),),
    lambda x: (Softmax(x, "softmax", 2, 3),),
    lambda x: (Reduce(x, "mean", 1, 2),),
    lambda x: (Normalize(x, "normalize", 1, 4, 1e-5, 2),),
])  # fmt: skip
def test_values_whose_images_lie_apart(step):
    torch.manual_seed(4)
    x, more = torch.randn(3, 2, 5, 7), torch.randn(3, 2, 5, 7)
    steps = (*step(0), *step(1), Concat((2, 3), 1))
    weights = [(None, None), (None, None)] if isinstance(steps[0], Normalize) else []
    [y] = same_on_threads(Program(Recipe(2, steps, (4,)), weights), x, more)
    alone = [Program(Recipe(1, step(0), (1,)), weights[:1])(v)[0] for v in (x, more)]
    assert torch.equal(y, torch.cat(alone, 1))


@pytest.mark.parametrize("step", [
    Reduce(0, "median", 1, 2), Reduce(0, "mean", 0, 1), Reduce(0, "mean", 2, 2), Reduce(0, "mean", 1, 5), Softmax(0, "normalize", 1, 2),
    Normalize(0, "softmax", 1, 2), Normalize(0, "normalize", 1, 4, 1e-5, 2), Normalize(0, "normalize", 1, 4, 1e-5, 0),
])  # fmt: skip
def test_what_does_not_fit_is_refused(step):
    with pytest.raises(KernelError):
        Program(Recipe(1, (step,), (1,)), [(None, None)] if step.weighted else [])(torch.randn(2, 3, 4, 5))


def test_weights_of_other_sizes_are_refused():
    for groups, count in ((None, 7), (3, 5)):
        step = Normalize(0, "normalize", 1, 4, 1e-5, groups)
        with pytest.raises(KernelError, match="weights"):
            Program(Recipe(1, (step,), (1,)), [(torch.ones(count), None)])(torch.randn(2, 3, 4, 5))


class Norms(nn.Module):
    """A convolution, then one expression."""

    def __init__(self, expression):
        super().__init__()
        self.conv, self.expression = nn.Conv2d(3, 12, 3, padding=1), expression
        self.group, self.instance = nn.GroupNorm(4, 12), nn.InstanceNorm2d(12, affine=True)
        self.layer, self.whole = nn.LayerNorm(12), nn.LayerNorm((12, 9, 7))
        self.wide, self.narrow = nn.Linear(12, 31), nn.Linear(31, 12)
        self.gamma = nn.Parameter(torch.randn(12))
        for norm in (self.group, self.instance, self.layer, self.whole):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        return self.expression(self, self.conv(x))


def convnext(m, x):
    y = m.layer(x.permute(0, 2, 3, 1))
    return x + (m.gamma * m.narrow(F.gelu(m.wide(y)))).permute(0, 3, 1, 2)


def layer_norm_by_hand(m, x):
    mean = x.mean(1, keepdim=True)
    y = (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + 1e-6)
    return m.gamma[:, None, None] * y + m.layer.bias.view(1, -1, 1, 1)


EXPRESSIONS = {
    "group": lambda m, x: m.group(x).relu(),
    "instance": lambda m, x: m.instance(x),
    "instance plain": lambda m, x: F.instance_norm(x),
    "layer": lambda m, x: m.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) + x,
    "layer whole": lambda m, x: m.whole(x),
    "layer by hand": layer_norm_by_hand,
    "convnext": convnext,
    "softmax": lambda m, x: x.softmax(1),
    "softmax function": lambda m, x: F.softmax(x, dim=-1),
    "log softmax": lambda m, x: F.log_softmax(x.flatten(2), 2),
    "spatial attention": lambda m, x: x * torch.cat([x.mean(1, True), x.amax(1, keepdim=True)], 1).sum(1, keepdim=True).sigmoid(),
    "normalize": lambda m, x: F.normalize(x, dim=1),
    "norm": lambda m, x: torch.linalg.vector_norm(x, dim=1, keepdim=True) + x,
    "var": lambda m, x: x.var(1, unbiased=False) + x.std((2, 3))[:, :1, None],
    "glu": lambda m, x: F.glu(x, 1),
    "sums": lambda m, x: x.sum((1, 2)) + x.amin((1, 2)),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions_are_part_of_the_program(name):
    torch.manual_seed(3)
    dense = Norms(EXPRESSIONS[name]).eval()
    model = convert(dense, LookupConfig(dictionary_size=1.0, sparsity=None, lowering="lookup", exclude=("wide", "narrow")))
    x = torch.randn(2, 3, 9, 7)
    assert_one_program(dense, model, x, atol=5e-5)
