"""The backward pass on the C++ kernels: gradients against float64 over every geometry, threads, instruction sets."""

import random
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lcnn_compile import LcnnError, LookupConv2d
from lcnn_compile.kernels import backward, reference
from lcnn_compile.kernels.arguments import Geometry, Weight
from lcnn_compile.kernels.cpu import backward as cpu_backward
from lcnn_compile.kernels.operator import lookup_conv2d
from lcnn_compile.testing.cases import laid_out, random_lookup_weight

pytestmark = pytest.mark.skipif(not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="needs a C++ compiler")
BACKWARD = torch.ops.lcnn.lookup_conv2d_backward.default


def weight_of(rng, groups, kernel, group_size, taps=40):
    sizes = {"dictionary_size": rng.choice([1, 2, 7, 20]), "group_size": group_size, "taps": taps}
    channels, filters = groups * rng.randint(1, 12), groups * rng.randint(1, 30)
    return random_lookup_weight(channels, filters, kernel, **sizes, groups=groups, seed=rng.randrange(2**31))


def arguments(rng, weight, batch, size, padding=(0, 0, 0, 0), dilation=(1, 1), stride=(1, 1)):
    """Of the backward operator, the input in a random layout."""
    channels = weight.dictionary.shape[0] * weight.dictionary.shape[2]
    x = laid_out(torch.randn(batch, channels, *size), rng.choice(["contiguous", "channels_last", "strided", "transposed"]))
    out = reference.output_size(size, weight.kernel_size, stride, padding, dilation)
    grad = torch.randn(batch, weight.out_channels, *out)
    if rng.random() < 0.3:
        grad = grad.contiguous(memory_format=torch.channels_last)
    call = (weight.out_channels, weight.kernel_size, stride, padding, dilation, [True] * 3)
    return (grad, x, *weight.tensors().values(), *call)


def truth_of(grad, x, *rest):
    """The three gradients in float64, through the dense weight."""
    weight, geometry = Weight(*rest[:6]), Geometry(*rest[6:11])
    inputs = [t.double().requires_grad_() for t in (x, weight.dictionary, weight.coefficients)]
    groups, size, _ = weight.dictionary.shape
    lookups = weight.lookups._replace(coefficients=inputs[2])
    p = reference.lookup_tensor(*lookups, geometry.out_channels, size, geometry.kernel_size)
    y = reference.convolve(inputs[0], reference.dense_weight(inputs[1], p), geometry, groups)
    found = torch.autograd.grad(y, inputs, grad.double(), allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs, strict=True)]


def check(found, truth, tolerance=2e-5):
    for ours, exact in zip(found, truth, strict=True):
        assert ours.shape == exact.shape
        assert ours.dtype == torch.float32
        error = (ours.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30) if exact.numel() else torch.zeros(())
        assert error < tolerance, f"relative error {float(error)}"


@pytest.fixture
def always(monkeypatch):
    """The kernels run however many taps there are."""
    monkeypatch.setattr(cpu_backward, "SHARE", float("inf"))


@pytest.mark.parametrize("seed", range(4))
def test_any_geometry(instruction_set, always, seed):
    rng = random.Random(seed)
    for _ in range(25):
        kernel, dilation = (rng.randint(1, 4), rng.randint(1, 4)), (rng.randint(1, 3), rng.randint(1, 3))
        size = (rng.randint(1, 20), rng.randint(1, 40)) if rng.random() < 0.4 else (rng.randint(1, 5), rng.randint(1, 5))
        padding = tuple(rng.choice([0, 1, 2, 7]) for _ in range(4))
        if min(reference.output_size(size, kernel, (1, 1), padding, dilation)) < 1:
            continue
        weight = weight_of(rng, rng.choice([1, 1, 2, 3]), kernel, rng.choice([1, 2, 3, 5, 7, 8, 8, 11, 20]))
        call = arguments(rng, weight, rng.choice([0, 1, 3, 8, 17, 70]), size, padding, dilation)
        spoiled = (torch.full_like(call[0], torch.nan), *call[1:])
        BACKWARD(*spoiled)  # what the last call left in the scratch must not matter
        check(BACKWARD(*call), truth_of(*call))


