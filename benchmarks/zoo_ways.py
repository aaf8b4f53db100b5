"""What is done to one architecture of ``zoo.py``, and how far the results are from float64. Runs in a process of its own."""

from __future__ import annotations

import copy
import logging
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from zoo_models import Case

from lcnn_compile import LcnnWarning, LookupConfig, convert
from lcnn_compile.export.formats import export_onnx, export_pt2
from lcnn_compile.export.frozen import freeze
from lcnn_compile.report import Report
from lcnn_compile.testing.compare import error, tolerance

LOSSLESS: dict[str, Any] = {"dictionary_size": 1.0, "sparsity": None, "lowering": "lookup"}
FACTOR = 8.0
"""How much farther from float64 than float32 PyTorch a result may be. Both errors are the largest of few values, so their ratio varies."""
ON_LOOKUPS = ("compile", "freeze", "pt2", "onnx")
"""The ways of a converted network."""
WAYS = ("convert", "compile", "dense", "freeze", "pt2", "onnx")
Row = dict[str, Any]


class WrongError(Exception):
    """A result that is not the dense network's."""


class Wide(TorchFunctionMode):
    """Runs a network's own casts to float32 and new tensors in float64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (Tensor.double if function is Tensor.float else function)(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(torch.float32)
        super().__exit__(*error)


class Zoo:
    """One architecture, its inputs, and what the dense network makes of them in float32 and float64."""

    def __init__(self, case: Case, compiler: str):
        self.case = case
        self.model = case.make()
        self.inputs = [case.inputs(which, seed) for seed, which in enumerate((0, 0, 1))]
        self._compile_with(compiler)
        self.own: list[Any] = []
        self.reference: list[Any] = []
        for inputs in self.inputs:
            self._compute(inputs)
        self._converted: nn.Module | None = None

    def _compute(self, inputs: tuple[Tensor, ...]) -> int:
        """Run the dense network on inputs in float32 and float64; their number among the results."""
        with torch.no_grad():
            self.own.append(self.model(*inputs))
            with Wide():
                self.reference.append(copy.deepcopy(self.model).double()(*[v.double() for v in inputs]))
        return len(self.own) - 1

    @staticmethod
    def _compile_with(compiler: str) -> None:
        """With "eager", what Inductor would compile runs operator by operator, after the same decompositions."""
        if compiler == "eager":
            from torch._dynamo.backends.common import aot_autograd
            from torch._inductor import compile_fx, decomposition

            def run(graph: Any, inputs: Any) -> Any:
                return graph.forward

            def instead(graph: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
                return aot_autograd(fw_compiler=run, decompositions=decomposition.select_decomp_table())(graph, inputs)

            compile_fx.compile_fx = instead

    @property
    def converted(self) -> nn.Module:
        """The lossless lookup network."""
        if self._converted is None:
            self._converted = convert(self.model, LookupConfig(**LOSSLESS), calibration=[self.inputs[0]])
        return self._converted

    def distance(self, found: Any, number: int) -> float:
        """Error over float32 PyTorch's own, of the output farthest off.

        Raises:
            WrongError: if it is more than :data:`FACTOR`, or the outputs have another form.
        """
        own, reference = self.own[number], self.reference[number]
        (results, form), (own, own_form) = pytree.tree_flatten(found), pytree.tree_flatten(own)
        if form != own_form:
            raise WrongError(f"outputs of form {form}; the dense network's are {own_form}")
        worst = 0.0
        for result, mine, wide in zip(results, own, pytree.tree_leaves(reference), strict=True):
            if not isinstance(mine, Tensor):
                continue
            if (result.shape, result.dtype) != (mine.shape, mine.dtype):
                raise WrongError(f"{result.dtype} {tuple(result.shape)}; the dense network's is {mine.dtype} {tuple(mine.shape)}")
            if mine.shape != wide.shape or not mine.is_floating_point():
                if not torch.equal(result, mine):
                    raise WrongError(f"{mine.dtype} values differ")
            elif mine.numel():
                worst = max(worst, error(result, wide) / (tolerance(mine, wide, 1.0) or 1.0))
        if not worst <= FACTOR:
            raise WrongError(f"{worst:.3g} times as far from float64 as float32 PyTorch")
        return worst

    def all_of(self, call: Callable[..., Any], numbers: tuple[int, ...]) -> float:
        """The worst distance over some of the inputs."""
        with torch.no_grad():
            return max(self.distance(call(*self.inputs[i]), i) for i in numbers)

    def convert(self) -> Row:
        """Conversion; what was replaced and what not."""
        result = self.converted
        return {"ratio": self.all_of(result, (0, 1, 2)), **counts(result.lcnn_report)}

    def compile(self) -> Row:
        """``torch.compile`` of the converted network at two shapes."""
        torch.compiler.reset()
        return {"ratio": self.all_of(torch.compile(self.converted, backend="lcnn"), (1, 2))}

    def dense(self) -> Row:
        """``torch.compile`` of the dense network, which calibrates in its first call."""
        torch.compiler.reset()
        with reports() as seen:
            ratio = self.all_of(torch.compile(self.model, backend="lcnn", options=dict(LOSSLESS)), (0, 1))
        rows = [row for report in seen for row in report]
        return {"ratio": ratio, **counts(rows), "graphs": len(seen)}

    def freeze(self) -> Row:
        """A frozen network on its shape and, where the architecture takes any, another batch."""
        frozen, dynamic = self._exported(lambda dynamic: freeze(self.converted, self.inputs[0], dynamic_batch=dynamic))
        more = self._batch(frozen, dynamic and frozen.alone)  # else another batch is another compilation
        return {"ratio": max(self.all_of(frozen, (1,)), more), "alone": frozen.alone, "batch": dynamic}

    def pt2(self) -> Row:
        """``torch.export`` program, written and read."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.pt2"
            _, dynamic = self._exported(lambda d: export_pt2(self.converted, path, self.inputs[0], dynamic_batch=d))
            loaded = torch.export.load(path).module()
        return {"ratio": max(self.all_of(loaded, (1,)), self._batch(loaded, dynamic)), "batch": dynamic}

    def onnx(self) -> Row:
        """ONNX, run by ONNX Runtime."""
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            _, dynamic = self._exported(lambda d: export_onnx(self.converted, path, self.inputs[0], dynamic_batch=d))
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

        def run(*inputs: Tensor) -> Any:
            names = [place.name for place in session.get_inputs()]
            found = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
            leaves, form = pytree.tree_flatten(self.own[0])
            return pytree.tree_unflatten([torch.from_numpy(y) for y in found], form) if len(leaves) == len(found) else found

        return {"ratio": self.all_of(run, (1,)), "batch": dynamic}

    def _exported(self, make: Callable[[bool], Any]) -> tuple[Any, bool]:
        """What is made for any batch size, or where the dense network cannot be captured so, for one."""
        try:
            return make(True), True
        except Exception:
            if self._captures(True) is None:
                raise
            return make(False), False

    def _batch(self, call: Callable[..., Any], dynamic: bool) -> float:
        """The distance on one sample more."""
        if not dynamic:
            return 0.0
        more = tuple(torch.cat([x, x[:1]]) for x in self.inputs[1])
        number = self._compute(more)
        with torch.no_grad():
            return self.distance(call(*more), number)

    def _captures(self, dynamic: bool) -> str | None:
        """Why ``torch.export`` cannot capture the dense network; None where it can."""
        shapes = tuple({0: torch.export.Dim("batch", min=1)} for _ in self.inputs[0]) if dynamic else None
        inputs = tuple(torch.cat([x, x]) for x in self.inputs[0]) if dynamic else self.inputs[0]
        try:
            with torch.no_grad():
                torch.export.export(self.model, inputs, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            return first_line(error)
        return None

    def upstream(self, way: str) -> str | None:
        """Why the dense network fails in the same way without us; None where it does not."""
        if way in ("freeze", "pt2", "onnx"):
            return self._captures(False)
        if way in ("compile", "dense"):
            torch.compiler.reset()
            try:
                self.all_of(torch.compile(self.model), (1, 2))
            except Exception as error:
                return first_line(error)
        return None

    def row(self, way: str) -> Row:
        """Do one thing and say how it went."""
        start = time.perf_counter()
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if way in ON_LOOKUPS and not self.converted.lcnn_report.replaced:
                    return {"state": "dense", "message": "no layer is a lookup", "seconds": 0.0}
                row = {"state": "right", **getattr(self, way)()}
            texts = {str(one.message)[:300] for one in caught if isinstance(one.message, LcnnWarning)}
            said = sorted(text for text in texts if "replaced nothing" not in text)  # the table says so, with the reasons
            if said:
                # Right because something was left to PyTorch: nothing to be content with.
                row |= {"state": "warned", "message": "; ".join(said)}
        except Exception as failure:
            row = {"state": "wrong" if isinstance(failure, WrongError) else "failed", "message": first_line(failure)}
            theirs = self.upstream(way)
            if theirs:
                row = {"state": "upstream", "message": theirs, "ours": row["message"]}
        return row | {"seconds": round(time.perf_counter() - start, 1)}


def counts(rows: Any) -> Row:
    """Layers replaced, and those left dense by reason."""
    rows = list(rows)
    dense = Counter(re.sub(r"\d+", "N", row.reason) for row in rows if not row.replaced)
    return {"replaced": sum(row.replaced for row in rows), "dense_layers": dict(dense.most_common())}


@contextmanager
def reports() -> Iterator[list[Report]]:
    """The reports that the backend logs meanwhile."""
    seen: list[Report] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.extend(value for value in record.args or () if isinstance(value, Report))

    logger, handler = logging.getLogger("lcnn_compile"), Keep()
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield seen
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
