"""No second of scoring counts for two partitions."""

from __future__ import annotations

import pytest

from dask_logits.worker.task import Stages


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        pytest.param([(1, 11), (12, 20)], [10, 8], id="one after the other"),
        pytest.param([(1, 11), (7, 15), (13, 18)], [10, 4, 3], id="begun before the last results of the one before"),
        pytest.param([(1, 11), (7, 15), (30, 34)], [10, 4, 4], id="a pause"),
        pytest.param([(1, 11), (7, 11)], [10, 0], id="ended at the same time"),
    ],
)
def test_seconds_of_scoring_count_once(spans: list[tuple[float, float]], expected: list[float]) -> None:
    stages = Stages()
    assert [stages.scoring_seconds(begun, ended) for begun, ended in spans] == expected
