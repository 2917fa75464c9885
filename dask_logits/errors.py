"""Exception hierarchy, grouped by the action the user should take.

The tree::

    DaskLogitsError
    ├── ConfigError (ValueError)          change a setting
    ├── DatasetError (ValueError)         change the data, or the settings that name it
    ├── TeacherError (RuntimeError)       change the teacher, its dtype or its tokenizer
    ├── RunConflictError (ValueError)     use another run folder, or its original settings
    ├── CacheError (OSError)              recreate the file, or point to the right one
    ├── CapacityError (OSError)           free disk or memory, or ask for less
    ├── ClusterError (RuntimeError)       start or repair the Dask cluster
    └── PartitionsFailedError (RuntimeError)   read the reasons, then rerun: only failed partitions are retried

Every error keeps its attributes when pickled, because Dask replaces an unpicklable one by a bare ``Exception``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

# Errors of CUDA, its libraries and Triton reach torch as a RuntimeError. After most of them, every later call of the
# process fails, too.
_DEVICE_ERROR = re.compile(
    r"CUDA error|CUDA driver|CUDA unknown error|CUBLAS_STATUS|CUDNN_STATUS|cuDNN error|NVML|Triton Error|NCCL"
)

# A failed allocation. torch's allocator raises OutOfMemoryError. Pinned host memory, modules that CUDA loads lazily,
# Triton, cuBLAS, cuDNN and torch's CPU allocator raise a RuntimeError (torch 2.13: c10/core/impl/alloc_cpu.cpp,
# ATen/cuda/Exceptions.h). For its message, torch's allocator asks NVML, which may not answer in a container with a
# slice of a GPU (PyTorch 112377, 197312).
OUT_OF_MEMORY = re.compile(r"out of memory|ALLOC_FAILED|can't allocate memory|NVML_SUCCESS ==")


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message, or the error's type if it has none.

    >>> first_line(ValueError("too large\\nsee the manual")), first_line(KeyError())
    ('too large', 'KeyError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_poisoned(error: BaseException) -> bool:
    """Whether the process of this error must be restarted, because its device cannot be used again.

    >>> is_poisoned(RuntimeError("CUDA error: an illegal memory access was encountered"))
    True
    """
    # Recognised without importing torch.
    if OUT_OF_MEMORY.search(str(error)):
        return False
    is_torchs = any(cls.__name__ == "AcceleratorError" for cls in type(error).__mro__)
    return is_torchs or (isinstance(error, RuntimeError) and bool(_DEVICE_ERROR.search(str(error))))


# Errors raised by the code of a model's family when a way to run it does not fit.
MISFITS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


class DaskLogitsError(Exception):
    """Base class of all errors that this package raises deliberately.

    Parameters
    ----------
    message
        ``where: expected X, got Y; do Z``.
    """

    # Whether scoring had begun when the error was raised: "failed" rather than "refused".
    ran: bool = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(DaskLogitsError, ValueError):
    """A setting is unknown, of the wrong type or out of bounds.

    Parameters
    ----------
    message
        All problems, one per line.
    problems
        The problems, each starting with the dotted path of its setting.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)

    @classmethod
    def from_problems(cls, *problems: str) -> ConfigError:
        """Build one error from all problems.

        >>> print(ConfigError.from_problems("a.b: expected int, got 'x'"))
        1 problem in the configuration:
          a.b: expected int, got 'x'
        """
        noun = "problem" if len(problems) == 1 else "problems"
        lines = "\n".join(f"  {problem}" for problem in problems)
        return cls(f"{len(problems)} {noun} in the configuration:\n{lines}", problems)


class DatasetError(DaskLogitsError, ValueError):
    """The dataset is missing, empty, lacks a column or contains an unusable row.

    Parameters
    ----------
    message
        The expected value, the actual value and the remedy.
    row
        Index of the dataset row at fault, if any.
    """

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


class TeacherError(DaskLogitsError, RuntimeError):
    """The teacher is missing, does not match its tokenizer, or returned non-finite logits.

    Parameters
    ----------
    message
        The expected value, the actual value and the remedy.
    row
        Index of the dataset row whose logits were refused, if any.
    """

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


class RunConflictError(DaskLogitsError, ValueError):
    """The run folder was made with other settings, or another driver is using it.

    Parameters
    ----------
    message
        The differences, one per line.
    differences
        Dotted name of each difference → (value in the folder, requested value).
    """

    def __init__(self, message: str, differences: Mapping[str, tuple[object, object]] | None = None) -> None:
        super().__init__(message)
        self.differences = dict(differences or {})


class CacheError(DaskLogitsError, OSError):
    """A cache or partition is unreadable, truncated, incomplete, damaged or of a newer format.

    Parameters
    ----------
    message
        The path, the expected value, the actual value and the remedy.
    path
        The file or folder.
    """

    def __init__(self, message: str, path: str | None = None) -> None:
        super().__init__(message)
        self.path = path

    @classmethod
    def at(cls, path: Path, problem: str) -> CacheError:
        """Build the error for a file or folder from its path, and the rest of the message."""
        return cls(f"{path}: {problem}", str(path))


def damaged(path: Path, expected: str, found: object) -> CacheError:
    """Return the error for a cache with inconsistent or unreadable parts."""
    return CacheError.at(
        path, f"expected {expected}, got {found}; the file is damaged: restore it, or delete it and run the job again"
    )


class CapacityError(DaskLogitsError, OSError):
    """The job does not fit on this disk or in this memory, or the disk fails.

    Parameters
    ----------
    message
        The arithmetic and the remedy.
    needed_bytes, free_bytes
        Both sides of the comparison.
    row
        Index of the dataset row that does not fit, if any.
    """

    def __init__(self, message: str, needed_bytes: int = 0, free_bytes: int = 0, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class ClusterError(DaskLogitsError, RuntimeError):
    """No Dask cluster could be started or joined, or it stopped making progress."""


class PartitionsFailedError(DaskLogitsError, RuntimeError):
    """Some partitions could not be scored. All others are committed.

    Parameters
    ----------
    message
        The count and the reasons.
    reasons
        Partition index → reason.
    """

    ran = True

    def __init__(self, message: str, reasons: Mapping[int, str] | None = None) -> None:
        super().__init__(message)
        self.reasons = dict(reasons or {})
