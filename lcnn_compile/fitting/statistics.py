"""Streaming second moments of a layer's inputs: one pass, memory bounded whatever the number of batches."""

from __future__ import annotations

import torch
from torch import Tensor

from lcnn_compile.fitting.processes import Processes
from lcnn_compile.geometry import Geometry

GRAM_CHANNELS = 2048  # up to here a Gram matrix of the channels is kept, beyond it a bounded sample of rows
ROW_ELEMENTS = 1 << 26  # size of that sample


class InputMoments:
    """Mean and second moment of the channels that each convolution group reads, over all pixels of all calls.

    Attributes:
        calls: calls seen.
        images: images in them.
        in_pixels: input pixels in them.
        out_pixels: output pixels in them.
        count: pixels that entered the moments; inputs that are one constant do not.
    """

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        self.geometry = geometry
        self.calls = self.images = self.in_pixels = self.out_pixels = self.count = 0
        self.seed = seed
        self._shift: Tensor | None = None
        self._sum: Tensor | None = None
        self._gram: Tensor | None = None
        self._rows: Tensor | None = None

    @property
    def streams_gram(self) -> bool:
        """Whether the Gram matrix itself is accumulated; else a sample of rows stands for it."""
        return self.geometry.channels <= GRAM_CHANNELS

    def update(self, x: Tensor) -> None:
        """Take one call's input, [N, m, H, W]."""
        high, wide = self.geometry.output_size(x.shape[2], x.shape[3])
        self.calls += 1
        self.images += x.shape[0]
        self.in_pixels += x.shape[0] * x.shape[2] * x.shape[3]
        self.out_pixels += x.shape[0] * high * wide
        if x.numel() == 0 or x.amin() == x.amax():
            return
        groups, channels = self.geometry.groups, self.geometry.channels
        pixels = x.transpose(0, 1).reshape(groups, channels, -1)
        if self._shift is None:
            # Moments about a point near the mean keep float32 products from cancelling.
            self._shift = pixels.mean(2, keepdim=True)
            self._sum = torch.zeros(groups, channels, dtype=torch.float64, device=x.device)
        assert self._sum is not None
        shifted = pixels - self._shift
        # About the mean float32 sums are exact enough, and many times faster.
        self._sum += shifted.sum(2).double()
        if self.streams_gram:
            gram = (shifted @ shifted.transpose(1, 2)).double()
            self._gram = gram if self._gram is None else self._gram.add_(gram)
        else:
            self._keep_rows(shifted.transpose(1, 2))
        self.count += pixels.shape[2]

    def _keep_rows(self, rows: Tensor) -> None:
        """Reservoir sampling of pixels: every pixel seen so far is kept with the same probability."""
        limit = max(64, ROW_ELEMENTS // self.geometry.in_channels)
        kept = rows[:, :0] if self._rows is None else self._rows
        free = limit - kept.shape[1]
        kept, rows = torch.cat([kept, rows[:, :free]], 1), rows[:, free:]
        if rows.shape[1]:
            generator = torch.Generator().manual_seed(self.seed + self.count)
            seen = self.count + free + torch.arange(1, rows.shape[1] + 1)
            place = (torch.rand(rows.shape[1], generator=generator, dtype=torch.float64) * seen).long()
            chosen = (place < limit).nonzero().flatten()
            kept[:, place[chosen].to(kept.device)] = rows[:, chosen.to(kept.device)]
        self._rows = kept

    def combine(self, processes: Processes) -> None:
        """Make these the moments over the inputs of all processes."""
        if processes.count == 1:
            return
        numbers = torch.tensor([self.calls, self.images, self.in_pixels, self.out_pixels, self.count])
        device = torch.device("cpu") if self._shift is None else self._shift.device
        total = processes.sum(numbers.to(device)).tolist()
        groups, channels = self.geometry.groups, self.geometry.channels
        sums = torch.zeros(groups, channels, dtype=torch.float64, device=device)
        if self._shift is not None:
            sums += self.count * self.mean()
        mean = processes.sum(sums) / max(1, total[4])
        shift = mean.float()
        if self.streams_gram:
            gram = torch.zeros(groups, channels, channels, dtype=torch.float64, device=device)
            if self._shift is not None:
                away = self.mean() - shift.double()
                gram += self.count * (self.covariance() + away[:, :, None] * away[:, None, :])
            gram = processes.sum(gram)
            self._gram = gram if total[4] else None
        else:
            rows = torch.zeros(0, groups, channels, device=device)
            if self._rows is not None and self._shift is not None:
                kept = self._rows[:, torch.randperm(self._rows.shape[1], generator=torch.Generator().manual_seed(self.seed))]
                kept = kept[:, : max(64, ROW_ELEMENTS // self.geometry.in_channels) // processes.count]
                rows = (kept + (self._shift[:, :, 0] - shift)[:, None]).transpose(0, 1)
            self._rows = processes.gather(rows).transpose(0, 1) if total[4] else None
        if total[4]:
            self._shift, self._sum = shift[:, :, None], total[4] * (mean - shift.double())
        self.calls, self.images, self.in_pixels, self.out_pixels, self.count = (int(n) for n in total)

    @property
    def degenerate(self) -> str:
        """Why nothing can be learned from these inputs; empty if something can."""
        if not self.calls:
            return "never called during calibration"
        if self._shift is None or self._sum is None:
            return "inputs are constant"
        if not torch.isfinite(self._sum).all():
            return "inputs are not finite"
        gram = self._gram if self._gram is not None else self._rows
        assert gram is not None
        if not torch.isfinite(gram).all():
            return "inputs are not finite"
        spread = self.covariance().diagonal(dim1=1, dim2=2).sum() if self.streams_gram else self.centred_rows().square().mean()
        return "" if spread > 1e-10 * self._shift.double().square().sum() else "inputs are constant"

    def mean(self) -> Tensor:
        """[groups, m/groups], float64."""
        assert self._shift is not None
        assert self._sum is not None
        return self._shift[:, :, 0].double() + self._sum / self.count

    def covariance(self) -> Tensor:
        """[groups, m/groups, m/groups], float64."""
        assert self._gram is not None
        assert self._sum is not None
        offset = self._sum / self.count
        return self._gram / self.count - offset[:, :, None] * offset[:, None, :]

    def centred_rows(self) -> Tensor:
        """The sample of pixels less its mean, [groups, pixels, m/groups], float32."""
        assert self._rows is not None
        return self._rows - self._rows.mean(1, keepdim=True)
