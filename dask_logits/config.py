"""The configuration: frozen dataclasses that declare every setting, its type and its bounds.

Hydra composes the YAML tree (:mod:`dask_logits.hydra_config`). This module validates it without Hydra, so that workers
and tests need neither. All problems are reported at once, each with the dotted path of its setting.

A setting has one of three kinds:

* ``what`` is computed: part of the run's identity. Another value in the same run folder is refused.
* ``numerics``: affects the last bits of the result. Resolved once by the calibration and frozen for the run.
* ``how`` it is run: may change on resume.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from dask_logits.errors import ConfigError

UNBOUNDED_STREAM = (
    "distillation.dataset.max_samples: expected a number of rows for a stream, got null; a stream may have no end, and "
    "nobody would know what the job takes: set a number, or distillation.dataset.max_samples=all to read it to its end"
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

Kind = Literal["what", "numerics", "how"]
Auto = Literal["auto"]
_T = TypeVar("_T")


def _setting(default: Any, kind: Kind, doc: str, *, low: float | None = None) -> Any:
    """Declare a setting with its default, kind, one-sentence description and lower bound (inclusive)."""
    return field(default=default, metadata={"kind": kind, "doc": doc, "low": low})


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """``distillation.teacher.generation``: scoring by the teacher."""

    top_k: int = _setting(64, "what", "Entries kept per position, most probable first.", low=1)
    batch_size: int | None = _setting(
        None, "numerics", "Bound on documents per batch; null: only `batch_tokens` bounds it.", low=1
    )
    batch_tokens: Auto | int = _setting(
        "auto", "numerics", "Token budget of one forward pass, padding included.", low=1
    )
    head_rows: Auto | int = _setting(
        "auto", "numerics", "Positions whose logits exist at one time (the head is applied in chunks).", low=1
    )
    torch_threads: Auto | int = _setting(
        "auto", "numerics", "CPU threads of each worker; auto: cores / workers.", low=1
    )
    device: Literal["auto", "cpu", "cuda"] = _setting(
        "auto", "numerics", "Where the teacher runs; auto: cuda if a GPU is visible, else cpu."
    )
    force_regenerate: bool = _setting(
        False,
        "how",
        "Set the run in this folder aside and compute it anew; the old one goes when the new is complete.",
    )
    num_workers: int | None = _setting(
        None, "how", "Dask workers; null: one per GPU, or one per 2 cores on CPU.", low=1
    )
    devices: str | None = _setting(None, "how", "GPUs to use, e.g. [0,1] or '0,1'; null: all that are visible.")
    gpus_per_worker: int = _setting(
        1, "numerics", "GPUs over which each worker spreads the teacher's layers, where one is too small.", low=1
    )
    worker_id: int | None = _setting(
        None, "how", "Index of this static worker: it takes every `total_workers`-th partition, and no cluster.", low=0
    )
    total_workers: int | None = _setting(None, "how", "Number of static workers that share the job.", low=1)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """``distillation.teacher``: the model, and the folder for its targets."""

    model_path: str | None = _setting(None, "what", "Folder or hub name of a causal language model. Required.")
    revision: str | None = _setting(None, "what", "Branch, tag or commit on the hub; pinned to a commit in the run.")
    tokenizer_path: str | None = _setting(None, "what", "Folder or hub name of the tokenizer; null: `model_path`.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _setting(
        "auto",
        "numerics",
        "Weights' dtype; auto: the checkpoint's, or float32 where the CPU has no bfloat16 units.",
    )
    trust_remote_code: bool = _setting(False, "what", "Run model code that comes with the checkpoint.")
    allow_pickle: bool = _setting(
        False, "how", "Load weights that are not in safetensors; a pickled checkpoint may be made to run code."
    )
    cache_dir: str = _setting("output/teacher_logits", "how", "The run folder: everything the job writes.")
    generation: GenerationConfig = field(default_factory=GenerationConfig)


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """``distillation.dataset``: the documents."""

    name: str | None = _setting(
        None,
        "what",
        "Hub name, a `save_to_disk` folder, a folder of files, or `json`, `csv`, `tsv`, `text`, `parquet`, … with "
        "`data_files`. Required.",
    )
    config_name: str | None = _setting(None, "what", "Configuration of a hub dataset, e.g. `wikitext-103-raw-v1`.")
    split: str = _setting("train", "what", "Split; slices and sums are allowed: `train[:10%]`, `train[:500]+test`.")
    revision: str | None = _setting(None, "what", "Branch, tag or commit of a hub dataset.")
    data_files: tuple[str, ...] | None = _setting(
        None, "what", "Files, globs or URLs for `json`, `text`, `parquet`, …."
    )
    text_column: str | None = _setting(
        None,
        "what",
        "Column with the documents, or a field such as `doc.text`; null: `text`, or `input_ids` where only that is "
        "there.",
    )
    on_bad_row: Literal["fail", "skip"] = _setting(
        "fail",
        "what",
        "A row that cannot be used: fail its partition, or keep it as a document of 0 tokens and count it.",
    )
    add_special_tokens: bool = _setting(True, "what", "Let the tokenizer add its special tokens.")
    vocab_size: int | None = _setting(
        None,
        "what",
        "Ids that may occur; null: what the tokenizer can produce, without one the head's width.",
        low=1,
    )
    max_length: Auto | int = _setting(
        "auto",
        "what",
        "Most tokens of a document, a window or a block; auto: 2,048, or the teacher's positions if these are fewer.",
        low=1,
    )
    long_documents: Literal["truncate", "window"] = _setting(
        "truncate", "what", "Longer documents are cut off, or scored in windows that keep every token once."
    )
    window_stride: int | None = _setting(
        None, "what", "Tokens a further window keeps, the rest being context; null: `max_length`, no context.", low=1
    )
    packing: Literal["none", "concat"] = _setting(
        "none", "what", "concat: documents are joined with a separator and cut into blocks of `max_length`."
    )
    separator_id: int | None = _setting(
        None, "what", "Token id between packed documents; null: the one that ends a text.", low=0
    )
    max_samples: int | Literal["all"] | None = _setting(
        None, "how", "Rows used, from the first; null: all. May grow later. A stream needs a number, or `all`.", low=1
    )
    streaming: bool = _setting(False, "what", "Read the dataset as a stream: constant memory, no download first.")
    streaming_buffer_size: int = _setting(
        10_000, "how", "Documents of a stream that are read ahead of their scoring.", low=1
    )
    streaming_chunk_size: int = _setting(1_000, "what", "Documents per partition of a stream.", low=1)
    num_proc: int = _setting(4, "how", "Processes that prepare a hub dataset's Arrow files.", low=1)


@dataclass(frozen=True, kw_only=True)
class PartitionConfig:
    """``distillation.partition``: the unit of work."""

    rows: Auto | int = _setting("auto", "what", "Dataset rows per partition; auto: about 256k tokens.", low=1)


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """``distillation.scoring``: computation of the targets."""

    logits: Literal["exact", "model"] = _setting(
        "exact",
        "numerics",
        "exact: float32 logits, whatever the weights' dtype; model: rounded as the model rounds them.",
    )
    compile: Literal["auto", "always", "never"] = _setting(
        "auto", "numerics", "Compile the teacher's layers; auto: where that pays for itself on this plan."
    )


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """``distillation.cache``: storage of the targets."""

    profile: Literal["auto", "plain", "compact"] = _setting(
        "auto",
        "numerics",
        "plain: as they are, for any HDF5 reader; compact: less than half of it; auto: compact unless the job is tiny.",
    )
    precision: Literal[8, 10, 12] = _setting(
        8, "numerics", "Bits of a log-prob in the compact profile: 8 (adds 4e-5 nats of KL), 10 (3e-6) or 12 (2e-7)."
    )
    max_file_size: int | str | None = _setting(
        None, "how", "Bytes (`20GB`) of one file; a larger cache becomes numbered files with an index. null: one file."
    )


@dataclass(frozen=True, kw_only=True)
class SecurityConfig:
    """``distillation.cluster.security``: TLS between scheduler, workers and driver. All three files or none."""

    ca_file: str | None = _setting(None, "how", "Certificate (PEM) of the authority that signed everybody's.")
    cert: str | None = _setting(None, "how", "Certificate (PEM) of this side; of all sides in a cluster we make.")
    key: str | None = _setting(None, "how", "Private key (PEM) of that certificate.")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """``distillation.cluster``: where the job runs."""

    kind: Literal["auto", "local_cuda", "local_cpu", "scheduler", "serial"] = _setting(
        "auto",
        "how",
        "auto: the scheduler if one is named, this process for a static worker, else LocalCUDACluster if a GPU is "
        "visible, else LocalCluster. serial: this process, without a cluster.",
    )
    scheduler: str | None = _setting(None, "how", "Address of a running scheduler, e.g. `tcp://10.0.0.1:8786`.")
    scheduler_file: str | None = _setting(None, "how", "Scheduler file written by `dask scheduler`.")
    dashboard_address: str | None = _setting(
        "127.0.0.1:8787", "how", "Where the dashboard of a cluster we make listens; null: no dashboard."
    )
    wait_seconds: float = _setting(120.0, "how", "How long to wait for the first worker.", low=0)
    allow_mixed_workers: bool = _setting(
        False,
        "how",
        "Score on workers whose packages, instruction set or GPU model differ from the calibration's; recorded.",
    )
    security: SecurityConfig = field(default_factory=SecurityConfig)


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """``distillation.job``: failure handling."""

    retries: int = _setting(
        2, "how", "Further attempts for a partition after an I/O error, or after its worker died.", low=0
    )
    stall_seconds: float = _setting(
        1800.0, "how", "Without any progress for so long, the job stops with a diagnosis.", low=1
    )
    max_failures: int = _setting(
        5, "how", "So many failed partitions before the first success stop the job at once.", low=1
    )
    keep_partitions: bool = _setting(
        False, "how", "Keep the Zarr partitions after they have been consolidated into the cache."
    )
    takeover: bool = _setting(
        False, "how", "Take over from a driver on another machine that ended without a word; one that lives is refused."
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting("info", "how", "Verbosity of the log.")


@dataclass(frozen=True, kw_only=True)
class Config:
    """``distillation``: the whole tree."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    job: JobConfig = field(default_factory=JobConfig)

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
        problems: list[str] = []
        config = _build(cls, tree, "distillation", problems)
        if config is not None:
            problems += _cross_check(config, dataset_given)
        if problems or config is None:
            raise ConfigError.from_problems(problems)
        return config


