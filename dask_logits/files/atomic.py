"""Files that are whole and on the disk, or absent; and the shapes of what is read back.

A JSON file is written beside its place, flushed, then linked: a link fails if the name exists, so the first writer
wins and later ones learn of it (``os.replace`` would let the last one win). What is read was perhaps written by
somebody else: its size, its depth and the types of its fields are checked before anything is done with it.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dask_logits.errors import CacheError, CapacityError, ConfigError, DaskLogitsError

Json = dict[str, Any]

# No file that is written here comes near.
_MOST_JSON_BYTES = 256 << 20
_DEEPEST = 64
# Nothing else could be written there either.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_READ_ONLY = (errno.EROFS,)
_FORBIDDEN = (errno.EACCES, errno.EPERM)
_FAILING = (errno.EIO, errno.ESTALE, errno.EREMOTEIO)
# Far beyond any count, and far below where sums and products of a few leave 64 bits.
_MOST = 1 << 48


@dataclass(frozen=True)
class Kind:
    """What a field holds.

    Parameters
    ----------
    what
        In words, for messages.
    holds
        Whether a value is of this kind.
    """

    what: str
    holds: Callable[[Any], bool]

    def or_none(self) -> Kind:
        """Return the kind that may also be absent or null."""
        return Kind(f"{self.what} or null", lambda value: value is None or self.holds(value))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _is_number(value: Any) -> bool:
    # Neither NaN nor infinite, nor an integer that no float can hold.
    return type(value) in (int, float) and -1e300 < value < 1e300


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value not in (".", "..") and bool(re.fullmatch(r"[\w.-]{1,200}", value, re.A))


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and all(map(_is_name, value.split("/")))


COUNT = Kind("a count", _is_count)
COUNTS = Kind("a list of counts", lambda value: isinstance(value, list) and all(map(_is_count, value)))
NUMBER = Kind("a finite number", _is_number)
TEXT = Kind("text", lambda value: isinstance(value, str))
OBJECT = Kind("a JSON object", lambda value: isinstance(value, dict))
# A file in a folder, or below it, not a way out of it.
NAME = Kind("a plain file name", _is_name)
INNER_PATH = Kind("a path below the folder", _is_path)
DIGEST = Kind(
    "64 hexadecimal digits",
    lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None,
)
NUMBERS = Kind(
    "a JSON object of finite numbers", lambda value: isinstance(value, dict) and all(map(_is_number, value.values()))
)


def shown(value: object) -> str:
    """Return a value for a message: whole where it is short, else its beginning or its type.

    >>> shown(-1), shown([1, [2]])
    ('-1', 'a list')
    """
    if isinstance(value, dict | list):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def check_fields(path: Path, value: Mapping[str, Any], fields: Mapping[str, Kind]) -> None:
    """Refuse an object with a field that is missing or of another kind.

    Parameters
    ----------
    path
        The file, for the message.
    value
        What was read of it.
    fields
        Name → kind.

    Raises
    ------
    CacheError
        Naming the first such field.

    Examples
    --------
    >>> check_fields(Path("a.json"), {"rows": 3}, {"rows": COUNT, "name": TEXT.or_none()})
    """
    for name, kind in fields.items():
        if not kind.holds(value.get(name)):
            found = shown(value[name]) if name in value else "none"
            raise CacheError(
                f"{path}: expected {name} to be {kind.what}, got {found}; the file is damaged: restore or delete it",
                str(path),
            )


def read_json(path: Path) -> Json | None:
    """Read a JSON object; None if the file does not exist.

    Raises
    ------
    CacheError
        If it cannot be read (see :func:`unreadable`) or parsed, is larger than 256 MiB or deeper than 64 levels.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_JSON_BYTES:
            raise ValueError(f"{status.st_size} bytes of no plain file, or too many")
        value = parse_json(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CacheError(f"{path}: expected to read it, got {error}; see that it can be read", str(path)) from error
    except ValueError as error:
        raise CacheError(f"{path}: expected a JSON object, got {error}; restore the file", str(path)) from error
    if not isinstance(value, dict):
        raise CacheError(f"{path}: expected a JSON object, got {type(value).__name__}; restore it", str(path))
    return value


def unreadable(error: CacheError) -> bool:
    """Whether a file could not be read now, and may be good."""
    return isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, DaskLogitsError)


def is_there(path: Path) -> bool:
    """Whether a path exists; unlike ``Path.exists``, never False where nobody can tell.

    Raises
    ------
    CacheError
        If the file system does not say, or a link leads to nothing.
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
    """Return the names in a folder, in order; none where there is no such folder.

    Raises
    ------
    CacheError
        If it cannot be read.
    """
    try:
        return sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CacheError(f"{folder}: expected to list it, got {error}; see that it can be read") from error


def expanded(path: str | Path) -> Path:
    """Return a path that a user gave, absolute, its ``~`` resolved.

    Raises
    ------
    ConfigError
        If there is no such home folder.
    """
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(f"{path}: expected a path, got one whose home folder is not known; write it out") from error


def parse_json(text: str) -> Any:
    """Parse JSON that is not deeper than 64 levels.

    Raises
    ------
    ValueError
        If it is, or is no JSON.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("too many levels") from error
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return value
    raise ValueError("too many levels")


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
    with _aside(path) as aside:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(aside, path)
        except FileExistsError:
            # NFS sends a request again whose answer was lost, and meets its own link.
            if aside.stat().st_nlink == 1:
                return False
    sync(path.parent)
    return True


def replace_json(path: Path, value: Mapping[str, Any], *, durable: bool = False) -> None:
    """Write a JSON file over an older one, whole; flushed to the disk only if it is more than a sign of progress."""
    with _aside(path) as aside:
        aside.write_text(json.dumps(value, indent=1))
        if durable:
            sync(aside)
        aside.replace(path)
    if durable:
        sync(path.parent)


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """Give a name beside a path, whose file is gone in the end, unless it was renamed."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield aside
    finally:
        aside.unlink(missing_ok=True)


def no_room(error: BaseException) -> str | None:
    """Return what the system says if there is no room to write, or None.

    >>> no_room(OSError(28, "x")), no_room(OSError(5, "x"))
    ('No space left on device', None)
    """
    number = error.errno if isinstance(error, OSError) else None
    return os.strerror(number) if number in _NO_ROOM else None


def only_readable(error: BaseException) -> bool:
    """Whether a file system can be read but not written: that may be so on one machine alone.

    >>> only_readable(OSError(30, "x")), only_readable(OSError(28, "x"))
    (True, False)
    """
    return isinstance(error, OSError) and error.errno in _READ_ONLY


@contextlib.contextmanager
def room(folder: Path, *, begun: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Say in one message that a folder cannot be written to, or that its disk fails.

    Parameters
    ----------
    folder
        Where files are written.
    begun
        Whether the job had begun before.

    Raises
    ------
    CapacityError
        If there is no room, it is not allowed, or what was written cannot be read.
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
