"""Poolings, padding and resizing as steps of programs, against PyTorch in float64."""

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from program_runs import assert_one_program
from torch import nn

from lcnn_compile import LookupConfig, convert
from lcnn_compile.errors import KernelError
from lcnn_compile.kernels import cpu
from lcnn_compile.kernels.cpu.program import Program
from lcnn_compile.kernels.cpu.steps import Concat, Pad, Pool, Recipe, Resize, Window

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the C++ kernels are unavailable")

NAN = math.nan


def run(step, x):
    """A step's result by one thread and by two, the same of a part of a larger value; memory is poisoned before."""
    before, found = torch.get_num_threads(), []
    alone, inside = Program(Recipe(1, (step,), (1,)), []), Recipe(1, (step, Concat((1, 0, 1), 1)), (2,))
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            alone(torch.full_like(x, NAN))
            found += alone(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) or found[0].isnan().any()
    if found[0].shape[2:] == x.shape[2:]:
        [joined] = Program(inside, [])(x)
        torch.testing.assert_close(joined, torch.cat((found[0], x, found[0]), 1), rtol=0, atol=0, equal_nan=True)
    return found[0].double()


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    margin=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    mean=st.booleans(),
    ceil=st.booleans(),
    counted=st.booleans(),
    divisor=st.sampled_from((None, None, 3)),
)
def test_poolings(size, kernel, stride, margin, dilation, mean, ceil, counted, divisor):
    torch.manual_seed(0)
    margin = tuple(min(m, k // 2) for m, k in zip(margin, kernel, strict=True))
    x = torch.randn(2, 3, *size)
    if mean:
        window = Window(True, kernel, stride, margin, ceil=ceil, counted=counted, divisor=divisor)
        exact = lambda: F.avg_pool2d(x.double(), kernel, stride, margin, ceil, counted, divisor)  # noqa: E731
    else:
        window = Window(False, kernel, stride, margin, dilation=dilation, ceil=ceil)
        exact = lambda: F.max_pool2d(x.double(), kernel, stride, margin, dilation, ceil)  # noqa: E731
    try:
        truth = exact()
    except RuntimeError:
        with pytest.raises(KernelError):
            run(Pool(0, window), x)
        return
    torch.testing.assert_close(run(Pool(0, window), x), truth, rtol=1e-5, atol=1e-6)


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    pads=st.tuples(*[st.integers(-2, 5)] * 4),
    mode=st.sampled_from(("constant", "reflect", "replicate", "circular")),
    rank=st.sampled_from((3, 4)),
)
def test_padding(size, pads, mode, rank):
    torch.manual_seed(0)
    if mode == "circular":
        pads = tuple(max(0, p) for p in pads)
    x = torch.randn(2, 3, *size[4 - rank :])
    pads = pads if rank == 4 else (*pads[:2], 0, 0)
    given_pads = list(pads[: 2 * (rank - 2)])
    step = Pad(0, pads, mode, 0.5 if mode == "constant" else 0.0)
    try:
        truth = F.pad(x.double(), given_pads, mode, 0.5 if mode == "constant" else None)
        if not truth.numel():
            raise RuntimeError
    except RuntimeError:
        with pytest.raises(KernelError):
            run(step, x)
        return
    assert torch.equal(run(step, x), truth)


@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    out=st.tuples(st.integers(1, 33), st.integers(1, 33)),
    mode=st.sampled_from(("nearest", "nearest-exact", "bilinear", "bicubic", "area")),
    corners=st.booleans(),
    antialias=st.booleans(),
    scaled=st.sampled_from((None, None, 0.5, 1.7, 2.0, 3.0)),
    row=st.booleans(),
)
def test_resizing(size, out, mode, corners, antialias, scaled, row):
    torch.manual_seed(0)
    smooth = mode in ("bilinear", "bicubic")
    if row and mode == "bicubic":
        return
    mode = "linear" if row and smooth else mode
    x = torch.randn(2, 3, *(size[1:] if row else size))
    how = {"align_corners": corners} if smooth else {}
    if antialias and smooth and not row:
        how["antialias"] = True
    if scaled is not None and mode != "area":
        out = tuple(int(s * scaled) for s in x.shape[2:])
        if min(out) < 1:
            return
        how["scale_factor"] = scaled
    else:
        out = out[1:] if row else out
        how["size"] = out
    torch_own = F.interpolate(x, mode=mode, **how).double()
    exact = torch_own if "nearest" in mode else F.interpolate(x.double(), mode=mode, **how)
    own = {"bilinear": "linear", "area": "mean"}.get(mode, mode)
    scales = None if "size" in how else (scaled,) * len(out)
    step = Resize(0, own, out, scales, how.get("align_corners", False), how.get("antialias", False))
    torch.testing.assert_close(run(step, x), exact, rtol=1e-5, atol=2e-6)
    if scales is not None:
        assert Resize(0, own, None, scales).shape([x.shape]) == torch_own.shape


