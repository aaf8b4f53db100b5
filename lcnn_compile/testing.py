"""Hypothesis strategies and assertions of numerical equivalence, for our kernels and for users' own models::

    from hypothesis import given
    from lcnn_compile.testing import assert_equivalent, conv_layers

    @given(conv_layers())
    def test_lookup_layer(case):
        lookup = LookupConv2d.from_conv(case.conv, LookupConfig(dictionary_size=1.0, sparsity=None))
        assert_equivalent(case.conv, lookup, case.inputs)

The rule everywhere: the result may not be farther from a float64 reference than PyTorch's own result, times a small factor.
Needs the ``testing`` extra (hypothesis).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lcnn_compile.lookup import LookupWeight, filter_table
from lcnn_compile.modules import LookupConv2d

FACTOR = 4.0
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


@dataclass(frozen=True)
class ConvCase:
    """A convolution and an input that fits it."""

    conv: nn.Conv2d
    inputs: Tensor


@dataclass(frozen=True)
class NetworkCase:
    """A network in evaluation mode and an input that fits it."""

    model: nn.Module
    inputs: Tensor


@st.composite
def geometries(draw: st.DrawFn, max_kernel: int = 7) -> dict[str, Any]:
    """Keyword arguments of ``nn.Conv2d``: kernel sizes 1x1 to 7x7 and not square, stride, padding, dilation, groups, bias."""
    kernel = (draw(st.integers(1, max_kernel)), draw(st.integers(1, max_kernel)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    mode = draw(st.sampled_from(PADDING_MODES))
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    named = ["valid", "same"] if stride == (1, 1) else ["valid"]
    padding: Any = draw(st.sampled_from(named) | st.integers(0, 3) | st.tuples(st.integers(0, 3), st.integers(0, 3)))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    return {
        "in_channels": groups * draw(st.integers(1, 9)),
        "out_channels": groups * draw(st.integers(1, 11)),
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": mode,
    }


@st.composite
def images(draw: st.DrawFn, channels: int, geometry: dict[str, Any], dtype: torch.dtype = torch.float32) -> Tensor:
    """[N, channels, H, W] that a convolution of this geometry accepts; any memory format, N of zero included."""
    sides = []
    padding = geometry["padding"]
    for axis in range(2):
        reach = geometry["dilation"][axis] * (geometry["kernel_size"][axis] - 1)
        pad = 0 if padding == "valid" else (reach + 1) // 2 if padding == "same" else _at(padding, axis)
        # Reflection needs a side longer than its padding, circular padding one as long.
        least = max(1, reach + 1 - (0 if padding == "valid" else 2 * pad if padding != "same" else reach), pad + 1)
        sides.append(draw(st.integers(least, least + 12)))
    batch = draw(st.sampled_from([1, 1, 2, 3, 5] + ([0] if geometry["padding_mode"] == "zeros" else [])))
    x = random_tensor(draw, (batch, channels, *sides), dtype)
    layout = draw(st.sampled_from(["contiguous", "channels_last", "strided"]))
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    return x


def _at(value: Any, axis: int) -> int:
    return int(value[axis] if isinstance(value, tuple) else value)


def random_tensor(draw: st.DrawFn, shape: Iterable[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values from a drawn seed: Hypothesis shrinks the seed, not thousands of numbers."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype)


@st.composite
def conv_layers(draw: st.DrawFn, max_kernel: int = 7) -> ConvCase:
    """A random ``nn.Conv2d`` with an input."""
    geometry = draw(geometries(max_kernel))
    conv = nn.Conv2d(**geometry)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.copy_(random_tensor(draw, parameter.shape))
    return ConvCase(conv, draw(images(geometry["in_channels"], geometry)))


@st.composite
def lookup_weights(
    draw: st.DrawFn,
    in_channels: int | None = None,
    out_channels: int | None = None,
    kernel_size: tuple[int, int] | None = None,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
) -> LookupWeight:
    """A random valid lookup weight: any dictionary size, any number of taps (none included) per filter group, any order."""
    m = in_channels or groups * draw(st.integers(1, 9))
    n = out_channels or groups * draw(st.integers(1, 19))
    kh, kw = kernel_size or (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    k = draw(st.integers(1, 12))
    size = draw(st.sampled_from([1, 2, 3, 4, 8, 16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    order = torch.cat([torch.randperm(n // groups, generator=generator) + i * (n // groups) for i in range(groups)])
    filters = filter_table(n, size, groups, order)
    most = draw(st.integers(0, min(k * kh * kw, 30)))
    counts = torch.randint(0, most + 1, (filters.shape[0],), generator=generator)
    taps = int(counts.sum())
    columns = torch.cat([torch.randperm(k * kh * kw, generator=generator)[: int(c)] for c in counts]).to(torch.int32)
    members = (filters >= 0).repeat_interleave(counts, 0)
    coefficients = torch.randn((taps, filters.shape[1]), generator=generator, dtype=torch.float64) * members
    dictionary = torch.randn((groups, k, m // groups), generator=generator, dtype=torch.float64)
    return LookupWeight(
        dictionary=dictionary.to(dtype),
        coefficients=coefficients.to(dtype),
        indices=columns // (kh * kw),
        positions=columns % (kh * kw),
        offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32),
        filters=filters,
        kernel_size=(kh, kw),
    )


@st.composite
def lookup_layers(draw: st.DrawFn, max_kernel: int = 5) -> tuple[LookupConv2d, Tensor]:
    """A random ``LookupConv2d`` with an input."""
    geometry = draw(geometries(max_kernel))
    sizes = {name: geometry[name] for name in ("in_channels", "out_channels", "kernel_size", "groups")}
    weight = draw(lookup_weights(**sizes))
    conv = nn.Conv2d(**geometry)
    bias = random_tensor(draw, (geometry["out_channels"],)) if geometry["bias"] else None
    return LookupConv2d.from_weight(weight, conv, bias), draw(images(geometry["in_channels"], geometry))


class RandomNetwork(nn.Module):
    """A network of drawn steps: convolutions (plain, strided, grouped, functional, shared), batch norm, residuals, branches."""

    ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish)

    def __init__(self, channels: int, steps: list[dict[str, Any]]):
        super().__init__()
        self.steps = steps
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.layers = nn.ModuleList(self._layer(channels, step) for step in steps)
        self.shared = nn.Conv2d(channels, channels, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5)
        self.head = nn.Linear(channels, 4)

    def _layer(self, channels: int, step: dict[str, Any]) -> nn.Module:
        groups = 2 if step["grouped"] else 1
        conv = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=step["bias"])
        parts: list[nn.Module] = [nn.BatchNorm2d(channels)] if step["norm_first"] else []
        parts += [conv, nn.BatchNorm2d(channels)] if step["norm"] else [conv]
        return nn.Sequential(*parts, self.ACTIVATIONS[step["activation"]](inplace=step["inplace"]))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] to [N, 4]."""
        x = self.stem(x)
        for step, layer in zip(self.steps, self.layers, strict=True):
            y = layer(x)
            if step["join"] == "shared":
                y = self.shared(y)
            elif step["join"] == "functional":
                y = F.conv2d(y, self.kernel, None, padding=1)
            elif step["join"] == "branch":
                y = y + self.shared(x)
            x = F.relu(x + y) if step["residual"] else y
        return self.head(x.mean((2, 3)))


