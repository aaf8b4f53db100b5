"""Data for the real networks: made by rule, or pictures that packages ship. Calibration and test never share a picture, a text or a voice."""

from __future__ import annotations

import math
import pydoc_data.topics
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from real_models import package
from scipy import ndimage
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

RATE = 16000
CHARACTERS = "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
CALIBRATION_PICTURES = ("motorcycle_left.png", "rocket.jpg", "hubble_deep_field.jpg")
TEST_PICTURES = ("astronaut.png", "coffee.png", "ihc.png")


def frames(count: int, seed: int, test: bool) -> tuple[Tensor, Tensor]:
    """Voices of known pitch: frames [count, 1024] as CREPE wants them, and their pitch in Hz [count].

    Calibration has harmonics that fall by a power; test has formants over pulses, vibrato and other noise.
    """
    generator = np.random.default_rng(seed + (1000 if test else 0))
    time = np.arange(1024) / RATE
    made, pitches = [], []
    for _ in range(count):
        f = math.exp(generator.uniform(math.log(70), math.log(1000)))
        number = np.arange(1, max(2, min(40, int(RATE / 2 / f))))
        if test:
            formants = generator.uniform([300, 900, 2200], [900, 2200, 3500])
            widths = generator.uniform(80, 300, 3)
            gains = sum(1 / (1 + ((number * f - c) / w) ** 2) for c, w in zip(formants, widths, strict=True)) + 0.02
            wobble = 1 + generator.uniform(0, 0.004) * np.sin(
                2 * np.pi * generator.uniform(3, 7) * time + generator.uniform(0, 6)
            )
        else:
            gains = number ** -generator.uniform(0.3, 2.0) * generator.uniform(0.3, 1.0, len(number))
            wobble = 1 + generator.uniform(-0.01, 0.01) * (time - time.mean()) / time[-1]
        phase = 2 * np.pi * np.cumsum(f * wobble) / RATE
        wave = (gains[:, None] * np.sin(number[:, None] * phase + generator.uniform(0, 6.28, (len(number), 1)))).sum(0)
        wave /= wave.std()
        level = 10 ** (-generator.uniform(0, 25) / 20)
        wave = wave + level * generator.standard_normal(1024)
        made.append((wave - wave.mean()) / wave.std())
        pitches.append(float(f * wobble.mean()))
    return torch.tensor(np.stack(made), dtype=torch.float32), torch.tensor(pitches)


def pitch_accuracy(salience: Tensor, pitches: Tensor) -> float:
    """Share of frames in % whose pitch is right within 50 cents (raw pitch accuracy)."""
    bins = torch.arange(360)
    near = (bins - salience.argmax(1, keepdim=True)).abs() <= 4
    weights = salience * near
    cents = (weights * (20 * bins + 1997.3794084376191)).sum(1) / weights.sum(1)
    truth = 1200 * torch.log2(pitches / 10)
    return 100 * float(((cents - truth).abs() <= 50).double().mean())


@cache
def _words(test: bool) -> list[str]:
    topics = sorted(pydoc_data.topics.topics.items())[int(test) :: 2]
    words = [word for _, text in topics for word in re.findall(r"\S+", text) if set(word) <= set(CHARACTERS)]
    return [word for word in words if len(word) <= 14]


