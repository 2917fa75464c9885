"""Preloaded into workers: partitions take a while, and writing fails or is cut short, now and then.

Every attempt and every fault is a line in the file ``$CHAOS_LOG``.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

_DRAW = random.Random(f"{os.environ.get('CHAOS_SEED')} {os.getpid()}")
_SLEEP_SECONDS, _WRITE_FAILS, _CUT_SHORT, _COMMIT_FAILS = 0.2, 0.03, 0.015, 0.02


def note(what: str) -> None:
    """Add a line to the log."""
    with Path(os.environ["CHAOS_LOG"]).open("a") as log:
        log.write(what + "\n")


def dask_setup(worker: object) -> None:
    """Patch the task, as Dask's preload does in every worker process."""
    from dask_logits.worker import task

    write, create = task.write_partition, task.create_json

    def write_partition(attempt, *given):
        note(f"attempt {attempt.name[:6]}")
        time.sleep(_DRAW.random() * _SLEEP_SECONDS)
        if _DRAW.random() < _WRITE_FAILS:
            note("fault write")
            raise OSError(5, "Input/output error")
        files = write(attempt, *given)
        if _DRAW.random() < _CUT_SHORT:
            note("fault cut")
            name = _DRAW.choice(sorted(name for name, (size, _) in files.items() if size))
            os.truncate(attempt / name, files[name][0] // 2)
        return files

    def create_json(path, value):
        if _DRAW.random() < _COMMIT_FAILS:
            note("fault commit")
            raise OSError(5, "Input/output error")
        return create(path, value)

    task.write_partition, task.create_json = write_partition, create_json