@dataclass(frozen=True)
class Setting:
    """One leaf of the configuration tree, as listed in the documentation."""

    path: str
    type: str
    default: Any
    kind: Kind
    doc: str


def settings(cls: type = Config, prefix: str = "distillation") -> Iterator[Setting]:
    """List every setting in the order of the tree.

    >>> next(iter(settings())).path
    'distillation.teacher.model_path'
    """
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        path = f"{prefix}.{f.name}"
        if dataclasses.is_dataclass(hints[f.name]):
            yield from settings(hints[f.name], path)
        else:
            meta = f.metadata
            yield Setting(path, _describe(hints[f.name]), f.default, meta["kind"], meta["doc"])


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


def nearest(word: str, known: typing.Iterable[str], cutoff: float = 0.6) -> str:
    """Return ``", did you mean 'x'?"`` for the known spelling at least ``cutoff`` (0 to 1) close, else an empty string.

    >>> nearest("topk", ["top_k", "device"])
    ", did you mean 'top_k'?"
    """
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f", did you mean {match[0]!r}?" if match else ""


def _build(cls: type[_T], tree: Any, path: str, problems: list[str]) -> _T | None:
    if not isinstance(tree, Mapping):
        problems.append(f"{path}: expected a group of settings, got {tree!r}")
        return None
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in tree.items():
        where = f"{path}.{key}"
        if key not in fields:
            problems.append(f"{where}: unknown setting{nearest(str(key), fields)}")
        elif dataclasses.is_dataclass(hints[key]):
            values[key] = _build(typing.cast("type[Any]", hints[key]), value, where, problems)
        else:
            values[key] = _leaf(hints[key], value, fields[key].metadata["low"], where, problems)
    broken_group = any(values[key] is None for key in values if dataclasses.is_dataclass(hints[key]))
    return None if broken_group else cls(**values)


