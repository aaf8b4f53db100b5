"""Small networks of every kind, written out: each is one program, and right."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lcnn_compile import LookupConfig, convert, freeze
from lcnn_compile.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the C++ kernels are unavailable")


class Conv(nn.Sequential):
    """Convolution, batch norm, activation."""

    def __init__(self, m, n, k=3, stride=1, groups=1, act=nn.SiLU):
        super().__init__(
            nn.Conv2d(m, n, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(n), act() if act else nn.Identity()
        )


class InvertedResidual(nn.Module):
    """A block of MobileNetV2."""

    def __init__(self, m, n, stride=1, expand=3, act=nn.ReLU6, gate=None):
        super().__init__()
        wide = m * expand
        self.layers = nn.Sequential(
            Conv(m, wide, 1, act=act),
            Conv(wide, wide, 3, stride, wide, act=act),
            gate(wide) if gate else nn.Identity(),
            Conv(wide, n, 1, act=None),
        )
        self.same = stride == 1 and m == n

    def forward(self, x):
        return x + self.layers(x) if self.same else self.layers(x)


class SqueezeExcite(nn.Module):
    """A gate for each channel."""

    def __init__(self, n):
        super().__init__()
        self.less, self.more = nn.Conv2d(n, max(1, n // 4), 1), nn.Conv2d(max(1, n // 4), n, 1)

    def forward(self, x):
        gate = self.more(F.relu(self.less(F.adaptive_avg_pool2d(x, 1))))
        return x * F.hardsigmoid(gate)


def mobilenet_v2():
    return nn.Sequential(
        Conv(3, 8, 3, 2, act=nn.ReLU6),
        InvertedResidual(8, 8),
        InvertedResidual(8, 12, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


def mobilenet_v3():
    return nn.Sequential(
        Conv(3, 8, 3, 2, act=nn.Hardswish), InvertedResidual(8, 8, act=nn.Hardswish, gate=SqueezeExcite),
        InvertedResidual(8, 12, 2, act=nn.ReLU, gate=SqueezeExcite), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 16), nn.Hardswish(),
        nn.Dropout(0.2), nn.Linear(16, 5),
    )  # fmt: skip


class SqueezeExcitation(nn.Module):
    """A residual block with a gate from linear layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Conv(3, 16), Conv(16, 16)
        self.gate = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16), nn.Sigmoid())

    def forward(self, x):
        x = self.first(x)
        y = self.second(x)
        return F.relu(x + y * self.gate(y.mean((2, 3))).view(y.shape[0], -1, 1, 1))