@pytest.mark.parametrize(
    ("batch", "size", "group_size"),
    [(2, (60, 61), 8), (40, (17, 15), 8), (33, (16, 16), 3), (130, (2, 2), 8), (200, (1, 1), 4), (37, (4, 4), 1)],
)
def test_bands_sections_and_lanes(always, batch, size, group_size):
    rng = random.Random(batch)
    weight = random_lookup_weight(6, 50, (3, 3), dictionary_size=9, group_size=group_size, taps=50, seed=batch)
    call = arguments(rng, weight, batch, size, (1, 1, 1, 1))
    found = BACKWARD(*call)
    check(found, truth_of(*call))
    s = F.conv2d(call[1], reference.pointwise_weight(weight.dictionary))
    lookups, geometry = weight.operands().lookups, Geometry(50, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            again = cpu_backward.gradients(call[0], s, lookups, 1, geometry)
            torch.set_num_threads(1)
            once = cpu_backward.gradients(call[0], s, lookups, 1, geometry)
            assert all(torch.equal(a, b) for a, b in zip(again, once, strict=True))
    finally:
        torch.set_num_threads(before)


def test_absent_images_and_filters_add_nothing(always):
    # A batch that leaves lanes empty, and a last filter group with one member.
    weight = random_lookup_weight(4, 17, (3, 3), dictionary_size=5, group_size=8, taps=20, seed=3)
    call = arguments(random.Random(0), weight, 9, (3, 3), (1, 1, 1, 1))
    found = BACKWARD(*call)
    check(found, truth_of(*call))
    members = (weight.filters >= 0)[reference.tap_filter_groups(weight.offsets, found[2].shape[0])]
    assert (found[2][~members] == 0).all()


def test_values_that_are_not_finite_stay_with_the_pixels_that_read_them(always):
    weight = random_lookup_weight(4, 6, (3, 3), dictionary_size=5, group_size=3, taps=20, seed=4)
    grad, *rest = arguments(random.Random(0), weight, 8, (5, 11), (1, 1, 1, 1))
    grad[3, :, 0, 0] = torch.inf
    found = BACKWARD(grad, *rest)[0]
    touched = torch.zeros(8, 5, 11, dtype=torch.bool)
    touched[3, :2, :2] = True
    assert found.movedim(1, -1)[~touched].isfinite().all()
    assert not found[3].isfinite().all()


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)])
def test_only_what_is_wanted(always, wanted):
    weight = random_lookup_weight(4, 6, (3, 3), dictionary_size=5, group_size=3, taps=9, seed=5)
    call = arguments(random.Random(1), weight, 3, (7, 6))
    found, truth = BACKWARD(*call[:-1], list(wanted)), truth_of(*call)
    for ours, exact, asked in zip(found, truth, wanted, strict=True):
        assert asked or ours.numel() == 0
        if asked:
            check([ours], [exact])


