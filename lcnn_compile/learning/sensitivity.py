"""How much an error of each layer matters to the network's output, by random projections and one backward pass each."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lcnn_compile.learning.network import Network
from lcnn_compile.learning.sampling import leading

PROBES = 4  # random projections of the output
IMAGES = 16  # images that are looked at
FLOOR = 1e-3  # of the mean, for layers whose gradient vanishes or cannot be had


def output_sensitivity(network: Network, batch: Any, names: Collection[str], seed: int) -> dict[str, float]:
    """A weight for the relative output error of each layer; 1 for all where the network cannot be differentiated.

    With gradients g of random ±1 combinations of the outputs, E[Σ g²·var(y)] is the squared error of the outputs that
    a unit relative error of y causes, were it independent from pixel to pixel. Its square root is taken because later
    layers, fitted on what the earlier ones really give, make up for part of it.

    Args:
        network: whose layers are asked about.
        batch: of real inputs.
        names: the layers.
        seed: of the projections.
    """
    probes: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    hooks = [network.layers[name].register_forward_hook(_add_probe(probes[name])) for name in names]
    try:
        with torch.enable_grad():
            outputs = pytree.tree_leaves(network.call(network.model, _few(batch)))
            ends = [t for t in outputs if isinstance(t, Tensor) and t.requires_grad]
            found = _squared_gradients(ends, probes, seed) if ends else {}
    except RuntimeError:  # no derivative somewhere inside the model
        found = {}
    finally:
        for hook in hooks:
            hook.remove()
    mean = sum(found.values()) / max(1, len(found))
    if not 0 < mean < float("inf"):
        return dict.fromkeys(names, 1.0)
    return {name: max(found.get(name, 0.0) / mean, FLOOR) ** 0.5 for name in names}


def _add_probe(probes: list[tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        probe = torch.zeros_like(output, requires_grad=True)
        probes.append((probe, output.detach()))
        return output + probe

    return hook


def _few(batch: Any) -> Any:
    """The first images of a batch of many; anything else as it is."""
    return pytree.tree_map_only(Tensor, lambda t: t[:IMAGES], batch) if leading(batch) else batch


def _squared_gradients(ends: list[Tensor], probes: dict[str, list[tuple[Tensor, Tensor]]], seed: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    flat = [(name, probe, y) for name, pairs in probes.items() for probe, y in pairs]
    found = dict.fromkeys(probes, 0.0)
    for _ in range(PROBES):
        signs = [torch.randint(0, 2, end.shape, generator=generator).to(end) * 2 - 1 for end in ends]
        gradients = torch.autograd.grad(ends, [probe for _, probe, _ in flat], signs, retain_graph=True, allow_unused=True)
        for (name, _, y), gradient in zip(flat, gradients, strict=True):
            if gradient is not None:
                found[name] += float((gradient.float().square() * (y.float() - y.float().mean()).square().mean()).sum())
    return found
