"""The dense engines a user would pick instead, each turning a model and an example input into a call to be timed.

Every engine runs on preallocated or zero-copy inputs where its interface offers them, with as many threads as PyTorch has.
An engine whose package is not installed is missing, not an error.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcnn_compile.torch_private import inductor_freezing

CALIBRATION_BATCHES = 4


@dataclass(frozen=True)
class Runnable:
    """A prepared model: ``call`` runs it once, ``output`` gives the result of the last call as a tensor."""

    call: Callable[[], object]
    output: Callable[[], Tensor]


Prepare = Callable[[nn.Module, Tensor, Path], Runnable]


@dataclass(frozen=True)
class Engine:
    """A way to run a dense network.

    Attributes:
        name: as in tables and on the command line.
        exact: float32 throughout; "best dense" is the fastest of these.
        requires: packages to be installed.
        prepare: (model, example input, folder) to what is timed; called without gradients. Engines with a file format of
            their own leave the converted model in the folder, and take it from there the next time.
    """

    name: str
    exact: bool
    requires: tuple[str, ...]
    prepare: Prepare

    def missing(self) -> list[str]:
        """Packages that are required and not installed."""
        return [package for package in self.requires if importlib.util.find_spec(package) is None]


def run_torch(model: Callable[[Tensor], Tensor], example: Tensor, folder: Path | None = None) -> Runnable:
    """A PyTorch callable on a fixed input."""
    return Runnable(lambda: model(example), lambda: model(example))


def _channels_last(model: nn.Module, example: Tensor, folder: Path) -> Runnable:
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return run_torch(last, example.contiguous(memory_format=torch.channels_last))


def _inductor(freezing: bool = True, **options: bool) -> Prepare:
    def prepare(model: nn.Module, example: Tensor, folder: Path) -> Runnable:
        # Freezing turns weights into constants of the graph and may drop them from the module: hence the copy.
        # The option alone does not freeze: Dynamo asks the configuration, and makes parameters inputs. But engines whose options
        # differ share no compiled code, where a frozen model's calls would find that of an unfrozen copy.
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True, options={"freezing": freezing, **options})
        with inductor_freezing() if freezing else nullcontext():
            compiled(example)
        return run_torch(compiled, example)

    return prepare


def _onnxruntime(model: nn.Module, example: Tensor, folder: Path) -> Runnable:
    import onnxruntime as ort

    file = folder / "model.onnx"
    if not file.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            # The older exporter needs no further package.
            names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": {"x": {0: "batch"}}}
            torch.onnx.export(model, (example,), file, dynamo=False, **names)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.add_free_dimension_override_by_name("batch", example.shape[0])
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(example.numpy()))
    binding.bind_output("y")
    return Runnable(lambda: session.run_with_iobinding(binding), lambda: torch.from_numpy(binding.copy_outputs_to_cpu()[0]))


def _read_openvino(model: nn.Module, example: Tensor, folder: Path) -> Any:
    """The network in OpenVINO's form, for the example's shape."""
    import openvino as ov

    file = folder / "model.xml"
    if not file.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Saved as it is: in half precision, the default, the weights would be rounded.
            ov.save_model(ov.convert_model(model, example_input=example), file, compress_to_fp16=False)
    return _reshaped(ov.Core().read_model(file), example)


def _reshaped(network: Any, example: Tensor) -> Any:
    network.reshape(list(example.shape))
    return network


def _compile_openvino(network: Any, example: Tensor, precision: str) -> Runnable:
    import openvino as ov

    # On CPUs with bfloat16 units OpenVINO computes float32 models in bfloat16 unless told otherwise.
    properties = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": "1",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = ov.Core().compile_model(network, "CPU", properties).create_infer_request()
    request.set_input_tensor(ov.Tensor(example.numpy(), shared_memory=True))
    return Runnable(request.infer, lambda: torch.from_numpy(request.get_output_tensor(0).data.copy()))


def _openvino(precision: str) -> Prepare:
    return lambda model, example, folder: _compile_openvino(_read_openvino(model, example, folder), example, precision)


def _openvino_int8(model: nn.Module, example: Tensor, folder: Path) -> Runnable:
    import nncf
    import openvino as ov

    file = folder / "int8.xml"
    if not file.exists():
        nncf.set_log_level(logging.ERROR)
        batches = nncf.Dataset([torch.randn_like(example).numpy() for _ in range(CALIBRATION_BATCHES)])
        network = nncf.quantize(_read_openvino(model, example, folder), batches, subset_size=CALIBRATION_BATCHES)
        network.reshape([-1, *example.shape[1:]])
        ov.save_model(network, file, compress_to_fp16=False)
    # What is not quantised may run in bfloat16: this is the fastest that OpenVINO offers.
    return _compile_openvino(_reshaped(ov.Core().read_model(file), example), example, "bf16")


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("eager", True, (), run_torch),
        Engine("eager channels_last", True, (), _channels_last),
        Engine("inductor", True, (), _inductor()),
        Engine("inductor without freezing", True, (), _inductor(freezing=False)),
        Engine("inductor max-autotune", True, (), _inductor(max_autotune=True)),
        Engine("onnxruntime", True, ("onnx", "onnxruntime"), _onnxruntime),
        Engine("openvino", True, ("openvino",), _openvino("f32")),
        Engine("openvino bf16", False, ("openvino",), _openvino("bf16")),
        Engine("openvino int8", False, ("openvino", "nncf"), _openvino_int8),
    )
}
