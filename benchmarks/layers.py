"""``python benchmarks/layers.py [options]``, the same as ``lcnn-compile bench layers``."""

import sys

from lcnn_compile.bench.cli import app

if __name__ == "__main__":
    app(["layers", *sys.argv[1:]])
