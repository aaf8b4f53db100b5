"""What all lookup modules share: their parameters, how they are made, and how they call the operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from lcnn_compile.config import LOWERING_CHOICES, PRECISIONS, LayerConfig
from lcnn_compile.errors import ConfigError, ConversionError, WeightError
from lcnn_compile.fitting.model import fit_model
from lcnn_compile.geometry import Call, Geometry, geometry_of
from lcnn_compile.kernels.bytes_lowering import pack_ranges, unpack_ranges
from lcnn_compile.kernels.operator import lookup_conv2d
from lcnn_compile.kernels.quantized import Range
from lcnn_compile.kernels.read_only import read_only
from lcnn_compile.lookup import LookupWeight
from lcnn_compile.modules.guards import Parameters, check_initialiser
from lcnn_compile.modules.initial import random_weight
from lcnn_compile.modules.tabled import HasTables
from lcnn_compile.modules.tables import TABLES
from lcnn_compile.modules.weight import DenseWeight, refuse_write
from lcnn_compile.torch_private import is_tracing, never_alone, parameters_of, tensors_of, without_transforms

FACTORS = ("dictionary", "coefficients", *TABLES)


class LookupModule(HasTables):
    """What all lookup modules share: parameters ``dictionary``, ``coefficients``, ``bias``, and the index tables.

    The tables (``indices``, ``positions``, ``offsets``, ``filters``, int32) are plain attributes, no buffers, so that nothing averages
    them; they move with the module and stand in its state dict, with a checksum (buffer ``table_checksum``, float32 [64]). Assigning
    a table replaces it. The tensors are those of :class:`~lcnn_compile.lookup.LookupWeight`, of the 2-d convolution that the operator runs.
    ``lowering`` ("auto", "lookup", "factored" or "dense") may be assigned at any time; it never changes the function.
    ``precision`` ("float32", "bfloat16" or "int8") may too; "bfloat16" lets lookups on a CPU round their operands, and "int8" computes in
    bytes once the layer has ``ranges`` (buffer, float32 [2 + groups * k], or None), which come of calibration.
    """

    dense_type: ClassVar[Callable[..., Any]]
    """The layer that this one stands for."""
    attributes: ClassVar[tuple[str, ...]]
    """What the module has in common with that layer by name: its settings."""

    dictionary: nn.Parameter
    coefficients: nn.Parameter
    bias: nn.Parameter | None
    geometry: Geometry
    call: Call
    groups: int
    weight_shape: tuple[int, ...]
    """Shape of the dense layer's weight."""
    precision: str = "float32"
    ranges: Tensor | None

    def _initialise(
        self,
        args: tuple[Any, ...],
        device: Any,
        dtype: torch.dtype | None,
        dictionary_size: int | float,
        sparsity: float | None,
        group_size: int,
        lowering: str,
        precision: str,
    ) -> None:
        """Take the place of ``dense_type(*args)`` with random values of the variances that it would have."""
        nn.Module.__init__(self)
        name = type(self).dense_type.__name__
        try:
            dense = type(self).dense_type(*args, device="meta")
        except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
            raise ConfigError(f"{name}: {error}") from error
        if dense.weight.numel() == 0:
            raise ConfigError(f"{name}{args}: its weight would have shape {tuple(dense.weight.shape)}, without elements")
        geometry = geometry_of(dense)
        config = LayerConfig(dictionary_size=dictionary_size, sparsity=sparsity, group_size=group_size)
        weight = random_weight(geometry.groups, geometry.in_channels, geometry.out_channels, geometry.kernel_size, config)
        # Transposed convolutions initialise as if their filters were their inputs.
        fan = dense.weight[0].numel()
        scale = (geometry.channels * geometry.area / fan) ** 0.5
        if scale != 1:
            weight = replace(weight, coefficients=weight.coefficients * scale)
        bias = None if dense.bias is None else torch.empty(dense.bias.shape[0]).uniform_(-(fan**-0.5), fan**-0.5)
        self._set(dense, geometry, weight, bias, lowering, precision)
        self.to(device=device, dtype=dtype)

    def _set(
        self, dense: nn.Module, geometry: Geometry, weight: LookupWeight, bias: Tensor | None, lowering: str, precision: str
    ) -> None:
        if lowering not in LOWERING_CHOICES:
            raise ConfigError(f"lowering is {lowering!r}; allowed are {LOWERING_CHOICES}")
        if precision not in PRECISIONS:
            raise ConfigError(f"precision is {precision!r}; allowed are {PRECISIONS}")
        self._guard_parameters()
        self.weight_shape = tuple(dense.weight.shape)  # type: ignore[arg-type]
        for name in type(self).attributes:
            setattr(self, name, getattr(dense, name))
        self.lowering, self.precision, self.groups = lowering, precision, geometry.groups
        self.geometry, self.call = geometry, geometry.call()
        weight = geometry.stored(weight)
        self.dictionary = nn.Parameter(weight.dictionary.detach().contiguous())
        self.coefficients = nn.Parameter(weight.coefficients.detach().contiguous())
        self._set_tables({name: getattr(weight, name).contiguous() for name in TABLES})
        self.register_buffer("ranges", None)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().to(weight.dictionary).clone()))

    @classmethod
    def from_weight(
        cls, weight: LookupWeight, layer: Any, bias: Tensor | None, lowering: str = "auto", precision: str = "float32"
    ) -> Any:
        """The module that applies ``weight`` and ``bias`` [n] in place of the dense ``layer``.

        ``weight`` is that of the 2-d convolution that :mod:`lcnn_compile.geometry` makes of the layer, or of another lookup
        module of this kind.

        Raises:
            WeightError: if the weight is invalid or does not fit the layer.
        """
        weight.validate(f"{cls.__name__}.from_weight")
        geometry = geometry_of(layer)
        found = _sizes(weight)
        wanted = (geometry.in_channels, geometry.out_channels, geometry.kernel_size, geometry.groups)
        call = geometry.call()
        if found not in (wanted, (geometry.in_channels, call.out_channels, call.kernel_size, geometry.groups)):
            raise WeightError(f"the lookup weight has (in, out, kernel_size, groups) {found}; the layer needs {wanted}: {layer}")
        if bias is not None and (tuple(bias.shape) != (geometry.out_channels,) or not bias.is_floating_point()):
            raise WeightError(f"bias is {bias.dtype} {tuple(bias.shape)}; floating-point [{geometry.out_channels}] is required")
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._set(layer, geometry, weight, bias, lowering, precision)
        return module.train(layer.training)

    @classmethod
    def _fit(cls, layer: Any, config: LayerConfig | None) -> Any:
        """A module fitted to the weight of ``layer`` alone."""
        config = config or LayerConfig()
        fitted = fit_model(layer, {"": layer}, {"": config}, calibration=None, call=lambda model, batch: model(batch))[""]
        if fitted.reason:
            raise ConversionError(f"{type(layer).__name__}: {fitted.reason}")
        precision = "float32" if config.precision == "auto" else config.precision
        return cls.from_weight(fitted.weight, layer, fitted.bias, config.lowering, precision)

    @property
    def dictionary_size(self) -> int:
        """k, vectors in the dictionary of each convolution group."""
        return self.dictionary.shape[1]

    @property
    def group_size(self) -> int:
        """g, filters that share one set of indices."""
        return self.filters.shape[1]

    def set_ranges(self, found: tuple[Range, Tensor] | None) -> None:
        """Take the range of the input and the limits [groups, k] of S for precision "int8"; None for none."""
        ranges = None if found is None else pack_ranges(*found).to(self.dictionary.device)
        if ranges is not None:
            unpack_ranges(ranges, self.dictionary, self.label)
        self.register_buffer("ranges", ranges)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # Whether there are ranges is known from what is loaded alone.
        found = state_dict.get(f"{prefix}ranges")
        if found is not None and self.ranges is None:
            self.register_buffer("ranges", torch.empty_like(found, device=self.dictionary.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def lookup_weight(self) -> LookupWeight:
        """The weight as one object that shares this module's tensors."""
        self._check_tables()
        return LookupWeight(**{name: getattr(self, name) for name in FACTORS}, kernel_size=self.call.kernel_size)

    def dense_weight(self) -> Tensor:
        """W = P·D in the shape of the dense layer's weight, contiguous; differentiable."""
        weight = self.lookup_weight().dense_weight(self.call.out_channels)
        return self.geometry.own_weight(self.geometry.natural_weight(weight)).contiguous()

    @property
    def weight(self) -> Tensor:
        """The dense weight, for code that reads ``layer.weight``: its form costs nothing, its values are formed when they are read.

        Gradients reach dictionary and coefficients.

        Raises:
            WeightError: where something writes to it.
        """
        exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
        if (is_tracing() and not exporting) or isinstance(self.dictionary, fx.Proxy):
            return read_only(self.dense_weight(), self.label)
        plain = exporting or (
            type(self.dictionary) in (Tensor, nn.Parameter) and without_transforms(self.dictionary) is self.dictionary
        )
        return DenseWeight.of(self) if plain else self.dense_weight()

    # In a graph of its own the weight would be a plain tensor, to which code that is not traced could write.
    never_alone(vars()["weight"].fget)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise refuse_write(self.label, "assignment")
        geometry = None
        if name in (*type(self).attributes, "groups") and "call" in self.__dict__ and getattr(self, name) != value:
            geometry = self._geometry_with(name, value)
        super().__setattr__(name, value)
        if geometry is not None:
            self.geometry, self.call = geometry, geometry.call()
        if name == "path":
            parameters_of(self).label = self.label  # type: ignore[attr-defined]

    def _geometry_with(self, name: str, value: Any) -> Geometry:
        """The geometry once a setting of the dense layer is another, as code changes strides and dilations of trained networks."""
        dense = self._skeleton()
        sizes = isinstance(getattr(self, name), tuple) and isinstance(value, int)
        setattr(dense, name, (value,) * len(getattr(self, name)) if sizes else value)
        try:
            geometry = geometry_of(dense)
            call = geometry.call()
        except (ValueError, TypeError, AttributeError) as error:
            raise WeightError(f"{self.label}: {name} cannot be {value!r}: {error}") from error
        kept = (call.out_channels, call.kernel_size, geometry.in_channels, geometry.groups)
        own = (self.call.out_channels, self.call.kernel_size, self.geometry.in_channels, self.groups)
        # PyTorch works padding out once that is not of zeros; taps of transposed layers are stored by the pixels that they write.
        padded = geometry.padding_mode != "zeros" and name in ("padding", "dilation", "padding_mode")
        if kept != own or padded or getattr(self, "transposed", False):
            raise WeightError(
                f"{self.label}: {name} is {getattr(self, name)!r} and cannot become {value!r}: the weight was made for it. Change the "
                "dense model and convert it again, or put layer.to_dense() in its place"
            )
        return geometry

    def __delattr__(self, name: str) -> None:
        if name == "weight":
            raise refuse_write(self.label, "deletion")
        super().__delattr__(name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._guard_parameters()
        tensors_of(self)[1].setdefault("ranges", None)
        if "weight_shape" not in self.__dict__:
            self.weight_shape = tuple(self.dense_weight().shape)

    def _guard_parameters(self) -> None:
        self.__dict__["_parameters"] = Parameters(parameters_of(self))
        self.__dict__["_parameters"].label = self.label

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As ``nn.Module.register_parameter``; a weight cannot be given to a lookup layer, nor what pruning makes of one."""
        if name.startswith("weight"):
            raise refuse_write(self.label, f"register_parameter({name!r})")
        super().register_parameter(name, param)

    def apply(self, fn: Callable[[nn.Module], None]) -> Any:
        """As ``nn.Module.apply``.

        Raises:
            WeightError: if ``fn`` would initialise the weight of the dense layer: this one would stay what it is.
        """
        super().apply(fn)
        check_initialiser(fn, self)
        return self

    def to_dense(self) -> Any:
        """The dense layer that computes the same function."""
        raise NotImplementedError

    def _skeleton(self) -> Any:
        """A dense layer of this module's settings, on the meta device."""
        raise NotImplementedError

    def _fill(self, dense: Any) -> Any:
        """Give a new dense layer this module's weight, bias and mode."""
        dense = dense.to_empty(device=self.dictionary.device).to(self.dictionary.dtype)
        with torch.no_grad():
            dense.weight.copy_(self.dense_weight())
            if self.bias is not None:
                dense.bias.copy_(self.bias)
        return dense.train(self.training)

    def _lookup(self, x: Tensor, bias: Tensor | None, call: Call | None = None) -> Tensor:
        """The operator on images [N, C, H, W]."""
        self._check_tables()
        tensors = (self.dictionary, self.coefficients, self.indices, self.positions, self.offsets, self.filters)
        rounding: dict[str, Any] = {} if self.precision == "float32" else {"precision": self.precision}
        if self.precision == "int8" and self.ranges is not None:
            rounding["ranges"] = self.ranges
        return lookup_conv2d(x, *tensors, bias, *(call or self.call), self.lowering, **rounding)

    def _batched(self, input: Tensor) -> bool:
        """Whether the input has a batch dimension; raises WeightError where it is neither with nor without one."""
        # Symbolic tracing cannot branch on a dimension: a traced graph is for batches.
        wanted = self.geometry.dimensions
        if isinstance(input, fx.Proxy) or input.dim() == wanted + 2:
            return True
        if input.dim() != wanted + 1:
            raise WeightError(
                f"Expected {wanted + 1}D (unbatched) or {wanted + 2}D (batched) input to {type(self).__name__}, "
                f"but got input of size: {list(input.shape)}"
            )
        return False

    def _sizes_text(self) -> str:
        taps = self.geometry.phases * self.coefficients.shape[0] / self.filters.shape[0]
        sizes = f"dictionary_size={self.dictionary_size}, taps={taps:g}, group_size={self.group_size}"
        rounding = "" if self.precision == "float32" else f", precision={self.precision!r}"
        return f"{sizes}, lowering={self.lowering!r}{rounding}"


def _sizes(weight: LookupWeight) -> tuple[int, int, tuple[int, int], int]:
    return weight.in_channels, weight.out_channels, weight.kernel_size, weight.groups
