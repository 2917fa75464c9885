"""The configuration: frozen pydantic models that declare every setting, its type, its default and its bounds.

Hydra composes the YAML tree (:mod:`dask_logits.hydra_config`). This module validates it without Hydra, so workers and
tests need only this module. All problems are reported at once, each with the dotted path of its setting.
``scripts/write_settings.py`` writes ``config/distillation/default.yaml`` and ``docs/SETTINGS.md`` from these models.

A setting has one of three kinds:

* ``what`` is computed: part of the run's identity. Another value in the same run folder is refused.
* ``numerics``: affects the last bits of the result. Resolved once by the calibration and frozen for the run.
* ``how`` it is run: may change on resume.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dask_logits.errors import ConfigError
from dask_logits.fields import MOST_DRAWS, MOST_TEMPERATURES

UNBOUNDED_STREAM = (
    "distillation.dataset.max_samples: expected a number of rows for a stream, got null. The stream may be endless. "
    "Set a number, or distillation.dataset.max_samples=all to read the stream to its end"
)

# A user name in a web address, a password (it may contain slashes, a port is not one), or a query with a token, a key
# or a signature.
_CREDENTIALS = re.compile(
    r"https?://[^/\s@?#]*@|://[^/\s@:]*:(?!\d+/)[^\s@]*@"
    r"|[?&;#][\w-]*(?:token|signature|secret|password|passwd|pwd|auth|jwt|credential|key|sig)=",
    re.IGNORECASE,
)

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


Kind = Literal["what", "numerics", "how"]
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


def _setting(default: Any, kind: Kind, doc: str) -> Any:
    """Declare a setting with its default, kind and description."""
    return Field(default, description=doc, json_schema_extra={"kind": kind})


class Group(BaseModel):
    """A group of settings. Values are never converted: ``"64"`` is no number and ``1`` is no truth value."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


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

    targets: Literal["topk", "sample"] = _setting(
        "topk",
        "what",
        "topk: the most probable tokens of each position. sample: tokens drawn from the teacher's whole distribution, "
        "with the number of times that each was drawn.",
    )
    top_k: PositiveInt = _setting(
        64, "what", "Number of entries kept per position, most probable first. Only with `targets=topk`."
    )
    draws: Draws | None = _setting(
        None, "what", "Number of draws per position with `targets=sample`. null: 50, of which 10 to 20 are distinct."
    )
    seed: NonNegativeInt | None = _setting(None, "what", "Seed of the draws with `targets=sample`. null: 0.")
    temperatures: Temperatures = _setting(
        (),
        "what",
        "Further temperatures for training students, such as `[2]`. For each, the tail's mass is stored. Temperature 1 "
        "is always there.",
    )
    positions: Literal["all", "labels", "entropy"] = _setting(
        "all",
        "what",
        "Positions that get targets. labels: those whose next token a student learns, by a mask. entropy: those where "
        "the teacher's distribution has the highest entropy, among those that a student learns.",
    )
    position_share: Fraction | None = _setting(
        None,
        "what",
        "Share of the positions of each document, text window or packed block that get targets with "
        "`positions=entropy`. null: 0.2.",
    )
    batch_size: PositiveInt | None = _setting(
        None, "numerics", "Maximum number of documents in a batch. null: only `batch_tokens` limits a batch."
    )
    batch_tokens: Auto | PositiveInt = _setting(
        "auto", "numerics", "Maximum number of tokens in a forward pass, with padding. auto: the calibration decides."
    )
    head_rows: Auto | PositiveInt = _setting(
        "auto", "numerics", "Number of positions per row chunk of the head. auto: 256 on CPUs, 4,096 on GPUs."
    )
    torch_threads: Auto | PositiveInt = _setting(
        "auto", "numerics", "Number of CPU threads of each worker. auto: the cores divided by the workers."
    )
    device: Literal["auto", "cpu", "cuda"] = _setting(
        "auto", "numerics", "Device of the teacher. auto: cuda if a GPU is visible, otherwise cpu."
    )
    force_regenerate: bool = _setting(
        False, "how", "Recompute the run in this folder. The old run is deleted when the new one is complete."
    )
    num_workers: PositiveInt | None = _setting(
        None, "how", "Number of Dask workers. null: one per GPU, or one per 2 cores without a GPU."
    )
    devices: Annotated[str, Field(title="str"), BeforeValidator(_joined)] | None = _setting(
        None, "how", "GPUs to use, as `[0,1]` or `'0,1'`. null: all visible GPUs."
    )
    gpus_per_worker: PositiveInt = _setting(
        1, "numerics", "Number of GPUs per worker. The teacher's layers are spread over them."
    )
    worker_id: NonNegativeInt | None = _setting(
        None, "how", "Index of this static worker, from 0. null: the job runs on a Dask cluster."
    )
    total_workers: PositiveInt | None = _setting(
        None,
        "how",
        "Number of static workers that share the job. It stays the same when a run is resumed. null: the job runs on a "
        "Dask cluster.",
    )


