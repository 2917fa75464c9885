"""Prepare a job from settings and data, with all checks that are possible before the first forward pass.

Nothing on disk is changed, so ``plan`` only calls this module and prints the result.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dask_logits.cache.profile import earns
from dask_logits.config.checks import stride_problems
from dask_logits.config.groups import DEFAULT_MAX_LENGTH, GenerationConfig
from dask_logits.config.root import Config, settings
from dask_logits.config.setting import flat
from dask_logits.data.arrow import open_corpus
from dask_logits.data.items import ItemSettings
from dask_logits.data.open import is_stream, open_stream
from dask_logits.data.parquet import ParquetStream
from dask_logits.data.source import Source
from dask_logits.data.tokens import (
    Documents,
    Tokenizer,
    TokenizerSpec,
    inspect_tokenizer,
    sample_documents,
)
from dask_logits.data.values import BadRow
from dask_logits.errors import ConfigError, DatasetError, RunConflictError
from dask_logits.job.workers import joins_scheduler, local_device, local_workers
from dask_logits.records import Extras
from dask_logits.run.folder import RUN_NAMES, RunFolder, Share, check_previous, compare
from dask_logits.run.plan import Estimate, auto_partition_rows, estimate, fingerprint
from dask_logits.run.plan_log import PlanLog
from dask_logits.run.records import Manifest
from dask_logits.run.timings import plural
from dask_logits.teacher.checkpoint import TeacherFacts, inspect_teacher, resolve_dtype
from dask_logits.teacher.topk import scratch_rows
from dask_logits.worker.calibrate import auto_budgets

logger = logging.getLogger(__name__)

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# First rows, in which a column must not be empty.
_LOOKED_AT_ROWS = 10_000


@dataclass(frozen=True, kw_only=True)
class Job:
    """A prepared job.

    Parameters
    ----------
    config
        Settings of the job.
    run, share
        Run folder, and the partitions assigned to this driver.
    source, tokenizer, tokenizer_spec, items, teacher
        Inspected inputs, and the conversion of rows to items.
    n_rows, rows_note
        Number of rows if known, and its origin.
    partition_rows, estimate
        Partition size, and estimated resources.
    what, numerics
        Settings that determine the result, and requested numerics. Both are recorded and compared on resume.
    device, n_workers
        Expected values for a local cluster. n_workers is 0 if a scheduler is joined.
    only
        Partitions to compute. None: all missing ones.
    bisects
        Search for the rows that make a partition fail.
    """

    config: Config
    run: RunFolder
    share: Share
    source: Source
    tokenizer: Tokenizer | None
    tokenizer_spec: TokenizerSpec
    items: ItemSettings
    teacher: TeacherFacts
    n_rows: int | None
    rows_note: str
    partition_rows: int
    estimate: Estimate
    what: dict[str, Any]
    numerics: dict[str, Any]
    device: str
    n_workers: int
    only: frozenset[int] | None = None
    bisects: bool = False

    @property
    def fingerprint(self) -> str:
        """Digest of the settings that determine the result, except for the rows, which the plan identifies."""
        return fingerprint(self.what)

    @property
    def is_compact(self) -> bool:
        """Whether the cache has the profile compact."""
        wanted = self.config.cache.profile
        if wanted != "auto":
            return wanted == "compact"
        vocab_size, cost = self.tokenizer_spec.vocab_size, self.estimate
        targets = None if cost.tokens is None else round(cost.tokens * cost.target_share)
        top_k = self.config.teacher.generation.width(vocab_size)
        return earns(top_k, vocab_size, targets, cost.partition_tokens * cost.target_share)


def prepare(
    config: Config,
    dataset: Any = None,
    *,
    on_step: Callable[[str], None] = lambda step: None,
    count_seconds: float = 0.0,
) -> Job:
    """Inspect teacher, tokenizer and data, and build the job.

    Parameters
    ----------
    config
        Validated settings.
    dataset
        An opened dataset or a stream of rows, instead of ``dataset.name``.
    on_step
        Called with a description of each step when it begins.
    count_seconds
        Time limit for counting the rows of a Parquet stream for the estimate. 0: no counting.

    Raises
    ------
    DaskLogitsError
        If the user must change a setting, the teacher, the data or the device.
    """
    generation = config.teacher.generation
    run = RunFolder(Path(config.teacher.cache_dir).expanduser().absolute())
    manifest = None if generation.force_regenerate else run.manifest()
    joins = joins_scheduler(config.cluster)
    device = ("cuda" if generation.device == "cuda" else "cpu") if joins else local_device(generation, config.cluster)
    on_step("reading the teacher's configuration and weight files")
    teacher = inspect_teacher(config.teacher, manifest.teacher if manifest else None)
    config = _with_max_length(config, teacher, manifest)
    on_step("opening the dataset")
    source: Source
    if config.dataset.streaming or is_stream(dataset):
        source = open_stream(config.dataset, dataset, manifest.commit if manifest else None)
    else:
        source = open_corpus(config.dataset, dataset)
    # The settings have the same names.
    names = [field.name for field in dataclasses.fields(ItemSettings)]
    items = ItemSettings(**{name: getattr(config.dataset, name) for name in names})
    on_step("reading the tokenizer, tokenizing a sample of the rows")
    tokenizer, spec = inspect_tokenizer(
        config.teacher,
        config.dataset,
        column=source.column,
        head_width=teacher.head_width,
        max_length=items.kept_tokens,
        template_date=manifest.template_date if manifest else None,
    )
    items = _with_separator(items, tokenizer, spec.vocab_size)
    _check_bounds(config, teacher, spec.vocab_size)

    logger.info("documents are taken from the column %r", source.column.name)
    documents = list(sample_documents(source.sample(), spec))
    _warn_of_double_bos(documents)
    sample = [tokens for one in documents for tokens in one.tokens]
    tokens_per_row = sum(len(document) for document in sample) / max(1, len(sample))
    if not tokens_per_row:
        _check_filled(source)
    elif spec.is_masked and not any(mask[1:].any() for one in documents for mask in one.masks or ()):
        raise DatasetError(
            f"distillation.dataset.{'mask_column' if source.column.mask else 'messages_column'}: expected tokens that "
            f"a student learns, got none in {plural(len(documents), 'row')} of a sample; "
            + ("check the mask" if source.column.mask else "give chats with turns of the role 'assistant'")
        )
    partition_rows = _partition_rows(config, source, tokens_per_row, manifest)
    extras = Extras(
        draws=generation.n_draws,
        temperatures=generation.temperatures,
        is_masked=spec.is_masked,
        has_target_pos=generation.positions != "all",
    )
    batch_tokens, head_rows = auto_budgets(device, generation.batch_tokens, generation.head_rows)
    dtype = resolve_dtype(config.teacher.dtype, teacher.checkpoint_dtype, device)
    longest = max((len(document) for document in sample), default=1)
    n_rows, rows_note = source.n_rows, " at most" if source.streams and source.n_rows is not None else ""
    if count_seconds and isinstance(source, ParquetStream):
        on_step("counting rows in the footers of the Parquet files")
        n_rows, rows_note = _counted(source, count_seconds)
    cost = estimate(
        n_rows,
        partition_rows,
        tokens_per_row=tokens_per_row,
        top_k=generation.width(spec.vocab_size),
        vocab_size=spec.vocab_size,
        extras=extras,
        target_share=_target_share(generation, documents),
        parameters=teacher.parameters,
        hidden_width=teacher.hidden_width,
        bytes_per_value=_BYTES[dtype],
        batch_tokens=max(batch_tokens, min(longest, items.max_length)),
        head_rows=head_rows,
        scratch_rows=scratch_rows(head_rows, device),
        device=device,
    )
    return Job(
        config=config,
        run=run,
        share=Share(worker=generation.worker_id or 0, total=generation.total_workers or 1),
        source=source,
        tokenizer=tokenizer,
        tokenizer_spec=spec,
        items=items,
        teacher=teacher,
        n_rows=n_rows,
        rows_note=rows_note,
        partition_rows=partition_rows,
        estimate=cost,
        what={
            "teacher.content": teacher.identity,
            "teacher.tokenizer": tokenizer.digest if tokenizer and source.column.kind != "ids" else None,
            "teacher.generation.top_k": generation.width(spec.vocab_size),
            **_identity_of_draws(generation),
            "teacher.generation.temperatures": list(generation.temperatures),
            "teacher.generation.positions": generation.positions,
            "teacher.generation.position_share": (
                generation.target_share if generation.positions == "entropy" else None
            ),
            **source.identity(),
            "dataset.column": source.column.name,
            "dataset.mask_column": source.column.mask,
            "dataset.learn": config.dataset.learn if source.column.kind == "chat" else None,
            "dataset.chat_template": spec.chat_template,
            "dataset.on_bad_row": config.dataset.on_bad_row,
            "dataset.add_special_tokens": config.dataset.add_special_tokens if source.column.kind == "text" else None,
            "dataset.vocab_size": spec.vocab_size,
            **{f"dataset.{name}": value for name, value in dataclasses.asdict(items).items()},
            "partition.rows": partition_rows,
        },
        numerics=_numerics(config),
        device=device,
        n_workers=0 if joins else local_workers(generation, config.cluster, device),
    )


def _numerics(config: Config) -> dict[str, Any]:
    """Return the settings that move the last bits. The device is compared as the calibration found it."""
    values = flat(config.model_dump())
    names = [each.path for each in settings() if each.kind == "numerics" and not each.path.endswith(".device")]
    return {name.removeprefix("distillation."): values[name] for name in names}


def _identity_of_draws(generation: GenerationConfig) -> dict[str, Any]:
    """Return the settings that determine draws. A run of the most probable tokens is older than they are."""
    if not generation.n_draws:
        return {}
    return {
        "teacher.generation.targets": generation.targets,
        "teacher.generation.draws": generation.n_draws,
        "teacher.generation.seed": generation.draw_seed,
    }


def _target_share(generation: GenerationConfig, documents: Sequence[Documents]) -> float:
    """Return the share of a sample's positions that get targets."""
    masks = [mask for one in documents for mask in one.masks or ()]
    learned = sum(int(mask[1:].sum()) for mask in masks) / max(1, sum(len(mask) for mask in masks))
    return generation.target_share * (learned if masks and generation.positions != "all" else 1.0)


