"""The C++ kernels with bfloat16 operands: exact for integers, whose float32 sums are; close to float64 of rounded operands else."""

import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_cpu_kernels import call, random_case, random_weight

from lcnn_compile.errors import KernelError
from lcnn_compile.kernels import cpu, reference
from lcnn_compile.kernels.arguments import Geometry
from lcnn_compile.kernels.cpu import build as cpu_build
from lcnn_compile.kernels.cpu.program import Program
from lcnn_compile.kernels.cpu.steps import LookUp, Pool, Recipe, Window, pooled

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the C++ kernels are unavailable")
EXACT = ("none", "relu", "relu6")


@pytest.fixture
def always(monkeypatch):
    """Activations rounded on any processor."""
    monkeypatch.setenv("LCNN_CPU_BFLOAT16", "always")


def rounded(t):
    return t.to(torch.bfloat16).double()


def integers(t):
    """Small integers: products and float32 sums of them are exact, and S needs rounding, ties included."""
    return (3 * t).round().clamp(-9, 9)


def is_few(weight, x, stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), **_):
    """Whether the kernels take a call for one of few pixels, where activations stay as they are."""
    out = reference.output_size(x.shape[2:], weight.kernel_size, stride, padding, dilation)
    return out[0] * out[1] <= 4 or (weight.kernel_size == (1, 1) and tuple(x.shape[2:]) == out == (1, 1))


def truth_of(weight, x, bias=None, residual=None, activation="none", residual_last=False, few=None, wide=False, **geometry):
    """float64 sums of operands rounded by PyTorch; ``wide``: but for S, which a matrix unit may leave in float32."""
    stride, padding, dilation = (geometry.get(k, d) for k, d in (("stride", (1, 1)), ("padding", (0,) * 4), ("dilation", (1, 1))))
    few = is_few(weight, x, **geometry) if few is None else few
    keep = (lambda t: t.double()) if few else rounded
    s = F.conv2d(keep(x), reference.pointwise_weight(rounded(weight.dictionary)), groups=weight.groups)
    s = s if wide else keep(s)
    weight = replace(weight, dictionary=rounded(weight.dictionary), coefficients=rounded(weight.coefficients))
    y = reference.convolve(
        s, weight.lookup_tensor(), Geometry(weight.out_channels, weight.kernel_size, stride, padding, dilation), weight.groups
    )
    extra = [None if t is None else t.double() for t in (bias, residual)]
    return reference.apply_epilogue(y, *extra, activation, residual_last)


def may_be_wide(weight):
    """Whether S may stay in float32: lookups on a matrix unit, where hardly any filters share their taps."""
    return cpu_build.instruction_set() == "amx" and weight.group_size < 3


def is_exact(y, weight, x, **rest):
    """Whether outputs for integers are right to the last bit."""
    return any(torch.equal(y.double(), truth_of(weight, x, wide=wide, **rest)) for wide in {False, may_be_wide(weight)})


def with_distinct_taps(weight):
    """The same weight with no tap twice in a filter group, as fits have it; ``random_weight`` may repeat them."""
    area = weight.kernel_size[0] * weight.kernel_size[1]
    every = weight.dictionary_size * area
    counts = weight.offsets.diff().clamp(max=every)
    taps = torch.cat([torch.randperm(every)[:count] for count in counts.tolist()]).to(torch.int32)
    return replace(
        weight,
        coefficients=weight.coefficients[: len(taps)],
        indices=taps // area,
        positions=taps % area,
        offsets=torch.tensor([0, *counts.cumsum(0)], dtype=torch.int32),
    ).validate()


def integer_case(rng):
    weight, x, rest = random_case(rng)
    weight = with_distinct_taps(weight) if rng.random() < 0.5 else weight
    weight = replace(weight, dictionary=integers(weight.dictionary), coefficients=integers(weight.coefficients))
    rest |= {key: integers(rest[key]) for key in ("bias", "residual") if rest[key] is not None}
    return weight, integers(x), rest | {"activation": rng.choice(EXACT)}


