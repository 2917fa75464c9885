"""One writer at a time: a file lock released when the process exits, plus a lease visible to other hosts.

On one machine a file-system lock (``flock``) is sufficient, because it is released however the process ends. It may not
work between machines, so the holder also writes its identity and increments a counter every few seconds. A lease that
another machine left uncleared is watched. If it counts, its holder is alive. Otherwise it is taken over only where
allowed. No clocks are compared.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psutil

from dask_logits.errors import RunConflictError
from dask_logits.files.atomic import Json

logger = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
# A lease whose counter stands still for this many beats is stale.
STALE_BEATS = 4
_POLL_SECONDS = 0.2
# Time limit for waiting on a holder on this machine whose counter stands still.
_FROZEN_SECONDS = 300.0
# A write of this size is atomic for a reader.
_BYTES = 256


@contextlib.contextmanager
def lease(path: Path, *, wait: bool = False, takeover: bool = False) -> Iterator[None]:
    """Hold a lease, released when the process ends in any way.

    If another machine takes it over because this process was frozen, the main thread is interrupted.

    Parameters
    ----------
    path
        The lock file. It is not deleted, and is empty while nobody holds the lease.
    wait
        Wait for another holder instead of refusing.
    takeover
        Take over a lease that a process on another machine left uncleared and no longer renews.

    Raises
    ------
    RunConflictError
        If another process holds the lease, or may hold it.
    """
    with contextlib.ExitStack() as opened:
        while True:
            file = opened.enter_context(_opened(path))
            locked = _lock(file, path, wait)
            left = _read(path)
            if left is not None and (left["host"] != socket.gethostname() or not locked):
                _check_stale(path, left, wait, takeover or wait)
            if _is_there(file, path):
                break
        mine = {"host": socket.gethostname(), "process": os.getpid(), "token": uuid.uuid4().hex, "beat": 0}
        _write(path, mine)
        stop = threading.Event()
        beating = threading.Thread(target=_beat, args=(path, mine, stop), daemon=True, name="dask_logits-lease")
        beating.start()
        try:
            yield
        finally:
            stop.set()
            beating.join()
            if (_read(path) or {}).get("token") == mine["token"]:
                os.truncate(path, 0)


def is_abandoned(path: Path) -> bool:
    """Whether a lease is free according to its file: it was released, or its process has ended.

    Only reads the file. A holder on another machine is assumed to be alive.
    """
    try:
        is_released = path.stat().st_size == 0
    except OSError:
        return False
    holder = _read(path)
    if holder is None:
        return is_released
    return bool(holder["host"] == socket.gethostname() and not psutil.pid_exists(int(holder["process"])))


def _opened(path: Path) -> IO[bytes]:
    """Open a lock file for locking. Links are refused, because the file will be overwritten."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.fdopen(os.open(path, flags, 0o666), "a+b")
    except OSError as error:
        if not path.is_symlink():
            raise
        raise RunConflictError(f"{path}: expected a lock file, got a link to another; delete it") from error


def _is_there(file: IO[bytes], path: Path) -> bool:
    """Whether a file still has its name. A refused start deletes its lock file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: IO[bytes], path: Path, wait: bool) -> bool:
    """Lock a file. Return False if the file system does not support locks."""
    seen: Json | None = None
    since = 0.0
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder, now = _read(path), time.monotonic()
            if not wait:
                raise _held(path, holder) from error
            if not since:
                logger.info("waiting for %s, which has %s", _who(holder), path)
            if not since or holder != seen:
                seen, since = holder, now
            elif now - since > _FROZEN_SECONDS:
                raise RunConflictError(
                    f"{path}: expected its holder to go on, but {_who(holder)} has given no sign of life for "
                    f"{_FROZEN_SECONDS:.0f} s; wake it up or end it, then run the same command again"
                ) from error
        except OSError as error:
            logger.warning("%s cannot be locked (%s); its lease alone keeps others out", path, error)
            return False
        else:
            return True
        time.sleep(_POLL_SECONDS)


def _check_stale(path: Path, left: Json, wait: bool, takeover: bool) -> None:
    """Watch a lease that another process left. Return when it may be taken over."""
    logger.info("%s is %s's; watching it", path, _who(left))
    while True:
        time.sleep(STALE_BEATS * BEAT_SECONDS)
        now = _read(path)
        if now is None and not (path.exists() and path.stat().st_size):
            return
        if now == left:
            break
        left = now or left
        if not wait:
            raise _held(path, left)
    if not takeover:
        raise RunConflictError(
            f"{path.parent}: expected to be the only driver of {_what(path)}, but {_who(left)} did not clear its lease "
            "and gives no sign of life; make sure that it is gone, then set distillation.job.takeover=true (commands: "
            "--takeover)",
            {"lease": (_who(left), socket.gethostname())},
        )
    logger.warning("taking over the lease of %s, which gives no sign of life", _who(left))


def _beat(path: Path, mine: Json, stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        found = _read(path)
        if found is not None and found["token"] != mine["token"]:
            logger.error("%s was taken over by %s: stopping", path, _who(found))
            interrupt_main_thread()
            return
        mine["beat"] += 1
        # A disk that is temporarily full is no reason to stop.
        with contextlib.suppress(OSError):
            _write(path, mine)


def interrupt_main_thread() -> None:
    """Interrupt like Ctrl-C, also during a system call. A process started with SIGINT ignored is ended instead."""
    heeded = callable(signal.getsignal(signal.SIGINT))
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT if heeded else signal.SIGTERM)


def _write(path: Path, holder: Json) -> None:
    handle = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(handle, json.dumps(holder).encode().ljust(_BYTES), 0)
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(path: Path) -> Json | None:
    """Return the holder of a lease, or None if it is free or being written."""
    try:
        holder = json.loads(path.read_bytes() or b"null")
    except (OSError, ValueError):
        return None
    known = isinstance(holder, dict) and holder.keys() >= {"host", "process", "token", "beat"}
    return holder if known else None


def _held(path: Path, holder: Json | None) -> RunConflictError:
    return RunConflictError(
        f"{path.parent}: expected to be the only driver of {_what(path)}, but {_who(holder)} is at work; wait for it, "
        "or stop it"
    )


def _what(path: Path) -> str:
    """Describe the purpose of a lock file.

    >>> _what(Path(".driver.lock")), _what(Path(".driver-0-of-2.lock")), _what(Path(".consolidate.lock"))
    ('this run', 'share 0-of-2 of this run', 'its consolidate step')
    """
    name = path.name.strip(".").removesuffix(".lock")
    if name.startswith("driver"):
        share = name.removeprefix("driver").strip("-")
        return f"share {share} of this run" if share else "this run"
    return f"its {name} step"


def _who(holder: Json | None) -> str:
    return "another process" if holder is None else f"process {holder['process']} on {holder['host']}"
