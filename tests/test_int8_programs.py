"""Whole networks in bytes: programs equal, bit by bit, their steps in plain PyTorch; conversions to eight bits, files, frozen models."""

import copy
import random
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lcnn_compile import LcnnError, LookupConfig, convert, freeze, load, save
from lcnn_compile.checkpoint.compact import expanded, small, stepped
from lcnn_compile.conversion import eight_bits
from lcnn_compile.errors import LcnnWarning
from lcnn_compile.fitting.ranges import Observer, least_error_limits, least_error_range
from lcnn_compile.kernels.cpu import program
from lcnn_compile.kernels.cpu.byte_recipe import Unrounded, _wanted_ranges
from lcnn_compile.kernels.cpu.int8 import PackedBytes
from lcnn_compile.kernels.cpu.program import Program
from lcnn_compile.kernels.cpu.steps import (
    ByteLookUp,
    ByteMap,
    ByteMean,
    BytePool,
    Cast,
    Concat,
    LookUp,
    Permute,
    Recipe,
    Slice,
    View,
    Window,
)
from lcnn_compile.kernels.quantized import Finish, Range, activate, convolve_bytes, mean_of_bytes, sums_of_floats
from lcnn_compile.modules import lookup_modules

pytestmark = pytest.mark.skipif(not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="needs a C++ compiler")
CONFIG = LookupConfig(precision="int8", dictionary_size=0.5, sparsity=4, group_size=4)


class Bottleneck(nn.Module):
    """Every place where bytes may go: pools, strides, residuals before and after an activation, two readers, several outputs."""

    def __init__(self, rng):
        super().__init__()
        a, b = rng.choice([5, 8, 13]), rng.choice([6, 8, 16])
        self.activation = rng.choice([torch.relu, F.relu6, F.silu, F.hardswish])
        self.pool = rng.choice([(2, 2, 0), (3, 2, 1), (3, 1, 1), (2, 3, 1)])
        self.late = rng.random() < 0.5
        self.first = nn.Conv2d(3, a, 3, padding=1)
        self.norm = nn.BatchNorm2d(a)
        self.second = nn.Conv2d(a, b, 3, padding=1, stride=rng.choice([1, 2]))
        self.third = nn.Conv2d(b, b, 3, padding=1, groups=rng.choice([1, 2]))
        self.shortcut = nn.Identity() if self.late else nn.Conv2d(b, b, 1)
        self.last = nn.Conv2d(b, 7, (1, 3), dilation=(1, 2))

    def forward(self, x):
        x = F.max_pool2d(self.activation(self.norm(self.first(x))), *self.pool)
        x = self.activation(self.second(x))
        y = self.third(x)
        y = self.activation(y) + x if self.late else self.activation(y + self.shortcut(x))
        return self.last(y)


def sums_over_windows(x, window):
    """Sums over what the windows have of x: exact of integers, in the order that is laid down of floats."""
    (high, wide), (top, left) = window.shape(x.shape)[2:], window.padding
    kernel = window.kernel_size or x.shape[2:]
    sums = torch.zeros(*x.shape[:2], high, wide, dtype=torch.float32 if x.is_floating_point() else torch.int64)
    for h in range(high):
        for w in range(wide):
            rows, columns = h * window.stride[0] - top, w * window.stride[1] - left
            inside = x[:, :, max(0, rows) : max(0, rows + kernel[0]), max(0, columns) : max(0, columns + kernel[1])].flatten(2)
            sums[:, :, h, w] = sums_of_floats(inside) if x.is_floating_point() else inside.sum(2)
    return sums


def read(value, known):
    return value if known is None else Range(*known).to_floats(value)


FUNCTIONS = {
    "add": lambda a, b, u=1.0: a + u * b,
    "mul": lambda a, b: a * b,
    "relu": lambda a: a.clamp(min=0),
    "silu": lambda a: activate(Finish("silu"), a),
    "hardswish": lambda a: activate(Finish("hardswish"), a),
    "clamp": lambda a, low, high: a.clamp(low, high),
}


