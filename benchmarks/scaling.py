"""``python benchmarks/scaling.py [options]``, the same as ``lcnn-compile bench scaling``."""

import sys

from lcnn_compile.bench.cli import app

if __name__ == "__main__":
    app(["scaling", *sys.argv[1:]])
