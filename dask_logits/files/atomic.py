"""Atomic, durable file writes, and reading of JSON within bounds.

A JSON file is written under a temporary name, flushed, then linked. A link fails if the name exists, so the first
writer wins and later ones notice (``os.replace`` would let the last one win). Files may come from someone else, so
their size and depth are checked before use. :mod:`dask_logits.fields` validates what is in them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from dask_logits.errors import CacheError, CapacityError, ConfigError, DaskLogitsError

Json = dict[str, Any]

# Far larger than any JSON file written here.
_MOST_JSON_BYTES = 256 << 20
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
# These errors affect every other file of the folder, too.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM)
_FAILING = (errno.EIO, errno.ESTALE, errno.EREMOTEIO)


def read_json(path: Path) -> Json | None:
    """Read a JSON object, or return None if the file does not exist.

    Raises
    ------
    CacheError
        If it cannot be read (see :func:`unreadable`) or parsed, exceeds 256 MiB or has more than 200 levels.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_JSON_BYTES:
            raise ValueError(f"{status.st_size} bytes of no plain file, or too many")
        value = parse_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CacheError.at(path, f"expected to read it, got {error}; see that it can be read") from error
    except ValueError as error:
        raise CacheError.at(path, f"expected a JSON object, got {error}; restore the file") from error
    if not isinstance(value, dict):
        raise CacheError.at(path, f"expected a JSON object, got {type(value).__name__}; restore it")
    return value


def parse_json(data: bytes | str) -> Any:
    """Parse JSON of at most 200 levels. Texts may hold the lone surrogates of paths that are not UTF-8.

    >>> parse_json('["\\\\udcff"]') == ["\\udcff"]
    True

    Raises
    ------
    ValueError
        If it is no JSON, or has more levels.
    """
    try:
        return from_json(data)
    except ValueError as error:
        if "surrogate" not in str(error):
            raise
    text = data if isinstance(data, str) else data.decode()
    # pydantic refuses the surrogates, and json the depth only where Python's stack ends.
    from_json(_SURROGATE.sub("?", text))
    return json.loads(text)


def unreadable(error: CacheError) -> bool:
    """Whether the file could not be read now but may be intact."""
    return isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, DaskLogitsError)


def is_there(path: Path) -> bool:
    """Whether a path exists. Unlike ``Path.exists``, this raises if the answer is unknown.

    Raises
    ------
    CacheError
        If the file system cannot tell, or a link is broken.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():
            raise CacheError(
                f"{path}: expected what it is a link to, got nothing at {str(path.readlink())!r}; mount that, or take "
                "the link away"
            ) from error
        return False
    except OSError as error:
        raise CacheError(f"{path}: expected to find it or not, got {error}; see that it can be read") from error
    return True


def names_in(folder: Path) -> list[str]:
    """Return the sorted names in a folder, empty if the folder does not exist.

    Raises
    ------
    CacheError
        If the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CacheError(f"{folder}: expected to list it, got {error}; see that it can be read") from error


def expanded(path: str | Path) -> Path:
    """Return a user's path as an absolute path with ``~`` resolved.

    Raises
    ------
    ConfigError
        If the home folder does not exist.
    """
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(f"{path}: expected a path, got one whose home folder is not known; write it out") from error


def create_json(path: Path, value: Mapping[str, Any]) -> bool:
    """Create a JSON file atomically and durably, unless it exists.

    Returns
    -------
    bool
        False if the file existed, because the first writer wins.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    # In JSON, a backslash also escapes the lone surrogates of a path that is not UTF-8.
    return create_bytes(path, text.encode(errors="backslashreplace"))


def create_bytes(path: Path, data: bytes) -> bool:
    """Create a file atomically and durably, unless it exists. Return False if it existed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside(path) as temporary:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            # NFS repeats a request whose answer was lost, and then finds its own link.
            if temporary.stat().st_nlink == 1:
                return False
    sync(path.parent)
    return True


def replace_json(path: Path, value: Mapping[str, Any], *, durable: bool = False) -> None:
    """Replace a JSON file atomically, flushed to the disk only if ``durable``."""
    replace_text(path, json.dumps(value, indent=1), durable=durable)


def replace_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Replace a text file in UTF-8 atomically, flushed to the disk only if ``durable``."""
    with aside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        if durable:
            sync(temporary)
        temporary.replace(path)
    if durable:
        sync(path.parent)


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Yield a temporary name next to a path. The file is deleted at the end unless it was renamed."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def no_room(error: BaseException) -> str | None:
    """Return the system's message if there is no space to write, else None.

    >>> no_room(OSError(28, "x")), no_room(OSError(5, "x"))
    ('No space left on device', None)
    """
    number = error.errno if isinstance(error, OSError) else None
    return os.strerror(number) if number in _NO_ROOM else None


def only_readable(error: BaseException) -> bool:
    """Whether a file system is read-only, which may be true on one machine alone.

    >>> only_readable(OSError(30, "x")), only_readable(OSError(28, "x"))
    (True, False)
    """
    return isinstance(error, OSError) and error.errno == errno.EROFS


@contextlib.contextmanager
def room(folder: Path, *, begun: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Translate write errors and disk failures in a folder into one message.

    Parameters
    ----------
    folder
        The folder being written.
    begun
        Whether the job had already begun.

    Raises
    ------
    CapacityError
        If there is no space, permission is denied, or the disk fails.
    """
    try:
        yield
    except OSError as error:
        file = folder if error.filename is None else folder / os.fsdecode(error.filename)
        forbidden = error.errno in _FORBIDDEN and file.is_relative_to(folder)
        reason = error.strerror if forbidden else no_room(error)
        if isinstance(error, DaskLogitsError) or (reason is None and error.errno not in _FAILING):
            raise
        expected, cure = f"to be able to write {file}, got {reason!r}", "make room, or choose another folder"
        if reason is None:
            expected, cure = f"disks that can be read and written, got {error}", "check the disk"
        failed = CapacityError(
            f"{folder}: expected {expected}; whatever was complete before is good: {cure}, and run the same command "
            "again"
        )
        try:
            failed.ran = begun()
        except OSError:
            failed.ran = True
        raise failed from error


def sync_tree(path: Path) -> None:
    """Flush all files and folders below a path to the disk."""
    for folder, _, names in os.walk(path):
        for name in names:
            sync(Path(folder) / name)
        sync(Path(folder))
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