class DenseNet(nn.Module):
    """A dense block, a transition, and a head."""

    def __init__(self, growth=6, layers=3):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8 + i * growth), nn.ReLU(), nn.Conv2d(8 + i * growth, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
                          nn.Conv2d(12, growth, 3, padding=1, bias=False))
            for i in range(layers)
        )  # fmt: skip
        wide = 8 + growth * layers
        self.transition = nn.Sequential(nn.BatchNorm2d(wide), nn.ReLU(), nn.Conv2d(wide, wide // 2, 1), nn.AvgPool2d(2, 2))
        self.head = nn.Linear(wide // 2, 5)

    def forward(self, x):
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        x = F.relu(self.transition(torch.cat(features, 1)), inplace=True)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


class UNet(nn.Module):
    """Two levels, up-sampling by transposed convolutions or bilinear."""

    def __init__(self, bilinear=False, logits=2):
        super().__init__()

        def double(m, n):
            return nn.Sequential(Conv(m, n, act=nn.ReLU), Conv(n, n, act=nn.ReLU))

        self.down = nn.ModuleList([double(3, 8), double(8, 12), double(12, 16)])
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList(
            nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), nn.Conv2d(m, n, 1)) if bilinear
            else nn.ConvTranspose2d(m, n, 2, 2) for m, n in ((16, 12), (12, 8))
        )  # fmt: skip
        self.join = nn.ModuleList([double(24, 12), double(16, 8)])
        self.last = nn.Conv2d(8, logits, 1)

    def forward(self, x):
        skips = []
        for level in self.down:
            x = level(x if not skips else self.pool(x))
            skips.append(x)
        for up, join, skip in zip(self.up, self.join, reversed(skips[:-1]), strict=True):
            x = up(x)
            down, right = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
            x = F.pad(x, [right // 2, right - right // 2, down // 2, down - down // 2])
            x = join(torch.cat([skip, x], dim=1))
        return self.last(x).softmax(1)


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of images."""

    def forward(self, x):
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Patches, two blocks, a head."""

    def __init__(self, n=12):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, n, 4, 4), LayerNorm2d(n))
        self.depthwise = nn.ModuleList(nn.Conv2d(n, n, 7, padding=3, groups=n) for _ in range(2))
        self.norm = nn.ModuleList(nn.LayerNorm(n, eps=1e-6) for _ in range(2))
        self.wide = nn.ModuleList(nn.Linear(n, 4 * n) for _ in range(2))
        self.narrow = nn.ModuleList(nn.Linear(4 * n, n) for _ in range(2))
        self.gamma = nn.ParameterList(torch.randn(n) for _ in range(2))
        self.mix = nn.Conv2d(n, n, 2, 2)
        self.head = nn.Sequential(nn.LayerNorm(n), nn.Linear(n, 5))

    def forward(self, x):
        x = self.stem(x)
        for depthwise, norm, wide, narrow, gamma in zip(
            self.depthwise, self.norm, self.wide, self.narrow, self.gamma, strict=True
        ):
            y = norm(depthwise(x).permute(0, 2, 3, 1))
            x = x + (gamma * narrow(F.gelu(wide(y)))).permute(0, 3, 1, 2)
        return self.head(self.mix(x).mean([-2, -1]))


class C2f(nn.Module):
    """A stage of YOLOv8."""

    def __init__(self, m, n, count=1, shortcut=False):
        super().__init__()
        self.half = n // 2
        self.first, self.last = Conv(m, n, 1), Conv((2 + count) * self.half, n, 1)
        self.blocks = nn.ModuleList(nn.Sequential(Conv(self.half, self.half), Conv(self.half, self.half)) for _ in range(count))
        self.shortcut = shortcut

    def forward(self, x):
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]) if self.shortcut else block(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Pyramid(nn.Module):
    """Poolings one after the other (SPPF)."""

    def __init__(self, n):
        super().__init__()
        self.first, self.last, self.pool = Conv(n, n // 2, 1), Conv(2 * n, n, 1), nn.MaxPool2d(5, 1, 2)

    def forward(self, x):
        y = [self.first(x)]
        y.extend(self.pool(y[-1]) for _ in range(3))
        return self.last(torch.cat(y, 1))


class Detector(nn.Module):
    """Backbone, neck and heads of a detector."""

    def __init__(self):
        super().__init__()
        self.stem, self.low = Conv(3, 8, 3, 2), nn.Sequential(Conv(8, 12, 3, 2), C2f(12, 12, 2, True))
        self.high = nn.Sequential(Conv(12, 16, 3, 2), C2f(16, 16, 1, True), Pyramid(16))
        self.up, self.top_down, self.down, self.bottom_up = (
            nn.Upsample(scale_factor=2),
            C2f(28, 12),
            Conv(12, 12, 3, 2),
            C2f(28, 16),
        )
        self.boxes = nn.ModuleList(nn.Sequential(Conv(n, 8), nn.Conv2d(8, 4, 1)) for n in (12, 16))
        self.classes = nn.ModuleList(nn.Sequential(Conv(n, 8), nn.Conv2d(8, 3, 1)) for n in (12, 16))

    def forward(self, x):
        low = self.low(self.stem(x))
        high = self.high(low)
        low = self.top_down(torch.cat([self.up(high), low], 1))
        high = self.bottom_up(torch.cat([self.down(low), high], 1))
        found = [
            torch.cat([b(f), c(f)], 1).view(x.shape[0], 7, -1)
            for b, c, f in zip(self.boxes, self.classes, (low, high), strict=True)
        ]
        boxes, classes = torch.cat(found, 2).split((4, 3), 1)
        return torch.cat((boxes * 2, classes.sigmoid()), 1)


class SuperResolution(nn.Module):
    """Residual blocks, pixel shuffle, and the enlarged input."""

    def __init__(self, n=12, scale=2):
        super().__init__()
        self.head, self.scale = nn.Conv2d(3, n, 3, padding=1), scale
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(n, n, 3, padding=1), nn.PReLU(n), nn.Conv2d(n, n, 3, padding=1)) for _ in range(2)
        )
        self.tail = nn.Sequential(nn.Conv2d(n, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))

    def forward(self, x):
        y = first = self.head(x - 0.5)
        for block in self.body:
            y = y + block(y) * 0.1
        return (self.tail(y + first) + F.interpolate(x, scale_factor=self.scale, mode="nearest")).clamp(0, 1)


