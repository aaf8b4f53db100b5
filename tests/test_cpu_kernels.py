"""The C++ kernels on CPU: values against float64 over every geometry, threads, instruction sets, and how they are built."""

import random
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch

from lcnn_compile import LcnnError, LookupWeight
from lcnn_compile.errors import LcnnWarning
from lcnn_compile.kernels import cpu, reference
from lcnn_compile.kernels.cpu import build as cpu_build
from lcnn_compile.kernels.operator import lookup_conv2d
from lcnn_compile.lookup import filter_table

pytestmark = pytest.mark.skipif(not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="needs a C++ compiler")


def random_weight(rng, in_channels, out_channels, vectors, kernel, taps, group_size, groups=1):
    """A lookup weight with filters in random order and 0 to 2·taps taps per filter group."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    per_group = out_channels // groups
    order = torch.cat([torch.randperm(per_group, generator=generator) + i * per_group for i in range(groups)])
    filters = filter_table(out_channels, group_size, groups, order)
    counts = torch.randint(0, 2 * taps + 1, (filters.shape[0],), generator=generator)
    total = int(counts.sum())
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]).to(torch.int32)
    members = filters[reference.tap_filter_groups(offsets, total)] >= 0
    return LookupWeight(
        dictionary=torch.randn(groups, vectors, in_channels // groups, generator=generator),
        coefficients=torch.randn(total, filters.shape[1], generator=generator) * members,
        indices=torch.randint(0, vectors, (total,), generator=generator, dtype=torch.int32),
        positions=torch.randint(0, kernel[0] * kernel[1], (total,), generator=generator, dtype=torch.int32),
        offsets=offsets,
        filters=filters,
        kernel_size=kernel,
    ).validate()


def call(weight, x, bias=None, stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), lowering="lookup", **epilogue):
    args = (x, *weight.tensors().values(), bias, weight.out_channels, weight.kernel_size, stride, padding, dilation)
    return lookup_conv2d(*args, lowering, **epilogue)


def truth_of(weight, x, bias=None, residual=None, **rest):
    wide = [None if t is None else t.double() for t in (bias, residual)]
    return call(weight.to(torch.float64), x.double(), wide[0], lowering="factored", residual=wide[1], **rest)


def check(y, truth, tolerance=1e-5):
    assert y.shape == truth.shape
    error = (y.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-30) if truth.numel() else torch.zeros(())
    assert error < tolerance, f"relative error {float(error)}"


def random_case(rng):
    """(weight, x, keywords) of a random call, small, odd and often degenerate."""
    while True:
        groups, kernel = rng.choice([1, 1, 1, 2, 3]), (rng.randint(1, 4), rng.randint(1, 4))
        size = (rng.randint(1, 30), rng.randint(1, 70)) if rng.random() < 0.7 else (rng.randint(1, 5), rng.randint(1, 5))
        stride, dilation = ((rng.randint(1, 3), rng.randint(1, 3)) for _ in range(2))
        padding = tuple(rng.choice([0, 1, 2, 5]) for _ in range(4))
        if rng.random() < 0.15:
            size = kernel = (1, 1)
            padding = (0, 0, 0, 0)
        if min(reference.output_size(size, kernel, stride, padding, dilation)) > 0:
            break
    m, n, k = groups * rng.randint(1, 40), groups * rng.randint(1, 30), rng.choice([1, 2, rng.randint(3, 20)])
    weight = random_weight(rng, m, n, k, kernel, rng.randint(0, 12), rng.choice([1, 1, 2, 3, 4, 8, 8, 11, 16]), groups)
    x = torch.randn(rng.choice([1, 1, 2, 5]), m, *size)
    layout = rng.random()
    if layout < 0.2:
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout < 0.4:
        x = torch.randn(x.shape[0], m, size[0] + 2, size[1] + 3)[:, :, 1:-1, 2:-1]
    elif layout < 0.5:
        x = x[:, :1].expand(-1, m, -1, -1)
    out = reference.output_size(size, kernel, stride, padding, dilation)
    return (
        weight,
        x,
        {
            "bias": torch.randn(n) if rng.random() < 0.6 else None,
            "residual": torch.randn(x.shape[0], n, *out) if rng.random() < 0.4 else None,
            "residual_last": rng.random() < 0.5,
            "activation": rng.choice(list(reference.ACTIVATIONS)),
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
        },
    )


@pytest.mark.parametrize("seed", range(6))
def test_any_geometry(instruction_set, seed):
    rng = random.Random(seed)
    for _ in range(15):
        weight, x, rest = random_case(rng)
        truth = truth_of(weight, x, **rest)
        call(weight, torch.full_like(x, torch.nan), **rest)  # what the last call left in the scratch must not matter
        check(call(weight, x, **rest), truth)


@pytest.mark.parametrize(
    ("channels", "vectors", "size", "stride", "group_size"),
    [
        ((4, 64), 3, (224, 224), (1, 1), 1),  # aligned copies, output past the caches
        ((16, 40), 2, (14, 48), (1, 1), 1),  # aligned copies
        ((16, 40), 2, (9, 47), (2, 3), 1),  # aligned copies of phases
        ((16, 80), 2, (9, 31), (2, 2), 1),  # with taps a stride further
        ((70, 20), 37, (90, 300), (1, 1), 8),  # several bands, packed and direct
        ((300, 40), 37, (28, 28), (2, 2), 4),  # phases
        ((1100, 24), 37, (7, 7), (1, 1), 24),  # narrower tiles
    ],
)
def test_large(channels, vectors, size, stride, group_size):
    weight = random_weight(random.Random(0), *channels, vectors, (3, 3), 9, group_size)
    x, bias = torch.randn(2, channels[0], *size), torch.randn(channels[1])
    rest = {"bias": bias, "stride": stride, "padding": (1, 1, 1, 1), "activation": "relu"}
    check(call(weight, x, **rest), truth_of(weight, x, **rest))


def test_thread_count_does_not_change_a_bit():
    rng, before = random.Random(1), torch.get_num_threads()
    try:
        for _ in range(25):
            weight, x, rest = random_case(rng)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(call(weight, x, **rest))
            assert all(torch.equal(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (4, 1), (1, 3), (9, 1), (3, 5)])
def test_thread_count_does_not_change_a_bit_of_small_outputs(size):
    rng, before = random.Random(2), torch.get_num_threads()
    try:
        for batch in (1, 2, 3, 5):
            weight = random_weight(rng, 37, 21, 9, (3, 3), 9, rng.choice([1, 2, 8]))
            x = torch.randn(batch, 37, size[0] + 2, size[1] + 2)
            results = []
            for threads in (1, 2, 3, 4):
                torch.set_num_threads(threads)
                results.append(call(weight, x))
            check(results[0], truth_of(weight, x))
            assert all(torch.equal(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    weight = random_weight(random.Random(2), 16, 24, 6, (3, 3), 5, 8).to(dtype)
    x = torch.randn(2, 16, 9, 11).to(dtype)
    y = call(weight, x, padding=(1, 1, 1, 1))
    assert y.dtype == dtype
    check(y, truth_of(weight, x, padding=(1, 1, 1, 1)), torch.finfo(dtype).eps)


def test_memory_format_follows_the_input():
    weight = random_weight(random.Random(3), 8, 16, 4, (3, 3), 5, 8)
    x = torch.randn(2, 8, 9, 11).contiguous(memory_format=torch.channels_last)
    assert call(weight, x).is_contiguous(memory_format=torch.channels_last)
    assert call(weight, x.contiguous()).is_contiguous()


@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (9, 21)])
@pytest.mark.parametrize("group_size", [1, 5, 8])
def test_values_that_are_not_finite_pass_through_activations(instruction_set, activation, size, group_size):
    weight = random_weight(random.Random(1), 6, 20, 4, (1, 1), 3, group_size)
    x, bias = torch.randn(2, 6, *size), torch.randn(20)
    special = [torch.nan, *([torch.inf, -torch.inf] if activation in ("none", "relu", "relu6") else [])]
    bias[: len(special)] = torch.tensor(special)
    bias[-1] = torch.nan
    y = call(weight, x, bias, activation=activation)
    torch.testing.assert_close(y.double(), truth_of(weight, x, bias, activation=activation), rtol=1e-4, atol=1e-5, equal_nan=True)
    assert y[:, [0, -1]].isnan().all()
    assert y[:, len(special) : -1].isfinite().all()


def test_places_of_absent_filters_may_come_first():
    weight, x = random_weight(random.Random(2), 6, 21, 4, (3, 3), 9, 8), torch.randn(2, 6, 9, 11)
    flipped = replace(weight, filters=weight.filters.flip(1).contiguous(), coefficients=weight.coefficients.flip(1).contiguous())
    assert int(flipped.validate().filters[-1, 0]) == -1
    check(call(flipped, x), truth_of(weight, x))


def test_empty_batch():
    weight = random_weight(random.Random(4), 8, 16, 4, (3, 3), 5, 8)
    assert call(weight, torch.randn(0, 8, 9, 11)).shape == (0, 16, 7, 9)


def test_updates_in_place_are_noticed():
    weight = random_weight(random.Random(5), 8, 16, 4, (3, 3), 5, 8)
    x = torch.randn(1, 8, 9, 11)
    call(weight, x)
    weight.coefficients.mul_(2)
    weight.dictionary.data = torch.randn(1, 4, 8)
    check(call(weight, x), truth_of(weight, x))


def test_more_geometries_than_plans_are_kept():
    weight = random_weight(random.Random(6), 3, 5, 4, (2, 2), 5, 2)
    for width in range(2, cpu.PLANS + 10):
        x = torch.randn(1, 3, 2, width)
        check(call(weight, x), truth_of(weight, x))


@pytest.mark.parametrize(
    "change",
    [
        {"padding": (-1, 0, 0, 0)},
        {"padding": (1, 1)},
        {"stride": (0, 1)},
        {"activation": "gelu"},
        {"bias": torch.zeros(3)},
        {"residual": torch.zeros(1, 16, 9, 11)},
        {"x": torch.randn(1, 7, 9, 11)},
        {"x": torch.randn(8, 9, 11)},
        {"x": torch.randn(1, 8, 9, 11).double()},
        {"x": torch.randn(1, 8, 2, 11)},
    ],
)
def test_calls_that_do_not_fit_are_refused(change):
    weight, x = random_weight(random.Random(7), 8, 16, 4, (3, 3), 5, 8), torch.randn(1, 8, 9, 11)
    call(weight, x)
    with pytest.raises(LcnnError):
        call(weight, **{"x": x, **change})


def unavailable(weight, x):
    """The warnings of a call that finds no kernels; its values must be right all the same."""
    cpu_build.library.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        results = [call(weight, x, padding=(1, 1, 1, 1)) for _ in range(2)]
        assert not cpu.is_available()
    cpu_build.library.cache_clear()
    for y in results:
        check(y, truth_of(weight, x, padding=(1, 1, 1, 1)))
    return [str(w.message) for w in seen if issubclass(w.category, LcnnWarning)]


@pytest.mark.parametrize(
    ("name", "value"), [("CXX", "false"), ("LCNN_CPU_ISA", "sse9"), ("LCNN_CACHE_DIR", __file__), ("PATH", "/nonexistent")]
)
def test_without_kernels_one_warning_and_the_factored_lowering(monkeypatch, tmp_path, name, value):
    monkeypatch.setenv("LCNN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("LCNN_CPU_COMPILE", "1")
    monkeypatch.setenv(name, value)
    weight = random_weight(random.Random(8), 8, 16, 4, (3, 3), 5, 8)
    messages = unavailable(weight, torch.randn(1, 8, 9, 11))
    assert len(messages) == 1
    assert "factored" in messages[0]


def test_a_damaged_library_is_rebuilt(monkeypatch, tmp_path):
    monkeypatch.setenv("LCNN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("LCNN_CPU_COMPILE", "1")
    monkeypatch.setenv("LCNN_CPU_ISA", "portable")
    path = cpu_build.target()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half a library")
    cpu_build.library.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpu.is_available()
    cpu_build.library.cache_clear()


def test_concurrent_first_use(monkeypatch, tmp_path):
    monkeypatch.setenv("LCNN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("LCNN_CPU_COMPILE", "1")
    monkeypatch.setenv("LCNN_CPU_ISA", "portable")
    program = "import warnings; warnings.simplefilter('error'); from lcnn_compile.kernels import cpu; assert cpu.is_available()"
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(4)]
    assert [process.wait(timeout=200) for process in processes] == [0] * 4
    assert len(list(tmp_path.glob("*.so"))) == 1
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix not in (".so", ".lock")] == []


@pytest.mark.parametrize("group_size", [1, 3, 5, 7, 8])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation"),
    [
        ((2, 2), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
        ((4, 1), (5, 3), (1, 1), (2, 2, 1, 1), (1, 1)),
        ((2, 2), (3, 2), (1, 1), (2, 2, 1, 0), (2, 1)),
        ((3, 3), (3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
        ((1, 2), (3, 1), (1, 1), (4, 1, 0, 0), (1, 1)),  # rows to which no tap belongs
    ],
)
def test_taps_outside_of_few_pixels(instruction_set, group_size, size, kernel, stride, padding, dilation):
    weight = random_weight(random.Random(9), 37, 29, 23, kernel, 17, group_size)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    out = reference.output_size(size, kernel, stride, padding, dilation)
    for activation, residual_last in (("silu", False), ("relu", True)):
        rest = {"residual": torch.randn(3, 29, *out), "residual_last": residual_last, "activation": activation, **geometry}
        x, bias = torch.randn(3, 37, *size), torch.randn(29)
        check(call(weight, x, bias=bias, **rest), truth_of(weight, x, bias=bias, **rest))


def test_few_pixels_in_several_bands(instruction_set):
    weight = random_weight(random.Random(3), 5, 19, 200, (30, 30), 60, 8)
    x = torch.randn(2, 5, 31, 31)
    check(call(weight, x), truth_of(weight, x))


@pytest.mark.parametrize("size", [(3, 3), (9, 20), (16, 16)])
def test_a_large_residual_does_not_cost_the_sums_their_low_bits(instruction_set, size):
    """Coordinates plus a small step, of which the sum is taken apart again: optical flow does so."""
    rng = random.Random(0)
    weight = random_weight(rng, 24, 16, 24, (3, 3), 200, 8)
    x, residual = torch.randn(1, 24, *size), 1e4 * torch.rand(1, 16, *size)
    rest = {"padding": (1, 1, 1, 1), "activation": "relu"}
    unit = torch.finfo(torch.float32).eps * 1e4
    y, truth = call(weight, x, residual=residual, **rest), truth_of(weight, x, residual=residual, **rest)
    assert float((y.double() - truth).abs().max()) < 1.5 * unit