def _counted(source: ParquetStream, seconds: float) -> tuple[int, str]:
    """Return the rows of a Parquet stream, extrapolated from the files counted in time."""
    counted, n_files = source.count_rows(seconds)
    limit = source.n_rows
    if limit is not None and counted >= limit:
        return limit, ""
    if n_files == len(source.files):
        return counted, ", by the footers"
    rows = counted * len(source.files) // n_files
    rows = rows if limit is None else min(rows, limit)
    return rows, f", estimated from {n_files:,} of {plural(len(source.files), 'file')}"


def _check_filled(source: Source) -> None:
    """Refuse rows that are insufficient even for the calibration."""
    looked_at = 0
    for value in itertools.islice(source.head(), _LOOKED_AT_ROWS):
        if value and not isinstance(value, BadRow):
            return
        looked_at += 1
    raise DatasetError(
        f"distillation.dataset.text_column: expected text or ids in {source.column.name!r}, got null or nothing in "
        f"{plural(looked_at, 'row')} at the beginning; name another column"
    )


def _with_max_length(config: Config, teacher: TeacherFacts, manifest: Manifest | None) -> Config:
    """Determine ``max_length``. An existing run keeps its original value."""
    dataset = config.dataset
    if dataset.max_length != "auto":
        return config
    settled = manifest.what.get("dataset.max_length") if manifest else None
    length = (
        settled if isinstance(settled, int) else min(DEFAULT_MAX_LENGTH, teacher.max_positions or DEFAULT_MAX_LENGTH)
    )
    if dataset.window_stride is not None and (problems := stride_problems(dataset.window_stride, length)):
        raise ConfigError.from_problems(*problems)
    return config.model_copy(update={"dataset": dataset.model_copy(update={"max_length": length})})