class Audio(nn.Module):
    """Gated dilated convolutions over samples."""

    def __init__(self, n=8):
        super().__init__()
        self.first = nn.Conv1d(1, n, 7, padding=3)
        self.gated = nn.ModuleList(nn.Conv1d(n, 2 * n, 3, padding=2**i, dilation=2**i) for i in range(3))
        self.out = nn.ModuleList(nn.Conv1d(n, 2 * n, 1) for _ in range(3))
        self.norm = nn.GroupNorm(2, n)
        self.last = nn.Sequential(
            nn.ReLU(), nn.ConvTranspose1d(n, n, 4, 2, 1), nn.ELU(), nn.Conv1d(n, 1, 7, padding=3), nn.Tanh()
        )

    def forward(self, x):
        x, total = F.leaky_relu(self.first(x), 0.1), 0
        for gated, out in zip(self.gated, self.out, strict=True):
            a, b = gated(x).chunk(2, 1)
            rest, skip = out(torch.tanh(a) * torch.sigmoid(b)).chunk(2, 1)
            x, total = (x + rest) * math.sqrt(0.5), total + skip
        return self.last(self.norm(total))


class ShuffleNet(nn.Module):
    """A unit of ShuffleNetV2, with the pooled context of a segmentation head."""

    def __init__(self, n=16):
        super().__init__()
        self.stem = Conv(3, n, 3, 2, act=nn.ReLU)
        self.branch = nn.Sequential(
            Conv(n // 2, n // 2, 1, act=nn.ReLU),
            Conv(n // 2, n // 2, 3, 1, n // 2, act=None),
            Conv(n // 2, n // 2, 1, act=nn.ReLU),
        )
        self.context, self.last = Conv(n, n, 1, act=nn.ReLU), nn.Conv2d(2 * n, 4, 1)

    def forward(self, x):
        size = x.shape[2:]
        x = self.stem(x)
        left, right = x.chunk(2, dim=1)
        x = torch.cat((left, self.branch(right)), dim=1)
        x = x.view(x.shape[0], 2, 8, x.shape[2], x.shape[3]).transpose(1, 2).contiguous().view(x.shape)
        around = F.interpolate(self.context(F.adaptive_avg_pool2d(x, 1)), size=x.shape[2:], mode="bilinear", align_corners=False)
        return F.interpolate(self.last(torch.cat([x, around], 1)), size=size, mode="bilinear", align_corners=False)


NETWORKS = {
    "MobileNetV2": (mobilenet_v2, (3, 33, 37)),
    "MobileNetV3": (mobilenet_v3, (3, 33, 37)),
    "squeeze and excitation": (SqueezeExcitation, (3, 13, 11)),
    "DenseNet": (DenseNet, (3, 15, 17)),
    "U-Net": (UNet, (3, 21, 26)),
    "U-Net bilinear": (lambda: UNet(True), (3, 21, 26)),
    "ConvNeXt": (ConvNeXt, (3, 33, 41)),
    "detector": (Detector, (3, 32, 48)),
    "super-resolution": (SuperResolution, (3, 13, 11)),
    "audio": (Audio, (1, 57)),
    "ShuffleNet": (ShuffleNet, (3, 25, 31)),
}


def settled(make):
    """A network whose batch statistics are other than the trivial ones."""
    torch.manual_seed(0)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_each_is_one_program(name, dense):
    make, shape = NETWORKS[name]
    network = settled(make)
    first = next(name for name, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Conv1d))
    config = LookupConfig(dictionary_size=1.0, sparsity=None, lowering="lookup", include=(first,) if dense else ())
    model = convert(network, config)
    x = torch.rand(2, *shape)
    frozen = freeze(model, x)
    assert frozen.alone, frozen.left_over
    for batch in (x, x[:1], torch.rand(5, *shape)):
        with torch.no_grad():
            exact = copy.deepcopy(network).double()(batch.double())
        frozen(torch.full_like(batch, math.nan))
        torch.testing.assert_close(frozen(batch).double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["detector", "DenseNet"])
def test_the_one_line_use_runs_one_program_too(name, monkeypatch):
    make, shape = NETWORKS[name]
    network = settled(make)
    model, x = convert(network, LookupConfig(dictionary_size=1.0, sparsity=None, lowering="lookup")), torch.rand(2, *shape)
    monkeypatch.setattr("lcnn_compile.backend.entry.compile_with_inductor", lambda *a: pytest.fail("Inductor was called"))
    torch._dynamo.reset()
    with torch.no_grad():
        found, exact = torch.compile(model, backend="lcnn")(x), copy.deepcopy(network).double()(x.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


class Branches(nn.Module):
    """Several inputs and outputs, parts and other shapes of one of them."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(5, 8, 3, padding=1)
        self.last, self.head = nn.Conv2d(16, 6, 1), nn.Linear(6, 4)

    def forward(self, x, y, *, scale=2):
        z = self.last(torch.cat([self.left(x), F.interpolate(self.right(y), scale_factor=scale)], 1))
        mean, spread = z.chunk(2, 1)
        return {
            "all": z,
            "parts": (mean, spread),
            "flat": z.flatten(1),
            "last": z[:, 1:4].permute(0, 2, 3, 1),
            "head": self.head(z.mean((2, 3))),
        }


def test_several_inputs_and_outputs_that_share_memory():
    torch.manual_seed(0)
    network = Branches().eval()
    model = convert(
        network,
        LookupConfig(dictionary_size=1.0, sparsity=None, lowering="lookup"),
        example_inputs=(torch.rand(1, 3, 8, 10), torch.rand(1, 5, 4, 5)),
    )
    frozen = freeze(model, (torch.rand(2, 3, 8, 10), torch.rand(2, 5, 4, 5)))
    assert frozen.alone, frozen.left_over
    for batch in (2, 1, 3):
        x, y = torch.rand(batch, 3, 8, 10), torch.rand(batch, 5, 4, 5)
        with torch.no_grad():
            exact, found = copy.deepcopy(network).double()(x.double(), y.double()), frozen(x, y=y)
        for (key, a), b in zip(found.items(), exact.values(), strict=True):
            for left, right in zip(*((v if isinstance(v, tuple) else (v,)) for v in (a, b)), strict=True):
                torch.testing.assert_close(left.double(), right, rtol=1e-4, atol=1e-5)
                assert left.stride() == right.stride(), key
        found["parts"][1].fill_(7)
        assert bool((found["all"][:, 3:] == 7).all())
        assert bool((found["flat"][:, 240:] == 7).all())


def test_what_keeps_a_network_from_being_one_program_is_named():
    class Sorting(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            y = self.first(x).relu()
            return self.last(torch.cumsum(torch.cumsum(y, 1), 1)).sort(-1)[0]

    model, x = (
        convert(Sorting().eval(), LookupConfig(dictionary_size=1.0, sparsity=None, lowering="lookup")),
        torch.rand(2, 3, 7, 9),
    )
    frozen = freeze(model, x, dynamic_batch=False)
    assert not frozen.alone
    said = " ".join(frozen.left_over)
    assert all(text in said for text in ("cumsum", "(2 times)", "sort", "[2, 8, 5, 7]"))
    assert not any(word in said for word in ("relu", "cat", "run_program"))
