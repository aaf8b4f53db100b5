"""One layer: taps, coefficients and bias from a sample of its pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lcnn_compile.fitting.dictionary import Basis
from lcnn_compile.fitting.grouping import group_filters
from lcnn_compile.fitting.sampling import Sample, to_bfloat16
from lcnn_compile.fitting.taps import select_taps, solve_coefficients, spread_taps
from lcnn_compile.geometry import Geometry
from lcnn_compile.lookup import LookupWeight

MOST_OF_MEAN = 2.0  # no filter group gets more taps than this many times the mean
PRIOR = 1e-2  # weight of the dense solution against the sample, where S is white


@dataclass(frozen=True)
class Choice:
    """Filter groups and their taps.

    Attributes:
        filters: int64 [F, g], -1 for none.
        columns: int64 [F, T], columns of the problem's Gram matrix, best first.
        counts: int64 [F], how many of its columns each group uses.
    """

    filters: Tensor
    columns: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Problem:
    """The least-squares problem of one convolution group: outputs ≈ coefficients · patches of S.

    K columns are position-major: column = position·k + index.

    Attributes:
        gram: [K, K], centred second moments of the patches, with the prior.
        cross: [K, n/groups], centred moments of patches and outputs, with the prior.
        energy: [n/groups], second moments of the outputs, with the prior.
        weights: [n/groups], by which errors of the outputs count; ``cross`` and ``energy`` hold outputs times its root.
        patch_mean: [K].
        output_mean: [n/groups].
        held: patches [p, K] and outputs [p, n/groups] that measure the error; None without data.
        count: pixels that the moments are over.
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor
    weights: Tensor
    patch_mean: Tensor
    output_mean: Tensor
    held: tuple[Tensor, Tensor] | None
    count: int

    @classmethod
    def of(cls, sample: Sample | None, basis: Basis, group: int, *, whole: bool = False) -> Problem:
        """From a sample, whose patches have at least the basis's planes, or from the weight alone.

        The dense weight in terms of the basis is the solution that data may overrule. The moments are over the pixels that
        are not held out, or over the ``whole`` sample.
        """
        prior = basis.lookups[group].flatten(1).T
        weights = basis.weights[group]
        root = weights.sqrt()
        if sample is None:
            gram = torch.eye(prior.shape[0], dtype=prior.dtype, device=prior.device)
            zero = prior.new_zeros(prior.shape[0])
            energy = basis.energy[group] * weights
            return cls(gram, prior * root, energy, weights, zero, prior.new_zeros(prior.shape[1]), None, 0)
        k, filters = basis.size, prior.shape[1]
        patches = sample.patches[:, group, :, :k].flatten(1)
        outputs = sample.outputs[:, group * filters : (group + 1) * filters]
        split = bool(sample.held.any()) and not bool(sample.held.all())
        measures = sample.held if split else torch.ones_like(sample.held)
        fits = ~sample.held if split and not whole else torch.ones_like(sample.held)
        x, y = patches[fits], outputs[fits]
        patch_mean, output_mean = x.mean(0), y.mean(0)
        x, y = x - patch_mean, y - output_mean
        count = x.shape[0]
        gram, cross, energy = x.T @ x / count, x.T @ y / count, y.square().mean(0)
        weight = PRIOR * gram.diagonal().mean().clamp(min=1e-20)
        gram.diagonal().add_(weight)
        cross += weight * prior
        energy += weight * prior.square().sum(0)
        held = (patches[measures], outputs[measures])
        return cls(gram, cross * root, energy * weights, weights, patch_mean, output_mean, held, count)

    def choose(self, group_size: int, taps: int, *, even: bool) -> Choice:
        """Filter groups, and ``taps`` taps for each on average; the same number for all if ``even``."""
        filters = group_filters(self.profiles(), group_size)
        size = self.gram.shape[0]
        if taps == size:
            columns = torch.arange(size, device=filters.device).expand(filters.shape[0], -1)
            return Choice(filters, columns, columns.new_full(columns.shape[:1], size))
        most = taps if even else min(size, math.ceil(MOST_OF_MEAN * taps))
        selection = select_taps(self.gram, self.cross, self.energy, filters, most)
        counts = spread_taps(selection, self.group_energy(filters), (filters >= 0).sum(1), taps, even=even)
        return Choice(filters, selection.columns[:, : int(counts.max())], counts)

    def group_energy(self, filters: Tensor) -> Tensor:
        """Weighted second moments of the outputs of filter groups [F, g], summed over their filters: [F]."""
        return (self.energy[filters.clamp(min=0)] * (filters >= 0)).sum(1)

    def solve(self, choice: Choice) -> Tensor:
        """Coefficients [F, T, g] at the chosen taps."""
        scaled = solve_coefficients(self.gram, self.cross, choice.columns, choice.filters, choice.counts)
        return scaled / self.weights.sqrt()[choice.filters.clamp(min=0)][:, None, :]

    def rows(self, coefficients: Tensor, choice: Choice) -> Tensor:
        """Coefficients [F, T, g] at the chosen taps as a matrix [n/groups, K]."""
        columns, filters = choice.columns, choice.filters
        matrix = self.cross.new_zeros(self.cross.shape[1], self.cross.shape[0])
        for member in range(filters.shape[1]):
            real = filters[:, member] >= 0
            # Columns that a group does not use have the coefficient zero, and a group has no column twice.
            matrix[filters[real, member, None], columns[real]] = coefficients[real, :, member]
        return matrix

    def bias(self, matrix: Tensor) -> Tensor:
        """The bias that makes the means agree, [n/groups], for coefficients as ``rows`` gives them."""
        return self.output_mean - matrix @ self.patch_mean

    def held_error(self, matrix: Tensor, bias: Tensor) -> Tensor:
        """Squared errors on held-out pixels, and squared deviations of the outputs there from their means, [2, n/groups]."""
        if self.held is None:
            energy, cross = self.energy / self.weights, self.cross / self.weights.sqrt()
            missed = energy - cross.square().sum(0)
            return torch.stack([(cross.T - matrix).square().sum(1) + missed, energy])
        patches, outputs = self.held
        wrong = torch.addmm(bias - self.output_mean, patches, matrix.T) - (outputs - self.output_mean)
        return torch.stack([wrong.square().sum(0), _deviation(outputs)])

    def profiles(self) -> Tensor:
        """How much of each filter each column alone explains, [n/groups, K]; filters count by their share of the whole."""
        return (self.cross.T.square() / self.gram.diagonal()).sqrt()


