"""Small measured facts on disk: JSON files in LCNN_CACHE_DIR or the user's cache directory, written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock
from platformdirs import user_cache_dir


def cache_folder() -> Path:
    """The folder of everything that is worth keeping between processes."""
    return Path(os.environ.get("LCNN_CACHE_DIR") or user_cache_dir("lcnn_compile", appauthor=False))


@cache
def known(path: Path) -> dict[str, Any]:
    """What is in a file; an unreadable one counts as empty."""
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def remember(path: Path, key: str, value: Any) -> None:
    """Add one entry to a file; a folder that cannot be written is not worth failing for."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"), tempfile.TemporaryDirectory(dir=path.parent) as folder:
            known.cache_clear()
            written = Path(folder) / path.name
            written.write_text(json.dumps({**known(path), key: value}))
            os.replace(written, path)
    except OSError:
        return
    known.cache_clear()
