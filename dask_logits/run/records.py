"""The small JSON files of a run, as frozen models. Segments of the plan are in :mod:`dask_logits.run.plan`.

A field with a default may be absent from a file, and then stays absent when the record is written again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from dask_logits.cache.profile import Precision
from dask_logits.fields import Count, Digest, FileName, Finite, Flag, InnerPath, NumberOrInfinity, Record
from dask_logits.records import Statistics

FORMAT: Final = "dask_logits.run"
VERSION: Final = 4

# Each worker has a status file to check.
_Workers = Annotated[Count, Field(ge=1, le=1 << 16)]

_Date = Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]


class Manifest(Record):
    """``run.json``: what is computed, and how it was first run. A file of another version is refused."""

    format: Literal["dask_logits.run"] = Field(description="Name of the format.")
    version: Literal[4] = Field(description="Version of the format.")
    run_id: str = Field(description="Random id of the run.")
    created: Finite | None = Field(default=None, description="Unix time, in seconds.")
    fingerprint: str = Field(description="SHA-256 of `what`.")
    what: dict[str, Any] = Field(description="Dotted setting → value: what determines the targets. Fixed.")
    numerics: dict[str, Any] = Field(default={}, description="Dotted setting → value: requested numerics. Fixed.")
    total_workers: _Workers = Field(description="Static workers that share the run, 1 for a cluster.")
    commit: str | None = Field(default=None, description="Hub commit to which the dataset is pinned.")
    files: tuple[str, ...] = Field(default=(), description="State of each file of a stream: size, etag, time.")
    how: dict[str, Any] = Field(description="All settings of the first start, as nested objects.")
    teacher: dict[str, Any] = Field(default={}, description="Facts about the teacher: identity, revision, sizes.")
    tokenizer_map_digest: str | None = Field(
        default=None, description="Digest of the tokenizer's map from ids to tokens."
    )
    tokenizer_ids: Count = Field(default=0, description="Ids of the tokenizer, 0 if rows held ids.")
    template_date: _Date | None = Field(
        default=None, description="Date that the chat template prints. Null: it prints none."
    )

    def setting(self, name: str) -> Any:
        """Return a setting of the first start by its dotted name, or None if there is none."""
        value: Any = self.how
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value


class PathNumerics(Record):
    """The way from tokens to logits, as chosen by the self-check."""

    attention: str = Field(default="model", description="``blocks``, ``fused``, ``flex`` or ``model``.")
    head: str = Field(default="forward", description="How logits are computed from hidden states.")
    scale: Finite = Field(default=1.0, description="Factor of the logits.")
    softcap: Finite | None = Field(default=None, description="Soft cap of the logits. Null: none.")
    exact: Flag = Field(default=False, description="Whether logits are in float32.")
    compiled: Flag = Field(default=False, description="Whether layers run as compiled code.")
    kernels: Flag = Field(default=False, description="Whether targets are computed by Triton kernels.")


class Numerics(Record, extra="allow"):
    """What moves the last bits of the targets. Fixed by the calibration."""

    dtype: str = Field(description="Dtype of the teacher.")
    device: str = Field(description="``cpu`` or ``cuda``.")
    torch_threads: Count = Field(description="Threads of torch in a worker.")
    path: PathNumerics = Field(description="The way from tokens to logits.")
    batch_tokens: Count = Field(description="Token budget of a batch.")
    batch_size: Count | None = Field(default=None, description="Maximum sequences of a batch. Null: no limit.")
    head_rows: Count = Field(description="Positions whose logits exist at one time.")


class Storage(Record):
    """Storage profile of the targets."""

    profile: Literal["plain", "compact"] = Field(description="Name of the profile.")
    precision: Precision = Field(description="Bits of a log-prob in the compact profile.")
    id_table: Digest | None = Field(
        default=None, description="SHA-256 of the compact profile's id table in ``tables/``."
    )


class Calibration(Record, extra="allow"):
    """``calibration.json``: the numerics of a run, and measurements made before its first partition.

    A cache contains a copy. Unknown fields are kept, so that the copy is complete.
    """

    numerics: Numerics = Field(description="What moves the last bits of the targets.")
    errors_nats: dict[str, Finite | None] = Field(
        default={},
        description="Scoring path → its largest difference from the model's own forward. Null: it does not apply.",
    )
    refused: dict[str, str] = Field(default={}, description="Scoring path → reason why it is not used.")
    cost: dict[str, Finite] | None = Field(
        default=None, description="FLOPs of the teacher, and the device's peak rate."
    )
    trials_tokens_per_second: dict[str, Finite] = Field(
        default={}, description="Variant → speed. Empty: none was tried."
    )
    compile_seconds: Finite | None = Field(default=None, description="Compilation time. Null: nothing was compiled.")
    kept_mass_by_k: dict[str, Finite] | None = Field(
        default=None, description="k → mean probability of the k best tokens. Null for draws."
    )
    distinct_draws: Finite | None = Field(
        default=None, description="Mean number of distinct ids among the draws of a position. Null: no draws."
    )
    tokens: Count = Field(default=0, description="Scored tokens of the sample.")
    perplexity: NumberOrInfinity | None = Field(default=None, description="Teacher's perplexity on the sample.")
    tokens_per_second: Finite = Field(default=0.0, description="Speed of one worker.")
    mfu: Finite | None = Field(default=None, description="Share of the device's peak rate. Null: unknown.")
    seconds: dict[str, Finite] = Field(default={}, description="Stage → seconds.")
    peak_rss_bytes: Count | None = Field(default=None, description="Peak memory of the process.")
    peak_device_bytes: Count | None = Field(default=None, description="Peak memory of the largest GPU. Null: no GPU.")
    device_name: str | None = Field(default=None, description="Model of the CPU or GPU.")
    versions: dict[str, str] = Field(default={}, description="Package → version.")
    environment: dict[str, str] | None = Field(
        default=None, description="Software and hardware that workers must have in common. Null: not compared."
    )
    storage: Storage | None = Field(default=None, description="Storage profile. Null: plain.")
    mixed_workers: Flag = Field(default=False, description="Whether workers with other environments may score.")


class FailedAttempt(Record):
    """An attempt that failed before its partition was committed."""

    kind: str = Field(description="Category of the failure.")
    reason: str = Field(description="Its beginning, of at most 200 characters.")
    worker: str | None = Field(default=None, description="Address and host of the worker. Null: unknown.")
    at: Finite | None = Field(default=None, description="Unix time, in seconds.")


class Receipt(Record):
    """``receipts/…``: commits one partition."""

    partition: Count = Field(description="Index of the partition.")
    first_row: Count = Field(description="Its first dataset row.")
    n_rows: Count = Field(description="Its number of dataset rows.")
    run_id: str = Field(description="Id of the run.")
    attempt: FileName = Field(description="Folder of its arrays in ``partitions/``.")
    statistics: Statistics = Field(description="Sums over its targets.")
    content_digest: Digest = Field(description="Digest of its targets.")
    files: dict[InnerPath, tuple[Count, Count]] = Field(description="File below the folder → bytes and CRC-32.")
    seconds: dict[str, Finite] = Field(description="Stage → seconds.")
    flops: Finite = Field(description="FLOPs of its sequences, without padding.")
    mfu: Finite | None = Field(default=None, description="Share of the device's peak rate. Null: unknown.")
    padded_tokens: Count = Field(default=0, description="Tokens that were scored as padding.")
    splits: dict[str, Any] = Field(description="Batch → sizes into which it was split for lack of memory.")
    finished: Finite | None = Field(default=None, description="Unix time, in seconds.")
    host: str | None = Field(default=None, description="Host of the worker.")
    process: Count | None = Field(default=None, description="Process id of the worker.")
    peak_rss_bytes: Count | None = Field(default=None, description="Peak memory of the worker.")
    gpus: tuple[str, ...] = Field(default=(), description="Model and UUID of the worker's GPUs. Empty on a CPU.")
    environment: dict[str, str] | None = Field(
        default=None, description="Software and hardware of the worker, only if they differ from the calibration's."
    )
    failed_attempts: tuple[FailedAttempt, ...] = Field(
        default=(), description="Attempts that failed before, as known to the driver: the last 8 at most."
    )


class FailureEntry(Record):
    """``failures/…``: a partition that failed permanently."""

    index: Count | None = Field(default=None, description="Index of the partition.")
    kind: str = Field(description="Category of the failure.")
    reason: str = Field(description="Reason, in one sentence.")
    attempts: Count = Field(default=1, description="Number of attempts.")
    evidence: str = Field(default="", description="End of the traceback, or the place where its workers died.")
    workers: tuple[str, ...] = Field(
        default=(), description="Address and host of each worker on which it failed, in order."
    )
    rows: tuple[Count, ...] = Field(description="Dataset rows that are the cause. Empty: not searched, or not found.")
    at: Finite | None = Field(default=None, description="Unix time, in seconds.")


class DriverStatus(Record):
    """``status.json``: state and progress of a driver."""

    run: str | None = Field(default=None, description="The run folder. Only in announcements at a scheduler.")
    dashboard: str | None = Field(default=None, description="Address of the Dask dashboard.")
    partitions: Count | None = Field(default=None, description="Partitions of the driver's share. Null: unknown.")
    committed: Count | None = Field(default=None, description="Committed partitions of the share.")
    tokens: Count | None = Field(default=None, description="Scored tokens of the share.")
    tokens_per_second: Finite = Field(description="Speed of all workers, in wall-clock time.")
    seconds_left: Finite | None = Field(default=None, description="Time until the share is scored. Null: unknown.")
    since: Finite | None = Field(default=None, description="Start of the driver, Unix time in seconds.")
    at: Finite = Field(description="Time of this record, Unix time in seconds.")
    state: str = Field(
        description="``starting``, ``calibrating``, ``running``, ``consolidating``, ``stopped``, ``failed``, ``done``."
    )
    entered: dict[str, Finite] = Field(default={}, description="State → when the driver entered it, Unix time.")
    step: str | None = Field(default=None, description="Step of the calibration.")
    reason: str | None = Field(default=None, description="Reason why the driver failed.")
    failed: dict[str, str] = Field(
        default={}, description="Partition → beginning of the reason, for the first 20 permanent failures."
    )
    failures: Count = Field(default=0, description="Number of permanent failures.")
    running: tuple[Count, ...] = Field(default=(), description="Partitions that workers were given.")
    left_out: dict[str, str] | None = Field(default=None, description="Worker → reason why it gets no work.")