def _leaf(hint: Any, value: Any, low: float | None, where: str, problems: list[str]) -> Any:
    if hint == tuple[str, ...] | None:
        value = (value,) if isinstance(value, str) else value
        if isinstance(value, list | tuple) and value and all(isinstance(v, str) for v in value):
            return tuple(value)
    if where.endswith(".devices") and value is not None and not isinstance(value, bool):
        items = value if isinstance(value, list | tuple) else str(value).split(",")
        if items and all(str(item).strip() for item in items):
            return ",".join(str(item).strip() for item in items)
    if not _fits(hint, value):
        problems.append(f"{where}: expected {_describe(hint)}, got {value!r}")
    elif low is not None and isinstance(value, int | float) and value < low:
        problems.append(f"{where}: expected {_describe(hint)} of at least {low}, got {value!r}")
    return float(value) if hint is float and isinstance(value, int) else value


def _fits(hint: Any, value: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(arm, value) for arm in typing.get_args(hint))
    if origin is Literal:
        return type(value) in (str, int) and value in typing.get_args(hint)
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and value == value
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool):
        return isinstance(value, hint)
    return False


def _describe(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(arm) for arm in typing.get_args(hint))
    if origin is Literal:
        return " or ".join(repr(v) for v in typing.get_args(hint))
    if origin is tuple:
        return "list of str"
    return "null" if hint is type(None) else str(hint.__name__)


