"""Calibration data spread over the processes of a torch.distributed group: sums and samples become those of all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lcnn_compile.errors import ConversionError


class Processes:
    """The processes that calibrate together, every one of which must make the same calls; or this one alone."""

    def __init__(self, together: bool = False) -> None:
        if together and not (dist.is_available() and dist.is_initialized()):
            raise ConversionError("distributed=True needs torch.distributed.init_process_group, as torchrun's scripts call it")
        self.count = dist.get_world_size() if together else 1

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, of the value's dtype and shape."""
        if self.count > 1:
            value = value.contiguous().clone()
            dist.all_reduce(value)
        return value

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes one after the other, [p, …]; all dimensions but the first agree."""
        if self.count == 1:
            return rows
        lengths = torch.zeros(self.count, dtype=torch.int64, device=rows.device)
        lengths[dist.get_rank()] = rows.shape[0]
        dist.all_reduce(lengths)
        longest = int(lengths.max())
        padded = rows.new_zeros(longest, *rows.shape[1:], dtype=torch.uint8 if rows.dtype == torch.bool else None)
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths.tolist(), strict=True)]).to(rows.dtype)

    def order(self, names: Sequence[str]) -> list[str]:
        """The names that any process has, in the order of the first process that has them."""
        if self.count == 1:
            return list(names)
        found: list[list[str]] = [[] for _ in range(self.count)]
        dist.all_gather_object(found, list(names))
        return list(dict.fromkeys(name for part in found for name in part))
