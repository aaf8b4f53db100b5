"""Export: plain dense networks, programs, AOTInductor packages and ONNX files, against the converted model in float64."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from nets import Functional, SmallResNet, Untraceable, pictures, randomise
from torch import fx, nn

from lcnn_compile import LcnnError, LookupConfig, LookupConv2d, convert, freeze
from lcnn_compile.export import (
    check_onnx,
    export_aot,
    export_onnx,
    export_program,
    export_pt2,
    largest_difference,
    load_pt2,
    to_dense,
)
from lcnn_compile.files import replacing
from lcnn_compile.kernels.operator import lookup_conv2d_inference
from lcnn_compile.kernels.reference import ACTIVATIONS
from lcnn_compile.modules import LookupModule
from lcnn_compile.passes import to_functional
from lcnn_compile.passes.decompose import decompose_lookups, suit_engines
from lcnn_compile.testing import assert_close, assert_equivalent, lookup_layers

SIZES = LookupConfig(dictionary_size=0.5, sparsity=2, group_size=3)


class Odd(nn.Module):
    """Everything that exporting could get wrong: padding modes, asymmetric padding, groups, residuals, fully connected layers."""

    def __init__(self):
        super().__init__()
        self.reflected = nn.Conv2d(6, 9, (3, 2), padding="same", padding_mode="reflect", groups=3)
        self.uneven = nn.Conv2d(6, 9, (2, 4), padding="same", bias=False)
        self.circular = nn.Conv2d(9, 7, 3, padding=1, padding_mode="circular", stride=2, dilation=(1, 2))
        self.norm = nn.BatchNorm2d(7)
        self.square = nn.Conv2d(7, 7, 3, padding=1)
        self.fc = nn.Linear(7, 5)

    def forward(self, x, *, scale):
        y = F.silu(self.reflected(x)) * scale[:, None, None, None]
        y = self.norm(self.circular(y + self.uneven(x))).relu()
        return {"map": F.hardswish(self.square(y)) + y, "logits": self.fc(y.mean((2, 3)))}


def converted(model, batch, **settings):
    made = convert(randomise(model), SIZES.replace(**settings), calibration=[batch])
    assert made.lcnn_report.replaced
    return made.eval()


def odd_batch(count):
    return {"x": pictures(count, 11, 6), "scale": torch.rand(count) + 0.5}


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return converted(SmallResNet(8), pictures(6))


@pytest.fixture(scope="module")
def odd():
    torch.manual_seed(0)
    return converted(Odd(), odd_batch(6), include=("*",))


class Calling(nn.Module):
    """A model called with keyword arguments, as a model of positional ones."""

    def __init__(self, model, keys):
        super().__init__()
        self.model, self.keys = model, keys

    def forward(self, *args):
        return self.model(**dict(zip(self.keys, args, strict=True)))


def operators(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("model", [SmallResNet, Untraceable, Functional])
def test_to_dense_is_the_same_function_without_lookups(model):
    x = pictures(3)
    lookup = converted(model(), pictures(6))
    before = copy.deepcopy(lookup.state_dict())
    dense = to_dense(lookup)
    assert_equivalent(lookup, dense, x, factor=16)
    assert not any(isinstance(module, LookupModule) for module in dense.modules())
    assert not hasattr(dense, "lcnn_report")
    assert all(torch.equal(value, before[key]) for key, value in lookup.state_dict().items())


def test_to_dense_has_the_weights_names_of_the_original(resnet):
    original = SmallResNet(8).state_dict()
    state = to_dense(resnet).state_dict()
    assert set(original) <= set(state)
    assert {key.rpartition(".")[2] for key in set(state) - set(original)} <= {"bias"}
    torch.testing.assert_close(state["layers.0.conv1.weight"], resnet.layers[0].conv1.dense_weight())


@pytest.mark.parametrize("lowering", ["auto", "lookup", "factored", "dense"])
def test_a_program_computes_the_model_for_any_batch_size(resnet, odd, lowering):
    program = export_program(resnet, pictures(1), lowering=lowering)
    for count in (1, 2, 5):
        assert_equivalent(resnet, program.module(), pictures(count), factor=32)
    other = export_program(odd, odd_batch(1), lowering=lowering)
    for count in (1, 3):
        batch = odd_batch(count)
        assert_equivalent(Calling(odd, list(batch)), Calling(other.module(), list(batch)), tuple(batch.values()), factor=32)
    ours = {name for name in operators(program) | operators(other) if name.startswith("lcnn")}
    assert ours <= {"lcnn.lookup_conv2d_inference.default"}
    # What "auto" chooses is the machine's business.
    assert lowering == "auto" or bool(ours) == (lowering == "lookup")


def test_a_program_is_folded_and_holds_no_dead_tensors(resnet):
    program = export_program(resnet, pictures(2), lowering="factored")
    assert not any("batch_norm" in name for name in operators(program))
    used = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    assert used == {node.name for node in program.graph.nodes if node.op == "placeholder"}
    convolutions = sum(node.target is torch.ops.aten.conv2d.default for node in program.graph.nodes)
    lookups = sum(isinstance(module, LookupModule) for module in resnet.modules())
    assert convolutions == 2 * lookups + sum(type(module) is nn.Conv2d for module in resnet.modules())


def test_a_fixed_batch_refuses_another(resnet):
    program = export_program(resnet, pictures(2), lowering="dense", dynamic_batch=False)
    assert_equivalent(resnet, program.module(), pictures(2), factor=32)
    with pytest.raises(Exception, match=r"(?i)shape|guard"):
        program.module()(pictures(3))


@given(
    lookup_layers(),
    st.sampled_from(sorted(ACTIVATIONS)),
    st.sampled_from([None, False, True]),
    st.sampled_from(["factored", "dense"]),
)
def test_decomposition_keeps_the_function_with_any_epilogue(case, activation, residual_last, lowering):
    layer, x = case
    residual = None if residual_last is None else torch.randn_like(layer(x))
    gm = fx.symbolic_trace(nn.Sequential(layer))
    gm = passes_to_inference(gm, activation, residual, residual_last)
    wide = copy.deepcopy(layer).double()
    y, reference = layer(x), wide(x.double())
    if residual is not None and not residual_last:
        y, reference = y + residual, reference + residual.double()
    y, reference = ACTIVATIONS[activation](y), ACTIVATIONS[activation](reference)
    if residual_last:
        y, reference = y + residual, reference + residual.double()
    made = decompose_lookups(gm, lowering)
    assert not any("lookup" in str(node.target) for node in made.graph.nodes if node.op == "call_function")
    assert_close(made(x).detach(), y.detach(), reference.detach(), factor=32)


def passes_to_inference(gm, activation, residual, residual_last):
    """The graph of one layer with an epilogue written into its call."""
    to_functional(gm)
    (node,) = (node for node in gm.graph.nodes if "lookup" in str(node.target) and node.op == "call_function")
    node.target = lookup_conv2d_inference
    node.kwargs = {"activation": activation}
    if residual is not None:
        gm.register_buffer("residual", residual)
        with gm.graph.inserting_before(node):
            other = gm.graph.get_attr("residual")
        node.args = (*node.args, activation, other, residual_last)
        node.kwargs = {}
    gm.recompile()
    return gm


def test_decomposition_refuses_what_it_cannot_do(resnet):
    with pytest.raises(LcnnError, match="'lookup'; ordinary operators are 'factored' or 'dense'"):
        decompose_lookups(fx.symbolic_trace(resnet), "lookup")


def onnx_outputs(path, inputs):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return {place.name: torch.from_numpy(y) for place, y in zip(session.get_outputs(), found, strict=True)}


@pytest.mark.parametrize("lowering", ["factored", "dense"])
def test_onnx_is_as_exact_as_pytorch_for_any_batch_size(odd, tmp_path, lowering):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    path = tmp_path / "odd.onnx"
    export_onnx(odd, path, odd_batch(1), lowering=lowering)
    assert [file.name for file in tmp_path.iterdir()] == ["odd.onnx"]
    graph = onnx.load(path)
    onnx.checker.check_model(graph)
    kinds = [node.op_type for node in graph.graph.node]
    assert {node.domain for node in graph.graph.node} <= {""}
    lookups = sum(isinstance(module, LookupConv2d) for module in odd.modules())
    assert kinds.count("Conv") == 4 + (lookups if lowering == "factored" else 0)
    assert {i.name: i.type.tensor_type.shape.dim[0].dim_param for i in graph.graph.input} == {"x": "batch", "scale": "batch"}
    wide = copy.deepcopy(odd).double()
    for count in (1, 3):
        batch = odd_batch(count)
        with torch.no_grad():
            own, reference = odd(**batch), wide(**{key: value.double() for key, value in batch.items()})
        found = onnx_outputs(path, batch)
        assert set(found) == {"map", "logits"}
        for key, y in found.items():
            assert_close(y, own[key], reference[key], factor=32, name=key)
        assert check_onnx(path, odd, batch) < 1e-5


def test_onnx_of_a_residual_network(resnet, tmp_path):
    pytest.importorskip("onnxscript")
    path = tmp_path / "resnet.onnx"
    export_onnx(resnet, path, pictures(2), opset_version=18)
    x = pictures(3)
    with torch.no_grad():
        own, reference = resnet(x), copy.deepcopy(resnet).double()(x.double())
    assert_close(onnx_outputs(path, {"x": x})["output"], own, reference, factor=32)
    with torch.no_grad():
        resnet.fc.bias[3] += 0.5
    try:
        assert check_onnx(path, resnet, x) == pytest.approx(0.5 / float(resnet(x).abs().max()), rel=1e-2)
    finally:
        with torch.no_grad():
            resnet.fc.bias[3] -= 0.5


LOADER = """
import sys, torch
kind, path, values, ours = sys.argv[1:]
if ours == "yes":
    import lcnn_compile