@cache
def _fonts(test: bool) -> list[str]:
    import matplotlib as mpl

    folder = Path(mpl.get_data_path()) / "fonts" / "ttf"
    names = (
        ("DejaVuSans", "DejaVuSerif-Italic", "DejaVuSansMono-Bold")
        if test
        else ("DejaVuSerif", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSans-Oblique")
    )
    return [str(folder / f"{name}.ttf") for name in names]


def lines(count: int, seed: int, test: bool) -> tuple[Tensor, list[str]]:
    """Rendered text lines, blurred, turned a little and noisy: [count, 1, 64, 512] in [-1, 1], and what is written there."""
    generator = np.random.default_rng(seed + (1000 if test else 0))
    words, fonts = _words(test), _fonts(test)
    made, texts = [], []
    while len(made) < count:
        text = " ".join(generator.choice(words, int(generator.integers(1, 4))))
        font = ImageFont.truetype(str(generator.choice(fonts)), int(generator.integers(24, 40)))
        width = int(font.getlength(text)) + 24
        if width > 512:
            continue
        back, ink = generator.uniform(130, 255), generator.uniform(0, 90)
        picture = Image.new("L", (512, 64), int(back))
        ImageDraw.Draw(picture).text((12, int(generator.integers(6, 16))), text, fill=int(ink), font=font)
        picture = picture.rotate(generator.uniform(-1, 1), Image.Resampling.BILINEAR, fillcolor=int(back))
        grey = ndimage.gaussian_filter(np.asarray(picture, np.float32), generator.uniform(0.3, 1.4))
        grey += generator.normal(0, generator.uniform(2, 18), grey.shape)
        made.append(grey.clip(0, 255) / 127.5 - 1)
        texts.append(text)
    return torch.tensor(np.stack(made), dtype=torch.float32)[:, None], texts


def character_accuracy(scores: Tensor, texts: Sequence[str]) -> float:
    """100 % less edits for each character, read greedily."""
    edits = total = 0
    for row, text in zip(scores.argmax(2).tolist(), texts, strict=True):
        read = "".join(CHARACTERS[c - 1] for c, before in zip(row, [0, *row[:-1]], strict=True) if c and c != before)
        edits, total = edits + _edits(read, text), total + len(text)
    return 100 * (1 - edits / total)


def _edits(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


def pages(count: int, seed: int, test: bool, size: int = 320) -> tuple[Tensor, list[list[tuple[int, int, int, int]]]]:
    """Pages with scattered words, [count, 3, size, size] as CRAFT wants them, and the boxes of the words."""
    generator = np.random.default_rng(seed + (1000 if test else 0))
    words, fonts = [w for w in _words(test) if len(w) > 2], _fonts(test)
    grounds = pictures(test)
    made, boxes = [], []
    for _ in range(count):
        ground = grounds[int(generator.integers(len(grounds)))]
        top, left = (int(generator.integers(s - size + 1)) for s in ground.shape[:2])
        faded = 255 - generator.uniform(0.1, 0.5) * (255 - 255 * ground[top : top + size, left : left + size])
        picture = Image.fromarray(faded.astype(np.uint8))
        draw, found = ImageDraw.Draw(picture), []
        y = int(generator.integers(8, 24))
        while y < size - 40:
            font = ImageFont.truetype(str(generator.choice(fonts)), int(generator.integers(15, 30)))
            x = int(generator.integers(6, 40))
            while True:
                word = str(generator.choice(words))
                box = draw.textbbox((x, y), word, font=font)
                if box[2] > size - 6:
                    break
                draw.text((x, y), word, font=font, fill=tuple(int(v) for v in generator.integers(0, 90, 3)))
                found.append(box)
                x = int(box[2]) + int(generator.integers(14, 40))
            y += int(generator.integers(36, 52))
        pixels = np.asarray(picture, np.float32) + generator.normal(0, 4, (size, size, 3))
        made.append((pixels / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225))
        boxes.append([tuple(int(v) for v in box) for box in found])
    return torch.tensor(np.stack(made), dtype=torch.float32).permute(0, 3, 1, 2).contiguous(), boxes  # type: ignore[return-value]


def word_score(maps: Tensor, truth: Sequence[Sequence[tuple[int, int, int, int]]]) -> float:
    """F-measure in % of words found: boxes of connected parts of the maps that overlap a word's by half."""
    hits = found = wanted = 0
    for (text, link), boxes in zip(maps, truth, strict=True):
        labels, _ = ndimage.label(((text > 0.4) | (link > 0.4)).numpy())
        seen = []
        for number, part in enumerate(ndimage.find_objects(labels), 1):
            inside = labels[part] == number
            if inside.sum() >= 8 and float(text[part][torch.from_numpy(inside)].max()) > 0.7:
                seen.append((2 * part[1].start, 2 * part[0].start, 2 * part[1].stop, 2 * part[0].stop))
        taken: set[int] = set()
        for box in seen:
            overlaps = [0.0 if i in taken else _overlap(box, other) for i, other in enumerate(boxes)]
            if overlaps and max(overlaps) >= 0.5:
                taken.add(int(np.argmax(overlaps)))
        hits, found, wanted = hits + len(taken), found + len(seen), wanted + len(boxes)
    return 100 * 2 * hits / max(1, found + wanted)


def _overlap(a: Sequence[int], b: Sequence[int]) -> float:
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0, wide) * max(0, high)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


@cache
def pictures(test: bool) -> list[np.ndarray]:
    """Photographs, [H, W, 3] in [0, 1]: scikit-image's, and for calibration scikit-learn's two."""
    folder = package("scikit-image") / "skimage" / "data"
    names = TEST_PICTURES if test else CALIBRATION_PICTURES
    found = [np.asarray(Image.open(folder / name).convert("RGB"), np.float32) / 255 for name in names]
    return found if test else [*found, *(np.asarray(image, np.float32) / 255 for image in load_sample_images().images)]


def crops(count: int, seed: int, test: bool, factor: int, size: int, border: int = 0) -> tuple[Tensor, Tensor]:
    """Pictures made smaller, [count, 3, size, size], and as they were, [count, 3, factor·(size - 2·border), …]."""
    generator = np.random.default_rng(seed + (1000 if test else 0))
    grounds, large = pictures(test), factor * size
    small, whole = [], []
    for number in range(count):
        ground = grounds[number % len(grounds)]
        top, left = (int(generator.integers(s - large + 1)) for s in ground.shape[:2])
        crop = torch.from_numpy(ground[top : top + large, left : left + large]).permute(2, 0, 1)
        small.append(F.interpolate(crop[None], size=(size, size), mode="bicubic", antialias=True)[0].clamp(0, 1))
        cut = factor * border
        whole.append(crop[:, cut : large - cut, cut : large - cut])
    return torch.stack(small), torch.stack(whole)


def decibels(made: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, the mean over pictures."""
    wrong = (made.clamp(0, 1) - truth).square().flatten(1).mean(1)
    return float((-10 * torch.log10(wrong)).mean())


def run(model: nn.Module, inputs: Tensor, step: int = 8) -> Tensor:
    """The outputs for many inputs."""
    with torch.no_grad():
        return torch.cat([model(part) for part in inputs.split(step)])
