"""A ConvNeXt of Hugging Face transformers, built from a configuration: pip install lcnn-compile transformers

Most of its work is in linear layers, which are converted only where ``include`` names them; its 7x7 convolutions are
depthwise and stay dense: they have nothing to look up. Sizes are found per layer, within five percent of error each; a layer
that needs more stays dense, and the report says so.
"""

from __future__ import annotations

import torch
from comparison import compare, output_error, pictures
from torch import nn
from transformers import ConvNextConfig, ConvNextForImageClassification

from lcnn_compile import LookupConfig, convert


def build(width: int = 48) -> ConvNextForImageClassification:
    """A ConvNeXt with four stages; width 96 and depths 3, 3, 9, 3 are ConvNeXt-T."""
    torch.manual_seed(0)
    sizes = [width, 2 * width, 4 * width, 8 * width]
    return ConvNextForImageClassification(ConvNextConfig(hidden_sizes=sizes, depths=[1, 1, 2, 1], num_labels=10)).eval()


def main(width: int = 48, size: int = 128, compiled: bool = True) -> float:
    """Convert the linear layers and the convolutions between stages, compare, and return the error of the logits."""
    model = build(width)
    images = [{"pixel_values": pictures(8, size)} for _ in range(4)]
    rules = {"include": (nn.Conv2d, "*.pwconv*"), "exclude": ("*.dwconv",)}
    config = LookupConfig(dictionary_size="auto", sparsity="auto", max_error=0.05, **rules)
    lookup = convert(model, config, calibration=images)
    test = {"pixel_values": pictures(8, size)}
    error = output_error(model, lookup, test)
    rows = {"dense": (model, ""), "lookup": (lookup, f"error of the outputs {error:.1%}")}
    compare("ConvNeXt, one image", rows, lookup.lcnn_report, {"pixel_values": test["pixel_values"][:1]}, compiled)
    return error


if __name__ == "__main__":
    main()
