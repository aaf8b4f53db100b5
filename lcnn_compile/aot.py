"""Where version 0.1 had :mod:`lcnn_compile.export.aot`, by the name that its documentation shows."""

from lcnn_compile.export.aot import AotModel

__all__ = ["AotModel"]
