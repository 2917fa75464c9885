"""What `plan` says of rows, speed and time."""

from __future__ import annotations

import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import cache_dir, sentences
from fault_points import NUMERICS

from dask_logits import load_config
from dask_logits.files.atomic import replace_json
from dask_logits.job.capacity import plan_lines
from dask_logits.job.forecast import Forecast, forecast, forecast_lines, matrix_flops
from dask_logits.job.prepare import prepare
from dask_logits.run.folder import RunFolder


@pytest.fixture
def stream(overrides, tmp_path) -> list[str]:
    """Overrides of a job over three Parquet files of 30 rows."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(3):
        pq.write_table(pa.table({"text": sentences(30, seed=i)}), folder / f"{i}.parquet", row_group_size=12)
    mine = [override for override in overrides if ".dataset.name" not in override and "data_files" not in override]
    return [*mine, "distillation.dataset.name=parquet", f"distillation.dataset.data_files={folder}/*.parquet",
            "distillation.dataset.streaming=true", "cluster=local_cpu"]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_rate_of_matrix_products_is_measured_in_a_moment(dtype) -> None:
    started = time.process_time()
    assert matrix_flops(dtype, "cpu", 1) > 0
    assert time.process_time() - started < 30


@pytest.mark.parametrize(
    ("samples", "text"), [("all", "90, by the footers"), ("50", "50"), ("500", "90, by the footers")]
)
def test_a_parquet_stream_is_planned_by_its_footers(stream, samples, text) -> None:
    config = load_config([*stream, f"distillation.dataset.max_samples={samples}"])
    steps: list[str] = []
    job = prepare(config, on_step=steps.append, count_seconds=60)
    lines = plan_lines(job)
    assert f"rows          {text}" in lines
    assert job.estimate.tokens is not None
    assert "counting rows in the footers of the Parquet files" in steps


def test_rows_of_files_that_were_not_reached_in_time_are_estimated(stream) -> None:
    config = load_config([*stream, "distillation.dataset.max_samples=all"])
    job = prepare(config, count_seconds=1e-9)
    assert "rows          90, estimated from 1 of 3 files" in plan_lines(job)


def test_the_speed_is_estimated_before_the_calibration_and_measured_after_it(overrides) -> None:
    config = load_config([*overrides, "cluster=local_cpu"])
    before = forecast(prepare(config))
    assert before is not None
    assert not before.is_measured
    joined = [*overrides, "distillation.cluster.scheduler=tcp://127.0.0.1:1"]
    assert forecast(prepare(load_config(joined))) is None
    run = RunFolder(cache_dir(overrides))
    run.path.mkdir()
    replace_json(run.calibration_path, {"numerics": NUMERICS, "tokens_per_second": 50.0})
    job = prepare(config)
    after = forecast(job)
    assert after == Forecast(tokens_per_second=50.0, is_measured=True)
    first, second = forecast_lines(job)
    assert first.startswith("speed         50 tokens/s for ")
    assert first.endswith(", measured by the calibration")
    assert second.startswith("time          about ")
