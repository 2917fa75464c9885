"""The plan: cuts rows into partitions and estimates their cost. Pure integers.

A partition is a contiguous range of dataset rows. Its size depends on the data and the settings, never on the number
of workers, so any number of workers computes the same partitions. A plan is a list of segments that only grows.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from dask_logits import records
from dask_logits.fields import Count, Record

# Fields of a segment's source that identify its rows: the kind, the part of the dataset, and the fingerprints.
_KNOWN_BY = ("kind", "ordinal", "first", "footer", "content")
# Target tokens of a partition: seconds to minutes of teacher time, tens of MB on disk.
TARGET_TOKENS = 262_144
# A small corpus is cut into at least this many partitions, to be shared by workers and resumed in small steps …
LEAST_PARTITIONS = 32
# … unless they would become too small for batching by length without padding.
LEAST_TOKENS = 8_192


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A contiguous range of dataset rows: the unit of work, storage, retry, resume and checksum.

    Parameters
    ----------
    index
        Number in dataset order, from 0.
    first_row, n_rows
        Dataset rows.

    """

    index: int
    first_row: int
    n_rows: int

    @property
    def name(self) -> str:
        """Index with leading zeros, as in file names."""
        return f"{self.index:06d}"


class Segment(Record, extra="forbid"):
    """Consecutive partitions that were planned together, and their source: an entry of the plan.

    A regular dataset is one segment, plus one each time ``max_samples`` is raised. A stream has one segment for each
    file or chunk, appended as it is read.

    Examples
    --------
    >>> segment = Segment(first_partition=7, first_row=70, cuts=((2, 4), (1, 2)), source={})
    >>> [(p.index, p.first_row, p.n_rows) for p in segment.partitions()]
    [(7, 70, 4), (8, 74, 4), (9, 78, 2)]
    """

    first_partition: Count = Field(description="Its first partition.")
    first_row: Count = Field(description="Its first dataset row.")
    cuts: tuple[tuple[Count, Count], ...] = Field(
        description="Run lengths: (partitions, rows of each). A partition of 0 rows stands for data that could not be "
        "read."
    )
    source: dict[str, Any] = Field(description="Origin of the rows, for a worker's reader.")

    @property
    def n_partitions(self) -> int:
        """Number of partitions."""
        return sum(count for count, _ in self.cuts)

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return sum(count * rows for count, rows in self.cuts)

    def partitions(self, wanted: Callable[[int], bool] = lambda index: True) -> Iterator[Partition]:
        """Yield its partitions with these indices in order."""
        index, row = self.first_partition, self.first_row
        for count, rows in self.cuts:
            for _ in range(count):
                if wanted(index):
                    yield Partition(index=index, first_row=row, n_rows=rows)
                index, row = index + 1, row + rows

    def known_by(self) -> dict[str, Any]:
        """Return the values that must agree when two processes plan the same rows, excluding location and time."""
        source = {name: self.source[name] for name in _KNOWN_BY if name in self.source}
        return {**self.to_json(), "source": source}


class PlanEnd(Record, extra="forbid"):
    """The last entry of a plan."""

    end: Literal["exhausted", "max_samples"] = Field(
        description="``exhausted``: the dataset has no more rows. ``max_samples``: more may follow."
    )
    partitions: Count = Field(description="Partitions of the whole plan.")
    rows: Count = Field(description="Dataset rows of the whole plan.")

    def known_by(self) -> dict[str, Any]:
        """Return the values that must agree when two processes end a plan."""
        return self.to_json()


def uniform_cuts(n_rows: int, partition_rows: int) -> tuple[tuple[int, int], ...]:
    """Cut rows into partitions of equal size, the last one shorter.

    >>> uniform_cuts(10, 4), uniform_cuts(8, 4)
    (((2, 4), (1, 2)), ((2, 4),))
    """
    if n_rows < 1 or partition_rows < 1:
        raise ValueError(f"expected positive row counts, got {n_rows} and {partition_rows}")
    whole, rest = divmod(n_rows, partition_rows)
    return (((whole, partition_rows),) if whole else ()) + (((1, rest),) if rest else ())


def group_cuts(row_groups: Sequence[int], first: int, n_rows: int, chunk_rows: int) -> tuple[tuple[int, int], ...]:
    """Cut a range of a file into partitions of whole row groups.

    Consecutive row groups are joined while they stay within a chunk. A row group of more than two chunks is split.

    Parameters
    ----------
    row_groups
        Rows of each row group of the file.
    first, n_rows
        The range. A row group that crosses its ends is cut there.
    chunk_rows
        Target rows of a partition.

    Examples
    --------
    >>> group_cuts([3, 3, 5, 30, 4], 0, 45, 10)
    ((1, 6), (1, 5), (3, 10), (1, 4))
    >>> group_cuts([3, 3, 5, 30, 4], 2, 20, 10)
    ((1, 9), (1, 11))
    """
    rows: list[int] = []
    joined = start = 0
    for size in row_groups:
        size, start = max(0, min(start + size, first + n_rows) - max(start, first)), start + size
        if joined and joined + size > chunk_rows:
            rows.append(joined)
            joined = 0
        if size > 2 * chunk_rows:
            rows += [count for repeat, count in uniform_cuts(size, chunk_rows) for _ in range(repeat)]
        else:
            joined += size
    rows += [joined] if joined else []
    return tuple((len(list(same)), size) for size, same in itertools.groupby(rows))


