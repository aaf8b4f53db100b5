"""The state of an unfinished training run in one safetensors file, its plain part as JSON in the header."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from lcnn_compile.errors import CheckpointError

FORMAT = "lcnn_compile.distill/1"


def write_state(path: Path, student: nn.Module, optimizer: Optimizer, best: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Write weights, optimizer state, best weights and ``plain``; the file is replaced as a whole or not at all."""
    tensors = {f"student.{name}": t for name, t in student.state_dict().items() if isinstance(t, Tensor)}
    tensors |= {f"best.{name}": t for name, t in best.items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": t for key, t in state.items() if isinstance(t, Tensor)}
    copies = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(copies, temporary, {"format": FORMAT, "plain": json.dumps(plain)})
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def read_state(path: Path, student: nn.Module, optimizer: Optimizer, best: dict[str, Tensor]) -> dict[str, Any]:
    """Load what ``write_state`` wrote into ``student``, ``optimizer`` and ``best``; return the plain part.

    Raises:
        CheckpointError: if the file is something else, or of another network.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as a training checkpoint: {error}") from error
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path} has the format {header.get('format')!r}; {FORMAT!r} is required")
    parts: dict[str, dict[str, Tensor]] = {"student": {}, "best": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        parts.setdefault(kind, {})[rest] = tensor
    expected = {name: t.shape for name, t in student.state_dict().items() if isinstance(t, Tensor)}
    if {name: t.shape for name, t in parts["student"].items()} != expected:
        raise CheckpointError(f"{path} is the checkpoint of another network: names or shapes differ")
    student.load_state_dict(parts["student"], strict=False)
    best.update(parts["best"])
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in parts["optimizer"].items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    plain: dict[str, Any] = json.loads(header["plain"])
    return plain
