"""Statements of random networks that make new values: layers, functions, joins, views."""

from __future__ import annotations

from torch import Tensor, nn

from lcnn_compile.testing.writer import Writer

MODULES = (
    "nn.ReLU",
    "nn.ReLU6",
    "nn.SiLU",
    "nn.Hardswish",
    "nn.LeakyReLU",
    "nn.ELU",
    "nn.Hardtanh",
    "nn.Mish",
    "nn.SELU",
    "nn.CELU",
)
SMOOTH = (
    "nn.GELU()",
    "nn.Tanh()",
    "nn.Sigmoid()",
    "nn.Softplus()",
    "nn.PReLU()",
    "nn.Hardsigmoid()",
    "nn.Identity()",
    "nn.LogSigmoid()",
    "nn.Softsign()",
)
FUNCTIONS = ("relu", "relu6", "silu", "hardswish", "leaky_relu", "elu", "hardtanh", "mish", "selu", "celu", "hardsigmoid")
MAPS = (
    "{a}.relu()", "torch.relu({a})", "{a} + 1", "{a} * 0.5", "0.5 * {a}", "{a} / 2", "-{a}", "{a}.sigmoid()", "{a}.tanh()", "1 - {a}", "{a}.abs()",
    "{a}.clamp(0, 6)", "{a}.clamp(min=0)", "{a}.clamp_min(-0.5)", "torch.clamp({a}, -1, 1)", "F.gelu({a})", "F.softplus({a})", "{a}.neg()", "{a}.exp().clamp(max=3)",
    "torch.where({a} > 0, {a}, 0.5 * {a})", "{a}.masked_fill({a} < 0, 0.0)", "shifted({a})", "{a}.clone()", "{a}.square().clamp(max=4)", "{a}.to(torch.float64).float()",
    "{a}.roll(1, -1)", "{a}.flip(-1)", "{a}.cumsum(-1)", "{a}.softmax(1)", "F.normalize({a}, dim=1, eps=0.1)", "{a}.sort(-1)[0]", "F.dropout({a}, 0.5, self.training)", "F.dropout({a}, 0.5, False)",
)  # fmt: skip
VIEWS = (
    "{a}", "{a}[:, :2]", "{a}[:, 1:]", "{a}[..., ::2]", "{a}[..., 1:-1]", "{a}[:1]", "{a}.detach()", "{a}.view({a}.shape)", "{a}.flatten(1)", "{a}.flatten(2)", "{a}.transpose(1, -1)", "{a}.narrow(1, 0, 2)",
    "{a}.select(1, 0)", "{a}.chunk(2, 1)[1]", "{a}.split([1, {a}.shape[1] - 1], 1)[0]", "torch.split({a}, 1, 1)[0]", "{a}.unsqueeze(0).squeeze(0)", "{a}.permute(0, *range({a}.dim() - 1, 0, -1))",
    "{a}.contiguous()", "{a}.reshape({a}.shape[0], -1)", "{a}.unbind(1)[0]", "{a}.expand(2, *{a}.shape)[0]", "{a}.to(torch.float32)", "{a}.view_as({a})", "{a}.swapaxes(1, 2)", "{a}.movedim(1, -1)",
    "{a}.unfold(-1, 2, 1)[..., 0]", "{a}.diagonal(0, -2, -1)", "{a}.as_strided({a}.shape, {a}.stride())", "{a}.T", "{a}.mT", "{a}.tensor_split(2, 1)[0]", "{a}[None][0]", "{a}.unflatten(1, (1, -1)).flatten(1, 2)",
    "{a}.float()", "{a}.type_as({a})", "{a}.requires_grad_(False)", "F.dropout({a}, 0.5, False)", "{a}.expand(-1, *{a}.shape[1:])", "{a}.squeeze()", "torch.Tensor.narrow({a}, 1, 0, 1)", "{a}.real",
)  # fmt: skip
JOINS = (
    "{a} + {b}", "{b} + {a}", "{a} - {b}", "torch.add({a}, {b})", "torch.add({a}, {b}, alpha=0.5)", "{a}.add({b}, alpha=2)", "{a} * {b}.sigmoid()", "torch.cat([{a}, {b}], 1)", "torch.cat(({b}, {a}), -1)",
    "torch.stack([{a}, {b}], 1).mean(1)", "torch.maximum({a}, {b})", "torch.where({b} > 0, {a}, {a} * 0.5)", "{a}.lerp({b}, 0.25)", "torch.addcmul({a}, {b}, {b}, value=0.1).clamp(-3, 3)", "F.relu({a} + {b})",
    "({a} + {b}).relu_()", "torch.sub({a}, {b}, alpha=0.5)",
)  # fmt: skip
REDUCTIONS = (
    "{a}.mean((-2, -1))", "{a}.mean(1, keepdim=True)", "{a}.amax((-2, -1))", "{a}.sum(-1) * 0.1", "{a}.flatten(1).mean(1, keepdim=True)", "{a}.max(1)[0]", "{a}.std(-1, unbiased=False)", "{a}.amax((-2, -1), keepdim=True)",
    "{a}.mean()", "torch.mean({a}, dim=(-2, -1), keepdim=True)",
)  # fmt: skip