@pytest.mark.parametrize("seed", range(6))
def test_integers_are_exact_in_any_geometry(instruction_set, always, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(20):
        weight, x, rest = integer_case(rng)
        call(weight, torch.full_like(x, torch.nan), precision="bfloat16", **rest)  # poisons the scratch
        assert is_exact(call(weight, x, precision="bfloat16", **rest), weight, x, **rest)


@pytest.mark.parametrize(
    ("channels", "vectors", "size", "stride", "taps", "group_size"),
    [
        ((4, 64), 3, (224, 224), (1, 1), 9, 1),  # output past the caches
        ((70, 20), 37, (90, 300), (1, 1), 9, 8),  # several bands, odd vectors per row
        ((33, 40), 37, (28, 28), (2, 2), 9, 4),  # phases
        ((1101, 24), 37, (7, 7), (1, 1), 9, 24),  # narrower tiles
        ((9, 24), 5, (14, 14), (1, 1), 9, 7),
        ((40, 70), 16, (19, 21), (1, 1), 54, 8),  # every tap serves many filters
        ((40, 70), 13, (19, 21), (2, 2), 30, 1),
        ((130, 264), 64, (13, 15), (1, 1), 54, 8),  # hardly any does
        ((130, 67), 64, (13, 15), (1, 1), 33, 5),
        ((130, 67), 64, (13, 15), (1, 1), 27, 1),
    ],
)
def test_large(instruction_set, always, channels, vectors, size, stride, taps, group_size):
    torch.manual_seed(0)
    weight = with_distinct_taps(random_weight(random.Random(0), *channels, vectors, (3, 3), taps, group_size))
    weight = replace(weight, dictionary=integers(weight.dictionary) / 3, coefficients=integers(weight.coefficients))
    weight = replace(weight, dictionary=weight.dictionary.round())
    rest = {"bias": integers(torch.randn(channels[1])), "stride": stride, "padding": (1, 1, 1, 1), "activation": "relu"}
    x = torch.randn(2, channels[0], *size).round().clamp(-2, 2)
    assert is_exact(call(weight, x, precision="bfloat16", **rest), weight, x, **rest)


def test_random_values_are_as_close_as_float32_sums(always):
    rng = random.Random(3)
    for _ in range(40):
        weight, x, rest = random_case(rng)
        y = call(weight, x, precision="bfloat16", **rest).double()
        truths = [truth_of(weight, x, wide=wide, **rest) for wide in {False, may_be_wide(weight)}]
        truth = min(truths, key=lambda one: float((y - one).norm()))
        # Where a sum lies between two bfloat16 numbers, float32 may take the other one: rarely.
        assert float((y - truth).norm()) <= 5e-4 * float(truth.norm()) + 1e-6


def test_only_weights_are_rounded_where_products_are_slow(monkeypatch):
    monkeypatch.delenv("LCNN_CPU_BFLOAT16", raising=False)
    if cpu.multiplies_pairs():
        pytest.skip("this processor multiplies bfloat16")
    rng = random.Random(4)
    for _ in range(30):
        weight, x, rest = random_case(rng)
        y, truth = call(weight, x, precision="bfloat16", **rest).double(), truth_of(weight, x, few=True, **rest)
        assert float((y - truth).norm()) <= 1e-5 * float(truth.norm()) + 1e-6


def test_the_environment_is_asked_at_every_call(monkeypatch):
    weight, x = random_weight(random.Random(5), 16, 24, 6, (3, 3), 9, 8), torch.randn(1, 16, 9, 11)
    monkeypatch.delenv("LCNN_CPU_BFLOAT16", raising=False)
    anyway, results = cpu.multiplies_pairs(), []
    for value in ("always", "", "always"):
        monkeypatch.setenv("LCNN_CPU_BFLOAT16", value)
        results.append(call(weight, x, precision="bfloat16"))
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[0], results[1]) == anyway


def test_rounding_is_to_nearest_even_and_keeps_what_is_not_finite(instruction_set, always):
    weight = random_weight(random.Random(6), 1, 1, 1, (1, 1), 1, 1)
    one = torch.ones_like
    zero = torch.zeros(1, dtype=torch.int32)
    weight = replace(
        weight,
        dictionary=one(weight.dictionary),
        coefficients=torch.ones(1, 1),
        indices=zero,
        positions=zero,
        offsets=torch.tensor([0, 1], dtype=torch.int32),
    )
    bits = torch.randint(-(2**31), 2**31 - 1, (1, 1, 60, 70), dtype=torch.int32)
    bits[:, :, :30] = bits[:, :, :30] & -0x10000 | 0x8000  # ties
    x = bits.view(torch.float32)
    x = torch.where(x.abs() < 2.0**-120, torch.zeros(()), x)  # instructions may take denormals for zero
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 3.4e38, -3.4e38, 1.00390625, 1.01171875])
    x[0, 0, 31, :9] = special
    y = call(weight, x, precision="bfloat16")
    torch.testing.assert_close(y, x.to(torch.bfloat16).float(), rtol=0, atol=0, equal_nan=True)


