"""What follows an attempt at a partition that did not end well: another one, or a record of the failure."""

from __future__ import annotations

import dataclasses
import math

import pytest

from dask_logits.errors import DatasetError
from dask_logits.job.attempts import Attempts
from dask_logits.run.plan import Partition
from dask_logits.worker.task import PartitionTask


def task(index: int = 5) -> PartitionTask:
    """Return a task of a partition. Only the partition and its failed attempts are real."""
    fields = dict.fromkeys(field.name for field in dataclasses.fields(PartitionTask))
    return PartitionTask(
        **{**fields, "partition": Partition(index=index, first_row=7, n_rows=3), "failed_attempts": ()}
    )


def test_partitions_are_retried_when_their_time_has_come_in_the_order_of_their_failures() -> None:
    attempts = Attempts(retries=2)
    for index, seconds in ((1, 60.0), (2, 0.0), (3, 0.0)):
        attempts.again(task(index), seconds)
    assert attempts.soonest() is not None
    due = iter(lambda: attempts.take_due(attempts.soonest()), None)
    assert [each.partition.index for each in due] == [2, 3, 1]
    assert attempts.soonest() is None
    assert not attempts.are_left()


def test_an_error_is_retried_after_a_while_and_then_recorded_with_its_rows_and_workers() -> None:
    attempts, first = Attempts(retries=1), task()
    attempts.begin(first)
    assert attempts.retry(first, "transient", "disk gone", "a", tried="a", usable="a") == 2.0
    assert attempts.take_due(0.0) is None
    again = attempts.take_due(math.inf)
    assert [(each.kind, each.reason, each.worker) for each in again.failed_attempts] == [
        ("transient", "disk gone", "a")
    ]
    assert attempts.begin(again) == attempts.past(again).attempts == 2
    assert attempts.retry(again, "transient", "disk gone", "a", tried="aa", usable="a") is None
    assert not attempts.are_left()
    try:
        raise DatasetError("dataset: expected a text, got 3", row=9)
    except DatasetError as bad:
        failure = attempts.failed(again, bad, bad.__traceback__, "data", ["b", "a", "b"])
    assert (failure.index, failure.kind, failure.attempts, failure.rows) == (5, "data", 2, (9,))
    assert failure.workers == ("b", "a")
    assert failure.task is again
    assert "test_attempts.py" in failure.evidence
    assert failure.evidence.endswith("dataset: expected a text, got 3\n")


@pytest.mark.parametrize("have_company", [False, True])
def test_a_partition_is_lost_a_limited_number_of_times_and_then_tried_alone_if_it_had_company(have_company) -> None:
    attempts = Attempts(retries=1, have_company=have_company)
    for _ in range(2):
        attempts.begin(task())
        assert attempts.retry(task(), "lost", "gone") == 0.0
        assert attempts.take_due(math.inf).failed_attempts[-1].kind == "lost"
    if have_company:
        assert attempts.retry(task(), "lost", "gone") == 0.0
        assert attempts.take_due(math.inf) is None
        assert attempts.past(attempts.take_suspect()).is_alone
    assert attempts.retry(task(), "lost", "gone") is None
    assert attempts.past(task()).losses == (4 if have_company else 3)
    assert not attempts.are_left()


def test_losses_of_a_connection_do_not_count() -> None:
    attempts = Attempts(retries=0)
    for _ in range(3):
        assert attempts.retry(task(), "lost", "gone") is not None
        attempts.forget_losses()
    assert attempts.retry(task(), "lost", "gone") is not None
    assert attempts.retry(task(), "lost", "gone") is None


def test_the_companions_of_a_dead_or_hung_worker_are_tried_once_alone_after_all_others() -> None:
    attempts = Attempts(retries=2, have_company=True)
    assert attempts.retry(task(1), "worker-death", "died", "a") is not None
    assert attempts.retry(task(2), "hang", "silent", "a") is not None
    attempts.again(task(3))
    assert attempts.take_suspect() is None
    assert attempts.take_due(math.inf).partition.index == 3
    assert [attempts.take_suspect().failed_attempts[0].kind for _ in range(2)] == ["worker-death", "hang"]
    assert attempts.retry(task(1), "worker-death", "died", "a") is None
    assert attempts.retry(task(2), "hang", "silent", "a") is None
    assert not attempts.are_left()


def test_a_dead_worker_without_another_partition_blames_its_own() -> None:
    attempts = Attempts(retries=2)
    attempts.begin(task())
    assert attempts.retry(task(), "worker-death", "died", "a") is None
    failure = attempts.ended(task(), "worker-death", "its worker died 3 times", ("a",), "its log")
    assert (failure.attempts, failure.reason, failure.evidence) == (1, "its worker died 3 times", "its log")


def test_a_trial_is_alone_from_the_start() -> None:
    attempts, trial = Attempts(retries=2, have_company=True), dataclasses.replace(task(), trial=(0, 2))
    attempts.begin(trial)
    assert attempts.retry(trial, "hang", "silent", "a") is None


def test_a_trial_is_made_once_and_again_if_its_worker_was_lost() -> None:
    attempts, trial = Attempts(retries=2, have_company=True), dataclasses.replace(task(), trial=(0, 2))
    attempts.begin(trial)
    assert attempts.retry(trial, "data", "a bad row", "a", tried=("a",), usable=("a", "b")) is None
    assert attempts.retry(trial, "lost", "its worker died") == 0
    assert attempts.retry(trial, "lost", "its worker died") is None


def test_what_is_known_of_a_partition_is_forgotten_when_it_is_completed() -> None:
    attempts = Attempts(retries=2, have_company=True)
    attempts.begin(task())
    attempts.retry(task(), "hang", "silent", "a")
    attempts.note_success(task())
    assert attempts.begin(task()) == 1
    assert not attempts.past(task()).is_alone
