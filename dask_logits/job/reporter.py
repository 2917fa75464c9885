"""The driver's status record: state and progress, in the run folder and as Dask events.

The record is the first file of a run. It is written before the cluster starts, so that ``status`` and a notebook can
show the calibration. A refused start restores the previous file.

A thread renews the time of the record, because the driver's own thread may be busy for minutes: it hashes a dataset, or
reads a new cache back. The watchdog ends a driver that hangs, whatever its record says.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator

from dask_logits.errors import DaskLogitsError, first_line
from dask_logits.files.atomic import replace_json
from dask_logits.job.executor import Executor
from dask_logits.job.notify import notify
from dask_logits.job.prepare import Job
from dask_logits.job.progress import JobProgress
from dask_logits.observe.report import leave_report
from dask_logits.run.folder import RUNS_TOPIC
from dask_logits.run.records import DriverStatus

_REPORT_SECONDS = 10.0
_RENEW_SECONDS = 10.0
# The record is written with each partition, and a scheduler keeps many of them. ``failures/`` has every failure whole.
_MOST_FAILED = 20
_MOST_CHARACTERS = 200


class Reporter:
    """Writes the status record of one driver.

    Parameters
    ----------
    job
        The job.
    """

    def __init__(self, job: Job) -> None:
        self.executor: Executor | None = None
        self.progress: JobProgress | None = None
        # Partition → reason, for permanent failures.
        self.failed: dict[int, str] = {}
        # Partitions that workers were given.
        self.running: set[int] = set()
        self._run = str(job.run.path)
        self._path = job.run.status_path(job.share)
        self._since = time.time()
        self._state = "starting"
        # State → when it was entered.
        self._entered: dict[str, float] = {}
        self._step: str | None = None
        self._reason: str | None = None
        self._at = 0.0
        # The last record. It is written by one thread at a time.
        self._status: DriverStatus | None = None
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def renewed(self) -> Iterator[None]:
        """Renew the time of the record in a thread. At the end, its last write has ended."""
        ended = threading.Event()

        def renew() -> None:
            while not ended.wait(_RENEW_SECONDS):
                with self._lock:
                    if self._status is not None and not ended.is_set():
                        self._write(self._status.model_copy(update={"at": time.time()}))

        threading.Thread(target=renew, daemon=True, name="dask_logits-record").start()
        try:
            yield
        finally:
            ended.set()
            with self._lock:
                pass

    def tick(self) -> None:
        """Write the record, unless it was written a moment ago."""
        if time.monotonic() - self._at >= _REPORT_SECONDS:
            self.report()

    def report(self, state: str | None = None, *, step: str | None = None, reason: str | None = None) -> None:
        """Write the record.

        Parameters
        ----------
        state
            ``starting``, ``calibrating``, ``running``, ``consolidating``, ``stopped``, ``failed`` or ``done``. None:
            unchanged.
        step
            Step of the calibration.
        reason
            Reason why the driver failed.
        """
        self._at = time.monotonic()
        if state is not None:
            self._state, self._step, self._reason = state, step, reason
            self._entered.setdefault(state, time.time())
        status = DriverStatus(
            dashboard=self.executor.dashboard if self.executor else None,
            **(self.progress.facts() if self.progress else {"tokens_per_second": 0.0, "seconds_left": None}),
            since=self._since,
            at=time.time(),
            state=self._state,
            entered=self._entered,
            step=self._step,
            reason=self._reason,
            failed={
                str(index): text.partition("\n")[0][:_MOST_CHARACTERS]
                for index, text in itertools.islice(self.failed.items(), _MOST_FAILED)
            },
            failures=len(self.failed),
            running=tuple(sorted(self.running)) if self._state == "running" else (),
            left_out=self.executor.roster.named() if self.executor else {},
        )
        with self._lock:
            self._write(status)
        if self.executor is not None:
            self.executor.announce(RUNS_TOPIC, {"run": self._run, **status.to_json()})

    def _write(self, status: DriverStatus) -> None:
        self._status = status
        # A full disk is reported where partitions are written.
        with contextlib.suppress(OSError):
            replace_json(self._path, status.to_json())


@contextlib.contextmanager
def reported(job: Job, is_lost: Callable[[], bool]) -> Iterator[Reporter]:
    """Report a driver from its start to its end, then leave a page and tell of it.

    The earlier record is restored if the driver is refused.

    Parameters
    ----------
    job
        The job.
    is_lost
        Returns whether another driver has taken the share over. The record is then that driver's.
    """
    path = job.run.status_path(job.share)
    before = None
    with contextlib.suppress(OSError):
        before = path.read_bytes()
    reporter = Reporter(job)
    reporter.report("starting")
    try:
        with reporter.renewed():
            yield reporter
    except BaseException as error:
        if is_lost():
            raise
        is_begun = job.run.manifest_path.exists()
        if _leaves_no_trace(error, is_begun=is_begun):
            # The error to show is the one that refused the start.
            with contextlib.suppress(OSError):
                if before is None:
                    path.unlink(missing_ok=True)
                else:
                    path.write_bytes(before)
        elif isinstance(error, KeyboardInterrupt):
            reporter.report("stopped")
        else:
            # A list of partitions may follow.
            reason = first_line(error).removesuffix(":")
            reporter.report("failed", reason=reason)
            # A start takes a report without a manifest for another program's.
            if is_begun:
                leave_report(job.run)
            notify(job.config.job, job.run.path, "failed", reason)
        raise
    reporter.report("done")
    leave_report(job.run)
    notify(job.config.job, job.run.path, "done")


def _leaves_no_trace(error: BaseException, *, is_begun: bool) -> bool:
    """Whether an error refuses the start, or ends it before the manifest without a failure of the job."""
    if isinstance(error, DaskLogitsError):
        return not error.ran
    # A disk that cannot be written before the manifest is a refusal (:func:`dask_logits.files.atomic.room`).
    return not is_begun and isinstance(error, KeyboardInterrupt | OSError)