def _cross_check(config: Config, dataset_given: bool) -> list[str]:
    problems = _check_homes(config)
    if problems:
        return problems
    generation, dataset, cluster = config.teacher.generation, config.dataset, config.cluster
    if not config.teacher.model_path:
        problems.append(
            "distillation.teacher.model_path: expected a folder or a hub name, got nothing; set it, for example "
            "distillation.teacher.model_path=Qwen/Qwen3-8B"
        )
    if not config.teacher.cache_dir:
        problems.append("distillation.teacher.cache_dir: expected a folder, got ''; set it")
    if not dataset.name and not dataset_given:
        problems.append(
            "distillation.dataset.name: expected a hub name, a folder or a reader, got nothing; set it, for example "
            "distillation.dataset.name=Salesforce/wikitext distillation.dataset.config_name=wikitext-103-raw-v1"
        )
    if dataset.name in {"json", "text", "parquet", "csv", "tsv", "arrow"} and dataset.data_files is None:
        problems.append(
            f"distillation.dataset.data_files: expected files for the {dataset.name!r} reader, got null; set it"
        )
    if dataset.streaming and dataset.max_samples is None:
        problems.append(UNBOUNDED_STREAM)
    if config.cache.max_file_size is not None:
        try:
            parse_bytes(config.cache.max_file_size)
        except ConfigError as error:
            problems.append(error.message)
    problems += _check_share(generation, cluster)
    problems += _check_secrets(config)
    security = dataclasses.asdict(cluster.security)
    if any(security.values()):
        problems += [
            f"distillation.cluster.security.{name}: expected a file, beside the other two, got {value!r}"
            for name, value in security.items()
            if value is None or not Path(value).expanduser().is_file()
        ]
    if dataset.window_stride is not None and dataset.long_documents != "window":
        problems.append(
            f"distillation.dataset.window_stride: expected null unless long_documents is 'window', got "
            f"{dataset.window_stride}; set distillation.dataset.long_documents=window"
        )
    elif dataset.window_stride is not None and isinstance(dataset.max_length, int):
        problems += stride_problems(dataset.window_stride, dataset.max_length)
    if dataset.packing == "concat" and dataset.long_documents == "window":
        problems.append(
            "distillation.dataset.long_documents: expected 'truncate' with packing=concat, got 'window'; blocks "
            "already hold every token of a long document"
        )
    if dataset.separator_id is not None and dataset.packing == "none":
        problems.append(
            f"distillation.dataset.separator_id: expected null with packing=none, got {dataset.separator_id}; set "
            "distillation.dataset.packing=concat"
        )
    named = next((name for name in ("scheduler", "scheduler_file") if getattr(cluster, name)), None)
    if named and cluster.kind not in ("auto", "scheduler"):
        problems.append(
            f"distillation.cluster.{named}: expected null with cluster {cluster.kind}, got "
            f"{getattr(cluster, named)!r}; leave it out, or set distillation.cluster.kind=scheduler"
        )
    if cluster.scheduler and cluster.scheduler_file:
        problems.append("distillation.cluster.scheduler: expected one of scheduler and scheduler_file, got both")
    if cluster.kind == "scheduler" and not (cluster.scheduler or cluster.scheduler_file):
        problems.append("distillation.cluster.scheduler: expected an address or a scheduler_file, got neither; set one")
    if cluster.kind == "serial" and generation.num_workers not in (None, 1):
        problems.append(
            f"distillation.teacher.generation.num_workers: expected 1 with cluster serial, got "
            f"{generation.num_workers}; leave it out, or choose cluster=local_cpu or cluster=local_cuda"
        )
    if cluster.kind == "local_cpu" and generation.device == "cuda":
        problems.append("distillation.teacher.generation.device: expected 'cpu' with cluster local_cpu, got 'cuda'")
    if generation.gpus_per_worker > 1 and (cluster.kind == "local_cpu" or generation.device == "cpu"):
        problems.append(
            "distillation.teacher.generation.gpus_per_worker: expected 1 where the teacher runs on CPUs, got "
            f"{generation.gpus_per_worker}; leave it out, or set distillation.teacher.generation.device=cuda"
        )
    return problems


