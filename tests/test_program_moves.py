"""Steps that move values, and where values lie, against PyTorch."""

import copy
import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from program_runs import assert_one_program
from torch import nn

from lcnn_compile import LookupConfig, convert, freeze
from lcnn_compile.errors import KernelError
from lcnn_compile.kernels import cpu
from lcnn_compile.kernels.cpu.arena import place, settled
from lcnn_compile.kernels.cpu.program import Program
from lcnn_compile.kernels.cpu.steps import Concat, Copy, Expand, Map, Permute, Pool, Recipe, Slice, Softmax, View, Window

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the C++ kernels are unavailable")

NAN = math.nan
DOUBLE = (("mul", (0, 1), ()),)


def meaning(step, values):
    """What a step makes, by PyTorch."""
    if isinstance(step, Map):
        return values[step.inputs[0]] * step.numbers[0]
    if isinstance(step, Concat):
        return torch.cat([values[x] for x in step.parts], step.dim)
    x = values[step.x]
    if isinstance(step, View):
        return x.reshape(-1, *step.tail)
    if isinstance(step, Slice):
        index = torch.arange(step.length) * step.step + step.start
        return x.index_select(step.dim, index)
    if isinstance(step, Permute):
        return x.permute(step.dims)
    if isinstance(step, Expand):
        return x.expand(-1, *step.tail)
    if isinstance(step, Pool):
        return F.max_pool2d(x, step.window.kernel_size, step.window.stride, step.window.padding)
    return x.clone()


def drawn_step(data, shapes):
    """A step that fits some of the values."""
    x = data.draw(st.integers(0, len(shapes) - 1))
    shape = shapes[x]
    kind = data.draw(
        st.sampled_from(
            ("map", "map", "slice", "slice", "concat", "concat", "concat", "view", "permute", "expand", "copy", "pool")
        )
    )
    if kind == "concat":
        dim = data.draw(st.integers(1, len(shape) - 1)) if len(shape) > 1 and data.draw(st.integers(0, 3)) == 0 else 1
        fits = [
            v
            for v, s in enumerate(shapes)
            if len(s) == len(shape) > 1 and (*s[:dim], *s[dim + 1 :]) == (*shape[:dim], *shape[dim + 1 :])
        ]
        if fits:
            return Concat(tuple(data.draw(st.lists(st.sampled_from(fits), min_size=1, max_size=3))), dim)
    if kind == "slice" and len(shape) > 1:
        dim = data.draw(st.integers(1, len(shape) - 1)) if data.draw(st.booleans()) else 1
        step = data.draw(st.sampled_from((1, 1, 1, 2, -1)))
        start = data.draw(st.integers(0, shape[dim] - 1))
        room = (shape[dim] - 1 - start) // step + 1 if step > 0 else start + 1
        return Slice(x, dim, start, data.draw(st.integers(1, room)), step)
    if kind == "view" and len(shape) > 1:
        image = math.prod(shape[1:])
        tails = [(image,), (1, image), (1, 1, image), tuple(reversed(shape[1:])), shape[2:] or (image,)]
        return View(x, data.draw(st.sampled_from(tails)))
    if kind == "permute":
        return Permute(x, (0, *data.draw(st.permutations(range(1, len(shape))))))
    if kind == "expand" and len(shape) > 1:
        return Expand(x, tuple(data.draw(st.integers(1, 3)) if size == 1 else size for size in shape[1:]))
    if kind == "pool" and len(shape) == 4:
        return Pool(x, Window(False, (3, 3), (1, 1), (1, 1)))
    return Copy(x) if kind == "copy" else Map((x,), (), (2.0,), DOUBLE)


@given(st.data())
def test_values_that_lie_in_each_other(data):
    torch.manual_seed(0)
    batch = data.draw(st.sampled_from((1, 2, 3)))
    inputs = [torch.randn(batch, 4, 3, 5), torch.randn(batch, 2, 3, 5)]
    shapes, steps = [tuple(x.shape) for x in inputs], []
    for _ in range(data.draw(st.integers(1, 12))):
        step = drawn_step(data, shapes)
        shape = step.shape(shapes)
        if math.prod(shape) > 4000 or len(shape) > 6:
            continue
        steps.append(step)
        shapes.append(shape)
    if not steps:
        return
    outputs = tuple(data.draw(st.lists(st.integers(0, len(shapes) - 1), min_size=1, max_size=3)))
    recipe = Recipe(2, tuple(steps), outputs)
    assert Recipe.from_json(recipe.to_json()) == recipe
    exact = [x.double() for x in inputs]
    for step in steps:
        exact.append(meaning(step, exact))
    program = Program(recipe, [])
    program(*[torch.full_like(x, NAN) for x in inputs])
    found = program(*inputs)
    for y, value in zip(found, outputs, strict=True):
        assert y.is_contiguous()
        torch.testing.assert_close(y.double(), exact[value], rtol=1e-6, atol=0)
    assert len({y.data_ptr() for y in found} | {x.data_ptr() for x in inputs}) == len(found) + 2


