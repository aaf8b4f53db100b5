"""Dictionaries by principal components in the space that the layer's inputs weigh."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lcnn_compile.fitting.statistics import GRAM_CHANNELS, InputMoments
from lcnn_compile.geometry import Geometry

RIDGE = 1e-5  # of the mean channel variance, added to the moment so that unused directions stay bounded
MEAN_SHARE = 0.05  # how much of the inputs' mean counts: a bias absorbs it, except where zero padding cuts it


@dataclass(frozen=True)
class Basis:
    """A dictionary, and the dense weight in its terms.

    Attributes:
        dictionary: D, [groups, k, m/groups], float32.
        lookups: P of the dense weight's projection, [groups, n/groups, kh·kw, k], float32.
        energy: squared norms of the dense filters, [groups, n/groups], float32.
        weights: by which errors of the filters' outputs count, [groups, n/groups], float32.
    """

    dictionary: Tensor
    lookups: Tensor
    energy: Tensor
    weights: Tensor

    @property
    def size(self) -> int:
        """k."""
        return self.dictionary.shape[1]

    def first(self, size: int) -> Basis:
        """The best dictionary of ``size`` vectors."""
        return Basis(self.dictionary[:, :size], self.lookups[..., :size], self.energy, self.weights)


def most_vectors(geometry: Geometry) -> int:
    """The largest dictionary that makes sense: the filters of a convolution group span no more directions."""
    return min(geometry.channels, geometry.filters * geometry.area)


def fit_dictionary(
    weight: Tensor, geometry: Geometry, size: int, moments: InputMoments | None, weights: Tensor | None = None
) -> Basis:
    """The dictionary that minimises ‖diag(weights)^½·(W − P·D)·G^½‖, G the second moment of the inputs (None: the identity).

    The first k of the ``size`` vectors are the best dictionary of k vectors, and for these inputs S = D ∗ x is white.

    Args:
        weight: [n, m/groups, kh, kw].
        geometry: of the layer.
        size: vectors wanted, at most :func:`most_vectors`.
        moments: of the layer's inputs.
        weights: [n], > 0, by which errors of each filter's output count; None for all alike.
    """
    rows = weight.detach().float().unflatten(0, (geometry.groups, -1)).flatten(3).transpose(2, 3)
    energy = rows.square().sum((2, 3))
    weights = torch.ones_like(energy) if weights is None else weights.to(energy).view_as(energy)
    root = weights.sqrt()[:, :, None, None]
    rows = rows * root
    covariance = mean = sample = None
    if moments is not None:
        mean = moments.mean()
        if moments.streams_gram:
            covariance = moments.covariance()
        else:
            sample = moments.centred_rows()
    pairs = []
    for i in range(geometry.groups):
        flat = rows[i].reshape(-1, geometry.channels)
        if sample is not None:
            pairs.append(_from_rows(flat, sample[i], size))
        elif covariance is not None and mean is not None:
            pairs.append(_from_moment(flat, covariance[i] + MEAN_SHARE * torch.outer(mean[i], mean[i]), size))
        elif geometry.channels <= GRAM_CHANNELS:
            pairs.append(_from_moment(flat, None, size))
        else:
            pairs.append(_from_rows(flat, flat[:0], size))
    dictionary = torch.stack([d for d, _ in pairs]).float()
    lookups = torch.stack([p for _, p in pairs]).float()
    lookups = lookups.view(geometry.groups, geometry.filters, geometry.area, size) / root
    return Basis(dictionary, lookups, energy, weights)


def _from_moment(rows: Tensor, moment: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """Principal components of rows·G^½, taken back by G^-½."""
    rows = rows.double()
    if moment is None:
        moment = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp(min=0) + RIDGE * values.clamp(min=0).mean().clamp(min=1e-30)
    root = (vectors * values.sqrt()) @ vectors.T
    weighed = rows @ root
    basis = torch.linalg.eigh(weighed.T @ weighed).eigenvectors.flip(1)[:, :size]
    return basis.T @ ((vectors / values.sqrt()) @ vectors.T), weighed @ basis


def _from_rows(rows: Tensor, sample: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The same from fewer pixels than channels: principal components of the outputs, then of what no pixel has shown."""
    if size == rows.shape[0]:
        return rows, torch.eye(size, dtype=rows.dtype, device=rows.device)
    outputs = (sample @ rows.T) / max(1, sample.shape[0]) ** 0.5
    values, left = (t.to(rows) for t in torch.linalg.eigh((outputs @ outputs.T).double()))
    seen = values.flip(0) > RIDGE * values.sum()
    values, left = values.flip(0)[seen][:size], left.flip(1)[:, seen][:, :size]
    basis = (outputs.T @ left) / values.sqrt()
    scale = values.sqrt()
    if basis.shape[1] < size:
        rest = rows - basis @ (basis.T @ rows)
        extra = _range(rest, size - basis.shape[1])
        basis = torch.linalg.qr(torch.cat([basis, extra], 1)).Q
        floor = scale[-1] * RIDGE**0.5 if scale.numel() else torch.ones((), dtype=rows.dtype, device=rows.device)
        scale = torch.cat([scale, floor.expand(size - scale.numel())])
    return (basis.T @ rows) / scale[:, None], basis * scale


def _range(matrix: Tensor, size: int) -> Tensor:
    """An orthonormal basis of the main column space, by randomised subspace iteration."""
    generator = torch.Generator().manual_seed(0)
    wider = min(size + 8, *matrix.shape)
    probe = torch.randn(matrix.shape[1], wider, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis = torch.linalg.qr(matrix @ probe).Q
    basis = torch.linalg.qr(matrix @ (matrix.T @ basis)).Q
    inside = basis.T @ matrix
    vectors = torch.linalg.eigh((inside @ inside.T).double()).eigenvectors.flip(1)[:, :size]
    return basis @ vectors.to(basis)
