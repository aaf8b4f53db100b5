"""What takes a parameter's place that convolutions called as functions read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import resolve_name

from lcnn_compile.errors import WeightError
from lcnn_compile.modules.calls import FUNCTIONS, Settings, arguments, settings_of
from lcnn_compile.torch_private import ConvolutionBase, children_of

OF_ANY = frozenset(
    [
        "is_floating_point",
        "is_complex",
        "is_cuda",
        "is_cpu",
        "is_meta",
        "is_sparse",
        "is_quantized",
        "layout",
        "element_size",
        "itemsize",
        "get_device",
        "requires_grad",
        "new_zeros",
        "new_ones",
        "new_empty",
        "new_full",
        "new_tensor",
    ]
)
"""What a tensor of the same dtype on the same device answers alike."""
OF_SHAPE = frozenset(("numel", "nelement", "stride", "is_contiguous", "ndimension"))
"""What a tensor of the same shape answers alike."""
PLAIN_READS = OF_ANY | OF_SHAPE | {"shape", "ndim", "dtype", "device", "size", "dim"}
"""What does not read a weight's values."""
CASTS = frozenset(("to", "type_as", "contiguous", "float", "double", "half", "bfloat16", "cpu", "cuda"))
"""Methods that return the tensor itself where nothing has to change."""


