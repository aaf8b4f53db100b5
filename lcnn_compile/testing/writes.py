"""Statements of random networks that have effects: writes in place, to views, inputs and state; random numbers; branches."""

from __future__ import annotations

import re
from collections.abc import Callable

from lcnn_compile.testing.writer import Writer

# Each may stand where {a} is a value, a slice or a view of one.
METHODS = (
    "{a}.add_(1)", "{a}.mul_(0.5)", "{a}.relu_()", "{a}.clamp_(-0.5, 0.5)", "{a}.zero_()", "{a}.sub_(0.25)", "{a}.neg_()", "{a}.sigmoid_()", "{a}.tanh_()", "{a}.abs_()", "{a}.fill_(0.5)", "{a}.div_(2)",
    "torch.relu_({a})", "F.relu({a}, inplace=True)", "F.relu_({a})", "F.leaky_relu_({a}, 0.1)", "F.hardtanh({a}, 0, 6, inplace=True)", "torch.add({a}, 1, out={a})", "torch.clamp({a}, 0, 1, out={a})", "halve({a})",
    "{a}.copy_({a} * 0.5)", "{a}.masked_fill_({a} < 0, 0.0)", "{a}.clamp_min_(0)", "torch.mul({a}, 0.5, out={a})", "torch.sigmoid({a}, out={a})", "F.dropout({a}, 0.5, False, inplace=True)", "F.silu({a}, inplace=True)", "torch.clamp_({a}, max=0.5)",
    "{a}.set_({a})", "{a}.data.mul_(0.5)", "{a}.detach().mul_(0.5)", "{a}.detach_()", "torch." "_foreach_mul_([{a}], 0.5)", "{a}.__iadd__(1)", "{a}.square_().clamp_(max=4)", "F.threshold({a}, 0.0, 0.0, inplace=True)", "{a}.lerp_({a} * 0, 0.25)",
    "torch.neg_({a})", "{a}.add_(1).mul_(0.5)", "{a}.requires_grad_(False).mul_(0.5)", "nn.init.constant_({a}, 0.5)", "{a}.exp_().clamp_(max=2)", "{a}.index_fill_(0, torch.tensor([0]), 0.5)", "{a}.unsqueeze_(0).squeeze_(0)",
)  # fmt: skip
WITH = (
    "{a}.add_({b})", "{a} += {b}", "{a}.mul_({b}.sigmoid())", "{a}.copy_({b})", "{a} -= {b}", "{a}.sub_({b}, alpha=0.5)", "torch.add({a}, {b}, out={a})", "torch.maximum({a}, {b}, out={a})", "{a}.lerp_({b}, 0.25)",
    "{a} *= {b}.sigmoid()", "{a}.addcmul_({b}, {b}.tanh(), value=0.1)", "{a}.masked_fill_({b} < 0, 0.0)", "{a}.masked_scatter_({b} < 0, {b}.clone())", "torch.sub({a}, {b}, out={a})", "torch." "_foreach_add_([{a}], [{b}])", "torch.where({b} > 0, {a}, {b}, out={a})",
)  # fmt: skip
SLICES = (
    "[:, :2]", "[:, 1:]", "[..., ::2]", "[..., 1:-1]", "[:1]", "[0]", "[:, 0]", "[..., -1]", "[:, ::2, 1:]", "[:, :, 0]", ".narrow(1, 0, 1)", ".select(1, 0)", ".chunk(2, 1)[1]", ".split(1, 1)[0]", ".view(-1)", ".flatten(1)", ".transpose(1, -1)",
    ".permute(0, *range(v.dim() - 1, 0, -1))", ".detach()", ".unsqueeze(1)", ".squeeze(0)", ".contiguous()", ".reshape(-1)", ".unbind(1)[0]", ".view_as(v)", ".diagonal(0, -2, -1)", ".as_strided((2,), (1,))", ".mT", ".data", ".unfold(-1, 2, 2)[..., 0]",
    ".expand(v.shape)", ".swapaxes(0, 1)", ".view(torch.float32)", ".tensor_split(2, 1)[0]", ".alias()", ".view(v.shape[0], -1)[:, 1:]", "[:, :2][..., 1:]", ".transpose(1, 2)[:, 0]", ".float()", ".to(v.dtype)", ".requires_grad_(False)",
)  # fmt: skip
ITEMS = (
    "{a}[:, :1] = 0.5", "{a}[..., 1:] = {a}[..., :-1].clone()", "{a}[{a} < 0] = 0.0", "{a}[{a} < 0] *= 0.5", "{a}[:, [0]] = 0.25", "{a}[:, 0] += 1", "{a}[..., ::2] *= 0.5", "{a}[:] = {a} * 0.5", "{a}[...] = 0.5", "{a}[0] = {a}[-1]",
    "{a}[torch.tensor([0])] = 0.5", "{a}[:, :1] += {a}[:, 1:2]", "{a}.index_add_(1, torch.tensor([0]), {a}[:, :1].clone())", "{a}.index_copy_(1, torch.tensor([0]), {a}[:, -1:].clone())", "{a}.index_put_((torch.tensor([0]),), torch.tensor(0.5))",
    "{a}.scatter_(1, torch.zeros_like({a}, dtype=torch.long)[:, :1], 0.5)", "{a}[:, -1:] = {a}[:, :1]", "{a}.select(1, 0)[...] = 0.5", "{a}[:, :1].copy_({a}[:, -1:])", "{a}.index_fill_(1, torch.tensor([0]), 0.5)", "{a}.put_(torch.tensor([0]), torch.tensor([0.5]))",
    "torch.narrow({a}, 1, 0, 1).zero_()", "{a}[:, 0].relu_()", "for part in {a}.split(1, 1):\n    part.mul_(0.5)", "for i in range(2):\n    {a}[i] += i", "{a}.flatten()[0] = 0.5", "{a}.view(-1)[1:3] = 0.5", "{a}[1:, :1], {a}[:1, :1] = 0.5, 0.25",
)  # fmt: skip