def chain(step, values, constants):
    """An element-wise step in float32, one operation after the other."""
    registers = [read(values[x], known) for x, known in zip(step.inputs, step.of, strict=True)]
    registers += [*constants, *(torch.tensor(number) for number in step.numbers)]
    for name, reads, parameters in step.operations:
        registers.append(FUNCTIONS[name](*(registers[r] for r in reads), *parameters))
    return registers[-1] if step.to is None else Range(*step.to).to_bytes(registers[-1])


def in_floats(model):
    """A copy whose lookups round nothing."""
    floats = copy.deepcopy(model)
    for _, module in lookup_modules(floats):
        module.precision = "float32"
    return floats


def in_plain_pytorch(program, *inputs):
    """The values of a program's steps, one after the other, by the integer reference."""
    values, weights = list(inputs), iter(program.weights)
    for step in program.recipe.steps:
        given = values[step.reads[0]]
        own = next(weights) if step.weighted else ()
        if isinstance(step, Cast):
            known = Range(step.scale, step.zero)
            values.append(known.to_bytes(given) if step.to_bytes else known.to_floats(given))
        elif isinstance(step, ByteLookUp):
            (packed,) = own
            residual = None if step.residual is None else values[step.residual]
            assert isinstance(packed, PackedBytes)
            values.append(convolve_bytes(packed.layer, given, step.stride, step.padding, step.dilation, residual))
        elif isinstance(step, BytePool):
            pooled = F.max_pool2d(given.float(), step.window.kernel_size, step.window.stride, step.window.padding)
            values.append(pooled.to(torch.uint8))
        elif isinstance(step, ByteMean):
            sums = sums_over_windows(given if step.of is None else given.to(torch.int32) - step.of[1], step.window)
            to = None if step.to is None else Range(*step.to)
            values.append(mean_of_bytes(sums, *step.factors(given.shape, step.shape([v.shape for v in values])), to))
        elif isinstance(step, ByteMap):
            values.append(chain(step, values, own))
        elif isinstance(step, Concat):
            values.append(torch.cat([values[x] for x in step.parts], step.dim))
        elif isinstance(step, Slice):
            values.append(given.narrow(step.dim, step.start, step.length))
        elif isinstance(step, Permute):
            values.append(given.permute(step.dims))
        else:
            assert isinstance(step, View)
            values.append(given.reshape(len(given), *step.tail))
    return [values[i] for i in program.recipe.outputs]


def images(seed, count, size=(21, 26)):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.fixture(scope="module")
def converted():
    """The network of the first seed, dense and in bytes."""
    torch.manual_seed(0)
    net = Bottleneck(random.Random(0)).eval()
    return net, convert(net, CONFIG, calibration=[images(i, 4) for i in range(3)])


@pytest.mark.parametrize("seed", range(6))
def test_programs_equal_their_steps_in_plain_pytorch(seed):
    torch.manual_seed(seed)
    net = Bottleneck(random.Random(seed)).eval()
    model = convert(net, CONFIG, calibration=[images(i, 4) for i in range(3)])
    frozen = freeze(model, (images(9, 2),))
    assert frozen.alone
    steps = [step for step in frozen.program.recipe.steps if isinstance(step, LookUp)]
    assert len(steps) >= 4
    assert all(isinstance(step, ByteLookUp) for step in steps)
    x = images(10, 3)
    y = frozen(x)
    assert torch.equal(y, in_plain_pytorch(frozen.program, x)[0])
    for i in range(3):
        assert torch.equal(frozen(x[i : i + 1]), y[i : i + 1])
    with torch.no_grad():
        truth, eager = in_floats(model)(x), model(x)
    for found in (y, eager):
        assert float((found - truth).norm() / truth.norm()) < 0.05


