"""Settings and data → a prepared job: all that can be known, and refused, before the first forward pass.

Nothing on disk changes here, so ``plan`` is this and a printout.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from dask_logits.capture.calibrate import auto_budgets
from dask_logits.capture.corpus import Corpus, open_corpus
from dask_logits.capture.teacher import TeacherFacts, inspect_teacher, resolve_dtype
from dask_logits.capture.tokens import Tokenizer, TokenizerSpec, inspect_tokenizer, tokenize
from dask_logits.capture.topk import scratch_rows
from dask_logits.config import Config
from dask_logits.errors import CapacityError, ConfigError, RunConflictError
from dask_logits.job.cluster import joins_scheduler, local_device, local_workers
from dask_logits.job.manifest import RUN_NAMES, RunFolder, compare
from dask_logits.job.plan import Estimate, Plan, TeacherShape, auto_partition_rows, estimate, fingerprint

if TYPE_CHECKING:
    from datasets import Dataset

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Left to the machine when memory is compared.
_HEADROOM = 0.95


@dataclass(frozen=True, kw_only=True)
class Job:
    """A prepared job.

    Parameters
    ----------
    config
        Its settings.
    run
        Its folder.
    corpus, tokenizer, tokenizer_spec, teacher
        What was found.
    plan, estimate
        How rows are cut, and what that takes.
    what, numerics
        What is computed, and the numerics asked for: both recorded, compared on resume.
    device, n_workers
        Expected for a cluster on this machine; n_workers is 0 where a scheduler is joined.
    """

    config: Config
    run: RunFolder
    corpus: Corpus
    tokenizer: Tokenizer | None
    tokenizer_spec: TokenizerSpec
    teacher: TeacherFacts
    plan: Plan
    estimate: Estimate
    what: dict[str, Any]
    numerics: dict[str, Any]
    device: str
    n_workers: int

    @property
    def fingerprint(self) -> str:
        """Digest of what is computed."""
        return fingerprint(self.what)


def prepare(config: Config, dataset: Dataset | None = None) -> Job:
    """Look at teacher, tokenizer and data and draw up the plan.

    Parameters
    ----------
    config
        Validated settings.
    dataset
        An opened dataset, instead of ``dataset.name``.

    Raises
    ------
    DaskLogitsError
        Whatever the user has to change: a setting, the teacher, the data, the device.
    """
    generation = config.teacher.generation
    joins = joins_scheduler(config.cluster)
    device = ("cuda" if generation.device == "cuda" else "cpu") if joins else local_device(generation, config.cluster)
    teacher = inspect_teacher(config.teacher)
    corpus = open_corpus(config.dataset, dataset)
    tokenizer, spec = inspect_tokenizer(
        config.teacher, config.dataset, is_text=corpus.is_text, head_width=teacher.head_width
    )
    _check_bounds(config, teacher, spec.vocab_size)

    sample = [tokenize([value], spec, first_row=row)[0] for row, value in corpus.sample()]
    tokens_per_row = sum(len(document) for document in sample) / len(sample)
    rows = config.partition.rows
    plan = Plan(
        n_rows=corpus.n_rows,
        partition_rows=auto_partition_rows(corpus.n_rows, tokens_per_row) if rows == "auto" else int(rows),
    )
    batch_tokens, head_rows = auto_budgets(device, generation.batch_tokens, generation.head_rows)
    dtype = resolve_dtype(config.teacher.dtype, teacher.checkpoint_dtype, device)
    cost = estimate(
        plan,
        tokens_per_row=tokens_per_row,
        top_k=generation.top_k,
        vocab_size=spec.vocab_size,
        teacher=TeacherShape(
            parameters=teacher.parameters,
            hidden_width=teacher.hidden_width,
            head_width=teacher.head_width,
            layers=teacher.layers,
            bytes_per_value=_BYTES[dtype],
        ),
        batch_tokens=max(batch_tokens, max((len(document) for document in sample), default=1)),
        head_rows=head_rows,
        scratch_rows=scratch_rows(head_rows, device),
    )
    return Job(
        config=config,
        run=RunFolder(Path(config.teacher.cache_dir).expanduser().absolute()),
        corpus=corpus,
        tokenizer=tokenizer,
        tokenizer_spec=spec,
        teacher=teacher,
        plan=plan,
        estimate=cost,
        what={
            "teacher.content": teacher.identity,
            "teacher.tokenizer": tokenizer.digest if tokenizer and corpus.is_text else None,
            "teacher.generation.top_k": generation.top_k,
            "dataset.content": corpus.content_digest,
            "dataset.rows": corpus.n_rows,
            "dataset.column": "text" if corpus.is_text else "input_ids",
            "dataset.max_length": config.dataset.max_length,
            "dataset.add_special_tokens": config.dataset.add_special_tokens if corpus.is_text else None,
            "dataset.vocab_size": spec.vocab_size,
            "partition.rows": plan.partition_rows,
        },
        numerics={
            "teacher.dtype": config.teacher.dtype,
            "teacher.generation.batch_size": generation.batch_size,
            "teacher.generation.batch_tokens": generation.batch_tokens,
            "teacher.generation.head_rows": generation.head_rows,
            "teacher.generation.torch_threads": generation.torch_threads,
        },
        device=device,
        n_workers=0 if joins else local_workers(generation, device),
    )


def check_folder(job: Job) -> None:
    """Refuse a run folder that cannot be written, or that was made with other settings.

    Raises
    ------
    RunConflictError
        With the differences.
    ConfigError
        If the folder cannot be written.
    """
    parent = next(folder for folder in (job.run.path, *job.run.path.parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError.from_problems(
            [
                f"distillation.teacher.cache_dir: expected a folder that can be written, got {str(job.run.path)!r} "
                f"({str(parent)!r} is not); choose another"
            ]
        )
    manifest = job.run.manifest()
    if manifest is None:
        foreign = [name for name in RUN_NAMES if (job.run.path / name).exists()]
        if foreign:
            raise RunConflictError(
                f"{job.run.path}: expected run.json beside {foreign}, which a run would take for its own, got none; "
                "choose another distillation.teacher.cache_dir"
            )
    elif not job.config.teacher.generation.force_regenerate:
        compare(job.run.path, manifest["what"] | manifest["numerics"], job.what | job.numerics)


def check_capacity(job: Job, done: float = 0.0) -> None:
    """Refuse a job that cannot fit.

    Parameters
    ----------
    job
        The job.
    done
        Share of its rows that is committed already.

    Raises
    ------
    CapacityError
        With the arithmetic.
    """
    need = round(job.estimate.peak_disk_bytes - job.estimate.cache_bytes * done)
    free = free_disk_bytes(job.run.path)
    if need > free:
        raise CapacityError(
            f"distillation.teacher.cache_dir: expected {gib(need)} free for {job.estimate.tokens:,} tokens (partitions "
            f"and cache side by side), got {gib(free)}; free space, or lower top_k or dataset.max_samples",
            need,
            free,
        )
    if job.device == "cpu" and job.n_workers:
        need = job.estimate.worker_bytes * job.n_workers
        free = free_memory_bytes()
        if need > free * _HEADROOM:
            raise CapacityError(
                f"distillation.teacher.generation.num_workers: expected {gib(need)} of memory for {job.n_workers} "
                f"workers of {gib(job.estimate.worker_bytes)}, got {gib(free)}; use fewer workers, a smaller "
                "batch_tokens or partition.rows, or a smaller teacher",
                need,
                free,
            )


def free_disk_bytes(path: Path) -> int:
    """Return what is free on the disk a folder lies (or would lie) on."""
    parent = next(folder for folder in (path, *path.parents) if folder.exists())
    return shutil.disk_usage(parent).free


def free_memory_bytes() -> int:
    """Return the memory processes may still take, by the machine and by its control group."""
    available = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()).isdigit():
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
        available = min(available, int(limit) - used)
    return available


def gib(count: float) -> str:
    """Write bytes for people.

    >>> gib(3 << 30), gib(5 << 20)
    ('3.0 GiB', '5.0 MiB')
    """
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _check_bounds(config: Config, teacher: TeacherFacts, vocab_size: int) -> None:
    problems = []
    if config.teacher.generation.top_k > vocab_size:
        problems.append(
            f"distillation.teacher.generation.top_k: expected at most the valid vocabulary {vocab_size}, "
            f"got {config.teacher.generation.top_k}"
        )
    if teacher.max_positions is not None and config.dataset.max_length > teacher.max_positions:
        problems.append(
            f"distillation.dataset.max_length: expected at most the teacher's {teacher.max_positions} positions, "
            f"got {config.dataset.max_length}; set distillation.dataset.max_length={teacher.max_positions}"
        )
    if problems:
        raise ConfigError.from_problems(problems)


def plan_lines(job: Job) -> list[str]:
    """Write a plan for people: rows, partitions, and what they take beside what is free."""
    cost = job.estimate
    memory = (
        f"{gib(cost.worker_bytes)} for each of {job.n_workers} workers, {gib(free_memory_bytes())} free here"
        if job.device == "cpu" and job.n_workers
        else f"{gib(cost.worker_bytes)} for each worker's device"
    )
    return [
        f"run           {job.run.path}",
        f"teacher       {job.config.teacher.model_path}: {job.teacher.parameters / 1e6:,.0f} M parameters, "
        f"{job.teacher.head_width:,} logits, {job.tokenizer_spec.vocab_size:,} valid",
        f"rows          {job.plan.n_rows:,}",
        f"tokens        {cost.tokens:,} (from a sample)",
        f"partitions    {len(job.plan):,} of {job.plan.partition_rows:,} rows",
        f"cache         {gib(cost.cache_bytes)}",
        f"peak disk     {gib(cost.peak_disk_bytes)}, {gib(free_disk_bytes(job.run.path))} free",
        f"peak memory   {memory}",
    ]
