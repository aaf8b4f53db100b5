"""What an unfinished conversion has fitted so far, in a folder, so that it can go on after an interruption."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lcnn_compile.config import LayerConfig
from lcnn_compile.errors import ConversionError, LcnnError
from lcnn_compile.files import replacing
from lcnn_compile.fitting.fitted import FittedLayer
from lcnn_compile.fitting.search import Point
from lcnn_compile.lookup import LookupWeight
from lcnn_compile.torch_private import pytree

if TYPE_CHECKING:
    from lcnn_compile.fitting.network import Network

FORMAT = "lcnn_compile.fits/2"
KEY = "conversion.json"
FACTORS = ("dictionary", "coefficients", "indices", "positions", "offsets", "filters")


def fingerprint(
    network: Network,
    configs: Mapping[str, LayerConfig],
    batches: Any,
    limits: tuple[float | None, float | str | None],
    seed: int,
    unit: str,
) -> str:
    """A digest of everything that a conversion's outcome depends on: weights, sizes, calibration data, (target_speedup, max_output_error), seed, what budgets are counted in."""
    asked = {name: asdict(config) for name, config in configs.items()}
    # Folders of version 0.1 are gone on with, but for those of a budget, which is spread otherwise since.
    given = None if limits == (None, None) else limits
    digest = hashlib.blake2b(json.dumps([FORMAT, asked, given, seed, unit], sort_keys=True).encode(), digest_size=16)
    weights = [value for name in network.layers for value in (network.weight(name), network.bias(name))]
    for leaf in (*weights, *pytree.tree_leaves(batches)):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            digest.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class SavedFits:
    """Fitted layers and error curves of one conversion, a file each, every one whole or not there.

    Args:
        folder: made if it does not exist.
        key: of :func:`fingerprint`.

    Raises:
        ConversionError: if the folder holds another conversion, or files that are none.
    """

    def __init__(self, folder: Path, key: str):
        self._folder, self._key = folder, key
        try:
            folder.mkdir(parents=True, exist_ok=True)
            known = json.loads((folder / KEY).read_text())["key"] if (folder / KEY).exists() else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConversionError(f"{folder} cannot be used to resume a conversion: {type(error).__name__}: {error}") from error
        # Another process of the same conversion may be writing: its temporary folders are hidden.
        if known is None and any(not path.name.startswith(".") for path in folder.iterdir() if path.name != KEY):
            raise ConversionError(f"{folder} holds other files; name an empty or a new folder to resume a conversion from")
        if known not in (None, key):
            raise ConversionError(
                f"{folder} holds the conversion of another model, configuration, calibration data or version; name another folder or remove it"
            )
        self._write(KEY, lambda path: path.write_text(json.dumps({"format": FORMAT, "key": key})))

    def _write(self, name: str, write: Any) -> None:
        with replacing(self._folder / name) as made:
            write(made)

    def _path(self, name: str, suffix: str) -> Path:
        return self._folder / f"layer-{quote(name, safe='')}{suffix}"

    def get(self, name: str, like: Tensor) -> FittedLayer | None:
        """The layer as it was fitted before, on the device of ``like`` and its bias of that dtype; None if it was not."""
        path = self._path(name, ".safetensors")
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                plain = json.loads((file.metadata() or {})["plain"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
            high, wide = plain["kernel_size"]
            weight = LookupWeight(**{key: tensors[key] for key in FACTORS}, kernel_size=(high, wide))
            bias = tensors["bias"].to(like) if "bias" in tensors else None
            return FittedLayer(weight.validate(name).to(like.device), bias, plain["error"], plain["reason"])
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, LcnnError) as error:
            raise ConversionError(f"{path} is damaged: {error}; remove it and the layer is fitted again") from error

    def put(self, name: str, fit: FittedLayer) -> None:
        """Keep a fitted layer."""
        tensors = {key: t.detach().cpu().contiguous().clone() for key, t in fit.weight.tensors().items()}
        if fit.bias is not None:
            tensors["bias"] = fit.bias.detach().cpu().contiguous().clone()
        plain = {"kernel_size": list(fit.weight.kernel_size), "error": fit.error, "reason": fit.reason}
        path = self._path(name, ".safetensors")
        self._write(path.name, lambda made: save_file(tensors, made, {"plain": json.dumps(plain)}))

    def curve(self, name: str) -> list[Point] | None:
        """The layer's error curve as it was measured before; None if it was not."""
        path = self._path(name, ".json")
        try:
            return [Point(**point) for point in json.loads(path.read_text())] if path.exists() else None
        except (OSError, ValueError, TypeError) as error:
            raise ConversionError(f"{path} is damaged: {error}; remove it and the curve is measured again") from error

    def put_curve(self, name: str, points: list[Point]) -> None:
        """Keep an error curve."""
        text = json.dumps([asdict(point) for point in points])
        self._write(self._path(name, ".json").name, lambda made: made.write_text(text))
