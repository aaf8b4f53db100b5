"""Layers that no lookup form exists for and that multiply all the same: recurrent ones and attention. They are counted, and stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

CELLS = (nn.RNNCellBase,)
KINDS = (nn.RNNBase, *CELLS, nn.MultiheadAttention)
RECURRENT = "recurrent layers have no lookup form"
ATTENTION = "attention has no lookup form"


@dataclass
class Fixed:
    """One such layer.

    Attributes:
        kind: its type's name.
        reason: why it stays.
        nbytes: of its parameters.
        macs: multiply-adds per sample, of all its calls on the example inputs; None where it never ran.
    """

    kind: str
    reason: str
    nbytes: int
    macs: int | None = None


def fixed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Recurrent layers and attention of PyTorch's own, by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, KINDS)}


def fixed(layer: nn.Module) -> Fixed:
    """What is known of a layer before it has run."""
    reason = ATTENTION if isinstance(layer, nn.MultiheadAttention) else RECURRENT
    return Fixed(type(layer).__name__, reason, sum(p.numel() * p.element_size() for p in layer.parameters()))


def fixed_macs(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Multiply-adds of one call, per sample."""
    if isinstance(layer, nn.MultiheadAttention):
        query, key, value = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("query", "key", "value")))
        return _attention(layer, query, key, value)
    steps = 1 if isinstance(layer, CELLS) else _steps(layer, args[0] if args else kwargs["input"])
    return steps * sum(p.numel() for name, p in layer.named_parameters() if name.startswith("weight"))


def _steps(layer: Any, x: Tensor | PackedSequence) -> int:
    """Steps of a sequence; of several unequal ones, their mean."""
    if isinstance(x, PackedSequence):
        return round(x.data.shape[0] / int(x.batch_sizes[0]))
    return x.shape[0] if x.dim() == 2 or not layer.batch_first else x.shape[1]


def _attention(layer: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> int:
    """The projections of queries, keys, values and outputs, and the two products between them."""
    place = 1 if layer.batch_first and query.dim() == 3 else 0
    queries, keys, width = query.shape[place], key.shape[place], layer.embed_dim
    projections = (2 * queries * width + keys * (key.shape[-1] + value.shape[-1])) * width
    return projections + 2 * queries * keys * width


def attention_macs(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Multiply-adds per sample of ``scaled_dot_product_attention``: [N, heads, L, E], [N, heads, S, E], [N, heads, S, Ev]."""
    samples = query.shape[0] if query.dim() > 2 else 1
    return query[..., 0].numel() // max(1, samples) * key.shape[-2] * (query.shape[-1] + value.shape[-1])
