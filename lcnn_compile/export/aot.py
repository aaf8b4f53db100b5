"""AOTInductor packages that state what inputs they take: a package of its own reads any input as if it had the example's form.

The code that Inductor writes reads memory by the example's dtype, sizes and strides, and looks at an input's own only where an
environment variable asks for it. Here that check is compiled in, for whatever loads the package, and :func:`load_aot` brings
inputs of another memory layout into the one that the code reads.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcnn_compile.errors import ExportError, LcnnWarning
from lcnn_compile.export.capture import first_line
from lcnn_compile.torch_private import compile_package, load_package, package_metadata, package_spec, pytree

_KEY = "lcnn_inputs"
"""Under which name a package's metadata holds the form of its inputs."""

Size = int | tuple[int, int | None, str]
"""A fixed size, or the smallest and the largest one allowed (None: any) and a name; sizes of one name are equal."""


def write_package(program: torch.export.ExportedProgram, path: str) -> None:
    """Compile a program into a package that refuses inputs of another form, and that :func:`load_aot` can read."""
    program = program.run_decompositions({})  # states which inputs and buffers are written to
    checked = compile_package(program, path, {_KEY: json.dumps(input_forms(program))})
    if not checked:
        warnings.warn(
            f"packages of torch {torch.__version__} do not check their inputs unless AOTI_RUNTIME_CHECK_INPUTS=1 is set where they "
            "are loaded; lcnn_compile.export.load_aot checks them",
            LcnnWarning,
            stacklevel=3,
        )


def load_aot(path: str | os.PathLike[str]) -> AotModel:
    """A package of ``export_aot`` as a callable with the model's signature, which checks its inputs.

    With the lowerings "auto" and "lookup" importing this function has registered the operator that the package calls.

    Raises:
        ExportError: if the file is no AOTInductor package, or one that does not state its inputs.
    """
    if not Path(path).is_file():
        raise ExportError(f"{os.fspath(path)} is not a file")
    try:
        model = load_package(os.fspath(path))
        stated = package_metadata(model).get(_KEY)
    except Exception as error:
        # A damaged file fails in many ways inside zip files, JSON and the dynamic loader.
        raise ExportError(f"{os.fspath(path)} cannot be loaded as an AOTInductor package: {first_line(error)}") from error
    if stated is None:
        raise ExportError(f"{os.fspath(path)} does not state the form of its inputs; write it again with export_aot")
    return AotModel(model, json.loads(stated))


class AotModel:
    """A loaded package, called as the model was for the export (by position or by name), without gradients.

    Attributes:
        forms: of each input, its dtype, sizes (limits and a name where it varies), strides and device; or its constant value.
    """

    def __init__(self, model: Any, forms: list[dict[str, Any]]):
        self._model, self.forms = model, forms
        self._spec = package_spec(model)
        self._names = list(pytree.tree_unflatten(list(range(self._spec.num_leaves)), self._spec)[1])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs; inputs of another memory layout are copied into the one that was compiled for.

        Raises:
            ExportError: inputs of another number, structure, shape, dtype, device or constant value.
        """
        if set(kwargs) == set(self._names):
            kwargs = {key: kwargs[key] for key in self._names}  # in the order of the export
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self._spec or len(leaves) != len(self.forms):
            raise ExportError(f"the package takes {self._spec}; it got {spec}")
        named: dict[str, int] = {}
        fitted = [_fitted(leaf, form, place, named) for place, (leaf, form) in enumerate(zip(leaves, self.forms, strict=True))]
        args, kwargs = pytree.tree_unflatten(fitted, spec)
        with torch.no_grad():
            found = self._model(*args, **kwargs)
            for leaf, used, form in zip(leaves, fitted, self.forms, strict=True):
                if used is not leaf and form.get("written"):
                    leaf.copy_(used)
        return found


def standard_layouts(inputs: Any) -> Any:
    """Example inputs whose tensors are contiguous or channels_last, so that no stride depends on the batch size."""
    return pytree.tree_map_only(Tensor, _standard, inputs)


def _standard(tensor: Tensor) -> Tensor:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim(), torch.contiguous_format)
    if tensor.is_contiguous(memory_format=last):
        return tensor
    # A contiguous tensor may have odd strides where it has one sample; a new one has not.
    return tensor.new_empty(tensor.shape).copy_(tensor)


def input_forms(program: torch.export.ExportedProgram) -> list[dict[str, Any]]:
    """What each input of a program must be, as JSON can hold it."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    written = set(program.graph_signature.user_inputs_to_mutate.values())
    forms: list[dict[str, Any]] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind.name != "USER_INPUT":
            continue
        value = nodes[spec.arg.name].meta.get("val") if spec.arg.name in nodes else None
        if isinstance(value, Tensor):
            sizes = [_range(program, size) for size in value.shape]
            if not all(isinstance(step, int) for step in value.stride()):
                raise ExportError(
                    f"input {spec.arg.name} has strides {value.stride()} that vary with its sizes; give a contiguous example"
                )
            forms.append(
                {"dtype": str(value.dtype), "sizes": sizes, "strides": list(value.stride()), "device": value.device.type}
            )
            forms[-1]["written"] = spec.arg.name in written
        else:
            forms.append({"value": getattr(spec.arg, "value", None)})
    return forms


