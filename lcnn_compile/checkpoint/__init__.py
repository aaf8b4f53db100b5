"""Checkpoints: save() and load(), files that are checked before a kernel sees them.

``archive`` writes and reads the file, ``header`` what it says of itself, with all checks; ``stored`` how tensors and ``calls`` how functional convolutions are written in it. May import ``conversion`` and
the rooms below it.
"""

from lcnn_compile.checkpoint.archive import load, save
from lcnn_compile.checkpoint.header import Header, read_header

__all__ = ["Header", "load", "read_header", "save"]
