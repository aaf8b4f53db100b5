"""The architectures of ``zoo.py``: how each is built, and what two inputs of different batch and size it takes.

Weights are random. Batch norm statistics are those of a random batch, and whatever an architecture initialises to a constant (last gammas,
layer scales, position biases) is drawn at random, so that every branch counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One architecture.

    Attributes:
        name: "timm/NAME", "torchvision/NAME" or "own/NAME".
        family: what it stands for in the table.
        build: makes the module.
        shapes: of the input at calibration, and of another one.
        images: inputs of that shape that it takes.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    shapes: tuple[Shape, Shape]
    images: int = 1

    def make(self) -> nn.Module:
        """The module with plausible weights, in evaluation mode."""
        torch.manual_seed(0)
        model = self.build().eval()
        enliven(model)
        settle(model, self.inputs(0, seed=100))
        return model.eval().requires_grad_(False)

    def inputs(self, which: int, seed: int) -> tuple[Tensor, ...]:
        """Inputs of the first or second shape."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(self.shapes[which], generator=generator) for _ in range(self.images))


def enliven(model: nn.Module) -> None:
    """Draw anew every parameter that is initialised to one constant."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.numel() or not parameter.is_floating_point() or bool((parameter != parameter.flatten()[0]).any()):
                continue
            if float(parameter.flatten()[0]) == 0:
                parameter.normal_(0, 0.1)
            else:
                parameter.uniform_(0.5, 1.5)


def settle(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Give batch norms the statistics of one batch."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = None
        norm.reset_running_stats()
    with torch.no_grad():
        # A batch of its own size: a map of one pixel and a batch of two have no variance worth the name.
        model(*[x.repeat(4, *[1] * (x.dim() - 1)) + 0.5 * torch.randn(4 * x.shape[0], *x.shape[1:]) for x in inputs])
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
        norm.eval()


class UNet(nn.Module):
    """Two levels down and up, with transposed convolutions and concatenated skips."""

    def __init__(self, channels: int = 16):
        super().__init__()
        self.enter, self.down1, self.down2 = _pair(3, channels), _pair(channels, 2 * channels), _pair(2 * channels, 4 * channels)
        self.up1 = nn.ConvTranspose2d(4 * channels, 2 * channels, 2, stride=2)
        self.up2 = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.join1, self.join2 = _pair(4 * channels, 2 * channels), _pair(2 * channels, channels)
        self.head = nn.Conv2d(channels, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.enter(x)
        second = self.down1(F.max_pool2d(first, 2))
        third = self.down2(F.max_pool2d(second, 2))
        second = self.join1(torch.cat([self.up1(third), second], 1))
        return self.head(self.join2(torch.cat([self.up2(second), first], 1)))


def _pair(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class Detector(nn.Module):
    """A detector of torchvision for a batch of one fixed size: lists of images and of results stay inside.

    It is asked for few detections: among hundreds some scores differ by less than float32 holds, and PyTorch's own order is not float64's.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        return self.model(list(images.unbind(0)))


class Heads(nn.Module):
    """The convolutional part of a one-stage detector, without anchors and suppression."""

    def __init__(self, model: Any):
        super().__init__()
        self.backbone, self.head = model.backbone, model.head

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.head(list(self.backbone(images).values()))


class Flow(nn.Module):
    """Optical flow with few refinements."""

    def __init__(self, model: nn.Module, updates: int = 2):
        super().__init__()
        self.model, self.updates = model, updates

    def forward(self, first: Tensor, second: Tensor) -> list[Tensor]:
        return self.model(first, second, num_flow_updates=self.updates)


def _timm(name: str, family: str, size: int = 64, fixed: bool = False, **options: Any) -> Case:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=10, **options)

    other = (3, 3, size, size) if fixed else (3, 3, size, size + 32)
    return Case(f"timm/{name}", family, build, ((2, 3, size, size), other))


def _fixed(name: str, family: str, size: int = 64, **options: Any) -> Case:
    """An architecture that is built for one size of image."""
    return _timm(name, family, size, True, img_size=size, **options)


def _vision(name: str, family: str, size: int = 64, fixed: bool = False, **options: Any) -> Case:
    def build() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, num_classes=10, **options)

    other = (3, 3, size, size) if fixed else (3, 3, size, size + 32)
    return Case(f"torchvision/{name}", family, build, ((2, 3, size, size), other))


def _segmentation(name: str, size: int = 64) -> Case:
    return _vision(name, "segmentation", size, weights_backbone=None)