def test_thread_count_does_not_change_a_bit(instruction_set, always):
    rng, before = random.Random(1), torch.get_num_threads()
    try:
        for _ in range(25):
            weight, x, rest = random_case(rng)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(call(weight, x, precision="bfloat16", **rest))
            assert all(torch.equal(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(before)


def test_bfloat16_tensors_use_it(always):
    weight = random_weight(random.Random(2), 16, 24, 6, (3, 3), 5, 8).to(torch.bfloat16)
    x = torch.randn(2, 16, 9, 11).to(torch.bfloat16)
    y = call(weight, x, padding=(1, 1, 1, 1))
    wide = call(weight.to(torch.float32), x.float(), padding=(1, 1, 1, 1), precision="bfloat16")
    assert torch.equal(y, wide.to(torch.bfloat16))


def test_float32_stays_what_it_was(always):
    weight, x = random_weight(random.Random(7), 16, 24, 6, (3, 3), 9, 8), torch.randn(1, 16, 9, 11)
    assert torch.equal(call(weight, x, precision="float32"), call(weight, x))


def test_unknown_precisions_are_refused():
    weight, x = random_weight(random.Random(8), 8, 16, 4, (3, 3), 5, 8), torch.randn(1, 8, 9, 11)
    with pytest.raises(KernelError, match="float16"):
        call(weight, x, precision="float16")


@pytest.mark.parametrize("mean", [False, True])
def test_programs(always, mean):
    torch.manual_seed(0)
    rng = random.Random(9)
    first, second = (random_weight(rng, *sizes, 5, (3, 3), 7, 5) for sizes in ((3, 13), (13, 9)))
    first, second = (
        replace(w, dictionary=integers(w.dictionary), coefficients=integers(w.coefficients)) for w in (first, second)
    )
    bias, x = integers(torch.randn(13)), integers(torch.randn(2, 3, 21, 19)).clamp(-2, 2)
    geometry = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    window = Window(mean, (2, 2), (2, 2))
    steps = (LookUp(0, None, 3, 13, *geometry, "relu"), Pool(1, window), LookUp(2, None, 13, 9, *geometry))
    recipe = Recipe(1, steps, (3,))
    padding = {"padding": (1, 1, 1, 1)}
    packed = [
        (cpu.packed_weight(tuple(w.tensors().values()), w.kernel_size, "bfloat16"), b) for w, b in ((first, bias), (second, None))
    ]
    middle = truth_of(first, x, bias, activation="relu", **padding).float()
    middle = F.avg_pool2d(middle, 2) if mean else F.max_pool2d(middle, 2)
    truth = truth_of(second, middle, **padding)
    for made in (recipe, pooled(recipe, recipe.shapes([x.shape]), 0)):
        program = Program(made, packed)
        program(torch.full_like(x, math.nan))
        [y] = program(x)
        assert torch.equal(y.double(), truth)


def test_infinity_stays_where_it_is_looked_up(instruction_set, always):
    # Eight filters with 21 taps, the first of which reads what overflows, then eight with 7 others.
    taps = [21, 7]
    indices = torch.cat([torch.arange(21), torch.arange(1, 8)]).to(torch.int32)
    weight = replace(
        random_weight(random.Random(10), 24, 16, 24, (1, 1), 7, 8),
        dictionary=torch.eye(24)[None] * torch.tensor([3e38, *[1.0] * 23])[:, None],
        coefficients=torch.ones(28, 8),
        indices=indices,
        positions=torch.zeros_like(indices),
        offsets=torch.tensor([0, *torch.tensor(taps).cumsum(0)], dtype=torch.int32),
    )
    x = torch.randn(1, 24, 20, 30).round()
    x[:, 0] = 100
    y = call(weight, x, precision="bfloat16")
    reached = weight.filters[0].long()
    assert torch.equal(y[:, reached], torch.full_like(y[:, reached], math.inf))
    rest = weight.filters[1].long()
    assert torch.equal(y[:, rest], x[:, 1:8].sum(1, keepdim=True).expand_as(y[:, rest]))


def test_a_group_without_taps(instruction_set, always):
    # The first of two convolution groups has no tap at all, each tap of the second serves many filters.
    weight = random_weight(random.Random(11), 32, 48, 8, (3, 3), 1, 1, groups=2)
    taps = torch.cat([torch.randperm(72)[:20] for _ in range(24)]).to(torch.int32)
    weight = replace(
        weight,
        dictionary=integers(weight.dictionary),
        coefficients=integers(torch.randn(480, 1)),
        indices=taps // 9,
        positions=taps % 9,
        offsets=torch.tensor([0] * 24 + list(range(0, 481, 20)), dtype=torch.int32),
    ).validate()
    x = integers(torch.randn(1, 32, 11, 13))
    assert is_exact(call(weight, x, precision="bfloat16", padding=(1, 1, 1, 1)), weight, x, padding=(1, 1, 1, 1))
