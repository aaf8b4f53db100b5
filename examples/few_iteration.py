"""Few-iteration learning (LCNN, section 4.4): dictionaries of a trained network start another one of different depth.

A shallow lookup network is trained; a deeper one then starts with its dictionaries, and another deeper one with random ones.
``python examples/few_iteration.py [CIFAR10_FOLDER]``; a few minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import torch
from few_data import load, top1, train
from torch import nn

from lcnn_compile import LookupConv2d
from lcnn_compile.learning import carry_dictionaries, freeze_dictionaries

SIZES = {"padding": 1, "bias": False, "dictionary_size": 0.25, "sparsity": 2, "group_size": 4}


def network(channels: int, depth: int) -> nn.Sequential:
    """A lookup network with ``depth`` convolutions of 64 channels after the first, which is dense."""
    layers = [nn.Conv2d(channels, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)]
    for number in range(depth):
        layers += [LookupConv2d(64, 64, 3, **SIZES), nn.BatchNorm2d(64), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if number == depth // 2 else []
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def main(
    folder: Path | None = None, steps: Sequence[int] = (25, 50, 100), seeds: int = 5, iterations: int = 300
) -> dict[int, dict[str, list[float]]]:
    """Per cent of test images named rightly after so many steps, for each start and seed."""
    images, labels, tests, answers = load(folder)
    torch.manual_seed(0)
    shallow = train(network(images.shape[1], 3), images, labels, iterations, 0.05)
    print(f"3 lookup layers after {iterations} iterations: {top1(shallow, tests, answers):.1f} %")
    found: dict[int, dict[str, list[float]]] = {}
    for count in steps:
        scores: dict[str, list[float]] = {"random": [], "carried over": [], "carried over and frozen": []}
        found[count] = scores
        for seed in range(seeds):
            for name, results in scores.items():
                torch.manual_seed(seed)
                deep = network(images.shape[1], 6)
                if name != "random":
                    carry_dictionaries(shallow, deep)
                if name == "carried over and frozen":
                    freeze_dictionaries(deep)
                results.append(top1(train(deep, images, labels, count, 0.05, seed), tests, answers))
        line = ", ".join(f"{name} {mean(values):.1f} ± {stdev(values):.1f} %" for name, values in scores.items())
        print(f"6 lookup layers after {count} iterations, dictionaries: {line}", flush=True)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
