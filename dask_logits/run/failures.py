"""The failure ledger: a small file per quarantined partition, deleted when the partition is committed.

The files inform the user and ``dask-logits retry``. Receipts alone determine which partitions remain.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Literal

from dask_logits.errors import CacheError
from dask_logits.files.atomic import COUNTS, TEXT, Json, check_fields, names_in, read_json, replace_json, unreadable
from dask_logits.run.folder import RunFolder

# In order: a persistent I/O error, an unusable row or teacher, workers that died, a worker that stopped responding,
# rows that could not be read when the plan was made, arrays that changed on disk after the commit, a device or
# worker that cannot score.
Kind = Literal["transient", "data", "worker-death", "hang", "unreadable", "damaged", "device"]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A partition that failed permanently.

    Parameters
    ----------
    index
        Index of the partition.
    kind
        Category of the failure.
    reason
        Reason, in one sentence.
    attempts
        Number of attempts.
    evidence
        End of the traceback, or the place where its workers died.
    workers
        Address and host of each worker on which it failed, in order.
    rows
        Dataset rows identified as the cause. Empty: not searched, or not identified.
    task
        The task that was tried. None if it did not start.
    """

    index: int
    kind: Kind
    reason: str
    attempts: int = 1
    evidence: str = ""
    workers: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()
    task: object = None

    def found_in(self, rows: tuple[int, ...]) -> Failure:
        """Return this failure with the rows that caused it."""
        return replace(self, rows=rows)


def note_failure(run: RunFolder, failure: Failure) -> None:
    """Write a failure to the ledger, replacing an older entry of the same partition."""
    path = run.failure_path(failure.index)
    path.parent.mkdir(exist_ok=True)
    entry = {name: value for name, value in vars(failure).items() if name != "task"}
    replace_json(path, {**entry, "at": time.time()}, durable=True)


def forget_failure(run: RunFolder, index: int) -> None:
    """Delete the ledger entry of a committed partition."""
    path = run.failure_path(index)
    path.unlink(missing_ok=True)


def _has_receipt(run: RunFolder, index: int) -> bool:
    try:
        return run.receipt(index) is not None
    except CacheError as error:
        if unreadable(error):
            raise
        # A damaged entry is ignored: the next start computes its partition.
        return False


def read_failures(run: RunFolder) -> dict[int, Json]:
    """Return partition → entry for all uncommitted partitions in the ledger."""
    found = {}
    for name in names_in(run.failures_path):
        path = run.failures_path / name
        if not (path.suffix == ".json" and path.stem.isascii() and path.stem.isdigit()):
            continue
        entry = read_json(path)
        if entry is not None and not _has_receipt(run, int(path.stem)):
            check_fields(path, entry, {"kind": TEXT, "reason": TEXT, "rows": COUNTS})
            found[int(path.stem)] = entry
    return found
