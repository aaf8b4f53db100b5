"""Tap selection and coefficients against brute force in float64."""

import pytest
import torch

from lcnn_compile.fitting.grouping import group_filters
from lcnn_compile.fitting.taps import cholesky, select_taps, solve_coefficients, spread_rest, spread_taps


def problem(columns=20, outputs=5, rows=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64) @ (mix + 3 * torch.eye(columns))
    y = x @ torch.randn(columns, outputs, generator=generator, dtype=torch.float64) + torch.randn(
        rows, outputs, generator=generator, dtype=torch.float64
    )
    return x, y


def naive_selection(x, y, taps):
    """Greedy: at each step the column whose addition leaves the least squared error of a full least-squares fit."""
    chosen, errors = [], []
    for _ in range(taps):
        rest = {}
        for column in set(range(x.shape[1])) - set(chosen):
            part = x[:, [*chosen, column]]
            rest[column] = float((y - part @ torch.linalg.lstsq(part, y).solution).square().sum())
        chosen.append(min(rest, key=rest.get))
        errors.append(rest[chosen[-1]])
    return chosen, errors


@pytest.mark.parametrize("filters", [[[0, 1, 2, 3, 4]], [[0], [1], [2], [3], [4]], [[0, 3, 1], [2, 4, -1]]])
def test_selection_is_greedy_least_squares(filters):
    x, y = problem()
    selection = select_taps(x.T @ x, x.T @ y, y.square().sum(0), torch.tensor(filters), 12)
    assert selection.counts.tolist() == list(range(1, 13))
    for row, members in enumerate(filters):
        columns, errors = naive_selection(x, y[:, [m for m in members if m >= 0]], 12)
        assert selection.columns[row].tolist() == columns
        torch.testing.assert_close(selection.rest[:, row].tolist(), errors, rtol=1e-4, atol=0)


def test_chunks_of_filter_groups_change_nothing(monkeypatch):
    x, y = problem(outputs=7)
    arguments = (x.T @ x, x.T @ y, y.square().sum(0), torch.arange(7)[:, None], 10)
    whole = select_taps(*arguments)
    monkeypatch.setattr("lcnn_compile.fitting.taps.WORK_ELEMENTS", 400)
    parts = select_taps(*arguments)
    assert torch.equal(whole.columns, parts.columns)
    torch.testing.assert_close(whole.rest, parts.rest)


def test_blocks_of_many_taps_stay_close_to_greedy_and_never_repeat():
    x, y = problem(columns=200, outputs=4, rows=1000)
    selection = select_taps(x.T @ x, x.T @ y, y.square().sum(0), torch.tensor([[0, 1], [2, 3]]), 200)
    assert (selection.columns.sort(1).values == torch.arange(200)).all()
    assert (selection.rest.diff(dim=0) <= 1e-6 * selection.rest[0]).all()
    assert selection.counts[-1] == 200
    full = (y - x @ torch.linalg.lstsq(x, y).solution).square().sum(0)
    torch.testing.assert_close(selection.rest[-1], torch.stack([full[:2].sum(), full[2:].sum()]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("taps", [4, 20])
def test_coefficients_are_least_squares(taps):
    x, y = problem()
    filters = torch.tensor([[0, 3, 1], [2, 4, -1]])
    columns = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(i))[:taps] for i in range(2)])
    found = solve_coefficients(x.T @ x, x.T @ y, columns, filters, torch.tensor([columns.shape[1]] * len(filters)))
    for row, members in enumerate(filters.tolist()):
        for place, member in enumerate(members):
            wanted = torch.linalg.lstsq(x[:, columns[row]], y[:, [member]]).solution[:, 0]
            torch.testing.assert_close(found[row, :, place], wanted if member >= 0 else torch.zeros(taps).double())