def test_values_are_not_written_over_while_somebody_reads_them():
    x = torch.randn(2, 3, 9, 11)
    pool = [Pool(v, Window(False, (3, 3), (1, 1), (1, 1))) for v in range(4)]
    exact = [x.double()]
    for step in pool:
        exact.append(meaning(step, exact))
    assert torch.equal(Program(Recipe(1, tuple(pool), (4,)), [])(x)[0].double(), exact[4])
    # A softmax may take the place of what it reads, unless that is read again.
    steps = (pool[0], Softmax(1, "softmax", 1, 2), Map((1, 2), (), (), (("add", (0, 1), (1.0,)),)))
    [y] = Program(Recipe(1, steps, (3,)), [])(x)
    torch.testing.assert_close(y.double(), exact[1] + exact[1].softmax(1), rtol=1e-5, atol=1e-6)


def copies(recipe, shapes):
    """How many values are moved by themselves."""
    recipe = settled(recipe, recipe.shapes(shapes))
    placed = place(recipe, recipe.shapes(shapes))
    return sum(map(len, placed.copied.values())) + sum(isinstance(s, Copy) for s in recipe.steps)


def test_what_is_concatenated_is_written_in_place():
    def twice(x):
        return Map((x,), (), (2.0,), DOUBLE)

    shape = [(3, 4, 5, 6)]
    # Two halves; the inputs themselves must be copied.
    assert copies(Recipe(1, (twice(0), twice(0), Concat((1, 2), 1)), (3,)), shape) == 0
    assert copies(Recipe(1, (twice(0), Concat((0, 1), 1)), (2,)), shape) == 1
    # A dense block: all that it has made so far, again and again.
    dense = (twice(0), twice(1), Concat((1, 2), 1), twice(3), Concat((1, 2, 4), 1), twice(5), Concat((1, 2, 4, 6), 1), twice(7))
    assert copies(Recipe(1, dense, (8,)), shape) == 0
    grown = (twice(0), twice(1), Concat((1, 2), 1), twice(3), Concat((3, 4), 1), twice(5), Concat((5, 6), 1), twice(7))
    assert copies(Recipe(1, grown, (8,)), shape) == 0
    # What was split, with more behind it.
    split = (twice(0), Slice(1, 1, 0, 2), Slice(1, 1, 2, 2), twice(3), Concat((2, 3, 4), 1), twice(5))
    assert copies(Recipe(1, split, (6,)), shape) == 0
    # Flattened heads.
    heads = (twice(0), twice(0), View(1, (120,)), View(2, (120,)), Concat((3, 4), 1))
    assert copies(Recipe(1, heads, (5,)), shape) == 0
    # What is also returned, twice there, or in two places at once, is copied.
    assert copies(Recipe(1, (twice(0), twice(0), Concat((1, 2), 1)), (1, 3)), shape) == 1
    assert copies(Recipe(1, (twice(0), Concat((1, 1), 1)), (2,)), shape) == 1
    assert copies(Recipe(1, (twice(0), twice(0), Concat((1, 2), 1), Concat((2, 1), 1)), (3, 4)), shape) == 2
    # Other dimensions.
    assert copies(Recipe(1, (twice(0), twice(0), Concat((1, 2), 2)), (3,)), shape) == 2


@pytest.mark.parametrize(
    ("steps", "shape"),
    [
        ((Concat((0, 1), 1), Copy(0)), (2, 3)),
        ((Concat((0,), 0),), (2, 3)),
        ((Slice(0, 1, 2, 2),), (2, 3)),
        ((Slice(0, 1, 0, 2, -1),), (2, 3)),
        ((Slice(0, 0, 0, 1),), (2, 3)),
        ((Slice(0, 2, 0, 1),), (2, 3)),
        ((Permute(0, (1, 0)),), (2, 3)),
        ((Permute(0, (0, 1, 2)),), (2, 3)),
        ((Expand(0, (4,)),), (2, 3)),
        ((View(0, (4,)),), (2, 3)),
        ((Concat((0, 1), 1),), (2, 3)),
    ],
)
def test_moves_that_do_not_fit_are_refused(steps, shape):
    with pytest.raises((KernelError, IndexError)):
        Program(Recipe(1, steps, (1,)), [])(torch.randn(shape))


