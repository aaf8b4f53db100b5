"""The torch.compile backend: what Dynamo calls, and what a compiled graph does at each call."""

from lcnn_compile.backend.entry import lcnn, parse_options

__all__ = ["lcnn", "parse_options"]
