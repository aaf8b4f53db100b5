"""Running a network to look at chosen layers, as it was or with the layers fitted so far in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lcnn_compile.geometry import Geometry, Layer, geometry_of

Watcher = Callable[[Tensor, Tensor], None]  # input [N, m, H, W] and output [N, n, OH, OW] of one call


class _Reached(BaseException):  # a signal, which a model's `except Exception` must not catch
    """Every call that was wanted has been seen."""


class Network:
    """A model, its layers, and the weights that stand in for those already fitted.

    Attributes:
        geometry: of each layer.
        fitted: dense weight [n, m/groups, kh, kw] and bias that replace a layer's own in compressed runs.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Layer], call: Callable[[nn.Module, Any], Any]) -> None:
        self.model = model
        self.layers = dict(layers)
        self.call = call
        self.geometry = {name: geometry_of(layer) for name, layer in layers.items()}
        self.fitted: dict[str, tuple[Tensor, Tensor | None]] = {}

    def weight(self, name: str) -> Tensor:
        """The layer's own weight as [n, m/groups, kh, kw]."""
        return self.geometry[name].weight(self.layers[name].weight.detach())

    def bias(self, name: str) -> Tensor | None:
        """The layer's own bias."""
        bias = self.layers[name].bias
        return None if bias is None else bias.detach()

    def run(self, batch: Any, watch: Mapping[str, Watcher], *, compressed: bool = False, calls: int | None = None) -> Any:
        """Run one batch and show each call of the watched layers; stop early once ``calls`` of them were seen."""
        with torch.no_grad(), ExitStack() as stack:
            if compressed:
                stack.enter_context(self._compressed())
            left = [-1 if calls is None else calls]
            for name, watcher in watch.items():
                hook = self._hook(self.geometry[name], watcher, left)
                stack.callback(self.layers[name].register_forward_hook(hook, with_kwargs=True).remove)
            try:
                return self.call(self.model, batch)
            except _Reached:
                return None

    @staticmethod
    def _hook(geometry: Geometry, watcher: Watcher, left: list[int]) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = geometry.images(args[0] if args else kwargs["input"])
            watcher(x, geometry.outputs(output, x))
            left[0] -= 1
            if left[0] == 0:
                raise _Reached

        return hook

    @contextmanager
    def _compressed(self) -> Iterator[None]:
        """The fitted layers compute with their new weights, by an instance attribute that shadows ``forward``."""

        def shadow(geometry: Geometry, weight: Tensor, bias: Tensor | None) -> Callable[..., Tensor]:
            def forward(input: Tensor, *output_size: Any, **named: Any) -> Tensor:
                return geometry.apply(input, weight, bias, *output_size, **named)

            return forward

        try:
            for name, (weight, bias) in self.fitted.items():
                object.__setattr__(self.layers[name], "forward", shadow(self.geometry[name], weight, bias))
            yield
        finally:
            for name in self.fitted:
                self.layers[name].__dict__.pop("forward", None)
