"""Run one task on one worker, and on another if the first is lost, stops responding or fails.

A worker without a heartbeat for 30 s is not waited for: the task also starts on another worker, and the first result
counts. The number of attempts is limited by ``distillation.job.retries``.
"""

from __future__ import annotations

import logging
import queue
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
    *,
    roster: Roster | None = None,
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
        Workers that get no work. None: all get work.
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
    task = _Task(client, function, argument, job, Roster() if roster is None else roster)
    task.subscribe()

    def turn() -> None:
        while not task.steps.empty():
            task.alive = time.monotonic()
            on_step(task.steps.get())
        on_turn()

    try:
        return task.run(turn)
    except SchedulerLostError as error:
        error.ran = True
        raise
    finally:
        for attempt in task.attempts:
            attempt.future.release()
        if client.status == "running":
            client.unsubscribe_topic(task.topic)


class _View(NamedTuple):
    """The scheduler's view: seconds since each worker's last heartbeat, and key → worker with the task."""

    silent: Mapping[str, float]
    holders: Mapping[str, str]


@dataclass
class _Attempt:
    future: Future
    workers: frozenset[str] | None
    holder: str | None = None
    since: float = field(default_factory=time.monotonic)
    replaced: bool = False


@dataclass
class _Task:
    client: Client
    function: Callable[[Any, Callable[[str], None]], Any]
    argument: Any
    job: JobConfig
    roster: Roster
    topic: str = field(default_factory=lambda: _STEPS_TOPIC + uuid.uuid4().hex[:8])
    attempts: list[_Attempt] = field(default_factory=list)
    steps: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)
    # Time of the start, then of the last step.
    alive: float = field(default_factory=time.monotonic)
    # Workers that do not get the task again.
    _tried: set[str] = field(default_factory=set)
    # Workers that ended during the task, with the time in seconds.
    _ended: list[tuple[str, float]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.function.__name__

    def subscribe(self) -> None:
        """Receive the steps of all attempts."""
        self.client.subscribe_topic(self.topic, lambda event: self.steps.put(event[1]))

    def run(self, on_turn: Callable[[], None]) -> Any:
        """Run the task to its end."""
        looked = 0.0
        while True:
            on_turn()
            try:
                if not self.attempts:
                    self._submit(self._look())
                if (result := self._collect()) is not None:
                    return result
                if time.monotonic() - looked > _LOOK_SECONDS:
                    looked = time.monotonic()
                    self._watch(self._look())
            except SchedulerLostError:
                for _ in wait_for_scheduler(self.client, self.job.stall_seconds):
                    on_turn()
            if time.monotonic() - self.alive > self.job.stall_seconds:
                raise too_slow(self.name, self.job.stall_seconds)
            time.sleep(_POLL_SECONDS)

    def _look(self) -> _View:
        def look(keys: list[str], dask_scheduler: Any) -> tuple[dict[str, float], dict[str, str]]:
            from time import time

            states = {key: dask_scheduler.tasks.get(key) for key in keys}
            return (
                {address: time() - worker.last_seen for address, worker in dask_scheduler.workers.items()},
                {key: state.processing_on.address for key, state in states.items() if state and state.processing_on},
            )

        keys = [attempt.future.key for attempt in self.attempts]
        return _View(*run_on_scheduler(self.client, look, keys))

    def _others(self, view: _View) -> set[str]:
        """Return healthy workers on which it was not tried."""
        present = {worker for worker, seconds in view.silent.items() if seconds < _SILENT_SECONDS}
        return self.roster.usable(present) - self._tried

    def _submit(self, view: _View) -> None:
        """Submit it to an untried worker, or to any worker if there are no restrictions."""
        # A scheduler that was restarted knows no subscription. Attempts are then cancelled, and submitted again here.
        self.subscribe()
        chosen = self._others(view)
        workers = None if chosen == view.silent.keys() or not chosen else frozenset(chosen)
        key = f"{self.name}-{uuid.uuid4().hex[:8]}"
        delayed = dask.delayed(call_on_worker, pure=False)(self.function, self.argument, self.topic, dask_key_name=key)
        future = self.client.compute(delayed, workers=workers and sorted(workers))
        self.attempts.append(_Attempt(future, workers))

    def _collect(self) -> Any:
        """Return a result if there is one. Restart a failed attempt elsewhere."""
        for attempt in list(self.attempts):
            status = attempt.future.status
            if status == "finished":
                return result_of(self.client, attempt.future, self.job.stall_seconds)
            if status in ("cancelled", "lost"):
                self._end(attempt)
            elif status == "error":
                error = exception_of(attempt.future)
                worker = erred_on(self.client, attempt.future)
                self.attempts.remove(attempt)
                self._retry(error, worker)
        return None

    def _retry(self, error: BaseException, worker: str | None) -> None:
        """Restart it on another worker if the error may be specific to this worker, else raise the error."""
        if worker is not None:
            self._tried.add(worker)
        own = classify(error) == "device" or isinstance(error, _OWN)
        view = self._look()
        if own and self._others(view) and len(self._tried) <= self.job.retries:
            where = "a worker" if worker is None else f"worker {self.roster.name(worker)}"
            logger.warning("the %s task failed on %s: %s; again on another worker", self.name, where, error)
            self._submit(view)
        elif not self.attempts:
            raise self._final(error) from error

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

    def _watch(self, view: _View) -> None:
        """Detect workers that ended or stopped responding."""
        for attempt in list(self.attempts):
            holder = view.holders.get(attempt.future.key)
            if attempt.holder is not None and attempt.holder not in view.silent:
                self._note_end(attempt)
            if holder is not None and holder != attempt.holder:
                attempt.holder, attempt.since = holder, time.monotonic()
            if attempt.workers is not None and not attempt.workers & view.silent.keys():
                # The scheduler would keep it waiting for lost workers.
                self._end(attempt)
                continue
            silent = view.silent.get(attempt.holder or "", 0.0)
            if silent > _SILENT_SECONDS and attempt.holder is not None and not attempt.replaced:
                self._tried.add(attempt.holder)
                if self._others(view):
                    attempt.replaced = True
                    logger.warning(
                        "worker %s has not been heard of for %.0f s; the %s task starts on another one, too",
                        self.roster.name(attempt.holder),
                        silent,
                        self.name,
                    )
                    self._submit(view)

    def _end(self, attempt: _Attempt) -> None:
        self.attempts.remove(attempt)
        attempt.future.release()

    def _note_end(self, attempt: _Attempt) -> None:
        assert attempt.holder is not None
        self._ended.append((attempt.holder, time.monotonic() - attempt.since))
        attempt.holder = None
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
