from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_logits.errors import RunConflictError
from dask_logits.run.folder import RunFolder
from dask_logits.run.plan import Segment, auto_partition_rows, estimate, group_cuts, uniform_cuts
from dask_logits.run.plan_log import PlanLog


def rows_of(cuts) -> list[int]:
    return [rows for count, rows in cuts for _ in range(count)]


@given(st.integers(1, 500), st.integers(1, 600))
def test_partitions_cover_every_row_exactly_once_in_order(n_rows: int, partition_rows: int) -> None:
    segment = Segment(first_partition=3, first_row=7, cuts=uniform_cuts(n_rows, partition_rows), source={})
    parts = list(segment.partitions())
    assert [row for p in parts for row in range(p.first_row, p.first_row + p.n_rows)] == list(range(7, 7 + n_rows))
    assert [p.index for p in parts] == list(range(3, 3 + len(parts)))
    assert (segment.n_partitions, segment.n_rows) == (len(parts), n_rows)
    assert max(p.n_rows for p in parts) <= partition_rows
    assert Segment.parse(Path("plan.json"), segment.to_json()) == segment


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 12), st.data())
def test_row_groups_are_cut_whole_unless_they_are_huge(groups: list[int], chunk: int, data) -> None:
    first = data.draw(st.integers(0, sum(groups)))
    n_rows = data.draw(st.integers(0, sum(groups) - first))
    rows = rows_of(group_cuts(groups, first, n_rows, chunk))
    assert sum(rows) == n_rows
    assert all(0 < size <= 2 * chunk for size in rows)
    edges, ends = [sum(groups[: i + 1]) for i in range(len(groups))], [first]
    for size in rows:
        ends.append(ends[-1] + size)
    for end in ends[1:-1]:
        inside = next(i for i, edge in enumerate(edges) if end <= edge)
        assert end in edges or groups[inside] > 2 * chunk


@given(st.integers(1, 10**9), st.floats(0, 1e6))
def test_automatic_rows_are_within_the_plan(n_rows: int, tokens_per_row: float) -> None:
    rows = auto_partition_rows(n_rows, tokens_per_row)
    assert 1 <= rows <= n_rows
    assert rows * tokens_per_row <= 262_144 + tokens_per_row or rows * tokens_per_row <= 8_192 + tokens_per_row


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0)])
def test_a_plan_of_nothing_is_refused(sizes) -> None:
    with pytest.raises(ValueError, match="expected positive row counts"):
        uniform_cuts(*sizes)


def test_the_plan_on_disk_grows_ends_and_grows_again(tmp_path) -> None:
    log = PlanLog(RunFolder(tmp_path))
    assert (log.n_partitions, log.n_rows, log.end) == (0, 0, None)
    log.append(((2, 5), (1, 3)), {"kind": "rows"})
    log.close("max_samples")
    log.close("max_samples")
    reread = PlanLog(RunFolder(tmp_path))
    assert (reread.n_partitions, reread.n_rows, reread.end) == (3, 13, "max_samples")
    reread.append(((1, 4),), {"kind": "rows"})
    assert (reread.n_partitions, reread.n_rows, reread.end) == (4, 17, None)
    assert [(p.index, p.first_row, p.n_rows) for p in PlanLog(RunFolder(tmp_path)).partitions()] == [
        (0, 0, 5), (1, 5, 5), (2, 10, 3), (3, 13, 4),
    ]  # fmt: skip


def test_two_planners_of_one_run_must_agree(tmp_path) -> None:
    one, two = PlanLog(RunFolder(tmp_path)), PlanLog(RunFolder(tmp_path))
    one.append(((1, 5),), {"kind": "rows", "content": "a"})
    with pytest.raises(RunConflictError, match="expected the plan to go on with"):
        two.append(((1, 5),), {"kind": "rows", "content": "b"})
    three = PlanLog(RunFolder(tmp_path))
    four = PlanLog(RunFolder(tmp_path))
    assert three.append(((1, 2),), {}) == four.append(((1, 2),), {})


def test_the_estimate_adds_up() -> None:
    teacher = {"parameters": 10**8, "hidden_width": 512, "bytes_per_value": 2}
    fixed = {
        "tokens_per_row": 200.0, "top_k": 64, "vocab_size": 50_000, **teacher, "batch_tokens": 4096,
        "head_rows": 256, "scratch_rows": 16,
    }  # fmt: skip
    cost = estimate(1000, 100, **fixed)
    assert cost.tokens == 200_000
    assert cost.cache_bytes == 200_000 * 270 + 1000 * 24
    assert cost.peak_disk_bytes == 2 * cost.cache_bytes
    assert 2 * 10**8 + (700 << 20) < cost.worker_bytes < 2 * 10**8 + (1200 << 20)
    # No code is kept for shapes on a GPU.
    assert cost.worker_bytes - estimate(1000, 100, **fixed, device="cuda").worker_bytes == 240 << 20
    stream = estimate(None, 100, **fixed)
    assert (stream.tokens, stream.cache_bytes) == (None, 20_000 * 270 + 100 * 24)
