"""What ``layer.weight`` of a lookup layer gives: the dense weight, formed when its values are read; writes are refused.

Code reads ``conv.weight.dtype``, ``.device`` or ``.shape`` far more often than values, and code that writes to a weight must not find
that nothing has happened.
"""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor

from lcnn_compile.errors import WeightError, WriteError
from lcnn_compile.kernels.read_only import read_only
from lcnn_compile.torch_private import pytree, without_torch_function

_FORM = (
    *("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "names"),
    *("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_sparse_csr", "is_quantized", "is_mkldnn", "is_mps", "is_xpu"),
)
_METHODS = (
    *("size", "stride", "dim", "ndimension", "numel", "nelement", "element_size", "storage_offset", "get_device"),
    *("is_floating_point", "is_complex", "is_signed", "is_contiguous", "is_inference", "is_pinned", "__len__"),
)
_GETTERS = {getattr(Tensor, name).__get__ for name in _FORM if hasattr(Tensor, name)}
_QUESTIONS = {*_GETTERS, *(getattr(Tensor, name) for name in _METHODS)}
_QUESTIONS |= {torch.numel, torch.is_floating_point, torch.is_complex, torch.is_signed, torch.get_device}
"""What is answered without values."""
_FORM_OF_OTHER = ("to", "type_as", "expand_as", "view_as", "reshape_as", "resize_as_", "is_same_size", "result_type", "can_cast")
"""Functions that look at the form only of an argument that is not their first."""
_AUGMENTED = {
    f"__i{name}__"
    for name in [
        "add",
        "sub",
        "mul",
        "matmul",
        "truediv",
        "floordiv",
        "div",
        "mod",
        "pow",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
    ]
}
_HOOKS = ("register_hook", "retain_grad", "register_post_accumulate_grad_hook")
# Properties have one getter and one setter, both called "__get__" and "__set__".
_DATA, _GRAD, _REQUIRES_GRAD, _LEAF = (getattr(Tensor, name) for name in ("data", "grad", "requires_grad", "is_leaf"))


def refuse_write(label: str, what: str) -> WriteError:
    """The error for a write to the dense weight of a layer."""
    return WriteError(
        f"{label}: {what} would write to its weight, which is formed from dictionary and coefficients and cannot be written to. Change "
        "the dense model and convert it again, write to layer.dictionary and layer.coefficients, or put layer.to_dense() in its place. "
        "To work on a copy, take layer.dense_weight().detach().clone()"
    )


class DenseWeight(Tensor):
    """The dense weight of a lookup layer, or a view of it: its values can be read, and not be written to.

    Questions about its form (dtype, device, shape, strides, ``new_*``, ``*_like``) cost nothing, anything else forms the values,
    differentiable in the layer's parameters. Setting ``requires_grad`` sets that of dictionary and coefficients.
    """

    _layer: Any = None
    """The layer; None for a copy that became a parameter of its own, which is an ordinary tensor."""
    _plain: Tensor

    @staticmethod
    def of(layer: Any) -> DenseWeight:
        """The weight of ``layer``, without values yet."""
        return _unread(layer, detached=False)

    @staticmethod
    def guarded(layer: Any, values: Tensor) -> Tensor:
        """``values`` that belong to the weight of ``layer``; those of a graph that is being captured stay as they are."""
        if type(values) is not Tensor:
            return values
        made = values.as_subclass(DenseWeight)
        made._layer, made._plain = layer, values
        return made

    def _read(self) -> Tensor:
        """The values, as a plain tensor."""
        return self._plain

    def _like(self) -> Tensor:
        """A plain tensor of the same form, of one element."""
        with without_torch_function():
            return self._layer.dictionary.new_empty(()).expand(self.shape)

    def _factors(self) -> tuple[Tensor, Tensor]:
        return self._layer.dictionary, self._layer.coefficients

    def _needs_grad(self) -> bool:
        return self._plain.requires_grad

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """PyTorch's entry for every function that is called with one of these."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        weights = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, DenseWeight)]
        if all(weight._layer is None for weight in weights):
            with without_torch_function():
                return func(*args, **kwargs)
        if func in _QUESTIONS or (getattr(func, "__name__", "") == "type" and len(args) == 1 and not kwargs):
            with without_torch_function():
                return func(*args, **kwargs)
        name = func.__name__
        if isinstance(first, DenseWeight):
            answer = first._own(func, name, args, kwargs)
            if answer is not NotImplemented:
                return answer
        written = _written(func, name, args, kwargs)
        if written is not None:
            raise refuse_write(written._layer.label, name)
        if name.endswith("_like") or (name in _FORM_OF_OTHER and not isinstance(first, DenseWeight)):
            args, kwargs = pytree.tree_map_only(DenseWeight, DenseWeight._like, (args, kwargs))
            return func(*args, **kwargs)
        return _computed(func, args, kwargs)

    def _own(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """What the weight says of itself; NotImplemented for everything else."""
        if name.startswith("new_") or name == "new":
            return func(self._layer.dictionary.detach(), *args[1:], **kwargs)
        if func == _DATA.__get__ and isinstance(self, _Unread) and _form_is_next(sys._getframe(2)):
            return _unread(self._layer, detached=True)
        if func == _DATA.__get__ or name == "detach":
            if isinstance(self, _Unread) and sys._getframe(2).f_globals.get("__name__") == "torch.nn.parameter":
                raise _no_parameter(self._layer.label)
            return DenseWeight.guarded(self._layer, self._read().detach())
        if func == _REQUIRES_GRAD.__get__:
            return self._needs_grad()
        if func == _LEAF.__get__:
            return not self._needs_grad()
        if func == _REQUIRES_GRAD.__set__ or name == "requires_grad_":
            flag = bool(args[1] if len(args) > 1 else kwargs.get("requires_grad", True))
            if flag == self._needs_grad():
                return self
            if not isinstance(self, _Unread):
                if self._plain.requires_grad or self._plain.grad_fn is not None:
                    raise refuse_write(self._layer.label, name)
                return Tensor._make_subclass(DenseWeight, self._plain.clone(), flag)
            if self._detached:
                raise _no_parameter(self._layer.label)
            for factor in self._factors():
                factor.requires_grad_(flag)
            return self
        if func == _GRAD.__get__ and isinstance(self, _Unread):
            return None
        if func == _GRAD.__set__ and args[1] is None and isinstance(self, _Unread):
            for factor in self._factors():
                factor.grad = None
            return None
        if name in _HOOKS:
            raise WeightError(
                f"{self._layer.label}: {name} on its weight would never run: gradients go to layer.dictionary and layer.coefficients"
            )
        if name in ("__deepcopy__", "__reduce_ex__"):
            copied = self._read().detach().clone().requires_grad_(self._needs_grad())
            return copied if name == "__deepcopy__" else copied.__reduce_ex__(*args[1:])
        return NotImplemented


class _Unread(DenseWeight):
    """One whose values nobody has read: it has no memory."""

    _detached: bool

    def _read(self) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._detached):
            values = self._layer.dense_weight()
        # In a graph that is being exported no guard follows the values: there, the passes look for writes.
        return values if type(values) is Tensor else read_only(values, self._layer.label)

    def _needs_grad(self) -> bool:
        return not self._detached and any(factor.requires_grad for factor in self._factors())

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """For code below ``__torch_function__``: values, never writes."""
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.is_write and isinstance(value, DenseWeight):
                raise refuse_write(value._layer.label, str(func))
        args, kwargs = pytree.tree_map_only(_Unread, lambda w: w._read().detach(), (args, kwargs or {}))
        return func(*args, **kwargs)


def _unread(layer: Any, detached: bool) -> DenseWeight:
    like = layer.dictionary
    made: Any = Tensor._make_wrapper_subclass(_Unread, layer.weight_shape, dtype=like.dtype, device=like.device)
    made._layer, made._detached = layer, detached
    return made


def _no_parameter(label: str) -> WeightError:
    return WeightError(
        f"{label}: its weight cannot become a parameter of its own; take torch.nn.Parameter(layer.dense_weight().detach().clone())"
    )


@functools.lru_cache(4096)
def _next_attribute(code: CodeType, place: int) -> str:
    """The attribute that the instruction after the one at ``place`` reads, if it reads one."""
    following = (step for step in dis.get_instructions(code) if step.offset > place and step.opname != "CACHE")
    step = next(following, None)
    return str(step.argval) if step is not None and step.opname in ("LOAD_ATTR", "LOAD_METHOD") else ""


def _form_is_next(frame: FrameType) -> bool:
    """Whether code asks for the form of ``weight.data`` only. It must have memory otherwise: ``x.data = weight.data`` takes that."""
    return _next_attribute(frame.f_code, frame.f_lasti) in {*_FORM, *_METHODS}


def _written(func: Callable[..., Any], name: str, args: Any, kwargs: Any) -> DenseWeight | None:
    """The weight that a call would write to."""
    found: list[Any] = [kwargs.get("out")]
    dunder = name.startswith("__")
    in_place = (name.endswith("_") and not dunder) or name in _AUGMENTED or name in ("__setitem__", "__set__", "__delitem__")
    if in_place or getattr(func, "__module__", "") == "torch.nn.init" or kwargs.get("inplace"):
        found += [args[0] if args else next(iter(kwargs.values()), None)]
    return next((leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, DenseWeight)), None)


def _computed(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The function of the values; what shares their memory can be written to as little as they can."""
    owners: dict[int, DenseWeight] = {}

    def read(weight: DenseWeight) -> Tensor:
        values = weight._read()
        owners[values.untyped_storage()._cdata] = weight
        return values

    args, kwargs = pytree.tree_map_only(DenseWeight, read, (args, kwargs))
    result = func(*args, **kwargs)

    def guard(value: Tensor) -> Tensor:
        if type(value) is not Tensor or value.layout != torch.strided:
            return value
        owner = owners.get(value.untyped_storage()._cdata)
        return value if owner is None else DenseWeight.guarded(owner._layer, value)

    if type(result).__module__ == "numpy" and hasattr(result, "setflags"):
        result.setflags(write=False)
        return result
    return pytree.tree_map_only(Tensor, guard, result)