def _range(program: torch.export.ExportedProgram, size: Any) -> Size:
    if isinstance(size, int):
        return size
    bounds = program.range_constraints.get(size.node.expr)
    if bounds is None:
        return 1, None, str(size)
    low, high = (int(bound) if abs(bound) < sys.maxsize else None for bound in (bounds.lower, bounds.upper))
    # A varying size is stated to be at least 2 where it is not known to be 0 or 1; the programs are right for 1.
    return 1 if low is None or low <= 2 else low, high, str(size)


def _fitted(leaf: Any, form: dict[str, Any], place: int, named: dict[str, int]) -> Any:
    """An input in the memory layout that the code reads."""
    if "value" in form:
        if isinstance(leaf, Tensor) or type(leaf) is not type(form["value"]) or leaf != form["value"]:
            raise ExportError(
                f"input {place} is the constant {form['value']!r} of this package; it got {leaf!r}; export it again"
            )
        return leaf
    if not isinstance(leaf, Tensor):
        raise ExportError(f"input {place} is a tensor of {form['dtype']}; it got {type(leaf).__name__}")
    sizes = [size if isinstance(size, int) else tuple(size) for size in form["sizes"]]
    known = dict(named)
    if not has_sizes(leaf, sizes, named) or str(leaf.dtype) != form["dtype"] or leaf.device.type != form["device"]:
        raise ExportError(
            f"input {place} is {form['dtype']} of shape {shown(sizes, known)} on {form['device']}; "
            f"it got {leaf.dtype} of shape {list(leaf.shape)} on {leaf.device}"
        )
    strides = tuple(form["strides"])
    if leaf.stride() == strides and not leaf.is_conj() and not leaf.is_neg():
        return leaf
    return leaf.new_empty_strided(leaf.shape, strides).copy_(leaf.detach())


def has_sizes(tensor: Tensor, sizes: list[Size], named: dict[str, int]) -> bool:
    """Whether a tensor has the sizes stated; varying ones that were not seen before are added to ``named``."""
    if tensor.dim() != len(sizes):
        return False
    for size, own in zip(sizes, tensor.shape, strict=True):
        if isinstance(size, int):
            if size != own:
                return False
            continue
        low, high, name = size
        if own < low or (high is not None and own > high) or named.setdefault(name, own) != own:
            return False
    return True


def shown(sizes: list[Size], named: dict[str, int]) -> str:
    """Stated sizes for a message."""
    parts = [size if isinstance(size, int) else named.get(size[2], f"{size[0]} to {size[1] or 'any'}") for size in sizes]
    return f"[{', '.join(map(str, parts))}]"
