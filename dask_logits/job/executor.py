"""The seam between a job and whatever runs its tasks.

The driver gives an executor an iterator of tasks and reads events. It does not know whether the tasks run in this
process (``serial_executor.py``) or in Dask workers (``dask_executor.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from dask_logits.errors import CapacityError, ClusterError
from dask_logits.job.roster import Roster
from dask_logits.run.failures import Failure
from dask_logits.run.records import Receipt
from dask_logits.teacher.checkpoint import TeacherSpec
from dask_logits.worker.environment import Environment
from dask_logits.worker.task import PartitionTask


@dataclass(frozen=True)
class Committed:
    """A partition was completed, with this receipt."""

    receipt: Receipt


@dataclass(frozen=True)
class Failed:
    """A partition failed permanently."""

    failure: Failure


@dataclass(frozen=True)
class Progress:
    """Some tokens of a running partition were scored."""

    index: int
    tokens: int


@dataclass(frozen=True)
class Waiting:
    """Nothing happened for a moment."""


Event = Committed | Failed | Progress | Waiting


class Executor(Protocol):
    """Runs the tasks of a job."""

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``."""

    @property
    def torch_threads(self) -> int:
        """CPU threads of each worker."""

    @property
    def dashboard(self) -> str | None:
        """Address of the Dask dashboard, if there is one."""

    @property
    def environments(self) -> Mapping[str, Environment]:
        """Worker → environment, for the workers at the start."""

    @property
    def roster(self) -> Roster:
        """State of the workers, and which get no work."""

    @property
    def n_workers(self) -> int:
        """Number of workers at present, at least 1."""

    def run(
        self, tasks: Iterator[PartitionTask | None], run_id: str, is_reading: Callable[[], bool] = lambda: False
    ) -> Generator[Event, None, None]:
        """Run tasks until none is left, and yield what happens, at least several times a second.

        Parameters
        ----------
        tasks
            Partitions to compute, drawn only when there is capacity. None means that no partition is ready yet. A trial
            of some rows ends without an event, unless it fails.
        run_id
            Id of the run.
        is_reading
            Returns whether the input has advanced since the last call, although it may not have given a task. A job
            that reads is not stalled.

        Raises
        ------
        ClusterError
            If the workers are lost, or there is no progress for ``distillation.job.stall_seconds``.
        CapacityError
            If a worker has no space to write, or no worker may write.
        """

    def call(
        self,
        function: Callable[[Any, Callable[[str], None]], Any],
        argument: Any,
        *,
        on_step: Callable[[str], None] = lambda step: None,
        on_turn: Callable[[], None] = lambda: None,
    ) -> Any:
        """Run one function on one worker and wait for it.

        Parameters
        ----------
        function
            Takes the argument, and a callback for descriptions of its steps. A repeated step is a sign of life.
        argument
            Argument of the function.
        on_step
            Called in this thread with each step.
        on_turn
            Called in this thread several times a second.

        Raises
        ------
        ClusterError
            If workers are lost repeatedly, or a step takes longer than ``distillation.job.stall_seconds``.
        DaskLogitsError
            The function's error.
        """

    def preload(self, teacher: TeacherSpec, vocab_size: int) -> AbstractContextManager[object]:
        """Have the workers load a teacher during the block, where that does not disturb other work on their machine."""

    def announce(self, topic: str, message: dict[str, Any]) -> None:
        """Publish a message to monitors that are connected to the workers but do not see the run folder."""


def no_room_for(task: PartitionTask, cause: str, where: str) -> CapacityError:
    """Return the error for a partition that could not be written, because no other one could be written either."""
    return CapacityError(
        f"distillation.teacher.cache_dir: expected room to write partition {task.partition.name}, got {cause!r} from "
        f"{where}; everything committed before is good: make room and run the same command again"
    )


def stalled(seconds: float, idle: float, where: str, more: str = "") -> ClusterError:
    """Return the error for a job without progress."""
    return ClusterError(
        f"distillation.job.stall_seconds: expected progress within {seconds:g} s, got none for {idle:.0f} s with "
        f"{where}; look at the workers' logs and at what the dataset is read from, then run the same command again"
        f"{more}"
    )


def too_slow(name: str, seconds: float) -> ClusterError:
    """Return the error for a single call without a result."""
    return has_run(
        f"distillation.job.stall_seconds: expected the {name} task to end or take a step within {seconds:g} s, got "
        "nothing; look at the workers' logs, then run the same command again and allow more if the teacher is that slow"
    )


def unreadable_there(name: str, error: BaseException, where: str) -> ClusterError:
    """Return the error for a single call that ended with an error of the operating system."""
    return has_run(
        f"distillation.cluster: expected a result of the {name} task, got {error} from its worker ({where}); see that "
        "workers can read teacher and data, then run the same command again"
    )


def has_run(message: str) -> ClusterError:
    """Return an error of a job that had started."""
    error = ClusterError(message)
    error.ran = True
    return error
