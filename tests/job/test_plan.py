import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_logits.job.plan import Plan, TeacherShape, auto_partition_rows, estimate


@given(st.integers(1, 500), st.integers(1, 600))
def test_partitions_cover_every_row_exactly_once_in_order(n_rows: int, partition_rows: int) -> None:
    plan = Plan(n_rows=n_rows, partition_rows=partition_rows)
    parts = [plan.partition(i) for i in range(len(plan))]
    assert [row for p in parts for row in range(p.first_row, p.first_row + p.n_rows)] == list(range(n_rows))
    assert [p.index for p in parts] == list(range(len(parts)))


@given(st.integers(1, 10**9), st.floats(0, 1e6))
def test_automatic_rows_are_within_the_plan(n_rows: int, tokens_per_row: float) -> None:
    rows = auto_partition_rows(n_rows, tokens_per_row)
    assert 1 <= rows <= n_rows
    assert rows * tokens_per_row <= 262_144 + tokens_per_row or rows * tokens_per_row <= 8_192 + tokens_per_row


@pytest.mark.parametrize("index", [-1, 3])
def test_there_is_no_partition_outside_the_plan(index: int) -> None:
    with pytest.raises(IndexError, match=r"expected a partition in \[0, 3\)"):
        Plan(n_rows=5, partition_rows=2).partition(index)


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0)])
def test_a_plan_of_nothing_is_refused(sizes) -> None:
    with pytest.raises(ValueError, match="expected positive row counts"):
        Plan(n_rows=sizes[0], partition_rows=sizes[1])


def test_the_estimate_adds_up() -> None:
    teacher = TeacherShape(parameters=10**8, hidden_width=512, head_width=50_000, layers=8, bytes_per_value=2)
    cost = estimate(
        Plan(n_rows=1000, partition_rows=100), tokens_per_row=200.0, top_k=64, vocab_size=50_000, teacher=teacher,
        batch_tokens=4096, head_rows=256, scratch_rows=16,
    )  # fmt: skip
    assert cost.tokens == 200_000
    assert cost.cache_bytes == 200_000 * 270 + 1000 * 24
    assert cost.peak_disk_bytes == 2 * cost.cache_bytes
    assert 2 * 10**8 < cost.worker_bytes < 2 * 10**8 + (1 << 30)
