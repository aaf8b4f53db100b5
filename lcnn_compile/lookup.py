"""LookupWeight: the weight of a lookup convolution as dictionary, indices and coefficients.

The one data type that learning produces and modules, passes, checkpoints and kernels consume.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lcnn_compile.kernels import reference
from lcnn_compile.kernels.arguments import Weight
from lcnn_compile.kernels.checks import check_weight
from lcnn_compile.kernels.reference import filter_table

__all__ = ["LookupWeight", "filter_table"]


@dataclass(frozen=True, eq=False)
class LookupWeight:
    """A convolution weight W = P·D (LCNN, section 3.1), every tensor as in :mod:`lcnn_compile.kernels.reference`.

    Attributes:
        dictionary: D, [groups, k, m/groups], floating point.
        coefficients: C, [T, g], of the dictionary's dtype; zero in the columns of filters that do not exist.
        indices: int32 [T], dictionary vector of each tap, below k.
        positions: int32 [T], kernel position r·kw + c of each tap, below kh·kw.
        offsets: int32 [F + 1], first tap of each filter group; ascending from 0 to T.
        filters: int32 [F, g], output channels of each filter group, -1 for none; every channel exactly once.
        kernel_size: (kh, kw).
    """

    dictionary: Tensor
    coefficients: Tensor
    indices: Tensor
    positions: Tensor
    offsets: Tensor
    filters: Tensor
    kernel_size: tuple[int, int]

    @property
    def groups(self) -> int:
        """Convolution groups."""
        return self.dictionary.shape[0]

    @property
    def dictionary_size(self) -> int:
        """k, vectors in the dictionary of each convolution group."""
        return self.dictionary.shape[1]

    @property
    def in_channels(self) -> int:
        """m, over all convolution groups."""
        return self.dictionary.shape[0] * self.dictionary.shape[2]

    @property
    def out_channels(self) -> int:
        """n, over all convolution groups."""
        return int((self.filters >= 0).sum())

    @property
    def group_size(self) -> int:
        """g, filters that share one set of indices."""
        return self.filters.shape[1]

    @property
    def taps(self) -> int:
        """Multiply-adds of all filters at one output pixel; each tap counts once per filter that uses it."""
        members = (self.filters >= 0).sum(1)
        return int((members * self.offsets.diff()).sum())

    def operands(self) -> Weight:
        """The six tensors as kernels take them."""
        return Weight(self.dictionary, self.coefficients, self.indices, self.positions, self.offsets, self.filters)

    def tensors(self) -> dict[str, Tensor]:
        """The six tensors by name."""
        return self.operands()._asdict()

    def to(self, *args: object, **kwargs: object) -> LookupWeight:
        """As ``Tensor.to``; a dtype applies to dictionary and coefficients only."""
        moved = {name: getattr(self, name).to(*args, **kwargs) for name in ("dictionary", "coefficients")}
        device = moved["dictionary"].device
        rest = {name: getattr(self, name).to(device) for name in ("indices", "positions", "offsets", "filters")}
        return LookupWeight(**moved, **rest, kernel_size=self.kernel_size)

    def detach(self) -> LookupWeight:
        """The same weight without autograd history."""
        return LookupWeight(**{name: t.detach() for name, t in self.tensors().items()}, kernel_size=self.kernel_size)

    def lookup_tensor(self, out_channels: int | None = None) -> Tensor:
        """P, [n, k, kh, kw], dense; differentiable in the coefficients. With n given, it can be traced."""
        filters = self.out_channels if out_channels is None else out_channels
        return reference.lookup_tensor(*self.operands().lookups, filters, self.dictionary_size, self.kernel_size)

    def dense_weight(self, out_channels: int | None = None) -> Tensor:
        """W = P·D, [n, m/groups, kh, kw], contiguous; differentiable in dictionary and coefficients. With n given, it can be traced."""
        return reference.dense_weight(self.dictionary, self.lookup_tensor(out_channels))

    def macs(self, out_pixels: int = 1, in_pixels: int | None = None) -> int:
        """Multiply-adds for ``out_pixels`` output pixels, S being formed at ``in_pixels`` (the same number by default)."""
        dictionary = self.dictionary.numel() * (out_pixels if in_pixels is None else in_pixels)
        return dictionary + self.taps * out_pixels

    def nbytes(self) -> int:
        """Bytes of the six tensors as they are stored."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def permute_dictionary(self, order: Tensor) -> LookupWeight:
        """The same W with dictionary vector i taken from ``order[i]`` (int64 [k], a permutation)."""
        inverse = torch.argsort(order).to(self.indices)
        return replace(self, dictionary=self.dictionary[:, order], indices=inverse[self.indices.long()])

    def balanced(self) -> LookupWeight:
        """The same W with ‖D‖ and ‖C‖ at most a factor of two apart, to learn from.

        The gradient of each factor of P·D is as large as the other one, so that descent would throw the smaller about and
        leave the larger where it is. The factor between them is a power of two: nothing is rounded, short of
        underflow.
        """
        large, small = self.dictionary.double().norm(), self.coefficients.double().norm()
        exponent = ((small / large).log2() / 2).round()
        if not torch.isfinite(exponent):
            return self
        factor = float(exponent.exp2())
        return replace(self, dictionary=self.dictionary * factor, coefficients=self.coefficients / factor)

    @classmethod
    def from_lookup_tensor(
        cls, dictionary: Tensor, lookups: Tensor, *, group_size: int = 1, filters: Tensor | None = None
    ) -> LookupWeight:
        """Encode D [groups, k, m/groups] and P [n, k, kh, kw]; a filter group gets every tap that any of its filters uses.

        ``filters`` (as :func:`filter_table` makes them) defaults to consecutive filters in groups of ``group_size``.
        """
        n, k, kh, kw = lookups.shape
        if filters is None:
            filters = filter_table(n, group_size, dictionary.shape[0])
        filters = filters.to(lookups.device)
        member = (filters >= 0)[:, :, None]
        rows = lookups.reshape(n, k * kh * kw)[filters.clamp(min=0).long()] * member
        group, column = (rows != 0).any(1).nonzero(as_tuple=True)
        counts = torch.bincount(group, minlength=filters.shape[0])
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
        return cls(
            dictionary=dictionary,
            coefficients=rows[group, :, column].contiguous(),
            indices=(column // (kh * kw)).to(torch.int32),
            positions=(column % (kh * kw)).to(torch.int32),
            offsets=offsets,
            filters=filters,
            kernel_size=(kh, kw),
        )

    @classmethod
    def lossless(cls, weight: Tensor, *, groups: int = 1, group_size: int = 1) -> LookupWeight:
        """The dense ``weight`` [n, m/groups, kh, kw] itself: D the identity, P = W, no rounding at all."""
        n, m, kh, kw = weight.shape
        filters = filter_table(n, group_size, groups).to(weight.device)
        count, size = filters.shape
        column = torch.arange(m * kh * kw, device=weight.device, dtype=torch.int32).repeat(count)
        rows = weight.reshape(n, m * kh * kw)[filters.clamp(min=0).long()] * (filters >= 0)[:, :, None]
        return cls(
            dictionary=torch.eye(m, dtype=weight.dtype, device=weight.device).repeat(groups, 1, 1),
            coefficients=rows.transpose(1, 2).reshape(-1, size).contiguous(),
            indices=column // (kh * kw),
            positions=column % (kh * kw),
            offsets=(torch.arange(count + 1, device=weight.device) * (m * kh * kw)).to(torch.int32),
            filters=filters,
            kernel_size=(kh, kw),
        )

    def validate(self, name: str = "lookup weight") -> LookupWeight:
        """Check every invariant in the class's docstring and return self.

        Raises:
            WeightError: naming ``name``, the offending value and what is allowed.
        """
        check_weight(name, self.operands(), self.kernel_size)
        return self