def write(w: Writer) -> None:
    """A write in place to a value."""
    a = w.tensor()
    if a is None:
        return
    call = w.choose(METHODS).format(a=a)
    w.write(w.choose([call, f"{w.fresh()} = {call}"]))


def write_with(w: Writer) -> None:
    """A write in place of another value, or to an output argument."""
    a = w.tensor()
    b = w.like(a) if a else None
    if a and b:
        w.write(w.choose(WITH).format(a=a, b=b))


def write_view(w: Writer) -> None:
    """A write to a part or view of a value, made in the same statement or one before."""
    a = w.tensor()
    if a is None:
        return
    part = a + w.choose(SLICES).replace("v.", f"{a}.")
    text = w.choose(METHODS) if w.flag() else w.choose(["{a}.add_({b})", "{a}.copy_({b})", "{a} += {b}", "{a} *= {b}"])
    if "{b}" in text:
        b = w.tensor()
        w.write(
            text.format(a=part, b=w.choose(["0.5", f"{b}.mean()", f"{b}.flatten()[0]"]))
            if ".copy_" not in text
            else f"{part}.copy_({b}.flatten()[0])"
        )
    elif w.flag():
        name = w.fresh()
        if w.write(f"{name} = {part}"):
            w.write(text.format(a=name))
    else:
        w.write(text.format(a=part))


def write_item(w: Writer) -> None:
    """An assignment to slices, masks or indices."""
    a = w.tensor(lambda t: t.dim() >= 2)
    if a is not None:
        w.write(w.choose(ITEMS).format(a=a))


def filled(w: Writer) -> None:
    """An empty batch filled by slices, as detectors do."""
    a = w.tensor(lambda t: t.dim() == 4)
    if a is None:
        return
    v = w.fresh()
    wide = f"({a}.shape[0], {a}.shape[1], {a}.shape[2] + 1, {a}.shape[3] + 1)"
    fill = w.choose(
        [
            f"{v}[:, :, :{a}.shape[2], :{a}.shape[3]].copy_({a})",
            f"{v}[..., :-1, 1:] = {a}",
            f"for i in range({a}.shape[0]):\n    {v}[i, :, 1:, 1:].copy_({a}[i])",
        ]
    )
    w.write(f"{v} = {w.choose([f'{a}.new_zeros({wide})', f'torch.zeros({wide})', f'{a}.new_full({wide}, 0.5)'])}\n{fill}")


