"""The groups of settings: frozen pydantic models that declare each setting, its type, its default and its bounds.

``scripts/write_settings.py`` writes ``config/distillation/default.yaml`` and ``docs/SETTINGS.md`` from these models.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dask_logits.config.setting import Group, declare
from dask_logits.fields import MOST_DRAWS, MOST_TEMPERATURES

# Default of `dataset.max_length`, for teachers with more positions.
DEFAULT_MAX_LENGTH = 2048
# Default of `position_share` with positions=entropy: the share of arXiv 2602.01395.
DEFAULT_POSITION_SHARE = 0.2
# Default of `draws` with targets=sample: that of arXiv 2503.16870.
DEFAULT_DRAWS = 50


def _joined(value: Any) -> Any:
    """Join GPUs that are given as a number or a list with commas."""
    items = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value
    is_list = isinstance(items, list | tuple) and items and all(type(item) in (str, int) for item in items)
    return ",".join(str(item).strip() for item in items) if is_list else value


def _without_one(value: Any) -> Any:
    """Sort temperatures, and drop 1, which every cache has."""
    items = [value] if isinstance(value, int | float) else value
    if not isinstance(items, list | tuple) or any(type(item) not in (int, float) for item in items):
        return value
    return tuple(sorted({float(item) for item in items} - {1.0}))


Auto = Literal["auto"]
# The titles name the types in messages and in the documentation.
PositiveInt = Annotated[int, Field(ge=1, title="int ≥ 1")]
NonNegativeInt = Annotated[int, Field(ge=0, title="int ≥ 0")]
Files = Annotated[
    tuple[str, ...],
    Field(min_length=1, strict=False, title="list of str"),
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
]
Draws = Annotated[int, Field(ge=1, le=MOST_DRAWS, title=f"int from 1 to {MOST_DRAWS}")]
Fraction = Annotated[float, Field(gt=0, le=1, title="float > 0 and ≤ 1")]
Words = Annotated[tuple[str, ...], Field(min_length=1, strict=False, title="list of str")]
Temperatures = Annotated[
    tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...],
    Field(max_length=MOST_TEMPERATURES, strict=False, title="list of float > 0"),
    BeforeValidator(_without_one),
]


class GenerationConfig(Group):
    """``distillation.teacher.generation``: scoring by the teacher."""

    @property
    def target_share(self) -> float:
        """Share of the scored positions that keep their targets."""
        if self.positions != "entropy":
            return 1.0
        return DEFAULT_POSITION_SHARE if self.position_share is None else self.position_share

    @property
    def n_draws(self) -> int:
        """Number of draws per position, 0 if the targets are the most probable tokens."""
        if self.targets != "sample":
            return 0
        return DEFAULT_DRAWS if self.draws is None else self.draws

    @property
    def draw_seed(self) -> int:
        """Seed of the draws."""
        return 0 if self.seed is None else self.seed

    def width(self, vocab_size: int) -> int:
        """Return the most entries that a position can have.

        >>> GenerationConfig().width(49_152), GenerationConfig(targets="sample").width(40)
        (64, 40)
        """
        return min(self.n_draws, vocab_size) if self.n_draws else self.top_k

    targets: Literal["topk", "sample"] = declare("topk", "what")
    """topk: the most probable tokens of each position. sample: tokens drawn from the teacher's whole distribution, with
    the number of times that each was drawn."""
    top_k: PositiveInt = declare(64, "what")
    """Number of entries kept per position, most probable first. Only with `targets=topk`."""
    draws: Draws | None = declare(None, "what")
    """Number of draws per position with `targets=sample`. null: 50, of which 10 to 20 are distinct."""
    seed: NonNegativeInt | None = declare(None, "what")
    """Seed of the draws with `targets=sample`. null: 0."""
    temperatures: Temperatures = declare((), "what")
    """Further temperatures for training students, such as `[2]`. For each, the tail's mass is stored. Temperature 1 is
    always there."""
    positions: Literal["all", "labels", "entropy"] = declare("all", "what")
    """Positions that get targets. labels: those whose next token a student learns, by a mask. entropy: those where the
    teacher's distribution has the highest entropy, among those that a student learns."""
    position_share: Fraction | None = declare(None, "what")
    """Share of the positions of each document, text window or packed block that get targets with `positions=entropy`.
    null: 0.2."""
    batch_size: PositiveInt | None = declare(None, "numerics")
    """Maximum number of documents in a batch. null: as many as `batch_tokens` allows, at most 65,535."""
    batch_tokens: Auto | PositiveInt = declare("auto", "numerics")
    """Maximum number of tokens in a forward pass, with padding. auto: the calibration decides."""
    head_rows: Auto | PositiveInt = declare("auto", "numerics")
    """Number of positions per row chunk of the head. auto: 256 on CPUs, 4,096 on GPUs."""
    torch_threads: Auto | PositiveInt = declare("auto", "numerics")
    """Number of CPU threads of each worker. auto: the cores divided by the workers."""
    device: Literal["auto", "cpu", "cuda"] = declare("auto", "numerics")
    """Device of the teacher. auto: cuda if a GPU is visible, otherwise cpu."""
    force_regenerate: bool = declare(False, "how")
    """Recompute the run in this folder. The old run is deleted when the new one is complete."""
    num_workers: PositiveInt | None = declare(None, "how")
    """Number of Dask workers. null: one per GPU, or one per 2 cores without a GPU."""
    devices: Annotated[str, Field(title="str"), BeforeValidator(_joined)] | None = declare(None, "how")
    """GPUs to use, as `[0,1]` or `'0,1'`. null: all visible GPUs."""
    gpus_per_worker: PositiveInt = declare(1, "numerics")
    """Number of GPUs per worker. The teacher's layers are spread over them."""
    worker_id: NonNegativeInt | None = declare(None, "how")
    """Index of this static worker, from 0. null: the job runs on a Dask cluster."""
    total_workers: PositiveInt | None = declare(None, "how")
    """Number of static workers that share the job. It stays the same when a run is resumed. null: the job runs on a
    Dask cluster."""


