"""The ledger of what failed for good: a small file for each quarantined partition, gone when it is committed.

The files are for whoever mends the cause, and for ``dask-logits retry``; what is left to do is told by receipts alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Literal

from dask_logits.errors import CacheError
from dask_logits.files.atomic import COUNTS, TEXT, Json, check_fields, names_in, read_json, replace_json, unreadable
from dask_logits.run.folder import RunFolder

# What happened: an I/O error that stayed, a row or a teacher that cannot be used, workers that died, no sign of life,
# rows that could not be read when the plan was made, arrays that changed on disk after they were committed, a worker
# that cannot score at all.
Kind = Literal["transient", "data", "worker-death", "hang", "unreadable", "damaged", "worker"]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A partition that failed for good.

    Parameters
    ----------
    index
        The partition.
    kind
        What happened.
    reason
        In a sentence.
    attempts
        How often it was tried.
    evidence
        End of the traceback, or where its workers died.
    workers
        Address and host of each worker that it failed on, in order.
    rows
        Dataset rows that were found to be the cause; empty: not looked for, or not found.
    task
        What was tried; None where it did not come so far.
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
        """Return it with the rows that are the cause."""
        return replace(self, rows=rows)


def note_failure(run: RunFolder, failure: Failure) -> None:
    """Write a failure into the ledger, over an older one of the same partition."""
    path = run.failure_path(failure.index)
    path.parent.mkdir(exist_ok=True)
    entry = {name: value for name, value in vars(failure).items() if name != "task"}
    replace_json(path, {**entry, "at": time.time()}, durable=True)


def forget_failure(run: RunFolder, index: int) -> None:
    """Take a partition off the ledger: it is committed."""
    path = run.failure_path(index)
    path.unlink(missing_ok=True)


def _has_receipt(run: RunFolder, index: int) -> bool:
    try:
        return run.receipt(index) is not None
    except CacheError as error:
        if unreadable(error):
            raise
        # A damaged one does not count: the next start computes its partition.
        return False


def read_failures(run: RunFolder) -> dict[int, Json]:
    """Return the ledger: partition → entry, of those that are not committed."""
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
