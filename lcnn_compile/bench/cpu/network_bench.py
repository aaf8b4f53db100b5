"""Whole networks: each setting against every engine, weights and activations in float32."""

from __future__ import annotations

import torch

from lcnn_compile.bench.cpu.measure import Case
from lcnn_compile.bench.networks import RESOLUTION, RESOLUTIONS, build, example_input
from lcnn_compile.bench.settings import SETTINGS, lookup_network

# The last two are there to show what happens where lookups do not pay.
SETTINGS_OF = {
    "alexnet": ("ours", "paper-fast", "paper-accurate"),
    "vgg16": ("ours", "paper-fast", "paper-accurate"),
    "resnet18": ("ours", "paper-fast", "paper-accurate"),
    "resnet50": ("ours", "paper-fast", "paper-accurate"),
    **dict.fromkeys(
        ("mobilenet", "mobilenet_v2", "mobilenet_v3", "densenet121", "unet", "detector", "edsr", "compact_sr"), ("ours",)
    ),
    "narrow": ("ours",),
}
QUICK = ("resnet18", "narrow")


def network_case(name: str, batch: int) -> Case:
    """A network with random lookups at each of its settings, on random images."""
    torch.manual_seed(0)
    model = build(name)
    lookups = {setting: lookup_network(name, model, SETTINGS[setting]) for setting in SETTINGS_OF[name]}
    return Case(name, lookups, example_input(batch, RESOLUTIONS.get(name, RESOLUTION)))