class TeacherConfig(Group):
    """``distillation.teacher``: the model, and the folder for its targets."""

    model_path: str | None = declare(None, "what")
    """Folder or hub name of a causal language model. It is required, so null is refused."""
    revision: str | None = declare(None, "what")
    """Branch, tag or commit of a hub teacher, or of the hub model that an adapter belongs to. null: the one that the
    adapter names, or the default branch. The run keeps the commit."""
    tokenizer_path: str | None = declare(None, "what")
    """Folder or hub name of the tokenizer. null: the same as `model_path`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = declare("auto", "numerics")
    """Data type of the weights. auto: the checkpoint's type, or float32 without bfloat16 units."""
    trust_remote_code: bool = declare(False, "what")
    """Run Python code that comes with the checkpoint."""
    allow_pickle: bool = declare(False, "how")
    """Load weights that are not in safetensors. A pickled checkpoint can run any code."""
    cache_dir: str = declare("output/teacher_logits", "how")
    """The run folder. The job writes all its files there."""
    generation: GenerationConfig = GenerationConfig()


class DatasetConfig(Group):
    """``distillation.dataset``: the documents."""

    @property
    def row_limit(self) -> int | None:
        """Number of rows to use, from the first. None: all."""
        return self.max_samples if isinstance(self.max_samples, int) else None

    @property
    def is_column_chosen(self) -> bool:
        """Whether a column of documents is requested."""
        return self.text_column is not None or self.messages_column is not None

    name: str | None = declare(None, "what")
    """Hub name, `save_to_disk` folder, folder of files, or a reader for `data_files` (`json`, `csv`, `tsv`, `text`,
    `parquet`, …). It is required, so null is refused unless a dataset object is passed."""
    config_name: str | None = declare(None, "what")
    """Configuration of a hub dataset, such as `wikitext-103-raw-v1`. null: its default configuration."""
    split: str = declare("train", "what")
    """Split. It can be a slice or a sum, such as `train[:10%]` or `train[:500]+test`."""
    revision: str | None = declare(None, "what")
    """Branch, tag or commit of a hub dataset. null: the default branch. The run keeps the commit."""
    data_files: Files | None = declare(None, "what")
    """Paths, globs or URLs of the files for a reader. null: the dataset's own files."""
    text_column: str | None = declare(None, "what")
    """Column of the documents, or a field such as `doc.text`. null: `text`, or `input_ids` if there is no `text`."""
    messages_column: str | None = declare(None, "what")
    """Column of chats, as lists of messages with `role` and `content`. The tokenizer's chat template renders them, with
    the row's `tools` if there are any. null: rows are no chats."""
    learn: Literal["assistant", "all"] = declare("assistant", "what")
    """Tokens of a chat that a student learns. assistant: the assistant's turns. all: every token."""
    mask_column: str | None = declare(None, "what")
    """Column beside token ids that says which of them a student learns: 1 or 0, or labels with -100. null: all."""
    on_bad_row: Literal["fail", "skip"] = declare("fail", "what")
    """What to do with an unusable row. fail: its partition fails. skip: the row becomes a document of 0 tokens."""
    add_special_tokens: bool = declare(True, "what")
    """Let the tokenizer add its special tokens."""
    vocab_size: PositiveInt | None = declare(None, "what")
    """Number of valid token ids. null: as many as the tokenizer can produce, or the width of the head without a
    tokenizer."""
    max_length: Auto | PositiveInt = declare("auto", "what")
    """Maximum number of tokens in a document, a text window or a packed block. auto: 2,048, or the teacher's positions
    if these are fewer."""
    long_documents: Literal["truncate", "window"] = declare("truncate", "what")
    """What to do with documents above `max_length`. truncate: cut them off. window: score them in text windows that
    keep every token once."""
    window_stride: PositiveInt | None = declare(None, "what")
    """Number of tokens that each further text window keeps. The rest of the window is context. null: `max_length`, so
    windows have no context."""
    packing: Literal["none", "concat"] = declare("none", "what")
    """none: each document is an item. concat: join documents with a separator and cut them into blocks of `max_length`
    tokens."""
    separator_id: NonNegativeInt | None = declare(None, "what")
    """Token id of the separator between packed documents. null: the token that ends a text."""
    max_samples: PositiveInt | Literal["all"] | None = declare(None, "how")
    """Number of rows to use, from the first. It can be raised later. null: all rows. A stream needs a number, or `all`.
    """
    streaming: bool = declare(False, "what")
    """Read the dataset as a stream, with constant memory and without a download before the start."""
    streaming_buffer_size: PositiveInt = declare(10_000, "how")
    """Number of documents of a stream that are read ahead of scoring."""
    streaming_chunk_size: PositiveInt = declare(1_000, "what")
    """Number of documents per partition of a stream."""
    num_proc: PositiveInt = declare(4, "how")
    """Number of processes that prepare the Arrow files of a hub dataset."""


