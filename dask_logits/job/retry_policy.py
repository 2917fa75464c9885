"""The retry policy: what happens to a partition after a failure, as pure functions.

A failure is the fault of the partition or of its worker, and only another worker can tell which. Therefore a partition
is retried on a worker where it has not failed, and counts as bad only after it failed on two (or on the only one). A
partition whose worker died or hung is retried once more, alone on its worker, because a companion may be the cause. An
error of a device is the worker's fault, unless a worker that completes other partitions fails this one twice.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dask_logits.errors import (
    CacheError,
    CapacityError,
    ClusterError,
    DaskLogitsError,
    TeacherError,
    is_poisoned,
)

_FIRST_REST_SECONDS = 2.0
_LONGEST_REST_SECONDS = 60.0
# Attempts beyond the retries, whatever the failures are.
_MOST_MORE = 3
# Failures on working devices after which the partition is the cause.
_MOST_ON_GOOD_DEVICES = 2
# A device without room, or for which nothing can be compiled. Whoever caught these errors has not made others of them.
_UNUSABLE = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|ALLOC_FAILED|NVML_SUCCESS ==|No CUDA GPUs|NVIDIA driver|C compiler|"
    r"FlexAttention: "
)
_COMPILERS = {"triton", "torch._inductor", "torch._dynamo", "subprocess"}

# An I/O error, an unusable row, a device or worker that cannot score, a worker that died several times during the
# partition, a worker or submission that disappeared, no sign of life.
Event = Literal["transient", "data", "device", "worker-death", "lost", "hang"]


@dataclass
class Past:
    """What has happened to a partition that is not committed."""

    attempts: int = 0
    # Number of times its workers disappeared, or the scheduler forgot the client.
    losses: int = 0
    # Number of workers that left on purpose during it.
    departures: int = 0
    # Whether its last attempt is, or will be, alone on its worker.
    is_alone: bool = False


class Retry(NamedTuple):
    """Another attempt, after some seconds. Alone on its worker: when no other partition is left to retry."""

    seconds: float = 0.0
    is_alone: bool = False


def classify(error: BaseException) -> Literal["transient", "data", "device"]:
    """Return the kind of failure of a task's exception.

    >>> classify(ConnectionResetError("peer")), classify(ValueError("row")), classify(ImportError("torch"))
    ('transient', 'data', 'device')
    """
    # The teacher cannot be loaded or run, as opposed to non-finite logits or too little memory for a row.
    of_no_row = isinstance(error, TeacherError | CapacityError) and error.row is None
    if of_no_row or isinstance(error, ImportError | ClusterError) or is_poisoned(error) or _is_unusable(error):
        return "device"
    transient = isinstance(error, OSError) and (isinstance(error, CacheError) or not isinstance(error, DaskLogitsError))
    return "transient" if transient else "data"


def _is_unusable(error: BaseException) -> bool:
    """Whether a device has no room, or a compiler for it fails. Its process need not be restarted."""
    if isinstance(error, DaskLogitsError):
        return False
    module = type(error).__module__
    from_compiler = any(module == name or module.startswith(f"{name}.") for name in _COMPILERS)
    return from_compiler or (isinstance(error, RuntimeError) and bool(_UNUSABLE.search(str(error))))


def rest_seconds(failures: int) -> float:
    """Return the waiting time after a number of failures.

    >>> [rest_seconds(failures) for failures in (1, 2, 5, 6, 50)]
    [2.0, 4.0, 32.0, 60.0, 60.0]
    """
    return min(_FIRST_REST_SECONDS * 2.0 ** min(failures - 1, 10), _LONGEST_REST_SECONDS)


def decide(
    event: Event,
    retries: int,
    past: Past,
    *,
    tried: Collection[str] = (),
    usable: Collection[str] = (),
    had_company: bool = False,
    on_good_devices: int = 0,
) -> Retry | None:
    """Decide whether and when a partition is retried.

    Parameters
    ----------
    event
        What happened to it.
    retries
        The setting ``distillation.job.retries``.
    past
        What has happened to it, this time included.
    tried
        Workers on which it raised an error, in order. The last one may be named several times.
    usable
        Workers that may get work.
    had_company
        Whether another partition may have run on its worker.
    on_good_devices
        Failures of a device that completed other partitions before and has not failed any other since.

    Returns
    -------
    Retry or None
        None: it has failed permanently.

    Examples
    --------
    >>> decide("data", 2, Past(), tried="a", usable="ab"), decide("data", 2, Past(), tried="ab", usable="abc")
    (Retry(seconds=0.0, is_alone=False), None)
    """
    if event == "lost" and past.losses <= retries + 1:
        return Retry()
    if event in ("lost", "worker-death"):
        return Retry(is_alone=True) if had_company and not past.is_alone else None
    if event == "hang":
        return None if past.is_alone else Retry(is_alone=True)
    if event == "device":
        return None if on_good_devices >= _MOST_ON_GOOD_DEVICES else Retry()
    n_failures, n_workers = len(tried), len(set(tried))
    has_others = bool(set(usable) - set(tried))
    enough = 2 if has_others else 1
    if n_failures > retries + _MOST_MORE:
        return None
    if event == "transient":
        return None if n_failures > retries and n_workers >= enough else Retry(rest_seconds(n_failures))
    return None if n_workers >= enough else Retry()
