"""Samples of what layers see and should answer: patches of S and outputs at random pixels, part of them held out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lcnn_compile.fitting.network import Network
from lcnn_compile.fitting.processes import Processes
from lcnn_compile.fitting.slices import rows_of
from lcnn_compile.fitting.statistics import InputMoments
from lcnn_compile.torch_private import pytree

BATCH_ELEMENTS = 10_000_000  # of input kept for the layer-by-layer passes: 66 images of 224x224, 3400 of 32x32
BATCH_IMAGES = 1024
PIXELS = 16384  # sampled per layer
PATCH_ELEMENTS = 24_000_000  # floats of patches per layer at most; fewer pixels where patches are large
CALL_ELEMENTS = 16_000_000  # of one layer's input and output together, while a batch runs: larger batches run in parts
OUTPUT_ELEMENTS = 200_000_000  # floats of outputs kept between passes
HELD_OUT = 5  # one image in HELD_OUT measures, the others fit


def to_bfloat16(values: Tensor) -> Tensor:
    """Rounded to bfloat16, in their own dtype."""
    return values.to(torch.bfloat16).to(values.dtype)


@dataclass
class Calibration:
    """What one pass over the calibration data leaves.

    Attributes:
        batches: a bounded number of batches, copied.
        moments: of each layer's inputs, over all of the data.
        images: for each kept batch and layer, the images of each call.
        order: layers in the order of their first call.
    """

    moments: dict[str, InputMoments]
    batches: list[Any] = field(default_factory=list)
    images: list[dict[str, list[int]]] = field(default_factory=list)
    order: list[str] = field(default_factory=list)

    def combine(self, processes: Processes) -> None:
        """Make moments and order those of all processes; batches stay with the process that read them."""
        for name in self.moments:
            self.moments[name].combine(processes)
        self.order = processes.order(self.order)

    def total_images(self, name: str) -> int:
        """Images that the kept batches show to a layer."""
        return sum(sum(batch.get(name, [])) for batch in self.images)

    def held_rows(self, number: int) -> Tensor | None:
        """bool [images of the batch]: those that no layer is fitted to; None where a batch is not one call of the first layer."""
        counts = [batch.get(self.order[0], []) if self.order else [] for batch in self.images]
        total = sum(map(sum, counts))
        if total < 2 or any(len(calls) > 1 for calls in counts):
            return None
        return held_images(torch.arange(sum(counts[number])) + sum(map(sum, counts[:number])), total)


class _TooLargeError(BaseException):  # a signal, which a model's `except Exception` must not catch
    """A layer's input and output have so many elements."""


def calibrate(network: Network, data: Iterable[Any], seed: int, progress: Callable[[int], None] | None = None) -> Calibration:
    """The streaming pass: input moments of every layer over all of ``data``, which may be a generator.

    Batches run whole until a layer of the first one turns out too large; then all run in parts.
    """
    result = _Stream(network, seed)
    together: int | None = None
    for number, whole in enumerate(data, 1):
        while True:
            pieces = list(_pieces(whole, together))
            images = leading(pieces[0])
            try:
                for batch in pieces:
                    result.add(batch, CALL_ELEMENTS if number == 1 and images > 1 else None)
                break
            except _TooLargeError as found:
                together, result = max(1, CALL_ELEMENTS * images // found.args[0]), _Stream(network, seed)
        if progress is not None:
            progress(number)
    return result.calibration


class _Stream:
    """A calibration that grows by batches."""

    def __init__(self, network: Network, seed: int):
        self._network = network
        self.calibration = Calibration({name: InputMoments(geometry, seed) for name, geometry in network.geometry.items()})
        self._kept = self._samples = 0

    def add(self, batch: Any, most: int | None) -> None:
        """Run a batch; a layer that has over ``most`` elements ends it with _TooLargeError."""
        images: dict[str, list[int]] = {}
        self._network.run(batch, {name: _streamer(self.calibration, name, images, most) for name in self._network.layers})
        if self._kept < BATCH_ELEMENTS and self._samples < BATCH_IMAGES:
            self._kept += _elements(batch)
            self._samples += leading(batch) or 1
            self.calibration.batches.append(pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), batch))
            self.calibration.images.append(images)


def held_images(number: Tensor, total: int) -> Tensor:
    """Which of ``total`` images, by number, are held out: about one in HELD_OUT, spread evenly."""
    held = max(1, round(total / HELD_OUT))
    return (number * held) % total < held