@st.composite
def networks(draw: st.DrawFn, max_steps: int = 3) -> NetworkCase:
    """A random small network in evaluation mode, batch statistics drawn too, with an input."""
    flags = ("grouped", "bias", "norm_first", "norm", "inplace", "residual")
    steps = [
        {flag: draw(st.booleans()) for flag in flags}
        | {"activation": draw(st.integers(0, 3)), "join": draw(st.sampled_from(["", "shared", "functional", "branch"]))}
        for _ in range(draw(st.integers(1, max_steps)))
    ]
    channels = draw(st.sampled_from([4, 6, 10]))
    with torch.random.fork_rng():
        torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
        model = RandomNetwork(channels, steps).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.3)  # type: ignore[arg-type]
                nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
                nn.init.uniform_(module.weight, 0.5, 1.5)
        inputs = torch.randn(draw(st.integers(1, 3)), 3, draw(st.integers(5, 12)), draw(st.integers(5, 12)))
    return NetworkCase(model, inputs)


def error(result: Tensor, reference: Tensor) -> float:
    """Largest distance to the float64 ``reference``; infinite where shapes differ or a value is not finite."""
    if result.shape != reference.shape:
        return float("inf")
    distance = (result.double() - reference).abs()
    return float(distance.nan_to_num(float("inf")).max()) if distance.numel() else 0.0


