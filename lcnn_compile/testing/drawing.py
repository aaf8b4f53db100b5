"""The strategy of random networks in source text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hypothesis import note
from hypothesis import strategies as st

from lcnn_compile.testing import layers, writes
from lcnn_compile.testing.source import SourceCase, runs
from lcnn_compile.testing.writer import Writer

SHAPES = ("(n, 4, 6, 6)", "(n, 3, 8, 5)", "(n, 4, 9)", "(3, 8, 8)", "(n, 2, 4, 4, 4)")
LAYOUTS = (
    "",
    ".to(memory_format=torch.channels_last)",
    ".transpose(-1, -2).contiguous().transpose(-1, -2)",
    "[:1].expand{shape}",
    "[..., :, :]",
)
Kind = Callable[[Writer], None]
MAKING: tuple[Kind, ...] = (
    layers.mapped, layers.activation, layers.join, layers.view, layers.functional_convolution, layers.normalisation, layers.pooling,
    layers.reduction, layers.linear, layers.constant,
)  # fmt: skip
WRITING: tuple[Kind, ...] = (
    writes.write, writes.write_with, writes.write_item, writes.write_view, writes.state, writes.filled, writes.branch,
)  # fmt: skip


def _inputs(draw: st.DrawFn) -> tuple[str, str, tuple[str, ...]]:
    """Signature, arguments, and statements that use the inputs other than the first."""
    shape = draw(st.sampled_from([*SHAPES[:1] * 4, *SHAPES]))
    layout = draw(st.sampled_from([*LAYOUTS[:1] * 4, *LAYOUTS])).format(shape=shape)
    if "channels_last" in layout and shape.count(",") != 3:
        layout = ""
    first = f"t{shape}{layout}"
    kind = draw(st.sampled_from(["one", "one", "one", "two", "optional", "absent", "flag", "number", "variadic", "list", "mapping", "bytes", "index", "same", "part", "named", "none"]))  # fmt: skip
    plain = f"t{shape}"
    if kind == "two":
        return "x, y", f"({first}, {plain}), {{}}", ()
    if kind == "optional":
        by_name = draw(st.booleans())
        use = draw(st.sampled_from(["x = x + y", "x.add_(y)", "y.add_(x)"]))
        return (
            "x, y=None",
            f"({first},), {{'y': {plain}}}" if by_name else f"({first}, {plain}), {{}}",
            (f"if y is not None:\n    {use}",),
        )
    if kind in ("absent", "none"):
        return "x, y=None", f"({first}{', None' if kind == 'none' else ''},), {{}}", ("if y is not None:\n    x = x + y",)
    if kind == "flag":
        value, given = draw(st.sampled_from(["True", "False", "k != 1"])), draw(st.booleans())
        return (
            "x, *, flag=True",
            f"({first},), {{'flag': {value}}}" if given else f"({first},), {{}}",
            ("if flag:\n    x = x * 0.5",),
        )
    if kind == "number":
        value = draw(st.sampled_from(["0.5", "2", "0.25", "0.5 * (k + 1)", "k", "k + 3"]))
        use = draw(st.sampled_from(["x = x * scale", "x.mul_(scale)", "x = x + scale"]))
        return "x, scale=1.0", f"({first}, {value}), {{}}" if draw(st.booleans()) else f"({first},), {{'scale': {value}}}", (use,)
    if kind == "variadic":
        return (
            "*xs",
            f"({first}, {plain}), {{}}",
            ("x = xs[0]", draw(st.sampled_from(["y = xs[-1]", "y = sum(xs)", "xs[1].add_(x)"]))),
        )
    if kind == "list":
        pair = draw(st.sampled_from(["[{}, {}]", "({}, {})", "({}, ({}, 3))"]))
        return (
            "pair",
            f"({pair.format(first, plain)},), {{}}",
            ("x = pair[0]", "y = pair[1][0]" if "3" in pair else "y = pair[1]"),
        )
    if kind == "mapping":
        return (
            "batch, *, extra=None",
            f"({{'x': {first}, 'more': [{plain}]}},), {{'extra': {plain}}}",
            ("x = batch['x']", "y = batch['more'][0]", "z = extra"),
        )
    if kind == "bytes":
        return (
            "x",
            f"(u{shape},), {{}}",
            (draw(st.sampled_from(["x = x.float() / 255", "x = x / 255", "x = x.to(torch.float32).div_(255)"])),),
        )
    if kind == "index":
        return (
            "x, index",
            f"({first}, torch.tensor([1, 0])), {{}}",
            (
                draw(
                    st.sampled_from(
                        ["y = x[:, index]", "x[:, index] = 0.5", "y = x.index_select(1, index)", "x.index_fill_(1, index, 0.25)"]
                    )
                ),
            ),
        )
    if kind == "same":
        return "x, y", f"((x := {plain}), x), {{}}", ()
    if kind == "part":
        part = draw(st.sampled_from(["[:, :1]", "[:, 1:]", "[..., ::2]", ".flatten(1)", ".transpose(-1, -2)"]))
        return "x, y", f"((x := {plain}), x{part}), {{}}", ()
    if kind == "named":
        return "*, x, y=None", f"(), {{'x': {first}}}", ()
    return "x", f"({first},), {{}}", ()


@st.composite
def source_networks(
    draw: st.DrawFn, max_statements: int = 8, random: bool = True, training: bool = True, effects: bool = True
) -> SourceCase:
    """A random module in source text with what breaks compilers of graphs, and arguments for it.

    Convolutions of all kinds as modules and functions, shared ones too; writes in place as methods, functions, modules, output
    arguments, items and custom operators, to values, views, inputs, buffers and parameters, their results used or not; several
    names of one memory; branches on flags; optional, named, variadic and nested inputs. ``case.build()`` makes the module,
    ``case.calls(3)`` arguments of calls in a row, ``str(case)`` is a program.

    Args:
        max_statements: the most that are drawn.
        random: whether random numbers are drawn.
        training: whether the module may be in training mode.
        effects: whether anything is written in place.
    """
    signature, arguments, first = _inputs(draw)
    mode = draw(st.sampled_from([False, False, False, True])) if training else False
    w = Writer(draw, signature, arguments, mode, draw(st.integers(0, 2**31 - 1)))
    for statement in first:
        w.write(statement)
    kinds: list[Kind] = [layers.convolution] * 8 + list(MAKING) * 2 + (list(WRITING) * 3 + [writes.parameter] if effects else [])
    kinds += [writes.random] if random else []
    if draw(st.integers(0, 5)) < 5:
        layers.convolution(w)
    for _ in range(draw(st.integers(2, max_statements))):
        draw(st.sampled_from(kinds))(w)
    case = SourceCase(tuple(w.layers), signature, tuple(w.statements), _returned(w), arguments, mode, w.seed)
    other = replace(case, batches=draw(st.sampled_from([(2, 2, 2), (2, 2, 2), (2, 3, 3), (2, 3, 5), (2, 1, 2)])))
    case = other if other == case or runs(other) else case
    note(f"{case}\n\nThe same as an object:\n{case!r}")
    return case


def _returned(w: Writer) -> str:
    """What ``forward`` returns: the last value, and perhaps others, views or inputs."""
    found = w.tensors() or [next(iter(w.values))]
    if w.number(0, 2) == 0:
        return found[0]
    texts = (
        "{a}",
        "{a}",
        "{a}",
        "{a}[:, :1]",
        "{a}.flatten(1)",
        "{a}.detach()",
        "{a}.transpose(1, -1)",
        "{a}.relu_()",
        "{a} + 1",
        "{a}.mean()",
    )
    parts = [found[0], *(w.choose(texts).format(a=w.choose(found)) for _ in range(w.number(1, 2)))]
    for part in list(parts[1:]):
        try:
            eval(part, dict(w.space))
        except Exception:
            parts.remove(part)
    form = w.choose(["({},)", "[{}]", "({},)", "{{'a': {}}}"])
    if "a" in form:
        return "{" + ", ".join(f"'k{i}': {part}" for i, part in enumerate(parts)) + "}"
    return form.format(", ".join(parts))
