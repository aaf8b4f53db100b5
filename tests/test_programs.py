"""Programs: regions of a graph in one native call, against PyTorch in float64."""

import copy
import math
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import nn
from ways import inductor, quiet

import lcnn_compile
from lcnn_compile import LookupConfig, LookupConv2d, convert, freeze
from lcnn_compile.errors import KernelError
from lcnn_compile.kernels import cpu
from lcnn_compile.kernels.cpu import build as cpu_build
from lcnn_compile.kernels.cpu import program
from lcnn_compile.kernels.cpu import steps as step_kinds
from lcnn_compile.kernels.cpu.arena import place
from lcnn_compile.kernels.cpu.lanes import side_by_side
from lcnn_compile.kernels.cpu.program import Program
from lcnn_compile.kernels.cpu.steps import Linear, LookUp, Pool, Recipe, View, Window, pooled
from lcnn_compile.passes import fuse_epilogues, gather_programs
from lcnn_compile.passes.programs import programs
from lcnn_compile.testing.cases import LAYOUTS, laid_out

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the C++ kernels are unavailable")


def alive(before: set[int]) -> list[Program]:
    """Programs made since ``before``."""
    return [p for handle, p in sorted(program._alive.items()) if handle not in before]


def layer(channels: int, filters: int, kernel: int = 3, **arguments) -> LookupConv2d:
    size, taps = max(1, channels // 2), min(max(1, channels // 2), 2)
    made = LookupConv2d(channels, filters, kernel, dictionary_size=size, sparsity=taps, group_size=3, **arguments)
    nn.init.normal_(made.dictionary)
    made.lowering = "lookup"
    return made.eval()


def packed(made: LookupConv2d) -> tuple[cpu.PackedWeight, torch.Tensor | None]:
    names = ("dictionary", "coefficients", "indices", "positions", "offsets", "filters")
    return cpu.packed_weight(tuple(getattr(made, n).detach() for n in names), made.kernel_size), made.bias


def assert_close(y: torch.Tensor, exact: torch.Tensor) -> None:
    assert y.shape == exact.shape
    assert float((y.double() - exact).norm()) <= 1e-5 * float(exact.norm()) + 1e-12


@given(
    size=st.tuples(st.integers(5, 40), st.integers(5, 40)),
    channels=st.integers(1, 9),
    filters=st.integers(1, 20),
    stride=st.integers(1, 3),
    kernel=st.sampled_from((1, 2, 3, 5)),
    window=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 1)),
    mean=st.booleans(),
    batch=st.integers(1, 3),
    threads=st.integers(1, 2),
)
def test_pooling_before_and_after_writing(size, channels, filters, stride, kernel, window, mean, batch, threads):
    torch.manual_seed(0)
    conv = layer(channels, filters, kernel, stride=stride, padding=kernel // 2)
    width, step, margin = window
    high, wide = ((v + 2 * (kernel // 2) - kernel) // stride + 1 for v in size)
    if margin > width // 2 or min(high, wide) + 2 * margin < width:
        return
    x = torch.randn(batch, channels, *size)
    exact = F.relu(F.conv2d(x.double(), conv.dense_weight().double(), conv.bias.double(), stride, kernel // 2))
    exact = (F.avg_pool2d if mean else F.max_pool2d)(exact, width, step, margin)
    geometry = ((kernel, kernel), (stride, stride), (kernel // 2,) * 4, (1, 1))
    steps = (
        LookUp(0, None, channels, filters, *geometry, "relu"),
        Pool(1, Window(mean, (width, width), (step, step), (margin, margin))),
    )
    recipe = Recipe(1, steps, (2,))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        apart = Program(recipe, [packed(conv)])
        apart(torch.full_like(x, math.nan))  # leaves its scratch poisoned
        [y] = apart(x)
        fused = pooled(recipe, recipe.shapes([x.shape]), 0)
        assert len(fused.steps) == 1
        together = Program(fused, [packed(conv)])
        together(torch.full_like(x, math.nan))
        [z] = together(x)
    finally:
        torch.set_num_threads(before)
    assert_close(y, exact.detach())
    assert_close(z, exact.detach())
    # Up to four pixels are summed in an order that depends on how many a program forms.
    assert high * wide <= 4 or torch.equal(y, z)


@given(sizes=st.tuples(st.integers(0, 9), st.integers(1, 70), st.integers(1, 23)), biased=st.booleans(), wide=st.booleans())
def test_linear_layers(sizes, biased, wide):
    torch.manual_seed(0)
    images, inputs, outputs = sizes[0], sizes[1] * (41 if wide else 1), sizes[2]
    # A place in a larger tensor: what is read or written beyond an end is NaN.
    around = torch.full((images * inputs + 64,), math.nan)
    x = around[32 : 32 + images * inputs].view(images, inputs).copy_(torch.randn(images, inputs))
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs) if biased else None
    made = Program(Recipe(1, (Linear(0, inputs, outputs),), (1,)), [(weight, bias)])
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found += made(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    assert_close(found[0], exact)
    weight.fill_(math.nan)
    assert torch.equal(made(x)[0], found[0])


@given(st.data())
def test_values_that_live_at_once_do_not_share_memory(data):
    steps, count = [], data.draw(st.integers(1, 12))
    for number in range(count):
        x = data.draw(st.integers(0, number))
        steps.append(Pool(x, Window(False, (1, 1))) if data.draw(st.booleans()) else View(x, (5 * (number + 1),)))
    shapes = [(2, 5 * (number + 1)) for number in range(count + 1)]
    roots = list(range(count + 1))
    for number, step in enumerate(steps):
        if isinstance(step, View):
            roots[number + 1] = roots[step.x]
            shapes[number + 1] = shapes[step.x]
    made = [number + 1 for number, step in enumerate(steps) if isinstance(step, Pool)]
    if not made:
        return
    recipe = Recipe(1, tuple(steps), (made[-1],))
    placed = place(recipe, shapes)
    places, arena = [offset // 4 for offset in placed.offsets], placed.size // 4
    # Each root's life: from the step that makes it to the last that reads it.
    lives = {}
    for value in made[:-1]:
        reads = [number for number, step in enumerate(steps) if roots[step.x] == value]
        lives[value] = (value - 1, max(reads, default=value - 1))
    for a in lives:
        assert 0 <= places[a] <= arena - math.prod(shapes[a])
        for b in lives:
            if a < b and lives[b][0] <= lives[a][1]:
                first, second = sorted((a, b), key=lambda v: places[v])
                assert places[first] + math.prod(shapes[first]) <= places[second]


def test_recipes_survive_as_text():
    window = Window(True, (3, 2), (2, 1), (1, 0))
    step = LookUp(0, None, 3, 4, (3, 3), (1, 2), (1, 1, 0, 2), (1, 1), "silu", pool=window)
    last = LookUp(4, 1, 8, 2, (1, 1), (1, 1), (0,) * 4, (1, 1))
    recipe = Recipe(2, (step, Pool(2, window), View(3, (8, 1)), last, Linear(3, 8, 2)), (5, 3, 6))
    assert Recipe.from_json(recipe.to_json()) == recipe


class Branches(nn.Module):
    """Residuals, pooling, views, a linear layer, two outputs."""

    def __init__(self):
        super().__init__()
        self.first = layer(3, 12, 5, stride=2, padding=2)
        self.left, self.right = layer(12, 12, padding=1), layer(12, 12, 1)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.last = layer(12, 7, 1)
        self.head = nn.Linear(7, 5)

    def forward(self, x):
        x = self.pool(F.relu(self.first(x)))
        y = F.relu(self.left(x) + self.right(x))
        z = self.last(y)
        return self.head(z.mean((2, 3))), F.adaptive_avg_pool2d(y, 1).flatten(1)


def compiled(model: nn.Module, **arguments):
    torch._dynamo.reset()
    return torch.compile(model.eval(), backend="lcnn", **arguments)


@pytest.fixture
def exact():
    """The outputs of a model in float64, by PyTorch alone."""

    def outputs(model, x):
        with torch.no_grad():
            return model.double()(x.double()), model.float()

    return outputs


def test_a_graph_of_one_program_needs_no_compiler(exact, monkeypatch):
    torch.manual_seed(1)
    model, x = Branches().eval(), torch.randn(2, 3, 37, 29)
    expected, model = exact(model, x)
    monkeypatch.setattr("lcnn_compile.backend.entry.compile_with_inductor", lambda *a: pytest.fail("Inductor was called"))
    before = set(program._alive)
    with torch.no_grad():
        found = compiled(model)(x)
    assert len(alive(before)) == 1
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


def test_what_a_program_cannot_do_goes_to_the_compiler(exact):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = layer(4, 9, padding=1), layer(9, 9, padding=1), layer(9, 5, 1)

        def forward(self, x):
            y = self.b(torch.sin(self.a(x))).flatten(1).view(x.shape[0], 9, 11, 13)
            return self.c(torch.cos(y)), y.transpose(2, 3)

    torch.manual_seed(2)
    model, x = Mixed().eval(), torch.randn(3, 4, 11, 13)
    expected, model = exact(model, x)
    before = set(program._alive)
    with torch.no_grad():
        found = compiled(model)(x)
    assert len(alive(before)) == 3
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


STEPS = {
    "softmax": lambda m, x: x.softmax(1),
    "layer norm": lambda m, x: m.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "group norm": lambda m, x: F.group_norm(x, 3),
    "standard deviation": lambda m, x: x - x.std((2, 3), keepdim=True),
    "reflected": lambda m, x: F.pad(x, (2, 1, 0, 3), "reflect"),
    "resized": lambda m, x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "shuffled": lambda m, x: torch.cat([x[:, ::2], x[:, 1::2]], 1),
    "gated": lambda m, x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
}


@pytest.mark.parametrize("name", STEPS)
def test_programs_of_every_step_in_a_larger_graph_and_at_a_second_shape(name, exact):
    class Cut(nn.Module):
        """What no program has a step for stands behind the step, which is then part of an operator's call."""

        def __init__(self):
            super().__init__()
            self.first, self.last, self.norm = layer(3, 12, padding=1), layer(12, 5, 1), nn.LayerNorm(12)

        def forward(self, x):
            return self.last(STEPS[name](self, self.first(x)).cumsum(2))

    torch.manual_seed(4)
    model = Cut().eval()
    inputs = [torch.randn(2, 3, 13, 9), torch.randn(3, 3, 13, 17), torch.randn(1, 3, 7, 11)]
    for x in inputs:
        expected, model = exact(model, x)
        x.expected = expected
    before = set(program._alive)
    with quiet(), inductor(real=False), torch.no_grad():
        call = torch.compile(model, backend="lcnn")
        for x in inputs:
            assert_close(call(x), x.expected)
    assert {type(step).__name__ for made in alive(before) for step in made.recipe.steps} > {"LookUp"}


def test_every_kind_of_step_is_read_from_text():
    kinds = {kind for kind in vars(step_kinds).values() if isinstance(kind, type) and issubclass(kind, step_kinds.Step)}
    assert {kind.__name__ for kind in kinds - {step_kinds.Step, step_kinds.Turn}} == set(step_kinds._KINDS)


def test_weights_batches_and_sizes_that_change(exact):
    torch.manual_seed(3)
    model = Branches().eval()
    run = compiled(model, dynamic=True)
    for shape in ((1, 3, 20, 20), (4, 3, 20, 20), (2, 3, 31, 17)):
        with torch.no_grad():
            model.left.dictionary.mul_(-1.5)
            model.first.bias.add_(0.25)
            model.head.weight.mul_(-2)
            x = torch.randn(shape)
            found = run(x)
            twin = Branches().eval()
            twin.load_state_dict(model.state_dict())
        expected, _ = exact(twin, x)
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b)


def test_the_pass_alone_on_an_exported_model(exact):
    torch.manual_seed(4)
    model, x = Branches().eval(), torch.randn(2, 3, 21, 22)
    expected, model = exact(model, x)
    gm = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        gm = gather_programs(fuse_epilogues(gm))
        found = gm(x)
    assert len(programs(gm)) == 1
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


def test_strided_inputs_and_outputs_of_their_own():
    torch.manual_seed(5)
    model = convert(nn.Sequential(nn.Conv2d(6, 8, 3)), LookupConfig(dictionary_size=1.0, sparsity=None)).eval()
    x = torch.randn(2, 9, 12, 6).permute(0, 3, 1, 2)
    wide = torch.randn(2, 12, 9, 24)[:, ::2, :, 3:15]
    run = compiled(model, dynamic=False)
    with torch.no_grad():
        for value in (x, wide, wide.expand(2, -1, -1, -1)):
            y = run(value)
            assert_close(y, F.conv2d(value.double(), model[0].dense_weight().double(), model[0].bias.double()))
            again = run(value)
            assert again.data_ptr() != y.data_ptr()
            assert torch.equal(again, y)


def test_what_does_not_fit_is_refused():
    conv = layer(4, 6, padding=1)
    step = LookUp(0, None, 4, 6, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    made = Program(Recipe(1, (step,), (1,)), [packed(conv)])
    for wrong in (torch.randn(1, 5, 7, 7), torch.randn(4, 7, 7), torch.randn(1, 4, 7, 7).double()):
        with pytest.raises(KernelError, match="input"):
            made(wrong)
    with pytest.raises(KernelError, match="takes 1"):
        made()
    with pytest.raises(KernelError, match="handle"):
        torch.ops.lcnn.run_program([torch.randn(1, 4, 7, 7)], torch.tensor(-5), made.recipe.to_json())


def test_one_program_takes_its_inputs_in_any_layout_in_turn():
    conv, residual = layer(6, 8, padding=1), torch.randn(2, 8, 9, 12)
    step = LookUp(0, 1, 6, 8, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), "relu")
    made = Program(Recipe(2, (step, Pool(2, Window(True, (2, 3), (1, 2)))), (3,)), [packed(conv)])
    x = torch.randn(2, 6, 9, 12)
    for first in LAYOUTS:
        for second in LAYOUTS:
            a, b = laid_out(x, first), laid_out(residual, second)
            exact = F.conv2d(a.double(), conv.dense_weight().double(), conv.bias.double(), padding=1) + b.double()
            assert_close(made(a, b)[0], F.avg_pool2d(F.relu(exact), (2, 3), (1, 2)).detach())


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("least", [0, 1 << 30])
def test_pooling_of_windows_that_are_not_square_and_of_values_that_are_none(mean, least):
    conv, x = layer(5, 9, 3, padding=1), torch.randn(2, 5, 23, 37)
    x[1, :, 11, 20] = math.nan
    steps = (LookUp(0, None, 5, 9, (3, 3), (1, 1), (1,) * 4, (1, 1)), Pool(1, Window(mean, (3, 2), (2, 3), (1, 0))))
    recipe = Recipe(1, steps, (2,))
    recipe = pooled(recipe, recipe.shapes([x.shape]), least)
    assert len(recipe.steps) == (1 if least == 0 else 2)
    [y] = Program(recipe, [packed(conv)])(x)
    exact = F.conv2d(x.double(), conv.dense_weight().double(), conv.bias.double(), padding=1)
    exact = F.avg_pool2d(exact, (3, 2), (2, 3), (1, 0)) if mean else F.max_pool2d(exact, (3, 2), (2, 3), (1, 0))
    torch.testing.assert_close(y.double(), exact.detach(), atol=1e-5, rtol=1e-5, equal_nan=True)
    assert y.isnan().any()


@pytest.mark.parametrize("window", [((3, 3), (2, 2), (1, 1)), ((2, 3), (3, 1), (0, 1)), ((4, 2), (1, 2), (2, 0))])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_pooling_of_many_bands(window, mean, threads):
    kernel, stride, padding = window
    conv, x = layer(6, 9, 3, padding=1), torch.randn(2, 6, 151, 303)
    recipe = Recipe(1, (LookUp(0, None, 6, 9, (3, 3), (1, 1), (1,) * 4, (1, 1)), Pool(1, Window(mean, *window))), (2,))
    recipe = pooled(recipe, recipe.shapes([x.shape]), 0)
    assert len(recipe.steps) == 1
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        [y] = Program(recipe, [packed(conv)])(x)
    finally:
        torch.set_num_threads(before)
    exact = F.conv2d(x.double(), conv.dense_weight().double(), conv.bias.double(), padding=1).detach()
    assert_close(y, (F.avg_pool2d if mean else F.max_pool2d)(exact, kernel, stride, padding))


def test_poolings_that_cannot_be_done_before_writing():
    conv, again = layer(4, 4, padding=1), layer(4, 5, padding=1)
    x, residual = torch.randn(2, 4, 9, 12), torch.randn(2, 4, 9, 12)
    first, second = (
        lambda t, c=c: F.conv2d(t, c.dense_weight().double(), c.bias.double(), padding=1).detach() for c in (conv, again)
    )
    geometry = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    window = Window(False, (2, 2), (2, 2))
    y = first(x.double())
    cases = [
        # A residual is added to what was not pooled yet.
        (Recipe(2, (LookUp(0, 1, 4, 4, *geometry), Pool(2, window)), (3,)), 2, [F.max_pool2d(y + residual.double(), 2)]),
        # The result is wanted unpooled too: by the caller, by another step.
        (Recipe(1, (LookUp(0, None, 4, 4, *geometry), Pool(1, window)), (1, 2)), 2, [y, F.max_pool2d(y, 2)]),
        (
            Recipe(1, (LookUp(0, None, 4, 4, *geometry), Pool(1, window), LookUp(1, None, 4, 5, *geometry)), (2, 3)),
            3,
            [F.max_pool2d(y, 2), second(y)],
        ),
        # Only the first of two can be.
        (
            Recipe(1, (LookUp(0, None, 4, 4, *geometry), Pool(1, window), Pool(2, window)), (3,)),
            2,
            [F.max_pool2d(F.max_pool2d(y, 2), 2)],
        ),
    ]
    for recipe, steps, truth in cases:
        given = [x, residual][: recipe.inputs]
        made = pooled(recipe, recipe.shapes([t.shape for t in given]), 0)
        assert len(made.steps) == steps
        weights = [packed(c) for c, _ in zip((conv, again), [s for s in recipe.steps if isinstance(s, LookUp)], strict=False)]
        for found, exact in zip(Program(made, weights)(*given), truth, strict=True):
            assert_close(found, exact)


def attempt(given, handle, recipe):
    return torch.ops.lcnn.run_program(given, handle, recipe)


def test_the_operator_refuses_what_would_not_fit_in_memory():
    step = LookUp(0, None, 4, 6, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    made = Program(Recipe(1, (step, View(1, (6 * 7 * 7,))), (2,)), [packed(layer(4, 6, padding=1))])
    handle, text, x = torch.tensor(made.handle), made.recipe.to_json(), torch.randn(1, 4, 7, 7)
    assert attempt([x], handle, text)[0].shape == (1, 6 * 7 * 7)
    # The view was made for images of 7x7: an output of that size must not take a larger one.
    for size in ((300, 300), (7, 8), (3, 3), (0, 7)):
        with pytest.raises(KernelError):
            attempt([torch.randn(1, 4, *size)], handle, text)
    for recipe in (
        "",
        "garbage",
        "[1, [], [3]]",
        '[1, [["View", {"x": 1, "tail": [3]}]], [1]]',
        '[1, [["X", {}]], [1]]',
        "[" * 100_000,
        "null",
    ):
        with pytest.raises(KernelError):
            attempt([x], handle, recipe)
        with pytest.raises(KernelError):
            attempt([x.to("meta")], handle.to("meta"), recipe)
    for wrong in (torch.tensor([made.handle] * 2), torch.tensor(math.nan), handle.double(), handle + 1000):
        with pytest.raises(KernelError):
            attempt([x], wrong, text)
    for inputs in ([], [x, x], [x.to("meta").squeeze(0)], [x.to_sparse()], [x.bfloat16()]):
        with pytest.raises((KernelError, NotImplementedError)):
            attempt(inputs, handle, text)
    added = Program(Recipe(2, (replace(step, residual=1),), (2,)), [packed(layer(4, 6, padding=1))])
    assert added(x, torch.randn(1, 6, 7, 7))[0].shape == (1, 6, 7, 7)
    for residual in ((1, 6, 7, 6), (1, 1, 7, 7), (6, 7, 7), (1, 6, 0, 7)):
        with pytest.raises(KernelError, match="residual"):
            attempt([x, torch.randn(residual)], torch.tensor(added.handle), added.recipe.to_json())
    freed = torch.randn(1, 4, 7, 7)
    freed.untyped_storage().resize_(0)
    with pytest.raises(KernelError, match="memory"):
        attempt([freed], handle, text)


@pytest.mark.parametrize(
    ("window", "shape"),
    [
        (Window(False, (2, 2), (2, 2)), (1, 4, 1, 1)),
        (Window(True, (2, 2), (2, 2)), (4, 7, 7)),
        (Window(True), (1, 4, 0, 3)),
        (Window(False), (1, 4, 3, 0)),
    ],
)
def test_poolings_that_do_not_fit_are_refused(window, shape):
    with pytest.raises(KernelError, match="pooling"):
        Program(Recipe(1, (Pool(0, window),), (1,)), [])(torch.randn(shape))


def test_inputs_that_are_negated_when_read():
    model, x = Branches().eval(), torch.randn(2, 3, 21, 22)
    run = compiled(model)
    with torch.no_grad():
        expected = run(x)
        negated = torch._neg_view(-x)
        assert negated.is_neg()
        for a, b in zip(run(negated), expected, strict=True):
            torch.testing.assert_close(a, b)


class Small(nn.Module):
    """Every kind of step on small images, with a result of its own before the last."""

    def __init__(self, channels: int, filters: int, window: int, mean: bool):
        super().__init__()
        self.first = layer(channels, filters, 3, padding=1)
        self.second = layer(filters, filters, 3, padding=(0, 2), dilation=(1, 2), stride=(2, 1))
        self.third = layer(filters, filters, 3, padding=1)
        pool = nn.AvgPool2d if mean else nn.MaxPool2d
        self.pool = pool(window, max(1, window - 1), padding=window // 2 if window > 2 else 0)
        self.last = layer(filters, 7, 1)
        self.head, self.other = nn.Linear(7, 13), nn.Linear(7, 2, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.second(self.pool(torch.relu(self.first(x))))
        x = torch.relu(x + self.third(x))
        y = torch.flatten(self.last(x.amax((2, 3), keepdim=True)), 1)
        return x, y, self.head(y), self.other(y)


@pytest.mark.parametrize("images", [8, 16])
@pytest.mark.parametrize(("window", "mean"), [(2, False), (2, True), (3, False), (1, True)])
def test_images_side_by_side(monkeypatch, images, window, mean):
    if cpu_build.instruction_set() not in ("avx2", "avxvnni", "portable") and images == 8:
        pytest.skip("half a vector")
    monkeypatch.setitem(program.IMAGES, cpu_build.instruction_set(), images)
    torch.manual_seed(0)
    model, x = Small(5, 11, window, mean).eval(), torch.randn(2 * images + 3, 5, 9, 7)
    exact = copy.deepcopy(model).double()(x.double())
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            with torch.no_grad():
                frozen = lcnn_compile.freeze(model, x, dynamic_batch=False)
                found.append(frozen(x.flip(3).flip(3)))
            [made] = programs(frozen.graph)
            assert made._side_by_side((x,)) == images
            assert not made._side_by_side((x[: images - 1],))
    finally:
        torch.set_num_threads(threads)
    for y, again, truth in zip(*found, exact, strict=True):
        assert torch.equal(y, again)
        assert_close(y, truth)


def test_large_images_and_strides_are_not_put_side_by_side():
    steps = (LookUp(0, None, 3, 5, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),)
    fits = Recipe(1, steps, (1,))
    assert side_by_side(fits, fits.shapes([(8, 3, 9, 9)]), 8) is not None
    assert side_by_side(fits, fits.shapes([(7, 3, 9, 9)]), 8) is None
    assert side_by_side(fits, fits.shapes([(8, 3, 200, 200)]), 8) is None
    flat = (*steps, View(1, (5 * 81,)), Linear(2, 5 * 81, 12), View(3, (12, 1, 1)))
    for ends, possible in ((3, True), (4, False)):
        recipe = Recipe(1, flat[:ends], (ends,))
        assert (side_by_side(recipe, recipe.shapes([(8, 3, 9, 9)]), 8) is not None) == possible
    strided = Recipe(1, (replace(steps[0], stride=(1, 2)),), (1,))
    assert side_by_side(strided, strided.shapes([(8, 3, 9, 9)]), 8) is None


@pytest.mark.parametrize("size", [(2, 2), (4, 6), (9, 8), (14, 70), (8, 32), (4, 4), (6, 2), (11, 16), (7, 8)])
@pytest.mark.parametrize("mean", [False, True])
def test_pooling_in_pairs(size, mean):
    recipe = Recipe(1, (Pool(0, Window(mean, (2, 2), (2, 2))),), (1,))
    x = torch.randn(3, 5, *size)
    x[0, 1, 0, 1], x[2, 4, -1, -1] = torch.nan, torch.nan
    exact = (F.avg_pool2d if mean else F.max_pool2d)(x, 2)
    torch.testing.assert_close(Program(recipe, [])(x)[0], exact, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    ("pool", "size"),
    [
        (nn.AvgPool2d(3, 3, ceil_mode=True), (2, 8)),
        (nn.AvgPool2d(3, 2, 1, ceil_mode=True), (6, 6)),
        (nn.AvgPool2d(3, 2, 1, ceil_mode=True), (7, 5)),
        (nn.MaxPool2d(3, 2, ceil_mode=True), (2, 2)),
        (nn.MaxPool2d(2, 2, ceil_mode=True), (1, 1)),
        (nn.MaxPool2d((5, 1), (5, 1), ceil_mode=True), (3, 4)),
        (nn.MaxPool2d(2, 2, ceil_mode=True), (4, 6)),
        (nn.AvgPool2d(5, 1, 2), (2, 3)),
    ],
)
def test_windows_that_leave_the_image(pool, size):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), pool, nn.Conv2d(8, 4, 1)).eval()
    model = convert(dense, LookupConfig(dictionary_size=1.0, sparsity=None, lowering="lookup"))
    x = torch.randn(3, 4, *size)
    frozen = freeze(model, x)
    assert frozen.alone == cpu.is_available()
    with torch.no_grad():
        wanted = copy.deepcopy(dense).double()(x.double())
    torch.testing.assert_close(frozen(x).double(), wanted, rtol=1e-4, atol=1e-4)
