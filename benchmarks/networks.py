"""The benchmark networks, and ``python benchmarks/networks.py [options]``, the same as ``lcnn-compile bench networks``."""

import sys

from lcnn_compile.bench.networks import NETWORKS, build, example_input

__all__ = ["NETWORKS", "build", "example_input"]

if __name__ == "__main__":
    from lcnn_compile.bench.cli import app

    app(["networks", *sys.argv[1:]])
