"""Bytes and operations of whole networks, counted: what the model says of layers that are small enough to count by hand."""

import pytest

from lcnn_compile.bench.gpu.model import Ceilings, Step, alone, cannot_win, chain_steps, dense_steps, middle_of_block

H100, H200 = Ceilings(2.4e12, 7.8e14), Ceilings(4.3e12, 7.8e14)
PIXELS = 2 * 56 * 56


def test_a_pair_by_hand():
    """Dense: two convolutions, two passes. Chained: S alone, S to S, S to the output."""
    dense, chained = dense_steps("pair 64@56", 2), chain_steps("pair 64@56", 2)
    conv = Step("64->64@56 3x3", 2 * PIXELS * 64 * 64 * 9, 2 * (128 * PIXELS + 64 * 64 * 9), 2 * 128 * PIXELS, written=64)
    assert dense == [conv, conv]
    assert [step.name for step in chained] == ["64->16@56 1x1", "16->64@56 3x3 +16, no output", "16->64@56 3x3"]
    assert chained[1].flop == 2 * PIXELS * 64 * (16 * 9 + 16)
    assert chained[1].bytes == 2 * (32 * PIXELS + 16 * 9 * 64 + 64 * 16)
    assert [step.written for step in chained] == [16, 16, 64]


def test_the_middle_of_a_block_moves_a_quarter():
    dense, chained = middle_of_block()
    assert chained <= 0.4 * dense


def test_time_is_that_of_the_tighter_bound():
    step = Step("", 780, 480, 240)
    assert step.seconds(Ceilings(240.0, 780.0)) == 2.0
    assert step.seconds(Ceilings(240.0, 78.0)) == 10.0
    assert step.seconds(Ceilings(240.0, 780.0), apart=True) == 3.0


@pytest.mark.parametrize(
    ("ceilings", "names"), [(H100, ["64->64@56 3x3", "64->128@28 3x3/2", "128->256@14 3x3/2"]), (H200, ["64->128@28 3x3/2"])]
)
def test_narrow_layers_cannot_win_alone_where_memory_is_slow(ceilings, names):
    steps = dense_steps("resnet18", 64)
    assert cannot_win(steps, ceilings) == names
    product, lookups = alone(next(step for step in steps if step.name == "64->128@28 3x3/2"))
    assert product.bytes == 2 * 64 * 56 * 56 * 80
    assert lookups.bytes == 2 * 64 * (56 * 56 * 16 + 28 * 28 * 128)


def test_whole_networks():
    """Every wide layer reads S; between blocks outputs stay, for somebody else reads them."""
    steps = chain_steps("resnet18", 2)
    assert sum(step.lookups for step in steps) == 16
    assert sum("no output" in step.name for step in steps) == 8
    assert sum(step.bytes for step in steps) < 0.5 * sum(s.bytes + s.pass_bytes for s in dense_steps("resnet18", 2))