def _detection(name: str, size: int, heads: bool = False, classes: int = 5, **options: Any) -> Case:
    def build() -> nn.Module:
        from torchvision.models import detection

        made = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=classes, **options)
        return Heads(made) if heads else Detector(made)

    label = f"torchvision/{name}" + (" (heads)" if heads else "")
    return Case(label, "detection", build, ((2, 3, size, size), (3, 3, size, size)))


def _video(name: str, frames: int, size: int, other: int = 0) -> Case:
    def build() -> nn.Module:
        from torchvision.models import video

        return getattr(video, name)(weights=None, num_classes=10)

    return Case(f"torchvision/{name}", "video", build, ((2, 3, frames, size, size), (3, 3, frames, size, size + other)))


def _flow(name: str, size: int) -> Case:
    def build() -> nn.Module:
        from torchvision.models import optical_flow

        return Flow(getattr(optical_flow, name)(weights=None))

    return Case(f"torchvision/{name}", "optical flow", build, ((1, 3, size, size), (2, 3, size, size)), images=2)


CASES: tuple[Case, ...] = (
    # Small ones first: they show most faults in least time.
    Case("own/unet", "segmentation", UNet, ((2, 3, 32, 32), (3, 3, 32, 48))),
    _timm("test_resnet", "resnet"),
    _timm("test_efficientnet", "efficientnet"),
    _timm("test_efficientnet_gn", "efficientnet"),
    _timm("test_efficientnet_evos", "efficientnet"),
    _timm("test_byobnet", "byobnet"),
    _timm("test_convnext", "convnext"),
    _timm("test_convnext2", "convnext"),
    _timm("test_convnext3", "convnext"),
    _timm("test_nfnet", "nfnet, weight-standardised"),
    _timm("test_mambaout", "mambaout"),
    _fixed("test_vit", "vit"),
    _timm("resnet18", "resnet"),
    _timm("resnetv2_18", "preact resnet"),
    _timm("resnet18d", "resnet"),
    _timm("seresnet18", "seresnet"),
    _timm("legacy_seresnet18", "seresnet"),
    _timm("skresnet18", "sknet"),
    _timm("mobilenetv1_100", "mobilenet"),
    _timm("mobilenetv2_035", "mobilenet"),
    _timm("mobilenetv3_small_050", "mobilenet"),
    _timm("mobilenetv4_conv_small_035", "mobilenet"),
    _timm("lcnet_035", "lcnet"),
    _timm("tinynet_e", "efficientnet"),
    _timm("mnasnet_small", "mnasnet"),
    _timm("efficientnet_lite0", "efficientnet"),
    _timm("ghostnet_050", "ghostnet"),
    _timm("repghostnet_050", "ghostnet"),
    _timm("hardcorenas_a", "hardcorenas"),
    _timm("mixnet_s", "mixnet"),
    _timm("regnetx_002", "regnet"),
    _timm("regnety_002", "regnet"),
    _timm("repvgg_a0", "repvgg"),
    _timm("mobileone_s0", "repvgg"),
    _timm("dla46_c", "dla"),
    _timm("dla34", "dla"),
    _timm("hgnetv2_b0", "hgnet"),
    _timm("ese_vovnet19b_slim_dw", "vovnet"),
    _timm("ese_vovnet19b_slim", "vovnet"),
    _timm("darknet17", "darknet"),
    _timm("cs3darknet_focus_s", "cspnet"),
    _timm("cs3darknet_s", "cspnet"),
    _timm("selecsls42b", "selecsls"),
    _timm("gernet_s", "gernet"),
    _timm("rexnet_100", "rexnet"),
    _timm("resnest14d", "resnest"),
    _timm("convnext_atto", "convnext", depths=(1, 1, 2, 1)),
    _timm("convnextv2_atto", "convnext", depths=(1, 1, 2, 1)),
    _timm("edgenext_xx_small", "edgenext", depths=(2, 2, 2, 2)),
    _timm("fastvit_t8", "fastvit", layers=(1, 1, 1, 1)),
    _timm("starnet_s1", "starnet"),
    _timm("fasternet_t0", "fasternet"),
    _timm("shvit_s1", "shvit"),
    _timm("repvit_m0_9", "repvit"),
    _timm("mobilevit_xxs", "mobilevit"),
    _timm("mobilevitv2_050", "mobilevit"),
    _timm("efficientvit_b0", "efficientvit"),
    _timm("poolformer_s12", "poolformer"),
    _timm("poolformerv2_s12", "poolformer"),
    _timm("swiftformer_xs", "swiftformer"),
    _timm("pvt_v2_b0", "pvt"),
    _fixed("levit_128s", "levit"),
    _fixed("coat_lite_tiny", "coat"),
    _fixed("mixer_s32_224", "mixer"),
    _fixed("resmlp_12_224", "mixer"),
    _fixed("vit_tiny_patch16_224", "vit", depth=2),
    _fixed("tiny_vit_5m_224", "tiny_vit"),
    _fixed("swin_tiny_patch4_window7_224", "swin", window_size=4, depths=(2, 2)),
    _fixed("maxvit_rmlp_pico_rw_256", "maxvit"),
    _fixed("coatnet_pico_rw_224", "coatnet"),
    _fixed("visformer_tiny", "visformer"),
    _fixed("vit_tiny_r_s16_p8_224", "hybrid with a convolution stem", depth=2),
    _fixed("efficientformer_l1", "efficientformer"),
    _timm("xcit_nano_12_p16_224", "xcit", depth=2),
    _timm("vgg11_bn", "vgg", mlp_ratio=0.0625),
    _timm("tresnet_m", "tresnet"),
    _timm("nf_resnet26", "nfnet, weight-standardised"),
    _timm("nf_regnet_b0", "nfnet, weight-standardised"),
    _timm("resnet26t", "resnet"),
    _timm("resnext26ts", "resnext"),
    _timm("seresnext26ts", "resnext"),
    _timm("gcresnext26ts", "resnext"),
    _timm("halonet26t", "attention in convolutions", 256, True),
    _fixed("lambda_resnet26t", "attention in convolutions"),
    _fixed("botnet26t_256", "attention in convolutions"),
    _timm("inception_next_atto", "inception"),
    _vision("alexnet", "alexnet"),
    _vision("vgg11", "vgg"),
    _vision("squeezenet1_1", "squeezenet"),
    _vision("resnet18", "resnet"),
    _vision("shufflenet_v2_x0_5", "shufflenet"),
    _vision("mobilenet_v2", "mobilenet"),
    _vision("mobilenet_v3_small", "mobilenet"),
    _vision("mnasnet0_5", "mnasnet"),
    _vision("regnet_y_400mf", "regnet"),
    _vision("googlenet", "inception", aux_logits=False, init_weights=False),
    _segmentation("lraspp_mobilenet_v3_large"),
    _segmentation("deeplabv3_mobilenet_v3_large"),
    _segmentation("fcn_resnet50"),
    _detection("ssdlite320_mobilenet_v3_large", 96, heads=True),
    _detection("retinanet_resnet50_fpn", 96, heads=True),
    _detection("ssdlite320_mobilenet_v3_large", 96, classes=2, detections_per_img=20),
    _detection("retinanet_resnet50_fpn", 96, min_size=96, max_size=96, detections_per_img=20),
    _detection("fasterrcnn_mobilenet_v3_large_320_fpn", 96, min_size=96, max_size=96, box_detections_per_img=20),
    _detection("keypointrcnn_resnet50_fpn", 96, min_size=96, max_size=96, box_detections_per_img=20),
    _video("r3d_18", 4, 32, 16),
    _video("mc3_18", 4, 32, 16),
    _video("r2plus1d_18", 4, 32, 16),
    _flow("raft_small", 128),
    _timm("dpn48b", "dpn", k_sec=(1, 1, 1, 1)),
    _timm("vovnet39a", "vovnet"),
    _timm("cspresnet50", "cspnet"),
    _timm("wide_resnet50_2", "wide resnet", layers=(1, 1, 1, 1)),
    _timm("resnetv2_50x1_bit", "preact resnet"),
    _timm("res2net50_14w_8s", "res2net", layers=(1, 1, 1, 1)),
    _timm("hrnet_w18_small", "hrnet"),
    _timm("xception41", "xception", 96),
    _timm("ghostnetv2_100", "ghostnet"),
    _timm("efficientnet_b0", "efficientnet"),
    _timm("tf_efficientnetv2_b0", "efficientnet"),
    _timm("resnetblur50", "resnet", layers=(1, 1, 1, 1)),
    _timm("mobilenetv4_hybrid_medium_075", "mobilenet"),
    _timm("densenet121", "densenet", block_config=(2, 2, 2, 2)),
    _timm("inception_v3", "inception", 96, aux_logits=False),
    _timm("inception_v4", "inception", 96),
    _timm("dm_nfnet_f0", "nfnet, weight-standardised"),
)
