"""save() and load(): equal models, atomic files, and nothing damaged or hostile gets in."""

import copy
import json
import os
import struct

import pytest
import torch
from nets import Functional, SmallResNet, Untraceable, pictures, randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lcnn_compile import LcnnError, LookupConfig, convert, load, save
from lcnn_compile.checkpoint import read_header
from lcnn_compile.checkpoint.header import MAX_HEADER, digest_of

SMALL = LookupConfig(dictionary_size=3, sparsity=2, group_size=4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    model = convert(randomise(SmallResNet(8)), SMALL, calibration=[pictures(4)])
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save(model, path)
    return model, path


@pytest.mark.parametrize("factory", [SmallResNet, Untraceable, Functional])
def test_round_trip(factory, tmp_path):
    model = convert(randomise(factory()), SMALL, calibration=[pictures(4)])
    save(model, tmp_path / "m.safetensors")
    skeleton = factory()
    before = {key: value.clone() for key, value in skeleton.state_dict().items()}
    loaded = load(skeleton, tmp_path / "m.safetensors").eval()
    x = pictures(2, 19)
    assert torch.equal(loaded(x), model(x))
    assert list(loaded.lcnn_report) == list(model.lcnn_report)
    assert all(torch.equal(before[key], value) for key, value in skeleton.state_dict().items())
    again = load(loaded, tmp_path / "m.safetensors")
    assert torch.equal(again(x), model(x))


def test_a_single_layer_and_a_compiled_model(tmp_path):
    model = convert(nn.Conv2d(8, 8, 3), SMALL, calibration=[pictures(2, 8, 8)])
    save(torch.compile(model, backend="eager"), tmp_path / "m")
    x = pictures(1, 8, 8)
    assert torch.equal(load(nn.Conv2d(8, 8, 3), tmp_path / "m")(x), model(x))


def test_what_cannot_be_saved(tmp_path, saved):
    with pytest.raises(LcnnError, match="no lookup modules"):
        save(SmallResNet(), tmp_path / "m")
    with pytest.raises(LcnnError, match="cannot be written"):
        save(saved[0], tmp_path / "nowhere" / "m")
    model = convert(randomise(SmallResNet(8)), SMALL, calibration=[pictures(4)])
    with torch.no_grad():
        model.fc.bias[0] = float("nan")
    with pytest.raises(LcnnError, match=r"fc\.bias"):
        save(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, saved, monkeypatch):
    path = tmp_path / "m"
    save(saved[0], path)
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    other = copy.deepcopy(saved[0])
    with torch.no_grad():
        other.fc.bias.add_(1)
    with pytest.raises(LcnnError, match="disk full"):
        save(other, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("skeleton", [SmallResNet(16), nn.Sequential(nn.Conv2d(3, 3, 3)), Untraceable(), nn.Conv2d(3, 8, 3)])
def test_a_file_that_does_not_fit(saved, skeleton):
    with pytest.raises(LcnnError):
        load(skeleton, saved[1])


def rewritten(path, target, change_tensors=None, change_body=None, digest=True):
    """A file with changed contents and, unless told otherwise, a checksum that fits them."""
    tensors = load_file(path)
    with open(path, "rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        body = json.loads(json.loads(file.read(size))["__metadata__"]["lcnn"])
    if change_tensors:
        change_tensors(tensors)
    if change_body:
        change_body(body)
    text = json.dumps(body, sort_keys=True)
    save_file(tensors, target, {"lcnn": text, "digest": digest_of(text, tensors) if digest else "0"})
    return target


LAYER = "layers.0.conv1"
HOSTILE = {
    "index out of range": lambda t: t[f"{LAYER}.indices"].fill_(10**6),
    "negative index": lambda t: t[f"{LAYER}.indices"].fill_(-1),
    "position out of range": lambda t: t[f"{LAYER}.positions"].fill_(9),
    "offsets beyond the taps": lambda t: t[f"{LAYER}.offsets"].fill_(10**9),
    "filter named twice": lambda t: t[f"{LAYER}.filters"].fill_(0),
    "not a number": lambda t: t[f"{LAYER}.dictionary"].view(-1)[0].fill_(float("nan")),
    "infinite running variance": lambda t: t["stem.1.running_var"].fill_(float("inf")),
    "wrong dtype": lambda t: t.update({f"{LAYER}.indices": t[f"{LAYER}.indices"].long()}),
    "wrong dtype of a statistic": lambda t: t.update({"stem.1.running_var": t["stem.1.running_var"].int()}),
    "missing tensor": lambda t: t.pop(f"{LAYER}.offsets"),
    "missing dense tensor": lambda t: t.pop("fc.weight"),
    "unknown tensor": lambda t: t.update({"more": torch.zeros(3)}),
    "wrong shape": lambda t: t.update({f"{LAYER}.dictionary": torch.zeros(1, 3, 4)}),
    "bias of another size": lambda t: t.update({f"{LAYER}.bias": torch.zeros(3)}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tensors_with_a_valid_checksum(saved, tmp_path, name):
    path = rewritten(saved[1], tmp_path / "m", change_tensors=HOSTILE[name])
    with pytest.raises(LcnnError):
        load(SmallResNet(8), path)


BODIES = {
    "unknown version": lambda b: b.update(format=3),
    "no layers": lambda b: b.pop("layers"),
    "layers of another type": lambda b: b.update(layers=[1]),
    "huge kernel": lambda b: b["layers"][LAYER].update(kernel_size=[2**40, 3]),
    "kernel that does not fit": lambda b: b["layers"][LAYER].update(kernel_size=[1, 1]),
    "unknown lowering": lambda b: b["layers"][LAYER].update(lowering="evil"),
    "alias to nothing": lambda b: b["aliases"].update({"fc.weight": "nothing"}),
    "alias of another type": lambda b: b["aliases"].update({"fc.weight": 3}),
    "bad report": lambda b: b.update(report=[{"x": 1}]),
    "a layer that is none": lambda b: b["layers"].update({"fc": {"kernel_size": [1, 1], "lowering": "auto"}}),
}


@pytest.mark.parametrize("name", BODIES)
def test_hostile_descriptions_with_a_valid_checksum(saved, tmp_path, name):
    path = rewritten(saved[1], tmp_path / "m", change_body=BODIES[name])
    with pytest.raises(LcnnError):
        load(SmallResNet(8), path)


def test_wrong_checksum_and_foreign_files(saved, tmp_path):
    with pytest.raises(LcnnError, match="checksum"):
        load(SmallResNet(8), rewritten(saved[1], tmp_path / "m", digest=False))
    save_file({"a": torch.zeros(3)}, tmp_path / "foreign")
    with pytest.raises(LcnnError, match="not a lookup checkpoint"):
        load(SmallResNet(8), tmp_path / "foreign")
    huge = tmp_path / "huge"
    huge.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    for path in (tmp_path / "missing", tmp_path, huge):
        with pytest.raises(LcnnError, match="not a readable"):
            load(SmallResNet(8), path)
    # A header of this size would be read if the rest of the file were there.
    with open(huge, "wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER + 1))
        file.truncate(MAX_HEADER + 100)
    with pytest.raises(LcnnError, match=r"bytes; \d+ are allowed"):
        load(SmallResNet(8), huge)


def test_a_description_nested_deeper_than_python_follows(saved, tmp_path):
    tensors, text = load_file(saved[1]), "[" * 200_000 + "]" * 200_000
    save_file(tensors, tmp_path / "m", {"lcnn": text, "digest": digest_of(text, tensors)})
    with pytest.raises(LcnnError, match="not JSON"):
        load(SmallResNet(8), tmp_path / "m")


SAME_BYTES = {
    "another shape": lambda t: t.update({"fc.weight": t["fc.weight"].reshape(16, 10)}),
    "another dtype": lambda t: t.update({f"{LAYER}.indices": t[f"{LAYER}.indices"].view(torch.float32)}),
    "another name": lambda t: t.update({"fc.weights": t.pop("fc.weight")}),
}


@pytest.mark.parametrize("name", SAME_BYTES)
def test_the_checksum_covers_names_dtypes_and_shapes(saved, tmp_path, name):
    tensors = load_file(saved[1])
    with safe_open(saved[1], framework="pt") as file:
        metadata = file.metadata()
    SAME_BYTES[name](tensors)
    save_file(tensors, tmp_path / "m", metadata)
    with pytest.raises(LcnnError, match="checksum"):
        load(SmallResNet(8), tmp_path / "m")


def test_header(saved):
    header = read_header(saved[1])
    assert set(header.layers) == {row.name for row in saved[0].lcnn_report.replaced}
    assert header.shapes["fc.weight"] == [10, 16]
