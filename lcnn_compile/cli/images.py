"""Calibration batches from a folder of images."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcnn_compile.errors import ConversionError, LcnnWarning

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NAMED = 5


@dataclass(frozen=True)
class Images:
    """How an image becomes an input: resized, cropped from the middle, scaled to [0, 1], normalised.

    Attributes:
        size: (height, width) of the crop.
        resize: length of the shorter side before the crop; None for 8/7 of the larger side of ``size`` (256 for 224).
        mean, std: per channel, subtracted from and dividing pixels in [0, 1]; a single number each means grey images.
        limit: at most so many images, spread evenly over the sorted folder.
    """

    size: tuple[int, int]
    resize: int | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    limit: int = 512

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise ConversionError(f"mean is {self.mean} and std {self.std}; one number each, or three each, are required")
        if not all(value > 0 for value in self.std):
            raise ConversionError(f"std is {self.std}; numbers > 0 are required")
        if self.resize is not None and self.resize < max(self.size):
            raise ConversionError(f"resize is {self.resize}; it must be at least the crop's larger side, {max(self.size)}")


class ImageFolder:
    """Batches [N, channels, height, width], float32, of a folder's images in the order of their names, subfolders included.

    Files that cannot be read as images are left out, with one warning that names them.

    Raises:
        ConversionError: if Pillow is not installed, or no image is found or can be read.
    """

    def __init__(self, folder: Path, images: Images, batch: int):
        try:
            from PIL import Image
        except ImportError as error:
            raise ConversionError("a folder of images needs Pillow: pip install 'lcnn-compile[images]'") from error
        known = set(Image.registered_extensions())
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in known and path.is_file())
        if not files:
            raise ConversionError(f"{folder} has no images; files that end in .jpg, .png and the like are looked for")
        chosen = np.linspace(0, len(files) - 1, min(images.limit, len(files))).round().astype(int)
        self.files, self._images, self._batch = [files[i] for i in chosen], images, batch

    def __len__(self) -> int:
        return -(-len(self.files) // self._batch)

    def __iter__(self) -> Iterator[Tensor]:
        ready: list[Tensor] = []
        unreadable: list[str] = []
        for file in self.files:
            try:
                ready.append(read_image(file, self._images))
            except (OSError, ValueError, SyntaxError) as error:
                # Pillow raises SyntaxError for some damaged PNGs.
                unreadable.append(f"{file} ({type(error).__name__})")
            if len(ready) == self._batch:
                yield torch.stack(ready)
                ready = []
        if len(unreadable) == len(self.files):
            raise ConversionError(f"none of the {len(self.files)} images can be read, the first is {unreadable[0]}")
        if unreadable:
            names = ", ".join(unreadable[:NAMED]) + (", …" if len(unreadable) > NAMED else "")
            warnings.warn(
                f"{len(unreadable)} of {len(self.files)} images cannot be read and are left out: {names}", LcnnWarning, 2
            )
        if ready:
            yield torch.stack(ready)


def read_image(file: Path, images: Images) -> Tensor:
    """One image as [channels, height, width], float32, normalised."""
    from PIL import Image, ImageOps

    high, wide = images.size
    with Image.open(file) as opened:
        picture: Any = ImageOps.exif_transpose(opened).convert("L" if len(images.mean) == 1 else "RGB")
    short = images.resize or round(max(high, wide) * 8 / 7)
    scale = max(short / min(picture.size), high / picture.height, wide / picture.width)
    size = (max(wide, round(picture.width * scale)), max(high, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    left, top = (picture.width - wide) // 2, (picture.height - high) // 2
    pixels = np.asarray(picture.crop((left, top, left + wide, top + high)), np.float32) / 255
    mean, std = (np.asarray(values, np.float32) for values in (images.mean, images.std))
    pixels = (pixels.reshape(high, wide, -1) - mean) / std
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