class TeacherConfig(Group):
    """``distillation.teacher``: the model, and the folder for its targets."""

    model_path: str | None = _setting(
        None, "what", "Folder or hub name of a causal language model. It is required, so null is refused."
    )
    revision: str | None = _setting(
        None,
        "what",
        "Branch, tag or commit of a hub teacher, or of the hub model that an adapter belongs to. "
        "null: the one that the adapter names, or the default branch. The run keeps the commit.",
    )
    tokenizer_path: str | None = _setting(
        None, "what", "Folder or hub name of the tokenizer. null: the same as `model_path`."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _setting(
        "auto",
        "numerics",
        "Data type of the weights. auto: the checkpoint's type, or float32 without bfloat16 units.",
    )
    trust_remote_code: bool = _setting(False, "what", "Run Python code that comes with the checkpoint.")
    allow_pickle: bool = _setting(
        False, "how", "Load weights that are not in safetensors. A pickled checkpoint can run any code."
    )
    cache_dir: str = _setting("output/teacher_logits", "how", "The run folder. The job writes all its files there.")
    generation: GenerationConfig = GenerationConfig()


class DatasetConfig(Group):
    """``distillation.dataset``: the documents."""

    name: str | None = _setting(
        None,
        "what",
        "Hub name, `save_to_disk` folder, folder of files, or a reader for `data_files` (`json`, `csv`, `tsv`, `text`, "
        "`parquet`, …). It is required, so null is refused unless a dataset object is passed.",
    )
    config_name: str | None = _setting(
        None, "what", "Configuration of a hub dataset, such as `wikitext-103-raw-v1`. null: its default configuration."
    )
    split: str = _setting(
        "train", "what", "Split. It can be a slice or a sum, such as `train[:10%]` or `train[:500]+test`."
    )
    revision: str | None = _setting(
        None, "what", "Branch, tag or commit of a hub dataset. null: the default branch. The run keeps the commit."
    )
    data_files: Files | None = _setting(
        None, "what", "Paths, globs or URLs of the files for a reader. null: the dataset's own files."
    )
    text_column: str | None = _setting(
        None,
        "what",
        "Column of the documents, or a field such as `doc.text`. null: `text`, or `input_ids` if there is no `text`.",
    )
    messages_column: str | None = _setting(
        None,
        "what",
        "Column of chats, as lists of messages with `role` and `content`. The tokenizer's chat template renders them, "
        "with the row's `tools` if there are any. null: rows are no chats.",
    )
    learn: Literal["assistant", "all"] = _setting(
        "assistant",
        "what",
        "Tokens of a chat that a student learns. assistant: the assistant's turns. all: every token.",
    )
    mask_column: str | None = _setting(
        None,
        "what",
        "Column beside token ids that says which of them a student learns: 1 or 0, or labels with -100. null: all.",
    )
    on_bad_row: Literal["fail", "skip"] = _setting(
        "fail",
        "what",
        "What to do with an unusable row. fail: its partition fails. skip: the row becomes a document of 0 tokens.",
    )
    add_special_tokens: bool = _setting(True, "what", "Let the tokenizer add its special tokens.")
    vocab_size: PositiveInt | None = _setting(
        None,
        "what",
        "Number of valid token ids. null: as many as the tokenizer can produce, or the width of the head without a "
        "tokenizer.",
    )
    max_length: Auto | PositiveInt = _setting(
        "auto",
        "what",
        "Maximum number of tokens in a document, a text window or a packed block. auto: 2,048, or the teacher's "
        "positions if these are fewer.",
    )
    long_documents: Literal["truncate", "window"] = _setting(
        "truncate",
        "what",
        "What to do with documents above `max_length`. truncate: cut them off. window: score them in text windows that "
        "keep every token once.",
    )
    window_stride: PositiveInt | None = _setting(
        None,
        "what",
        "Number of tokens that each further text window keeps. The rest of the window is context. null: `max_length`, "
        "so windows have no context.",
    )
    packing: Literal["none", "concat"] = _setting(
        "none",
        "what",
        "none: each document is an item. concat: join documents with a separator and cut them into blocks of "
        "`max_length` tokens.",
    )
    separator_id: NonNegativeInt | None = _setting(
        None, "what", "Token id of the separator between packed documents. null: the token that ends a text."
    )
    max_samples: PositiveInt | Literal["all"] | None = _setting(
        None,
        "how",
        "Number of rows to use, from the first. It can be raised later. null: all rows. A stream needs a number, or "
        "`all`.",
    )
    streaming: bool = _setting(
        False, "what", "Read the dataset as a stream, with constant memory and without a download before the start."
    )
    streaming_buffer_size: PositiveInt = _setting(
        10_000, "how", "Number of documents of a stream that are read ahead of scoring."
    )
    streaming_chunk_size: PositiveInt = _setting(1_000, "what", "Number of documents per partition of a stream.")
    num_proc: PositiveInt = _setting(4, "how", "Number of processes that prepare the Arrow files of a hub dataset.")


class PartitionConfig(Group):
    """``distillation.partition``: the unit of work."""

    rows: Auto | PositiveInt = _setting(
        "auto", "what", "Number of dataset rows per partition. auto: about 256,000 tokens, fewer for a small dataset."
    )


class ScoringConfig(Group):
    """``distillation.scoring``: computation of the targets."""

    logits: Literal["exact", "model"] = _setting(
        "exact",
        "numerics",
        "exact: logits are float32 for every data type of the weights. model: logits are rounded as by the model.",
    )
    compile: Literal["auto", "always", "never"] = _setting(
        "auto", "numerics", "Compile the teacher's layers. auto: compile if this saves time on this plan."
    )


class CacheConfig(Group):
    """``distillation.cache``: storage of the targets."""

    profile: Literal["auto", "plain", "compact"] = _setting(
        "auto",
        "numerics",
        "plain: full values that any HDF5 reader can read. compact: less than half the size. auto: compact, but plain "
        "for a tiny job.",
    )
    precision: Literal[8, 10, 12] = _setting(
        8, "numerics", "Bits per log-prob in the profile compact. 8 adds 4e-5 nats of KL, 10 adds 3e-6, 12 adds 2e-7."
    )
    max_file_size: int | str | None = _setting(
        None,
        "how",
        "Maximum size of a cache file in bytes, or with a unit (`20GB`). A larger cache is split into shards with an "
        "index. null: one file.",
    )


class SecurityConfig(Group):
    """``distillation.cluster.security``: TLS between scheduler, workers and driver."""

    ca_file: str | None = _setting(
        None, "how", "PEM file with the certificate of the authority. null: no TLS. Set all three files or none."
    )
    cert: str | None = _setting(
        None, "how", "PEM file with the certificate of the driver, and of each side of a local cluster. null: no TLS."
    )
    key: str | None = _setting(None, "how", "PEM file with the private key of `cert`. null: no TLS.")


class ClusterConfig(Group):
    """``distillation.cluster``: where the job runs."""

    kind: Literal["auto", "local_cuda", "local_cpu", "scheduler", "serial"] = _setting(
        "auto",
        "how",
        "Kind of the cluster. auto: the scheduler if one is set, this process for a static worker, otherwise "
        "LocalCUDACluster if a GPU is visible, otherwise LocalCluster. serial: this process, without a cluster.",
    )
    scheduler: str | None = _setting(
        None, "how", "Address of a running scheduler, such as `tcp://10.0.0.1:8786`. null: start a local cluster."
    )
    scheduler_file: str | None = _setting(
        None, "how", "File that `dask scheduler` wrote. null: use `scheduler`, or start a local cluster."
    )
    dashboard_address: str | None = _setting(
        "127.0.0.1:8787", "how", "Address of the dashboard of a local cluster. null: no dashboard."
    )
    wait_seconds: Annotated[float, Field(ge=0, title="float ≥ 0")] = _setting(
        120.0, "how", "Seconds to wait for the first worker."
    )
    allow_mixed_workers: bool = _setting(
        False,
        "how",
        "Also score on workers whose packages, instruction set or GPU model differ from the calibration's. Receipts "
        "record the difference.",
    )
    security: SecurityConfig = SecurityConfig()


class JobConfig(Group):
    """``distillation.job``: failure handling."""

    retries: NonNegativeInt = _setting(
        2, "how", "Number of further attempts at a partition after an I/O error or the death of its worker."
    )
    stall_seconds: Annotated[float, Field(ge=1, title="float ≥ 1")] = _setting(
        1800.0, "how", "Seconds without progress after which the job stops with a diagnosis."
    )
    max_failures: PositiveInt = _setting(
        5,
        "how",
        "Number of failed partitions that stop the job: the first ones, or so many in a row that cannot be read or "
        "written (and two for each worker).",
    )
    keep_partitions: bool = _setting(False, "how", "Keep the Zarr partitions after the cache is complete.")
    notify_command: Words | None = _setting(
        None,
        "how",
        "Command to call when a job is done or has failed, as a list of words. It reads a JSON message on stdin. "
        "null: none. A webhook's address comes from the environment (`DASK_LOGITS_WEBHOOK`).",
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting("info", "how", "Lowest level of log messages.")


class Config(Group):
    """``distillation``: the whole tree."""

    teacher: TeacherConfig = TeacherConfig()
    dataset: DatasetConfig = DatasetConfig()
    partition: PartitionConfig = PartitionConfig()
    scoring: ScoringConfig = ScoringConfig()
    cache: CacheConfig = CacheConfig()
    cluster: ClusterConfig = ClusterConfig()
    job: JobConfig = JobConfig()

    @classmethod
    def from_mapping(cls, tree: Mapping[str, Any], *, dataset_given: bool = False) -> Config:
        """Validate a ``distillation`` tree of plain values.

        Parameters
        ----------
        tree
            Nested mappings. Missing settings take their defaults.
        dataset_given
            Whether a dataset object is passed separately, so that ``dataset.name`` may be missing.

        Raises
        ------
        ConfigError
            With all problems.

        Examples
        --------
        >>> tree = {"teacher": {"model_path": "my/teacher", "generation": {"top_k": 8}}}
        >>> Config.from_mapping(tree, dataset_given=True).teacher.generation.top_k
        8
        """
        wrong: dict[str, str] = {}
        try:
            config = cls.model_validate(tree)
        except ValidationError as error:
            wrong = dict(_problem(tree, each["loc"]) for each in error.errors())
            config = cls.model_validate(_without(tree, wrong))
        # A setting that is refused already has its default here.
        problems = [problem for problem in _cross_check(config, dataset_given) if not problem.startswith(tuple(wrong))]
        if wrong or problems:
            raise ConfigError.from_problems(*wrong.values(), *problems)
        return config


@dataclasses.dataclass(frozen=True)
class Setting:
    """One leaf of the configuration tree, as listed in the documentation."""

    path: str
    type: str
    default: Any
    kind: Kind
    doc: str
    purpose: str
    """The purpose of its group."""

    @property
    def default_text(self) -> str:
        """The default as it is written on the command line."""
        return self.default if isinstance(self.default, str) else json.dumps(self.default)

    @property
    def is_free(self) -> bool:
        """Whether it may change when a run is resumed. The number of static workers belongs to the run."""
        return self.kind == "how" and not self.path.endswith(".total_workers")

    @property
    def choices(self) -> Collection[str]:
        """The values that can be listed, as they are written on the command line."""
        words = ["false", "true"] if self.type == "bool" else self.type.split(" or ")
        listed = [word.strip("'") for word in words if re.fullmatch(r"'\w+'|\d+|null|false|true", word)]
        return dict.fromkeys([*listed, self.default_text])


def settings(group: type[Group] = Config, prefix: str = "distillation") -> Iterator[Setting]:
    """List every setting in the order of the tree.

    >>> next(iter(settings())).path
    'distillation.teacher.model_path'
    """
    hints = typing.get_type_hints(group, include_extras=True)
    for name, field in group.model_fields.items():
        path = f"{prefix}.{name}"
        if isinstance(field.default, Group):
            yield from settings(type(field.default), path)
        else:
            extra: Any = field.json_schema_extra
            purpose = (group.__doc__ or "").partition(": ")[2].rstrip(".")
            yield Setting(path, _describe(hints[name]), field.default, extra["kind"], field.description or "", purpose)


def _describe(hint: Any) -> str:
    """Name a type in words of the configuration.

    >>> _describe(Auto | PositiveInt | None)
    "'auto' or int ≥ 1 or null"
    """
    origin, arms = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return str(arms[1].title)
    if arms:
        return " or ".join(repr(arm) if origin is Literal else _describe(arm) for arm in arms)
    return "null" if hint is type(None) else str(hint.__name__)


def flat(tree: Mapping[str, Any], prefix: str = "distillation") -> dict[str, Any]:
    """Map the dotted path of each leaf of a tree to its value.

    >>> flat({"job": {"retries": 1, "keep_partitions": True}})
    {'distillation.job.retries': 1, 'distillation.job.keep_partitions': True}
    """
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}.{name}"
        leaves |= flat(value, path) if isinstance(value, Mapping) else {path: value}
    return leaves


def parse_bytes(size: int | str) -> int:
    """Return a size in bytes from a number or a text with a unit.

    >>> parse_bytes("20GB"), parse_bytes("1 KiB"), parse_bytes(7)
    (20000000000, 1024, 7)

    Raises
    ------
    ConfigError
        If the text is not a size.
    """
    from dask.utils import parse_bytes as parse

    try:
        n_bytes = parse(size)
    except ValueError:
        n_bytes = 0
    if n_bytes < 1:
        raise ConfigError(f"distillation.cache.max_file_size: expected a size such as '20GB', got {size!r}")
    return int(n_bytes)


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return ``", did you mean 'x'?"`` for the known spelling at least ``cutoff`` (0 to 1) close, else an empty string.

    >>> nearest("topk", ["top_k", "device"])
    ", did you mean 'top_k'?"
    """
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f", did you mean {match[0]!r}?" if match else ""


def _problem(tree: Any, location: tuple[int | str, ...]) -> tuple[str, str]:
    """Return the path and the message of a value that pydantic refused."""
    types = {setting.path: setting.type for setting in settings()}
    path, value = "distillation", tree
    for name in location:
        group, path, value = path, f"{path}.{name}", value[name]
        if path in types:
            return path, f"{path}: expected {types[path]}, got {value!r}"
        names = dict.fromkeys(known.split(".")[path.count(".")] for known in types if known.startswith(f"{group}."))
        if name not in names:
            return path, f"{path}: unknown setting{nearest(str(name), names)}"
    return path, f"{path}: expected a group of settings, got {value!r}"


def _without(tree: Any, paths: Collection[str], path: str = "distillation") -> dict[str, Any]:
    """Copy a tree without some of its paths."""
    if path in paths:
        return {}
    return {
        name: _without(value, paths, f"{path}.{name}") if isinstance(value, Mapping) else value
        for name, value in tree.items()
        if f"{path}.{name}" not in paths
    }


def _cross_check(config: Config, dataset_given: bool) -> Iterator[str]:
    """Yield the problems of settings that do not go together."""
    homeless = list(_check_homes(config))
    if homeless:
        # The other checks open paths.
        yield from homeless
        return
    generation, dataset, cluster = config.teacher.generation, config.dataset, config.cluster
    if not config.teacher.model_path:
        yield (
            "distillation.teacher.model_path: expected a folder or a hub name, got nothing. Set it, for example "
            "distillation.teacher.model_path=Qwen/Qwen3-8B"
        )
    if not config.teacher.cache_dir:
        yield "distillation.teacher.cache_dir: expected a folder, got ''. Set it"
    if not dataset.name and not dataset_given:
        yield (
            "distillation.dataset.name: expected a hub name, a folder or a reader, got nothing. Set it, for example "
            "distillation.dataset.name=Salesforce/wikitext distillation.dataset.config_name=wikitext-103-raw-v1"
        )
    if dataset.name in {"json", "text", "parquet", "csv", "tsv", "arrow"} and dataset.data_files is None:
        yield f"distillation.dataset.data_files: expected files for the reader {dataset.name!r}, got null. Set it"
    if dataset.streaming and dataset.max_samples is None:
        yield UNBOUNDED_STREAM
    if config.cache.max_file_size is not None:
        try:
            parse_bytes(config.cache.max_file_size)
        except ConfigError as error:
            yield error.message
    yield from _check_share(generation, cluster)
    yield from _check_positions(generation, dataset)
    yield from _check_targets(generation)
    yield from _check_secrets(config)
    files = dict(cluster.security)
    for name, file in files.items() if any(files.values()) else ():
        if file is None or not Path(file).expanduser().is_file():
            yield f"distillation.cluster.security.{name}: expected a file, got {file!r}. Set all three files or none"
    if dataset.messages_column is not None:
        for name in ("text_column", "mask_column"):
            if getattr(dataset, name) is not None:
                yield (
                    f"distillation.dataset.{name}: expected null with messages_column, got {getattr(dataset, name)!r}. "
                    "Remove one of them"
                )
    if dataset.window_stride is not None and dataset.long_documents != "window":
        yield (
            "distillation.dataset.window_stride: expected null unless long_documents is 'window', got "
            f"{dataset.window_stride}. Set distillation.dataset.long_documents=window"
        )
    elif dataset.window_stride is not None and isinstance(dataset.max_length, int):
        yield from stride_problems(dataset.window_stride, dataset.max_length)
    if dataset.packing == "concat" and dataset.long_documents == "window":
        yield (
            "distillation.dataset.long_documents: expected 'truncate' with packing=concat, got 'window'. Packed blocks "
            "already keep every token of a long document"
        )
    if dataset.separator_id is not None and dataset.packing == "none":
        yield (
            f"distillation.dataset.separator_id: expected null with packing=none, got {dataset.separator_id}. Set "
            "distillation.dataset.packing=concat"
        )
    named = next((name for name in ("scheduler", "scheduler_file") if getattr(cluster, name)), None)
    if named and cluster.kind not in ("auto", "scheduler"):
        yield (
            f"distillation.cluster.{named}: expected null with cluster {cluster.kind}, got "
            f"{getattr(cluster, named)!r}. Leave it out, or set distillation.cluster.kind=scheduler"
        )
    if cluster.scheduler and cluster.scheduler_file:
        yield "distillation.cluster.scheduler: expected one of scheduler and scheduler_file, got both. Remove one"
    if cluster.kind == "scheduler" and not (cluster.scheduler or cluster.scheduler_file):
        yield "distillation.cluster.scheduler: expected an address or a scheduler_file, got neither. Set one"
    if cluster.kind == "serial" and generation.num_workers not in (None, 1):
        yield (
            f"distillation.teacher.generation.num_workers: expected 1 with cluster serial, got "
            f"{generation.num_workers}. Leave it out, or choose cluster=local_cpu or cluster=local_cuda"
        )
    if cluster.kind == "local_cpu" and generation.device == "cuda":
        yield "distillation.teacher.generation.device: expected 'cpu' with cluster local_cpu, got 'cuda'"
    if generation.gpus_per_worker > 1 and (cluster.kind == "local_cpu" or generation.device == "cpu"):
        yield (
            "distillation.teacher.generation.gpus_per_worker: expected 1 for a teacher on CPUs, got "
            f"{generation.gpus_per_worker}. Remove it, or set distillation.teacher.generation.device=cuda"
        )


def stride_problems(window_stride: int, max_length: int) -> list[str]:
    """Return the problems of a window stride for a window length."""
    if window_stride <= max_length:
        return []
    return [
        f"distillation.dataset.window_stride: expected at most max_length {max_length}, got {window_stride}. Tokens "
        "between the windows would be lost"
    ]


def _check_secrets(config: Config) -> Iterator[str]:
    """Refuse credentials in addresses, because settings are written to the run folder and the log."""
    for path, text in _texts(config):
        if _CREDENTIALS.search(text):
            yield (
                f"{path}: expected an address without credentials, got one with credentials (not shown here). Settings "
                "are written to the run folder. Put tokens and passwords in the environment: HF_TOKEN, or fsspec's "
                "variables"
            )


def _check_homes(config: Config) -> Iterator[str]:
    """Refuse paths in the home folder of a user unknown on this machine."""
    for path, text in _texts(config):
        try:
            Path(text if text.startswith("~") else "").expanduser()
        except RuntimeError:
            yield f"{path}: expected a path, got {text!r}, whose home folder is not known. Write the full path"


def _texts(config: Config) -> Iterator[tuple[str, str]]:
    """Yield the path and value of every setting that is a text or a list of texts."""
    for path, value in flat(config.model_dump()).items():
        texts = value if isinstance(value, tuple) else (value,)
        yield from ((path, text) for text in texts if isinstance(text, str))


def _check_positions(generation: GenerationConfig, dataset: DatasetConfig) -> Iterator[str]:
    where = "distillation.teacher.generation"
    if generation.position_share is not None and generation.positions != "entropy":
        yield (
            f"{where}.position_share: expected null with positions={generation.positions}, got "
            f"{generation.position_share}. Set {where}.positions=entropy"
        )
    has_mask = dataset.mask_column is not None or (dataset.messages_column is not None and dataset.learn != "all")
    if generation.positions == "labels" and not has_mask:
        yield (
            f"{where}.positions: expected 'all' or 'entropy' without a mask, got 'labels'. Set "
            "distillation.dataset.messages_column with learn=assistant, or distillation.dataset.mask_column"
        )


def _check_targets(generation: GenerationConfig) -> Iterator[str]:
    """Refuse settings of the other kind of targets, which would have no effect."""
    where = "distillation.teacher.generation"
    if generation.targets == "topk":
        for name in ("draws", "seed"):
            if (value := getattr(generation, name)) is not None:
                yield f"{where}.{name}: expected null with targets=topk, got {value}. Set {where}.targets=sample"
        return
    default = GenerationConfig().top_k
    if generation.top_k != default:
        yield (
            f"{where}.top_k: expected its default {default} with targets=sample, which has no use for it, got "
            f"{generation.top_k}. Remove it, and set {where}.draws"
        )
    if generation.temperatures:
        yield (
            f"{where}.temperatures: expected none with targets=sample, whose tokens are drawn at temperature 1, got "
            f"{list(generation.temperatures)}. Remove them, or set {where}.targets=topk"
        )


def _check_share(generation: GenerationConfig, cluster: ClusterConfig) -> Iterator[str]:
    worker, total = generation.worker_id, generation.total_workers
    where = "distillation.teacher.generation"
    if worker is None or total is None:
        if worker is not total:
            missing, other = ("worker_id", "total_workers") if worker is None else ("total_workers", "worker_id")
            yield f"{where}.{missing}: expected a number because {other} is set, got null. Set both or none"
        return
    if worker >= total:
        yield f"{where}.worker_id: expected less than total_workers {total}, got {worker}. Workers count from 0"
    if cluster.kind == "scheduler" or cluster.scheduler or cluster.scheduler_file:
        yield f"{where}.worker_id: expected null with an existing scheduler, got {worker}. The scheduler assigns work"
    if generation.force_regenerate and total > 1:
        yield (
            f"{where}.force_regenerate: expected false with total_workers={total}, got True. Workers would delete each "
            "other's results. Delete the run folder, or choose another one"
        )
