"""LookupConv2d and LookupLinear: drop-in, trainable modules whose weight is a lookup weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lcnn_compile.config import LOWERING_CHOICES, LayerConfig
from lcnn_compile.errors import ConfigError, ConversionError, WeightError
from lcnn_compile.kernels.ops import lookup_conv2d
from lcnn_compile.lookup import LookupWeight, filter_table

_BUFFERS = ("indices", "positions", "offsets", "filters")


def _dense(layer: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> Any:
    """Build a dense torch layer; its complaints about arguments become ConfigError."""
    try:
        return layer(*args, **kwargs)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{getattr(layer, '__name__', layer)}: {error}") from error


def random_weight(
    groups: int, in_channels: int, out_channels: int, kernel_size: tuple[int, int], config: LayerConfig
) -> LookupWeight:
    """A random lookup weight, float32, whose dense weight has the variance of ``nn.Conv2d``'s initialisation.

    The support of each filter group is drawn without replacement from all (vector, r, c). At full size (k = m and all
    taps) it is the identity dictionary with ``nn.Conv2d``'s own random weight.
    """
    channels, area = in_channels // groups, kernel_size[0] * kernel_size[1]
    size = config.vectors(channels)
    taps = config.taps_per_filter(size, area)
    if size == channels and taps == size * area:
        weight = nn.Conv2d(in_channels, out_channels, kernel_size, groups=groups, bias=False).weight.detach()
        return LookupWeight.lossless(weight, groups=groups, group_size=config.group_size)
    filters = filter_table(out_channels, config.group_size, groups)
    columns = torch.stack([torch.randperm(size * area)[:taps].sort().values for _ in range(filters.shape[0])]).flatten()
    members = (filters >= 0).repeat_interleave(taps, 0)
    return LookupWeight(
        dictionary=torch.randn(groups, size, channels) / channels**0.5,
        # Var W = taps/area · Var C · Var D has to be 1 / (3 · fan_in).
        coefficients=torch.randn(members.shape) * members / (3 * taps) ** 0.5,
        indices=(columns // area).to(torch.int32),
        positions=(columns % area).to(torch.int32),
        offsets=torch.arange(filters.shape[0] + 1, dtype=torch.int32) * taps,
        filters=filters,
        kernel_size=kernel_size,
    )


class LookupModule(nn.Module):
    """What LookupConv2d and LookupLinear share: parameters ``dictionary``, ``coefficients``, ``bias``; the rest is buffers.

    The tensors are those of :class:`~lcnn_compile.lookup.LookupWeight`. ``lowering`` ("auto", "lookup", "factored" or
    "dense") may be assigned at any time; it never changes the function.
    """

    dictionary: nn.Parameter
    coefficients: nn.Parameter
    bias: nn.Parameter | None
    indices: Tensor
    positions: Tensor
    offsets: Tensor
    filters: Tensor
    kernel_size: tuple[int, int]
    groups: int

    def _set_weight(self, weight: LookupWeight, bias: Tensor | None, lowering: str) -> None:
        if lowering not in LOWERING_CHOICES:
            raise ConfigError(f"lowering is {lowering!r}; allowed are {LOWERING_CHOICES}")
        self.lowering = lowering
        self.kernel_size = weight.kernel_size
        self.dictionary = nn.Parameter(weight.dictionary.detach().contiguous())
        self.coefficients = nn.Parameter(weight.coefficients.detach().contiguous())
        for name in _BUFFERS:
            self.register_buffer(name, getattr(weight, name).contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(weight.dictionary).clone())

    @property
    def dictionary_size(self) -> int:
        """k, vectors in the dictionary of each convolution group."""
        return self.dictionary.shape[1]

    @property
    def group_size(self) -> int:
        """g, filters that share one set of indices."""
        return self.filters.shape[1]

    def lookup_weight(self) -> LookupWeight:
        """The weight as one object that shares this module's tensors."""
        tensors = {name: getattr(self, name) for name in ("dictionary", "coefficients", *_BUFFERS)}
        return LookupWeight(**tensors, kernel_size=self.kernel_size)

    def _sizes(self) -> str:
        taps = self.coefficients.shape[0] / self.filters.shape[0]
        return f"dictionary_size={self.dictionary_size}, taps={taps:g}, group_size={self.group_size}, lowering={self.lowering!r}"