class PartitionConfig(Group):
    """``distillation.partition``: the unit of work."""

    rows: Auto | PositiveInt = declare("auto", "what")
    """Number of dataset rows per partition. auto: about 256,000 tokens, fewer for a small dataset."""


class ScoringConfig(Group):
    """``distillation.scoring``: computation of the targets."""

    logits: Literal["exact", "model"] = declare("exact", "numerics")
    """exact: logits are float32 for every data type of the weights. model: logits are rounded as by the model."""
    compile: Literal["auto", "always", "never"] = declare("auto", "numerics")
    """Compile the teacher's layers. auto: compile if this saves time on this plan."""


class CacheConfig(Group):
    """``distillation.cache``: storage of the targets."""

    profile: Literal["auto", "plain", "compact"] = declare("auto", "numerics")
    """plain: full values that any HDF5 reader can read. compact: less than half the size. auto: compact, but plain for
    a tiny job."""
    precision: Literal[8, 10, 12] = declare(8, "numerics")
    """Bits per log-prob in the profile compact. 8 adds 4e-5 nats of KL, 10 adds 3e-6, 12 adds 2e-7."""
    max_file_size: int | str | None = declare(None, "how")
    """Maximum size of a cache file in bytes, or with a unit (`20GB`). A larger cache is split into shards with an
    index. null: one file."""


