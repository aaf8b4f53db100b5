"""The dense engines a user would pick instead, each turning a model and an example input into a call to be timed.

Every engine runs on preallocated or zero-copy inputs where its interface offers them, with as many threads as PyTorch has.
An engine whose package is not installed is missing, not an error.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CALIBRATION_BATCHES = 4


@dataclass(frozen=True)
class Runnable:
    """A prepared model: ``call`` runs it once, ``output`` gives the result of the last call as a tensor."""

    call: Callable[[], object]
    output: Callable[[], Tensor]


@dataclass(frozen=True)
class Engine:
    """A way to run a dense network.

    Attributes:
        name: as in tables and on the command line.
        exact: float32 throughout; "best dense" is the fastest of these.
        requires: packages to be installed.
        prepare: (model, example input) to what is timed; called without gradients.
    """

    name: str
    exact: bool
    requires: tuple[str, ...]
    prepare: Callable[[nn.Module, Tensor], Runnable]

    def missing(self) -> list[str]:
        """Packages that are required and not installed."""
        return [package for package in self.requires if importlib.util.find_spec(package) is None]


def run_torch(model: Callable[[Tensor], Tensor], example: Tensor) -> Runnable:
    """A PyTorch callable on a fixed input."""
    return Runnable(lambda: model(example), lambda: model(example))


def _channels_last(model: nn.Module, example: Tensor) -> Runnable:
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return run_torch(last, example.contiguous(memory_format=torch.channels_last))


def _inductor(**options: bool) -> Callable[[nn.Module, Tensor], Runnable]:
    def prepare(model: nn.Module, example: Tensor) -> Runnable:
        # Freezing turns weights into constants of the graph and may drop them from the module: hence the copy.
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True, options={"freezing": True, **options})
        return run_torch(compiled, example)

    return prepare


def _onnxruntime(model: nn.Module, example: Tensor) -> Runnable:
    import onnxruntime as ort

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        # The older exporter takes a stream and needs no further package.
        torch.onnx.export(model, (example,), file, dynamo=False)  # type: ignore[arg-type]
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_ortvalue_input(session.get_inputs()[0].name, ort.OrtValue.ortvalue_from_numpy(example.numpy()))
    binding.bind_output(session.get_outputs()[0].name)
    return Runnable(lambda: session.run_with_iobinding(binding), lambda: torch.from_numpy(binding.copy_outputs_to_cpu()[0]))


def _convert_openvino(model: nn.Module, example: Tensor) -> Any:
    import openvino as ov

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ov.convert_model(model, example_input=example, input=list(example.shape))


def _compile_openvino(converted: Any, example: Tensor, precision: str) -> Runnable:
    import openvino as ov

    # On CPUs with bfloat16 units OpenVINO computes float32 models in bfloat16 unless told otherwise.
    properties = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": "1",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = ov.Core().compile_model(converted, "CPU", properties).create_infer_request()
    request.set_input_tensor(ov.Tensor(example.numpy(), shared_memory=True))
    return Runnable(request.infer, lambda: torch.from_numpy(request.get_output_tensor(0).data.copy()))


def _openvino(precision: str) -> Callable[[nn.Module, Tensor], Runnable]:
    return lambda model, example: _compile_openvino(_convert_openvino(model, example), example, precision)


def _openvino_int8(model: nn.Module, example: Tensor) -> Runnable:
    import nncf  # type: ignore[import-untyped]

    nncf.set_log_level(logging.ERROR)
    batches = [example.numpy(), *(torch.randn_like(example).numpy() for _ in range(CALIBRATION_BATCHES - 1))]
    quantised = nncf.quantize(_convert_openvino(model, example), nncf.Dataset(batches), subset_size=CALIBRATION_BATCHES)
    # What is not quantised may run in bfloat16: this is the fastest that OpenVINO offers.
    return _compile_openvino(quantised, example, "bf16")


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("eager", True, (), run_torch),
        Engine("eager channels_last", True, (), _channels_last),
        Engine("inductor", True, (), _inductor()),
        Engine("inductor max-autotune", True, (), _inductor(max_autotune=True)),
        Engine("onnxruntime", True, ("onnx", "onnxruntime"), _onnxruntime),
        Engine("openvino", True, ("openvino",), _openvino("f32")),
        Engine("openvino bf16", False, ("openvino",), _openvino("bf16")),
        Engine("openvino int8", False, ("openvino", "nncf"), _openvino_int8),
    )
}
