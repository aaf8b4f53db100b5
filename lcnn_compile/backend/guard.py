"""The one place that decides what happens where a graph cannot be worked on: Inductor takes it as it was."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import TypeVar

from lcnn_compile.errors import ConfigError, KernelError, LcnnWarning, WriteError
from lcnn_compile.torch_private import dynamo_signals

log = logging.getLogger("lcnn_compile")
T = TypeVar("T")
_warned: set[str] = set()


def attempt(work: Callable[[], T], otherwise: Callable[[], T], what: str) -> T:
    """The result of ``work``; where it fails, a warning that names ``what`` was not done and why, and that of ``otherwise``.

    What the user asked for and cannot have (:class:`ConfigError`, :class:`KernelError`), writes that would be lost (:class:`WriteError`) and Dynamo's own signals pass.
    """
    passing: tuple[type[BaseException], ...] = (*dynamo_signals(), ConfigError, KernelError, WriteError)
    try:
        return work()
    except passing:
        raise
    except Exception as error:
        # A pass meets graphs that nobody has thought of, and may fail in any way; the graph itself computes the same.
        log.debug("lcnn: %s", what, exc_info=True)
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        once(f"lcnn {what}: {type(error).__name__}: {reason}")
    return otherwise()


def once(message: str) -> None:
    """Warn, unless the very same was said before: many graphs may say it of one model."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, LcnnWarning, stacklevel=2)
