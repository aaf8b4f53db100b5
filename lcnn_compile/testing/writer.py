"""Draws a network statement by statement, each run as it is written, so that shapes and aliases are real ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from lcnn_compile.testing import operators
from lcnn_compile.testing.source import argument_names, settle

T = TypeVar("T")
LARGEST = 1e3
"""A statement that makes larger values is not written: their rounding errors would hide others."""


class Writer:
    """What has been written of a network so far, and the values of its variables.

    Args:
        draw: Hypothesis's.
        signature: parameters of ``forward``.
        arguments: an expression, as in :class:`~lcnn_compile.testing.SourceCase`.
        training: the module's mode.
        seed: of all values.
    """

    def __init__(self, draw: st.DrawFn, signature: str, arguments: str, training: bool, seed: int):
        self.draw, self.seed = draw, seed
        self._signature, self._arguments, self._training = signature, arguments, training
        self.layers: list[str] = []
        self.statements: list[str] = []
        self._new_layers: list[str] = []
        self._names = 0
        self.restart()

    def restart(self) -> None:
        """Run all that has been written again, from the first value on."""
        self.model = nn.Module()
        self.space: dict[str, Any] = {
            "torch": torch,
            "F": torch.nn.functional,
            "nn": nn,
            "self": self.model,
            "halve": operators.halve,
            "shifted": operators.shifted,
        }
        exec(f"def bind({self._signature}): return locals()", self.space)
        args, kwargs = eval(self._arguments, argument_names(self.seed, 2, 0))
        self.values: dict[str, Any] = self.space["bind"](*args, **kwargs)
        self.space |= self.values
        torch.manual_seed(self.seed)
        for line in self.layers:
            exec(line, self.space)
        settle(self.model)
        self.model.train(self._training)
        for statement in self.statements:
            self._run(statement)

    def _run(self, statement: str) -> None:
        before = set(self.space)
        exec(statement, self.space)
        for name in [n for n in self.space if n not in before and n != "__builtins__"]:
            self.values[name] = self.space[name]

    def choose(self, options: Sequence[T]) -> T:
        """One of the options; the first is the simplest."""
        return self.draw(st.sampled_from(options))

    def number(self, low: int, high: int) -> int:
        """A whole number."""
        return self.draw(st.integers(low, high))

    def flag(self) -> bool:
        """True or False, which is simpler."""
        return self.draw(st.booleans())

    def tensors(self, fits: Callable[[Tensor], bool] = lambda t: True) -> list[str]:
        """Names of the floating-point tensors that fit, the latest first."""
        found = [name for name, value in self.values.items() if isinstance(value, Tensor) and value.is_floating_point()]
        return [name for name in reversed(found) if self.values[name].numel() and fits(self.values[name])]

    def tensor(self, fits: Callable[[Tensor], bool] = lambda t: True) -> str | None:
        """The name of one tensor that fits; None where there is none."""
        found = self.tensors(fits)
        return self.choose(found) if found else None

    def like(self, name: str) -> str | None:
        """A tensor of the same shape under another name."""
        shape = self.values[name].shape
        return self.tensor(lambda t: t.shape == shape and t is not self.values[name]) or self.tensor(lambda t: t.shape == shape)

    def fresh(self) -> str:
        """A name for a new variable."""
        self._names += 1
        return f"v{self._names}"

    def layer(self, expression: str, kind: str = "") -> str:
        """``self.NAME`` of a new layer, buffer ("buffer") or parameter ("parameter"); it exists once a statement uses it."""
        name = f"m{len(self.layers) + len(self._new_layers)}"
        line = f"self.register_buffer({name!r}, {expression})" if kind == "buffer" else f"self.{name} = {expression}"
        self._new_layers.append(line)
        return f"self.{name}"

    def reused(self, kind: type[nn.Module], fits: Callable[[Any], bool]) -> str | None:
        """``self.NAME`` of a layer that has been called already."""
        names = [name for name, part in self.model.named_children() if isinstance(part, kind) and fits(part)]
        return f"self.{self.choose(names)}" if names else None

    def write(self, *lines: str) -> bool:
        """Write and run one statement; where it fails, or makes values too large, nothing is left of it."""
        statement, new, self._new_layers = "\n".join(lines), self._new_layers, []
        wanted = [*self.layers, *new]
        try:
            with torch.random.fork_rng(devices=[]):
                if new:
                    self.layers, before = wanted, self.layers
                    try:
                        self.restart()
                    except Exception:
                        self.layers = before
                        raise
                self._run(statement)
            sound = all(_moderate(v) for v in [*self.values.values(), *self.model.parameters(), *self.model.buffers()])
        except Exception:  # a drawn statement may be wrong in any way
            sound = False
        if sound:
            # Lines that are not indented are statements of their own, so that a failing case can lose one of them.
            for line in statement.split("\n"):
                if line.startswith(" "):
                    self.statements[-1] += f"\n{line}"
                else:
                    self.statements.append(line)
            return True
        self.layers = self.layers[: len(wanted) - len(new)]
        with torch.random.fork_rng(devices=[]):
            self.restart()
        return False


def _moderate(value: Any) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
        return True
    return bool(value.detach().abs().max() < LARGEST)
