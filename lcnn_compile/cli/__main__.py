"""``python -m lcnn_compile.cli``."""

from lcnn_compile.cli import app

app()
