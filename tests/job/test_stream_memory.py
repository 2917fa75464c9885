"""Streams of any length cost a constant amount of memory, in the driver and in the worker."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import cache_dir, sentences, write_json_lines
from test_cluster import COMMAND

from dask_logits import CachedLogitsDataset

ROWS = 100_000
TEXTS = sentences(1_000, seed=3, longest=16)


def resident(process: psutil.Process) -> int:
    return process.memory_info().rss


def named(reader: str, folder: Path) -> list[str]:
    if reader == "json":
        path = write_json_lines(folder / "d.jsonl", TEXTS * (ROWS // len(TEXTS)))
    else:
        path = folder / "d.parquet"
        table = pa.table({"text": TEXTS})
        # One huge row group of 60,000 rows, and small ones.
        with pq.ParquetWriter(path, table.schema) as writer:
            writer.write_table(pa.concat_tables([table] * 60), row_group_size=60_000)
            for _ in range(ROWS // 1_000 - 60):
                writer.write_table(table)
    return [f"distillation.dataset.name={reader}", f"distillation.dataset.data_files={path}"]


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["json", "parquet"])
def test_memory_is_flat_from_a_thousand_to_a_hundred_thousand_documents(reader, overrides, tmp_path) -> None:
    mine = [o for o in overrides if "dataset.name" not in o and "data_files" not in o and "partition.rows" not in o]
    stream = ["distillation.dataset.streaming=true", "distillation.dataset.max_samples=all"]
    # Few look-ahead, so that the first thousand documents already hold all of it.
    stream += ["distillation.dataset.streaming_buffer_size=2000", "distillation.teacher.generation.num_workers=1"]
    driver = subprocess.Popen([*COMMAND, *mine, *stream, *named(reader, tmp_path)], stderr=subprocess.PIPE, text=True)
    receipts = cache_dir(overrides) / "receipts"
    watched = psutil.Process(driver.pid)
    sizes: list[tuple[int, int, int]] = []
    while driver.poll() is None:
        count = sum(1 for _ in receipts.rglob("*.json")) if receipts.exists() else 0
        try:
            children = [
                child for child in watched.children(recursive=True) if "spawn_main" in " ".join(child.cmdline())
            ]
            sizes.append((count, resident(watched), max((resident(child) for child in children), default=0)))
        except psutil.NoSuchProcess:
            # A child that lives for a moment only.
            continue
        time.sleep(0.2)
    _, log = driver.communicate()
    assert driver.returncode == 0, log
    assert len(CachedLogitsDataset(cache_dir(overrides))) == ROWS
    scoring = [size for size in sizes if size[0] >= 1 and size[2]]
    early = [size for size in scoring if size[0] <= 3]
    late = [size for size in scoring if size[0] >= 90]
    for role, place in (("driver", 1), ("worker", 2)):
        before, after = max(size[place] for size in early), max(size[place] for size in late)
        print(f"{reader} {role}: {before / 2**20:.0f} MiB after 1,000 documents, {after / 2**20:.0f} MiB at the end")
        assert after <= 1.05 * before, (role, before, after)
