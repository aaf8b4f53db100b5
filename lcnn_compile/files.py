"""Files that appear whole or not at all, and digests of what is in files."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
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
    check_target(target)
    try:
        folder = tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise LcnnError(f"{target} cannot be written: {error}") from error
    with folder as name:
        made = Path(name) / target.name
        yield made
        for file in sorted(Path(name).iterdir(), key=lambda found: found == made):
            os.replace(file, target.parent / file.name)


def check_target(path: Path) -> None:
    """Whether a file can be put there, to be asked before long work.

    Raises:
        LcnnError: if it is a folder, or its own folder does not exist or cannot be written.
    """
    if path.is_dir():
        raise LcnnError(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise LcnnError(
            f"{path} cannot be written: {path.parent} is no folder that can be written; make it first, or name another"
        )


def digest(texts: Iterable[str], files: Iterable[Path] = ()) -> str:
    """24 hexadecimal digits that differ where the texts, or the contents of the files, do."""
    found = hashlib.sha256("\0".join(texts).encode())
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()[:24]
