"""The benchmark networks: ``build(name)`` gives one in evaluation mode with random weights."""

from lcnn_compile.bench.networks import NETWORKS, build, example_input

__all__ = ["NETWORKS", "build", "example_input"]
