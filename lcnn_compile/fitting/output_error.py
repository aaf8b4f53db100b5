"""How far a network's outputs are from the dense network's: relative error of each, and divergence where they are scores of classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcnn_compile.fitting.processes import Processes
from lcnn_compile.torch_private import pytree

FEWEST_CLASSES = 3  # columns of a [samples, columns] output that may be scores of classes
SAMPLES = 4  # from so many samples on, the mean of each element is known


@dataclass(frozen=True)
class OutputError:
    """What a conversion did to the outputs of a network.

    Attributes:
        errors: ‖y − ŷ‖² / ‖y − mean(y)‖² of each output tensor; infinite where shapes or values that are not finite differ.
        divergence: mean Kullback-Leibler divergence of softmax(ŷ) from softmax(y) in nats, the largest over outputs
            [samples, classes]; None where there is no such output.
    """

    errors: tuple[float, ...]
    divergence: float | None = None

    @property
    def worst(self) -> float:
        """What a limit is held against: the largest of all."""
        return max((*self.errors, *(() if self.divergence is None else (self.divergence,))), default=0.0)

    def __str__(self) -> str:
        text = f"{max(self.errors, default=0.0):.2g}"
        if len(self.errors) > 1:
            text += f" (the worst of {len(self.errors)} outputs)"
        return text if self.divergence is None else f"{text}, divergence {self.divergence:.2g} nats"


class _Output(NamedTuple):
    """One output of all batches: values [p, …] of each, and the squared deviation from their mean."""

    values: list[Tensor]
    deviation: float
    classes: bool


def output_tensors(outputs: Any) -> list[Tensor]:
    """What is measured of a model's result: its floating tensors; where there are none, all others."""
    tensors = [leaf.detach() for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return [t for t in tensors if t.is_floating_point()] or [t for t in tensors if not t.is_complex()]


class Reference:
    """The dense network's outputs on some batches, with which others are compared.

    Args:
        batches: the output tensors of each batch.
        processes: that measure together, each on batches of its own.
    """

    def __init__(self, batches: Sequence[Sequence[Tensor]], processes: Processes | None = None) -> None:
        self._processes = processes or Processes()
        count = max(map(len, batches), default=0)
        self.outputs = [_output([batch[i] for batch in batches if i < len(batch)]) for i in range(count)]

    def deviations(self) -> list[float]:
        """‖y − mean(y)‖² of each output, over the samples of all processes."""
        found = torch.tensor([output.deviation for output in self.outputs], dtype=torch.float64)
        return [float(value) for value in self._processes.sum(found)]

    def measure(self, batches: Sequence[Sequence[Tensor]]) -> OutputError:
        """The error of these outputs, of the same batches in the same order."""
        wrong, diverged = [], []
        for i, output in enumerate(self.outputs):
            pairs = list(zip(output.values, [batch[i] for batch in batches if i < len(batch)], strict=False))
            same = len(pairs) == len(output.values) and all(y.shape == t.shape for y, t in pairs)
            wrong.append(sum(_squares(y, t) for y, t in pairs) if same else float("inf"))
            found = [_divergence(y, t) for y, t in pairs] if same and output.classes else [(0.0, 0)]
            diverged.append((sum(total for total, _ in found), sum(rows for _, rows in found)))
        sums = self._processes.sum(torch.tensor([*wrong, *sum(diverged, ())], dtype=torch.float64)).tolist()
        count = len(wrong)
        errors = tuple(w / max(d, 1e-30) if w else 0.0 for w, d in zip(sums[:count], self.deviations(), strict=True))
        nats = [total / rows for total, rows in zip(sums[count::2], sums[count + 1 :: 2], strict=True) if rows]
        return OutputError(errors, max(nats) if nats else None)


def _output(values: Sequence[Tensor]) -> _Output:
    kept = [value.clone() for value in values]
    flat = [torch.nan_to_num(value.double(), nan=0.0, posinf=0.0, neginf=0.0) for value in kept]
    first = flat[0]
    alike = first.dim() > 0 and all(value.shape[1:] == first.shape[1:] for value in flat)
    samples = sum(value.shape[0] for value in flat) if alike else 0
    classes = alike and first.dim() == 2 and first.shape[1] >= FEWEST_CLASSES
    if samples >= SAMPLES:
        joined = torch.cat(flat)
        return _Output(kept, float((joined - joined.mean(0)).square().sum()), classes)
    # The mean over few samples is near to each of them: that of channels, over pixels, says how far values spread.
    return _Output(kept, sum(_spread(value) for value in flat), classes)


def _spread(value: Tensor) -> float:
    rest = [d for d in range(value.dim()) if d != 1] if value.dim() > 2 else list(range(value.dim()))
    return float((value - value.mean(rest, keepdim=True)).square().sum()) if rest and value.numel() else 0.0


def _squares(y: Tensor, t: Tensor) -> float:
    """‖y − t‖², of which equal values, infinite ones too, are no part; infinite where one is no finite number."""
    wrong = torch.where((y == t) | (y.isnan() & t.isnan()), 0.0, (y.double() - t.double()).abs())
    return float(torch.nan_to_num(wrong, nan=float("inf")).square().sum())


def _divergence(y: Tensor, t: Tensor) -> tuple[float, int]:
    """Σ KL(softmax(y) ‖ softmax(t)) over rows, and their number; outputs that are shares of one already are taken so."""
    p, q = y.double(), t.double()
    if bool((p >= 0).all()) and torch.allclose(p.sum(1), p.new_ones(()), atol=1e-3):
        p, q = p.clamp(min=1e-12).log(), q.clamp(min=1e-12).log()
    p, q = p.log_softmax(1), q.log_softmax(1)
    found = float((p.exp() * (p - q)).nan_to_num(nan=float("inf")).sum())
    return max(found, 0.0), y.shape[0]
