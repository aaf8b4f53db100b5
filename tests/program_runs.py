"""Running programs of steps in tests: on several threads, over memory that was poisoned before, and whole networks as one program."""

import copy
import math

import torch

from lcnn_compile import freeze


def on_threads(program, *inputs):
    """The results by one thread and by two; memory is poisoned before."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            program(*[torch.full_like(x, math.nan) for x in inputs])
            found.append(program(*inputs))
    finally:
        torch.set_num_threads(before)
    return found


def same_on_threads(program, *inputs):
    """The results, which must be the same bits by one thread and by two."""
    found = on_threads(program, *inputs)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    return found[0]


def assert_one_program(dense, model, x, atol):
    """``model`` freezes to one program that computes what ``dense`` does in float64, for ``x``, one of its images and a larger batch."""
    frozen = freeze(model, x)
    assert frozen.alone
    for batch in (x, torch.randn(5, *x.shape[1:]), x[:1]):
        with torch.no_grad():
            exact = copy.deepcopy(dense).double()(batch.double())
        frozen(torch.full_like(batch, math.nan))
        torch.testing.assert_close(frozen(batch).double(), exact, rtol=1e-4, atol=atol)
