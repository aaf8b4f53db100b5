"""The command line: results, files, exit codes, and a message for every mistake."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lcnn_compile import convert, load, save
from lcnn_compile.cli import cli
from lcnn_compile.cli.images import ImageFolder, Images
from lcnn_compile.cli.sources import load_calibration, load_inputs, load_model
from lcnn_compile.config import PRECISIONS, LookupConfig
from lcnn_compile.errors import LcnnError
from lcnn_compile.export import to_dense

NETWORK = """
import torch
from torch import nn

NUMBER = 3


def build(channels=12):
    torch.manual_seed(0)
    print("building")
    return nn.Sequential(
        nn.Conv2d(4, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5),
    )


def narrow():
    return nn.Sequential(nn.Conv2d(3, 8, 3))


def broken():
    return undefined_name


def needy(size):
    return nn.Conv2d(size, size, 1)


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 4, 9, 9, generator=generator) for _ in range(2)]


def mean_output(model):
    return float(model(torch.ones(1, 4, 9, 9)).mean())


def slow():
    import pathlib, time

    for batch in batches():
        yield batch
        pathlib.Path("started").touch()
        time.sleep(60)
"""
SIZES = ["--dictionary-size", "0.5", "--sparsity", "2", "--group-size", "3"]
CONFIG = LookupConfig(dictionary_size=0.5, sparsity=2, group_size=3)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a network, samples and settings, as the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "net.py").write_text(NETWORK)
    samples = np.random.default_rng(0).standard_normal((12, 4, 9, 9))
    np.save("samples.npy", samples)
    np.savez("samples.npz", images=samples, labels=np.arange(12))
    (tmp_path / "config.json").write_text(CONFIG.to_json())
    yield tmp_path
    sys.modules.pop("net", None)


def run(*args, code=0):
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    if isinstance(result.exception, LcnnError):
        raise result.exception
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def network():
    sys.modules.pop("net", None)
    from lcnn_compile.cli.sources import load_model

    return load_model("net.py:build")


def test_explain_says_what_convert_would_do(folder):
    result = run("explain", "net.py:build", "--input", "1x4x9x9", *SIZES, "--json")
    data = json.loads(result.stdout)
    assert "building" in result.stderr
    rows = {row["name"]: row for row in data["layers"]}
    assert [rows[name]["replaced"] for name in ("0", "2", "6")] == [True, True, False]
    assert rows["2"]["dictionary_size"] == 6
    assert rows["2"]["taps"] == 18
    assert rows["2"]["macs_before"] == 9 * 9 * 12 * 12 * 9
    assert data["totals"]["macs_before"] == sum(row["macs_before"] for row in data["layers"])
    table = run("explain", "net.py:build", "--config", "config.json", "--input", "1x4x9x9").stdout
    assert "2 of 3 layers replaced" in table
    assert "left dense" in table
    timed = json.loads(run("explain", "net.py:build", "--input", "1x4x9x9", *SIZES, "--time", "--json").stdout)
    assert all(row["seconds_before"] > 0 and row["seconds_after"] > 0 for row in timed["layers"])
    assert not list(folder.glob("*.safetensors"))


def test_convert_writes_what_the_function_makes(folder):
    html, plot = folder / "r.html", folder / "r.png"
    pictures = [] if not available("matplotlib") else ["--plot", plot]
    result = run(
        "convert",
        "net.py:build",
        "m.safetensors",
        "--calibration",
        "samples.npy",
        "--batch",
        6,
        *SIZES,
        "--html",
        html,
        *pictures,
        "--json",
    )
    data = json.loads(result.stdout)
    assert data["written"] == ["m.safetensors", str(html), *map(str, pictures[1:])]
    samples = torch.from_numpy(np.load("samples.npy")).float()
    dense = network()
    expected = convert(dense, CONFIG, calibration=samples.split(6)).eval()
    found = load(dense, "m.safetensors").eval()
    torch.testing.assert_close(found(samples), expected(samples))
    errors = {row["name"]: row["error"] for row in data["layers"]}
    assert errors == {row.name: row.error for row in expected.lcnn_report}
    assert all(row.seconds_before > 0 for row in found.lcnn_report)
    assert html.read_text().startswith("<!doctype html>")
    shown = json.loads(run("info", "m.safetensors", "--json").stdout)
    assert set(shown["layers"]) == {"0", "2"}
    assert [row["name"] for row in shown["report"]] == ["0", "2", "6"]
    assert "2 of 3 layers replaced" in run("info", "m.safetensors").stdout


def available(package):
    import importlib.util

    return importlib.util.find_spec(package) is not None


@pytest.mark.parametrize("source", ["samples.npz", "net.py:batches", "net:batches"])
def test_calibration_from_other_sources(folder, source):
    run(
        "convert", "net.py:build", "m.safetensors", "--calibration", source, "--batch", 12, "--config", "config.json", "--no-time"
    )
    sys.modules.pop("net", None)
    from lcnn_compile.cli.sources import load_calibration

    batches = load_calibration(source, 12)
    first = next(iter(batches))
    if source == "samples.npz":
        assert first[1].tolist() == list(range(12))
        batches = [first[0]]
    dense = network()
    expected = convert(dense, CONFIG, calibration=batches).eval()
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(load(dense, "m.safetensors").eval()(x), expected(x))


OPTIONAL = """
import torch
from torch import nn


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.seen = []

    def forward(self, x, mask=None, *, gain=1.0, mode="add"):
        y = self.a(x * gain).relu()
        return self.b(y) if mask is None else self.b(y) + mask if mode == "add" else self.b(y * mask)
