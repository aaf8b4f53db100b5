"""ONNX files mean the same to every engine: geometries of poolings, interpolations and paddings, in ONNX Runtime and OpenVINO."""

import copy
import importlib.util
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from nets import pictures, randomise
from torch import nn

from lcnn_compile import LcnnError, LookupConfig, convert
from lcnn_compile.errors import LcnnWarning
from lcnn_compile.export import check_onnx, export_onnx, largest_difference, onnx_differences
from lcnn_compile.export.onnx_form import portable_program

ENGINES = {"ONNX Runtime"} | ({"OpenVINO"} if importlib.util.find_spec("openvino") else set())
needs_onnx = pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="the extra onnx is not installed")
needs_openvino = pytest.mark.skipif("OpenVINO" not in ENGINES, reason="openvino is not installed")


def poolings():
    """Poolings by kernel, stride, padding, ceil_mode and divisor."""
    for kernel, stride, padding in product((2, 3, (3, 2)), (1, 2, 3), (0, 1)):
        yield lambda x, k=kernel, s=stride, p=padding: F.max_pool2d(x, k, s, p, ceil_mode=True)
        for pads in (True, False):
            yield lambda x, k=kernel, s=stride, p=padding, c=pads: F.avg_pool2d(x, k, s, p, True, c)
    yield lambda x: F.max_pool2d(x, (1, 2), 2, 0, dilation=2, ceil_mode=True)
    yield lambda x: F.max_pool2d(x, 2, 2, 1, dilation=2, ceil_mode=True)
    yield lambda x: F.avg_pool2d(x, 2, 2, 1, divisor_override=3)
    yield lambda x: F.avg_pool2d(x, 2, 3, 0, True, divisor_override=5)
    yield lambda x: F.max_pool1d(x.flatten(2), 3, 2, ceil_mode=True)
    yield lambda x: F.avg_pool1d(x.flatten(2), 3, 2, 1, True)
    yield lambda x: F.max_pool3d(x[:, :, None].repeat(1, 1, 4, 1, 1), 3, 2, 1, ceil_mode=True)
    yield lambda x: F.avg_pool3d(x[:, :, None].repeat(1, 1, 4, 1, 1), 3, 2, 1, True)
    yield lambda x: F.max_pool2d(x[0], 3, 2, 1, ceil_mode=True)


def resamplings():
    """Interpolations, adaptive poolings and paddings."""
    for size in ((3, 2), (4, 5), (12, 3), (1, 1), (9, 8)):
        yield lambda x, s=size: F.adaptive_avg_pool2d(x, s)
        yield lambda x, s=size: F.adaptive_max_pool2d(x, s)
    for how in ({"size": (18, 16)}, {"size": (4, 5)}, {"scale_factor": 1.5}, {"scale_factor": 0.7}, {"scale_factor": (1.3, 0.6)}):
        for mode in ("nearest", "nearest-exact", "area"):
            yield lambda x, m=mode, h=how: F.interpolate(x, mode=m, **h)
        for mode, corners, smooth in product(("bilinear", "bicubic"), (True, False), (True, False)):
            yield lambda x, m=mode, c=corners, a=smooth, h=how: F.interpolate(x, mode=m, align_corners=c, antialias=a, **h)
    for size in (5, 20):
        yield lambda x, s=size: F.interpolate(x.flatten(2), s, mode="linear")
        yield lambda x, s=size: F.adaptive_avg_pool1d(x.flatten(2), s)
    for mode in ("area", "trilinear"):
        yield lambda x, m=mode: F.interpolate(x[:, :, None].repeat(1, 1, 4, 1, 1), (3, 5, 9), mode=m)
    for pads in ((1, 2, 0, 3), (-1, 2, 1, -1), (0, 0, 1, 0), (4, 4)):
        yield lambda x, p=pads: F.pad(x, p, mode="circular")
    yield lambda x: F.pad(x.flatten(2), (3, 1), mode="circular")
    yield lambda x: F.pad(x[:, :, None].repeat(1, 1, 3, 1, 1), (1, 1, 2, 0, 1, 1), mode="circular")
    for mode in ("reflect", "replicate"):
        yield lambda x, m=mode: F.pad(x, (1, 2, 0, 3), mode=m)


class Branches(nn.Module):
    """A convolution, and what each function makes of it."""

    def __init__(self, functions):
        super().__init__()
        self.conv, self.functions = nn.Conv2d(4, 3, 3, padding=1), list(functions)

    def forward(self, x):
        y = self.conv(x)
        return tuple(f(y) for f in self.functions)


def converted(model, *inputs):
    config = LookupConfig(dictionary_size=0.5, sparsity=2)
    return convert(randomise(model), config, calibration=[inputs]).eval()


def valid(functions, size):
    """The functions that PyTorch itself can run on a size."""
    found = []
    for f in functions:
        try:
            y = f(torch.zeros(2, 3, *size))
        except RuntimeError:
            continue
        if y.isfinite().all():
            found.append(f)
    return found