class Moves(nn.Module):
    """A convolution, then one expression."""

    def __init__(self, expression):
        super().__init__()
        self.conv, self.expression = nn.Conv2d(3, 12, 3, padding=1), expression
        self.again = nn.Conv2d(12, 12, 1)

    def forward(self, x):
        return self.expression(self, self.conv(x))


def chunks(m, x):
    a, b = x.chunk(2, 1)
    return a * torch.sigmoid(b)


def c2f(m, x):
    parts = list(m.again(x).split((4, 8), 1))
    parts.extend(F.silu(parts[-1] * k) for k in (1.5, 2.0))
    return torch.cat(parts, 1)


EXPRESSIONS = {
    "cat": lambda m, x: torch.cat([x, F.relu(x), m.again(x)], 1),
    "cat rows": lambda m, x: torch.cat((x, m.again(x)), dim=2),
    "cat last": lambda m, x: torch.concat((x, m.again(x)), -1),
    "dense block": lambda m, x: torch.cat([torch.cat([x, m.again(x)], 1), F.relu(x)], 1),
    "chunk": chunks,
    "c2f": c2f,
    "unbind": lambda m, x: sum(x.unbind(1)[1:4]),
    "tensor_split": lambda m, x: torch.cat(x.tensor_split((3, 7), 1)[::-1], 1),
    "split rows": lambda m, x: torch.cat(torch.split(x, 4, 2)[::-1], 2),
    "slice": lambda m, x: x[:, 2:7] + x[:, 7:12],
    "slice steps": lambda m, x: torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[:, :, ::2, 1::2]], 1) * 2,
    "slice ends": lambda m, x: x[:, :, 1:-1, 2:] + 1,
    "select": lambda m, x: x.select(1, 3) + x[:, -1],
    "narrow": lambda m, x: x.narrow(1, 2, 4).relu(),
    "new dimension": lambda m, x: x[:, None].relu()[:, 0],
    "stack": lambda m, x: torch.stack([x, m.again(x)], 2).flatten(1, 2),
    "permute": lambda m, x: x.permute(0, 2, 3, 1).sigmoid().permute(0, 3, 1, 2).relu(),
    "transpose": lambda m, x: x.flatten(2).transpose(1, 2).neg(),
    "swapaxes": lambda m, x: torch.swapaxes(x, 1, -1).abs(),
    "movedim": lambda m, x: x.movedim(1, -1).abs(),
    "expand": lambda m, x: x.mean((2, 3), keepdim=True).expand(-1, -1, 4, 3) + 1,
    "flip": lambda m, x: x.flip((1, -1)).abs(),
    "pixel shuffle": lambda m, x: F.pixel_shuffle(m.again(x), 2),
    "pixel unshuffle": lambda m, x: m.again(F.pixel_unshuffle(x[:, :3], 2)),
    "channel shuffle": lambda m, x: F.relu(F.channel_shuffle(x, 3)),
    "channel shuffle by hand": lambda m, x: x.view(x.shape[0], 3, 4, *x.shape[2:]).transpose(1, 2).reshape(x.shape).relu(),
    "clone": lambda m, x: x.clone().add_(1),
    "flatten images": lambda m, x: m.again(x.flatten(0, 1)[:, None].abs().view(-1, 12, *x.shape[2:])),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions_are_part_of_the_program(name):
    torch.manual_seed(3)
    dense = Moves(EXPRESSIONS[name]).eval()
    model = convert(dense, LookupConfig(dictionary_size=1.0, sparsity=None, lowering="lookup"))
    x = torch.randn(2, 3, 10, 8)
    assert_one_program(dense, model, x, atol=2e-5)


def test_parts_that_are_returned_or_written_stay_views():
    torch.manual_seed(5)

    def parts(m, x):
        y = m.again(x)
        a, b = y.chunk(2, 1)
        y[:, 1] = 0.5
        return a, b.relu(), y.flatten(1)

    dense = Moves(parts).eval()
    model = convert(dense, LookupConfig(dictionary_size=1.0, sparsity=None, lowering="lookup"))
    x = torch.randn(2, 3, 10, 8)
    with torch.no_grad():
        exact = copy.deepcopy(dense).double()(x.double())
        torch._dynamo.reset()
        for run in (freeze(model, x), torch.compile(model, backend="lcnn")):
            found = run(x)
            for y, truth in zip(found, exact, strict=True):
                torch.testing.assert_close(y.double(), truth, rtol=1e-4, atol=2e-5)
            found[0].fill_(7)
            assert bool((found[2][:, :240] == 7).all()) == (
                found[0].untyped_storage().data_ptr() == found[2].untyped_storage().data_ptr()
            )
