"""Triton kernels without a GPU: launches in the interpreter, and what is in a compiled kernel.

The interpreter takes over while a ``with`` block lasts, so it does not matter when or how Triton was imported.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from lcnn_compile.kernels.triton.ahead import compiling

__all__ = ["compiling", "interpreting", "resources"]


@contextmanager
def interpreting() -> Iterator[None]:
    """Within, a launch on CPU tensors runs in Triton's interpreter."""

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return InterpretedFunction(self.fn).run(*args, grid=grid, warmup=warmup, **kwargs)

    def inline(self: Any, *args: Any, **kwargs: Any) -> Any:
        return InterpretedFunction(self.fn)(*args, **kwargs)

    with triton.knobs.runtime.scope(), mock.patch.multiple(JITFunction, run=launch, __call__=inline):
        triton.knobs.runtime.interpret = True
        yield


def resources(kernel: Any) -> dict[str, Any]:
    """Registers, stack and spills from cuobjdump; widths in bytes of the loads from global memory, most frequent first."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([tool, "--dump-sass", file.name], capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    found = {}
    for kind, pattern in (("load", r"\bLDG\.E(\S*)"), ("async", r"\bLDGSTS\.E(\S*)"), ("store", r"\bSTG\.E(\S*)")):
        widths: dict[int, int] = {}
        for flags in re.findall(pattern, sass):
            bits = re.search(r"\.(?:U|S)?(8|16|64|128)\b", flags)
            size = int(bits.group(1)) // 8 if bits else 4
            widths[size] = widths.get(size, 0) + 1
        found[kind] = widths
    matrix = sorted(set(re.findall(r"\b(HMMA|HGMMA|UTCHMMA|UTC\w*MMA)\b", sass)))
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return {
        "name": kernel.metadata.name,
        **numbers,
        "smem": kernel.metadata.shared,
        "spills": spills,
        **found,
        "matrix": matrix,
        "ffma": len(re.findall(r"\bFFMA\b", sass)),
        "bytes": len(kernel.asm["cubin"]),
    }
