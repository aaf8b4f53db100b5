"""The accuracy benchmark on a small network and small data: batches, the remembered teacher, cases from end to end."""

import io
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lcnn_compile.bench.accuracy import report as accuracy_report
from lcnn_compile.bench.accuracy.cases import CASES
from lcnn_compile.bench.accuracy.data import VIEWS, Images, RememberedTeacher, TrainingBatches, Ways
from lcnn_compile.bench.accuracy.study import Study

NETWORK = """
from torch import nn


class Cifar10Net(nn.Module):
    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 24, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU()]
        layers += [nn.Conv2d(24, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
        self.body, self.fc = nn.Sequential(*layers), nn.Linear(32, 10)

    def forward(self, x):
        return self.fc(self.body(x).amax((2, 3)))
"""


def pictures(count, seed):
    """uint8 [count, 3, 32, 32], smooth, and a label that their colours tell."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count).astype(np.uint8)
    small = rng.integers(0, 256, (count, 3, 4, 4))
    small[:, 0] = (small[:, 0] + 25 * labels[:, None, None]) // 2
    return small.astype(np.uint8).repeat(8, 2).repeat(8, 3), labels


def images(count=300):
    arrays = {}
    for part, seed in (("train", 1), ("test", 2)):
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = pictures(count, seed)
    return Images(arrays)


def test_every_image_once_in_the_view_of_the_epoch():
    found = images()
    batches = TrainingBatches(found, size=50)
    shown = {}
    for epoch in (0, 1, VIEWS):
        batches.set_epoch(epoch)
        (x, keys), labels = collect(batches)
        assert sorted(keys.tolist()) == [epoch % VIEWS * 300 + i for i in range(300)]
        numbers = keys % 300
        assert torch.equal(labels, found.train_labels[numbers])
        shown[epoch] = x[numbers.argsort()]
    assert torch.equal(shown[0], shown[VIEWS])
    assert not torch.equal(shown[0], shown[1])


def collect(batches):
    x, keys, labels = [], [], []
    for (images, names), classes in batches:
        x.append(images)
        keys.append(names)
        labels.append(classes)
    return (torch.cat(x), torch.cat(keys)), torch.cat(labels)


def test_images_are_shifted_and_flipped_with_mirrored_edges():
    ways = Ways(6, torch.Generator().manual_seed(0))
    picture = torch.arange(3 * 32 * 32).view(1, 3, 32, 32).remainder(251).to(torch.uint8)
    for number in range(6):
        top, left = (int(v) for v in ways.shifts[:, number, 0])
        padded = nn.functional.pad(picture.float(), (4,) * 4, mode="reflect")
        wanted = padded[:, :, top : top + 32, left : left + 32]
        wanted = wanted.flip(3) if ways.flips[number] else wanted
        assert torch.equal(ways.applied(picture, torch.tensor([number])).float(), wanted)
    assert 0 < int(ways.flips.sum()) < 6


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        return x.flatten(1)[:, :4]


def test_a_teacher_runs_once_for_each_key(tmp_path):
    network, file = Counted(), tmp_path / "teacher.safetensors"
    teacher = RememberedTeacher(network, 10, 4, file)
    x = torch.randn(10, 2, 2, 2)
    for keys in ([3, 1], [1, 2, 3], [2]):
        assert torch.equal(teacher((x[keys], torch.tensor(keys))), x[keys].flatten(1)[:, :4])
    assert network.seen == 3
    teacher.save()
    again = RememberedTeacher(network, 10, 4, file)
    assert torch.equal(again((torch.zeros(1, 2, 2, 2), torch.tensor([2]))), x[2:3].flatten(1)[:, :4])
    assert network.seen == 3


@pytest.fixture
def study(tmp_path):
    image = pytest.importorskip("PIL.Image")
    data = tmp_path / "data"
    data.mkdir()
    arrays = {}
    for part, seed in (("train", 1), ("test", 2)):
        pixels, labels = pictures(300, seed)
        files = []
        for picture in pixels:
            stream = io.BytesIO()
            image.fromarray(picture.transpose(1, 2, 0)).save(stream, "JPEG", quality=95)
            files.append(np.frombuffer(stream.getvalue(), np.uint8))
        arrays[f"{part}_jpeg"] = np.concatenate(files)
        arrays[f"{part}_offsets"] = np.cumsum([0, *map(len, files)])
        arrays[f"{part}_labels"] = labels
    np.savez(data / "cifar10_jpeg.npz", **arrays)
    (data / "cifar10_net.py").write_text(NETWORK)
    scope = {}
    exec(NETWORK, scope)
    save_file(scope["Cifar10Net"]().state_dict(), data / "cifar10_dense.safetensors")
    return Study(data, tmp_path / "work")


def test_cases_from_end_to_end(study):
    tuned = CASES["lookups-8x-5-epochs"]
    result = study.run(tuned)
    dense = study.run(CASES["dense"])
    assert 6 < dense["macs"] / result["macs"] < 12
    assert result["layers"]
    history = json.loads((study.work / f"{tuned.name}.history.json").read_text())
    assert len(history) == 5
    assert history[-1]["loss"] < history[0]["loss"]
    outputs = RememberedTeacher(nn.Identity(), 1, 1, study.work / "teacher.safetensors").outputs
    assert outputs.isfinite().all(1).sum() == 5 * 256
    again = study.load(tuned)
    start = study.load(CASES[tuned.start])
    x = study.example
    assert torch.equal(again(x), study.load(tuned)(x))
    assert not torch.equal(again(x), start(x))
    times = {tuned.name: {"seconds": 2.0}, f"{tuned.name}{accuracy_report.ROUNDED}": {"seconds": 1.0, "top1": 12.0}}
    exact, rounded = [row for row in accuracy_report.rows(study, times) if row["case"].startswith(tuned.name)]
    assert (exact["top1"], exact["time"]["seconds"], exact.get("precision")) == (result["top1"], 2.0, None)
    assert (rounded["top1"], rounded["time"]["seconds"], rounded["precision"]) == (12.0, 1.0, "bfloat16")
    assert rounded["loss"] == dense["top1"] - 12.0
    file = study.work / f"{tuned.name}.json"
    before = file.stat().st_mtime_ns
    assert study.run(tuned) == result
    assert file.stat().st_mtime_ns == before
