"""One layer: taps, coefficients and bias from a sample of its pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lcnn_compile.geometry import Geometry
from lcnn_compile.learning.dictionary import Basis
from lcnn_compile.learning.grouping import group_filters
from lcnn_compile.learning.sampling import Sample
from lcnn_compile.learning.taps import select_taps, solve_coefficients
from lcnn_compile.lookup import LookupWeight

PRIOR = 1e-2  # weight of the dense solution against the sample, where S is white


@dataclass(frozen=True)
class Problem:
    """The least-squares problem of one convolution group: outputs ≈ coefficients · patches of S.

    K columns are position-major: column = position·k + index.

    Attributes:
        gram: [K, K], centred second moments of the patches, with the prior.
        cross: [K, n/groups], centred moments of patches and outputs, with the prior.
        energy: [n/groups], second moments of the outputs, with the prior.
        patch_mean: [K].
        output_mean: [n/groups].
        held: patches [p, K] and outputs [p, n/groups] that measure the error; None without data.
        count: pixels that the moments are over.
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor
    patch_mean: Tensor
    output_mean: Tensor
    held: tuple[Tensor, Tensor] | None
    count: int

    @classmethod
    def of(cls, sample: Sample | None, basis: Basis, group: int) -> Problem:
        """From a sample, whose patches have at least the basis's planes, or from the weight alone.

        The dense weight in terms of the basis is the solution that data may overrule.
        """
        prior = basis.lookups[group].flatten(1).T
        if sample is None:
            gram = torch.eye(prior.shape[0], dtype=prior.dtype, device=prior.device)
            zero = prior.new_zeros(prior.shape[0])
            return cls(gram, prior, basis.energy[group], zero, prior.new_zeros(prior.shape[1]), None, 0)
        k, filters = basis.size, prior.shape[1]
        patches = sample.patches[:, group, :, :k].flatten(1)
        outputs = sample.outputs[:, group * filters : (group + 1) * filters]
        measures = sample.held if sample.held.any() and not sample.held.all() else torch.ones_like(sample.held)
        fits = ~sample.held if sample.held.any() and not sample.held.all() else measures
        x, y = patches[fits], outputs[fits]
        patch_mean, output_mean = x.mean(0), y.mean(0)
        x, y = x - patch_mean, y - output_mean
        count = x.shape[0]
        gram, cross, energy = x.T @ x / count, x.T @ y / count, y.square().mean(0)
        weight = PRIOR * gram.diagonal().mean().clamp(min=1e-20)
        gram.diagonal().add_(weight)
        cross += weight * prior
        energy += weight * prior.square().sum(0)
        return cls(gram, cross, energy, patch_mean, output_mean, (patches[measures], outputs[measures]), count)

    def rows(self, coefficients: Tensor, columns: Tensor, filters: Tensor) -> Tensor:
        """Coefficients [F, T, g] at columns [F, T] as a matrix [n/groups, K]."""
        matrix = self.cross.new_zeros(self.cross.shape[1], self.cross.shape[0])
        for member in range(filters.shape[1]):
            real = filters[:, member] >= 0
            matrix[filters[real, member, None], columns[real]] = coefficients[real, :, member]
        return matrix

    def bias(self, matrix: Tensor) -> Tensor:
        """The bias that makes the means agree, [n/groups], for coefficients as ``rows`` gives them."""
        return self.output_mean - matrix @ self.patch_mean

    def held_error(self, matrix: Tensor, bias: Tensor) -> tuple[float, float]:
        """Squared error on held-out pixels, and the squared deviation of the outputs there from their mean."""
        if self.held is None:
            missed = self.energy.sum() - self.cross.square().sum()
            return float((self.cross.T - matrix).square().sum() + missed), float(self.energy.sum())
        patches, outputs = self.held
        wrong = torch.addmm(bias - self.output_mean, patches, matrix.T) - (outputs - self.output_mean)
        return float(wrong.square().sum()), _deviation(outputs)

    def profiles(self) -> Tensor:
        """How much of each filter each column alone explains, [n/groups, K]; filters count by their share of the whole."""
        return (self.cross.T.square() / self.gram.diagonal()).sqrt()


