"""The plan: rows → partitions, and what they will cost. Pure integers.

A partition is a contiguous range of dataset rows; its size depends on the data and the settings, never on the number
of workers, so any number of them computes the same partitions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dask_logits import records

# Tokens that a partition aims at: seconds to minutes of teacher time, tens of MB on disk.
TARGET_TOKENS = 262_144
# A small corpus is still cut into so many partitions, to be shared by workers and resumed in small steps …
LEAST_PARTITIONS = 32
# … unless they became too small to be batched by length without padding.
LEAST_TOKENS = 8_192


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A contiguous range of dataset rows: the unit of work, storage, retry, resume and checksum.

    Parameters
    ----------
    index
        Its number, from 0, in dataset order.
    first_row, n_rows
        Its rows.

    Examples
    --------
    >>> Partition(index=0, first_row=0, n_rows=0)
    Traceback (most recent call last):
    ValueError: partition 0: expected at least 1 row, got 0
    """

    index: int
    first_row: int
    n_rows: int

    def __post_init__(self) -> None:
        if self.n_rows < 1:
            raise ValueError(f"partition {self.index}: expected at least 1 row, got {self.n_rows}")

    @property
    def name(self) -> str:
        """Its number with leading zeros, as in file names."""
        return f"{self.index:06d}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How rows are cut: `n_rows` rows into partitions of `partition_rows`, the last one shorter.

    Examples
    --------
    >>> plan = Plan(n_rows=10, partition_rows=4)
    >>> [(p.first_row, p.n_rows) for p in map(plan.partition, range(len(plan)))]
    [(0, 4), (4, 4), (8, 2)]
    """

    n_rows: int
    partition_rows: int

    def __post_init__(self) -> None:
        if self.n_rows < 1 or self.partition_rows < 1:
            raise ValueError(f"expected positive row counts, got {self}")

    def __len__(self) -> int:
        return -(-self.n_rows // self.partition_rows)

    def partition(self, index: int) -> Partition:
        """Return partition `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"expected a partition in [0, {len(self)}), got {index}")
        first = index * self.partition_rows
        return Partition(index=index, first_row=first, n_rows=min(self.partition_rows, self.n_rows - first))


def auto_partition_rows(n_rows: int, tokens_per_row: float) -> int:
    """Choose the rows of a partition.

    About 256k tokens, at most a 32nd of the rows; but not fewer than about 8k tokens, because documents are batched
    by length within their partition, and a handful of documents cannot be batched without padding.

    >>> auto_partition_rows(1_000_000, 500.0), auto_partition_rows(200, 500.0), auto_partition_rows(3, 10.0)
    (524, 16, 3)
    """
    tokens_per_row = max(tokens_per_row, 1.0)
    rows = min(TARGET_TOKENS / tokens_per_row, n_rows / LEAST_PARTITIONS)
    return max(1, min(n_rows, int(max(rows, LEAST_TOKENS / tokens_per_row))))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a plan will take.

    Parameters
    ----------
    tokens
        Expected tokens in all, from a sample.
    cache_bytes, peak_disk_bytes
        Size of the cache; the most the run folder holds at one time (partitions and cache side by side).
    worker_bytes
        Peak memory of one worker: weights, one batch, one chunk of logits, one partition's results.
    """

    tokens: int
    cache_bytes: int
    peak_disk_bytes: int
    worker_bytes: int


@dataclass(frozen=True, kw_only=True)
class TeacherShape:
    """The sizes of a teacher that decide what a batch takes.

    Parameters
    ----------
    parameters
        Weights.
    hidden_width, head_width, layers
        D, V and the depth.
    bytes_per_value
        Of the weights' dtype.
    """

    parameters: int
    hidden_width: int
    head_width: int
    layers: int
    bytes_per_value: int


# Interpreter, torch, transformers, tokenizer and allocator slack of a worker process.
_PROCESS_BYTES = 700 << 20
# Live activations of one layer, in hidden widths per token: residual, norms, q/k/v, attention, gate and up.
_WIDTHS_PER_TOKEN = 24


def estimate(
    plan: Plan,
    *,
    tokens_per_row: float,
    top_k: int,
    vocab_size: int,
    teacher: TeacherShape,
    batch_tokens: int,
    head_rows: int,
    scratch_rows: int,
) -> Estimate:
    """Estimate what a plan takes.

    Parameters
    ----------
    plan, teacher
        The job.
    tokens_per_row
        Mean of a sample.
    top_k, vocab_size, batch_tokens, head_rows
        Resolved settings.
    scratch_rows
        Positions whose float32 exponentials exist at one time.
    """
    per_token = records.bytes_per_token(top_k, vocab_size)
    tokens = round(plan.n_rows * tokens_per_row)
    cache_bytes = tokens * per_token + plan.n_rows * 24
    value = teacher.bytes_per_value
    batch = batch_tokens * teacher.hidden_width * _WIDTHS_PER_TOKEN * value
    head = head_rows * vocab_size * value + scratch_rows * vocab_size * 4
    partition = min(plan.partition_rows, plan.n_rows) * tokens_per_row * per_token
    return Estimate(
        tokens=tokens,
        cache_bytes=cache_bytes,
        peak_disk_bytes=2 * cache_bytes,
        worker_bytes=round(teacher.parameters * value + batch + head + 2 * partition + _PROCESS_BYTES),
    )


def fingerprint(what: Mapping[str, Any]) -> str:
    """Digest what is computed; equal fingerprints may share a run folder.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(what, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
