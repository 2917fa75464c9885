"""One writer at a time: a lease in a file, for all machines that share the file system. Slots: few at a time on one.

``filelock.SoftFileLease`` writes its holder into the lock file, renews the file's time and deletes the file in the end.
A lease is free if its process on this machine has ended, or if nothing renews it while this process watches. No clocks
are compared. The holder is recorded with host name, PID namespace and start time, so a process with the same id on
another machine, or in a container with the same host name, is not mistaken for it.

A holder that was suspended may work at the same time as its successor until it notices. So everything that a lease
protects must also be committed atomically.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, LeaseCompromise, LeaseSettingsMismatch, OwnerRecord, SoftFileLease, Timeout

# Private in filelock 4.3, which offers no other way to ask whether a holder has ended without taking its lease. They
# came with tox-dev/filelock#639.
from filelock._identity import host_name, owner_is_stale

from dask_logits.errors import RunConflictError

logger = logging.getLogger(__name__)

LEASE_SECONDS = 30.0
BEAT_SECONDS = 5.0
_POLL_SECONDS = 0.2


@contextlib.contextmanager
def lease(path: Path, *, wait: bool = False) -> Iterator[Callable[[], bool]]:
    """Hold a lease. Others can take it when it is released, when its process ends, or when it is not renewed.

    Yields a function that returns whether it is lost.

    If another process takes it because this one was suspended or could not renew it, the main thread is interrupted.

    Parameters
    ----------
    path
        The lock file. It exists while the lease is held. A link in its place is replaced, not followed.
    wait
        Wait for another holder instead of refusing.

    Raises
    ------
    RunConflictError
        If another process holds the lease, or has taken it.
    OSError
        If the lock file cannot be written.
    """
    is_lost, is_released = threading.Event(), threading.Event()

    def on_loss(loss: LeaseCompromise) -> None:
        # A disk that is temporarily full is no reason to stop. But filelock 4.3 stops renewing here.
        if loss.reason == "refresh-failed":
            logger.warning("%s cannot be renewed (%s), so another driver may start", path, loss.error)
            if _renew(path, loss.token, is_released):
                return
        logger.error("%s was deleted or taken over: stopping", path)
        is_lost.set()
        interrupt_main_thread()

    lock = SoftFileLease(path, lease_duration=LEASE_SECONDS, heartbeat_interval=BEAT_SECONDS, on_compromise=on_loss)
    _acquire(lock, path, wait)
    try:
        yield is_lost.is_set
    except KeyboardInterrupt:
        if not is_lost.is_set():
            raise
        error = _conflict(
            path,
            f"this process was suspended, or its lock file deleted or out of reach, and {_who(lock.owner)} may be at "
            "work; wait for it, then run the same command again",
        )
        error.ran = True
        raise error from None
    finally:
        is_released.set()
        lock.release()


@contextlib.contextmanager
def slot(folder: Path, count: int, on_wait: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Hold one of a few slots of this machine. A slot is free when its process ends, however that happens.

    Yields a function for the holder to call when it has made progress.

    Without a folder that belongs to this user, and on a file system without locks, there is no limit.

    Parameters
    ----------
    folder
        Folder on a disk of this machine, for the lock files. It is made if it does not exist.
    count
        Number of slots.
    on_wait
        Called when all are taken, whenever a holder has made progress meanwhile, and when the waiting ends.
    """
    held: FileLock | None = None
    locks = _slots(folder, count)
    seen: list[int] | None = None
    while locks and held is None:
        try:
            held = next(filter(_take, locks), None)
        except (OSError, NotImplementedError):
            # A file system without locks.
            break
        if held is None:
            beats = [_changed(_beat_path(lock)) for lock in locks]
            if beats != seen:
                seen = beats
                on_wait()
            time.sleep(_POLL_SECONDS)

    def progress() -> None:
        if held is not None:
            with contextlib.suppress(OSError):
                _beat_path(held).touch()

    try:
        progress()
        if seen is not None:
            on_wait()
        yield progress
    finally:
        if held is not None:
            held.release()


