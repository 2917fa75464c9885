"""What Dask calls inside a worker process: thin wrappers that report progress as Dask events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distributed import get_worker
from distributed.threadpoolexecutor import ThreadPoolExecutor

from dask_logits.run.records import Receipt
from dask_logits.teacher.checkpoint import TeacherSpec, load_teacher
from dask_logits.worker.task import PartitionTask, Stages, process_partition, try_rows

TOKENS_TOPIC = "dask_logits.tokens."
# The computing thread of a process. Dask's own executor is used, because its threads do not block process exit.
SCORER = ThreadPoolExecutor(1, thread_name_prefix="dask_logits-scorer")
# Shared by the threads of a process.
STAGES = Stages(scorer=SCORER)


def run_on_worker(task: PartitionTask) -> tuple[Receipt | None, str]:
    """Run a partition inside a Dask worker. Return its receipt (None: it is a trial) and the worker."""
    worker = get_worker()
    topic, index = TOKENS_TOPIC + task.run_id, task.partition.index

    def on_tokens(tokens: int) -> None:
        worker.log_event(topic, {"tokens": tokens, "partition": index})

    if task.trial is not None:
        try_rows(task, on_tokens, STAGES)
        return None, worker.address
    return process_partition(task, on_tokens, STAGES), worker.address


def load_on_worker(teacher: TeacherSpec, vocab_size: int) -> None:
    """Load a teacher in a Dask worker, for its next partition, which may wait for it."""
    SCORER.submit(load_teacher, teacher, vocab_size, STAGES.beat).result()


def call_on_worker(function: Callable[[Any, Callable[[str], None]], Any], argument: Any, topic: str) -> Any:
    """Call a function in a Dask worker's computing thread, and report its steps as events."""
    worker = get_worker()
    return SCORER.submit(function, argument, lambda step: worker.log_event(topic, step)).result()
