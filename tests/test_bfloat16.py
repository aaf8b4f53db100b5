"""precision="bfloat16" from the configuration to the kernels, the files and the report."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from nets import SmallResNet, pictures, randomise
from torch import fx, nn
from typer.testing import CliRunner

from lcnn_compile import LcnnError, LookupConfig, LookupConv2d, LookupLinear, convert, explain, freeze, load, save
from lcnn_compile.checkpoint import read_header
from lcnn_compile.cli import cli
from lcnn_compile.export import export_program, largest_difference
from lcnn_compile.fitting.sampling import to_bfloat16
from lcnn_compile.kernels import choose, cpu, measured, reference
from lcnn_compile.kernels.arguments import Geometry
from lcnn_compile.kernels.operator import lookup_conv2d
from lcnn_compile.modules import lookup_modules
from lcnn_compile.passes import choose_lowerings, set_precision
from lcnn_compile.passes.find import find_convolutions, is_lookup, precision_of

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the C++ kernels are unavailable")
SMALL = LookupConfig(dictionary_size=3, sparsity=2, group_size=4, lowering="lookup")
LOW = SMALL.replace(precision="bfloat16")


@pytest.fixture
def always(monkeypatch):
    """Activations rounded on any processor."""
    monkeypatch.setenv("LCNN_CPU_BFLOAT16", "always")


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def network():
    return randomise(SmallResNet(8))


def precisions(model):
    return {module.precision for _, module in lookup_modules(model)}


def test_the_configuration():
    config = LookupConfig(layers={"a": {"precision": "bfloat16"}})
    assert config.precision == "float32"
    assert config.override(config.layers["a"]).precision == "bfloat16"
    assert LookupConfig.from_json(LOW.to_json()) == LOW
    with pytest.raises(LcnnError, match="precision"):
        LookupConfig(precision="float16")
    with pytest.raises(LcnnError, match="precision"):
        LookupConfig(layers={"a": {"precision": "int4"}})


def test_the_attribute_of_a_layer(always):
    layer = LookupConv2d(9, 12, 3, dictionary_size=5, sparsity=2, group_size=3, lowering="lookup", precision="bfloat16")
    x = torch.randn(2, 9, 12, 17)
    low = layer(x)
    assert "precision='bfloat16'" in repr(layer)
    layer.precision = "float32"
    full = layer(x)
    assert "precision" not in repr(layer)
    exact = F.conv2d(x.double(), layer.dense_weight().double(), layer.bias.double())
    errors = [float((y.double() - exact).norm() / exact.norm()) for y in (low, full)]
    assert 1e-4 < errors[0] < 1e-2
    assert errors[1] < 1e-6
    for lowering in ("factored", "dense"):  # these stay float32
        layer.lowering = lowering
        layer.precision = "float32"
        y = layer(x)
        layer.precision = "bfloat16"
        assert torch.equal(layer(x), y)
    with pytest.raises(LcnnError, match="precision"):
        LookupLinear(4, 4, precision="float64")


@pytest.mark.parametrize("rows", [1, 3])
def test_fully_connected_layers_round_their_weights(rows):
    layer = LookupLinear(301, 77, dictionary_size=43, sparsity=9, group_size=5, lowering="lookup", precision="bfloat16")
    x = torch.randn(rows, 301)
    weight = layer.lookup_weight()
    wide = replace(
        weight, dictionary=to_bfloat16(weight.dictionary).double(), coefficients=to_bfloat16(weight.coefficients).double()
    )
    exact = F.linear(x.double(), wide.dense_weight()[:, :, 0, 0], layer.bias.double())
    assert float((layer(x).double() - exact).norm()) < 1e-6 * float(exact.norm())


def test_gradients_pass_through():
    layer = LookupConv2d(9, 12, 3, dictionary_size=5, sparsity=2, group_size=3, lowering="lookup", precision="bfloat16")
    x = torch.randn(2, 9, 12, 17)
    with torch.enable_grad():
        layer(x).square().mean().backward()
        found = layer.dictionary.grad.clone()
        layer.zero_grad()
        layer.precision = "float32"
        layer(x).square().mean().backward()
    assert float((found - layer.dictionary.grad).norm()) < 0.02 * float(layer.dictionary.grad.norm())


def test_the_error_in_the_report_is_that_of_rounded_operands():
    """Of a lossless layer nothing but the rounding is left, so the report's error must be what PyTorch's rounding gives."""
    torch.manual_seed(1)
    conv = nn.Conv2d(24, 16, 3, padding=1)
    x = torch.randn(40, 24, 9, 9)
    lossless = LookupConfig(dictionary_size=1.0, sparsity=None)
    plain = convert(conv, lossless, calibration=[x]).lcnn_report[0]
    low = convert(conv, lossless.replace(precision="bfloat16"), calibration=[x]).lcnn_report[0]
    assert plain.error < 1e-11
    y, rounded = conv(x), F.conv2d(to_bfloat16(x), to_bfloat16(conv.weight), conv.bias, padding=1)
    expected = float((y - rounded).square().sum() / (y - y.mean((0, 2, 3), keepdim=True)).square().sum())
    assert low.error == pytest.approx(expected, rel=0.1)
    assert low.precision == "bfloat16"


def test_the_error_in_the_report_is_measured_with_rounding(always):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(12, 16, 3))
    # Six directions, so that a dictionary of six loses little; means far above the deviations, so that rounding does.
    x = torch.einsum("ij,njhw->nihw", torch.randn(12, 6), torch.randn(60, 6, 9, 9)) + 400 * torch.rand(12)[:, None, None]
    settings = LookupConfig(dictionary_size=6, sparsity=None, group_size=4, lowering="lookup")
    plain, low = (convert(model, settings.replace(precision=p), calibration=[x]) for p in ("float32", "bfloat16"))
    truth = model(x)

    def measured_error(converted):
        y = converted.eval()(x)
        return float((y - truth).square().sum() / (truth - truth.mean((0, 2, 3), keepdim=True)).square().sum())

    assert low.lcnn_report[0].error > 2 * plain.lcnn_report[0].error
    assert low.lcnn_report[0].error == pytest.approx(measured_error(low), rel=0.4)
    limit = (low.lcnn_report[0].error + plain.lcnn_report[0].error) / 2
    kept = [
        convert(model, settings.replace(precision=p, max_error=limit), calibration=[x]).lcnn_report
        for p in ("float32", "bfloat16")
    ]
    assert kept[0][0].replaced
    assert not kept[1][0].replaced
    assert "max_error" in kept[1][0].reason


def test_conversion_and_report():
    model = network()
    mixed = SMALL.replace(layers={"layers.0.conv1": {"precision": "bfloat16"}})
    converted = convert(model, mixed, calibration=[pictures(4)])
    low = [name for name, module in lookup_modules(converted) if module.precision == "bfloat16"]
    assert low == ["layers.0.conv1"]
    assert [row.name for row in converted.lcnn_report if row.precision == "bfloat16"] == low
    assert "lookup, bfloat16" in str(converted.lcnn_report)
    dry = explain(model, mixed, example_inputs=(pictures(1),))
    assert [row.name for row in dry if row.precision == "bfloat16"] == low


def test_checkpoints(tmp_path, always):
    model = convert(network(), LOW, calibration=[pictures(4)]).eval()
    save(model, tmp_path / "m.safetensors")
    loaded = load(SmallResNet(8), tmp_path / "m.safetensors").eval()
    x = pictures(2)
    assert precisions(loaded) == {"bfloat16"}
    assert torch.equal(loaded(x), model(x))
    assert list(loaded.lcnn_report) == list(model.lcnn_report)
    assert {row["precision"] for row in read_header(tmp_path / "m.safetensors").report if row["replaced"]} == {"bfloat16"}


def test_files_of_float32_models_say_nothing_that_older_versions_do_not_know(tmp_path):
    from safetensors import safe_open

    path = tmp_path / "m.safetensors"
    save(convert(network(), SMALL, calibration=[pictures(4)]), path)
    with safe_open(path, framework="pt") as file:
        body = json.loads(file.metadata()["lcnn"])
    assert all(set(settings) == {"kernel_size", "lowering"} for settings in body["layers"].values())
    assert "precision" not in json.dumps(body)
    assert precisions(load(SmallResNet(8), path)) == {"float32"}


def test_compiled_frozen_and_exported(always):
    model = convert(network(), LOW, calibration=[pictures(4)]).eval()
    x = pictures(2)
    eager = model(x)
    for _, module in lookup_modules(model):
        module.precision = "float32"
    full = model(x)
    assert not torch.equal(eager, full)
    option = torch.compile(model, backend="lcnn", options={"precision": "bfloat16"})(x)
    for _, module in lookup_modules(model):
        module.precision = "bfloat16"
    frozen = freeze(model, x)
    torch._dynamo.reset()
    results = [option, torch.compile(model, backend="lcnn")(x), frozen(x), export_program(model, x).module()(x)]
    # Batch norm is folded before weights are rounded, so these agree within the rounding only.
    scale = largest_difference(full, eager)
    for y in results:
        assert 0 < largest_difference(y, full) < 3 * scale
        assert largest_difference(y, eager) < 3 * scale


def test_a_dense_model_compiled_with_the_option():
    model = network()
    config = {"dictionary_size": 3, "sparsity": 2, "precision": "bfloat16", "lowering": "lookup"}
    compiled = torch.compile(model, backend="lcnn", options=config)
    x = pictures(8)
    compiled(x)
    graphs = torch.compile(model, backend="lcnn", options={**config, "precision": "float32"})
    torch._dynamo.reset()
    graphs(x)
    assert not torch.equal(compiled(x), graphs(x))


def test_the_pass():
    from torch import fx

    gm = fx.symbolic_trace(nn.Sequential(LookupConv2d(8, 8, 3, dictionary_size=4, sparsity=2), nn.ReLU()))
    set_precision(gm, "bfloat16")
    [found] = find_convolutions(gm)
    assert precision_of(found.node) == "bfloat16"
    with pytest.raises(LcnnError, match="precision"):
        set_precision(gm, "half")


def test_lowerings_are_measured_for_each_precision(tmp_path, monkeypatch):
    shapes = ((1, 16, 9, 9), (1, 4, 16), (18, 4), Geometry(8, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)), "cpu")
    problem = choose.problem_of(*shapes, torch.float32)
    low = replace(problem, precision="bfloat16")
    assert choose.problem_of(*shapes, torch.float32, "bfloat16") == low
    assert choose.problem_of(*shapes, torch.float64, "bfloat16").precision == "float32"
    keys = {measured._key(problem), measured._key(low)}
    monkeypatch.setenv("LCNN_CPU_BFLOAT16", "always")
    keys |= {measured._key(low)}
    assert len(keys) == 3
    monkeypatch.setenv("LCNN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("LCNN_TUNE", raising=False)
    measured.facts_file.cache_clear()
    try:
        assert set(measured.measure(low, True)) >= {"dense"}
        assert measured.remembered(low) is not None
        assert measured.remembered(problem) is None
    finally:
        measured.facts_file.cache_clear()
        measured.known.cache_clear()


def test_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "low.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef build():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Conv2d(8, 12, 3))\n\n\ndef batches():\n    return [torch.randn(4, 8, 9, 9)]\n"
    )
    arguments = [
        "convert",
        "low.py:build",
        "m.safetensors",
        "--calibration",
        "low.py:batches",
        "--precision",
        "bfloat16",
        "--no-time",
    ]
    done = CliRunner().invoke(cli, [*arguments, "--dictionary-size", "4", "--json"])
    assert done.exit_code == 0, done.output
    assert read_header(tmp_path / "m.safetensors").layers["0"]["precision"] == "bfloat16"
    assert CliRunner().invoke(cli, ["explain", "low.py:build", "--precision", "int4"]).exit_code != 0


def test_autocast_and_bfloat16_models(always):
    layer = LookupConv2d(9, 12, 3, dictionary_size=5, sparsity=2, group_size=3, lowering="lookup")
    x = torch.randn(2, 9, 12, 17)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x)
    layer.bfloat16()
    assert torch.equal(layer(x.bfloat16()), mixed)
    arguments = (
        x.bfloat16(),
        *layer.lookup_weight().tensors().values(),
        layer.bias,
        12,
        (3, 3),
        (1, 1),
        (0,) * 4,
        (1, 1),
        "lookup",
    )
    assert torch.equal(lookup_conv2d(*arguments), mixed)
    exact = reference.apply_epilogue(
        F.conv2d(x.double(), layer.dense_weight().double()), layer.bias.double(), None, "none", False
    )
    assert float((mixed.double() - exact).norm()) < 0.01 * float(exact.norm())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("lowering", ["lookup", "auto"])
def test_choosing_lowerings_keeps_the_precision(precision, lowering):
    layer = LookupConv2d(9, 12, 3, dictionary_size=5, sparsity=2, group_size=3, lowering=lowering, precision=precision)
    gm = choose_lowerings(fx.symbolic_trace(nn.Sequential(layer).eval()))
    [node] = [node for node in gm.graph.nodes if is_lookup(node)]
    assert precision_of(node) == precision