def tolerance(own: Tensor, reference: Tensor, factor: float = FACTOR) -> float:
    """What a result may differ from ``reference``: ``factor`` times PyTorch's ``own`` error, at least a few units of rounding."""
    if not reference.numel():
        return 0.0
    unit = torch.finfo(own.dtype).eps
    return factor * max(error(own, reference), unit * float(reference.abs().max()))


def assert_close(result: Tensor, own: Tensor, reference: Tensor, *, factor: float = FACTOR, name: str = "result") -> None:
    """Assert that ``result`` is as close to the float64 ``reference`` as PyTorch's ``own`` result, times ``factor``."""
    found, allowed = error(result, reference), tolerance(own, reference, factor)
    if not found <= allowed:
        at = ""
        if result.shape == reference.shape:
            worst = int((result.double() - reference).abs().nan_to_num(float("inf")).argmax())
            at = f" at {tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), reference.shape))}"
        raise AssertionError(
            f"{name} of shape {tuple(result.shape)} ({result.dtype}) differs by {found:.3g}{at} from the float64 reference "
            f"of shape {tuple(reference.shape)}; allowed is {allowed:.3g}, {factor:g} times PyTorch's own error"
        )


def assert_equivalent(model: nn.Module, compiled: Any, inputs: Any, *, factor: float = FACTOR) -> None:
    """Assert that ``compiled(*inputs)`` computes what ``model(*inputs)`` does, as exactly as PyTorch's own result times ``factor``.

    Args:
        model: the original; it is run as it is and as a copy in float64.
        compiled: what stands for it: a compiled, converted or hand-made callable.
        inputs: one tensor, or the tuple of all inputs.
        factor: how much farther from float64 than PyTorch's own result is allowed.

    Raises:
        AssertionError: naming the first layer that diverges, where both are modules with layers of the same names.
    """
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    wide = copy.deepcopy(model).double()
    wide_args = tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, args)
    with torch.no_grad():
        reference, own, result = (tree_leaves(f(*a)) for f, a in ((wide, wide_args), (model, args), (compiled, args)))
    if len(result) != len(own):
        raise AssertionError(f"{len(result)} outputs; the original has {len(own)}")
    for number, (r, o, w) in enumerate(zip(result, own, reference, strict=True)):
        if not isinstance(o, Tensor):
            continue
        if isinstance(r, Tensor) and (r.shape, r.dtype) != (o.shape, o.dtype):
            raise AssertionError(f"output {number} is {r.dtype} {tuple(r.shape)}; the original is {o.dtype} {tuple(o.shape)}")
        try:
            assert_close(r, o, w, factor=factor, name=f"output {number}")
        except AssertionError as failure:
            raise AssertionError(f"{failure}{_first_divergence(model, wide, compiled, args, wide_args, factor)}") from None


def _first_divergence(model: nn.Module, wide: nn.Module, compiled: Any, args: Any, wide_args: Any, factor: float) -> str:
    """Where the two part, as a phrase; "" where it cannot be told."""
    other = getattr(compiled, "_orig_mod", compiled)
    if not isinstance(other, nn.Module):
        return ""
    seen = [_outputs(m, a) for m, a in ((model, args), (wide, wide_args), (other, args))]
    for name in seen[2]:
        if name in seen[0] and name in seen[1]:
            found, allowed = error(seen[2][name], seen[1][name]), tolerance(seen[0][name], seen[1][name], factor)
            if not found <= allowed:
                return f"; the first layer to diverge is {name!r}, by {found:.3g} where {allowed:.3g} is allowed"
    return "; no layer diverges when both run eagerly, so compilation is to blame"


def _outputs(model: nn.Module, args: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():

        def keep(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            if isinstance(output, Tensor) and name and name not in found:
                found[name] = output.detach().clone()

        handles.append(module.register_forward_hook(keep))
    try:
        with torch.no_grad():
            model(*args)
    finally:
        for handle in handles:
            handle.remove()
    return found
