"""Options that several commands share, and the configuration they add up to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from lcnn_compile.cli.images import IMAGENET_MEAN, IMAGENET_STD, Images
from lcnn_compile.config import LookupConfig
from lcnn_compile.errors import ConfigError, LcnnError
from lcnn_compile.torch_private import pytree

SIZES, PICTURES = "Sizes (they override --config)", "Calibration from a folder of images"

Model = Annotated[
    str,
    typer.Argument(
        help="package.module:factory, file.py:factory, or a torch.export program (.pt2). The factory returns an nn.Module."
    ),
]
Weights = Annotated[Path | None, typer.Option(help="State dict to load into the model (.safetensors, .pt, .pth).")]
Checkpoint = Annotated[Path | None, typer.Option(help="Converted layers to load into the model, as convert writes them.")]
Input = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        help="A shape (1x3x224x224, 1x8:int64), a .npy file or a constant (none, true, int:3, float:0.5, str:text), once per "
        "input, in their order or as NAME=VALUE; or one .npz file.",
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="Unlabelled inputs: a folder of images, a .npy or .npz file (samples first), or module:factory of batches."
    ),
]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Samples per calibration batch.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, everything else on standard error.")]
Html = Annotated[Path | None, typer.Option(help="Also write the report as one HTML file.")]
Plot = Annotated[Path | None, typer.Option(help="Also write the report as a picture (.png, .svg, .pdf).")]
Timed = Annotated[bool, typer.Option("--time/--no-time", help="Time every layer before and after (needs inputs).")]

Config = Annotated[Path | None, typer.Option("--config", help="JSON file with LookupConfig's fields.")]
DictionarySize = Annotated[
    str | None, typer.Option(help="Vectors: a number, a fraction of the input channels, or auto.", rich_help_panel=SIZES)
]
Sparsity = Annotated[
    str | None, typer.Option(help="Taps per filter and position: a number, auto, or none for all.", rich_help_panel=SIZES)
]
GroupSize = Annotated[
    str | None, typer.Option(help="Filters that share indices: a number, or auto with --budget time.", rich_help_panel=SIZES)
]
MaxError = Annotated[float | None, typer.Option(help="Largest relative output error of a layer.", rich_help_panel=SIZES)]
MaxOutputError = Annotated[
    float | None,
    typer.Option(
        help="Largest relative error of the network's outputs on held-out calibration data; sizes are found per layer.",
        rich_help_panel=SIZES,
    ),
]
TargetSpeedup = Annotated[
    float | None,
    typer.Option(
        help="Reduction of the network's multiply-adds (or time, with --budget time); sizes are found per layer.",
        rich_help_panel=SIZES,
    ),
]
Budget = Annotated[
    str | None, typer.Option(help="What searches count: macs, or time as measured on this machine.", rich_help_panel=SIZES)
]
Include = Annotated[list[str] | None, typer.Option(help="Layers to convert: names, globs, re:…; repeat.", rich_help_panel=SIZES)]
Exclude = Annotated[list[str] | None, typer.Option(help="Layers to leave dense; repeat.", rich_help_panel=SIZES)]
Lowering = Annotated[str | None, typer.Option(help="auto, lookup, factored or dense.", rich_help_panel=SIZES)]
Precision = Annotated[
    str | None, typer.Option(help="float32, bfloat16, int8, or auto: rounding, included in the error.", rich_help_panel=SIZES)
]
Seed = Annotated[int | None, typer.Option(help="For everything that is random.", rich_help_panel=SIZES)]

ImageSize = Annotated[
    str | None, typer.Option(help="Height x width after the crop, or one number; --input's by default.", rich_help_panel=PICTURES)
]
ImageResize = Annotated[
    int | None, typer.Option(min=1, help="Shorter side before the crop; 8/7 of the crop by default.", rich_help_panel=PICTURES)
]
ImageMean = Annotated[
    str,
    typer.Option(help="Subtracted from pixels in [0, 1], per channel; one number means grey images.", rich_help_panel=PICTURES),
]
ImageStd = Annotated[str, typer.Option(help="Divides them afterwards.", rich_help_panel=PICTURES)]
ImageLimit = Annotated[
    int, typer.Option(min=1, help="Use so many images, spread evenly over the folder.", rich_help_panel=PICTURES)
]
MEAN, STD = (",".join(f"{v:g}" for v in values) for values in (IMAGENET_MEAN, IMAGENET_STD))


def configuration(path: Path | None, changes: dict[str, Any]) -> LookupConfig:
    """The configuration of the file, with the fields that were given as options."""
    config = LookupConfig()
    if path is not None:
        try:
            config = LookupConfig.from_json(path.read_text())
        except OSError as error:
            raise LcnnError(f"{path} cannot be read: {error}") from error
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    return config.replace(**changes)


def sizes(
    dictionary_size: str | None,
    sparsity: str | None,
    group_size: str | None,
    max_error: float | None,
    max_output_error: float | None,
    target_speedup: float | None,
    budget: str | None,
    include: list[str] | None,
    exclude: list[str] | None,
    lowering: str | None,
    precision: str | None,
    seed: int | None,
) -> dict[str, Any]:
    """LookupConfig's fields that were given as options."""
    given: dict[str, Any] = {
        "dictionary_size": None if dictionary_size is None else _number("--dictionary-size", dictionary_size, whole=True),
        "group_size": None if group_size is None else _number("--group-size", group_size, whole=True),
        "max_error": max_error,
        "max_output_error": max_output_error,
        "target_speedup": target_speedup,
        "budget": budget,
        "include": tuple(include) if include else None,
        "exclude": tuple(exclude) if exclude else None,
        "lowering": lowering,
        "precision": precision,
        "seed": seed,
    }
    found = {key: value for key, value in given.items() if value is not None}
    if sparsity is not None:
        found["sparsity"] = None if sparsity == "none" else _number("--sparsity", sparsity)
    return found


def _number(option: str, text: str, whole: bool = False) -> Any:
    if text == "auto":
        return text
    try:
        return int(text) if whole and text.isdigit() else float(text)
    except ValueError:
        raise LcnnError(f"{option} is {text!r}; a number or auto is allowed") from None


def numbers(option: str, text: str) -> tuple[float, ...]:
    """The numbers of "2,4,8"."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise LcnnError(f"{option} is {text!r}; numbers with commas between them are allowed, like 2,4,8") from None


def images(size: str | None, resize: int | None, mean: str, std: str, limit: int, inputs: Any) -> Images:
    """How images become inputs; without a size, that of the example inputs is taken."""
    if size is not None:
        parts = size.split("x")
        if not all(part.isdigit() and int(part) for part in parts) or len(parts) > 2:
            raise LcnnError(f"--image-size is {size!r}; one number or height x width is allowed, like 224 or 224x320")
        high, wide = int(parts[0]), int(parts[-1])
    elif (shown := next((t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor) and t.dim() == 4), None)) is not None:
        high, wide = shown.shape[2:]
    else:
        high, wide = 224, 224
    return Images((high, wide), resize, numbers("--image-mean", mean), numbers("--image-std", std), limit)
