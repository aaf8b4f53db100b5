"""The least time that the kernels of a lookup layer can take, from bytes and operations counted and what the device reaches."""

from __future__ import annotations

from typing import Any, NamedTuple

from lcnn_compile.bench.gpu.cases import MODES, Layer, Sizes


class Floor(NamedTuple):
    """One kernel: bytes to and from memory, the second-level cache and L1, floating-point operations, and the least time they take.

    S stays in the second-level cache. What is copied there straight into shared memory passes by L1, and is then read there.
    """

    memory: int
    l2: int
    l1: int
    flop: int
    milliseconds: float
    bound: str


def _floor(memory: int, l2: int, l1: int, flop: int, rate: float, ceilings: dict[str, float]) -> Floor:
    seconds = {
        "memory": memory / ceilings["copy"], "l2": l2 / ceilings["l2"], "l1": l1 / ceilings["l1"], "arithmetic": flop / rate
    }  # fmt: skip
    bound = max(seconds, key=lambda name: seconds[name])
    return Floor(memory, l2, l1, flop, 1e3 * seconds[bound], bound)


def floors(layer: Layer, sizes: Sizes, mode: str, batch: int, ceilings: dict[str, float]) -> dict[str, Floor]:
    """For both kernels of a lookup layer, "dictionary" (S from the input) and "lookups" (the output from S).

    Matrix products of float32 take three products of TF32. Where g = 1, vector units multiply: at least float32's rate, or
    two operations for each 4 bytes that L1 can deliver; a tap may then find S in L1.
    """
    item = MODES[mode].itemsize
    pixels = batch * (-(-layer.side // layer.stride)) ** 2
    sources, vectors = batch * layer.side**2, sizes.config().vectors(layer.channels)
    matrix = max(ceilings[mode], ceilings["tf32"] / 3) if mode == "float32" else ceilings[mode]
    vector = max(ceilings["float32"], ceilings["l1"] / 2)
    alone = sizes.group == 1
    gathered = item * pixels * -(-layer.filters // sizes.group) * sizes.taps
    return {
        "dictionary": _floor(
            item * sources * layer.channels,
            item * sources * (layer.channels + 3 * vectors),
            item * sources * (layer.channels + 3 * vectors),
            2 * layer.channels * vectors * sources,
            matrix,
            ceilings,
        ),
        "lookups": _floor(
            item * pixels * layer.filters,
            (0 if alone else gathered) + item * pixels * layer.filters,
            gathered * (1 if alone else 2) + item * pixels * layer.filters,
            2 * layer.filters * sizes.taps * pixels,
            vector if alone else matrix,
            ceilings,
        ),
    }


def over_floor(kernels: dict[str, float], total: float, least: dict[str, Floor]) -> dict[str, float]:
    """Measured over floor: of each kernel that ran alone, and of the whole call ("call")."""
    ratios = {name: kernels[name] / floor.milliseconds for name, floor in least.items() if name in kernels}
    return {**ratios, "call": total / sum(floor.milliseconds for floor in least.values())}


def to_json(least: dict[str, Floor]) -> dict[str, dict[str, Any]]:
    """Plain JSON."""
    return {name: floor._asdict() for name, floor in least.items()}
