"""Super-resolution with transposed convolutions, trained here on generated pictures in less than a minute: pip install lcnn-compile

The network (after FSRCNN) works at low resolution; a transposed convolution enlarges. Conversion needs no labels; a few epochs
of distillation win quality back.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from comparison import compare
from torch import Tensor, nn

from lcnn_compile import LookupConfig, convert
from lcnn_compile.learning import distill


class Enlarge(nn.Module):
    """[N, 1, H, W] to [N, 1, 2H, 2W]: what a transposed convolution adds to bilinear interpolation."""

    def __init__(self, width: int = 48):
        super().__init__()
        self.first = nn.Conv2d(1, width, 5, padding=2)
        self.middle = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.up = nn.ConvTranspose2d(width, width // 2, 4, stride=2, padding=1)
        self.last = nn.Conv2d(width // 2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Enlarge."""
        y = F.relu(self.first(x))
        for layer in self.middle:
            y = F.relu(layer(y))
        return F.interpolate(x, scale_factor=2.0, mode="bilinear") + self.last(F.relu(self.up(y)))


def pictures(count: int, size: int, seed: int) -> Tensor:
    """[count, 1, size, size]: overlapping ellipses and stripes with sharp edges."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.linspace(-1, 1, size)
    rows, columns = axis[:, None], axis[None, :]
    image = torch.zeros(count, size, size)
    for _ in range(6):
        a, b, c, d, value = torch.rand(5, count, 1, 1, generator=generator)
        inside = ((rows - 2 * a + 1) / (0.1 + c)) ** 2 + ((columns - 2 * b + 1) / (0.1 + d)) ** 2 < 1
        stripes = 0.5 + 0.5 * torch.sign(torch.sin(20 * (a * rows + b * columns)))
        image = torch.where(inside, value * stripes, image)
    return image[:, None]


def psnr(model: nn.Module, high: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels."""
    with torch.no_grad():
        return float(-10 * (model(F.avg_pool2d(high, 2)) - high).square().mean().log10())


def train(model: nn.Module, steps: int) -> None:
    """Least squares on generated pictures."""
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    for step in range(steps):
        high = pictures(16, 48, step)
        loss = (model(F.avg_pool2d(high, 2)) - high).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def main(width: int = 48, steps: int = 300, epochs: int = 3, compiled: bool = True) -> tuple[float, float, float]:
    """Train, convert, distil, compare; returns the quality of the dense, converted and distilled networks in decibels."""
    torch.manual_seed(0)
    model, test = Enlarge(width), pictures(64, 96, -1 % 2**32)
    train(model, steps)
    model.eval()
    batches = [F.avg_pool2d(pictures(16, 96, 10_000 + i), 2) for i in range(8)]
    lookup = convert(model, LookupConfig(dictionary_size=0.25, sparsity=4), calibration=batches)
    rows = {"dense": (model, f"{psnr(model, test):.2f} dB"), "lookup": (lookup, f"{psnr(lookup, test):.2f} dB")}
    qualities = [psnr(model, test), psnr(lookup, test)]
    distill(lookup, model, batches, epochs=epochs, lr=0.005, progress=False)
    qualities.append(psnr(lookup.eval(), test))
    rows["lookup"] = (lookup, f"{qualities[1]:.2f} dB, after distillation {qualities[2]:.2f} dB")
    low = F.avg_pool2d(pictures(1, 512, 5), 2)
    compare("256x256 to 512x512", rows, lookup.lcnn_report, low, compiled)
    return qualities[0], qualities[1], qualities[2]


if __name__ == "__main__":
    main()
