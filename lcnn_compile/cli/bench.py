"""The command ``bench``, which imports the benchmarks only when it runs: whoever serves a model needs none of them."""

from __future__ import annotations

import typer

from lcnn_compile.errors import ConfigError

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Settings of a command that leaves its words, --help among them, to another."""


def bench_command(context: typer.Context) -> None:
    """Time lookup layers and networks against dense engines."""
    try:
        from lcnn_compile.bench.cli import app  # an optional extra
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the benchmarks cannot run here: {error.name} is not installed; pip install 'lcnn-compile[bench]'"
        ) from error
    app(args=context.args, prog_name=context.command_path)