def state(w: Writer) -> None:
    """A buffer that calls change: a counter, the end of a stream, a moving average, a ring."""
    a = w.tensor(lambda t: t.dim() >= 2)
    if a is None:
        return
    shape = tuple(w.values[a].shape)
    kind = w.choose(["counter", "last", "average", "stream", "ring", "assigned", "read", "returned"])
    if kind == "counter":
        count = w.layer("torch.zeros(())", "buffer")
        w.write(
            w.choose([f"{count} += 1", f"{count}.add_(1)", f"{count}[...] = {count} + 1"]),
            *w.choose([(), (f"{w.fresh()} = {a} * {count}",)]),
        )
    elif kind in ("last", "returned"):
        past, v = w.layer(f"torch.zeros({shape})", "buffer"), w.fresh()
        w.write(f"{v} = {a} + {past}" if kind == "last" else f"{v} = {past}", f"{past}.copy_({w.choose([a, f'{a}.relu()', v])})")
    elif kind == "average":
        past = w.layer(f"torch.zeros({shape[1]})", "buffer")
        w.write(f"{past}.mul_(0.9).add_({a}.transpose(0, 1).flatten(1).mean(1), alpha=0.1)")
    elif kind == "stream":
        past, v = w.layer(f"torch.zeros({(*shape[:-1], 1)})", "buffer"), w.fresh()
        w.write(
            f"{v} = torch.cat([{past}, {a}], -1)",
            w.choose([f"{past}.copy_({v}[..., -1:])", f"{past}[:] = {v}[..., -1:]", f"{past} = {v}[..., -1:].clone()"]),
        )
    elif kind == "ring":
        ring, at = w.layer(f"torch.zeros({(3, *shape[1:])})", "buffer"), w.layer("torch.zeros(1, dtype=torch.long)", "buffer")
        w.write(f"{ring}.index_copy_(0, {at}, {a}[:1])", f"{at}.add_(1).remainder_(3)", f"{w.fresh()} = {a} + {ring}.mean(0)")
    elif kind == "assigned":
        past = w.layer(f"torch.zeros({shape})", "buffer")
        w.write(f"{w.fresh()} = {a} - {past}", f"{past} = {a}{w.choose(['.detach()', '.clone()', ''])}")
    else:
        held = w.layer(f"torch.randn({shape[1:]})", "buffer")
        w.write(f"{w.fresh()} = {a} + {held}")


def parameter(w: Writer) -> None:
    """A write to a parameter, which may be the weight of a layer."""
    names = [f"self.{name}" for name, _ in w.model.named_parameters() if "parametrizations" not in name]
    if not names or w.flag():
        a = w.tensor(lambda t: t.dim() >= 2)
        if a is not None:
            p = w.layer(f"nn.Parameter(torch.randn({w.values[a].shape[-1]}))")
            w.write(f"with torch.no_grad():\n    {p}.mul_(0.5)\n{w.fresh()} = {a} * {p}")
        return
    p = w.choose(names)
    parts = p.split(".")
    p = ".".join(part if not part.isdigit() else f"[{part}]" for part in parts).replace(".[", "[")
    w.write(
        "with torch.no_grad():\n    "
        + w.choose(["{p}.mul_(0.5)", "{p}.add_(0.125)", "{p}.copy_({p} * 0.5)", "{p}.data.mul_(0.5)", "{p}[:1] = 0.25"]).format(
            p=p
        )
    )


def random(w: Writer) -> None:
    """Random numbers."""
    a = w.tensor()
    if a is None:
        return
    v = w.fresh()
    texts = ("{v} = {a} + torch.rand_like({a})", "{v} = F.dropout({a}, 0.5, True)", "{v} = torch.randn({shape}) + {a}", "F.dropout({a}, 0.5, True, inplace=True)", "{v} = {d}({a})", "{a}.add_(torch.rand({shape}))", "{a}.uniform_(-1, 1)",
             "{a}.bernoulli_(0.5)", "torch.rand_like({a})", "torch.rand(1)", "{v} = {a} * torch.bernoulli(torch.full_like({a}, 0.5))", "{a}.normal_()", "{v} = {a}[:, torch.randperm({a}.shape[1])]")  # fmt: skip
    text = w.choose(texts)
    dropout = (
        w.layer(w.choose(["nn.Dropout(0.5)", "nn.Dropout(0.5, inplace=True)", "nn.Dropout1d(0.5)"])) if "{d}" in text else ""
    )
    w.write(text.format(v=v, a=a, d=dropout, shape=tuple(w.values[a].shape)))


def branch(w: Writer, kinds: tuple[Callable[[Writer], None], ...] = (write, write_with, write_item)) -> None:
    """A statement in a branch, in a loop or in a region without gradients."""
    conditions = ["if self.training:", "if not self.training:", "with torch.no_grad():", "for _ in range(2):", "with torch.inference_mode():", "with torch.autocast('cpu', enabled=False):", "with torch.enable_grad():", "with torch.set_grad_enabled(False):"]  # fmt: skip
    conditions += [f"if {name}:" for name, value in w.values.items() if isinstance(value, bool)]
    conditions += [f"if {name} is not None:" for name, value in w.values.items() if not isinstance(value, bool | int | float)][:2]
    condition = w.choose(conditions)
    before = len(w.statements)
    w.choose(kinds)(w)
    if len(w.statements) == before + 1 and not re.match(r"\w+ = ", w.statements[-1]):
        body = "\n    ".join(w.statements[-1].split("\n"))
        w.statements.pop()
        w.restart()
        w.write(condition, f"    {body}")
