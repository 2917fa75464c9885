"""Files that are whole and on the disk, or absent.

A JSON file is written beside its place, flushed, then linked: a link fails if the name exists, so the first writer
wins and later ones learn of it (``os.replace`` would let the last one win).
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dask_logits.errors import CacheError

Json = dict[str, Any]


def read_json(path: Path) -> Json | None:
    """Read a JSON object; None if the file does not exist.

    Raises
    ------
    CacheError
        If it cannot be read or parsed.
    """
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise CacheError(
            f"{path}: expected a JSON object, got {error}; restore or delete the file", str(path)
        ) from error
    if not isinstance(value, dict):
        raise CacheError(f"{path}: expected a JSON object, got {type(value).__name__}; restore it", str(path))
    return value


def create_json(path: Path, value: Mapping[str, Any]) -> bool:
    """Create a JSON file if it is absent, whole and durable.

    Returns
    -------
    bool
        False if it existed: the first writer won.
    """
    return create_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def create_bytes(path: Path, data: bytes) -> bool:
    """Create a file if it is absent, whole and durable; return False if it existed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(aside, path)
    except FileExistsError:
        return False
    finally:
        aside.unlink()
    sync(path.parent)
    return True


def replace_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file over an older one, whole but not flushed: for progress, not for truth."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    aside.write_text(json.dumps(value, indent=1))
    aside.replace(path)


def sync_tree(path: Path) -> None:
    """Flush every file and folder below a path to the disk."""
    for folder, _, names in os.walk(path):
        for name in names:
            sync(Path(folder) / name)
        sync(Path(folder))
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush one file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
