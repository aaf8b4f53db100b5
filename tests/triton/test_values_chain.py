"""Chains (a convolution in channels_last, its epilogue, the next 1x1 product): values of every plan, in the interpreter or on a GPU."""

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))

from emulate import interpreting

from lcnn_compile.kernels import reference
from lcnn_compile.kernels.arguments import Geometry
from lcnn_compile.kernels.triton import chain_tune as triton_chain_tune
from lcnn_compile.kernels.triton.chain import Tail, Window
from lcnn_compile.kernels.triton.chain_pack import pack_bias, pack_next, pack_weight

pytestmark = [pytest.mark.triton, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST = torch.channels_last


@dataclass(frozen=True)
class Case:
    """A call of the operator."""

    channels: int = 16
    filters: int = 24
    next: int = 0
    size: tuple[int, int] = (5, 7)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    activation: str = "relu"
    bias: bool = True
    residual: bool = False
    residual_last: bool = False
    keep: bool = True
    dtype: torch.dtype = torch.float32


CASES = {
    "plain": Case(),
    "product": Case(next=6),
    "product alone": Case(next=20, keep=False, filters=70),
    "residual": Case(next=16, residual=True, channels=32, filters=64),
    "residual last": Case(next=16, residual=True, residual_last=True, activation="silu", filters=130),
    "stride": Case(next=33, stride=(2, 1), size=(8, 9), channels=48),
    "dilation": Case(next=5, dilation=(2, 1), padding=(2, 2, 1, 1)),
    "dilated columns": Case(next=5, dilation=(1, 2), padding=(1, 1, 2, 2)),
    "padding on one side": Case(next=5, padding=(0, 2, 3, 0), activation="none"),
    "pointwise": Case(kernel=(1, 1), padding=(0, 0, 0, 0), channels=33, next=9, bias=False),
    "few channels": Case(channels=3, kernel=(5, 3), padding=(2, 2, 1, 1), filters=17),
    "an image": Case(channels=3, kernel=(7, 7), stride=(2, 2), padding=(3,) * 4, filters=64, size=(12, 10), dtype=torch.float16),
    "an image, no stride": Case(channels=3, filters=64, next=16, size=(6, 9), dtype=torch.float16, keep=False),
    "an image of one channel": Case(channels=1, kernel=(3, 5), padding=(1, 1, 2, 2), filters=24, dtype=torch.float16),
    "one column": Case(kernel=(3, 1), padding=(1, 1, 0, 0), next=16, activation="hardswish"),
    "many filters": Case(channels=64, filters=256, next=64, size=(4, 4), activation="relu6"),
    "half": Case(channels=32, filters=128, next=32, residual=True, dtype=torch.float16),
    "half, strided rows": Case(channels=16, filters=64, next=16, stride=(2, 2), size=(9, 6), dtype=torch.float16, keep=False),
}


def build(case: Case, device=DEVICE):
    """The call, and y and the product in float64."""
    torch.manual_seed(0)
    x = torch.randn(3, case.channels, *case.size).to(device, case.dtype, memory_format=LAST)
    weight = (torch.randn(case.filters, case.channels, *case.kernel) / 9).to(device, case.dtype)
    bias = torch.randn(case.filters).to(device, case.dtype) if case.bias else None
    y = reference.convolve(x.double(), weight.double(), Geometry(0, case.kernel, case.stride, case.padding, case.dilation), 1)
    residual = torch.randn(y.shape).to(device, case.dtype, memory_format=LAST) if case.residual else None
    wide = (None if t is None else t.double() for t in (bias, residual))
    y = reference.apply_epilogue(y, *wide, case.activation, case.residual_last)
    matrix = (torch.randn(case.next, case.filters) / 9).to(device, case.dtype) if case.next else None
    product = None if matrix is None else F.conv2d(y, matrix.double()[:, :, None, None])
    tail = Tail(
        None if bias is None else pack_bias(bias),
        residual,
        case.activation,
        case.residual_last,
        None if matrix is None else pack_next(matrix),
    )
    window = Window(case.kernel, case.stride, (case.padding[0], case.padding[2]), case.dilation)
    return triton_chain_tune.Call(x, pack_weight(weight), window, tail, tuple(y.shape), case.keep, case.next), y, product


def distance(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def kernels_run(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    with nullcontext() if DEVICE == "cuda" else interpreting():
        yield


@pytest.mark.parametrize("name", CASES)
def test_every_plan_gives_the_values_of_float64(name, kernels_run):
    """Outputs are filled with NaN first, so what no program writes is noticed."""
    case = CASES[name]
    call, y, product = build(case)
    allowed = 2e-6 if case.dtype == torch.float32 else 2e-3
    plans = triton_chain_tune.plans(call)
    assert plans
    for plan in plans:
        found, made = triton_chain_tune.run(call, plan)
        if case.keep:
            assert found.is_contiguous(memory_format=LAST)
            assert distance(found, y) <= allowed, plan
        if case.next:
            assert made.shape == product.shape
            assert distance(made, product) <= allowed, plan


def test_rows_are_a_step_where_they_fit():
    call, _, _ = build(CASES["half, strided rows"])
    assert {plan.first.row for plan in triton_chain_tune.plans(call) if plan.first is not None} == {True, False}
    call, _, _ = build(CASES["dilated columns"])
    assert not any(plan.first.row for plan in triton_chain_tune.plans(call) if plan.first is not None)


def test_a_plan_is_chosen_once_for_batches_of_a_kind(monkeypatch):
    """Measured at the first call, kept for the process and on disk."""
    measured = []
    monkeypatch.setattr(triton_chain_tune, "_chosen", {})
    monkeypatch.setattr(triton_chain_tune, "may_measure", lambda device: True)
    monkeypatch.setattr(triton_chain_tune, "store_of", lambda device: Path("file"))
    stored = {}
    monkeypatch.setattr(triton_chain_tune, "known", lambda path: stored)
    monkeypatch.setattr(triton_chain_tune, "remember", lambda path, name, value: stored.update({name: value}))

    def time_of(call, plan):
        measured.append(plan)
        return float(plan.apart) + len(measured) / 1e3

    monkeypatch.setattr(triton_chain_tune, "_milliseconds", time_of)
    call, _, _ = build(CASES["half"], "cpu")

    class OnGpu:
        """As much of a tensor as choosing asks for."""

        is_cuda, device, dtype = True, torch.device("cuda", 0), torch.float16

        def __init__(self, batch):
            self.shape = torch.Size((batch, *call.x.shape[1:]))

        def element_size(self):
            return 2

    def chosen(batch):
        return triton_chain_tune.plan_for(call._replace(x=OnGpu(batch)))

    first = chosen(5)
    assert first == measured[0]
    count = len(measured)
    assert chosen(7) == first
    assert len(measured) == count
    chosen(9)
    assert len(measured) == 2 * count
    triton_chain_tune._chosen.clear()
    assert chosen(6) == first
    assert len(measured) == 2 * count
    assert len(triton_chain_tune.chosen()) == 1