def test_values_between_layers_are_bytes_and_threads_change_no_bit(converted):
    frozen, x, before = freeze(converted[1], (images(9, 2),)), images(11, 5), torch.get_num_threads()
    recipe = frozen.program.recipe
    floats = {value for value, element in enumerate(recipe.elements()) if element == "float32"}
    residuals = {step.residual for step in recipe.steps if isinstance(step, LookUp)}
    assert floats <= {0, *recipe.outputs, *residuals}, "all that no layer reads as its input may be float32"
    assert len(floats) < 4
    truth = frozen(x)
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(frozen(x), truth)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("seed", range(4))
def test_maxima_of_bytes(seed):
    rng = random.Random(seed)
    for _ in range(25):
        kernel, stride = ((rng.randint(1, 4), rng.randint(1, 4)) for _ in range(2))
        kernel, stride = rng.choice([(kernel, stride), ((2, 2), (2, 2)), ((3, 3), (2, 2))])
        padding = tuple(rng.randint(0, k // 2) for k in kernel)
        size = tuple(rng.choice([k, rng.randint(k, 40), 2 * rng.randint(2, 80)]) for k in kernel)
        window = Window(False, kernel, stride, padding)
        recipe = Recipe(1, (Cast(0, 0.5, 100, True), BytePool(1, window), Cast(2, 0.5, 100, False)), (3,))
        x = torch.randn(rng.randint(1, 3), rng.randint(1, 9), *size) * 40
        y = Program(recipe, [])(x)[0]
        known = Range(0.5, 100)
        truth = F.max_pool2d(known.to_floats(known.to_bytes(x)), kernel, stride, padding)
        assert torch.equal(y, truth), (window, x.shape)


class Mixed(nn.Module):
    """What stands between layers: concatenation, slices, shuffled channels, gates, sums, means, linear layers."""

    def __init__(self, rng):
        super().__init__()
        a, b = 2 * rng.choice([3, 4, 7]), rng.choice([5, 8])
        self.first, self.second = nn.Conv2d(3, a, 3, padding=1, stride=2), nn.Conv2d(a, b, 3, padding=1)
        self.depthwise = nn.Conv2d(a + b, a + b, 3, padding=1, groups=a + b)
        self.norm = nn.BatchNorm2d(a + b)
        self.third, self.fourth = nn.Conv2d(a + b, 8, 1), nn.Conv2d(4, 9, 3)
        self.gate = nn.Conv2d(8, 8, 1)
        self.window = rng.choice([((2, 2), (2, 2), (0, 0)), ((3, 2), (1, 2), (1, 0))])
        self.late = rng.random() < 0.5
        self.linear = nn.Linear(9, 6)
        self.norm.running_mean.normal_(), self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.cat([x, self.second(x)], 1)
        x = F.hardswish(self.norm(self.depthwise(x) + x))
        x = self.third(x)
        x = x * self.gate(F.adaptive_avg_pool2d(x, 1)).clamp(0, 1)
        x = x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
        x = self.fourth(F.avg_pool2d(x[:, 2:6], *self.window))
        return self.linear(x.mean((2, 3))), x


@pytest.mark.parametrize("seed", range(6))
def test_what_stands_between_layers_equals_the_reference(monkeypatch, seed):
    monkeypatch.setattr(eight_bits, "LEAST", float("inf"))  # random weights round badly; here it matters what they are rounded to
    torch.manual_seed(seed)
    net = Mixed(random.Random(seed)).eval()
    model = convert(net, CONFIG, calibration=[images(i, 4) for i in range(3)])
    frozen = freeze(model, (images(9, 2),))
    assert frozen.alone
    kinds = {type(step) for step in frozen.program.recipe.steps}
    assert {ByteLookUp, ByteMap, ByteMean, Concat, Slice, Permute} <= kinds
    assert kinds <= {ByteLookUp, ByteMap, ByteMean, Concat, Slice, Permute, Cast, View}, "nothing is left to float32"
    x = images(10, 3)
    found = frozen(x)
    for y, truth in zip(found, frozen.single.returned(in_plain_pytorch(frozen.program, x)), strict=True):
        assert torch.equal(y + 0.0, truth + 0.0), int((y != truth).sum())
    for i in range(3):
        assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(frozen(x[i : i + 1]), found, strict=True))
    with torch.no_grad():
        truth, eager = in_floats(model)(x), model(x)
    for y in (found, eager):
        assert all(float((a - b).norm() / b.norm()) < 0.1 for a, b in zip(y, truth, strict=True))


def test_files_keep_ranges(converted, tmp_path):
    net, model = converted
    save(model, tmp_path / "bytes.safetensors")
    again = load(net, tmp_path / "bytes.safetensors").eval()
    x = images(12, 3)
    assert torch.equal(freeze(again, (x,))(x), freeze(model, (x,))(x))
    assert [m.precision for _, m in lookup_modules(again)] == ["int8"] * len(list(lookup_modules(model)))


@pytest.mark.parametrize("to", [None, (0.05, 90)])
def test_joined_chains_keep_the_ranges_of_what_each_reads(to):
    first = ByteMap((2,), (), (2.0,), (("mul", (0, 1), ()), ("relu", (2,), ())), of=((0.5, 100),))
    second = ByteMap((4, 3, 1), (), (), (("add", (0, 1), (1.0,)), ("add", (3, 2), (1.0,))), of=(None, (0.25, 7), None), to=to)
    steps = (Cast(0, 0.5, 100, True), Cast(1, 0.25, 7, True), first, second)
    if to is not None:
        steps = (*steps, Cast(5, *to, False))
    made = Program(Recipe(2, steps, (len(steps) + 1,)), [])
    x = [torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(i)) * 9 for i in range(2)]
    assert torch.equal(made(*x)[0], in_plain_pytorch(made, *x)[0])
    assert len(made.profile(*x)) == len(steps) - 1, "two chains are one step"


