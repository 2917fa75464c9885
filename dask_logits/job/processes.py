"""Start worker processes without the caller's main module.

``multiprocessing`` makes each new process import the main module of its parent. A script without a main guard would
then start the job again in every worker, and after the script was edited or deleted no worker could be replaced.
Workers do not need that module: tasks are functions of this package, and its objects are pickled by value.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker, spawn
from typing import Any

from distributed import Nanny
from distributed.utils import silence_logging_cmgr

from dask_logits.errors import ClusterError

# Name of worker processes in distributed 2026.7.1.
WORKER_NAME = "Dask Worker process (from Nanny)"
# Terminals and launchers send these to workers, too. Only the driver acts on them, and ends its workers.
_DRIVER_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

# By this time, workers have started or failed to start.
_START_SECONDS = 60.0

_lock = threading.Lock()
_users: list[object] = []
_with_main_module = spawn.get_preparation_data


@contextlib.contextmanager
def without_main_module() -> Iterator[None]:
    """Start Dask's worker processes without the caller's main module, including restarts.

    Other processes started by the caller in the meantime are not affected. distributed 2026.7.1 has no setting for
    this, and the start methods ``spawn`` and ``forkserver`` both prepare a process with the same function.
    """
    _start_resource_tracker()
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
        if threading.current_thread() is not threading.main_thread():
            # A thread that distributed creates for this process alone. The process inherits its mask.
            signal.pthread_sigmask(signal.SIG_BLOCK, _DRIVER_SIGNALS)
        for key in ("init_main_from_name", "init_main_from_path"):
            data.pop(key, None)
    return data


def _start_resource_tracker() -> None:
    """Start the semaphore tracker process of ``multiprocessing`` such that a closed terminal does not end it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _DRIVER_SIGNALS)
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_cluster(kind: Any, settings: dict[str, Any]) -> Any:
    """Start a local cluster. If the start is interrupted, the cluster is closed in the background.

    Parameters
    ----------
    kind
        ``LocalCluster`` or a subclass.
    settings
        Arguments of its constructor.
    """
    # Created separately, because the object is needed if its constructor is interrupted.
    cluster = kind.__new__(kind)
    try:
        cluster.__init__(**settings)
    except KeyboardInterrupt:
        # distributed 2026.7.1 cannot close it at process exit while a worker starts.
        cluster.shutdown_on_close = False
        threading.Thread(target=_close_later, args=(cluster,), daemon=True, name="dask_logits-close").start()
        raise
    return cluster


def _close_later(cluster: Any) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(AssertionError, AttributeError, OSError, RuntimeError):
            # It asserts that no worker is starting, and its event loop may not run yet.
            close_cluster(cluster, _START_SECONDS)
            return
        time.sleep(0.5)


def close_cluster(cluster: Any, seconds: float) -> None:
    """Kill the workers of a local cluster and close it.

    A worker of distributed 2026.7.1 that is asked to stop hangs at interpreter exit until it is killed 4 s later.
    Workers hold no data needed by a job: the next start scores an unfinished partition again.

    Parameters
    ----------
    cluster
        A ``LocalCluster`` or ``LocalCUDACluster``.
    seconds
        Time limit for closing the rest.

    Raises
    ------
    TimeoutError
        If the limit is exceeded. Its processes end with this one.
    """

    async def kill_workers() -> None:
        for nanny in cluster.workers.values():
            if isinstance(nanny, Nanny):
                # Otherwise it would start another worker.
                nanny.close_gracefully(reason="the job has ended")
                if nanny.pid is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(nanny.pid, signal.SIGKILL)

    with silence_logging_cmgr(logging.CRITICAL):
        cluster.sync(kill_workers, callback_timeout=seconds)
        cluster.close(timeout=seconds)


def check_can_start_processes() -> None:
    """Refuse to start workers inside a process that cannot start any.

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
