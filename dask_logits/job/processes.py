"""Start of worker processes: without the caller's main module.

``multiprocessing`` has each new process import the main module of its parent. A script without a main guard would then
start the job again in every worker, and after a script was edited or deleted no worker could be replaced. Workers need
nothing from that module: tasks are functions of this package, and objects of the main module are pickled by value.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
from collections.abc import Iterator
from multiprocessing import spawn
from typing import Any

from dask_logits.errors import ClusterError

# The name that distributed 2026.7.1 gives to worker processes.
WORKER_NAME = "Dask Worker process (from Nanny)"

_lock = threading.Lock()
_users: list[object] = []
_with_main_module = spawn.get_preparation_data


@contextlib.contextmanager
def without_main_module() -> Iterator[None]:
    """Start Dask's worker processes without the caller's main module, restarts included.

    Other processes that the caller starts meanwhile are not affected. distributed 2026.7.1 has no setting for it, and
    the start methods ``spawn`` and ``forkserver`` both prepare a process with the same function.
    """
    user = object()
    with _lock:
        _users.append(user)
        spawn.get_preparation_data = _prepare
    try:
        yield
    finally:
        with _lock:
            _users.remove(user)
            if not _users:
                spawn.get_preparation_data = _with_main_module


def _prepare(name: str) -> dict[str, Any]:
    data: dict[str, Any] = _with_main_module(name)
    if name == WORKER_NAME:
        for key in ("init_main_from_name", "init_main_from_path"):
            data.pop(key, None)
    return data


def check_can_start_processes() -> None:
    """Refuse to start workers inside a process that may not start any.

    Raises
    ------
    ClusterError
        If this is a daemon process.
    """
    process = multiprocessing.current_process()
    if process.daemon:
        raise ClusterError(
            f"generate: cannot start worker processes, because this process ({process.name}) is a daemon process, such "
            "as a worker of multiprocessing.Pool, of Dask or of a DataLoader; call it in the main process, or join a "
            "scheduler with distillation.cluster.scheduler"
        )