def stride_problems(window_stride: int, max_length: int) -> list[str]:
    """Return the problems of a window stride for a window length."""
    if window_stride <= max_length:
        return []
    return [
        f"distillation.dataset.window_stride: expected at most max_length {max_length}, got {window_stride}; tokens "
        "between windows would be lost"
    ]


def _check_secrets(config: Config) -> list[str]:
    """Refuse credentials in addresses, because settings are written to the run folder and the log."""
    return [
        f"{name}: expected an address without credentials, got one with (not shown here); settings are kept in the run "
        "folder: give tokens and passwords in the environment (HF_TOKEN, or as fsspec reads them)"
        for name, text in _texts(config, "distillation")
        if _CREDENTIALS.search(text)
    ]


def _check_homes(config: Config) -> list[str]:
    """Refuse paths in the home folder of a user unknown on this machine."""
    problems = []
    for name, text in _texts(config, "distillation"):
        try:
            Path(text if text.startswith("~") else "").expanduser()
        except RuntimeError:
            problems.append(f"{name}: expected a path, got {text!r}, whose home folder is not known; write it out")
    return problems


def _texts(group: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield the path and value of every setting that is a text or a list of texts."""
    for name, value in vars(group).items():
        if dataclasses.is_dataclass(value):
            yield from _texts(value, f"{path}.{name}")
        else:
            texts = value if isinstance(value, tuple) else (value,)
            yield from ((f"{path}.{name}", text) for text in texts if isinstance(text, str))


def _check_share(generation: GenerationConfig, cluster: ClusterConfig) -> list[str]:
    worker, total = generation.worker_id, generation.total_workers
    where = "distillation.teacher.generation"
    if worker is None and total is None:
        return []
    if worker is None or total is None:
        missing = "worker_id" if worker is None else "total_workers"
        return [f"{where}.{missing}: expected a number beside the other of worker_id and total_workers, got null"]
    problems = []
    if worker >= total:
        problems.append(
            f"{where}.worker_id: expected less than total_workers {total}, got {worker}; workers count from 0"
        )
    if cluster.kind == "scheduler" or cluster.scheduler or cluster.scheduler_file:
        problems.append(
            f"{where}.worker_id: expected null with an existing scheduler, got {worker}; it shares out the work itself"
        )
    if generation.force_regenerate and total > 1:
        problems.append(
            f"{where}.force_regenerate: expected false with total_workers={total}, got True; workers would take each "
            "other's results away: delete the run folder, or choose another"
        )
    return problems