def auto_partition_rows(n_rows: int, tokens_per_row: float) -> int:
    """Choose the number of rows of a partition.

    The target is about 256k tokens and at most a 32nd of the rows. The minimum is about 8k tokens, because documents
    are batched by length within their partition, and a handful of documents cannot be batched without padding.

    >>> auto_partition_rows(1_000_000, 500.0), auto_partition_rows(200, 500.0), auto_partition_rows(3, 10.0)
    (524, 16, 3)
    """
    tokens_per_row = max(tokens_per_row, 1.0)
    rows = min(TARGET_TOKENS / tokens_per_row, n_rows / LEAST_PARTITIONS)
    return max(1, min(n_rows, int(max(rows, LEAST_TOKENS / tokens_per_row))))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimated resources of a plan.

    Parameters
    ----------
    tokens
        Expected total tokens, from a sample. None for a stream of unknown length, in which case sizes are for one
        partition.
    cache_bytes, peak_disk_bytes
        Size of the cache, and the peak size of the run folder (partitions and cache side by side).
    worker_bytes
        Peak memory of one worker: weights, one batch, one chunk of logits, one partition's results.
    partition_tokens
        Expected tokens of a partition.
    target_share
        Expected share of the positions that get targets.
    """

    tokens: int | None
    cache_bytes: int
    peak_disk_bytes: int
    worker_bytes: int
    partition_tokens: float = 0.0
    target_share: float = 1.0


# Interpreter, torch, transformers, tokenizer and allocator slack of a worker process.
_PROCESS_BYTES = 700 << 20
# On a CPU in half precision: cached code for shapes of matrix products, compiled layers, gaps between activations.
_CODE_BYTES = 240 << 20
# Live activations of one layer, in hidden widths per token: residual, norms, q/k/v, attention, gate and up.
_WIDTHS_PER_TOKEN = 24


def estimate(
    n_rows: int | None,
    partition_rows: int,
    *,
    tokens_per_row: float,
    top_k: int,
    vocab_size: int,
    extras: records.Extras = records.NO_EXTRAS,
    target_share: float = 1.0,
    parameters: int,
    hidden_width: int,
    bytes_per_value: int,
    batch_tokens: int,
    head_rows: int,
    scratch_rows: int,
    device: str = "cpu",
) -> Estimate:
    """Estimate the resources of a plan.

    Parameters
    ----------
    n_rows
        Total rows. None: unknown.
    partition_rows
        Rows of a partition.
    parameters, hidden_width, bytes_per_value
        Sizes of the teacher.
    tokens_per_row
        Mean of a sample.
    top_k, vocab_size, batch_tokens, head_rows
        Resolved settings.
    extras
        Optional arrays.
    target_share
        Share of the positions that get targets.
    scratch_rows
        Positions whose float32 exponentials exist at one time.
    device
        ``cpu`` or ``cuda``.
    """
    per_token = records.bytes_per_token(top_k, vocab_size, extras)
    rows = partition_rows if n_rows is None else n_rows
    tokens = round(rows * tokens_per_row)
    cache_bytes = round(tokens * records.bytes_per_token(top_k, vocab_size, extras, target_share)) + rows * 24
    batch = batch_tokens * hidden_width * _WIDTHS_PER_TOKEN * bytes_per_value
    head = head_rows * vocab_size * bytes_per_value + scratch_rows * vocab_size * 4
    partition_tokens = min(partition_rows, rows) * tokens_per_row
    process = _PROCESS_BYTES + (_CODE_BYTES if device == "cpu" and bytes_per_value < 4 else 0)
    return Estimate(
        tokens=None if n_rows is None else tokens,
        cache_bytes=cache_bytes,
        peak_disk_bytes=2 * cache_bytes,
        worker_bytes=round(parameters * bytes_per_value + batch + head + 2 * partition_tokens * per_token + process),
        partition_tokens=partition_tokens,
        target_share=target_share,
    )


def fingerprint(what: Mapping[str, Any]) -> str:
    """Digest the settings that determine the result. Runs with equal fingerprints may share a folder.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    text = json.dumps(what, sort_keys=True, ensure_ascii=False)
    # Lone surrogates are in paths that are not UTF-8.
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()
