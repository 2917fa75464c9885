"""Which settings go together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from dask_logits.config.groups import GenerationConfig, Tree
from dask_logits.config.setting import flat
from dask_logits.errors import ConfigError

_GENERATION = "teacher.generation"
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
        yield _problem(config, "teacher.cache_dir", "a folder", "Set it")
    if not dataset.name and not dataset_given:
        yield (
            "distillation.dataset.name: expected a hub name, a folder or a reader, got nothing. Set it, for example "
            "distillation.dataset.name=Salesforce/wikitext distillation.dataset.config_name=wikitext-103-raw-v1"
        )
    if dataset.name in {"json", "text", "parquet", "csv", "tsv", "arrow"} and dataset.data_files is None:
        yield _problem(config, "dataset.data_files", f"files for the reader {dataset.name!r}", "Set it")
    if dataset.streaming and dataset.max_samples is None:
        yield UNBOUNDED_STREAM
    if config.cache.max_file_size is not None:
        try:
            parse_bytes(config.cache.max_file_size)
        except ConfigError as error:
            yield error.message
    yield from _check_share(config)
    yield from _check_positions(config)
    yield from _check_targets(config)
    yield from _check_secrets(config)
    files = dict(cluster.security)
    for name, file in files.items() if any(files.values()) else ():
        if file is None or not Path(file).expanduser().is_file():
            yield _problem(config, f"cluster.security.{name}", "a file", "Set all three files or none")
    for name in ("text_column", "mask_column") if dataset.messages_column is not None else ():
        if getattr(dataset, name) is not None:
            yield _problem(config, f"dataset.{name}", "null with messages_column", "Remove one of them")
    if dataset.window_stride is not None and dataset.long_documents != "window":
        cure = "Set distillation.dataset.long_documents=window"
        yield _problem(config, "dataset.window_stride", "null unless long_documents is 'window'", cure)
    elif dataset.window_stride is not None and isinstance(dataset.max_length, int):
        yield from stride_problems(dataset.window_stride, dataset.max_length)
    if dataset.packing == "concat" and dataset.long_documents == "window":
        cure = "Packed blocks already keep every token of a long document"
        yield _problem(config, "dataset.long_documents", "'truncate' with packing=concat", cure)
    if dataset.separator_id is not None and dataset.packing == "none":
        cure = "Set distillation.dataset.packing=concat"
        yield _problem(config, "dataset.separator_id", "null with packing=none", cure)
    named = next((name for name in ("scheduler", "scheduler_file") if getattr(cluster, name)), None)
    if named and cluster.kind not in ("auto", "scheduler"):
        cure = "Leave it out, or set distillation.cluster.kind=scheduler"
        yield _problem(config, f"cluster.{named}", f"null with cluster {cluster.kind}", cure)
    if cluster.scheduler and cluster.scheduler_file:
        yield "distillation.cluster.scheduler: expected one of scheduler and scheduler_file, got both. Remove one"
    if cluster.kind == "scheduler" and not (cluster.scheduler or cluster.scheduler_file):
        yield "distillation.cluster.scheduler: expected an address or a scheduler_file, got neither. Set one"
    if cluster.kind == "serial" and generation.num_workers not in (None, 1):
        cure = "Leave it out, or choose cluster=local_cpu or cluster=local_cuda"
        yield _problem(config, f"{_GENERATION}.num_workers", "1 with cluster serial", cure)
    if cluster.kind == "local_cpu" and generation.device == "cuda":
        yield _problem(
            config, f"{_GENERATION}.device", "'cpu' with cluster local_cpu", "Remove it, or set cluster=local_cuda"
        )
    if generation.gpus_per_worker > 1 and (cluster.kind == "local_cpu" or generation.device == "cpu"):
        cure = f"Remove it, or set distillation.{_GENERATION}.device=cuda"
        yield _problem(config, f"{_GENERATION}.gpus_per_worker", "1 for a teacher on CPUs", cure)


def _problem(config: Tree, path: str, expected: str, cure: str) -> str:
    """Say what is wrong with the value of a setting."""
    value = flat(config.model_dump())[f"distillation.{path}"]
    got = "null" if value is None else repr(list(value) if isinstance(value, tuple) else value)
    return f"distillation.{path}: expected {expected}, got {got}. {cure}"


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


def _check_positions(config: Tree) -> Iterator[str]:
    generation, dataset = config.teacher.generation, config.dataset
    if generation.position_share is not None and generation.positions != "entropy":
        cure = f"Set distillation.{_GENERATION}.positions=entropy"
        yield _problem(config, f"{_GENERATION}.position_share", f"null with positions={generation.positions}", cure)
    has_mask = dataset.mask_column is not None or (dataset.messages_column is not None and dataset.learn != "all")
    if generation.positions == "labels" and not has_mask:
        cure = "Set distillation.dataset.messages_column with learn=assistant, or distillation.dataset.mask_column"
        yield _problem(config, f"{_GENERATION}.positions", "'all' or 'entropy' without a mask", cure)


def _check_targets(config: Tree) -> Iterator[str]:
    """Refuse settings of the other kind of targets, which would have no effect."""
    generation, default = config.teacher.generation, GenerationConfig()
    if generation.targets == "topk":
        for name in ("draws", "seed"):
            if getattr(generation, name) is not None:
                cure = f"Set distillation.{_GENERATION}.targets=sample"
                yield _problem(config, f"{_GENERATION}.{name}", "null with targets=topk", cure)
        return
    if generation.top_k != default.top_k:
        expected = f"its default {default.top_k} with targets=sample, which has no use for it"
        cure = f"Remove it, and set distillation.{_GENERATION}.draws"
        yield _problem(config, f"{_GENERATION}.top_k", expected, cure)
    if generation.temperatures:
        expected = "none with targets=sample, whose tokens are drawn at temperature 1"
        cure = f"Remove them, or set distillation.{_GENERATION}.targets=topk"
        yield _problem(config, f"{_GENERATION}.temperatures", expected, cure)


def _check_share(config: Tree) -> Iterator[str]:
    generation, cluster = config.teacher.generation, config.cluster
    worker, total = generation.worker_id, generation.total_workers
    if worker is None or total is None:
        if worker is not total:
            missing, other = ("worker_id", "total_workers") if worker is None else ("total_workers", "worker_id")
            expected = f"a number because {other} is set"
            yield _problem(config, f"{_GENERATION}.{missing}", expected, "Set both or none")
        return
    if worker >= total:
        yield _problem(config, f"{_GENERATION}.worker_id", f"less than total_workers {total}", "Workers count from 0")
    if cluster.kind == "scheduler" or cluster.scheduler or cluster.scheduler_file:
        cure = "The scheduler assigns work"
        yield _problem(config, f"{_GENERATION}.worker_id", "null with an existing scheduler", cure)
    if generation.force_regenerate and total > 1:
        cure = "Workers would delete each other's results. Delete the run folder, or choose another one"
        yield _problem(config, f"{_GENERATION}.force_regenerate", f"false with total_workers={total}", cure)