@pytest.mark.parametrize("groups", [1, 3])
def test_both_ways_through_the_dictionary(groups):
    dictionary, x = torch.randn(groups, 5, 4), torch.randn(2, 4 * groups, 3, 7).contiguous(memory_format=torch.channels_last)
    grad_s = torch.randn(2, 5 * groups, 3, 7)
    ways = [way(grad_s, x, dictionary, (True, True)) for way in (backward._by_convolution, backward._by_product)]
    for a, b in zip(*ways, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert backward._by_product(grad_s, x, dictionary, (False, True))[0] is None


class Called(TorchDispatchMode):
    """Counts calls of the backward operator."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is BACKWARD
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("skips", [False, True])
def test_layers_train_on_it(skips):
    geometry = {"kernel_size": 1, "stride": 2} if skips else {"kernel_size": 3, "padding": 1}
    layer = LookupConv2d(12, 20, **geometry, dictionary_size=8, sparsity=2, group_size=4)
    x = torch.randn(5, 12, 9, 7, requires_grad=True)
    y = layer(x)
    grad = torch.randn_like(y)
    with Called() as called:
        y.backward(grad)
    assert called.count == 1
    call = (grad, x.detach(), *(t.detach() for t in layer.lookup_weight().tensors().values()))
    truth = truth_of(*call, 20, layer.kernel_size, layer.stride, (0,) * 4 if skips else (1,) * 4, (1, 1), None)
    check((x.grad, layer.dictionary.grad, layer.coefficients.grad), truth)


def test_dense_convolutions_where_taps_are_many_or_strides_skip_rows():
    for layer in (LookupConv2d(6, 8, 3, dictionary_size=2, sparsity=None), LookupConv2d(6, 8, 3, stride=2, sparsity=1)):
        y = layer(torch.randn(2, 6, 9, 9, requires_grad=True))
        with Called() as called:
            y.sum().backward()
        assert called.count == 0


def test_gradients_of_gradients():
    layer = LookupConv2d(6, 8, 3, dictionary_size=4, sparsity=1, group_size=2)
    dense = nn.Conv2d(6, 8, 3)
    dense.load_state_dict(layer.to_conv().state_dict())

    def penalty(layer):
        x = torch.linspace(-1, 1, 6 * 49).view(1, 6, 7, 7).requires_grad_()
        (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return slope.square().sum()

    penalty(layer).backward()
    penalty(dense).backward()
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad, rtol=1e-4, atol=1e-3)


def test_training_under_inductor(backend_reset):
    torch.manual_seed(1)
    model = nn.Sequential(LookupConv2d(6, 16, 3, padding=1, dictionary_size=4, sparsity=1, group_size=4), nn.ReLU())
    x = torch.randn(4, 6, 8, 8)
    model(x).square().sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compile(model, fullgraph=True)(x).square().sum().backward()
    for parameter, grad in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-4)


def test_registration(always):
    weight = random_lookup_weight(6, 8, (3, 2), dictionary_size=5, group_size=3, taps=9, groups=2, seed=6)
    for stride in ((1, 1), (2, 1)):
        for wanted in ([True] * 3, [False, True, False]):
            call = (*arguments(random.Random(2), weight, 2, (7, 6), (1, 0, 2, 1), (1, 2), stride)[:-1], wanted)
            torch.library.opcheck(BACKWARD, call, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("place", "spoil"),
    [
        (0, lambda t: t[:, :-1]),
        (0, lambda t: t[..., 1:]),
        (0, lambda t: t[:1]),
        (0, lambda t: t.double()),
        (0, lambda t: t.to("meta")),
        (1, lambda t: t[:, 1:]),
        (1, lambda t: t[0]),
        (2, lambda t: t[:, 1:]),
        (3, lambda t: t[1:]),
        (4, lambda t: t + 5),
        (5, lambda t: t + 9),
        (6, lambda t: t - 1),
        (7, lambda t: t + 1),
        (8, lambda n: n + 1),
        (9, lambda k: [k[0] + 1, k[1]]),
        (10, lambda s: [0, 1]),
        (11, lambda p: [-1, 0, 0, 0]),
        (12, lambda d: [2**31, 1]),
    ],
)
def test_arguments_that_do_not_fit_are_refused(place, spoil):
    weight = random_lookup_weight(6, 8, (3, 2), dictionary_size=5, group_size=3, taps=9, seed=7)
    call = list(arguments(random.Random(3), weight, 2, (7, 6)))
    call[place] = spoil(call[place])
    with pytest.raises((LcnnError, NotImplementedError)):
        BACKWARD(*call)


def test_a_step_of_training_is_that_of_the_dense_form():
    """The whole way: forwards on the kernels, backwards on the kernels, twice with a changed weight between."""
    layer = LookupConv2d(8, 24, 3, padding=1, dictionary_size=6, sparsity=2, group_size=8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-2)
    for _ in range(2):
        x = torch.randn(16, 8, 6, 6)
        exact = layer.lookup_weight().detach().to(torch.float64)
        loss = layer(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        y = F.conv2d(x.double(), exact.dense_weight(), layer.bias.detach().double(), padding=1)
        torch.testing.assert_close(loss.double(), y.square().mean(), rtol=1e-5, atol=1e-6)
        tensors = exact.tensors()
        call = (2 * y / y.numel(), x.double(), *tensors.values(), 24, (3, 3), (1, 1), (1,) * 4, (1, 1), None)
        _, dictionary, coefficients = truth_of(*call)
        torch.testing.assert_close(layer.dictionary.grad.double(), dictionary, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer.coefficients.grad.double(), coefficients, rtol=1e-4, atol=1e-6)
        optimizer.step()


def test_lookup_conv2d_still_has_a_formula_for_other_devices():
    weight = random_lookup_weight(4, 6, (3, 3), dictionary_size=5, group_size=3, taps=9, seed=8).to(torch.float64)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64, requires_grad=True)
    y = lookup_conv2d(x, *weight.tensors().values(), None, 6, (3, 3), (1, 1), (0,) * 4, (1, 1))
    with Called() as called:
        y.sum().backward()
    assert called.count == 0
    wanted = torch.autograd.grad(F.conv2d(x, weight.dense_weight()).sum(), x)[0]
    torch.testing.assert_close(x.grad, wanted)