def _padding(w: Writer, dimensions: int) -> str:
    mode = w.choose(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"])
    padding = w.choose(["1", "0", "2", "'same'", "'valid'"])
    return f"padding={padding}" + ("" if mode == "zeros" else f", padding_mode={mode!r}")


def _images(t: Tensor) -> bool:
    return t.dim() in (3, 4, 5) and t.shape[1] >= 2 and min(t.shape[2:]) >= 2


def convolution(w: Writer) -> None:
    """A convolution, transposed or not, of one to three dimensions, called as a module; perhaps one that was called before."""
    a = w.tensor(_images)
    if a is None:
        return
    x = w.values[a]
    channels, n = x.shape[1], x.dim() - 2
    if w.number(0, 3) == 3:
        old = w.reused((nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1], lambda m: m.in_channels == channels)
        if old:
            w.write(f"{w.fresh()} = {old}({a})")
            return
    groups = w.choose([1, 1, 1, *(g for g in (2, 3, channels) if channels % g == 0)])
    out = groups * w.number(1, max(1, 6 // groups))
    if w.flag() and channels % groups == 0:
        out = channels
    sizes = [w.choose([3, 1, 2]) for _ in range(n)]
    kernel = str(sizes[0]) if len(set(sizes)) == 1 else str(tuple(sizes))
    stride, dilation = w.choose([1, 1, 1, 2]), w.choose([1, 1, 1, 2])
    bias = "" if w.flag() else ", bias=False"
    if w.number(0, 5) == 5:
        made = f"nn.ConvTranspose{n}d({channels}, {out}, {kernel}, {stride}, groups={groups}{bias})"
    else:
        if "same" in (padding := _padding(w, n)):
            stride = 1
        made = f"nn.Conv{n}d({channels}, {out}, {kernel}, {stride}, dilation={dilation}, groups={groups}, {padding}{bias})"
        if w.number(0, 9) == 9:
            made = f"torch.nn.utils.parametrizations.weight_norm({made})"
    if w.number(0, 5) == 5:
        made = f"nn.Sequential({made}, nn.BatchNorm{n}d({out}), nn.{w.choose(['ReLU', 'SiLU', 'Hardswish'])}(inplace={w.flag()}))"
    w.write(f"{w.fresh()} = {w.layer(made)}({a})")


def functional_convolution(w: Writer) -> None:
    """A convolution called as a function, on a parameter, a buffer or what is computed from one."""
    a = w.tensor(_images)
    if a is None:
        return
    x = w.values[a]
    channels, n = x.shape[1], x.dim() - 2
    groups = w.choose([1, 1, *(g for g in (2, channels) if channels % g == 0)])
    out = groups * w.number(1, 3)
    shape = (out, channels // groups, *[w.choose([3, 1, 2])] * n)
    scale = (channels // groups * shape[2] ** n) ** -0.5
    drawn = f"torch.randn{shape} * {scale:.2g}"
    weight = w.layer(drawn, "buffer") if w.number(0, 3) == 3 else w.layer(f"nn.Parameter({drawn})")
    change = w.choose(["{}", "{}", "{} * 0.5", "{}.abs()", "{} / {}.norm()", "({} - {}.mean())", "{}.flip(-1)"])
    bias = w.choose(["None", "None", "parameter"])
    if bias == "parameter":
        bias = w.layer(f"nn.Parameter(torch.randn({out}))")
    function = w.choose([f"F.conv{n}d", f"torch.conv{n}d"])
    rest = w.choose(["", ", padding=1", ", stride=2", ", padding='same'"]) + (f", groups={groups}" if groups > 1 else "")
    text = change.replace("{}", weight)
    v = w.fresh()
    w.write(f"{v} = {function}({a}, {text}, {bias}{rest})")
    if v in w.values and w.number(0, 3) == 3:
        again = w.tensor(lambda t: t.dim() == n + 2 and t.shape[1] == channels)
        w.write(f"{w.fresh()} = {function}({again}, {weight})")


def linear(w: Writer) -> None:
    """A linear layer over the last dimension."""
    a = w.tensor(lambda t: t.dim() >= 2 and t.shape[-1] <= 150)
    if a is not None:
        w.write(f"{w.fresh()} = {w.layer(f'nn.Linear({w.values[a].shape[-1]}, {w.number(1, 5)})')}({a})")


def activation(w: Writer) -> None:
    """An activation, in place or not, as a module or a function; perhaps as a statement without a result."""
    a = w.tensor()
    if a is None:
        return
    kind = w.choose(["module", "function", "smooth"])
    if kind == "module":
        call = f"{w.layer(f'{w.choose(MODULES)}(inplace={w.flag()})')}({a})"
    elif kind == "function":
        call = f"F.{w.choose(FUNCTIONS)}({a}, inplace={w.flag()})"
    else:
        call = f"{w.layer(w.choose(SMOOTH))}({a})"
    w.write(w.choose([f"{w.fresh()} = {call}", f"{a} = {call}", call]))


def normalisation(w: Writer) -> None:
    """Batch, instance, group or layer norm, some of which write their statistics."""
    a = w.tensor(lambda t: t.dim() in (3, 4) and t.shape[1] >= 1 and t.shape[-1] >= 2)
    if a is None:
        return
    x = w.values[a]
    channels, n = x.shape[1], x.dim() - 2
    eps = ", eps=0.01"
    kind = w.choose(["batch", "batch", "functional", "training", "instance", "group", "layer", "frozen"])
    if kind == "functional":
        mean, var = w.layer(f"torch.zeros({channels})", "buffer"), w.layer(f"torch.ones({channels})", "buffer")
        call = f"F.batch_norm({a}, {mean}, {var}, training={w.choose(['False', 'True', 'self.training'])}{eps})"
    elif kind == "training":
        call = f"F.batch_norm({a}, None, None, training=True{eps})"
    elif kind == "instance":
        call = f"{w.layer(f'nn.InstanceNorm{n}d({channels}{eps}, affine={w.flag()}, track_running_stats={w.flag()})')}({a})"
    elif kind == "group":
        call = f"{w.layer(f'nn.GroupNorm({w.choose([1, channels])}, {channels}{eps})')}({a})"
    elif kind == "layer":
        call = f"{w.layer(f'nn.LayerNorm({x.shape[-1]}{eps})')}({a})"
    elif kind == "frozen":
        call = f"{w.layer(f'nn.BatchNorm{n}d({channels}{eps}, momentum=None)')}.train()({a})"
    else:
        call = f"{w.layer(f'nn.BatchNorm{n}d({channels}{eps}, affine={w.flag()})')}({a})"
    w.write(f"{w.fresh()} = {call}")


def pooling(w: Writer) -> None:
    """Pooling, upsampling or padding."""
    a = w.tensor(lambda t: t.dim() in (3, 4) and min(t.shape[2:]) >= 3)
    if a is None:
        return
    n = w.values[a].dim() - 2
    kind = w.choose(["max", "avg", "adaptive", "up", "pad", "shuffle", "lp"])
    tail = w.choose(["", ", ceil_mode=True"])
    k, s, p = w.choose([2, 3]), w.choose([1, 2]), w.choose([0, 1])
    if kind in ("max", "avg"):
        module = f"nn.{'Max' if kind == 'max' else 'Avg'}Pool{n}d({k}, {s}, {p}{tail})"
        function = f"F.{kind}_pool{n}d({a}, {k}, {s}, {p}{tail})"
        call = function if w.flag() else f"{w.layer(module)}({a})"
        if kind == "avg" and n == 2 and w.flag():
            call = f"F.avg_pool2d({a}, {k}, {s}, {p}{tail}, count_include_pad=False)"
    elif kind == "adaptive":
        call = f"F.adaptive_{w.choose(['avg', 'max'])}_pool{n}d({a}, {w.choose([1, 2, 3])})"
    elif kind == "up":
        modes = ["nearest", "nearest-exact", "bilinear" if n == 2 else "linear"]
        call = f"F.interpolate({a}, {w.choose(['scale_factor=2', f'size={(5,) * n}'])}, mode={w.choose(modes)!r})"
    elif kind == "pad":
        call = f"F.pad({a}, {(1, 1) * n}{w.choose(['', ', value=0.5', ', mode=' + repr('reflect')])})"
    elif kind == "shuffle":
        call = f"F.pixel_unshuffle(F.pad({a}, (0, {a}.shape[-1] % 2, 0, {a}.shape[-2] % 2)), 2)"
    else:
        call = f"F.lp_pool{n}d({a}.abs() + 0.1, 2, 2)"
    w.write(f"{w.fresh()} = {call}")


def mapped(w: Writer) -> None:
    """A new value of the same shape."""
    a = w.tensor()
    if a is not None:
        w.write(f"{w.fresh()} = {w.choose(MAPS).format(a=a)}")


def view(w: Writer) -> None:
    """Another name, or a view."""
    a = w.tensor()
    if a is not None:
        w.write(f"{w.fresh()} = {w.choose(VIEWS).format(a=a)}")


def join(w: Writer) -> None:
    """A residual addition, a concatenation or another join of two values of one shape."""
    a = w.tensor()
    b = w.like(a) if a else None
    if a and b:
        w.write(f"{w.choose([w.fresh(), a])} = {w.choose(JOINS).format(a=a, b=b)}")


def reduction(w: Writer) -> None:
    """Pixels or channels become fewer."""
    a = w.tensor(lambda t: t.dim() >= 3)
    if a is not None:
        w.write(f"{w.fresh()} = {w.choose(REDUCTIONS).format(a=a)}")


def constant(w: Writer) -> None:
    """A constant, or an empty value that is filled."""
    a = w.tensor()
    if a is None:
        return
    texts = ("torch.zeros_like({a})", "{a}.new_full({a}.shape, 0.5)", "torch.ones({shape})", "torch.full({shape}, 0.25)", "torch.empty_like({a}).fill_(0.5)", "torch.linspace(0, 1, {a}.shape[-1])", "{a}.new_zeros({a}.shape)")  # fmt: skip
    shape = tuple(w.values[a].shape)
    w.write(f"{w.fresh()} = {w.choose(texts).format(a=a, shape=shape)}")