else:
    sys.modules["lcnn_compile"] = None  # any import of it fails
stored = torch.load(values)
run = torch._inductor.aoti_load_package(path) if kind == "aot" else torch.export.load(path).module()
with torch.no_grad():
    torch.save([run(x) for x in stored["inputs"]], values + ".found")
"""


def run_elsewhere(kind, path, model, inputs, folder, ours):
    """The outputs of another process that loads the file."""
    values = folder / "values.pt"
    torch.save({"inputs": inputs}, values)
    script = folder / "loader.py"
    script.write_text(LOADER)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), kind, str(path), str(values), "yes" if ours else "no"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return torch.load(f"{values}.found")


@pytest.mark.parametrize("lowering", ["lookup", "factored"])
@pytest.mark.parametrize("kind", ["pt2", "aot"])
def test_a_file_runs_in_another_process(tmp_path, kind, lowering):
    torch.manual_seed(0)
    model = converted(nn.Sequential(nn.Conv2d(8, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU()), pictures(4, 9, 8))
    path = tmp_path / "model.pt2"
    with torch._inductor.config.patch("aot_inductor.compile_wrapper_opt_level", "O0"):
        {"pt2": export_pt2, "aot": export_aot}[kind](model, path, pictures(2, 9, 8), lowering=lowering)
    inputs = [pictures(count, 9, 8) for count in (1, 3)]
    for x, y in zip(inputs, run_elsewhere(kind, path, model, inputs, tmp_path, lowering == "lookup"), strict=True):
        with torch.no_grad():
            assert_close(y, model(x), copy.deepcopy(model).double()(x.double()), factor=32)
    if lowering == "lookup":
        with pytest.raises(RuntimeError, match=r"lcnn|deserializ"):
            run_elsewhere(kind, path, model, inputs, tmp_path, False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: export_program(nn.Conv2d(8, 8, 3), pictures(2)), "Conv2d has no lookup layers; convert it first"),
        (lambda m, p: to_dense(nn.Conv2d(8, 8, 3)), "no lookup layers"),
        (lambda m, p: export_program(m, pictures(2), lowering="fast"), "'fast'; allowed are 'auto', 'lookup'"),
        (lambda m, p: export_program(m, pictures(2, 16, 5)), "torch.export cannot capture SmallResNet"),
        (lambda m, p: export_program(m, torch.tensor(1.0)), "no tensor with a batch dimension"),
        (lambda m, p: export_pt2(m, p / "m.onnx", pictures(2)), "m.onnx does not end in .pt2"),
        (lambda m, p: export_aot(m, p / "m.so", pictures(2)), "m.so does not end in .pt2"),
        (lambda m, p: export_onnx(m, p / "m.onnx", pictures(2), lowering="lookup"), "ONNX has no lookups"),
        (lambda m, p: export_pt2(m, p / "none" / "m.pt2", pictures(2)), "cannot be written.*make it first"),
        (
            lambda m, p: largest_difference([torch.zeros(2)], [torch.zeros(3)]),
            r"shapes \[\(2,\)\]; the model's own have \[\(3,\)\]",
        ),
    ],
)
def test_mistakes_are_named(resnet, tmp_path, call, message):
    with pytest.raises(LcnnError, match=message):
        call(resnet, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def stop(error):
        with replacing(path) as made:
            made.write_text("half")
            raise error

    for error in (KeyboardInterrupt, OSError):
        with pytest.raises(error):
            stop(error)
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
    with replacing(path) as made:
        made.write_text("new")
        (made.parent / "file.data").write_text("more")
    assert {found.name: found.read_text() for found in tmp_path.iterdir()} == {"file": "new", "file.data": "more"}
    with pytest.raises(LcnnError, match="is a folder"), replacing(tmp_path):
        pass


@given(st.integers(1, 3), st.integers(1, 21), st.integers(1, 5), st.booleans())
def test_the_form_for_engines_is_exact(groups, size, channels, pad):
    torch.manual_seed(size)
    dictionary = torch.randn(groups, size, channels) * torch.logspace(-6, 6, size)[None, :, None]
    dictionary[:, -1] = 0
    lookups = torch.randn(4 * groups, size, 3, 2) * (torch.rand(4 * groups, size, 3, 2) < 0.3)
    made, coefficients = suit_engines(dictionary, lookups, pad=pad)
    k = made.shape[1]
    assert k == (max(16, size + -size % 4) if pad else size)
    assert coefficients.shape == (4 * groups, k, 3, 2)
    assert not made[:, size:].any()
    assert not coefficients[:, size:].any()
    ranges = made[:, : size - 1].abs().amax(2)
    assert bool(((ranges >= 0.5) & (ranges < 1)).all())
    # Products are the same numbers, not only close ones: powers of two cancel.
    for g in range(groups):
        first, second = lookups[4 * g : 4 * g + 4], coefficients[4 * g : 4 * g + 4, :size]
        for j in range(size):
            assert torch.equal(first[:, j, ..., None] * dictionary[g, j], second[:, j, ..., None] * made[g, j])


def in_eight_bits(tensor, dims=None):
    """Rounded to 8 bits with one symmetric scale, or one for each index of the dimensions that are not in ``dims``."""
    scale = (tensor.abs().max() if dims is None else tensor.abs().amax(dims, keepdim=True)) / 127
    scale = scale.clamp(min=1e-30)
    return (tensor / scale).round().clamp(-127, 127) * scale


def error_in_eight_bits(dictionary, lookups, x):
    """Relative error of the pair of convolutions, weights with a scale per channel, activations with one in all."""
    s = in_eight_bits(F.conv2d(in_eight_bits(x), in_eight_bits(dictionary, 1)[:, :, None, None]))
    y = F.conv2d(s, in_eight_bits(lookups, (1, 2, 3)), padding=1)
    exact = F.conv2d(F.conv2d(x, dictionary[:, :, None, None]), lookups, padding=1)
    return float(((y - exact) ** 2).sum() / ((exact - exact.mean()) ** 2).sum())


def test_one_range_of_the_dictionary_costs_less_in_eight_bits():
    torch.manual_seed(0)
    # A few strong vectors and many weak ones that are used with large coefficients.
    strength = torch.logspace(0, -2, 24)
    dictionary, x = torch.randn(24, 32) * strength[:, None], torch.randn(2, 32, 12, 12)
    lookups = torch.randn(16, 24, 3, 3) / strength[None, :, None, None]
    made, coefficients = suit_engines(dictionary[None], lookups)
    before, after = error_in_eight_bits(dictionary, lookups, x), error_in_eight_bits(made[0], coefficients, x)
    assert after < before / 3
    assert after < 1e-3


def test_exported_dictionaries_have_the_sizes_that_engines_like(odd):
    program = export_program(odd, odd_batch(2), lowering="factored")
    pointwise = [
        n for n in program.graph.nodes if n.target is torch.ops.aten.conv2d.default and n.args[1].name.endswith("_dictionary")
    ]
    assert pointwise
    for node in pointwise:
        groups = node.args[6] if len(node.args) > 6 else 1
        size = node.args[1].meta["val"].shape[0] // groups
        assert size % 4 == 0
        assert size >= 16


class Sized(nn.Module):
    """Its mean is divided by a number of pixels that tracing makes constant."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x, weight):
        y = self.conv(x).relu_()
        return y.sum((2, 3)) / (y.shape[2] * y.shape[3]) * weight


