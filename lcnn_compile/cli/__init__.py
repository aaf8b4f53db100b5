"""The command line ``lcnn-compile``: explain, convert, export, run, info, bench, demo.

Exit codes: 0 all is well; 1 a benchmark failed; 2 a mistake in what was asked, named on standard error; 3 nothing was replaced and
nothing written; 130 interrupted. Results go to standard output, everything else to standard error.
A file for each command or two, ``sources`` and ``images`` for where models and batches come from. May import every room, ``bench`` only when
its command runs.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

import typer
from rich.console import Console

from lcnn_compile.cli.bench import PASSED_ON, bench_command
from lcnn_compile.cli.conversion import convert_command, explain_command
from lcnn_compile.cli.exporting import export_command
from lcnn_compile.cli.inspection import demo_command, info_command
from lcnn_compile.cli.running import run_command
from lcnn_compile.errors import LcnnError

MISTAKE, INTERRUPTED, TERMINATED = 2, 130, 143

cli = typer.Typer(
    help="Make convolutional networks faster by learned lookup convolutions.",
    epilog="Exit codes: 0 all is well, 1 a benchmark failed, 2 a mistake in what was asked, 3 nothing was replaced, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
cli.command("explain")(explain_command)
cli.command("convert")(convert_command)
cli.command("export")(export_command)
cli.command("run")(run_command)
cli.command("info")(info_command)
cli.command("bench", context_settings=PASSED_ON)(bench_command)
cli.command("demo")(demo_command)


def app() -> None:
    """Run the command line; a user's mistake is one message on standard error and exit code 2."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        cli()
    except LcnnError as error:
        Console(stderr=True).print(f"lcnn-compile: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(MISTAKE)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _terminate(number: int, frame: FrameType | None) -> None:
    """End as after Ctrl-C: what is half-written is removed on the way out."""
    sys.exit(TERMINATED)
