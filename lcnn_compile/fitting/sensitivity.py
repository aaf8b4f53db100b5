"""How much an error of each layer matters to the network's output, by random projections and one backward pass each."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lcnn_compile.fitting.network import Network
from lcnn_compile.fitting.processes import Processes
from lcnn_compile.fitting.sampling import leading
from lcnn_compile.geometry import Geometry
from lcnn_compile.torch_private import pytree

PROBES = 4  # random projections of the output
IMAGES = 64  # images that are looked at at most
ELEMENTS = 2_500_000  # of input that is looked at, about: 16 images of 224x224
FLOOR = 1e-3  # of the mean, for layers whose gradient vanishes or cannot be had
CHANNEL_FLOOR = 0.1  # of the layer's mean, for its channels


@dataclass(frozen=True)
class Sensitivity:
    """What errors of one layer mean to the network's output.

    Attributes:
        layer: weight of the layer's relative error against other layers'; 1 on average.
        channels: weight of each output channel's squared error, [n], 1 on average; None where it is not known.
    """

    layer: float
    channels: Tensor | None


def output_sensitivity(
    network: Network, batch: Any, names: Collection[str], seed: int, processes: Processes | None = None
) -> dict[str, Sensitivity]:
    """Weights for the errors of each layer; 1 for all where the network cannot be differentiated.

    With gradients g of random ±1 combinations of the outputs, E[Σ g²·e²] is the squared error of the outputs that
    an error e of a layer's output causes, were it independent from pixel to pixel. For whole layers its square root is
    taken because later layers, fitted on what the earlier ones really give, make up for part of it.

    Args:
        network: whose layers are asked about.
        batch: of real inputs.
        names: the layers.
        seed: of the projections.
        processes: that ask together, each with a batch of its own.
    """
    probes: dict[str, list[_Probe]] = {name: [] for name in names}
    hooks = [
        network.layers[name].register_forward_hook(_add_probe(network.geometry[name], probes[name]), with_kwargs=True)
        for name in names
    ]
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
    if processes is not None and processes.count > 1:
        found = _shared(network, found, names, processes)
    totals = {name: float((gradient * variance).sum()) for name, (gradient, variance) in found.items()}
    mean = sum(totals.values()) / max(1, len(totals))
    if not 0 < mean < float("inf"):
        return dict.fromkeys(names, Sensitivity(1.0, None))
    result = {}
    for name in names:
        gradient, _ = found.get(name, (None, None))
        level = 0.0 if gradient is None else float(gradient.mean())
        channels = None if gradient is None or not level > 0 else (gradient / level).clamp(min=CHANNEL_FLOOR)
        result[name] = Sensitivity(max(totals.get(name, 0.0) / mean, FLOOR) ** 0.5, channels)
    return result


def _shared(
    network: Network, found: dict[str, tuple[Tensor, Tensor]], names: Collection[str], processes: Processes
) -> dict[str, tuple[Tensor, Tensor]]:
    """Means over the processes that have found something."""
    shared = {}
    for name in names:
        layer = network.layers[name].weight
        mine = torch.zeros(3, network.geometry[name].out_channels, device=layer.device)
        if name in found:
            mine = torch.stack([*found[name], torch.ones_like(found[name][0])])
        gradient, variance, count = processes.sum(mine)
        if count[0]:
            shared[name] = (gradient / count, variance / count)
    return shared


class _Probe(NamedTuple):
    """One call of a layer: a zero that is added to its output, and how such tensors become [n, pixels]."""

    zero: Tensor
    output: Tensor
    planes: Callable[[Tensor], Tensor]


def _add_probe(geometry: Geometry, probes: list[_Probe]) -> Callable[..., Tensor]:
    def hook(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        x = geometry.images(args[0] if args else kwargs["input"])

        def planes(t: Tensor) -> Tensor:
            images = geometry.outputs(t, x)
            return images.transpose(0, 1).reshape(images.shape[1], -1)

        zero = torch.zeros_like(output, requires_grad=True)
        probes.append(_Probe(zero, output.detach(), planes))
        return output + zero

    return hook


def _few(batch: Any) -> Any:
    """The first images of a batch of many; anything else as it is."""
    images = leading(batch)
    if not images:
        return batch
    elements = sum(t.numel() for t in pytree.tree_leaves(batch) if isinstance(t, Tensor))
    few = max(1, min(IMAGES, ELEMENTS * images // max(1, elements)))
    return pytree.tree_map_only(Tensor, lambda t: t[:few], batch)


def _squared_gradients(ends: list[Tensor], probes: dict[str, list[_Probe]], seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each layer that the outputs depend on: Σ g² and the variance of the output, for each channel, [n]."""
    generator = torch.Generator().manual_seed(seed)
    flat = [(name, probe) for name, found in probes.items() for probe in found]
    variance = {name: found[0].planes(found[0].output).var(1, correction=0) for name, found in probes.items() if found}
    squares: dict[str, Tensor] = {}
    for _ in range(PROBES):
        signs = [torch.randint(0, 2, end.shape, generator=generator).to(end) * 2 - 1 for end in ends]
        gradients = torch.autograd.grad(ends, [probe.zero for _, probe in flat], signs, retain_graph=True, allow_unused=True)
        for (name, probe), gradient in zip(flat, gradients, strict=True):
            if gradient is not None:
                found = probe.planes(gradient).square().sum(1)
                squares[name] = squares[name] + found if name in squares else found
    return {name: (found, variance[name]) for name, found in squares.items()}
