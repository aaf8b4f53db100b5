"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lcnn_compile.errors import LcnnError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path of the same name in a temporary folder beside ``path``; what is there in the end moves into place.

    After an error or an interruption ``path`` is what it was before. Files that the writer puts beside the given path move along.

    Raises:
        LcnnError: if the folder does not exist or cannot be written.
    """
    target = Path(path)
    if target.is_dir():
        raise LcnnError(f"{target} is a folder; name a file in it")
    try:
        folder = tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise LcnnError(f"{target} cannot be written: {error}; make its folder first, or name another one") from error
    with folder as name:
        made = Path(name) / target.name
        yield made
        for file in sorted(Path(name).iterdir(), key=lambda found: found == made):
            os.replace(file, target.parent / file.name)