@needs_onnx
@pytest.mark.parametrize("opset", [18, None])
@pytest.mark.parametrize(
    ("kind", "size"), [(poolings, (7, 8)), (poolings, (6, 9)), (poolings, (2, 5)), (poolings, (1, 1)), (resamplings, (9, 8))]
)
def test_every_engine_has_pytorchs_sizes_and_values(tmp_path, kind, size, opset):
    if opset is None and size not in ((6, 9), (9, 8)):
        pytest.skip("one size of each kind for the newest operator set")
    functions = valid(kind(), size)
    assert len(functions) > 10
    model = converted(Branches(functions), torch.randn(2, 4, *size))
    x = torch.randn(2, 4, *size)
    export_onnx(model, tmp_path / "model.onnx", x, opset_version=opset, allowed=None)
    found = onnx_differences(tmp_path / "model.onnx", model, x)
    assert set(found) == ENGINES
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("size", [(7, 8), (6, 9), (2, 5), (5, 4)])
@pytest.mark.parametrize("kind", [poolings, resamplings])
def test_portable_programs_compute_the_same(kind, size):
    functions = valid(kind(), size)
    model, x = Branches(functions).eval(), torch.randn(2, 4, *size)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=False)
    portable = portable_program(program)
    targets = [node for node in portable.graph.nodes if node.op == "call_function"]
    assert not any(node.args[-1] is True and "max_pool" in str(node.target) for node in targets)
    assert not any(
        "_aa" in str(node.target) or "adaptive" in str(node.target) for node in targets if "avg_pool2d" not in str(node.target)
    )
    for count in (1, 3):
        x = torch.randn(count, 4, *size)
        with torch.no_grad():
            for i, (y, own) in enumerate(zip(portable.module()(x), model(x), strict=True)):
                assert y.shape == own.shape, i
                torch.testing.assert_close(y, own, atol=2e-5, rtol=2e-5, msg=lambda text, i=i: f"function {i}: {text}")


class Writing(nn.Module):
    """In-place statements, writes through views, and an input that is written to."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x):
        x.sub_(0.5)
        y = self.stem(x)
        skip = self.a(y)
        F.relu(y, inplace=True)
        y[:, :2].mul_(2)
        y[:, 1, ::2] = 1
        return self.b(y) + skip, y


@needs_onnx
@pytest.mark.parametrize("lowering", ["factored", "dense"])
def test_writes_in_place_are_kept(tmp_path, lowering):
    model, x = converted(Writing(), pictures(3, 7, 4)), pictures(2, 7, 4)
    with pytest.warns(LcnnWarning, match="writes to its inputs x; the ONNX file leaves them as they are"):
        export_onnx(model, tmp_path / "m.onnx", x.clone(), lowering=lowering)
    kept = x.clone()
    assert check_onnx(tmp_path / "m.onnx", model, x) < 1e-5
    assert torch.equal(x, kept)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.conv(x) * self.calls


class WithIndices(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return F.max_pool2d(self.conv(x), 2, ceil_mode=True, return_indices=True)


@needs_onnx
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Counting, "keeps a state from call to call .it writes to calls., which ONNX cannot"),
        (lambda: Branches([lambda y: F.max_pool2d(y[:, :, :1], 2, 2, 1, 2)]), "max_pool2d: a dilated window holds no pixel"),
        (WithIndices, "max_pool2d_with_indices.*: ONNX engines disagree on the indices"),
    ],
)
def test_what_onnx_cannot_say_is_refused(tmp_path, build, message):
    model = converted(build(), pictures(2, 7, 4))
    with pytest.raises(LcnnError, match=message):
        export_onnx(model, tmp_path / "m.onnx", pictures(2, 7, 4))
    assert not list(tmp_path.iterdir())


@needs_onnx
def test_a_file_that_an_engine_reads_differently_is_not_written(tmp_path, monkeypatch):
    model, x = converted(Branches([F.relu]), pictures(2, 7, 4)), pictures(2, 7, 4)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.conv.bias += 1
    monkeypatch.setattr(
        "lcnn_compile.export.formats.onnx_differences", lambda path, _, inputs: onnx_differences(path, other, inputs)
    )
    with pytest.raises(LcnnError, match=r"ONNX Runtime gives other outputs for the ONNX file than the model"):
        export_onnx(model, tmp_path / "m.onnx", x)
    assert not list(tmp_path.iterdir())


@needs_onnx
def test_the_engine_and_batch_size_that_fail_are_named(tmp_path):
    model, x = converted(Branches([F.relu]), pictures(2, 7, 4)), pictures(2, 7, 4)
    export_onnx(model, tmp_path / "m.onnx", x)
    other = converted(Branches([lambda y: y[:, :2]]), x)
    with pytest.raises(LcnnError, match=r"ONNX Runtime, batch size 2: the outputs have shapes \[\(2, 3, 7, 7\)\]"):
        onnx_differences(tmp_path / "m.onnx", other, x)


@needs_onnx
@needs_openvino
def test_openvino_is_asked_too(tmp_path):
    onnx = pytest.importorskip("onnx")
    node = onnx.helper.make_node("MaxPool", ["y"], ["z"], kernel_shape=[2, 2], strides=[3, 3], ceil_mode=1)
    model, x = (
        converted(Branches([lambda y: F.max_pool2d(y, 2, 3, ceil_mode=True)]), torch.randn(2, 4, 6, 9)),
        torch.randn(2, 4, 6, 9),
    )
    export_onnx(model, tmp_path / "m.onnx", x)
    file = onnx.load(tmp_path / "m.onnx")
    (pool,) = [n for n in file.graph.node if n.op_type == "MaxPool"]
    (pad,) = [n for n in file.graph.node if n.op_type == "Pad"] or [None]
    node.input[0], node.output[0] = (pad or pool).input[0], pool.output[0]
    pool.CopyFrom(node)  # as other exporters write it, where OpenVINO sees another size
    onnx.save(file, tmp_path / "m.onnx")
    with pytest.raises(LcnnError, match=r"OpenVINO, batch size 2: the outputs have shapes"):
        onnx_differences(tmp_path / "m.onnx", model, x)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_difference_is_never_lost_in_values_that_are_no_numbers(value):
    plain, odd = torch.tensor([1.0, 2.0]), torch.tensor([1.0, value])
    assert largest_difference(odd, odd.clone()) == 0
    assert largest_difference(plain, odd) > 1e30
    assert largest_difference(odd, plain) > 1e30