def _slots(folder: Path, count: int) -> list[FileLock]:
    """Return the locks in a folder of this user, or none if it cannot be made or is another user's."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        is_ours = folder.lstat().st_uid == os.getuid()
    except OSError:
        return []
    # The kernel releases these locks, unlike a lease, with the last descriptor of the file.
    return [FileLock(folder / f"slot-{number}.lock") for number in range(count)] if is_ours else []


def _beat_path(lock: FileLock) -> Path:
    """Return the file whose time is that of the last progress. Whoever tries the lock file changes its time."""
    return Path(lock.lock_file).with_suffix(".beat")


def _changed(path: Path) -> int:
    """Return when a file was changed, in nanoseconds, 0 if it cannot be told."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _take(lock: FileLock) -> bool:
    with contextlib.suppress(Timeout):
        lock.acquire(timeout=0)
    return lock.is_locked


def is_abandoned(path: Path) -> bool:
    """Whether a lease is free according to its file: the file is missing, or its process on this machine has ended.

    Only reads the file. A holder on another machine is assumed to be alive.
    """
    return _has_ended(SoftFileLease(path).owner) or not os.path.lexists(path)


def interrupt_main_thread() -> None:
    """Interrupt like Ctrl-C, also during a system call. A process started with SIGINT ignored is ended instead."""
    heeded = callable(signal.getsignal(signal.SIGINT))
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT if heeded else signal.SIGTERM)


def _acquire(lock: SoftFileLease, path: Path, wait: bool) -> None:
    """Acquire a lease, after watching a holder that may have ended."""
    seen: tuple[object, ...] | None = None
    since = now = 0.0
    while True:
        with contextlib.suppress(Timeout, LeaseSettingsMismatch):
            lock.acquire(timeout=0)
            break
        holder, now = lock.owner, time.monotonic()
        try:
            # Each renewal and each new holder changes this.
            state = (holder, path.lstat().st_ino, path.lstat().st_mtime_ns)
        except FileNotFoundError:
            continue
        if _has_ended(holder) or (state == seen and now - since >= LEASE_SECONDS):
            # On a file system that cannot exchange two files, such as NFS, filelock 4.3 does not take over. Another
            # process may have done so meanwhile.
            if lock.owner == holder:
                path.unlink(missing_ok=True)
            continue
        if state != seen:
            is_here = holder is not None and holder.hostname == host_name()
            if not wait and (is_here or seen is not None):
                # Elsewhere it was seen to renew its lease.
                doing = "at work, or suspended" if is_here else "at work"
                raise _conflict(path, f"{_who(holder)} is {doing}; wait for it, or stop it")
            if seen is None:
                logger.info("%s is held by %s; watching whether it is renewed", path, _who(holder))
            seen, since = state, now
        time.sleep(_POLL_SECONDS)
    if seen is not None and now - since > LEASE_SECONDS / 2:
        logger.warning("took over %s, which %s did not renew for %.0f s", path, _who(holder), LEASE_SECONDS)


def _renew(path: Path, token: str, is_released: threading.Event) -> bool:
    """Renew a lease until it is released, through errors of the disk. Return False if it is lost."""
    n_missed = 0
    # An exchange of two files by a start that backs out may hide it for a moment.
    while n_missed < 2:
        if is_released.wait(BEAT_SECONDS):
            return True
        try:
            path.lstat()
            holder = SoftFileLease(path).owner
            if holder is None:
                # It cannot be read now.
                continue
            n_missed = 0 if holder.token == token else n_missed + 1
            if not n_missed:
                os.utime(path)
        except FileNotFoundError:
            n_missed += 1
        except OSError:
            continue
    return is_released.is_set()


def _has_ended(holder: OwnerRecord | None) -> bool:
    """Whether a holder was a process on this machine that has ended."""
    return holder is not None and owner_is_stale(holder.pid, holder.hostname, holder.start)


def _conflict(path: Path, problem: str) -> RunConflictError:
    return RunConflictError(f"{path.parent}: expected to be the only driver of {_what(path)}, but {problem}")


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


def _who(holder: OwnerRecord | None) -> str:
    # filelock appends the PID namespace of a container to its host name.
    return "another process" if holder is None else f"process {holder.pid} on {holder.hostname.partition('?')[0]}"