def leading(batch: Any) -> int:
    """Images in a batch whose tensors all count them in their first dimension and of which the first is [N, C, H, W]; else 0."""
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    if not tensors or tensors[0].dim() < 4 or any(t.shape[:1] != tensors[0].shape[:1] for t in tensors):
        return 0
    return tensors[0].shape[0]


def _elements(batch: Any) -> int:
    return sum(leaf.numel() for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor))


def _pieces(batch: Any, together: int | None) -> Iterator[Any]:
    """The batch, or if it is too large to keep or to run, parts of it, of at most so many images."""
    images = leading(batch)
    size = max(1, images * BATCH_ELEMENTS // max(1, _elements(batch)))
    size = size if together is None else min(size, together)
    if not images or size >= images:
        yield batch
        return
    for start in range(0, images, size):
        yield rows_of(batch, start, start + size)


def _streamer(result: Calibration, name: str, images: dict[str, list[int]], most: int | None) -> Callable[[Tensor, Tensor], None]:
    def watch(x: Tensor, y: Tensor) -> None:
        if most is not None and (elements := x.numel() + y.numel()) > most:
            raise _TooLargeError(elements)
        if name not in result.order:
            result.order.append(name)
        images.setdefault(name, []).append(x.shape[0])
        result.moments[name].update(x)

    return watch


@dataclass(frozen=True)
class Sample:
    """Pixels of one layer.

    Attributes:
        patches: [p, groups, kh·kw, k], S at every kernel position.
        outputs: [p, n], what the layer should answer there.
        held: bool [p], pixels of images that only measure.
    """

    patches: Tensor
    outputs: Tensor
    held: Tensor


class Sampler:
    """Draws samples of layers; the same pixels each time."""

    def __init__(self, network: Network, calibration: Calibration, seed: int, processes: Processes | None = None) -> None:
        self.network = network
        self.calibration = calibration
        self.seed = seed
        self.processes = processes or Processes()
        self._number = {name: i for i, name in enumerate(network.layers)}
        self._remembered: dict[str, list[_Draw]] = {}

    def remember(self, planes: Mapping[str, int]) -> None:
        """Keep the original network's outputs at the pixels that later samples will ask for, as far as memory allows.

        It saves a run of the original network for each of these layers, which are to have so many planes of S.
        """
        names, room = [], OUTPUT_ELEMENTS
        for name, count in planes.items():
            room -= self._budget(name, count) * self.network.geometry[name].out_channels
            if room < 0:
                break
            names.append(name)
        self._remembered = {name: self._draws(name, planes[name]) for name in names}
        self._run([self._remembered[name] for name in names], "outputs")

    def collect(
        self, dictionaries: Mapping[str, Tensor | None], *, compressed: bool, rounded: Collection[str] = ()
    ) -> dict[str, Sample]:
        """Samples for the layers in ``dictionaries`` (D [groups, k, m/groups] each; None for S = x).

        Patches of the layers in ``rounded`` are what they are where x, D and S are bfloat16.

        Outputs are the original network's. Inputs are too, or the compressed network's. Where the compressed network
        takes another path through the code, calls that have no counterpart are left out.
        """
        old, new = {}, {}
        for name, dictionary in dictionaries.items():
            if name in self._remembered:
                old[name] = self._remembered.pop(name)
            else:
                planes = self.network.geometry[name].in_channels if dictionary is None else dictionary.shape[:2].numel()
                new[name] = self._draws(name, planes)
        both = old | new
        for name, dictionary in dictionaries.items():
            for draw in both[name]:
                draw.dictionary, draw.rounded = dictionary, name in rounded
        if compressed and self.network.fitted:
            self._run(new.values(), "outputs")
            self._run(both.values(), "inputs", compressed=True)
        else:
            self._run(new.values(), "inputs", "outputs")
            self._run(old.values(), "inputs")
        parts = {name: [pair for draw in draws for pair in draw.pairs()] for name, draws in both.items()}
        return {name: sample for name, part in parts.items() if (sample := self._joined(name, dictionaries[name], part))}

    def _joined(self, name: str, dictionary: Tensor | None, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> Sample | None:
        """The sample of all processes; None where it is empty."""
        if self.processes.count == 1:
            return Sample(*(torch.cat(t) for t in zip(*pairs, strict=True))) if pairs else None
        geometry, weight = self.network.geometry[name], self.network.layers[name].weight
        planes = geometry.channels if dictionary is None else dictionary.shape[1]
        nothing = (
            torch.zeros(0, geometry.groups, geometry.area, planes, device=weight.device),
            torch.zeros(0, geometry.out_channels, device=weight.device),
            torch.zeros(0, dtype=torch.bool, device=weight.device),
        )
        tensors = [self.processes.gather(torch.cat(t)) for t in zip(nothing, *pairs, strict=True)]
        return Sample(*tensors) if len(tensors[0]) else None

    def _draws(self, name: str, planes: int) -> list[_Draw]:
        """One for each batch."""
        draws, first = [], 0
        for number, images in enumerate(self.calibration.images):
            draws.append(_Draw(self, name, planes, number, first))
            first += sum(images.get(name, []))
        return draws

    def _run(self, layers: Collection[list[_Draw]], *wants: str, compressed: bool = False) -> None:
        """Run every batch that reaches the layers, and show the draws what they want."""
        for number, batch in enumerate(self.calibration.batches):
            draws = [draws[number].start(*wants) for draws in layers]
            calls = sum(len(self.calibration.images[number].get(draw.name, [])) for draw in draws)
            if calls:
                self.network.run(batch, {draw.name: draw.watch for draw in draws}, compressed=compressed, calls=calls)

    def _budget(self, name: str, planes: int) -> int:
        """Pixels that this process samples of a layer whose S has so many planes."""
        return min(PIXELS, PATCH_ELEMENTS // (planes * self.network.geometry[name].area)) // self.processes.count

    def choose(self, name: str, planes: int, shape: Sequence[int], number: int, call: int, first: int) -> _Choice:
        """Pixels of one call on inputs of this shape, whose first image is the ``first``-th that the layer sees."""
        geometry = self.network.geometry[name]
        high, wide = geometry.output_size(shape[2], shape[3])
        total = self.calibration.total_images(name)
        quota = min(high * wide, max(1, self._budget(name, planes) // total))
        generator = torch.Generator().manual_seed(hash((self.seed, self._number[name], number, call)) % (1 << 62))
        pixel = torch.rand(shape[0], high * wide, generator=generator).topk(quota, dim=1).indices.flatten()
        image = torch.arange(shape[0]).repeat_interleave(quota)
        pixel_held, image_held = torch.arange(quota) < quota // HELD_OUT, held_images(image + first, total)
        held = image_held if total > 1 else pixel_held
        device = self.network.layers[name].weight.device
        return image.to(device), pixel.to(device), held.to(device)


_Choice = tuple[Tensor, Tensor, Tensor]  # image, output pixel, held out; one entry per sampled pixel


class _Draw:
    """The calls of one layer for one batch: first their outputs, then their inputs, in one run or in two."""

    def __init__(self, sampler: Sampler, name: str, planes: int, number: int, first: int) -> None:
        self.sampler, self.name, self.planes, self.number, self.first = sampler, name, planes, number, first
        self.dictionary: Tensor | None = None
        self.rounded = False
        self.wants: set[str] = set()
        self.call, self.image = 0, first
        self.outputs: list[tuple[Sequence[int], Tensor, Tensor]] = []
        self.inputs: list[tuple[Sequence[int], Tensor]] = []

    def start(self, *wants: str) -> _Draw:
        """A run begins that is to show "inputs", "outputs" or both."""
        self.wants, self.call, self.image = set(wants), 0, self.first
        return self

    def watch(self, x: Tensor, y: Tensor) -> None:
        image, pixel, held = self.sampler.choose(self.name, self.planes, x.shape, self.number, self.call, self.image)
        if "outputs" in self.wants:
            self.outputs.append((x.shape, y.flatten(2)[image, :, pixel], held))
        if "inputs" in self.wants:
            self.inputs.append((x.shape, self._patches(x, image, pixel)))
        self.call += 1
        self.image += x.shape[0]

    def _patches(self, x: Tensor, image: Tensor, pixel: Tensor) -> Tensor:
        geometry = self.sampler.network.geometry[self.name]
        cast = to_bfloat16 if self.rounded else lambda values: values
        s = cast(x).reshape(x.shape[0], geometry.groups, geometry.channels, -1)
        if self.dictionary is not None:
            s = cast(torch.einsum("gkm,ngmp->ngkp", cast(self.dictionary), s))
        patches = geometry.patches(s.reshape(x.shape[0], -1, *x.shape[2:]), image, pixel)
        return patches.unflatten(2, s.shape[1:3]).transpose(1, 2)

    def pairs(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Patches, outputs and held-out marks of the calls that agree in shape."""
        both = zip(self.inputs, self.outputs, strict=False)
        return [(patches, outputs, held) for (seen, patches), (shape, outputs, held) in both if seen == shape]