def _deviation(outputs: Tensor) -> Tensor:
    """‖y - mean(y)‖² of each column of [p, n], at least what rounding leaves of constant outputs."""
    return (outputs - outputs.mean(0)).square().sum(0) + 1e-12 * outputs.square().sum(0)


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


def fit_layer(
    geometry: Geometry,
    basis: Basis,
    sample: Sample | None,
    taps: int,
    group_size: int,
    *,
    even: bool = True,
    rounded: bool = False,
) -> Fit:
    """Choose taps and coefficients for given sizes.

    Args:
        geometry: of the layer.
        basis: the dictionary and the dense weight in its terms.
        sample: patches of at least k planes, and outputs; None to approximate the weight alone.
        taps: of each filter, or on average over the filter groups of a convolution group unless ``even``.
        group_size: g.
        even: the same number of taps for all filters.
        rounded: coefficients count as rounded to bfloat16 in bias and error; they are returned as they are.
    """
    parts, biases, errors = [], [], torch.zeros(2, dtype=torch.float64)
    for group in range(geometry.groups):
        problem = Problem.of(sample, basis, group)
        choice = problem.choose(group_size, taps, even=even)
        coefficients = problem.solve(choice)
        matrix = problem.rows(to_bfloat16(coefficients) if rounded else coefficients, choice)
        bias = problem.bias(matrix)
        errors += problem.held_error(matrix, bias).double().sum(1).cpu()
        parts.append((choice, coefficients))
        biases.append(bias)
    return Fit(_assemble(geometry, basis.dictionary, parts), torch.cat(biases), float(errors[0] / errors[1].clamp(min=1e-30)))


def refit_layer(
    geometry: Geometry, basis: Basis, sample: Sample, weight: LookupWeight, *, rounded: bool = False
) -> tuple[LookupWeight, Tensor]:
    """The coefficients and bias [n] that the whole sample asks for at the taps of ``weight``, in float32.

    Args:
        geometry: of the layer.
        basis: whose dictionary the weight has.
        sample: as for :func:`fit_layer`.
        weight: as :func:`fit_layer` made it.
        rounded: the bias is for coefficients rounded to bfloat16.
    """
    parts, biases = [], []
    for group in range(geometry.groups):
        problem = Problem.of(sample, basis, group, whole=True)
        choice = _choice_of(weight, group, geometry)
        coefficients = problem.solve(choice)
        matrix = problem.rows(to_bfloat16(coefficients) if rounded else coefficients, choice)
        biases.append(problem.bias(matrix))
        parts.append((choice, coefficients))
    return _assemble(geometry, basis.dictionary, parts), torch.cat(biases)