class LookupConv2d(LookupModule):
    """A drop-in ``nn.Conv2d`` whose weight is a lookup weight: [N, m, H, W] or [m, H, W] in, as ``nn.Conv2d`` out.

    All arguments of ``nn.Conv2d`` mean what they mean there, with every padding_mode and string padding; the sizes
    (``dictionary_size``, ``sparsity``, ``group_size``) are :class:`~lcnn_compile.config.LayerConfig`'s.

    Raises:
        ConfigError: for arguments that ``nn.Conv2d`` would refuse, and sizes out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        dictionary_size: int | float = 0.25,
        sparsity: float | None = 6,
        group_size: int = 8,
        lowering: str = "auto",
    ):
        super().__init__()
        args = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        conv = _dense(nn.Conv2d, *args, device="meta")
        config = LayerConfig(dictionary_size=dictionary_size, sparsity=sparsity, group_size=group_size)
        weight = random_weight(groups, in_channels, out_channels, conv.kernel_size, config)
        offset = None
        if bias:
            bound = (in_channels // groups * conv.kernel_size[0] * conv.kernel_size[1]) ** -0.5
            offset = torch.empty(out_channels).uniform_(-bound, bound)
        self._set_geometry(conv)
        self._set_weight(weight, offset, lowering)
        self.to(device=device, dtype=dtype)

    def _set_geometry(self, conv: nn.Conv2d) -> None:
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, conv.groups
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.padding_mode = conv.padding_mode
        self.output_padding, self.transposed = conv.output_padding, False
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        self.pads = (top, bottom, left, right)

    @classmethod
    def from_weight(cls, weight: LookupWeight, conv: nn.Conv2d, bias: Tensor | None, lowering: str = "auto") -> LookupConv2d:
        """The module that applies ``weight`` [n, m/groups, kh, kw] and ``bias`` [n] with the geometry of ``conv``.

        Raises:
            WeightError: if the weight is invalid or does not fit the convolution.
        """
        weight.validate("LookupConv2d.from_weight")
        found = (weight.in_channels, weight.out_channels, weight.kernel_size, weight.groups)
        wanted = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.groups)
        if found != wanted:
            raise WeightError(f"the lookup weight has (in, out, kernel_size, groups) {found}; the convolution has {wanted}")
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._set_geometry(conv)
        module._set_weight(weight, bias, lowering)
        return module.train(conv.training)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, config: LayerConfig | None = None) -> LookupConv2d:
        """Fit a lookup convolution to the weight of ``conv`` alone; ``convert`` with calibration data fits far better.

        Exact (W itself, to the last bit) with ``dictionary_size=1.0, sparsity=None``.
        """
        config = config or LayerConfig()
        fitted = _fit_alone(conv, config)
        return cls.from_weight(fitted[0], conv, fitted[1], config.lowering)

    def dense_weight(self) -> Tensor:
        """W = P·D, [n, m/groups, kh, kw]; differentiable."""
        return self.lookup_weight().dense_weight()

    @property
    def weight(self) -> Tensor:
        """The dense weight, formed at every access, for code that reads ``conv.weight``. Writing to it changes nothing."""
        return self.dense_weight()

    def to_conv(self) -> nn.Conv2d:
        """The dense ``nn.Conv2d`` that computes the same function."""
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
            self.groups,
            self.bias is not None,
            self.padding_mode,
            self.dictionary.device,
            self.dictionary.dtype,
        )
        _copy_dense(self, conv, self.dense_weight())
        return conv

    def forward(self, input: Tensor) -> Tensor:
        """[N, m, H, W] or [m, H, W] of the module's dtype to [N, n, H', W'] or [n, H', W']."""
        # Symbolic tracing cannot branch on a dimension: a traced graph is for batches.
        batched = isinstance(input, fx.Proxy) or input.dim() == 4
        if not batched and input.dim() != 3:
            shape = list(input.shape)
            raise WeightError(f"Expected 3D (unbatched) or 4D (batched) input to LookupConv2d, but got input of size: {shape}")
        x = input if batched else input.unsqueeze(0)
        top, bottom, left, right = self.pads
        padding = self.pads
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, (left, right, top, bottom), mode=self.padding_mode), (0, 0, 0, 0)
        y = lookup_conv2d(
            x,
            self.dictionary,
            self.coefficients,
            self.indices,
            self.positions,
            self.offsets,
            self.filters,
            self.bias,
            self.out_channels,
            self.kernel_size,
            self.stride,
            padding,
            self.dilation,
            self.lowering,
        )
        return y if batched else y.squeeze(0)

    def extra_repr(self) -> str:
        """The arguments that differ from the defaults, and the sizes."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        optional = {"padding": (self.padding, (0, 0)), "dilation": (self.dilation, (1, 1)), "groups": (self.groups, 1)}
        text += "".join(f", {name}={value!r}" for name, (value, default) in optional.items() if value != default)
        text += "" if self.bias is not None else ", bias=False"
        text += "" if self.padding_mode == "zeros" else f", padding_mode={self.padding_mode!r}"
        return f"{text}, {self._sizes()}"


class LookupLinear(LookupModule):
    """A drop-in ``nn.Linear`` as a 1x1 lookup convolution (LCNN, section 3.1): [*, m] in, [*, n] out."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        dictionary_size: int | float = 0.25,
        sparsity: float | None = 6,
        group_size: int = 8,
        lowering: str = "auto",
    ):
        super().__init__()
        _dense(nn.Linear, in_features, out_features, bias, device="meta")
        self.in_features, self.out_features, self.groups = in_features, out_features, 1
        config = LayerConfig(dictionary_size=dictionary_size, sparsity=sparsity, group_size=group_size)
        offset = torch.empty(out_features).uniform_(-(in_features**-0.5), in_features**-0.5) if bias else None
        self._set_weight(random_weight(1, in_features, out_features, (1, 1), config), offset, lowering)
        self.to(device=device, dtype=dtype)

    @classmethod
    def from_weight(cls, weight: LookupWeight, linear: nn.Linear, bias: Tensor | None, lowering: str = "auto") -> LookupLinear:
        """The module that applies ``weight`` [n, m, 1, 1] and ``bias`` [n] in place of ``linear``.

        Raises:
            WeightError: if the weight is invalid or does not fit the layer.
        """
        weight.validate("LookupLinear.from_weight")
        found = (weight.in_channels, weight.out_channels, weight.kernel_size, weight.groups)
        if found != (linear.in_features, linear.out_features, (1, 1), 1):
            raise WeightError(f"the lookup weight has (in, out, kernel_size, groups) {found}; the layer is {linear}")
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module.in_features, module.out_features, module.groups = linear.in_features, linear.out_features, 1
        module._set_weight(weight, bias, lowering)
        return module.train(linear.training)

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: LayerConfig | None = None) -> LookupLinear:
        """Fit a lookup layer to the weight of ``linear`` alone; ``convert`` with calibration data fits far better."""
        config = config or LayerConfig()
        fitted = _fit_alone(linear, config)
        return cls.from_weight(fitted[0], linear, fitted[1], config.lowering)

    def dense_weight(self) -> Tensor:
        """W = P·D, [n, m]; differentiable."""
        return self.lookup_weight().dense_weight()[:, :, 0, 0]

    @property
    def weight(self) -> Tensor:
        """The dense weight, formed at every access, for code that reads ``linear.weight``. Writing to it changes nothing."""
        return self.dense_weight()

    def to_linear(self) -> nn.Linear:
        """The dense ``nn.Linear`` that computes the same function."""
        like = {"device": self.dictionary.device, "dtype": self.dictionary.dtype}
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, **like)
        _copy_dense(self, linear, self.dense_weight())
        return linear

    def forward(self, input: Tensor) -> Tensor:
        """[*, m] of the module's dtype to [*, n]."""
        if not isinstance(input, fx.Proxy) and (input.dim() == 0 or input.shape[-1] != self.in_features):
            raise WeightError(f"LookupLinear: input has shape {tuple(input.shape)}; [*, {self.in_features}] is required")
        y = lookup_conv2d(
            input.reshape(-1, self.in_features, 1, 1),
            self.dictionary,
            self.coefficients,
            self.indices,
            self.positions,
            self.offsets,
            self.filters,
            self.bias,
            self.out_features,
            (1, 1),
            (1, 1),
            (0, 0, 0, 0),
            (1, 1),
            self.lowering,
        )
        return y.reshape(input.shape[:-1] + (self.out_features,))  # noqa: RUF005 (a traced shape cannot be unpacked)

    def extra_repr(self) -> str:
        """Features, bias and sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {self._sizes()}"


def _copy_dense(module: LookupModule, dense: nn.Conv2d | nn.Linear, weight: Tensor) -> None:
    with torch.no_grad():
        dense.weight.copy_(weight)
        if module.bias is not None and dense.bias is not None:
            dense.bias.copy_(module.bias)
    dense.train(module.training)


def _fit_alone(layer: nn.Conv2d | nn.Linear, config: LayerConfig) -> tuple[LookupWeight, Tensor | None]:
    from lcnn_compile.learning import fit_model

    fitted = fit_model(layer, {"": layer}, {"": config}, calibration=None, call=lambda model, batch: model(batch))[""]
    if fitted.reason:
        raise ConversionError(f"{type(layer).__name__}: {fitted.reason}")
    return fitted.weight, fitted.bias


def dense_layer(module: LookupModule) -> nn.Conv2d | nn.Linear:
    """The dense layer that a lookup module stands for."""
    if isinstance(module, LookupConv2d):
        return module.to_conv()
    if isinstance(module, LookupLinear):
        return module.to_linear()
    raise ConversionError(f"{type(module).__name__} has no dense counterpart")


def lookup_layer(weight: LookupWeight, layer: nn.Conv2d | nn.Linear, bias: Tensor | None, lowering: str = "auto") -> LookupModule:
    """The lookup module that takes the place of ``layer``."""
    if isinstance(layer, nn.Linear):
        return LookupLinear.from_weight(weight, layer, bias, lowering)
    return LookupConv2d.from_weight(weight, layer, bias, lowering)


def lookup_modules(model: nn.Module) -> Iterator[tuple[str, LookupModule]]:
    """Qualified name and module of every lookup module in ``model``."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LookupModule))


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put ``new`` wherever ``old`` hangs in ``model``, with its hooks; the model itself if that is ``old``."""
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"):
        getattr(new, hooks).update(getattr(old, hooks))
    if model is old:
        return new
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    return model
