"""Keyword spotting on raw audio with 1-d convolutions, trained here on generated sounds in less than a minute: pip install lcnn-compile

Classes are kinds of sounds (tones, chirps, clicks, noise bands), each at a random place in a second of noise.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from comparison import compare
from torch import Tensor, nn

from lcnn_compile import LookupConfig, convert

RATE = 4000
CLASSES = 6


def sounds(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """[count, 1, RATE], one second each, and their classes int64 [count]."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(RATE) / RATE
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    start, pitch, slope, phase = torch.rand(4, count, 1, generator=generator)
    pitch = 200 + 600 * pitch
    bend = torch.tensor([0.0, 800.0, -800.0, 0.0, 0.0, 0.0])[labels, None] * (0.5 + slope)
    wave = torch.sin(2 * math.pi * (pitch * time + bend * time**2 / 2 + phase))
    harmonics = torch.sign(wave)
    tremolo = wave * (0.5 + 0.5 * torch.sin(2 * math.pi * 20 * time))
    hiss = torch.randn(count, RATE, generator=generator) * 0.7
    kind = labels[:, None]
    sound = torch.where(kind == 3, harmonics, torch.where(kind == 4, tremolo, torch.where(kind == 5, hiss, wave)))
    window = ((time - 0.1 - 0.4 * start).abs() < 0.25).float()
    noise = 0.5 * torch.randn(count, RATE, generator=generator)
    return (sound * window + noise)[:, None], labels


class Listener(nn.Module):
    """[N, 1, T] to logits [N, CLASSES]: strided, then dilated 1-d convolutions with residuals."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(1, width, 16, stride=4, padding=6), nn.BatchNorm1d(width), nn.ReLU())
        self.down = nn.Sequential(nn.Conv1d(width, width, 8, stride=4, padding=2), nn.BatchNorm1d(width), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv1d(width, width, 5, padding="same", dilation=d), nn.BatchNorm1d(width), nn.ReLU())
            for d in (1, 2, 4, 8)
        )
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        y = self.down(self.stem(x))
        for block in self.blocks:
            y = y + block(y)
        return self.head(y.mean(2))


def accuracy(model: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    """Share of sounds that are recognised."""
    with torch.no_grad():
        return float((model(test[0]).argmax(1) == test[1]).float().mean())


def main(width: int = 64, steps: int = 120, compiled: bool = True) -> tuple[float, float]:
    """Train, convert, compare; returns the accuracy of the dense and of the converted network."""
    torch.manual_seed(0)
    model, test = Listener(width), sounds(500, 99_999)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(steps):
        x, labels = sounds(32, step)
        loss = F.cross_entropy(model(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    batches = [sounds(64, 10_000 + i)[0] for i in range(8)]
    lookup = convert(model, LookupConfig(dictionary_size=0.25, sparsity=4), calibration=batches)
    found = accuracy(model, test), accuracy(lookup, test)
    rows = {"dense": (model, f"{found[0]:.1%} right"), "lookup": (lookup, f"{found[1]:.1%} right")}
    compare("one second of sound", rows, lookup.lcnn_report, test[0][:1], compiled)
    return found


if __name__ == "__main__":
    main()
