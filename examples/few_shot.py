"""Learning new classes from one image each (LCNN, section 4.3): dictionaries frozen, only coefficients learn.

A network learns half of the classes. Then it gets a new last layer and one image of each other class: as lookups whose
dictionaries stay, and as the dense network it was. ``python examples/few_shot.py [CIFAR10_FOLDER]``; a few minutes.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from few_data import block, load, top1, train
from torch import Tensor, nn

from lcnn_compile import LookupConfig, convert
from lcnn_compile.learning import freeze_dictionaries

STEPS, KNOWN = 30, 5
RATES = tuple(product((0.001, 0.003, 0.01), (0.0, 0.003, 0.01, 0.03, 0.1)))  # of the last layer and of all before it


def learn(model: nn.Module, shots: Tensor, rates: tuple[float, float]) -> nn.Module:
    """The network after STEPS steps on one image of each class, batch statistics as they were."""
    model = copy.deepcopy(model).eval()
    model[-1].weight.data.zero_()
    model[-1].bias.data.zero_()
    last = list(model[-1].parameters())
    before = [p for layer in model[:-1] for p in layer.parameters() if p.requires_grad]
    groups = [{"params": params, "lr": rate} for params, rate in zip((last, before), rates, strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(shots), torch.arange(len(shots))).backward()
        optimizer.step()
    return model


def main(
    folder: Path | None = None,
    resamples: int = 20,
    trials: int = 8,
    rates: Sequence[tuple[float, float]] = RATES,
    iterations: int = 300,
) -> dict[str, list[float]]:
    """Per cent of images of the new classes named rightly, for each network and resample."""
    torch.manual_seed(0)
    images, labels, tests, answers = load(folder)
    pool = nn.MaxPool2d(2)
    layers = [*block(images.shape[1], 32), pool, *block(32, 64), *block(64, 64), pool, *block(64, 128)]
    dense = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(128, KNOWN))
    known, new = labels < KNOWN, labels >= KNOWN
    train(dense, images[known], labels[known], iterations, 0.05)
    print(f"dense network on the {KNOWN} classes it knows: {top1(dense, tests[answers < KNOWN], answers[answers < KNOWN]):.1f} %")
    lookups = convert(dense, LookupConfig(target_speedup=2.0), calibration=images[known][:256].split(64)).eval()
    print(lookups.lcnn_report.summary())
    candidates = {"lookups, dictionaries frozen": freeze_dictionaries(lookups), "dense": dense}
    unseen, truth = images[new], labels[new] - KNOWN
    tests, answers = tests[answers >= KNOWN], answers[answers >= KNOWN] - KNOWN
    generator = torch.Generator().manual_seed(1)
    classes = range(int(truth.max()) + 1)

    def draw() -> Tensor:
        rows = [(truth == c).nonzero().flatten() for c in classes]
        return unseen[torch.stack([r[torch.randint(len(r), (), generator=generator)] for r in rows])]

    # Each gets the learning rates that are best for it on resamples that do not count, judged on other training images.
    tried = [draw() for _ in range(trials)]
    best = {
        name: max(rates, key=lambda r, m=model: mean(top1(learn(m, s, r), unseen[:500], truth[:500]) for s in tried))
        for name, model in candidates.items()
    }
    samples = [draw() for _ in range(resamples)]
    found = {
        name: [top1(learn(model, shots, best[name]), tests, answers) for shots in samples] for name, model in candidates.items()
    }
    for name, scores in found.items():
        last, before = best[name]
        print(
            f"1 image of each of {len(classes)} new classes, {name}: {mean(scores):.1f} ± {stdev(scores):.1f} % "
            f"(lr {last:g} in the last layer, {before:g} before it)"
        )
    gains = [a - b for a, b in zip(*found.values(), strict=True)]
    print(
        f"difference over {resamples} resamples: {mean(gains):+.1f} ± {stdev(gains):.1f} points, better in {sum(g > 0 for g in gains)}"
    )
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
