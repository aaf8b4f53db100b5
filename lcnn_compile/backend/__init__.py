"""The torch.compile backend: what Dynamo calls (``entry``), and what a compiled graph does at each call (``runtime``).

A dense graph calibrates itself (``calibrating``) on copies of all that it may write (``sandbox``). May import ``checkpoint`` and the
rooms below it; nothing but the command line and the benchmarks imports it.
"""

from lcnn_compile.backend.entry import lcnn, parse_options

__all__ = ["lcnn", "parse_options"]