def test_dependent_columns_are_survived():
    x, y = problem(columns=10)
    x = torch.cat([x, x[:, :5]], 1).float()
    gram, cross = x.T @ x, x.T @ y.float()
    selection = select_taps(gram, cross, y.float().square().sum(0), torch.arange(5)[:, None], 15)
    coefficients = solve_coefficients(
        gram, cross, selection.columns, torch.arange(5)[:, None], torch.full((5,), selection.columns.shape[1])
    )
    assert selection.rest.isfinite().all()
    assert coefficients.isfinite().all()
    fitted = torch.stack([x[:, c] @ v[:, 0] for c, v in zip(selection.columns, coefficients, strict=True)], 1)
    best = x[:, :10].double() @ torch.linalg.lstsq(x[:, :10].double(), y).solution
    assert (fitted - y).square().sum() <= 1.01 * (best - y).square().sum()


def test_cholesky_of_zero_and_of_a_batch():
    square = torch.stack([torch.zeros(3, 3), torch.eye(3)]).double()
    factor = cholesky(square)
    assert factor.isfinite().all()
    torch.testing.assert_close(factor[1] @ factor[1].T, torch.eye(3).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("n", "size"), [(8, 4), (10, 4), (7, 1), (3, 8)])
def test_groups_hold_every_filter_once_and_only_the_last_is_smaller(n, size):
    profiles = torch.rand(n, 12, generator=torch.Generator().manual_seed(0))
    table = group_filters(profiles, size)
    assert table[table >= 0].sort().values.tolist() == list(range(n))
    assert table.shape == (-(-n // min(size, n)), min(size, n))
    assert (table[:-1] >= 0).all()


def test_groups_put_like_filters_together():
    kinds = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2])
    noise = torch.rand(12, 9, generator=torch.Generator().manual_seed(0)) * 0.1
    table = group_filters(torch.eye(3).repeat(1, 3)[kinds] + noise, 4)
    assert all(len(set(kinds[row].tolist())) == 1 for row in table)


def test_coefficients_of_groups_with_different_numbers_of_taps():
    x, y = problem()
    filters = torch.tensor([[0, 3], [2, 4], [1, -1]])
    columns = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(i))[:8] for i in range(3)])
    counts = torch.tensor([8, 3, 5])
    found = solve_coefficients(x.T @ x, x.T @ y, columns, filters, counts)
    for row in range(3):
        used = x[:, columns[row, : counts[row]]]
        members = [m for m in filters[row].tolist() if m >= 0]
        wanted = torch.linalg.lstsq(used, y[:, members]).solution
        torch.testing.assert_close(found[row, : counts[row], : len(members)], wanted, rtol=1e-5, atol=1e-6)
        assert not found[row, counts[row] :].any()
    assert not found[2, :, 1].any()


def test_taps_go_where_they_lower_the_error_most():
    x, y = problem(outputs=6)
    y = y * torch.tensor([10.0, 1.0, 0.1, 3.0, 0.3, 1.0])
    filters = torch.tensor([[0, 1], [2, 4], [3, 5]])
    energy = y.square().sum(0)
    selection = select_taps(x.T @ x, x.T @ y, energy, filters, 12)
    totals, members = energy[filters].sum(1), torch.tensor([2, 2, 2])
    counts = spread_taps(selection, totals, members, 5)
    assert counts.sum() == 15
    rest = torch.cat([totals[None], selection.rest])

    def left(numbers):
        return float(sum(rest[n, group] for group, n in enumerate(numbers)))

    every = [(a, b, 15 - a - b) for a in range(1, 13) for b in range(1, 13) if 1 <= 15 - a - b <= 12]
    assert left(counts.tolist()) <= 1.05 * min(left(numbers) for numbers in every)
    assert left(counts.tolist()) < 0.8 * left((5, 5, 5))
    assert counts[1] == counts.min()
    assert spread_rest(selection, totals, members, [5])[0] == pytest.approx(left(counts.tolist()), rel=1e-6)
    assert spread_taps(selection, totals, members, 5, even=True).tolist() == [5, 5, 5]
    assert spread_rest(selection, totals, members, [5], even=True)[0] == pytest.approx(left((5, 5, 5)), rel=1e-6)
