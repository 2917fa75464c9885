from __future__ import annotations

import json
from pathlib import Path

import pytest

from dask_logits.errors import CacheError
from dask_logits.records import Statistics
from dask_logits.run.plan import Segment
from dask_logits.run.records import Calibration, DriverStatus, Manifest, Receipt

RECEIPT = {
    "partition": 3, "first_row": 36, "n_rows": 12, "run_id": "r", "attempt": "000003.x.zarr",
    "statistics": Statistics().model_dump(), "content_digest": "0" * 64, "files": {"input_ids/c/0": [7, 9]},
    "seconds": {"score": 0.5, "wait": 0}, "flops": 10.0, "mfu": None, "splits": {"0": [2, 2]},
}  # fmt: skip
NUMERICS = {"dtype": "float32", "device": "cpu", "torch_threads": 1, "path": {}, "batch_tokens": 64, "head_rows": 16}


def test_what_is_read_is_written_again_unchanged() -> None:
    for values in (RECEIPT, {**RECEIPT, "finished": 1.5, "process": 7, "environment": {"torch": "2"}}):
        assert json.dumps(Receipt.parse(Path("r"), values).to_json()) == json.dumps(values)
    status = {"tokens_per_second": 0.0, "seconds_left": None, "at": 1, "state": "starting", "failed": {"3": "a row"}}
    assert DriverStatus.parse(Path("s"), status).to_json() == status
    segment = {"first_partition": 0, "first_row": 0, "cuts": [[2, 4], [1, 2]], "source": {"kind": "arrow", "x": [1]}}
    assert json.dumps(Segment.parse(Path("p"), segment).to_json()) == json.dumps(segment)


def test_a_copy_of_a_calibration_keeps_the_fields_of_a_later_release() -> None:
    values = {"numerics": {**NUMERICS, "rounding": "up"}, "storage": None, "power_watts": 3}
    assert Calibration.parse(Path("c"), values).to_json() == values


def test_statistics_that_could_not_be_summed_are_refused() -> None:
    more = {**RECEIPT, "statistics": {**RECEIPT["statistics"], "temperature": 1}}
    with pytest.raises(CacheError, match=r"r: expected no field statistics\.temperature; the file is damaged"):
        Receipt.parse(Path("r"), more)
    largest = Statistics(tokens=2**48 - 1)
    assert (largest + largest).tokens == 2**49 - 2


def test_a_setting_of_the_first_start_is_found_by_its_name() -> None:
    begun = {"format": "dask_logits.run", "version": 4, "run_id": "r", "fingerprint": "f", "what": {}}
    manifest = Manifest(**begun, total_workers=1, how={"job": {"retries": 3}, "teacher": None})
    assert manifest.setting("job.retries") == 3
    assert [manifest.setting(name) for name in ("job.more", "teacher.model_path", "cache.max_file_size")] == [None] * 3
