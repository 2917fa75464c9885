"""Run one task on one worker, and on another if the first is lost, stops responding or fails.

A worker without a heartbeat for 30 s is not waited for: the task starts again on another worker. The number of attempts
is limited by ``distillation.job.retries``.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import dask
from distributed import Client, Future, KilledWorker

from dask_logits.config.groups import JobConfig
from dask_logits.errors import CapacityError, ClusterError, DaskLogitsError, TeacherError
from dask_logits.files.atomic import no_room
from dask_logits.job.executor import has_run, too_slow, unreadable_there
from dask_logits.job.remote import call_on_worker
from dask_logits.job.retry_policy import classify
from dask_logits.job.roster import Roster
from dask_logits.job.scheduler import (
    SchedulerLostError,
    erred_on,
    exception_of,
    result_of,
    run_on_scheduler,
    wait_for_scheduler,
)

logger = logging.getLogger(__name__)

_STEPS_TOPIC = "dask_logits.steps."
_POLL_SECONDS = 0.1
_LOOK_SECONDS = 1.0
_SILENT_SECONDS = 30.0
# Number of workers that end during a task before the likely cause is reported.
_TWICE = 2
# Errors that may be specific to a worker, beside those of a device.
_OWN = (OSError, ImportError, TeacherError, ClusterError, CapacityError)


def run_one(
    client: Client,
    function: Callable[[Any, Callable[[str], None]], Any],
    argument: Any,
    job: JobConfig,
    roster: Roster,
    *,
    on_step: Callable[[str], None] = lambda step: None,
    on_turn: Callable[[], None] = lambda: None,
) -> Any:
    """Run one function on one worker and wait for it in bounded time.

    Parameters
    ----------
    client
        A connected client.
    function
        Takes the argument, and a callback for descriptions of its steps. A repeated step is a sign of life.
    argument
        Argument of the function.
    job
        Settings. ``retries`` and ``stall_seconds`` are used.
    roster
        Workers that get no work.
    on_step
        Called in this thread with each step.
    on_turn
        Called in this thread several times a second.

    Raises
    ------
    ClusterError
        If the scheduler is lost, workers are lost repeatedly, or a step takes longer than ``stall_seconds``.
    DaskLogitsError
        The function's error, if it failed on each worker that was tried.
    """
    call = _Call(client, function, argument, job, roster)

    def turn() -> None:
        while not call.steps.empty():
            call.alive = time.monotonic()
            on_step(call.steps.get())
        on_turn()

    try:
        return call.run(turn)
    except SchedulerLostError as error:
        error.ran = True
        raise
    finally:
        call.drop()
        if client.status == "running":
            # It raises if no attempt was submitted, so that nobody subscribed.
            with contextlib.suppress(ValueError):
                client.unsubscribe_topic(call.topic)


@dataclass
class _Call:
    client: Client
    function: Callable[[Any, Callable[[str], None]], Any]
    argument: Any
    job: JobConfig
    roster: Roster
    topic: str = field(default_factory=lambda: _STEPS_TOPIC + uuid.uuid4().hex[:8])
    steps: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)
    # Time of the start, then of the last step.
    alive: float = field(default_factory=time.monotonic)
    # The current attempt, the workers that may have it (None: all), the one that has it, and since when.
    _future: Future | None = None
    _workers: Collection[str] | None = None
    _holder: str | None = None
    _since: float = 0.0
    # Workers that do not get the task again.
    _tried: set[str] = field(default_factory=set)
    # Workers that ended during the task, with the time in seconds.
    _ended: list[tuple[str, float]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.function.__name__

    def run(self, on_turn: Callable[[], None]) -> Any:
        """Run the task to its end."""
        looked = 0.0
        while True:
            on_turn()
            try:
                future = self._future or self._submit()
                if future.status == "finished":
                    return result_of(self.client, future, self.job.stall_seconds)
                if future.status in ("cancelled", "lost"):
                    self.drop()
                elif future.status == "error":
                    self._retry(exception_of(future), erred_on(self.client, future))
                elif time.monotonic() - looked > _LOOK_SECONDS:
                    looked = time.monotonic()
                    self._watch(future)
            except SchedulerLostError:
                for _ in wait_for_scheduler(self.client, self.job.stall_seconds):
                    on_turn()
            if time.monotonic() - self.alive > self.job.stall_seconds:
                raise too_slow(self.name, self.job.stall_seconds)
            time.sleep(_POLL_SECONDS)

    def drop(self) -> None:
        """Give up the current attempt, so that the next begins."""
        if self._future is not None:
            self._future.release()
        self._future = self._workers = self._holder = None

    def _look(self, key: str | None = None) -> tuple[Mapping[str, float], str | None]:
        """Return the seconds since each worker's last heartbeat, and the worker with a task."""

        def look(key: str | None, dask_scheduler: Any) -> tuple[dict[str, float], str | None]:
            from time import time

            state = dask_scheduler.tasks.get(key)
            silent = {address: time() - worker.last_seen for address, worker in dask_scheduler.workers.items()}
            return silent, state.processing_on.address if state and state.processing_on else None

        found: tuple[dict[str, float], str | None] = run_on_scheduler(self.client, look, key)
        return found

    def _others(self, silent: Mapping[str, float]) -> set[str]:
        """Return healthy workers on which it was not tried."""
        present = {worker for worker, seconds in silent.items() if seconds < _SILENT_SECONDS}
        return self.roster.usable(present) - self._tried

    def _submit(self) -> Future:
        """Submit it to an untried worker, or to any worker if there are no restrictions."""
        silent, _ = self._look()
        # A scheduler that was restarted knows no subscription. The attempt is then cancelled, and submitted again here.
        self.client.subscribe_topic(self.topic, lambda event: self.steps.put(event[1]))
        chosen = self._others(silent)
        self._workers = None if chosen == silent.keys() or not chosen else sorted(chosen)
        key = f"{self.name}-{uuid.uuid4().hex[:8]}"
        delayed = dask.delayed(call_on_worker, pure=False)(self.function, self.argument, self.topic, dask_key_name=key)
        self._future = self.client.compute(delayed, workers=self._workers)
        return self._future

    def _retry(self, error: BaseException, worker: str | None) -> None:
        """Start it again on another worker if the error may be specific to this worker, else raise the error."""
        if worker is not None:
            self._tried.add(worker)
        own = classify(error) == "device" or isinstance(error, _OWN)
        if not own or len(self._tried) > self.job.retries or not self._others(self._look()[0]):
            raise self._final(error) from error
        where = "a worker" if worker is None else f"worker {self.roster.name(worker)}"
        logger.warning("the %s task failed on %s: %s; again on another worker", self.name, where, error)
        self.drop()

    def _final(self, error: BaseException) -> BaseException:
        if isinstance(error, KilledWorker):
            return has_run(
                f"distillation.cluster: expected a result of the {self.name} task, got a worker that died "
                f"{error.allowed_failures + 1} times; it may be out of memory: lower batch_tokens, or use fewer "
                f"workers. The last one was {self.roster.name(error.last_worker.address)}"
            )
        if isinstance(error, OSError) and not isinstance(error, DaskLogitsError) and no_room(error) is None:
            return unreadable_there(self.name, error, ", ".join(map(self.roster.name, sorted(self._tried))))
        return error

    def _watch(self, future: Future) -> None:
        """Detect a worker that ended or stopped responding."""
        silent, holder = self._look(future.key)
        if self._holder is not None and self._holder not in silent:
            self._note_end(self._holder)
        if holder is not None and holder != self._holder:
            self._holder, self._since = holder, time.monotonic()
        if self._workers is not None and silent.keys().isdisjoint(self._workers):
            # The scheduler would keep it waiting for lost workers.
            self.drop()
        elif self._holder is not None and silent.get(self._holder, 0.0) > _SILENT_SECONDS:
            self._tried.add(self._holder)
            if self._others(silent):
                logger.warning(
                    "worker %s has not been heard of for %.0f s; the %s task starts again on another one",
                    self.roster.name(self._holder),
                    silent[self._holder],
                    self.name,
                )
                self.drop()

    def _note_end(self, worker: str) -> None:
        self._ended.append((worker, time.monotonic() - self._since))
        self._holder = None
        if len(self._ended) < _TWICE:
            return
        ended = ", ".join(f"{self.roster.name(worker)} after {seconds:.0f} s" for worker, seconds in self._ended)
        message = (
            f"distillation.cluster: expected workers that live until the {self.name} task ends, got "
            f"{len(self._ended)} that ended during it: {ended}. Start workers with a longer --lifetime (or none): "
            "loading the teacher and calibrating must fit into it. If they have none, see their logs: they may be out "
            "of memory"
        )
        if len(self._ended) > self.job.retries:
            raise has_run(message)
        logger.warning("%s", message)