@pytest.mark.parametrize("wide_first", [False, True])
def test_what_is_moved_shares_a_range_that_holds_all(wide_first):
    ranges = [Range(0.5, 100), Range(0.25, 200)][:: 1 if wide_first else -1]
    sizes = ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1))
    steps = (Slice(0, 1, 0, 3), LookUp(0, None, 6, 2, *sizes), LookUp(1, None, 3, 2, *sizes))
    layers = {i: Unrounded((), (1, 1), known, torch.ones(1, 1)) for i, known in zip((1, 2), ranges, strict=True)}
    wanted = _wanted_ranges(Recipe(1, steps, (2, 3)), layers)
    assert set(wanted) == {0, 1}
    assert wanted[0] == wanted[1]
    ends = wanted[0].to_floats(torch.tensor([0, 255], dtype=torch.uint8))
    assert ends.tolist() == pytest.approx([-50.0, 77.5], abs=wanted[0].scale)


def sizes_of_files(model, folder):
    floats = in_floats(model)
    for _, module in lookup_modules(floats):
        module.set_ranges(None)
    for name, kind in (("bytes", model), ("floats", floats)):
        save(kind, folder / name)
    return (folder / "bytes").stat().st_size, (folder / "floats").stat().st_size


@pytest.mark.parametrize("group_size", [1, 8])
def test_files_of_bytes_are_small_and_give_back_the_same_floats(tmp_path, group_size):
    torch.manual_seed(4)
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Conv2d(128, 96, 3)
    )
    net[1].running_mean.normal_(), net[1].running_var.uniform_(0.5, 2)
    config = CONFIG.replace(sparsity=8, group_size=group_size)
    model = convert(net.eval(), config, calibration=[images(i, 2) for i in range(2)])
    small, large = sizes_of_files(model, tmp_path)
    assert small < 0.4 * large
    again = load(net, tmp_path / "bytes")
    own = model.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in again.state_dict().items())
    x = images(5, 2)
    assert torch.equal(freeze(again, (x,))(x), freeze(model, (x,))(x))
    with torch.no_grad():  # weights that were changed are no steps: they stay as they are
        for _, module in lookup_modules(model):
            module.coefficients.mul_(1.0001).add_(1e-5)
    save(model, tmp_path / "changed")
    changed = load(net, tmp_path / "changed").state_dict()
    assert all(torch.equal(value, changed[key]) for key, value in model.state_dict().items())