def _warn_of_double_bos(documents: Sequence[Documents]) -> None:
    count = sum(one.n_double_bos for one in documents)
    if count:
        logger.warning(
            "%d of %d texts in a sample already begin with the token that the tokenizer adds at the beginning, so they "
            "have it twice; set distillation.dataset.add_special_tokens=false if the text brings its special tokens",
            count,
            len(documents),
        )


def _with_separator(items: ItemSettings, tokenizer: Tokenizer | None, vocab_size: int) -> ItemSettings:
    """Determine the token between packed documents."""
    if items.packing == "none":
        return items
    separator = items.separator_id
    if separator is None and tokenizer is not None:
        separator = tokenizer.end_id
    if separator is None or separator >= vocab_size:
        raise ConfigError.from_problems(
            f"distillation.dataset.separator_id: expected a token id below {vocab_size} for packing=concat, got "
            f"{separator}, and the tokenizer names none that ends a text; set it"
        )
    return dataclasses.replace(items, separator_id=separator)


def _partition_rows(config: Config, source: Source, tokens_per_row: float, manifest: Manifest | None) -> int:
    """Return the rows of a partition. A value chosen by ``auto`` is kept, even if the number of rows has changed."""
    if source.streams:
        return config.dataset.streaming_chunk_size
    if config.partition.rows != "auto":
        return int(config.partition.rows)
    if manifest is not None and "partition.rows" in manifest.what:
        return int(manifest.what["partition.rows"])
    return auto_partition_rows(source.n_rows or 1, tokens_per_row)