def test_a_loaded_program_refuses_sizes_that_it_is_not_for(tmp_path):
    model, batch = Sized().eval(), torch.export.Dim("batch", min=1)
    x, weight = pictures(2, 7, 4), torch.ones(2, 6)
    torch.export.save(torch.export.export(model, (x, weight), dynamic_shapes=({0: batch}, {0: batch})), tmp_path / "p.pt2")
    loaded = load_pt2(tmp_path / "p.pt2")
    lookup = convert(loaded, SIZES, calibration=[(x, weight)]).eval()
    wide = pictures(5, 7, 4).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(loaded(wide, torch.ones(5, 6)), model(wide, torch.ones(5, 6)))
    for run in (loaded, lookup, copy.deepcopy(loaded)):
        with pytest.raises(LcnnError, match=r"input 0 of the program has shape \[1 to any, 4, 7, 7\]; it got \[2, 4, 9, 9\]"):
            run(pictures(2, 9, 4), weight)
        with pytest.raises(LcnnError, match=r"input 1 of the program has shape \[2, 6\]; it got \[1, 6\]"):
            run(x, weight[:1])


def test_names_that_exported_code_cannot_hold_are_named():
    class Keyed(nn.Module):
        def __init__(self):
            super().__init__()
            self.scales = nn.ParameterDict(
                {"class": nn.Parameter(torch.ones(8, 1, 1)), "lambda": nn.Parameter(torch.ones(8, 1, 1))}
            )
            self.conv = nn.Conv2d(4, 8, 3)

        def forward(self, x):
            return self.conv(x) * self.scales["class"] + self.scales["lambda"]

    x = torch.randn(2, 4, 6, 6)
    model = convert(Keyed().eval(), LookupConfig(dictionary_size=2), calibration=[x])
    with pytest.raises(LcnnError, match="Python's own"):
        freeze(model, x)
