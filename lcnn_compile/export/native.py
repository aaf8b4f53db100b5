"""export_native(): a frozen program as a folder that needs neither Python nor a compiler."""

from __future__ import annotations

import importlib.util
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcnn_compile.errors import ExportError, KernelError
from lcnn_compile.export.frozen import Frozen, frozen_form
from lcnn_compile.files import replacing
from lcnn_compile.kernels.cpu import keep_sources
from lcnn_compile.kernels.cpu.build import shared_library
from lcnn_compile.kernels.cpu.serial import Port, written
from lcnn_compile.kernels.cpu.sources import NATIVE

MODEL = "model.lcnn"
BESIDE = ("lcnn.h", "example.c", "lcnn-config.cmake", "lcnn_native.py")
"""Files that are copied as they are."""


def export_native(model: nn.Module, folder: str | os.PathLike[str], example_inputs: Any, dynamic_batch: bool = True) -> Path:
    """Write a converted model as one program of native steps, with the library that runs it.

    The folder gets ``model.lcnn`` (steps and weights; checked when it is opened, and mapped to memory so that processes share it),
    ``liblcnn.so`` (all instruction sets of this kind of processor; needs the C library alone), ``lcnn.h``, ``example.c``,
    ``lcnn-config.cmake`` for CMake's ``find_package``, and ``lcnn_native.py`` for Python without torch. Outputs equal those of
    :func:`~lcnn_compile.freeze` to the bit, on the same instruction set.

    Args:
        model: a converted model; it is not changed.
        folder: made where it does not exist; files of these names in it are replaced.
        example_inputs: as for :func:`~lcnn_compile.freeze`; inputs are float32, and so are outputs.
        dynamic_batch: take any batch; False fixes it to the example's.

    Returns:
        The path of the model file.

    Raises:
        ExportError: the model is no single program (the message names what keeps it from being one), or it cannot be captured.
        KernelError: there is no library for this processor, and no compiler to make it.
        OSError: the folder cannot be written.
    """
    with keep_sources():
        frozen = frozen_form(model, example_inputs, dynamic_batch, may_stay_dense=False)
    data = _written(frozen, dynamic_batch)
    library = shared_library()
    target = Path(folder) / MODEL
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as made:
        for source in (library, *(NATIVE / name for name in BESIDE)):
            shutil.copy(source, made.with_name("liblcnn.so" if source == library else source.name))
        made.write_bytes(_checked(data, library))
    return target


def load_native(folder: str | os.PathLike[str], threads: int = 1) -> NativeModel:
    """What :func:`export_native` wrote, as a callable on tensors; for comparison, and where torch is at hand anyway.

    Raises:
        ExportError: a file of it is missing or damaged.
    """
    return NativeModel(folder, threads)


class NativeModel:
    """An exported model, run by its own library.

    Attributes:
        inputs, outputs: names and shapes, None for a batch of any size.
    """

    def __init__(self, folder: str | os.PathLike[str], threads: int = 1):
        folder = Path(folder)
        for name in (MODEL, "liblcnn.so"):
            if not (folder / name).is_file():
                raise ExportError(f"{folder} has no {name}; export_native writes it")
        try:
            self._model = loader.Model(folder / MODEL, threads)
        except loader.NativeError as error:
            raise ExportError(str(error)) from error
        self.inputs, self.outputs = self._model.inputs, self._model.outputs

    def __call__(self, *inputs: Tensor) -> Any:
        """The output, or a tuple of them where there are several, for float32 tensors in the order of the model's inputs.

        Raises:
            ExportError: another number of inputs, dtype or shape.
        """
        try:
            found = [torch.from_numpy(y) for y in self._model(*(x.detach().numpy() for x in inputs))]
        except loader.NativeError as error:
            raise ExportError(str(error)) from error
        return found[0] if len(found) == 1 else tuple(found)


def _loader() -> Any:
    """The module that is written beside a model, which runs it without torch."""
    spec = importlib.util.spec_from_file_location("lcnn_compile.export.lcnn_native", NATIVE / "lcnn_native.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


loader = _loader()


def _written(frozen: Frozen, dynamic: bool) -> bytes:
    if frozen.program is None or frozen.single is None:
        raise ExportError(
            "the model is not one program, which export_native needs; what is left to the compiler: "
            f"{', '.join(frozen.left_over[:5]) or 'outputs that are inputs or constants'}"
            + (f" and {len(frozen.left_over) - 5} more" if len(frozen.left_over) > 5 else "")
        )
    names, returned = frozen.input_names, frozen.single.outputs
    # The program has the inputs in the order in which it meets them, and not those that the model ignores.
    order = [frozen.single.inputs.index(i) if i in frozen.single.inputs else None for i in range(len(frozen.form))]
    inputs = []
    for i, (_, shape, dtype, device) in enumerate(frozen.form):
        if dtype != torch.float32 or device.type != "cpu":
            raise ExportError(f"the input {names[i]} is {dtype} on {device}; export_native takes float32 on the CPU")
        inputs.append(Port(names[i], tuple(shape[1:])))
    batch = frozen.form[frozen.single.inputs[0]][1][0]
    if dynamic and any(least > 1 or least == 0 for least, *_ in frozen.form):
        least = max(least for least, *_ in frozen.form)
        raise ExportError(
            f"the model takes batches of {least} at least; export_native takes any or one: dynamic_batch=False"
            if least > 1
            else "an input has no batch dimension that varies; export it with dynamic_batch=False"
        )
    if empty := [list(shape) for _, shape, *_ in frozen.form if 0 in shape]:
        raise ExportError(f"an input has the shape {empty[0]}, without elements; export_native takes none such")
    outputs = [(f"output{i}" if len(returned) > 1 else "output", *entry) for i, entry in enumerate(returned)]
    try:
        return written(frozen.program, inputs, outputs, batch, dynamic, order)
    except KernelError as error:
        raise ExportError(f"the program cannot be written: {error}") from error


def _checked(data: bytes, library: Path) -> bytes:
    """The file with its checksum, which the library computes."""
    header = 64
    total = loader.load_library(library).lcnn_checksum(data[header:], len(data) - header)
    return data[:24] + struct.pack("<Q", total) + data[32:]
