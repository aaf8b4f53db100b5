"""Choosing the lowering: which of the three is cheapest, as measured or else estimated."""

from __future__ import annotations

from lcnn_compile.kernels import measured
from lcnn_compile.kernels.problem import Problem, estimate, estimated_seconds, known_precision, problem_of

__all__ = ["Problem", "cheapest", "estimate", "known_precision", "problem_of", "seconds"]


def cheapest(problem: Problem, lookup_kernel: bool, measure: bool = False) -> str:
    """The lowering that is fastest on this device: as measured before, or now where ``measure`` says so, else estimated.

    On a GPU with kernels of ours the first question about a problem measures it.
    """
    if lookup_kernel and problem.device == "cpu" and not measure:
        cost = measured.remembered(problem) or estimate(problem, lookup_kernel)
    else:
        cost = seconds(problem, lookup_kernel)
    return min(cost, key=lambda name: cost[name])


def seconds(problem: Problem, lookup_kernel: bool) -> dict[str, float]:
    """Seconds that dense and the lowerings that may win take here, measured once and remembered on disk.

    Where nothing can be measured they are estimated.
    """
    if not lookup_kernel:
        return estimated_seconds(problem, lookup_kernel)
    if problem.device == "cuda":
        # Triton takes a second to import.
        from lcnn_compile.kernels.triton import choose as triton_choose

        found = triton_choose.measured(problem)
        return {name: t / 1e3 for name, t in found.items()} if found else estimated_seconds(problem, lookup_kernel)
    return measured.measure(problem, lookup_kernel)
