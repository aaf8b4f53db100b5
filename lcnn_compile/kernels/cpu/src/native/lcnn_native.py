"""Runs a model that lcnn_compile has exported: needs numpy and the library beside it, neither torch nor lcnn_compile.

from lcnn_native import Model
with Model("model.lcnn") as model:
    [y] = model(x)                      # float32 arrays, the batch first
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MOST_DIMENSIONS = 8


class NativeError(RuntimeError):
    """A model file that the library refuses, or a call that does not fit the model."""


class Port(NamedTuple):
    """An input or output: its name and sizes, None for a batch of any size."""

    name: str
    shape: tuple[int | None, ...]


class StepTime(NamedTuple):
    """The mean time of one step of a model, in seconds, the number of the value that it makes, and what it is."""

    kind: str
    value: int
    seconds: float


class _Tensor(ctypes.Structure):
    """lcnn_tensor."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("rank", ctypes.c_int),
        ("sizes", ctypes.c_int64 * MOST_DIMENSIONS),
        ("elements", ctypes.c_int64),
    )


class _Time(ctypes.Structure):
    """lcnn_time."""

    _fields_ = (("kind", ctypes.c_char_p), ("value", ctypes.c_int64), ("seconds", ctypes.c_double))


def load_library(path: str | os.PathLike[str]) -> ctypes.CDLL:
    """liblcnn.so with the types of its functions.

    Raises:
        NativeError: it cannot be loaded.
    """
    try:
        library = ctypes.CDLL(os.fspath(path))
    except OSError as error:
        raise NativeError(f"{os.fspath(path)} cannot be loaded: {error}") from error
    pointer, integer, big = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    for name, result, arguments in (
        ("lcnn_open", integer, [ctypes.c_char_p, integer, pointer]),
        ("lcnn_close", None, [pointer]),
        ("lcnn_input_count", integer, [pointer]),
        ("lcnn_output_count", integer, [pointer]),
        ("lcnn_input", integer, [pointer, integer, pointer]),
        ("lcnn_output", integer, [pointer, integer, pointer]),
        ("lcnn_example_batch", big, [pointer]),
        ("lcnn_run", integer, [pointer, big, pointer, pointer]),
        ("lcnn_profile", integer, [pointer, big, pointer, pointer, integer, pointer, pointer]),
        ("lcnn_error", ctypes.c_char_p, []),
        ("lcnn_instruction_set", ctypes.c_char_p, []),
        ("lcnn_version", ctypes.c_char_p, []),
        ("lcnn_checksum", ctypes.c_uint64, [pointer, ctypes.c_size_t]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Model:
    """A model from a file, which is mapped to memory read-only; calls may come from several threads at once.

    Args:
        path: of the model file.
        threads: that work on one call.
        library: of liblcnn.so; the one beside the model where it is not given.

    Attributes:
        inputs, outputs: :class:`Port`.
        example_batch: the batch that it was exported with.

    Raises:
        NativeError: the library or the file is missing, damaged, or of another version.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int = 1, library: str | os.PathLike[str] | None = None):
        self._handle = ctypes.c_void_p()
        self._library = load_library(library or Path(path).resolve().parent / "liblcnn.so")
        self._check(self._library.lcnn_open(os.fsencode(path), threads, ctypes.byref(self._handle)))
        self.inputs = self._ports(self._library.lcnn_input_count, self._library.lcnn_input)
        self.outputs = self._ports(self._library.lcnn_output_count, self._library.lcnn_output)
        self.example_batch = int(self._library.lcnn_example_batch(self._handle))

    def _check(self, status: int) -> None:
        if status:
            raise NativeError(self._library.lcnn_error().decode(errors="replace"))

    def _ports(self, count: Any, describe: Any) -> tuple[Port, ...]:
        found = []
        for i in range(count(self._handle)):
            tensor = _Tensor()
            self._check(describe(self._handle, i, ctypes.byref(tensor)))
            sizes = list(tensor.sizes)[: tensor.rank]
            found.append(Port(tensor.name.decode(), tuple(None if size < 0 else size for size in sizes)))
        return tuple(found)

    def _arrays(self, inputs: tuple[Any, ...]) -> tuple[int, list[Any], list[Any]]:
        if not self._handle:
            raise NativeError("the model is closed")
        if len(inputs) != len(self.inputs):
            raise NativeError(f"the model takes {len(self.inputs)} inputs; it got {len(inputs)}")
        arrays = []
        batch = None
        for x, port in zip(inputs, self.inputs, strict=True):
            x = np.asarray(x)
            if x.dtype != np.float32:
                raise NativeError(f"the input {port.name} is {x.dtype}; float32 is required")
            batch = (x.shape[0] if x.ndim else None) if batch is None else batch
            wanted = (batch if port.shape[0] is None else port.shape[0], *port.shape[1:])
            if x.shape != wanted:
                raise NativeError(f"the input {port.name} has shape {x.shape}; {port.shape} is required, of one batch for all")
            arrays.append(np.ascontiguousarray(x))
        assert batch is not None
        made = [np.empty((batch, *(size or 0 for size in port.shape[1:])), np.float32) for port in self.outputs]
        return batch, arrays, made

    @staticmethod
    def _addresses(arrays: list[Any]) -> Any:
        return (ctypes.c_void_p * max(1, len(arrays)))(*[array.ctypes.data for array in arrays])

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """The outputs, float32 arrays, for float32 arrays of the model's shapes.

        Raises:
            NativeError: another number of inputs, dtype or shape.
        """
        batch, arrays, made = self._arrays(inputs)
        self._check(self._library.lcnn_run(self._handle, batch, self._addresses(arrays), self._addresses(made)))
        return tuple(made)

    def profile(self, *inputs: Any, calls: int = 10) -> list[StepTime]:
        """The mean time of each step over some calls."""
        batch, arrays, made = self._arrays(inputs)
        count = ctypes.c_size_t(0)
        addresses = (self._addresses(arrays), self._addresses(made))
        self._check(self._library.lcnn_profile(self._handle, batch, *addresses, 1, None, ctypes.byref(count)))
        times = (_Time * count.value)()
        self._check(self._library.lcnn_profile(self._handle, batch, *addresses, calls, times, ctypes.byref(count)))
        return [StepTime(time.kind.decode(), time.value, time.seconds) for time in times]

    def close(self) -> None:
        """Frees the model; it cannot be called any more."""
        if self._handle:
            self._library.lcnn_close(self._handle)
            self._handle = ctypes.c_void_p()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()