def _deviation(outputs: Tensor) -> float:
    """‖y - mean(y)‖² of [p, n], at least what rounding leaves of constant outputs."""
    return float((outputs - outputs.mean(0)).square().sum() + 1e-12 * outputs.square().sum())


@dataclass(frozen=True)
class Fit:
    """A layer as lookups.

    Attributes:
        weight: in float32.
        bias: [n]; None for none.
        error: relative output error on held-out pixels, or of the weight without data.
    """

    weight: LookupWeight
    bias: Tensor | None
    error: float


def fit_layer(geometry: Geometry, basis: Basis, sample: Sample | None, taps: int, group_size: int) -> Fit:
    """Choose taps and coefficients for given sizes.

    Args:
        geometry: of the layer.
        basis: the dictionary and the dense weight in its terms.
        sample: patches of at least k planes, and outputs; None to approximate the weight alone.
        taps: of each filter.
        group_size: g.
    """
    size = basis.size
    parts, biases = [], []
    wrong = total = 0.0
    for group in range(geometry.groups):
        problem = Problem.of(sample, basis, group)
        filters = group_filters(problem.profiles(), group_size)
        if taps == size * geometry.area:
            columns = torch.arange(taps, device=filters.device).expand(filters.shape[0], -1)
        else:
            columns = select_taps(problem.gram, problem.cross, problem.energy, filters, taps).columns
        index, position = columns % size, columns // size
        order = (index * geometry.area + position).argsort(dim=1)
        columns = columns.gather(1, order)
        coefficients = solve_coefficients(problem.gram, problem.cross, columns, filters)
        matrix = problem.rows(coefficients, columns, filters)
        bias = problem.bias(matrix)
        error, energy = problem.held_error(matrix, bias)
        wrong, total = wrong + error, total + energy
        parts.append((columns % size, columns // size, coefficients, filters, group * geometry.filters))
        biases.append(bias)
    return Fit(_assemble(geometry, basis.dictionary, parts), torch.cat(biases), wrong / max(total, 1e-30))


def _assemble(geometry: Geometry, dictionary: Tensor, parts: list[tuple[Tensor, Tensor, Tensor, Tensor, int]]) -> LookupWeight:
    """The convolution groups one after the other; each has as many filter groups and taps."""
    indices = torch.cat([index.flatten() for index, *_ in parts])
    positions = torch.cat([position.flatten() for _, position, *_ in parts])
    coefficients = torch.cat([c.flatten(0, 1) for _, _, c, _, _ in parts])
    filters = torch.cat([torch.where(table >= 0, table + start, table) for *_, table, start in parts])
    taps = parts[0][0].shape[1]
    return LookupWeight(
        dictionary=dictionary.contiguous(),
        coefficients=coefficients.contiguous(),
        indices=indices.to(torch.int32),
        positions=positions.to(torch.int32),
        offsets=(torch.arange(filters.shape[0] + 1, device=filters.device) * taps).to(torch.int32),
        filters=filters.to(torch.int32),
        kernel_size=geometry.kernel_size,
    )


def fit_lossless(geometry: Geometry, weight: Tensor, bias: Tensor, sample: Sample | None, group_size: int) -> Fit:
    """The dense weight [n, m/groups, kh, kw] itself as lookups, measured on a sample of its input's patches."""
    wrong = total = 0.0
    if sample is not None:
        measured = sample.held if sample.held.any() else torch.ones_like(sample.held)
        grouped = weight.float().unflatten(0, (geometry.groups, -1)).flatten(3).transpose(2, 3)
        answers = torch.einsum("pgrm,gnrm->pgn", sample.patches[measured], grouped).flatten(1) + bias
        outputs = sample.outputs[measured]
        wrong = float((answers - outputs).square().sum())
        total = _deviation(outputs)
    lossless = LookupWeight.lossless(weight, groups=geometry.groups, group_size=group_size)
    return Fit(lossless, bias, wrong / max(total, 1e-30))
