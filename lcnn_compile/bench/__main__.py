"""``python -m lcnn_compile.bench``."""

from lcnn_compile.bench.cli import app

app()
