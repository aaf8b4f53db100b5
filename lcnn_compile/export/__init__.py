"""Converted models for other runtimes: plain dense networks, torch.export programs, AOTInductor packages, ONNX files.

``capture`` makes a model one program, ``frozen`` runs it with constant weights, ``formats`` writes it, ``native`` for processes without
Python. May import ``checkpoint`` and the rooms
below it.
"""

from lcnn_compile.export.formats import (
    check_onnx,
    export_aot,
    export_onnx,
    export_program,
    export_pt2,
    largest_difference,
    load_aot,
    load_pt2,
    onnx_differences,
    to_dense,
)
from lcnn_compile.export.native import NativeModel, export_native, load_native

__all__ = [
    "NativeModel",
    "check_onnx",
    "export_aot",
    "export_native",
    "export_onnx",
    "export_program",
    "export_pt2",
    "largest_difference",
    "load_aot",
    "load_native",
    "load_pt2",
    "onnx_differences",
    "to_dense",
]
