"""Values of every kernel, epilogue and configuration: in Triton's interpreter, or on a GPU where there is one."""

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))

from emulate import interpreting
from triton.runtime.jit import JITFunction

from lcnn_compile.kernels import backward, choose, reference, store
from lcnn_compile.kernels.arguments import Arguments, Epilogue, Geometry, Weight, flat
from lcnn_compile.kernels.triton import backward as triton_backward
from lcnn_compile.kernels.triton import choose as triton_choose
from lcnn_compile.kernels.triton import forward as triton_forward
from lcnn_compile.kernels.triton import ops as triton_ops
from lcnn_compile.kernels.triton import store as triton_store
from lcnn_compile.kernels.triton import tune as triton_tune
from lcnn_compile.kernels.triton.pack import pack, sizes_of
from lcnn_compile.lookup import LookupWeight, filter_table
from lcnn_compile.testing import assert_close, lookup_weights

pytestmark = [pytest.mark.triton, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def _kernels_run(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setenv("LCNN_TUNE", "0")
    with nullcontext() if DEVICE == "cuda" else interpreting():
        yield


@dataclass(frozen=True)
class Case:
    """A layer and a call of it; ``fill`` is the share of P that is not zero."""

    group_size: int = 1
    batch: int = 2
    size: tuple[int, int] = (7, 9)
    in_channels: int = 10
    out_channels: int = 24
    vectors: int = 5
    kernel: tuple[int, int] = (3, 3)
    groups: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    shuffled: bool = False
    fill: float = 0.3
    dtype: torch.dtype = torch.float32
    format: torch.memory_format = torch.contiguous_format
    epilogue: dict[str, Any] = field(default_factory=dict)

    def tensors(self):
        lookups = torch.randn(self.out_channels, self.vectors, *self.kernel)
        lookups *= torch.rand(lookups.shape) < self.fill
        lookups[0] = 0
        dictionary = torch.randn(self.groups, self.vectors, self.in_channels // self.groups)
        share = self.out_channels // self.groups
        order = torch.cat([torch.randperm(share) + i * share for i in range(self.groups)]) if self.shuffled else None
        filters = filter_table(self.out_channels, self.group_size, self.groups, order)
        weight = LookupWeight.from_lookup_tensor(dictionary, lookups, filters=filters)
        x = torch.randn(self.batch, self.in_channels, *self.size)
        return weight.to(DEVICE, self.dtype), x.to(DEVICE, self.dtype).contiguous(memory_format=self.format)

    def shape(self):
        args = (self.size, self.kernel, self.stride, self.padding, self.dilation)
        return (self.batch, self.out_channels, *reference.output_size(*args))

    def geometry(self):
        return Geometry(self.out_channels, self.kernel, self.stride, self.padding, self.dilation)

    def conv(self, x, w, bias=None):
        x = reference.pad_spatial(x, self.padding)
        return F.conv2d(x, w, bias, self.stride, 0, self.dilation, self.groups)


def result_of(case, weight, x, bias=None, residual=None, activation="none", residual_last=False):
    call = Arguments(x, weight.operands(), case.geometry(), Epilogue(bias, residual, activation, residual_last))
    return triton_ops.forward(call, case.shape(), case.format)


def check(case, weight, x, y, bias=None, residual=None, activation="none", residual_last=False):
    """Compare with float64, allowing what a dense convolution of this dtype errs, and the rounding of S."""
    wide = weight.to(torch.float64)
    tail = Epilogue(None, None if residual is None else residual.double(), activation, residual_last)
    truth = reference.apply_epilogue(case.conv(x.double(), wide.dense_weight(), None if bias is None else bias.double()), *tail)
    scale = case.conv(x.double().abs(), reference.dense_weight(wide.dictionary.abs(), wide.lookup_tensor().abs()))
    step = torch.finfo(case.dtype).eps
    own = (truth + step * scale.max()).to(case.dtype)
    assert y.dtype == case.dtype
    assert y.shape == case.shape()
    assert y.is_contiguous(memory_format=case.format)
    assert_close(y, own, truth, name=str(case))


SHAPES = [
    Case(),
    Case(stride=(2, 1), padding=(0, 2, 1, 3), dilation=(1, 2), fill=0.1),
    Case(stride=(2, 2), size=(8, 16), padding=(1, 1, 1, 1)),
    Case(groups=2, kernel=(2, 5), stride=(3, 2), padding=(1, 0, 2, 4), shuffled=True),
    Case(kernel=(1, 1), padding=(0, 0, 0, 0), size=(5, 8), in_channels=3),
    Case(fill=0.0, batch=1),
    Case(kernel=(9, 1), padding=(4, 4, 0, 0), size=(9, 1), vectors=17, in_channels=33),
    Case(stride=(2, 1), dilation=(2, 1), size=(25, 6)),
]


@pytest.mark.parametrize("group_size", [1, 3, 16, 24])
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_shapes(shape, group_size):
    format = FORMATS[(shape + group_size) % 2]
    case = replace(SHAPES[shape], group_size=group_size, dtype=DTYPES[shape % len(DTYPES)], format=format)
    weight, x = case.tensors()
    bias = torch.randn(case.out_channels, device=DEVICE).to(case.dtype)
    check(case, weight, x, result_of(case, weight, x, bias), bias)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("residual_last", [None, False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_filters_in_another_order_than_channels(dtype, residual_last, groups):
    case = Case(group_size=5, shuffled=True, groups=groups, out_channels=36, size=(5, 6), dtype=dtype, format=FORMATS[1])
    weight, x = case.tensors()
    bias = torch.randn(case.out_channels, device=DEVICE).to(dtype)
    residual = None if residual_last is None else torch.randn(case.shape(), device=DEVICE).to(dtype)
    tail = (bias, residual, "hardswish", bool(residual_last))
    check(case, weight, x, result_of(case, weight, x, *tail), *tail)


@pytest.mark.parametrize("format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [1, 16])
def test_dtypes_and_formats(group_size, dtype, format):
    case = Case(group_size=group_size, dtype=dtype, format=format, size=(8, 8), in_channels=32, out_channels=32)
    weight, x = case.tensors()
    check(case, weight, x, result_of(case, weight, x))


@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
@pytest.mark.parametrize("residual_last", [None, False, True])
def test_epilogues(activation, residual_last):
    case = Case(group_size=(1, 8)[len(activation) % 2], size=(4, 6), shuffled=residual_last is True)
    weight, x = case.tensors()
    bias = torch.randn(case.out_channels, device=DEVICE)
    residual = None if residual_last is None else torch.randn(case.shape(), device=DEVICE)
    tail = (bias, residual, activation, bool(residual_last))
    check(case, weight, x, result_of(case, weight, x, *tail), *tail)


CONFIGS = [
    (g, size, config)
    for size in (2, 4)
    for g, configs in (
        (1, triton_tune.lookup_configs(size)),
        (16, triton_tune.grouped_configs(16, size)),
        (64, triton_tune.grouped_configs(64, size)),
    )
    for config in configs
]


def direct(case, weight, x, config, chunk=1 << 20, **epilogue):
    """The forward pass with this configuration."""
    tail = Epilogue(**{"bias": None, "residual": None, "activation": "relu", "residual_last": False, **epilogue})
    y = torch.empty(case.shape(), dtype=x.dtype, device=x.device, memory_format=case.format)
    where = sizes_of(case.size, case.geometry(), x.element_size())
    dictionary = triton_tune.dictionary_configs(case.vectors, x.element_size())[-1]
    form = triton_forward.ForwardConfig(dictionary, config, chunk)
    return triton_forward.run(x, y, pack(weight.operands(), case.kernel[1]), case.groups, tail, where, form)


@pytest.mark.parametrize(("group_size", "element_size", "config"), CONFIGS, ids=str)
def test_configurations(group_size, element_size, config):
    dtype = torch.float32 if element_size == 4 else torch.float16
    case = Case(group_size=group_size, dtype=dtype, size=(5, 6), out_channels=80, batch=3)
    weight, x = case.tensors()
    check(case, weight, x, direct(case, weight, x, config), activation="relu")


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_dictionary_configurations(dtype, index, monkeypatch):
    configs = triton_tune.dictionary_configs
    monkeypatch.setattr(triton_tune, "dictionary_configs", lambda *sizes: [configs(*sizes)[index % len(configs(*sizes))]])
    case = Case(dtype=dtype, vectors=40, in_channels=70, size=(4, 8))
    weight, x = case.tensors()
    check(case, weight, x, result_of(case, weight, x))


@pytest.mark.parametrize("group_size", [1, 16])
def test_batch_in_chunks(group_size):
    case = Case(group_size=group_size, batch=5)
    weight, x = case.tensors()
    config = triton_tune.guess(x, pack(weight.operands(), 3), 1).lookups
    tail = {"residual": torch.randn(case.shape(), device=DEVICE), "bias": torch.randn(case.out_channels, device=DEVICE)}
    whole = direct(case, weight, x, config, **tail)
    image = sizes_of(case.size, case.geometry(), 4).image(case.vectors)
    parts = direct(case, weight, x, config, chunk=2 * image * 4, **tail)
    check(case, weight, x, parts, activation="relu", **tail)
    # Which image a program works on must not matter; the interpreter's products of another shape may round otherwise.
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6 * float(whole.abs().max()))


@pytest.mark.parametrize("group_size", [1, 16])
def test_offsets_of_64_bits(group_size, monkeypatch):
    case = Case(group_size=group_size)
    weight, x = case.tensors()
    config = triton_tune.guess(x, pack(weight.operands(), 3), 1).lookups
    plain = direct(case, weight, x, config)
    monkeypatch.setattr(sys.modules["lcnn_compile.kernels.triton.tiles"], "INT32", 1)
    assert torch.equal(direct(case, weight, x, config), plain)


@settings(max_examples=12)
@given(lookup_weights(in_channels=4), st.integers(1, 3), st.integers(5, 12), st.integers(5, 12))
def test_any_weight(weight, batch, height, width):
    with nullcontext() if DEVICE == "cuda" else interpreting():
        x = torch.randn(batch, 4, height, width, device=DEVICE)
        weight = weight.to(DEVICE)
        case = Case(
            batch=batch, size=(height, width), kernel=weight.kernel_size, padding=(0,) * 4, out_channels=weight.out_channels
        )
        check(case, weight, x, result_of(case, weight, x))


def test_input_that_is_a_slice():
    case = Case(size=(6, 8))
    weight, x = case.tensors()
    wide = torch.randn(2, 10, 6, 11, device=DEVICE)
    wide[..., 2:10] = x
    check(case, weight, x, result_of(case, weight, wide[..., 2:10]))


@pytest.mark.parametrize("group_size", [1, 3, 16, 24])
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_gradient_of_coefficients(shape, group_size):
    case = replace(SHAPES[shape], group_size=group_size, format=FORMATS[shape % 2])
    weight, x = case.tensors()
    grad = torch.randn(case.shape(), device=DEVICE).contiguous(memory_format=FORMATS[group_size % 2])
    found = triton_ops.coefficient_gradient(grad, x, weight.operands(), case.geometry())
    again = triton_ops.coefficient_gradient(grad, x, weight.operands(), case.geometry())
    wide = weight.to(torch.float64)
    coefficients = wide.coefficients.requires_grad_()
    truth, *_ = torch.autograd.grad(case.conv(x.double(), wide.dense_weight()), coefficients, grad.double())
    member = (weight.filters >= 0)[reference.tap_filter_groups(weight.offsets, truth.shape[0])]
    assert torch.equal(found, again)
    assert_close(found, (truth * member).float() * (1 + 1e-5), truth * member, name=str(case))


def test_gradients_of_the_operator():
    case = Case(group_size=16, groups=2, stride=(2, 1), in_channels=6, out_channels=20)
    weight, x = case.tensors()
    grad = torch.randn(case.shape(), device=DEVICE)
    args = (grad, x, *weight.operands(), *case.geometry(), [True, True, True])
    ways = [
        torch.ops.lcnn.lookup_conv2d_backward(*args),
        backward._on_gpu(grad, x, weight.operands(), case.geometry(), [True] * 3),
    ]
    wide = weight.to(torch.float64)
    inputs = [t.requires_grad_() for t in (x.double(), wide.dictionary, wide.coefficients)]
    truth = torch.autograd.grad(case.conv(inputs[0], wide.dense_weight()), inputs, grad.double())
    for found in ways:
        for ours, exact in zip(found, truth, strict=True):
            assert_close(ours, exact.float() * (1 + 1e-5), exact)
    torch.library.opcheck(torch.ops.lcnn.lookup_conv2d_backward, args, test_utils=("test_schema", "test_faketensor"))


def test_many_splits_of_pixels_sum_to_the_same():
    case = Case(group_size=16, batch=4, size=(16, 16))
    weight, x = case.tensors()
    grad = torch.randn(case.shape(), device=DEVICE)
    where = sizes_of(case.size, case.geometry(), 4)
    form = pack(weight.operands(), 3)
    dictionary = triton_tune.dictionary_configs(case.vectors, 4)[0]
    found = [
        triton_backward.coefficient_gradient(
            grad, x, form, 1, where, dictionary, triton_backward.BackwardConfig(32, 64, programs, 4, 3)
        )
        for programs in (1, 64)
    ]
    assert_close(found[1], found[0] * (1 + 1e-5), found[0].double())


@pytest.mark.parametrize("group_size", [1, 3, 16])
def test_packed_weights_die_with_the_weight(group_size):
    case = Case(group_size=group_size)
    weight, _ = case.tensors()
    pack(weight.operands(), 3)
    storages = [StorageWeakRef(t.untyped_storage()) for t in weight.tensors().values()]
    del weight
    assert all(storage.expired() for storage in storages)


def test_failure_warns_once_and_is_remembered(monkeypatch):
    case = Case()
    weight, x = case.tensors()
    monkeypatch.setattr(triton_ops, "_unusable", {})
    monkeypatch.setattr(triton_forward, "run", lambda *_: (_ for _ in ()).throw(RuntimeError("no compiler here")))
    with pytest.warns(triton_ops.LcnnWarning, match="no compiler here"):
        assert result_of(case, weight, x) is None
    assert result_of(case, weight, x) is None
    assert not triton_ops.usable("cuda", torch.float32)


def test_choices_survive_on_disk(tmp_path):
    path = tmp_path / "device.json"
    case = Case()
    weight, x = case.tensors()
    choice = triton_tune.guess(x, pack(weight.operands(), 3), 1)
    other = choice._replace(chunk=3)
    for name, config in (("layer", choice), ("other", other)):
        store.remember(path, name, triton_tune._stored(config))
    store.known.cache_clear()
    for name, config in (("layer", choice), ("other", other)):
        assert triton_tune._restored(store.known(path)[name], 1) == config
    path.write_text("{half")
    store.known.cache_clear()
    assert store.known(path) == {}


def test_lowering_is_chosen_by_measurement(tmp_path, monkeypatch):
    weight, _ = Case(group_size=3, out_channels=20).tensors()
    problem = choose.problem_of((2, 10, 7, 9), weight.dictionary.shape, weight.coefficients.shape,
                                Geometry(20, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)), DEVICE, torch.float32)  # fmt: skip
    times = {"lookup": 3.0, "factored": 1.0, "dense": 2.0}

    def run(call, lowering):
        torch.ops.lcnn.lookup_conv2d(*flat(call._replace(lowering=lowering)))
        return times[lowering]

    monkeypatch.setattr(triton_choose, "_milliseconds", run)
    monkeypatch.setattr(triton_store, "may_measure", lambda device: True)
    monkeypatch.setattr(triton_store, "store_of", lambda device: tmp_path / "device.json")
    monkeypatch.setattr(triton_choose, "_measured", {})
    assert triton_choose.measured(problem) == times
    monkeypatch.setattr(triton_choose, "_measured", {})
    times["dense"] = 0.0
    assert triton_choose.measured(problem)["dense"] == 2.0
    triton_choose._measured[replace(problem, device="cuda")] = triton_choose.measured(problem)
    assert choose.cheapest(replace(problem, device="cuda"), True) == "factored"


class Recorder(TorchDispatchMode):
    """Names of the operators called, and the sizes of what they allocate."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append((str(function), str(args[0]) if "empty" in str(function) else ""))
        return function(*args, **(kwargs or {}))


ALLOCATING, VIEWS = ("empty", "fill_"), ("flatten", "slice", "view", "alias", "detach", "as_strided")


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("group_size", [1, 3, 16])
def test_second_call_neither_waits_for_the_device_nor_allocates_anything_else(group_size, inference, monkeypatch):
    """What a CUDA graph may hold: no value read by the host, and the same allocations at every call."""
    case = Case(group_size=group_size, shuffled=group_size == 3, format=FORMATS[1], in_channels=8, size=(4, 6))
    weight, x = case.tensors()
    tensors = weight.tensors()  # lives on, as a module's parameters do
    found = []
    for _ in range(3):
        with torch.inference_mode(inference), Recorder() as record, monkeypatch.context() as context:
            context.setattr(JITFunction, "run", lambda self, *args, **kwargs: None)
            triton_ops.forward(Arguments(x, Weight(**tensors), case.geometry()), case.shape(), case.format)
        found.append([call for call in record.calls if not any(view in call[0] for view in VIEWS)])
    first, second, third = found
    assert any("_local_scalar_dense" in name for name, _ in first)  # the weight is packed once
    assert second == third
    assert all(any(kind in name for kind in ALLOCATING) for name, _ in second), second


def test_import_without_triton():
    code = "import sys; sys.modules['triton'] = None; import lcnn_compile; from lcnn_compile.kernels import operator; from lcnn_compile.kernels.triton import ops"
    subprocess.run([sys.executable, "-c", f"{code}; assert operator.lookup_conv2d and ops._can"], check=True)
