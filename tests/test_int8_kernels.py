"""Lookup convolutions of bytes: every instruction set, thread count and batch gives the very bytes of the integer reference."""

import random
import shutil
from dataclasses import replace

import pytest
import torch

from lcnn_compile import LcnnError, LookupWeight
from lcnn_compile.kernels import reference
from lcnn_compile.kernels.cpu.int8 import PackedBytes
from lcnn_compile.kernels.cpu.program import Program
from lcnn_compile.kernels.cpu.steps import ByteMap, ByteMean, Cast, Recipe, Window
from lcnn_compile.kernels.quantized import Finish, QuantizedLookup, convolve_bytes, float32
from lcnn_compile.lookup import filter_table

pytestmark = pytest.mark.skipif(not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="needs a C++ compiler")


def whole(generator, low, high, *shape, dtype=torch.int8):
    return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int64).to(dtype)


def random_layer(rng, m, n, k, kernel, taps, group_size, groups=1, identity=False, **finish):
    """A quantized layer with filters in random order, 0 to 2·taps taps per filter group, and factors that use all bytes and some more."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    per_group = n // groups
    order = torch.cat([torch.randperm(per_group, generator=generator) + i * per_group for i in range(groups)])
    filters = filter_table(n, group_size, groups, order)
    k = m // groups if identity else k
    if identity and rng.random() < 0.5:
        lossless = LookupWeight.lossless(torch.zeros(n, m // groups, *kernel), groups=groups, group_size=group_size)
        filters, offsets, indices, positions = (getattr(lossless, key) for key in ("filters", "offsets", "indices", "positions"))
        total = indices.numel()
    else:
        counts = torch.randint(0, 2 * taps + 1, (filters.shape[0],), generator=generator)
        total = int(counts.sum())
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]).to(torch.int32)
        indices = whole(generator, 0, k - 1, total, dtype=torch.int32)
        positions = whole(generator, 0, kernel[0] * kernel[1] - 1, total, dtype=torch.int32)
    members = filters[reference.tap_filter_groups(offsets, total)] >= 0
    spread = rng.choice([0.5, 2.0, 20.0])  # how much saturates
    ending = Finish(**finish)
    units = 127 * 128 * taps**0.5 / spread / 60
    return QuantizedLookup(
        dictionary=None if identity else whole(generator, -127, 127, groups, k, m // groups),
        coefficients=whole(generator, -128, 127, total, filters.shape[1]) * members,
        indices=indices,
        positions=positions,
        offsets=offsets,
        filters=filters,
        kernel_size=kernel,
        groups=groups,
        vectors=k,
        input_zero=rng.choice([0, 0, 128, rng.randint(0, 255)]),
        vector_factors=None if identity else torch.rand(groups, k, generator=generator) * spread / (127 * (m // groups) ** 0.5),
        bias=whole(generator, -(2**20), 2**20, n, dtype=torch.int32),
        filter_factors=torch.rand(n, generator=generator) / units * (1 if ending.step == 1 else 6 / 128),
        finish=ending,
    ).validate()


def random_finish(rng):
    smooth = rng.random() < 0.3
    unit = float32(rng.uniform(0.02, 0.1)) if smooth else 1.0
    return {
        "activation": rng.choice(["silu", "hardswish"] if smooth else ["none", "relu", "relu", "relu6"]),
        "residual_last": rng.random() < 0.3,
        "residual": rng.choice([None, None, (rng.choice([0, 128, 77, None]), float32(rng.uniform(0.2, 2.0) * unit))]),
        "six": 6.0 if smooth else float32(rng.uniform(50, 300)),
        "step": float32(1 / unit),
        "zero": rng.choice([0, 0, 128, rng.randint(0, 255), None]),
    }


def random_case(rng):
    """(layer, x, residual, geometry), small, odd and often degenerate."""
    depthwise = rng.random() < 0.2
    while True:
        groups, kernel = rng.choice([1, 1, 1, 2, 3]), (rng.randint(1, 4), rng.randint(1, 4))
        size = (rng.randint(1, 20), rng.randint(1, 90)) if rng.random() < 0.7 else (rng.randint(1, 9), rng.randint(1, 9))
        stride, dilation = ((rng.randint(1, 3), rng.randint(1, 3)) for _ in range(2))
        padding = tuple(rng.choice([0, 1, 2, 5]) for _ in range(4))
        if rng.random() < 0.5:
            stride = dilation = (1, 1)
        if rng.random() < 0.1:
            size = kernel = (1, 1)
        high, wide = reference.output_size(size, kernel, stride, padding, dilation)
        if min(high, wide) > 0:
            break
    m, n, k = groups * rng.randint(1, 40), groups * rng.randint(1, 30), rng.choice([1, 2, rng.randint(3, 20)])
    group_size = rng.choice([1, 1, 2, 3, 4, 5, 6, 7, 8, 8, 11, 16])
    if depthwise:  # each filter reads one channel alone
        groups = m = rng.randint(1, 40)
        n = m * rng.choice([1, 1, 3])
    identity = depthwise or rng.random() < 0.3
    layer = random_layer(rng, m, n, k, kernel, rng.randint(1, 12), group_size, groups, identity, **random_finish(rng))
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    batch = rng.choice([1, 1, 2, 5])
    x = whole(generator, 0, 255, batch, m, *size, dtype=torch.uint8)
    residual = None
    if layer.finish.residual is not None:
        residual = whole(generator, 0, 255, batch, n, high, wide, dtype=torch.uint8)
        if layer.finish.residual[0] is None:
            residual = residual.float() + torch.rand(residual.shape, generator=generator)
    return layer, x, residual, (stride, padding, dilation)


def equal(y, truth, what=""):
    assert y.dtype == truth.dtype, what
    assert y.shape == truth.shape, what
    if y.dtype == torch.float32:  # the same bits, whatever the sign of a zero
        assert torch.equal(y + 0.0, truth + 0.0), f"{what}: {int((y != truth).sum())} of {y.numel()} floats differ"
    else:
        assert torch.equal(y, truth), f"{what}: {int((y != truth).sum())} of {y.numel()} bytes differ"


@pytest.mark.parametrize("seed", range(3))
def test_random_layers_equal_the_integer_reference(byte_instruction_set, seed):
    rng = random.Random(seed)
    for turn in range(40):
        layer, x, residual, geometry = random_case(rng)
        truth = convolve_bytes(layer, x, *geometry, residual)
        packed = PackedBytes(layer)
        packed(~x, *geometry, residual)  # leaves its scratch full of other bytes
        y = packed(x, *geometry, residual)
        equal(y, truth, f"seed {seed}, case {turn}, {layer.finish}, {tuple(x.shape)}, {geometry}, {layer.kernel_size}")


def test_threads_and_batches_change_no_bit():
    rng = random.Random(7)
    layer = random_layer(rng, 24, 40, 9, (3, 3), 20, 8, activation="relu", residual=(128, 0.5), zero=3)
    generator = torch.Generator().manual_seed(1)
    x, residual = (
        whole(generator, 0, 255, 7, 24, 33, 31, dtype=torch.uint8),
        whole(generator, 0, 255, 7, 40, 33, 31, dtype=torch.uint8),
    )
    geometry = ((1, 1), (1, 1, 1, 1), (1, 1))
    truth, before = convolve_bytes(layer, x, *geometry, residual), torch.get_num_threads()
    packed = PackedBytes(layer)
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            equal(packed(x, *geometry, residual), truth, f"{threads} threads")
            for i in (0, 6):
                equal(packed(x[i : i + 1], *geometry, residual[i : i + 1]), truth[i : i + 1], f"{threads} threads, image {i}")
    finally:
        torch.set_num_threads(before)


def test_threads_share_the_channels_of_a_depthwise_layer():
    rng = random.Random(3)
    layer = random_layer(rng, 24, 48, 1, (3, 3), 5, 2, 24, identity=True, activation="silu", zero=3, six=6.0)
    x = whole(torch.Generator().manual_seed(1), 0, 255, 2, 24, 19, 23, dtype=torch.uint8)
    before = torch.get_num_threads()
    try:
        for stride in ((1, 1), (2, 2), (3, 1)):
            geometry = (stride, (1, 1, 1, 1), (1, 1))
            truth = convolve_bytes(layer, x, *geometry)
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                equal(PackedBytes(layer)(x, *geometry), truth, f"{threads} threads, stride {stride}")
                equal(PackedBytes(layer)(x[:1], *geometry), truth[:1], f"{threads} threads, one image, stride {stride}")
    finally:
        torch.set_num_threads(before)


def test_saturation_at_both_ends_by_value():
    """One channel, one tap: what comes out is known without any code of ours."""
    ones = torch.ones(1, dtype=torch.int32)
    layer = QuantizedLookup(
        dictionary=torch.full((1, 1, 1), 127, dtype=torch.int8),
        coefficients=torch.full((1, 1), -127, dtype=torch.int8),
        indices=0 * ones,
        positions=0 * ones,
        offsets=torch.tensor([0, 1], dtype=torch.int32),
        filters=0 * ones[:, None],
        kernel_size=(1, 1),
        groups=1,
        vectors=1,
        input_zero=100,
        vector_factors=torch.full((1, 1), 1 / 127),  # S is x - 100 about 128, from -128 to 127
        bias=torch.tensor([127 * 128 + 127], dtype=torch.int32),
        filter_factors=torch.full((1,), 1 / 127),
        finish=Finish(zero=50),
    )
    x = torch.tensor([0, 99, 100, 101, 227, 228, 255], dtype=torch.uint8).view(1, 1, 1, 7)
    y = PackedBytes(layer)(x, (1, 1), (0, 0, 0, 0), (1, 1))
    # 51 - (x - 100), where S stops at 127.
    assert y.flatten().tolist() == [151, 52, 51, 50, 0, 0, 0]
    more = replace(layer, bias=layer.bias + 127 * 120)
    assert PackedBytes(more)(x, (1, 1), (0, 0, 0, 0), (1, 1)).flatten().tolist() == [255, 172, 171, 170, 44, 44, 44]


def test_ties_go_to_even():
    layer = random_layer(random.Random(0), 1, 1, 1, (1, 1), 1, 1, identity=True)
    one = torch.ones(1, dtype=torch.int32)
    fields = {
        "coefficients": torch.ones(1, 1, dtype=torch.int8),
        "indices": 0 * one,
        "positions": 0 * one,
        "offsets": torch.tensor([0, 1], dtype=torch.int32),
    }
    layer = replace(layer, **fields, input_zero=0, bias=0 * one, filter_factors=torch.full((1,), 0.5), finish=Finish())
    x = torch.tensor([1, 3, 5, 7, 255], dtype=torch.uint8).view(1, 1, 1, 5)
    assert PackedBytes(layer)(x, (1, 1), (0, 0, 0, 0), (1, 1)).flatten().tolist() == [0, 2, 2, 4, 128]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.full((4,), 2**31 - 1, dtype=torch.int32)}, "over taps"),
        ({"filter_factors": torch.tensor([1.0, 1, 1, float("nan")])}, "filter_factors"),
        ({"filter_factors": torch.full((4,), 1e9)}, "2\\^30"),
        ({"vector_factors": torch.full((1, 3), 1e9)}, "2\\^30"),
        ({"vector_factors": torch.full((1, 3), -1.0)}, "vector_factors"),
        ({"vector_factors": None}, "vector_factors"),
        ({"input_zero": 256}, "input_zero"),
        ({"finish": Finish(zero=-1)}, "finish.zero"),
        ({"finish": Finish(residual=(0, float("inf")))}, "residual"),
        ({"finish": Finish(step=1e-3)}, "step"),  # no float32
        ({"finish": Finish(activation="tanh")}, "activation"),
        ({"coefficients": torch.zeros(3, 4)}, "coefficients"),
    ],
)
def test_what_could_overflow_or_make_no_sense_is_refused(change, message):
    layer = random_layer(random.Random(3), 5, 4, 3, (3, 3), 6, 4)
    with pytest.raises(LcnnError, match=message):
        PackedBytes(replace(layer, **change))


def test_sums_over_channels_that_could_overflow_are_refused():
    layer = random_layer(random.Random(3), 5, 4, 3, (3, 3), 6, 4)
    wide = torch.full((1, 3, 40000), 127, dtype=torch.int8)
    with pytest.raises(LcnnError, match="over channels"):
        replace(layer, dictionary=wide).validate()


def test_calls_that_do_not_fit_are_refused():
    layer = random_layer(random.Random(3), 5, 4, 3, (3, 3), 6, 4)
    x = torch.zeros(1, 5, 6, 6, dtype=torch.uint8)
    packed, geometry = PackedBytes(layer), ((1, 1), (0, 0, 0, 0), (1, 1))
    for given, residual in (
        (x[:, :4], None),
        (x.float(), None),
        (x[:, :, :2], None),
        (x, torch.zeros(1, 4, 4, 4, dtype=torch.uint8)),
        (x[0], None),
    ):
        with pytest.raises(LcnnError, match="convolve_bytes"):
            packed(given, *geometry, residual)


CHAINS = [
    (("add", (0, 1), ()), ("sigmoid", (3,), ()), ("mul", (4, 0), ())),
    (("mul", (0, 2), ()), ("gelu", (3,), ()), ("sub", (4, 1), (0.5,))),
    (("maximum", (0, 1), ()), ("tanh", (3,), ()), ("div", (4, 2), ())),
    (("elu", (0,), (1.0, 1.0)), ("softplus", (3,), (1.0, 20.0)), ("add", (4, 1), (2.0,))),
    (("silu", (0,), ()), ("mish", (1,), ()), ("minimum", (3, 4), ()), ("exp", (5,), ())),
]


def between_layers():
    """Results of chains of functions and of means, of bytes and floats, on shapes of every kind."""
    rng, found = random.Random(5), []
    generator = torch.Generator().manual_seed(9)
    for turn in range(30):
        shape = (rng.randint(1, 3), rng.randint(1, 7), rng.randint(1, 12), rng.randint(1, 40))
        x = torch.randn(shape, generator=generator) * 3
        other = torch.randn([s if rng.random() < 0.6 else 1 for s in shape[1:]], generator=generator).expand(shape[0], -1, -1, -1)
        constant = torch.rand(shape[1], 1, 1, generator=generator) + 0.5
        ends = [(rng.uniform(0.01, 0.1), rng.randint(0, 255)) for _ in range(3)]
        casts = [Cast(i, *ends[i], True) for i in range(2)]
        chain = ByteMap((2, rng.choice([1, 3])), (tuple(constant.shape),), (), CHAINS[turn % len(CHAINS)], of=(ends[0], None))
        chain = replace(chain, of=(ends[0], ends[1] if chain.inputs[1] == 3 else None), to=rng.choice([None, ends[2]]))
        window = rng.choice(
            [Window(True), Window(True, (1, 1), (2, 1)), Window(True, (2, 3), (2, 2), (1, 1), ceil=True, counted=False)]
        )
        if window.kernel_size == (2, 3) and min(shape[2:]) < 2:
            window = Window(True)
        mean = ByteMean(*rng.choice([(0, window, None), (2, window, ends[0])]), rng.choice([None, ends[2]]))
        steps = [*casts, chain, mean]
        outputs = []
        for value in (4, 5):
            to = steps[value - 2].to
            if to is not None:
                steps.append(Cast(value, *to, False))
            outputs.append(value if to is None else len(steps) + 1)
        found += Program(Recipe(2, tuple(steps), tuple(outputs)), [(constant,)])(x, other.contiguous())
    return found


@pytest.fixture(scope="module")
def of_this_processor():
    """What its own instruction set gives."""
    return between_layers()


def test_what_stands_between_layers_has_the_same_bits_everywhere(of_this_processor, byte_instruction_set):
    for y, truth in zip(between_layers(), of_this_processor, strict=True):
        assert bool(torch.isfinite(y).all())
        equal(y, truth, byte_instruction_set)
