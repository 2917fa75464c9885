from __future__ import annotations

import threading
import time

import pytest

from dask_logits.data.source import Planned
from dask_logits.job import read_ahead
from dask_logits.job.read_ahead import ReadAhead
from dask_logits.run.plan import Partition


def planned(count: int, drawn: list[int], n_bytes: int = 1):
    for index in range(count):
        drawn.append(index)
        partition = Partition(index=index, first_row=10 * index, n_rows=10)
        yield Planned(partition=partition, files=(), column="text", n_bytes=n_bytes)


def settled(drawn: list[int]) -> int:
    """Return how many were drawn once the thread has come to rest."""
    while True:
        before = len(drawn)
        time.sleep(0.05)
        if len(drawn) == before:
            return before


def take(source) -> Planned:
    while (found := next(source)) is None:
        time.sleep(0.001)
    return found


@pytest.mark.parametrize(("documents", "waiting"), [(None, 1), (0, 1), (20, 3), (25, 3), (1000, 40)])
def test_no_more_waits_than_it_should(documents, waiting) -> None:
    drawn: list[int] = []
    reader = ReadAhead(planned(40, drawn), documents)
    source = iter(reader)
    assert settled(drawn) == waiting
    # However many are in flight, the next ones are drawn: workers never starve.
    for index in range(30):
        assert take(source).partition.index == index
    assert settled(drawn) == min(40, 30 + waiting)
    for index in range(30, 40):
        assert take(source).partition.index == index
    with pytest.raises(StopIteration):
        take(source)
    reader.stop()


def test_the_spool_is_bounded_in_bytes(monkeypatch) -> None:
    monkeypatch.setattr(read_ahead, "_SPOOL_BYTES", 50)
    drawn: list[int] = []
    reader = ReadAhead(planned(40, drawn, n_bytes=20), 1000)
    source = iter(reader)
    assert settled(drawn) == 3
    first = take(source)
    assert settled(drawn) == 3
    reader.settle(first.partition.index)
    assert settled(drawn) == 4
    reader.stop()


def test_an_error_comes_after_what_was_drawn_before_it() -> None:
    def failing():
        yield from planned(2, [])
        raise OSError("gone")

    source = iter(ReadAhead(failing(), 1000))
    assert [take(source).partition.index for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="gone"):
        take(source)


def test_a_stopped_reader_draws_no_more() -> None:
    drawn: list[int] = []
    reader = ReadAhead(planned(40, drawn), 20)
    settled(drawn)
    reader.stop()
    assert "read-ahead" not in {thread.name for thread in threading.enumerate()}
