"""Ends a driver that hangs in a system call: an unresponsive file system gives neither an error nor a timeout.

A hung thread uses no processor time, whereas all other work of a driver uses some, if only to read a clock. Therefore
no code has to report progress, and slow work is not mistaken for a hang.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from dask_logits.files.lock import interrupt_main_thread
from dask_logits.job.executor import has_run

logger = logging.getLogger(__name__)

# distributed waits for 10 s without interruption.
LEAST_SECONDS = 60.0
# Number of checks within the allowed time, so that a suspended and resumed process is not blamed for the gap.
_LOOKS = 20
_FRAMES = 3
_LAST_WORDS_SECONDS = 1.0


@contextlib.contextmanager
def watched(stall_seconds: float) -> Iterator[Watch]:
    """Interrupt this thread when it hangs. Yields what explains the interruption.

    If the kernel prevents the interruption of a main thread, the process exits with status 1. A hang of another thread
    is only logged.

    Parameters
    ----------
    stall_seconds
        Maximum time without processor use, at least a minute.

    Raises
    ------
    ClusterError
        With the place where it hung.
    """
    watch = Watch(max(stall_seconds, LEAST_SECONDS))
    thread = threading.Thread(target=watch.run, daemon=True, name="dask_logits-watch")
    thread.start()
    try:
        with watch.explained():
            yield watch
    finally:
        watch.stopped.set()
        thread.join()


class Watch:
    """Monitors the processor time of the thread that created it."""

    def __init__(self, seconds: float) -> None:
        self.diagnosis: str | None = None
        self.stopped = threading.Event()
        self._seconds = seconds
        self._thread = threading.current_thread()

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Raise the diagnosis instead of the interruption, so that it is not taken for Ctrl-C."""
        try:
            yield
        except KeyboardInterrupt:
            if self.diagnosis is None:
                raise
            raise has_run(self.diagnosis) from None

    def run(self) -> None:
        """Monitor until stopped."""
        ident = self._thread.ident
        if ident is None or not hasattr(time, "pthread_getcpuclockid"):
            return
        clock = time.pthread_getcpuclockid(ident)
        used, alike = time.clock_gettime_ns(clock), 0
        while not self.stopped.wait(self._seconds / _LOOKS):
            before, used = used, time.clock_gettime_ns(clock)
            alike = alike + 1 if used == before else 0
            if alike == _LOOKS:
                self._act(ident)
                alike = 0

    def _act(self, ident: int) -> None:
        is_main = self._thread is threading.main_thread()
        if self.diagnosis is not None and is_main:
            _log(logging.CRITICAL, f"{self.diagnosis}; it cannot be interrupted: ending the process")
            time.sleep(_LAST_WORDS_SECONDS)
            os._exit(1)
        self.diagnosis = _diagnosis(ident, self._seconds)
        _log(logging.ERROR, self.diagnosis)
        if is_main:
            interrupt_main_thread()


def _log(level: int, message: str) -> None:
    """Log without waiting, because the hung thread may hold the lock of a log handler with a blocked output."""
    threading.Thread(target=logger.log, args=(level, "%s", message), daemon=True).start()


def _diagnosis(ident: int, seconds: float) -> str:
    top = sys._current_frames().get(ident)
    frames = [] if top is None else list(traceback.walk_stack(top))
    where = " < ".join(
        f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{line})" for frame, line in frames[:_FRAMES]
    )
    paths = (value for frame, _ in frames for value in frame.f_locals.values() if isinstance(value, Path))
    return (
        f"distillation.job.stall_seconds: expected the driver to move within {seconds:g} s, got one that hangs in "
        f"{where}, with {next(paths, 'no file')}; look at the file system it waits for, then run the same command again"
    )
