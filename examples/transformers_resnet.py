"""A ResNet of Hugging Face transformers, built from a configuration (nothing is downloaded): pip install lcnn-compile transformers

Its weights are random, so that the example needs no data and no network; with pretrained weights and real images as calibration
the errors are those of your task. Linear layers stay dense unless ``include`` names them.
"""

from __future__ import annotations

import torch
from comparison import compare, output_error, pictures
from transformers import ResNetConfig, ResNetForImageClassification

from lcnn_compile import LookupConfig, convert


def build(width: int = 32) -> ResNetForImageClassification:
    """A ResNet with basic blocks; width 64 and depths of 2 are ResNet-18."""
    torch.manual_seed(0)
    sizes = [width, 2 * width, 4 * width, 8 * width]
    config = ResNetConfig(embedding_size=width, hidden_sizes=sizes, depths=[1, 1, 1, 1], layer_type="basic", num_labels=10)
    return ResNetForImageClassification(config).eval()


def main(width: int = 32, size: int = 128, compiled: bool = True) -> float:
    """Convert, compare, and return the error of the logits."""
    model = build(width)
    images = [{"pixel_values": pictures(8, size)} for _ in range(4)]
    config = LookupConfig(dictionary_size=0.25, sparsity=6, group_size=8)
    lookup = convert(model, config, calibration=images)
    test = {"pixel_values": pictures(8, size)}
    error = output_error(model, lookup, test)
    rows = {"dense": (model, ""), "lookup": (lookup, f"error of the outputs {error:.1%}")}
    compare("ResNet, one image", rows, lookup.lcnn_report, {"pixel_values": test["pixel_values"][:1]}, compiled)
    return error


if __name__ == "__main__":
    main()
