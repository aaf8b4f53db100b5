"""How many threads the kernels may use."""

from __future__ import annotations

import os

import torch

_used = False
_forked = False


def thread_count() -> int:
    """PyTorch's number of threads; one in a process that was forked after the kernels had used several.

    The threads of OpenMP don't live through a fork, and GNU's library waits for them for ever.
    """
    global _used
    count = torch.get_num_threads()
    if count == 1 or _forked:
        return 1
    _used = True
    return count


def _after_fork() -> None:
    global _forked
    _forked = _used


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
