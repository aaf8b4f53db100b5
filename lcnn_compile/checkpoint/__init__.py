"""Checkpoints: save() and load(), files that are checked before a kernel sees them.

``archive`` is the file, ``stored`` how tensors and ``calls`` how functional convolutions are written in it. May import ``conversion`` and
the rooms below it.
"""

from lcnn_compile.checkpoint.archive import Header, load, read_header, save

__all__ = ["Header", "load", "read_header", "save"]
