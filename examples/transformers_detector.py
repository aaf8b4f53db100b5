"""An object detector (RT-DETR) of Hugging Face transformers, built from a configuration: pip install lcnn-compile transformers

Its backbone and its encoder are convolutions; the transformer's linear layers stay dense.
"""

from __future__ import annotations

import torch
from comparison import compare, output_error, pictures
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

from lcnn_compile import LookupConfig, convert


def build(width: int = 32) -> RTDetrForObjectDetection:
    """A small RT-DETR on a ResNet with basic blocks."""
    torch.manual_seed(0)
    sizes = [width, 2 * width, 4 * width, 8 * width]
    stages = ["stage2", "stage3", "stage4"]
    backbone = RTDetrResNetConfig(
        embedding_size=width, hidden_sizes=sizes, depths=[1, 1, 1, 1], layer_type="basic", out_features=stages
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=sizes[1:],
        encoder_hidden_dim=2 * width,
        encoder_ffn_dim=2 * width,
        encoder_attention_heads=2,
        d_model=2 * width,
        decoder_in_channels=[2 * width] * 3,
        decoder_ffn_dim=2 * width,
        decoder_attention_heads=2,
        decoder_layers=2,
        decoder_n_points=2,
        num_queries=20,
        num_labels=5,
        anchor_image_size=None,
    )
    return RTDetrForObjectDetection(config).eval()


def main(width: int = 32, size: int = 128, compiled: bool = True) -> float:
    """Convert, compare, and return the error of the feature maps that the decoder reads."""
    model = build(width)
    images = [{"pixel_values": pictures(4, size)} for _ in range(4)]
    lookup = convert(model, LookupConfig(dictionary_size=0.25, sparsity=6), calibration=images)
    test = pictures(4, size)
    # Which queries the decoder keeps is a discrete choice, so the error is that of the features, not of the boxes.
    error = output_error(
        model.model.backbone, lookup.model.backbone, {"pixel_values": test, "pixel_mask": torch.ones(4, size, size)}
    )
    rows = {"dense": (model, ""), "lookup": (lookup, f"error of the features {error:.1%}")}
    compare("RT-DETR, one image", rows, lookup.lcnn_report, {"pixel_values": test[:1]}, compiled)
    return error


if __name__ == "__main__":
    main()
