"""The retry policy as tables: when a partition is retried, and when it has failed permanently."""

from __future__ import annotations

import pytest

from dask_logits.errors import CacheError, CapacityError, ClusterError, DatasetError, TeacherError
from dask_logits.job.retry_policy import Again, classify, decide


@pytest.mark.parametrize(
    ("event", "tried", "usable", "expected"),
    [
        # Bad data has failed on two workers, or on the only one.
        ("data", "a", "a", None),
        ("data", "a", "ab", 0.0),
        ("data", "ab", "abc", None),
        # An I/O error: retries, and never on one worker alone while there is another.
        ("transient", "a", "a", 2.0),
        ("transient", "aa", "a", 4.0),
        ("transient", "aaa", "a", None),
        ("transient", "aaa", "ab", 8.0),
        ("transient", "aab", "ab", None),
        # A worker that cannot load the teacher says nothing about a partition.
        ("worker", "a", "a", None),
        ("worker", "ab", "abc", 0.0),
        ("worker", "abc", "abcd", None),
        # Whatever happens, the number of attempts is bounded.
        ("transient", "aaaaaa", "ab", None),
    ],
)
def test_an_error_is_retried_until_it_is_the_partitions_own(event, tried, usable, expected) -> None:
    assert decide(event, 2, tried=tried, usable=usable) == (None if expected is None else Again(expected))


@pytest.mark.parametrize(
    ("event", "facts", "expected"),
    [
        ("lost", {"losses": 1}, Again()),
        ("lost", {"losses": 3}, Again()),
        ("lost", {"losses": 4}, None),
        # A companion may have ended the worker.
        ("worker-death", {"had_company": True}, Again(alone=True)),
        ("worker-death", {"had_company": True, "was_alone": True}, None),
        ("worker-death", {"had_company": False}, None),
        ("hang", {}, Again(alone=True)),
        ("hang", {"was_alone": True}, None),
    ],
)
def test_a_lost_worker_is_retried_a_bounded_number_of_times(event, facts, expected) -> None:
    assert decide(event, 2, **facts) == expected


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionResetError("peer"), "transient"),
        (CacheError("half written"), "transient"),
        (ValueError("row"), "data"),
        (DatasetError("row 7"), "data"),
        (TeacherError("not finite", row=7), "data"),
        (TeacherError("no such file"), "worker"),
        (ImportError("torch"), "worker"),
        (CapacityError("out of memory"), "worker"),
        (ClusterError("another release"), "worker"),
    ],
)
def test_an_exception_has_a_kind(error, kind) -> None:
    assert classify(error) == kind