@pytest.mark.parametrize("step", [
    Pad(0, (1, 1, 1, 1), "mirror"), Pad(0, (-9, 0, 0, 0)), Resize(0, "cubic", (3, 3)), Resize(0, "linear", (3,)), Resize(0, "linear", None),
    Resize(0, "linear", (0, 3)), Pool(0, Window(True, (9, 9), (1, 1))),
])  # fmt: skip
def test_what_does_not_fit_is_refused(step):
    with pytest.raises(KernelError):
        Program(Recipe(1, (step,), (1,)), [])(torch.randn(2, 3, 4, 5))


class Windows(nn.Module):
    """A convolution, then one expression."""

    def __init__(self, expression):
        super().__init__()
        self.conv, self.expression = nn.Conv2d(3, 8, 3, padding=1), expression
        self.mirror = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.row = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.expression(self, self.conv(x))


EXPRESSIONS = {
    "max ceil": lambda m, x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    "max dilated": lambda m, x: F.max_pool2d(x, 3, 1, 1, dilation=2),
    "mean ceil": lambda m, x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
    "mean inside": lambda m, x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "mean divided": lambda m, x: F.avg_pool2d(x, 2, divisor_override=3),
    "adaptive": lambda m, x: F.adaptive_avg_pool2d(x, (4, 3)),
    "largest of all": lambda m, x: F.adaptive_max_pool2d(x, 1) + F.adaptive_avg_pool2d(x, 1),
    "largest adaptive": lambda m, x: nn.AdaptiveMaxPool2d((5, 1))(x),
    "largest with indices": lambda m, x: F.max_pool2d(x, 3, 2, 1, return_indices=True)[0].relu(),
    "rows, largest of all": lambda m, x: F.adaptive_max_pool1d(x.flatten(2), 7).relu(),
    "pyramid": lambda m, x: torch.cat(
        [F.interpolate(F.adaptive_avg_pool2d(x, s), size=x.shape[2:], mode="bilinear") for s in (1, 2, 3)], 1
    ),
    "rows": lambda m, x: F.avg_pool1d(F.max_pool1d(m.row(x.flatten(2)), 3, 2, 1), 2),
    "rows adaptive": lambda m, x: F.adaptive_avg_pool1d(x.flatten(2), 5).relu(),
    "pad": lambda m, x: F.pad(x, (1, 2, 0, 3), value=0.5),
    "pad reflect": lambda m, x: F.pad(x, (1, 2, 3, 0), mode="reflect"),
    "pad replicate": lambda m, x: F.pad(x, (1, 2, 3, 0), mode="replicate"),
    "pad circular": lambda m, x: F.pad(x, (1, 2, 3, 0), mode="circular") + 0.5,
    "reflecting convolution": lambda m, x: m.mirror(x),
    "nearest": lambda m, x: F.interpolate(x, scale_factor=2),
    "nearest size": lambda m, x: F.interpolate(x, size=(11, 17)),
    "upsample": lambda m, x: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)(x),
    "bilinear": lambda m, x: F.interpolate(x, scale_factor=1.5, mode="bilinear"),
    "bicubic": lambda m, x: F.interpolate(x, size=(13, 21), mode="bicubic", align_corners=False),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions_are_part_of_the_program(name):
    torch.manual_seed(3)
    dense = Windows(EXPRESSIONS[name]).eval()
    model = convert(dense, LookupConfig(dictionary_size=1.0, sparsity=None, lowering="lookup"))
    x = torch.randn(2, 3, 10, 7)
    assert_one_program(dense, model, x, atol=2e-5)
