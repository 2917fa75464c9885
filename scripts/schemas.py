"""Write the JSON schemas of the small files of a run and a cache: ``python scripts/schemas.py``."""

from __future__ import annotations

import json
from pathlib import Path

from dask_logits.cache.find import CacheIndex
from dask_logits.fields import Record
from dask_logits.run.plan import PlanEnd, Segment
from dask_logits.run.records import Calibration, DriverStatus, FailureEntry, Manifest, Receipt

FOLDER = Path(__file__).parents[1] / "docs" / "schemas"
RECORDS: dict[str, type[Record]] = {
    "run": Manifest,
    "calibration": Calibration,
    "plan_segment": Segment,
    "plan_end": PlanEnd,
    "receipt": Receipt,
    "failure": FailureEntry,
    "status": DriverStatus,
    "index": CacheIndex,
}


def schemas() -> dict[str, str]:
    """Return file name → JSON schema of every record."""
    return {
        f"{name}.json": json.dumps(record.model_json_schema(), indent=1, ensure_ascii=False) + "\n"
        for name, record in RECORDS.items()
    }


def main() -> None:
    """Write the files."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in schemas().items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