def test_damaged_scales_in_files_are_refused(converted, tmp_path):
    net, model = converted
    scale = dict(lookup_modules(model))["first"].ranges
    for place, value in ((0, 0.0), (0, float("nan")), (0, 1e-42), (1, -3.0), (2, float("inf"))):
        broken = copy.deepcopy(model)
        broken.first.ranges = scale.clone()
        broken.first.ranges[place] = value
        save(broken, tmp_path / "broken")
        with pytest.raises(LcnnError, match="first"):
            load(net, tmp_path / "broken")
    counts = torch.tensor([2, 1])
    values = torch.randint(-127, 128, (3, 4)).float()
    values[0], values[2] = 127, -127
    stored, form = stepped(values, counts)
    assert torch.equal(expanded("c", stored, form), values)
    for scale in (0.0, -1.0, float("nan"), float("inf"), 3e38):
        damaged = stored.clone()
        damaged[8:12] = torch.tensor([scale]).view(torch.uint8)
        with pytest.raises(LcnnError, match="scales"):
            expanded("c", damaged, form)
    for change in ({"blocks": 3}, {"blocks": 0}, {"shape": [4, 4]}, {"shape": []}, {"turned": 1}, {"kind": "none"}, {"more": 1}):
        with pytest.raises(LcnnError, match="c is said to be"):
            expanded("c", stored, {**form, **change})
    table, form = small(torch.tensor([0, 300, 65535], dtype=torch.int32))
    assert expanded("i", table, form).tolist() == [0, 300, 65535]
    with pytest.raises(LcnnError, match="i is said to be"):
        expanded("i", table[:-1], form)


def test_compiled_models_compute_the_same_bytes(converted):
    x = images(13, 3)
    with torch.no_grad():
        assert torch.equal(torch.compile(converted[1], backend="lcnn")(x), freeze(converted[1], (x,))(x))


def test_a_dense_model_is_compiled_to_bytes(converted):
    net, x = converted[0], images(14, 3)
    before = set(program._alive)
    options = {"precision": "int8", "dictionary_size": 1.0, "sparsity": None, "max_error": 0.9, "calibration_batches": 2}
    with torch.no_grad():
        compiled = torch.compile(net, backend="lcnn", options=options)
        for i in range(3):
            compiled(images(i, 4))
        y, truth = compiled(x), net(x)
    made = [p.recipe.steps for number, p in program._alive.items() if number not in before]
    assert sum(isinstance(step, ByteLookUp) for steps in made for step in steps) >= 4
    assert float((y - truth).norm() / truth.norm()) < 0.05


def test_damaged_ranges_are_refused(converted):
    for place, value in (
        (0, 0.0),
        (0, float("nan")),
        (0, -1.0),
        (0, float("inf")),
        (1, 256.0),
        (1, 0.5),
        (2, float("nan")),
        (2, -1.0),
    ):
        model = copy.deepcopy(converted[1])
        layer = next(module for _, module in lookup_modules(model))
        with torch.no_grad():
            layer.ranges[place] = value
        with pytest.raises(LcnnError):
            model(images(1, 1))
        layer.ranges = layer.ranges[:-1].clone()
        with pytest.raises(LcnnError, match="ranges are"):
            model(images(1, 1))


def test_excluded_layers_stay_float_and_the_rest_is_bytes():
    torch.manual_seed(1)
    net = Bottleneck(random.Random(1)).eval()
    model = convert(net, CONFIG.replace(exclude=("last",)), calibration=[images(0, 4)])
    assert type(model.last) is nn.Conv2d
    assert all(module.ranges is not None for _, module in lookup_modules(model))