class FunctionalWeight(nn.Module):
    """Takes the place of a parameter that a model's code calls convolution functions on, as in ``F.conv2d(x, self.w)``.

    ``self.w`` finds this module where it found the parameter, for ``nn.Module`` looks up both alike, and PyTorch hands a call with
    it among its arguments to ``__torch_function__``. There, a call with the settings of one of this module's layers
    becomes a call of that layer. Everything else, other settings included, is done with the dense weight.

    Its layers are children that are named after their functions: "conv2d", then "conv2d_1".

    Attributes:
        calls: name of a layer -> the settings of the calls that it takes.
        biased: the layers whose bias is the very parameter that these calls pass; the others' is added to that.
    """

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self._shape = tuple(shape)
        self.calls: dict[str, Settings] = {}
        self.biased: list[str] = []

    def add(self, settings: Settings, layer: nn.Module, *, biased: bool) -> str:
        """Let ``layer`` take the calls with ``settings``; the name that it gets."""
        name, number = settings.function, 1
        while name in self.calls:
            name, number = f"{settings.function}_{number}", number + 1
        self.add_module(name, layer)
        self.calls[name] = settings
        if biased:
            self.biased.append(name)
        return name

    def dense(self) -> Tensor:
        """The dense weight: the parameter where a call was left dense, else that of the first layer; differentiable."""
        layers = list(children_of(self).values())
        for layer in layers:
            if isinstance(layer, ConvolutionBase):
                return layer.weight
        weight: Tensor = layers[0].weight  # type: ignore[union-attr,assignment]
        return weight

    def _first(self) -> Tensor:
        """A tensor of the device and dtype of the weight, without forming it."""
        return next(self.parameters())

    def layer_of(self, settings: Settings, bias: Any) -> str | None:
        """The name of the layer that takes a call with these settings and this bias; None where no layer does."""
        for name, known in self.calls.items():
            if known == settings:
                layer: Any = getattr(self, name)
                return name if name not in self.biased or bias is layer.bias else None
        return None

    def convolve(self, function: Callable[..., Any], found: Mapping[str, Any]) -> Tensor | None:
        """What the layer that takes this call returns; None where no layer does."""
        settings, bias = settings_of(FUNCTIONS[function], found), found["bias"]
        name = self.layer_of(settings, bias)
        if name is None:
            return None
        y: Tensor = getattr(self, name)(found["input"])
        return y if bias is None or name in self.biased else y + bias.reshape(-1, *(1 for _ in settings.stride))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in FUNCTIONS:
            found = arguments(FUNCTIONS[func], args, kwargs)
            weight = found["weight"]
            if isinstance(weight, FunctionalWeight) and not isinstance(found["input"], FunctionalWeight):
                y = weight.convolve(func, found)
                if y is not None:
                    return y
        elif _writes(func, args, kwargs):
            raise _refusal(func.__name__)
        return func(*_dense(args), **{key: _dense(value) for key, value in kwargs.items()})

    @property
    def shape(self) -> torch.Size:
        """Of the dense weight."""
        return torch.Size(self._shape)

    @property
    def ndim(self) -> int:
        """Of the dense weight."""
        return len(self._shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the dense weight."""
        return self._first().dtype

    @property
    def device(self) -> torch.device:
        """Of the dense weight."""
        return self._first().device

    def size(self, dim: int | None = None) -> Any:
        """As ``Tensor.size``."""
        return self.shape if dim is None else self._shape[dim]

    def dim(self) -> int:
        """As ``Tensor.dim``."""
        return len(self._shape)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Tensor.to``: itself where nothing changes. Models move their parts without it."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.dtype):
                same = value == self.dtype
            elif isinstance(value, Tensor):
                same = value.dtype == self.dtype and value.device == self.device
            elif isinstance(value, str | torch.device):
                same = torch.device(value) == self.device
            else:
                same = not isinstance(value, int | torch.memory_format)
            if not same and value is not False:
                return self.dense().to(*args, **kwargs)
        return self

    def type(self, dtype: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As ``Tensor.type``."""
        return self.dense().type(dtype, **kwargs)

    def type_as(self, other: Tensor) -> Any:
        """As ``Tensor.type_as``."""
        return self.to(other)

    def contiguous(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Tensor.contiguous``."""
        return self.dense().contiguous(*args, **kwargs) if args or kwargs else self

    def float(self, *args: Any) -> Any:
        """As ``Tensor.float``."""
        return self.to(torch.float32)

    def double(self, *args: Any) -> Any:
        """As ``Tensor.double``."""
        return self.to(torch.float64)

    def half(self, *args: Any) -> Any:
        """As ``Tensor.half``."""
        return self.to(torch.float16)

    def bfloat16(self, *args: Any) -> Any:
        """As ``Tensor.bfloat16``."""
        return self.to(torch.bfloat16)

    def cpu(self, *args: Any) -> Any:
        """As ``Tensor.cpu``."""
        return self.to("cpu")

    def cuda(self, device: Any = None, *args: Any) -> Any:
        """As ``Tensor.cuda``."""
        return self.to("cuda" if device is None else device)

    def __getattr__(self, name: str) -> Any:
        """What a module has, else what the dense weight has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
        if name.endswith("_"):
            raise _refusal(name)
        if name in OF_ANY:
            return getattr(self._first(), name)
        if name in OF_SHAPE:
            return getattr(torch.empty(self._shape, device="meta"), name)
        return getattr(self.dense(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            raise _refusal("assignment to .data")
        if name == "requires_grad":
            self.requires_grad_(bool(value))
            return
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """The shape of the weight."""
        return f"{list(self._shape)}"


def _operator(name: str) -> Callable[..., Any]:
    def method(self: FunctionalWeight, *args: Any) -> Any:
        return getattr(Tensor, name)(self.dense(), *_dense(args))

    method.__name__ = name
    return method


def _refused(name: str) -> Callable[..., Any]:
    def method(self: FunctionalWeight, *args: Any) -> Any:
        raise _refusal(name)

    method.__name__ = name
    return method


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
# Python looks these up on the class.
for _name in (*_BINARY, *(f"r{name}" for name in _BINARY), "neg", "abs", "getitem", "len", "lt", "le", "gt", "ge"):
    setattr(FunctionalWeight, f"__{_name}__", _operator(f"__{_name}__"))
for _name in (*(f"i{name}" for name in _BINARY), "setitem"):
    setattr(FunctionalWeight, f"__{_name}__", _refused(f"__{_name}__"))


def _dense(value: Any) -> Any:
    """``value`` with the dense weight in place of every FunctionalWeight in it."""
    if isinstance(value, FunctionalWeight):
        return value.dense()
    if isinstance(value, list):
        return [_dense(item) for item in value]
    if type(value) is tuple:
        return tuple([_dense(item) for item in value])
    return value


def _writes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call writes to a weight among its arguments."""
    if isinstance(kwargs.get("out"), FunctionalWeight):
        return True
    name = getattr(func, "__name__", "")
    written = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(written, FunctionalWeight):
        return False
    return (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__set__")


def _refusal(what: str) -> WeightError:
    return WeightError(
        f"{what} would write to a weight that convolutions called as functions look up: it is formed at every access. Train its "
        "layer's dictionary and coefficients, or assign a new nn.Parameter to the attribute, which makes it dense again"
    )


def name_of(func: Callable[..., Any]) -> str:
    """A function as people know it, for a reason: "torch.mul", "Tensor.shape"."""
    name = resolve_name(func) or getattr(func, "__name__", str(func))
    return name.removesuffix(".__get__").replace("torch.Tensor.", "Tensor.")
