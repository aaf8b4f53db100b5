"""Checkpoints: save() and load(), files that are checked before a kernel sees them."""

from lcnn_compile.checkpoint.archive import Header, load, read_header, save

__all__ = ["Header", "load", "read_header", "save"]
