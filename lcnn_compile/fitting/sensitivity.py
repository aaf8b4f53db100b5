"""How much an error of each layer matters to the network's output, by random projections and one backward pass each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lcnn_compile.fitting.network import Network
from lcnn_compile.fitting.output_error import Reference, output_tensors
from lcnn_compile.fitting.processes import Processes
from lcnn_compile.fitting.slices import first_rows, row_count
from lcnn_compile.geometry import Geometry
from lcnn_compile.torch_private import pytree

PROBES = 4  # random projections of the output
IMAGES = 64  # samples that are looked at at most
ELEMENTS = 2_500_000  # of input that is looked at, about: 16 images of 224x224
SLICE_BYTES = 1 << 28  # kept for the backward pass of the samples that go through the network together
ALL_BYTES = 1 << 30  # the same, of all samples that are looked at one after the other
MOST_BYTES = 3 << 30  # what one sample alone may need
FLOOR = 1e-3  # of the mean, for layers whose gradient vanishes or cannot be had
CHANNEL_FLOOR = 0.1  # of the layer's mean, for its channels


@dataclass(frozen=True)
class Sensitivity:
    """What errors of one layer mean to the network's output.

    Attributes:
        layer: weight of the layer's relative error against other layers'; 1 on average.
        channels: weight of each output channel's squared error, [n], 1 on average; None where it is not known.
        share: Σ over the network's outputs of their relative error, for a relative error of 1 of this layer (channels
            weighted as above) alone; None where it is not known.
    """

    layer: float
    channels: Tensor | None
    share: float | None = None


@dataclass
class Seen:
    """Which part of the data was looked at, and why not more.

    Attributes:
        samples: that were looked at.
        remark: "" where nothing stood in the way.
    """

    samples: int = 0
    remark: str = ""


class _TooMuchError(Exception):
    """One sample keeps more for its backward pass than there is room for."""


def output_sensitivity(
    network: Network,
    batches: Sequence[Any],
    names: Collection[str],
    seed: int,
    processes: Processes | None = None,
    seen: Seen | None = None,
) -> dict[str, Sensitivity]:
    """Weights for the errors of each layer; 1 for all where the network cannot be differentiated.

    With gradients g of random ±1 combinations of the outputs, E[Σ g²·e²] is the squared error of the outputs that
    an error e of a layer's output causes, were it independent from pixel to pixel. For whole layers its square root is
    taken because later layers, fitted on what the earlier ones really give, make up for part of it.

    Samples go through the network a few at a time, so many that SLICE_BYTES are kept for the backward pass.

    Args:
        network: whose layers are asked about.
        batches: of real inputs, of which the first samples are used.
        names: the layers.
        seed: of the projections.
        processes: that ask together, each with batches of its own.
        seen: told which part of the data was used.
    """
    seen = seen or Seen()
    found = _Squares(network, names, seed)
    for pieces in (False, True):  # the second time with whole batches, where their rows are no samples of their own
        try:
            found.look(batches, seen, pieces)
            break
        except _TooMuchError:
            seen.remark = (
                f"one input alone keeps over {MOST_BYTES >> 30} GB for a backward pass: errors of all layers count alike "
                "(calibrate with smaller inputs, or with batches of few)"
            )
        except RuntimeError:  # no derivative somewhere inside the model
            seen.remark = "the network cannot be differentiated: errors of all layers count alike"
        found = _Squares(network, names, seed)
    pairs = found.pairs()
    if processes is not None and processes.count > 1:
        pairs = _shared(network, pairs, names, processes)
    totals = {name: float((gradient * variance).sum()) for name, (gradient, variance) in pairs.items()}
    mean = sum(totals.values()) / max(1, len(totals))
    if not 0 < mean < float("inf"):
        return dict.fromkeys(names, Sensitivity(1.0, None))
    result = {}
    for name in names:
        gradient, _ = pairs.get(name, (None, None))
        level = 0.0 if gradient is None else float(gradient.mean())
        channels = None if gradient is None or not level > 0 else (gradient / level).clamp(min=CHANNEL_FLOOR)
        total = totals.get(name, 0.0)
        result[name] = Sensitivity(max(total / mean, FLOOR) ** 0.5, channels, max(total, FLOOR * mean))
    return result


def _shared(
    network: Network, found: Mapping[str, tuple[Tensor, Tensor]], names: Collection[str], processes: Processes
) -> dict[str, tuple[Tensor, Tensor]]:
    """Means over the processes that have found something."""
    shared = {}
    for name in names:
        layer = network.layers[name].weight
        mine = torch.zeros(3, network.geometry[name].out_channels, device=layer.device)
        if name in found:
            mine = torch.stack([*found[name], torch.ones_like(found[name][0])])
        gradient, variance, count = processes.sum(mine)
        if count[0]:
            shared[name] = (gradient / count, variance / count)
    return shared


class _Squares:
    """Sums over samples: squared gradients of each layer's channels, and what their variance takes.

    Attributes:
        squares: Σ g² of each channel over pixels and samples, the mean over probes, [n] of each layer.
    """

    def __init__(self, network: Network, names: Collection[str], seed: int) -> None:
        self._network, self._names = network, names
        self._generator = torch.Generator().manual_seed(seed)
        self.squares: dict[str, Tensor] = {}
        self._moments: dict[str, Tensor] = {}  # count, Σ y, Σ y² of each channel, of the first call in each slice

    def look(self, batches: Sequence[Any], seen: Seen, whole: bool) -> None:
        """Go through the first samples, as many as the bounds at the head of this file allow; ``whole`` batches are not cut."""
        seen.samples, seen.remark = 0, ""
        count: Callable[[Any], int] = (lambda _: 0) if whole else row_count
        part: Callable[..., Any] = (lambda batch, *_: batch) if whole else first_rows
        one = self._bytes(part(batches[0], 1))
        chosen = list(_chosen(batches, count, part, max(1, min(IMAGES, ALL_BYTES // max(1, one)))))
        with torch.no_grad():
            outputs = [output_tensors(self._network.call(self._network.model, batch)) for batch in chosen]
        scales = [1 / max(deviation, 1e-30) ** 0.5 for deviation in Reference(outputs).deviations()]
        del outputs
        size = max(1, min(SLICE_BYTES // max(1, one), IMAGES))
        with self._frozen():
            for batch in chosen:
                rows = count(batch)
                for start in range(0, max(1, rows), size):
                    stop = min(start + size, rows) if rows else 1
                    self._add(part(batch, stop, start), scales)
                    seen.samples += stop - start
        everything = sum(count(batch) or 1 for batch in batches)
        if seen.samples < min(IMAGES, everything):
            seen.remark = f"what errors of layers mean to the outputs was looked at on {seen.samples} of {everything} samples"

    def _bytes(self, batch: Any) -> int:
        """Bytes that the backward pass of a batch would keep."""
        kept: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in self._network.model.parameters() if p.numel()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
                if sum(kept.values()) > MOST_BYTES:
                    raise _TooMuchError
            return tensor

        with self._frozen(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), self._watched([]):
            self._network.call(self._network.model, batch)
        return sum(kept.values())

    def _add(self, batch: Any, scales: Sequence[float]) -> None:
        """The gradients of one slice."""
        calls: list[str] = []
        with self._watched(calls, keep=True) as token:
            outputs = output_tensors_with_gradients(self._network.call(self._network.model, batch))
        ends = [(t, scale) for t, scale in zip(outputs, scales, strict=False) if t.requires_grad]
        if not ends:
            raise RuntimeError("no output has a derivative")
        for _ in range(PROBES):
            signs = [(torch.randint(0, 2, t.shape, generator=self._generator).to(t) * 2 - 1) * scale for t, scale in ends]
            torch.autograd.grad([t for t, _ in ends], token, signs, retain_graph=True, allow_unused=True)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """No parameter wants a gradient, so that no layer's input is kept for one."""
        wanted = [p for p in self._network.model.parameters() if p.requires_grad]
        try:
            for p in wanted:
                p.requires_grad_(False)
            with torch.enable_grad():
                yield
        finally:
            for p in wanted:
                p.requires_grad_(True)

    @contextmanager
    def _watched(self, calls: list[str], *, keep: bool = False) -> Iterator[list[Tensor]]:
        """Outputs of the layers have gradients, by a zero that is added to them, and those are summed up where ``keep``."""
        tokens: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        listed: list[Tensor] = []

        def token(output: Tensor) -> Tensor:
            key = output.dtype, output.device
            if key not in tokens:
                tokens[key] = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
                listed.append(tokens[key])
            return tokens[key]

        def hook(name: str) -> Callable[..., Tensor]:
            def watch(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
                shown = output + token(output)
                if keep:
                    planes = _planes(self._network.geometry[name], args[0] if args else kwargs["input"])
                    if name not in calls:
                        self._note(name, planes(output.detach()))
                    calls.append(name)
                    shown.register_hook(lambda gradient: self._sum(name, planes(gradient)))
                return shown

            return watch

        with ExitStack() as stack:
            for name in self._names:
                handle = self._network.layers[name].register_forward_hook(hook(name), with_kwargs=True)
                stack.callback(handle.remove)
            yield listed

    def _note(self, name: str, planes: Tensor) -> None:
        planes = planes.double()
        found = torch.stack([torch.full_like(planes[:, 0], planes.shape[1]), planes.sum(1), planes.square().sum(1)])
        self._moments[name] = self._moments[name] + found if name in self._moments else found

    def _sum(self, name: str, planes: Tensor) -> None:
        found = planes.square().sum(1) / PROBES
        self.squares[name] = self.squares[name] + found if name in self.squares else found

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Σ g² and the variance of each channel, for each layer that the outputs depend on."""
        found = {}
        for name, squares in self.squares.items():
            count, total, square = self._moments[name]
            variance = (square / count - (total / count).square()).clamp(min=0)
            found[name] = (squares, variance.to(squares))
        return found


def _chosen(batches: Sequence[Any], count: Callable[[Any], int], part: Callable[[Any, int], Any], most: int) -> Iterator[Any]:
    """The first samples of all batches, ``most`` at most."""
    images = elements = 0
    for batch in batches:
        rows, size = count(batch), _elements(batch)
        few = part(batch, max(1, min(most - images, (ELEMENTS - elements) * rows // max(1, size))))
        yield few
        images, elements = images + (count(few) or 1), elements + _elements(few)
        if images >= most or elements >= ELEMENTS:
            return


def output_tensors_with_gradients(outputs: Any) -> list[Tensor]:
    """As :func:`~lcnn_compile.fitting.output_error.output_tensors`, not detached."""
    tensors = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return [t for t in tensors if t.is_floating_point()] or [t for t in tensors if not t.is_complex()]


def _planes(geometry: Geometry, input: Tensor) -> Callable[[Tensor], Tensor]:
    """What makes [n, pixels] of a layer's outputs or of their gradients, for an input like this."""
    # Of the input only its shape is asked, and keeping it would hold memory until the backward pass.
    shape = geometry.images(input).shape
    x = torch.empty((), device=input.device).expand(shape)

    def planes(t: Tensor) -> Tensor:
        images = geometry.outputs(t, x)
        return images.transpose(0, 1).reshape(images.shape[1], -1)

    return planes


def _elements(batch: Any) -> int:
    return sum(t.numel() for t in pytree.tree_leaves(batch) if isinstance(t, Tensor))
