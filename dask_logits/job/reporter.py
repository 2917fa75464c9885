"""The driver's status record: what it does and how far it is, in the run folder and as Dask events.

The record is the first file of a run. It is written before the cluster starts, so that ``status`` and a notebook can
show the calibration. A start that is refused leaves the file as it was.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from dask_logits.errors import ClusterError, DaskLogitsError, first_line
from dask_logits.files.atomic import replace_json
from dask_logits.job.cluster import Cluster
from dask_logits.job.prepare import Job
from dask_logits.job.progress import JobProgress
from dask_logits.job.scheduler import call_scheduler
from dask_logits.run.folder import RUNS_TOPIC

_REPORT_SECONDS = 10.0
_EVENT_SECONDS = 5


class Reporter:
    """Writes the status record of one driver.

    Parameters
    ----------
    job
        Its job.
    """

    def __init__(self, job: Job) -> None:
        self.cluster: Cluster | None = None
        self.progress: JobProgress | None = None
        # Partition → reason, of those that failed for good.
        self.failed: dict[int, str] = {}
        self._run = str(job.run.path)
        self._path = job.run.status_path(job.share)
        self._since = time.time()
        self._state = "starting"
        self._step: str | None = None
        self._reason: str | None = None
        self._at = 0.0

    def tick(self) -> None:
        """Write the record, unless that was done a moment ago."""
        if time.monotonic() - self._at >= _REPORT_SECONDS:
            self.report()

    def report(self, state: str | None = None, *, step: str | None = None, reason: str | None = None) -> None:
        """Write the record.

        Parameters
        ----------
        state
            ``starting``, ``calibrating``, ``running``, ``consolidating``, ``stopped``, ``failed`` or ``done``; None: as
            before.
        step
            Step of the calibration.
        reason
            Why the driver failed.
        """
        self._at = time.monotonic()
        if state is not None:
            self._state, self._step, self._reason = state, step, reason
        facts = {
            "dashboard": self.cluster.dashboard if self.cluster else None,
            **(self.progress.facts() if self.progress else {"tokens_per_second": 0.0, "seconds_left": None}),
            "since": self._since,
            "at": time.time(),
            "state": self._state,
            "step": self._step,
            "reason": self._reason,
            "failed": {str(index): text for index, text in self.failed.items()},
            "left_out": self.cluster.roster.named() if self.cluster else {},
        }
        # A full disk is reported where partitions are written.
        with contextlib.suppress(OSError):
            replace_json(self._path, facts)
        if self.cluster is not None and self.cluster.client.status == "running":
            # For monitors that know the scheduler and not the folder. The window notices a lost scheduler.
            client, message = self.cluster.client, {"run": self._run, **facts}
            with contextlib.suppress(ClusterError):
                call_scheduler(
                    client, lambda: client.scheduler.log_event(topic=RUNS_TOPIC, msg=message), _EVENT_SECONDS
                )


@contextlib.contextmanager
def reported(job: Job) -> Iterator[Reporter]:
    """Report a driver from its start to its end; restore the earlier record if the start is refused."""
    path = job.run.status_path(job.share)
    before = None
    with contextlib.suppress(OSError):
        before = path.read_bytes()
    reporter = Reporter(job)
    reporter.report("starting")
    try:
        yield reporter
    except BaseException as error:
        refused = isinstance(error, DaskLogitsError) and not error.ran
        if not refused and job.run.manifest_path.exists():
            if isinstance(error, KeyboardInterrupt):
                reporter.report("stopped")
            else:
                reporter.report("failed", reason=first_line(error))
        else:
            # Whatever refused the start is the error to show.
            with contextlib.suppress(OSError):
                if before is None:
                    path.unlink(missing_ok=True)
                else:
                    path.write_bytes(before)
        raise
    reporter.report("done")
