"""The least time of networks in half precision on a GPU, dense and as chains, layer by layer; needs no GPU.

    python benchmarks/gpu_model.py [NETWORK …] [--batch 64] [--copy 4.3e12] [--matrix 7.8e14]

Ceilings default to about what an H200 reaches: bytes per second of a copy, operations per second of a matrix product.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lcnn_compile.bench.gpu.model import Ceilings, Step, cannot_win, chain_steps, dense_steps, middle_of_block


def show(title: str, steps: list[Step], ceilings: Ceilings) -> float:
    total = sum(step.seconds(ceilings, True) for step in steps)
    print(f"  {title}: {1e6 * total:.0f} µs, {sum(s.bytes + s.pass_bytes for s in steps) / 1e6:.0f} MB")
    for step in steps:
        bound = "memory" if step.bytes / ceilings.copy > step.flop / ceilings.matrix else "arithmetic"
        more = f", pass {1e6 * step.pass_bytes / ceilings.copy:6.1f}" if step.pass_bytes else ""
        print(f"    {step.name:36}{1e6 * step.seconds(ceilings):8.1f} µs  {bound}{more}")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("networks", nargs="*", default=["resnet18", "resnet50", "vgg16"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--copy", type=float, default=4.3e12)
    parser.add_argument("--matrix", type=float, default=7.8e14)
    arguments = parser.parse_args()
    ceilings = Ceilings(arguments.copy, arguments.matrix)
    for network in arguments.networks:
        print(f"{network}, batch {arguments.batch}: convolutions only")
        dense, chained = dense_steps(network, arguments.batch), chain_steps(network, arguments.batch)
        apart = show("dense, with a pass for each epilogue", dense, ceilings)
        fused = sum(step.seconds(ceilings) for step in dense)
        ours = show("chains", chained, ceilings)
        print(
            f"  chains {apart / ours:.2f}x; {fused / ours:.2f}x against dense layers that fuse every epilogue ({1e6 * fused:.0f} µs)"
        )
        lost = cannot_win(dense, ceilings)
        print(f"  without neighbours lookups cannot win on: {', '.join(lost) or 'none of the wide 3x3 layers'}")
    dense_bytes, chain_bytes = middle_of_block()
    print(f"between the convolutions of a block at 56²: {dense_bytes / 1e6:.1f} MB dense, {chain_bytes / 1e6:.1f} MB chained")


if __name__ == "__main__":
    main()
