"""Parts of a batch: its first samples, where its tensors all count samples in their first dimension."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lcnn_compile.torch_private import pytree


def row_count(batch: Any) -> int:
    """Samples in a batch whose tensors all have the same first dimension, over two or more; else 0: it is one piece."""
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    if not tensors or any(t.dim() < 2 or t.shape[:1] != tensors[0].shape[:1] for t in tensors):
        return 0
    return tensors[0].shape[0]


def first_rows(batch: Any, stop: int, start: int = 0) -> Any:
    """Samples ``start`` to ``stop`` of a batch; one that is one piece as it is."""
    if not row_count(batch):
        return batch
    return rows_of(batch, start, stop)


def rows_of(batch: Any, start: int, stop: int) -> Any:
    """The same entries of the first dimension of every tensor in a batch."""
    return pytree.tree_map_only(Tensor, lambda t: t[start:stop], batch)