def _choice_of(weight: LookupWeight, group: int, geometry: Geometry) -> Choice:
    """The filter groups of one convolution group and their taps: what :func:`_assemble` was given."""
    count = weight.filters.shape[0] // geometry.groups
    rows = slice(group * count, (group + 1) * count)
    counts = weight.offsets.diff().long()[rows]
    places = torch.arange(int(counts.max()), device=counts.device)
    used = places < counts[:, None]
    taps = torch.where(used, weight.offsets[rows, None].long() + places, 0)
    # What a filter group does not use is never looked at, but has to be another column than those that it uses.
    columns = (weight.positions.long() * weight.dictionary_size + weight.indices.long())[taps]
    filters = weight.filters[rows].long()
    filters = torch.where(filters >= 0, filters - group * geometry.filters, filters)
    return Choice(filters, _distinct(columns, used, weight.dictionary_size * geometry.area), counts)


def _distinct(columns: Tensor, used: Tensor, size: int) -> Tensor:
    """The same columns where they are ``used``; elsewhere others of the ``size``, so that no row has one twice."""
    taken = torch.zeros(columns.shape[0], size, dtype=torch.bool, device=columns.device)
    taken.scatter_(1, torch.where(used, columns, columns[:, :1]), True)
    free = taken.to(torch.uint8).argsort(dim=1, stable=True)
    spare = (~used).long().cumsum(1) - 1
    return torch.where(used, columns, free.gather(1, spare.clamp(min=0)))


def _assemble(geometry: Geometry, dictionary: Tensor, parts: list[tuple[Choice, Tensor]]) -> LookupWeight:
    """The convolution groups one after the other; the taps of a filter group in the order of dictionary vectors."""
    size, area = dictionary.shape[1], geometry.area
    indices, positions, values, counts, tables = [], [], [], [], []
    for number, (choice, coefficients) in enumerate(parts):
        index, position = choice.columns % size, choice.columns // size
        used = torch.arange(index.shape[1], device=index.device) < choice.counts[:, None]
        order = torch.where(used, index * area + position, size * area).argsort(dim=1)
        used = used.gather(1, order)
        indices.append(index.gather(1, order)[used])
        positions.append(position.gather(1, order)[used])
        values.append(coefficients.gather(1, order[:, :, None].expand_as(coefficients))[used])
        counts.append(choice.counts)
        tables.append(torch.where(choice.filters >= 0, choice.filters + number * geometry.filters, choice.filters))
    ends = torch.cat(counts).cumsum(0)
    return LookupWeight(
        dictionary=dictionary.contiguous(),
        coefficients=torch.cat(values).contiguous(),
        indices=torch.cat(indices).to(torch.int32),
        positions=torch.cat(positions).to(torch.int32),
        offsets=torch.cat([ends.new_zeros(1), ends]).to(torch.int32),
        filters=torch.cat(tables).to(torch.int32),
        kernel_size=geometry.kernel_size,
    )


def fit_lossless(
    geometry: Geometry, weight: Tensor, bias: Tensor, sample: Sample | None, group_size: int, *, rounded: bool = False
) -> Fit:
    """The dense weight [n, m/groups, kh, kw] itself as lookups, measured on a sample of its input's patches.

    Where it is ``rounded``, it is measured as bfloat16.
    """
    wrong = total = 0.0
    if sample is not None:
        measured = sample.held if sample.held.any() else torch.ones_like(sample.held)
        values = to_bfloat16(weight.float()) if rounded else weight.float()
        grouped = values.unflatten(0, (geometry.groups, -1)).flatten(3).transpose(2, 3)
        answers = torch.einsum("pgrm,gnrm->pgn", sample.patches[measured], grouped).flatten(1) + bias
        outputs = sample.outputs[measured]
        wrong = float((answers - outputs).square().sum())
        total = float(_deviation(outputs).sum())
    lossless = LookupWeight.lossless(weight, groups=geometry.groups, group_size=group_size)
    return Fit(lossless, bias, wrong / max(total, 1e-30))