def test_one_layer_alone_may_be_of_bytes():
    torch.manual_seed(1)
    net = Bottleneck(random.Random(1)).eval()
    config = CONFIG.replace(precision="float32", layers={"third": {"precision": "int8"}})
    model = convert(net, config, calibration=[images(0, 4)])
    x = images(3, 2)
    frozen = freeze(model, (x,))
    assert [module.precision for name, module in lookup_modules(model) if name == "third"] == ["int8"]
    assert sum(isinstance(step, ByteLookUp) for p in [frozen.program] if p for step in p.recipe.steps) <= 1
    with torch.no_grad():
        assert torch.allclose(frozen(x), model(x), rtol=0.05, atol=0.05 * float(model(x).abs().max()))


class Idle(nn.Module):
    """A branch whose values are zero on all calibration data."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)
        with torch.no_grad():
            self.a.bias[:] = -100

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x))))) + x[:, :1, 3:-3, 3:-3]


def test_what_was_idle_may_wake_up(monkeypatch):
    monkeypatch.setattr(eight_bits, "LEAST", float("inf"))
    torch.manual_seed(3)
    model = convert(Idle().eval(), CONFIG, calibration=[images(i, 2) for i in range(2)])
    frozen = freeze(model, (images(0, 2),))
    for x in (images(1, 2), images(2, 2) * 1e4):
        assert bool(torch.isfinite(frozen(x)).all())
        assert torch.equal(frozen(x) + 0.0, in_plain_pytorch(frozen.program, x)[0] + 0.0)


def test_transposed_layers_with_a_bias_are_bytes():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(16, 8, 2, stride=2), nn.ReLU(), nn.Conv2d(8, 4, 3))
    dense, x = nn.Sequential(*layers).eval(), torch.randn(2, 3, 9, 11)
    config = LookupConfig(dictionary_size=1.0, sparsity=None, group_size=4, precision="int8", lowering="lookup")
    frozen = freeze(convert(dense, config, calibration=[torch.randn(8, 3, 9, 11)]), x)
    assert frozen.alone
    with torch.no_grad():
        exact = copy.deepcopy(dense).double()(x.double())
    assert ((frozen(x) - exact) ** 2).sum() < 0.005 * ((exact - exact.mean()) ** 2).sum()


def test_ranges_need_calibration():
    with pytest.raises(LcnnError, match="calibration"):
        convert(Bottleneck(random.Random(1)).eval(), CONFIG, example_inputs=(images(0, 1),))


def test_a_layer_that_sees_no_finite_values_stays_float32_and_says_so():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)

        def forward(self, x):
            return self.b(self.a(x) / (x.abs().amax() < 0.0))

    with pytest.warns(LcnnWarning, match=r"\['b'\] have no ranges"):
        model = convert(Broken().eval(), CONFIG.replace(target_speedup=1.01, include=("a",)), calibration=[images(0, 2)])
    assert model.a.ranges is not None
    assert type(model.b) is nn.Conv2d


def test_ranges_of_known_values():
    grid = torch.arange(0, 256) * 0.5
    assert least_error_range(grid, 0.0, 127.5) == Range(0.5, 0)
    signed = (torch.arange(0, 256) - 100) * 0.25
    assert least_error_range(signed, -25.0, 38.75) == Range(0.25, 100)
    outlier = torch.cat([torch.linspace(0, 1, 1000000), torch.tensor([1.5])])
    assert least_error_range(outlier, 0.0, 1.5).scale < 1.1 / 255, "one value in a million is not worth a third of the steps"
    nothing = least_error_range(torch.full((8,), 1e-30), 0.0, 1e-30)
    assert nothing.scale > 1e-3, "a layer before it would have outputs of 10^30 steps"
    nothing.check("zeros")
    assert nothing.to_bytes(torch.zeros(2)).tolist() == [nothing.zero] * 2


def test_limits_of_known_planes():
    planes = torch.stack([torch.linspace(-1, 1, 255), torch.linspace(-4, 4, 255), torch.zeros(255)])
    assert torch.allclose(least_error_limits(planes, planes.abs().amax(1)), torch.tensor([1.0, 4.0, 0.0]), rtol=0.02)


def test_an_observer_of_nothing_finds_nothing():
    observer = Observer(torch.randn(1, 2, 3))
    assert observer.found() is None
    observer.see(torch.zeros(0, 3, 4, 4))
    assert observer.found() is None
    observer.see(torch.full((1, 3, 4, 4), torch.inf))
    assert observer.found() is None


class Uneven(nn.Module):
    """Two layers that round well, and one whose input has one channel ten thousand times larger than the others."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)
        with torch.no_grad():
            self.c.weight[:, 0] = 0

    def forward(self, x):
        x = self.b(torch.relu(self.a(x)))
        return self.c(x * torch.cat([x.new_full((1,), 1e4), x.new_ones(15)])[:, None, None])