class SecurityConfig(Group):
    """``distillation.cluster.security``: TLS between scheduler, workers and driver."""

    ca_file: str | None = declare(None, "how")
    """PEM file with the certificate of the authority. null: no TLS. Set all three files or none."""
    cert: str | None = declare(None, "how")
    """PEM file with the certificate of the driver, and of each side of a local cluster. null: no TLS."""
    key: str | None = declare(None, "how")
    """PEM file with the private key of `cert`. null: no TLS."""


class ClusterConfig(Group):
    """``distillation.cluster``: where the job runs."""

    kind: Literal["auto", "local_cuda", "local_cpu", "scheduler", "serial"] = declare("auto", "how")
    """Kind of the cluster. auto: the scheduler if one is set, this process for a static worker, otherwise
    LocalCUDACluster if a GPU is visible, otherwise LocalCluster. serial: this process, without a cluster."""
    scheduler: str | None = declare(None, "how")
    """Address of a running scheduler, such as `tcp://10.0.0.1:8786`. null: start a local cluster."""
    scheduler_file: str | None = declare(None, "how")
    """File that `dask scheduler` wrote. null: use `scheduler`, or start a local cluster."""
    dashboard_address: str | None = declare("127.0.0.1:8787", "how")
    """Address of the dashboard of a local cluster. null: no dashboard."""
    wait_seconds: Annotated[float, Field(ge=0, title="float ≥ 0")] = declare(120.0, "how")
    """Seconds to wait for the first worker."""
    allow_mixed_workers: bool = declare(False, "how")
    """Also score on workers whose packages, instruction set or GPU model differ from the calibration's. Receipts record
    the difference."""
    security: SecurityConfig = SecurityConfig()


class JobConfig(Group):
    """``distillation.job``: failure handling."""

    retries: NonNegativeInt = declare(2, "how")
    """Number of further attempts at a partition after an I/O error or the death of its worker."""
    stall_seconds: Annotated[float, Field(ge=1, title="float ≥ 1")] = declare(1800.0, "how")
    """Seconds without progress after which the job stops with a diagnosis."""
    max_failures: PositiveInt = declare(5, "how")
    """Number of failed partitions that stop the job: the first ones, or so many in a row that cannot be read or written
    (and two for each worker)."""
    keep_partitions: bool = declare(False, "how")
    """Keep the Zarr partitions after the cache is complete."""
    notify_command: Words | None = declare(None, "how")
    """Command to call when a job is done or has failed, as a list of words. It reads a JSON message on stdin. null:
    none. A webhook's address comes from the environment (`DASK_LOGITS_WEBHOOK`)."""
    log_level: Literal["debug", "info", "warning", "error"] = declare("info", "how")
    """Lowest level of log messages."""


class Tree(Group):
    """``distillation``: the whole tree."""

    teacher: TeacherConfig = TeacherConfig()
    dataset: DatasetConfig = DatasetConfig()
    partition: PartitionConfig = PartitionConfig()
    scoring: ScoringConfig = ScoringConfig()
    cache: CacheConfig = CacheConfig()
    cluster: ClusterConfig = ClusterConfig()
    job: JobConfig = JobConfig()
