"""Which settings go together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from dask_logits.config.groups import ClusterConfig, DatasetConfig, GenerationConfig, Tree
from dask_logits.config.setting import flat
from dask_logits.errors import ConfigError

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


def cross_check(config: Tree, dataset_given: bool) -> Iterator[str]:
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


def _check_secrets(config: Tree) -> Iterator[str]:
    """Refuse credentials in addresses, because settings are written to the run folder and the log."""
    for path, text in _texts(config):
        if _CREDENTIALS.search(text):
            yield (
                f"{path}: expected an address without credentials, got one with credentials (not shown here). Settings "
                "are written to the run folder. Put tokens and passwords in the environment: HF_TOKEN, or fsspec's "
                "variables"
            )


def _check_homes(config: Tree) -> Iterator[str]:
    """Refuse paths in the home folder of a user unknown on this machine."""
    for path, text in _texts(config):
        try:
            Path(text if text.startswith("~") else "").expanduser()
        except RuntimeError:
            yield f"{path}: expected a path, got {text!r}, whose home folder is not known. Write the full path"


def _texts(config: Tree) -> Iterator[tuple[str, str]]:
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