def uneven(**changes):
    torch.manual_seed(2)
    config = LookupConfig(dictionary_size=1.0, sparsity=None, group_size=4, include=("b", "c")).replace(**changes)
    return convert(Uneven().eval(), config, calibration=[images(i, 4) for i in range(3)])


@pytest.mark.parametrize("precision", ["int8", "auto"])
def test_a_layer_whose_rounding_costs_too_much_is_computed_in_more_bits_and_says_so(precision):
    model = uneven(precision=precision)
    rows = {row.name: row for row in model.lcnn_report}
    assert {name: row.precision for name, row in rows.items() if name != "c"} == {"a": "int8", "b": "int8"}
    assert rows["c"].precision == model.c.precision != "int8"
    assert "in eight bits rounding alone would cost" in rows["c"].reason
    assert model.c.ranges is None
    assert not rows["a"].replaced
    assert "eight bits" in rows["a"].reason
    assert "dense, int8" in str(model.lcnn_report)
    x = images(5, 3)
    with torch.no_grad():
        frozen = freeze(model, (x,))
        truth = Uneven.forward(copy.deepcopy(model), x)
    assert float((frozen(x) - truth).norm() / truth.norm()) < 0.05


def test_the_error_of_a_layer_is_measured_with_its_rounding():
    model = uneven(precision="int8", include=("b",), exclude=("a",))
    torch.manual_seed(2)
    net = Uneven()
    row = next(row for row in model.lcnn_report if row.name == "b")
    with torch.no_grad():
        x = torch.cat([torch.relu(net.a(images(i, 4))) for i in range(3)])
        rounded, truth = model.b(x), net.b(x)
        deviation = (truth - truth.mean((0, 2, 3), keepdim=True)).square().sum()
    cost = float((rounded - truth).square().sum() / deviation)
    assert row.error == pytest.approx(cost, rel=0.02), "a lossless layer has no other error"
    assert 1e-6 < cost < 1e-3


def test_auto_keeps_the_error_that_is_asked_for():
    config = {"precision": "auto", "include": ("b",), "exclude": ("a", "c")}
    cost = next(row.error for row in uneven(**config).lcnn_report if row.name == "b")
    for limit, precision in ((cost * 1.1, "int8"), (cost * 0.9, "float32")):
        model = uneven(**config, max_error=limit)
        row = next(row for row in model.lcnn_report if row.name == "b")
        assert row.precision == model.b.precision
        assert (row.precision == "int8") == (precision == "int8")
        assert row.error <= limit


def test_auto_of_one_layer_and_auto_without_calibration():
    model = uneven(layers={"b": {"precision": "auto"}})
    assert [model.b.precision, model.c.precision, type(model.a)] == ["int8", "float32", nn.Conv2d]
    torch.manual_seed(2)
    with pytest.warns(LcnnWarning, match="no calibration"):
        model = convert(Uneven().eval(), CONFIG.replace(precision="auto"), example_inputs=(images(0, 1),))
    assert {module.precision for _, module in lookup_modules(model)} == {"float32"}
    assert {row.precision for row in model.lcnn_report} == {"float32"}
    with pytest.raises(LcnnError, match="allowed"):
        LookupConfig(precision="half")
