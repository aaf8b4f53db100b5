"""CIFAR-10 for the accuracy benchmark: decoded once, augmented on the fly as whole batches."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lcnn_compile.errors import LcnnError

MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
CALIBRATION_IMAGES = 512
SHIFT = 4  # pixels of padding from which a training image is cropped
VIEWS = 5  # of each training image, so that a teacher need not run in every epoch


class Images:
    """The training and test images, uint8 [N, 3, 32, 32], and their labels, int64 [N]."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.train, self.test = (torch.from_numpy(arrays[f"{part}_images"]) for part in ("train", "test"))
        self.train_labels, self.test_labels = (
            torch.from_numpy(arrays[f"{part}_labels"].astype(np.int64)) for part in ("train", "test")
        )

    @classmethod
    def read(cls, data: Path, cache: Path) -> Images:
        """Decode ``cifar10_jpeg.npz`` in the folder ``data``, or take the pixels from the file ``cache``, which is written.

        Raises:
            LcnnError: if the folder has no such file.
        """
        if not cache.exists():
            source = data / "cifar10_jpeg.npz"
            if not source.exists():
                raise LcnnError(
                    f"{source} is missing: CIFAR-10 as JPEG bytes, arrays train_jpeg, train_offsets, train_labels, test_…"
                )
            arrays = {}
            with np.load(source) as packed:
                for part in ("train", "test"):
                    arrays[f"{part}_images"] = _decode(packed[f"{part}_jpeg"], packed[f"{part}_offsets"])
                    arrays[f"{part}_labels"] = packed[f"{part}_labels"]
            cache.parent.mkdir(parents=True, exist_ok=True)
            partial = cache.with_suffix(".partial.npz")
            np.savez(partial, **arrays)  # type: ignore[arg-type]
            partial.replace(cache)
        with np.load(cache) as stored:
            return cls(dict(stored))

    def calibration(self, images: int = CALIBRATION_IMAGES, batch: int = 64, *, mirrored: bool = False) -> list[Tensor]:
        """Unlabelled batches of the first training images, ``mirrored``: followed by their mirror images."""
        found = standardise(self.train[:images])
        return list((torch.cat([found, found.flip(3)]) if mirrored else found).split(batch))


def _decode(stream: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    from PIL import Image

    places = itertools.pairwise(offsets)
    pixels = (np.asarray(Image.open(io.BytesIO(stream[a:b].tobytes()))) for a, b in places)
    return np.stack([image.transpose(2, 0, 1) for image in pixels])


def standardise(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] to the floats that the network reads, channels last in memory."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)


class TrainingBatches:
    """Shuffled ((images, keys), labels) batches, images flipped and shifted; the last, smaller one is left out.

    Every image has VIEWS ways to be flipped and shifted, drawn at random once; epoch e, set by ``set_epoch`` and counted up
    with each pass, shows one of them and is the same in every run with the same seed. A key, int64 [N], names image and view.
    """

    def __init__(self, images: Images, size: int = 128, seed: int = 0) -> None:
        self.images, self.size, self.seed, self.epoch = images, size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Which pass comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.images.train) // self.size

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        count, view = len(self.images.train), self.epoch % VIEWS
        order = torch.randperm(count, generator=torch.Generator().manual_seed(1000 * self.seed + self.epoch))
        ways = Ways(count, torch.Generator().manual_seed(1000 * self.seed + 500 + view))
        self.epoch += 1
        for chosen in order[: len(self) * self.size].split(self.size):
            x = standardise(ways.applied(self.images.train[chosen], chosen))
            yield (x, view * count + chosen), self.images.train_labels[chosen]


class Ways:
    """How each of ``count`` images is flipped, with probability 1/2, and shifted by up to SHIFT pixels, mirrored at the edges."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.shifts = torch.randint(0, 2 * SHIFT + 1, (2, count, 1), generator=generator)
        self.flips = torch.rand(count, 1, generator=generator) < 0.5

    def applied(self, images: Tensor, numbers: Tensor) -> Tensor:
        """The images [N, 3, H, W], whose numbers are given, as they are seen."""
        count, _, high, wide = images.shape
        padded = F.pad(images.float(), (SHIFT,) * 4, mode="reflect").to(images.dtype)
        top, left = self.shifts[:, numbers]
        rows, columns = top + torch.arange(high), left + torch.arange(wide)
        columns = torch.where(self.flips[numbers], columns.flip(1), columns)
        picked = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return picked.permute(0, 3, 1, 2)


class RememberedTeacher(nn.Module):
    """A network whose outputs [N, classes] are kept by the key of each input, and in ``file``: it runs once for each.

    Args:
        network: the teacher.
        keys: how many there may be.
        classes: of its outputs.
        file: read where it exists; :meth:`save` writes it.
    """

    def __init__(self, network: nn.Module, keys: int, classes: int, file: Path) -> None:
        super().__init__()
        self.network, self.file = network, file
        self.outputs = load_file(file)["outputs"] if file.exists() else torch.full((keys, classes), torch.nan)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """The outputs for images [N, 3, H, W] and keys [N]."""
        x, keys = inputs
        new = self.outputs[keys, 0].isnan()
        if new.any():
            self.outputs[keys[new]] = self.network(x[new]).float()
        return self.outputs[keys]

    def save(self) -> None:
        """Keep what is known for the next time."""
        partial = self.file.with_suffix(".partial")
        save_file({"outputs": self.outputs}, partial)
        partial.replace(self.file)


@torch.no_grad()
def top1(model: Callable[[Tensor], Tensor], images: Images, limit: int | None = None) -> float:
    """Share of the (first ``limit``) test images that are named rightly, in percent."""
    found = torch.cat([model(standardise(part)).argmax(1) for part in images.test[:limit].split(500)])
    return 100 * float((found == images.test_labels[:limit]).float().mean())
