"""Other ways to spend fewer multiply-adds on a network of convolutions: low rank and magnitude pruning."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lcnn_compile.bench import macs
from lcnn_compile.fitting.allocate import allocate
from lcnn_compile.fitting.search import Point

NARROW = 3  # input channels up to which no weight is pruned: that costs more than it frees
RANKS = 48  # ranks tried for each layer


def low_rank(model: nn.Module, speedup: float, calibration: Sequence[Tensor], example: Tensor) -> nn.Module:
    """A copy whose convolutions are pairs of a convolution with r outputs and a 1x1 convolution (Zhang et al. 2015).

    The r outputs are the principal components of the layer's outputs on the calibration data; ranks are allocated as our
    sizes are, by the least sum of relative errors within the budget; batch norm is estimated anew.
    """
    result = copy.deepcopy(model)
    layers = _convolutions(result)
    outputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    pixels: dict[str, int] = {}

    def hook(name: str) -> object:
        def record(_: nn.Module, __: object, y: Tensor) -> None:
            outputs[name].append(y.transpose(0, 1).flatten(1)[:, ::3].clone())
            pixels[name] = y.shape[2] * y.shape[3]

        return record

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]  # type: ignore[arg-type]
    with torch.no_grad():
        for batch in calibration:
            result(batch)
    for handle in handles:
        handle.remove()
    curves, bases = {}, {}
    for name, layer in layers.items():
        y = torch.cat(outputs.pop(name), 1).double()
        mean = y.mean(1)
        values, vectors = torch.linalg.eigh((y - mean[:, None]) @ (y - mean[:, None]).T)
        bases[name] = (vectors.flip(1).float(), mean.float())
        n, m = layer.weight.shape[:2]
        area = layer.weight[0, 0].numel()
        left = 1 - values.flip(0).cumsum(0) / values.sum()
        ranks = sorted({max(1, round(n * i / RANKS)) for i in range(1, RANKS + 1)})
        points = [Point(r, 0, 1, pixels[name] * r * (m * area + n), float(left[r - 1]), float(left[r - 1])) for r in ranks]
        dense = pixels[name] * layer.weight.numel()
        curves[name] = [*(p for p in points if p.cost < dense), Point(0, 0, 1, dense, 0.0, 0.0)]
    others = macs.count(model, example) // example.shape[0] - sum(points[-1].cost for points in curves.values())
    for name, point in allocate(curves, target_speedup=speedup, other=others).items():
        if point.size:
            vectors, mean = bases[name]
            _replace(result, name, _pair(layers[name], vectors[:, : point.size], mean))
    return renormalise(result, calibration)


def _convolutions(model: nn.Module, above: int = 0) -> dict[str, nn.Conv2d]:
    """Those of more than so many input channels."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.in_channels > above}


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)


def _pair(conv: nn.Conv2d, basis: Tensor, mean: Tensor) -> nn.Sequential:
    """y ≈ U·Uᵀ·(y − mean) + mean, for the convolution's outputs y."""
    rank = basis.shape[1]
    first = nn.Conv2d(conv.in_channels, rank, conv.kernel_size, conv.stride, conv.padding, bias=False)  # type: ignore[arg-type]
    second = nn.Conv2d(rank, conv.out_channels, 1)
    with torch.no_grad():
        first.weight.copy_(torch.einsum("nr,nmhw->rmhw", basis, conv.weight))
        second.weight.copy_(basis[:, :, None, None])
        offset = mean - basis @ (basis.T @ mean)
        bias = torch.zeros_like(mean) if conv.bias is None else basis @ (basis.T @ conv.bias)
        assert second.bias is not None
        second.bias.copy_(offset + bias)
    return nn.Sequential(first, second)


def pruned(model: nn.Module, speedup: float, calibration: Sequence[Tensor], example: Tensor) -> nn.Module:
    """A copy with the smallest weights masked (Han et al. 2015), of all layers together after dividing by each layer's norm.

    Its masks are those of ``torch.nn.utils.prune``; multiply-adds with zeros are not counted; batch norm is estimated anew.
    """
    result = copy.deepcopy(model)
    layers = _convolutions(result, NARROW)
    budget = macs.count(model, example) / speedup
    scores = {
        (layer, "weight"): layer.weight.detach().abs() / layer.weight.detach().square().mean().sqrt() for layer in layers.values()
    }
    low, high = 0.0, 1.0
    for _ in range(16):
        amount = (low + high) / 2
        trial = copy.deepcopy(model)
        pairs = [(layer, "weight") for layer in _convolutions(trial, NARROW).values()]
        prune.global_unstructured(
            pairs, prune.L1Unstructured, importance_scores=dict(zip(pairs, scores.values(), strict=True)), amount=amount
        )
        low, high = (amount, high) if nonzero_macs(trial, example) > budget else (low, amount)
    prune.global_unstructured(list(scores), prune.L1Unstructured, importance_scores=scores, amount=high)
    return renormalise(result, calibration)


def nonzero_macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-adds by weights that are not zero."""
    total = 0

    def hook(module: nn.Module, _: object, y: Tensor) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, Tensor)
        total += int((weight != 0).sum()) * (y.numel() // weight.shape[0])

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        model(example)
    for handle in handles:
        handle.remove()
    return total


def renormalise(model: nn.Module, calibration: Sequence[Tensor]) -> nn.Module:
    """Batch statistics estimated anew on the calibration data; the model comes back in evaluation mode."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    with torch.no_grad():
        for batch in calibration:
            model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()
