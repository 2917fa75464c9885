"""Run tasks as ``dask.delayed`` in the workers of a cluster."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import dask
from distributed import Client

from dask_logits.config.groups import JobConfig
from dask_logits.errors import ClusterError
from dask_logits.job.executor import Event, Waiting
from dask_logits.job.newcomers import Newcomers
from dask_logits.job.remote import TOKENS_TOPIC, load_on_worker
from dask_logits.job.roster import Roster
from dask_logits.job.scheduler import SchedulerLostError, call_scheduler, scheduler_lost, wait_for_scheduler
from dask_logits.job.single import run_one
from dask_logits.job.window import Window
from dask_logits.teacher.checkpoint import TeacherSpec
from dask_logits.worker.environment import Environment
from dask_logits.worker.task import PartitionTask

_POLL_SECONDS = 0.5
_EVENT_SECONDS = 5
# Topic of distributed for events of the cluster.
_CLUSTER_TOPIC = "all"


@dataclass(frozen=True, kw_only=True)
class DaskExecutor:
    """The workers of a Dask cluster (:class:`~dask_logits.job.executor.Executor`).

    Parameters
    ----------
    client
        A connected client.
    job
        Retries and timeouts.
    newcomers
        Compares workers that join later. None: the workers are this machine's.
    """

    client: Client
    job: JobConfig
    device: str
    torch_threads: int
    dashboard: str | None
    environments: Mapping[str, Environment]
    roster: Roster
    newcomers: Newcomers | None = None

    @property
    def n_workers(self) -> int:
        """Number of workers at present, at least 1."""
        return max(1, len(self.client.ncores()))

    def run(
        self, tasks: Iterator[PartitionTask | None], run_id: str, is_reading: Callable[[], bool] = lambda: False
    ) -> Generator[Event, None, None]:
        """Run tasks until none is left. After a lost connection the scheduler is waited for."""
        client, window = self.client, Window(self.client, tasks, self.job, self.roster, self.newcomers)
        tokens: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        changes: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        topics = {TOKENS_TOPIC + run_id: tokens, _CLUSTER_TOPIC: changes}

        def subscribe() -> None:
            if client.status == "closed":
                raise scheduler_lost()
            for topic, messages in topics.items():
                client.subscribe_topic(topic, lambda event, messages=messages: messages.put(event[1]))

        subscribe()
        try:
            while True:
                try:
                    if not window.fill():
                        break
                    is_done = window.wait(_POLL_SECONDS)
                    while not tokens.empty():
                        scored = tokens.get()
                        window.note_tokens(scored["partition"], scored["tokens"])
                    while not changes.empty():
                        change = changes.get()
                        if change.get("action") == "remove-worker" and change.get("expected"):
                            window.note_departure(change["worker"], change["processing-tasks"])
                    if is_reading():
                        window.last_progress = time.monotonic()
                    if not is_done:
                        window.check_stall()
                    window.check_hung()
                    yield from window.events() or [Waiting()]
                except SchedulerLostError:
                    for _ in wait_for_scheduler(client, self.job.stall_seconds):
                        yield Waiting()
                    # To the scheduler, a reconnected client is a new one.
                    subscribe()
                    window.note_reconnection()
            yield from window.events()
        finally:
            window.release()
            if client.status == "running":
                for topic in topics:
                    client.unsubscribe_topic(topic)

    def call(
        self,
        function: Callable[[Any, Callable[[str], None]], Any],
        argument: Any,
        *,
        on_step: Callable[[str], None] = lambda step: None,
        on_turn: Callable[[], None] = lambda: None,
    ) -> Any:
        """Run one function on one worker, and on another if the first is lost."""
        return run_one(self.client, function, argument, self.job, self.roster, on_step=on_step, on_turn=on_turn)

    @contextlib.contextmanager
    def preload(self, teacher: TeacherSpec, vocab_size: int) -> Iterator[None]:
        """Have the workers with GPUs load a teacher. On CPUs, that would disturb the worker that calibrates."""
        chosen = sorted(self.roster.usable(self.environments)) if self.device == "cuda" else []
        futures = [
            self.client.compute(dask.delayed(load_on_worker, pure=False)(teacher, vocab_size), workers=[worker])
            for worker in chosen
        ]
        try:
            yield
        finally:
            # An error is raised again by the first partition.
            for future in futures:
                future.release()

    def announce(self, topic: str, message: dict[str, Any]) -> None:
        """Log an event at the scheduler. A lost scheduler is noticed elsewhere."""
        if self.client.status == "running":
            with contextlib.suppress(ClusterError):
                call_scheduler(
                    self.client, lambda: self.client.scheduler.log_event(topic=topic, msg=message), _EVENT_SECONDS
                )