"""


def test_inputs_by_name_and_constants(folder):
    (folder / "masked.py").write_text(OPTIONAL)
    rng = np.random.default_rng(0)
    np.savez("given.npz", mask=rng.random((12, 1, 9, 9)), x=rng.standard_normal((12, 4, 9, 9)))
    np.save("mask.npy", rng.random((1, 1, 9, 9)))
    given = ["--input", "1x4x9x9", "--input", "mask=mask.npy", "--input", "gain=float:0.5", "--input", "mode=str:times"]
    assert len(json.loads(run("explain", "masked.py:Masked", *given, "--json").stdout)["layers"]) == 2
    run("convert", "masked.py:Masked", "m.safetensors", "--calibration", "given.npz", *given, *SIZES, "--no-time")
    out = run(
        "export", "masked.py:Masked", "--checkpoint", "m.safetensors", *given, "--pt2", "m.pt2", "--lowering", "dense", "--json"
    )
    assert json.loads(out.stdout)["files"][0]["difference"] < 1e-3
    batches = list(load_calibration("given.npz", 12, model=load_model("masked.py:Masked")))
    assert batches[0]["mask"].shape == (12, 1, 9, 9)
    found = load_inputs(["1x4", "none", "true", "int:-3", "a=false", "b=2x2:int64"])
    assert (found.args[1:], found.kwargs["a"]) == ((None, True, -3), False)
    assert found.kwargs["b"].dtype == torch.int64
    for texts, word in ((["a=1x1", "2x2"], "by position after a"), (["a=1", "a=2"], "twice"), (["int:x"], "'x' is no int")):
        with pytest.raises(LcnnError, match=word):
            load_inputs(texts)


def test_weights_and_programs_as_models(folder):
    dense = network()
    with torch.no_grad():
        dense[2].weight.mul_(3)
    save_file(dense.state_dict(), "w.safetensors")
    torch.save({"state_dict": dense.state_dict()}, "w.pt")
    dimensions = ({0: torch.export.Dim("batch", min=1)},)
    torch.export.save(torch.export.export(dense, (torch.randn(2, 4, 9, 9),), dynamic_shapes=dimensions), "p.pt2")
    sizes = ["--dictionary-size", "1.0", "--sparsity", "none", "--no-time", "--input", "1x4x9x9"]
    x = torch.randn(3, 4, 9, 9)
    for name, source in (("s", ["net.py:build", "--weights", "w.safetensors"]), ("t", ["net.py:build", "--weights", "w.pt"])):
        run("convert", *source, f"{name}.safetensors", *sizes)
        torch.testing.assert_close(load(network(), f"{name}.safetensors").eval()(x), dense(x))
    data = json.loads(run("convert", "p.pt2", "u.safetensors", *sizes, "--json").stdout)
    assert data["totals"]["replaced"] == 2
    from lcnn_compile.export import load_pt2

    torch.testing.assert_close(load(load_pt2("p.pt2"), "u.safetensors")(x), dense(x))


def test_sweep_gives_the_pareto_curve(folder):
    arguments = ["--sweep", "1.5,2.5", "--calibration", "net.py:batches", "--evaluate", "net.py:mean_output", "--group-size", "2"]
    data = json.loads(run("convert", "net.py:build", "m.safetensors", *arguments, "--json").stdout)
    assert [point["target"] for point in data["points"]] == [1.5, 2.5]
    assert data["written"] == ["m-1.5x.safetensors", "m-2.5x.safetensors"]
    x = torch.ones(1, 4, 9, 9)
    for point in data["points"]:
        before, after = (sum(row[key] for row in point["layers"]) for key in ("macs_before", "macs_after"))
        assert point["speedup"] == pytest.approx(before / after)
        assert before / after >= point["target"]
        model = load(network(), f"m-{point['target']:g}x.safetensors").eval()
        assert float(model(x).mean()) == pytest.approx(point["metric"], rel=1e-4)
    assert data["points"][0]["error"] < data["points"][1]["error"]
    assert "Pareto curve" in run("convert", "net.py:build", *arguments).stdout


def test_export_writes_files_that_agree(folder):
    run("convert", "net.py:build", "m.safetensors", "--calibration", "samples.npy", *SIZES)
    targets = ["--pt2", "m.pt2", "--dense", "d.safetensors"] + (["--onnx", "m.onnx"] if available("onnxscript") else [])
    data = json.loads(
        run("export", "net.py:build", "--checkpoint", "m.safetensors", "--input", "2x4x9x9", *targets, "--json").stdout
    )
    assert {row["format"] for row in data["files"]} >= {"pt2", "dense"}
    for row in data["files"]:
        assert 0 <= row["difference"] < 1e-5
        assert row["bytes"] == os.path.getsize(row["path"])
    x = torch.randn(5, 4, 9, 9)
    model = load(network(), "m.safetensors").eval()
    torch.testing.assert_close(torch.export.load("m.pt2").module()(x), model(x), atol=1e-5, rtol=1e-4)
    plain = to_dense(model)
    plain.load_state_dict(load_file("d.safetensors"))
    torch.testing.assert_close(plain(x), model(x), atol=1e-5, rtol=1e-4)


def test_models_of_every_precision_are_exported(folder):
    config, batches = LookupConfig(dictionary_size=0.5, sparsity=4), [torch.randn(3, 4, 9, 9)]
    for precision in PRECISIONS:
        lookup = convert(network(), config.replace(precision=precision), calibration=batches)
        assert precision in {row.precision for row in lookup.lcnn_report}
        save(lookup, "p.safetensors")
        arguments = ["--checkpoint", "p.safetensors", "--input", "2x4x9x9", "--pt2", "p.pt2", "--dense", "d.safetensors"]
        program, plain = json.loads(run("export", "net.py:build", *arguments, "--json").stdout)["files"]
        assert program["difference"] < 1e-5
        assert (plain["difference"] > 1e-5) == (precision == "int8")  # plain layers do not round
        x = torch.randn(2, 4, 9, 9)
        torch.testing.assert_close(torch.export.load("p.pt2").module()(x), lookup(x), atol=1e-5, rtol=1e-4)


def test_an_exported_model_is_run(folder):
    run("convert", "net.py:build", "m.safetensors", "--calibration", "samples.npy", *SIZES)
    arguments = ["export", "net.py:build", "--checkpoint", "m.safetensors", "--input", "2x4x9x9", "--native", "served", "--json"]
    [row] = json.loads(run(*arguments).stdout)["files"]
    assert (row["format"], row["difference"]) == ("native", 0.0)
    x = torch.randn(3, 4, 9, 9)
    np.save("x.npy", x.numpy())
    model = load(network(), "m.safetensors").eval()
    shown = run("run", "served/model.lcnn", "x.npy", "--times").stdout
    assert "lookup convolution" in shown
    run("run", "served/model.lcnn", "x.npy", "--save", "y.npy")
    torch.testing.assert_close(torch.from_numpy(np.load("y.npy")), model(x), atol=1e-4, rtol=1e-4)
    data = json.loads(run("run", "served/model.lcnn", "x.npy", "--json").stdout)
    assert np.allclose(data["outputs"]["output"], np.load("y.npy"))
    with pytest.raises(LcnnError, match="takes 1 inputs; it got 2"):
        run("run", "served/model.lcnn", "x.npy", "x.npy")
    with pytest.raises(LcnnError, match="cannot be loaded"):
        run("run", "model.lcnn", "x.npy")
    with pytest.raises(LcnnError, match=r"is no \.npy file, and the input .* no image"):
        run("run", "served/model.lcnn", "x.png")


def test_a_dictionary_as_a_picture(folder):
    pytest.importorskip("matplotlib")
    run("convert", "net.py:build", "m.safetensors", *SIZES, "--input", "1x4x9x9", "--no-time")
    run("info", "m.safetensors", "--layer", "2", "--plot", "d.png")
    assert (folder / "d.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(LcnnError, match=r"'9' is no lookup layer of m\.safetensors; it has 0, 2"):
        run("info", "m.safetensors", "--layer", "9", "--plot", "e.png")


MISTAKES = [
    (["explain", "net.py"], "'net.py' names no factory; write net.py:NAME. It has build, narrow, broken"),
    (["explain", "net.py:bild"], "net.py has no 'bild'. It has build, narrow"),
    (["explain", "net.py:NUMBER"], "net.py has 'NUMBER', a int, but no callable"),
    (["explain", "nets.py:build"], "nets.py is not a file; the folder searched is"),
    (
        ["explain", "no_such_module:build"],
        "no_such_module cannot be imported: ModuleNotFoundError: No module named 'no_such_module'",
    ),
    (["explain", "syntax.py:build"], "syntax.py cannot be imported: SyntaxError"),
    (["explain", "a/b:build"], "'a/b' is no module, .py file or .pt2 file"),
    (["explain", "net.py:broken"], r"net.py:broken fails: NameError: name 'undefined_name' is not defined, .*net.py, line 2\d"),
    (["explain", "net.py:needy"], "needy fails: TypeError.*a factory is called without arguments"),
    (["explain", "net.py:batches"], "net.py:batches returned a list; an nn.Module is required"),
    (["explain", "none.pt2"], "none.pt2 is not a file"),
    (["explain", "bad.pt2"], "bad.pt2 is not a torch.export program"),
    (["explain", "net.py:build", "--input", "1x3x9x9"], "the model fails on the example inputs: RuntimeError: Given groups=1"),
    (["explain", "net.py:build", "--input", "4,9"], "'4,9' is no input; write a shape like 1x3x224x224"),
    (["explain", "net.py:build", "--input", "1x4:flot"], "'1x4:flot' is no input"),
    (["explain", "net.py:build", "--input", "none.npy"], "none.npy cannot be read"),
    (["explain", "net.py:build", "--time"], "--time needs inputs: give --input"),
    (["explain", "net.py:build", "--config", "none.json"], "none.json cannot be read"),
    (["explain", "net.py:build", "--config", "net.py"], "net.py: not a JSON object"),
    (["explain", "net.py:build", "--dictionary-size", "many"], "--dictionary-size is 'many'; a number or auto is allowed"),
    (["explain", "net.py:build", "--group-size", "0"], "group_size is 0; allowed is an int >= 1"),
    (["explain", "net.py:build", "--include", "conv*"], r"include: the rule 'conv\*' matches no layer; the layers are: 0, 2, 6"),
    (["explain", "net.py:build", "--weights", "none.safetensors"], "none.safetensors cannot be read"),
    (["explain", "net.py:build", "--weights", "bad.pt2"], "bad.pt2 is not a state dict of tensors"),
    (
        ["explain", "net.py:build", "--weights", "other.safetensors"],
        r"7 tensors? .*|6 tensors of the model are not in the file \(0.weight, 0.bias",
    ),
    (
        ["explain", "net.py:build", "--html", "no/r.html"],
        "no/r.html cannot be written: no is no folder that can be written; make it first",
    ),
    (["convert", "net.py:build"], r"name the checkpoint to write \(OUTPUT\), or the reductions of a --sweep"),
    (["convert", "net.py:build", "no/m.safetensors"], "no/m.safetensors cannot be written"),
    (
        ["convert", "net.py:build", "m.safetensors", "--calibration", "none"],
        "'none' is no calibration data; name a folder of images",
    ),
    (["convert", "net.py:build", "m.safetensors", "--calibration", "empty"], "empty has no images"),
    (
        ["convert", "net.py:build", "m.safetensors", "--calibration", "bytes.npy"],
        "bytes.npy holds bytes; store the values that the model takes",
    ),
    (
        ["convert", "net.py:build", "m.safetensors", "--calibration", "net.py:narrow"],
        "net.py:narrow returned a Sequential; an iterable|holds no batch|fails",
    ),
    (["convert", "net.py:build", "--sweep", "2;4"], "--sweep is '2;4'; numbers with commas between them"),
    (["convert", "net.py:build", "--sweep", "2", "--resume", "fits"], "--resume keeps one conversion"),
    (["convert", "net.py:build", "--sweep", "2"], "a sweep needs calibration data"),
    (
        ["export", "net.py:build", "--input", "1x4x9x9"],
        "nothing to write: give at least one of --onnx, --pt2, --aot, --native and --dense",
    ),
    (["export", "net.py:build", "--pt2", "m.pt2"], "--input is needed to trace the model"),
    (["export", "net.py:build", "--pt2", "m.pt2", "--input", "1x4x9x9"], "Sequential has no lookup layers; convert it first"),
    (["info", "samples.npy"], "samples.npy is not a readable safetensors file"),
    (["info", "other.safetensors"], "other.safetensors is not a lookup checkpoint"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_mistakes_are_named(folder, arguments, message):
    (folder / "syntax.py").write_text("def build(:\n")
    (folder / "bad.pt2").write_text("nothing")
    (folder / "empty").mkdir()
    np.save("bytes.npy", np.zeros((3, 4, 9, 9), np.uint8))
    save_file({"something": torch.zeros(2)}, "other.safetensors")
    before = set(folder.rglob("*"))
    with pytest.raises(LcnnError, match=f"(?s){message}"):
        run(*arguments)
    assert {path for path in folder.rglob("*") if "__pycache__" not in path.parts} == before


def test_nothing_replaced_is_said_loudly(folder):
    result = run("convert", "net.py:narrow", "m.safetensors", "--input", "1x3x9x9", code=3)
    assert "warning: lcnn replaced nothing" in result.stderr
    assert "nothing was replaced, so m.safetensors is not written" in result.stderr
    assert not (folder / "m.safetensors").exists()


def test_a_folder_of_images(folder):
    image = pytest.importorskip("PIL.Image")
    (folder / "images" / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    stored = {}
    for name in ["c.png", "sub/b.png", "a.png"]:
        stored[name] = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        image.fromarray(stored[name]).save(folder / "images" / name)
    (folder / "images" / "bad.png").write_text("no image")
    (folder / "images" / "notes.txt").write_text("no image either")
    settings = Images((12, 16), 20, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    with pytest.warns(UserWarning, match=r"1 of 4 images cannot be read and are left out: .*bad\.png \(UnidentifiedImageError\)"):
        batches = list(ImageFolder(folder / "images", settings, 2))
    assert [len(batch) for batch in batches] == [2, 1]
    # The shorter side is 20 already, so pixels are the stored ones, cropped from the middle.
    for x, name in zip(torch.cat(batches), ["a.png", "c.png", "sub/b.png"], strict=True):
        pixels = torch.from_numpy(stored[name][4:16, 7:23]).double() / 255
        expected = (pixels - torch.tensor([0.5, 0.4, 0.3]).double()) / torch.tensor([0.2, 0.3, 0.4]).double()
        torch.testing.assert_close(x.double(), expected.permute(2, 0, 1), atol=1e-5, rtol=0)
    grey = next(iter(ImageFolder(folder / "images" / "sub", Images((30, 31), None, (0.0,), (1.0,)), 4)))
    assert grey.shape == (1, 1, 30, 31)
    chosen = ImageFolder(folder / "images", Images((8, 8), limit=2), 4).files
    assert [file.name for file in chosen] == ["a.png", "b.png"]
    (folder / "images" / "worse").mkdir()
    (folder / "images" / "worse" / "bad.jpg").write_text("x")
    with pytest.raises(LcnnError, match="none of the 1 images can be read"):
        list(ImageFolder(folder / "images" / "worse", settings, 2))
    with pytest.raises(LcnnError, match="resize is 8; it must be at least the crop's larger side, 16"):
        Images((12, 16), 8)


def process(folder, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LCNN_TUNE": "0"}
    command = [sys.executable, "-m", "lcnn_compile.cli", *arguments]
    # What runs in the background ignores interruptions, and hands that on to what it starts.
    listening = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": listening}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)


def test_as_a_process(folder):
    good = process(folder, "explain", "net.py:build", "--input", "1x4x9x9", "--json")
    bad = process(folder, "explain", "net.py:bild")
    out, _ = good.communicate()
    assert good.returncode == 0
    assert json.loads(out)["totals"]["layers"] == 3
    out, err = bad.communicate()
    assert bad.returncode == 2
    assert out == ""
    assert err.startswith("lcnn-compile: net.py has no 'bild'. It has build, narrow, broken, needy")
    assert "Traceback" not in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_leaves_nothing_half_written(folder, number, code):
    (folder / "m.safetensors").write_text("old")
    before = {path.name for path in folder.iterdir()}
    started = process(folder, "convert", "net.py:build", "m.safetensors", "--calibration", "net.py:slow", "--no-time")
    deadline = time.monotonic() + 120
    while not (folder / "started").exists() and started.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    started.send_signal(number)
    _, err = started.communicate()
    assert started.returncode == code, err
    assert "Traceback" not in err
    assert {path.name for path in folder.iterdir()} - {"started", "__pycache__"} == before
    assert (folder / "m.safetensors").read_text() == "old"
