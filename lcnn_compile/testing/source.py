"""A network given as source text: what a random network is, printed and run as a user would have written it."""

from __future__ import annotations

import copy
import linecache
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcnn_compile.torch_private import NormBase

_FILES = count()
_HEAD = """import torch
import torch.nn.functional as F
from torch import nn
from lcnn_compile.testing.operators import halve, shifted
"""


class Call(NamedTuple):
    """The arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class SourceCase:
    """A module whose ``__init__`` and ``forward`` are text, and the arguments of its calls.

    Attributes:
        layers: statements of ``__init__``.
        signature: parameters of ``forward`` after ``self``.
        statements: those of ``forward``; one may have several lines.
        returned: the expression that ``forward`` returns.
        arguments: an expression of (args, kwargs), in which ``t(*shape)`` makes normal values, ``u(*shape)`` bytes and ``n`` is
            the batch size, ``k`` the number of the call.
        training: whether the module is in training mode.
        seed: of all values.
        batches: the batch size of each call.
    """

    layers: tuple[str, ...]
    signature: str
    statements: tuple[str, ...]
    returned: str
    arguments: str
    training: bool = False
    seed: int = 0
    batches: tuple[int, ...] = (2, 2, 2)

    @property
    def source(self) -> str:
        """The text of the class ``Network``."""
        body = [line for statement in (*self.statements, f"return {self.returned}") for line in statement.split("\n")]
        lines = ["class Network(nn.Module):"]
        if self.layers:
            lines += ["    def __init__(self):", "        super().__init__()", *(f"        {line}" for line in self.layers), ""]
        lines += [f"    def forward(self, {self.signature}):", *(f"        {line}" for line in body)]
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        mode = "train" if self.training else "eval"
        return (
            f"{_HEAD}\n\n{self.source}\n\n# model.{mode}(), seed {self.seed}, called with {self.arguments}, n of {self.batches}"
        )

    def build(self) -> nn.Module:
        """A new module, the same values every time."""
        name = f"<lcnn_compile.testing {next(_FILES)}>"
        text = f"{_HEAD}\n\n{self.source}"
        # Dynamo reads the source text of what it traces.
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        space: dict[str, Any] = {"__name__": "lcnn_compile_testing"}
        exec(compile(text, name, "exec"), space)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model: nn.Module = space["Network"]()
            settle(model)
        return model.train(self.training)

    def call(self, number: int = 0) -> Call:
        """The arguments of one call, other values for every number."""
        batch = self.batches[number % len(self.batches)]
        args, kwargs = eval(self.arguments, argument_names(self.seed + 1000 * (number + 1), batch, number))
        return Call(args, kwargs)

    def calls(self) -> list[Call]:
        """The arguments of several calls in a row."""
        return [self.call(i) for i in range(len(self.batches))]


def argument_names(seed: int, batch: int, number: int) -> dict[str, Any]:
    """What the text of arguments may use."""
    generator = torch.Generator().manual_seed(seed % 2**62)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def whole(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    return {"torch": torch, "F": F, "t": normal, "u": whole, "n": batch, "k": number}


def settle(module: nn.Module) -> None:
    """Let batch statistics and affine parameters be other than the trivial ones, from PyTorch's random state."""
    for part in module.modules():
        if isinstance(part, NormBase) and part.running_mean is not None:
            nn.init.normal_(part.running_mean, std=0.3)
            nn.init.uniform_(part.running_var, 0.5, 2.0)  # type: ignore[arg-type]
        if isinstance(part, NormBase | nn.GroupNorm | nn.LayerNorm) and part.weight is not None:
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.2)


def smaller(case: SourceCase) -> Iterator[SourceCase]:
    """Cases with a little less in them; not all of them run."""
    for i in reversed(range(len(case.statements))):
        yield replace(case, statements=case.statements[:i] + case.statements[i + 1 :])
    for i in reversed(range(len(case.layers))):
        yield replace(case, layers=case.layers[:i] + case.layers[i + 1 :])
    for i, statement in enumerate(case.statements):
        lines = statement.split("\n")
        if len(lines) == 2 and lines[1].startswith("    "):
            yield replace(case, statements=(*case.statements[:i], lines[1].strip(), *case.statements[i + 1 :]))
    if case.returned.startswith(("(", "[")) and case.returned.endswith((")", "]")):
        for part in case.returned[1:-1].rstrip(",").split(", "):
            yield replace(case, returned=part)
    if len(case.batches) > 1:
        yield replace(case, batches=case.batches[:-1])
        yield replace(case, batches=case.batches[1:])
    if len(set(case.batches)) > 1:
        yield replace(case, batches=case.batches[:1] * len(case.batches))
    if case.training:
        yield replace(case, training=False)


def minimise(case: SourceCase, fails: Callable[[SourceCase], bool]) -> SourceCase:
    """A case that fails too and from which nothing can be left out.

    Args:
        case: one that fails.
        fails: says so of a case; it is asked only of cases that run as they are.
    """
    while True:
        for less in smaller(case):
            if runs(less) and fails(less):
                case = less
                break
        else:
            return case


def runs(case: SourceCase) -> bool:
    """Whether the module can be built and called."""
    try:
        model = copy.deepcopy(case.build())
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for inputs in case.calls():
                model(*inputs.args, **inputs.kwargs)
    except Exception:  # the text may be wrong in any way
        return False
    return True