def check_folder(job: Job, *, writes: bool = True) -> None:
    """Refuse a run folder that cannot be written, or that was made with other settings or rows.

    Parameters
    ----------
    job
        The job with the folder.
    writes
        Whether the folder will be written.

    Raises
    ------
    RunConflictError
        With the differences.
    ConfigError
        If the folder cannot be written.
    """
    for folder in (job.run.path, *job.run.path.parents):
        if folder.is_symlink() and not folder.exists():
            raise ConfigError.from_problems(
                f"distillation.teacher.cache_dir: expected a folder, got {str(folder)!r}, a link to "
                f"{str(folder.readlink())!r}, which does not exist; mount or make that, or choose another"
            )
    parent = next(folder for folder in (job.run.path, *job.run.path.parents) if folder.exists())
    if writes and not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise ConfigError.from_problems(
            f"distillation.teacher.cache_dir: expected a folder that can be written, got {str(job.run.path)!r} "
            f"({str(parent)!r} is not); choose another"
        )
    manifest = job.run.manifest()
    if manifest is None:
        # A driver killed during its calibration leaves its status record.
        ours = job.run.driver_statuses()
        foreign = [name for name in RUN_NAMES if (job.run.path / name).exists() and name not in ours]
        if foreign:
            raise RunConflictError(
                f"{job.run.path}: expected run.json beside {foreign}, which a run would take for its own, got none; "
                "choose another distillation.teacher.cache_dir"
            )
    elif job.config.teacher.generation.force_regenerate:
        check_previous(job.run)
    else:
        shares = "teacher.generation.total_workers"
        compare(
            job.run.path,
            manifest.what | manifest.numerics | {shares: manifest.total_workers},
            job.what | job.numerics | {shares: job.share.total},
        )
        job.source.check(PlanLog(job.run))


def _check_bounds(config: Config, teacher: TeacherFacts, vocab_size: int) -> None:
    problems = []
    if config.teacher.generation.width(vocab_size) > vocab_size:
        problems.append(
            f"distillation.teacher.generation.top_k: expected at most {vocab_size}, the number of token ids, got "
            f"{config.teacher.generation.top_k}; set distillation.teacher.generation.top_k={vocab_size} or less"
        )
    if (
        teacher.max_positions is not None
        and config.dataset.max_length != "auto"
        and config.dataset.max_length > teacher.max_positions
    ):
        problems.append(
            f"distillation.dataset.max_length: expected at most the teacher's {teacher.max_positions} positions, "
            f"got {config.dataset.max_length}; set distillation.dataset.max_length={teacher.max_positions}"
        )
    if problems:
        raise ConfigError.from_problems(*problems)
