"""Thousands of damaged and hostile checkpoints: refused with LcnnError, or loaded as what they say."""

import copy
import json
import random
import signal
import struct
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import SmallResNet, pictures, randomise
from safetensors.torch import load_file, save_file

from lcnn_compile import LcnnError, LookupConfig, convert, load, save
from lcnn_compile.checkpoint.header import digest_of

SMALL = LookupConfig(dictionary_size=3, sparsity=2, group_size=4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    model = convert(randomise(SmallResNet(4)), SMALL, calibration=[pictures(4)])
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save(model, path)
    return model, path, SmallResNet(4)


def spoiled(raw, rng):
    """The bytes with one to three damages."""
    raw = bytearray(raw)
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    for _ in range(rng.randint(1, 3)):
        if not raw:
            break
        how = rng.choice(["flip", "flip header", "byte", "cut", "insert", "zero", "move", "length", "digit"])
        at = rng.randrange(min(len(raw), header) if how == "flip header" else len(raw))
        if how in ("flip", "flip header"):
            raw[at] ^= 1 << rng.randrange(8)
        elif how == "byte":
            raw[at] = rng.randrange(256)
        elif how == "cut":
            del raw[at:]
        elif how == "insert":
            raw[at:at] = rng.randbytes(rng.randint(1, 9))
        elif how == "zero":
            raw[at : at + 16] = bytes(len(raw[at : at + 16]))
        elif how == "move":
            other = rng.randrange(len(raw))
            raw[at : at + 8] = raw[other : other + 8]
        elif how == "length":
            raw[:8] = struct.pack("<Q", rng.choice([0, 1, 2, 7, header, len(raw), 2**31, 2**40, 2**63, 2**64 - 1]))
        else:
            digits = [i for i in range(8, min(header, len(raw))) if 48 <= raw[i] < 58]
            if digits:
                raw[rng.choice(digits)] = rng.choice(b"0123456789")
    return bytes(raw)


def refused_or_equal(skeleton, path, state):
    try:
        loaded = load(skeleton, path)
    except LcnnError:
        return True
    found = loaded.state_dict()
    assert set(found) == set(state)
    assert all(torch.equal(value, state[key]) for key, value in found.items())
    return False


def test_a_thousand_corrupted_files(saved, tmp_path):
    model, path, skeleton = saved
    raw, state, rng = path.read_bytes(), model.state_dict(), random.Random(0)
    refused = 0
    for _ in range(1000):
        (tmp_path / "m").write_bytes(spoiled(raw, rng))
        refused += refused_or_equal(skeleton, tmp_path / "m", state)
    assert refused > 950


@given(st.binary(max_size=200) | st.integers(0, 2**32).map(lambda seed: seed.to_bytes(8, "little")), st.randoms())
def test_any_bytes(saved, tmp_path_factory, raw, rng):
    target = tmp_path_factory.getbasetemp() / "any"
    target.write_bytes(rng.choice([raw, struct.pack("<Q", len(raw)) + raw, spoiled(saved[1].read_bytes(), rng)]))
    refused_or_equal(saved[2], target, saved[0].state_dict())


def other_tensor(value, rng):
    """Another tensor than the one that belongs there, hostile more often than not."""
    how = rng.randrange(9)
    if how == 0:
        return value.to(rng.choice([torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool]))
    if how == 1:
        return value.flatten()
    if how == 2:
        return value[:0] if value.dim() else value
    if how == 3:
        return torch.cat([value, value]) if value.dim() else value
    if how == 4:
        return value[:-1] if value.dim() else value
    value = value.clone()
    flat = value.view(-1)
    if flat.numel():
        special = [float("nan"), float("inf"), -1.0, 1e30] if value.is_floating_point() else [-1, -2, 3, 9, 2**31 - 1, -(2**31)]
        flat[rng.randrange(flat.numel())] = rng.choice(special)
    return value


def other_value(value, rng):
    """Another JSON value than the one that belongs there."""
    choices = [None, True, -1, 0, 2**70, 1.5, float("nan"), "", "\x00", "lookup", [], {}, [1], [value], {"a": value}, 10**400]
    return copy.deepcopy(rng.choice(choices))


def test_hostile_contents_behind_a_valid_checksum(saved, tmp_path):
    model, path, skeleton = saved
    tensors = load_file(path)
    with open(path, "rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        body = json.loads(json.loads(file.read(size))["__metadata__"]["lcnn"])
    x, rng, loaded = pictures(1), random.Random(1), 0
    for _ in range(400):
        changed, text = dict(tensors), copy.deepcopy(body)
        for _ in range(rng.randint(1, 2)):
            key = rng.choice(list(changed))
            place = rng.choice(["tensor", "tensor", "missing", "more", "layer", "report", "alias", "top"])
            if place == "tensor":
                changed[key] = other_tensor(changed[key], rng).contiguous()
            elif place == "missing":
                changed.pop(key)
            elif place == "more":
                changed[key + rng.choice(["x", ".weight"])] = torch.zeros(2)
            elif place == "layer" and isinstance(text.get("layers"), dict) and text["layers"]:
                name = rng.choice(list(text["layers"]))
                settings = text["layers"][name]
                if isinstance(settings, dict) and rng.random() < 0.7:
                    settings[rng.choice(["kernel_size", "lowering"])] = other_value(1, rng)
                else:
                    text["layers"][rng.choice([name, "fc", "", "nowhere", "layers.0"])] = other_value(settings, rng)
            elif place == "report" and isinstance(text.get("report"), list) and text["report"]:
                row = rng.choice(text["report"])
                if isinstance(row, dict):
                    row[rng.choice([*row, "more"])] = other_value(0, rng)
            elif place == "alias" and isinstance(text.get("aliases"), dict):
                text["aliases"][rng.choice([key, "x", ""])] = rng.choice([key, "x", 3, None])
            else:
                text[rng.choice(list(text))] = other_value(text, rng)
        written = json.dumps(text)
        save_file(changed, tmp_path / "m", {"lcnn": written, "digest": digest_of(written, changed)})
        try:
            found = load(skeleton, tmp_path / "m").eval()
        except LcnnError:
            continue
        loaded += 1
        # What is let in must be a model that runs, and whose weights are sound.
        assert found(x).shape == model(x).shape
        assert all(v.isfinite().all() for v in found.state_dict().values() if v.is_floating_point())
    assert 0 < loaded < 300


WRITER = """
import sys, torch
from lcnn_compile import LookupConv2d, save
model = torch.nn.Sequential(LookupConv2d(64, 64, 3))
while True:
    with torch.no_grad():
        model[0].dictionary.add_(1)
    save(model, sys.argv[1])
    print("saved", flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    path, rng = tmp_path / "m", random.Random(2)
    for _ in range(2):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout.readline() == "saved\n"
        time.sleep(0.05 * rng.random())
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        load(torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3)), path)
