"""The failure ledger: a small file per quarantined partition, deleted when the partition is committed.

The files inform the user and ``dask-logits retry``. Receipts alone determine which partitions remain.
"""

from __future__ import annotations

import time
from typing import Literal

from pydantic import Field

from dask_logits.errors import CacheError
from dask_logits.files.atomic import names_in, read_json, replace_json, unreadable
from dask_logits.run.folder import RunFolder
from dask_logits.run.records import FailureEntry

# In order: a persistent I/O error, an unusable row or teacher, workers that died, a worker that stopped responding,
# rows that could not be read when the plan was made, arrays that changed on disk after the commit, a device or
# worker that cannot score.
Kind = Literal["transient", "data", "worker-death", "hang", "unreadable", "damaged", "device"]


class Failure(FailureEntry):
    """A partition that failed permanently, before it is written to the ledger."""

    index: int
    kind: Kind
    rows: tuple[int, ...] = ()
    # The task that was tried. None if it did not start.
    task: object = Field(default=None, exclude=True)


def note_failure(run: RunFolder, failure: Failure) -> None:
    """Write a failure to the ledger, replacing an older entry of the same partition."""
    path = run.failure_path(failure.index)
    path.parent.mkdir(exist_ok=True)
    replace_json(path, {**failure.model_dump(mode="json"), "at": time.time()}, durable=True)


def _has_receipt(run: RunFolder, index: int) -> bool:
    try:
        return run.receipt(index) is not None
    except CacheError as error:
        if unreadable(error):
            raise
        # A damaged entry is ignored: the next start computes its partition.
        return False


def read_failures(run: RunFolder) -> dict[int, FailureEntry]:
    """Return partition → entry for all uncommitted partitions in the ledger."""
    found = {}
    for name in names_in(run.failures_path):
        path = run.failures_path / name
        if not (path.suffix == ".json" and path.stem.isascii() and path.stem.isdigit()):
            continue
        values = read_json(path)
        if values is not None and not _has_receipt(run, int(path.stem)):
            found[int(path.stem)] = FailureEntry.parse(path, values)
    return found
