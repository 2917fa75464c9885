"""Load datasets by name, as regular datasets or streams, optionally tokenized.

:func:`prepare_dataset` is the public function. Text and Parquet files are read by :mod:`dask_logits.data.arrow_cache`.
All other formats are loaded by ``datasets``.

This is the only module that imports ``datasets`` and ``huggingface_hub``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from dask_logits.config import nearest
from dask_logits.data.arrow_cache import arrow_file
from dask_logits.data.columns import IDS, ColumnSettings, choose_column
from dask_logits.data.parquet_files import needed_for
from dask_logits.data.tokens import encode
from dask_logits.data.values import PROBLEM, BadRow, arrow_values, with_problems
from dask_logits.errors import CapacityError, DatasetError, first_line
from dask_logits.files.atomic import no_room

logger = logging.getLogger(__name__)

_COMMIT = re.compile(r"@([0-9a-f]{40})/")
_OWN_READERS = ("json", "csv", "text", "parquet")
_READERS = (*_OWN_READERS, "tsv", "arrow", "pandas", "webdataset", "xml", "hdf5")
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar")
_FILE_SUFFIXES = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "tsv", ".txt": "text", ".md": "text",
    ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
_COMPRESSIONS = {".gz", ".bz2", ".xz", ".zst"}
_ENDLESS = 1 << 62
_HUB_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class FoundFiles:
    """The files of a dataset, not yet read.

    Parameters
    ----------
    reader
        ``json``, ``csv``, ``text``, ``parquet``, or another reader of ``datasets``.
    files
        Split → ordered paths or URLs. Hub URLs are pinned to a commit.
    separator
        Separator of CSV fields. None: detected from the header.
    is_configured
        Whether the dataset has its own options for its reader.
    """

    reader: str
    files: Mapping[str, list[str]]
    separator: str | None
    is_configured: bool

    @property
    def is_ours(self) -> bool:
        """Whether this package reads the files itself."""
        names = [file for files in self.files.values() for file in files]
        ours = self.reader in _OWN_READERS and not self.is_configured
        return ours and bool(names) and not any(name.endswith(_ARCHIVES) for name in names)


def prepare_dataset(
    name: str,
    tokenizer: Any = None,
    *,
    config_name: str | None = None,
    split: str = "train",
    data_files: Sequence[str] | None = None,
    revision: str | None = None,
    text_column: str | None = None,
    max_length: int | None = 2048,
    max_samples: int | str | None = None,
    add_special_tokens: bool = True,
    streaming: bool = False,
    num_proc: int | None = None,
) -> Any:
    """Load a dataset and tokenize it for language modelling.

    Parameters
    ----------
    name
        Hub name, a ``save_to_disk`` folder, a folder of files, or ``json``, ``csv``, ``text``, ``parquet``, … with
        `data_files`.
    tokenizer
        A Hugging Face tokenizer. None: rows are unchanged.
    config_name, split, data_files, revision
        Selection of the rows.
    text_column
        Column with the documents. None: ``text``, or ``input_ids`` if there is no ``text``.
    max_length
        Tokens kept of a document. None: all.
    max_samples
        Rows kept, from the first. None or ``all``: all.
    add_special_tokens
        Whether the tokenizer adds its special tokens.
    streaming
        Return an ``IterableDataset``, which reads during iteration.
    num_proc
        Processes that download and tokenize. None: this one.

    Returns
    -------
    datasets.Dataset or datasets.IterableDataset
        With a single column ``input_ids`` if a tokenizer is given.

    Raises
    ------
    DatasetError
        If the dataset, split or column does not exist.
    """
    wanted = ColumnSettings(text=text_column)
    if tokenizer is None or streaming:
        loaded = _load(name, config_name, split, data_files, revision, streaming, num_proc)
    else:
        loaded = load_rows(
            name,
            config_name=config_name,
            split=split,
            data_files=data_files,
            revision=revision,
            wanted=wanted,
            num_proc=num_proc,
        )
    loaded = _first(loaded, max_samples, streaming)
    if tokenizer is None:
        return loaded
    columns = loaded.column_names or list(next(iter(loaded), {}))
    column = choose_column([name for name in columns if name != PROBLEM], wanted)

    def tokens(rows: Any) -> pa.Table:
        values = arrow_values(rows, column)
        if PROBLEM in rows.column_names:
            values = with_problems(values, rows[PROBLEM].to_pylist())
        bad = next((value for value in values if isinstance(value, BadRow)), None)
        if bad is not None:
            raise DatasetError(f"{bad.reason}; fix the row")
        if column.kind == "ids":
            return _ids_table([value if isinstance(value, list) else [] for value in values])
        texts = [value for value in values if isinstance(value, str) and value]
        ids = iter(encode(tokenizer, texts, add_special_tokens, max_length))
        return _ids_table([next(ids) if value else [] for value in values])

    workers = {} if streaming else {"num_proc": num_proc, "desc": "tokenising"}
    return (
        loaded.with_format("arrow").map(tokens, batched=True, remove_columns=list(columns), **workers).with_format(None)
    )


def _ids_table(ids: list[list[int]]) -> pa.Table:
    return pa.table({IDS: pa.array(ids, pa.list_(pa.int64()))})


def _first(loaded: Any, max_samples: int | str | None, streaming: bool) -> Any:
    if max_samples in (None, "all"):
        return loaded
    count = int(str(max_samples))
    return loaded.take(count) if streaming else loaded.select(range(min(count, len(loaded))))


def is_saved(name: str) -> bool:
    """Whether a name is a ``save_to_disk`` folder."""
    folder = Path(name).expanduser()
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def find_files(
    name: str, config_name: str | None, data_files: Sequence[str] | None, revision: str | None
) -> FoundFiles:
    """Find the files of a dataset without reading them.

    Raises
    ------
    DatasetError
        If the dataset does not exist.
    """
    from datasets import load_dataset_builder

    reader = "csv" if name == "tsv" else name
    with _hub(name):
        builder = _translated(
            name,
            lambda: load_dataset_builder(
                _expanded(reader), config_name, data_files=_listed(data_files), revision=revision
            ),
            data_files,
        )
    files = {str(key): [str(file) for file in value] for key, value in (builder.config.data_files or {}).items()}
    separator = getattr(builder.config, "sep", None)
    return FoundFiles(
        reader=builder.name,
        files=files,
        # A comma may be the default of ``datasets``. Only a different separator comes from the dataset.
        separator="\t" if name == "tsv" else None if separator == "," else separator,
        is_configured=_has_options(builder.config),
    )


def _has_options(config: Any) -> bool:
    """Whether a reader's options differ from its defaults, except for the separator."""
    plain = type(config)()
    known = {"name", "version", "data_dir", "data_files", "description", "sep", "delimiter"}
    names = {field.name for field in dataclasses.fields(config)} - known
    return any(getattr(config, name) != getattr(plain, name) for name in names)


def check_exists(name: str, data_files: Sequence[str] | None) -> None:
    """Refuse a name that must be a path but does not exist, before asking a hub, and files of a reader likewise.

    Raises
    ------
    DatasetError
        If a local file is named instead of a reader, or a path or pattern matches no file.
    """
    where = "distillation.dataset.name"
    if name in _READERS:
        # ``datasets`` leaves a pattern without files out in silence if another one has some.
        for pattern in data_files or ():
            if not _matches(pattern):
                raise DatasetError(
                    "distillation.dataset.data_files: expected paths or patterns of existing files, got "
                    f"{pattern!r}, which matches no file; correct it"
                )
        return
    path = Path(name).expanduser()
    suffixes = [suffix for suffix in path.suffixes if suffix not in _COMPRESSIONS]
    reader = _FILE_SUFFIXES.get(suffixes[-1] if suffixes else "")
    if path.is_file():
        raise DatasetError(
            f"{where}: expected a dataset, got the file {name!r}; set {where}={reader or 'json'} and "
            f"distillation.dataset.data_files={name}"
        )
    if path.exists():
        return
    parts = path.parts
    is_local = (
        name.startswith((".", "/", "~"))
        or reader is not None
        or len(parts) > 2
        or (len(parts) > 1 and Path(parts[0]).is_dir())
    )
    if is_local and "://" not in name:
        raise DatasetError(
            f"{where}: expected a dataset, got {name!r}, which looks like a path and does not exist; check it"
        )


def _matches(pattern: str) -> bool:
    """Whether there is a file at a path or pattern. Remote ones are left to ``datasets``."""
    from datasets.data_files import resolve_pattern

    local = _expanded(pattern)
    try:
        return "://" in local or Path(local).exists() or bool(resolve_pattern(local, base_path=str(Path.cwd())))
    except (FileNotFoundError, ValueError):
        return False


@contextlib.contextmanager
def _hub(name: str) -> Iterator[None]:
    """Fail within seconds if the hub does not answer. ``datasets`` retries for most of a minute.

    Downloaded files are still used.
    """
    import datasets.config
    from huggingface_hub import constants

    if name in _READERS or Path(name).expanduser().exists() or constants.is_offline_mode():
        yield
        return
    reason = _unreachable(constants.ENDPOINT)
    if reason is None:
        yield
        return
    logger.warning("%s cannot be reached (%s): only downloaded datasets are used", constants.ENDPOINT, reason)
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    except DatasetError as error:
        raise DatasetError(
            f"distillation.dataset.name: {constants.ENDPOINT} cannot be reached, and {name!r} was not downloaded "
            f"before; check the network or the name ({error})"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _unreachable(address: str) -> str | None:
    """Return the reason why a server is unreachable, or None if it answers with any status."""
    request = urllib.request.Request(address, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_HUB_SECONDS):
            return None
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        # Certificate errors are left to the hub library.
        cause = getattr(error, "reason", error)
        return None if isinstance(cause, ssl.SSLError) else str(cause)


def stream_parts(split: str, splits: Sequence[str]) -> list[tuple[str, int, int | None]]:
    """Return the parts of a stream's split: (name, first row, row after the last or None for the end).

    Raises
    ------
    DatasetError
        If the split does not exist, or a slice depends on the number of rows, which is unknown for a stream.

    Examples
    --------
    >>> stream_parts("train[:5]+test", ["train", "test"])
    [('train', 0, 5), ('test', 0, None)]
    """
    if split in splits:
        return [(split, 0, None)]
    if re.search(r"\[[^\]]*[-%]", split):
        raise DatasetError(
            f"distillation.dataset.split: expected slices by row numbers such as 'train[100:200]' for a stream, whose "
            f"length is unknown, got {split!r}; set distillation.dataset.streaming=false for others"
        )
    parts = _absolute(split, dict.fromkeys(splits, _ENDLESS))
    return [(name, first, None if last == _ENDLESS else last) for name, first, last in parts]


def _names_in(split: str) -> list[str]:
    """Return the names of the splits in an expression of slices and sums."""
    return [re.split(r"[\[(]", part.strip())[0] for part in split.split("+")]


def _absolute(split: str, lengths: Mapping[str, int]) -> list[tuple[str, int, int]]:
    from datasets import ReadInstruction

    for name in _names_in(split):
        if name not in lengths:
            raise DatasetError(
                f"distillation.dataset.split: expected one of {sorted(lengths)}, or slices and sums of them, got "
                f"{split!r}{nearest(name, list(lengths))}"
            )
    try:
        found = ReadInstruction.from_spec(split).to_absolute(dict(lengths))
    except (ValueError, AssertionError) as error:
        raise DatasetError(
            f"distillation.dataset.split: expected slices such as 'train[:500]' or 'train[10%:20%]', got {split!r}: "
            f"{first_line(error)}"
        ) from error
    return [(part.splitname, part.from_, part.to) for part in found]


def refuse_splits(dataset: Any) -> None:
    """Refuse an object with several splits, because iterating over it would yield their names.

    Raises
    ------
    DatasetError
        Naming the splits.
    """
    if isinstance(dataset, Mapping):
        splits = list(dataset)
        raise DatasetError(
            f"dataset: expected one split, got a {type(dataset).__name__} with the splits {splits}; pass one of them, "
            f"such as dataset[{splits[0] if splits else 'train'!r}]"
        )


def pinned_commit(files: Sequence[str]) -> str | None:
    """Return the commit that hub URLs are pinned to.

    >>> pinned_commit(["hf://datasets/a/b@" + "0" * 40 + "/x.parquet"]) == "0" * 40, pinned_commit(["/tmp/x.parquet"])
    (True, None)
    """
    match = _COMMIT.search(files[0]) if files else None
    return match.group(1) if match else None


def shards(stream: Any) -> Iterator[Any]:
    """Yield the independently readable parts of a stream, in order. For most readers these are its files."""
    count = stream.num_shards
    for index in range(count):
        yield stream.shard(count, index) if count > 1 else stream


def load_rows(
    name: str,
    *,
    config_name: str | None,
    split: str,
    data_files: Sequence[str] | None,
    revision: str | None,
    wanted: ColumnSettings,
    num_proc: int | None,
) -> Any:
    """Load a regular dataset. Only the used column of text and Parquet files is loaded.

    Returns
    -------
    datasets.Dataset

    Raises
    ------
    DatasetError
        If the dataset, split or column does not exist.
    """
    from datasets import Dataset
    from datasets import config as datasets_config

    by_library = functools.partial(_load, name, config_name, split, data_files, revision, False, num_proc)
    if is_saved(name):
        return by_library()
    check_exists(name, data_files)
    folder = Path(datasets_config.HF_DATASETS_CACHE) / "dask_logits"
    is_hub = name not in _READERS and not Path(name).expanduser().exists()
    asked = json.dumps([name, config_name, revision, data_files, *vars(wanted).values()])
    memory = folder / "hub" / f"{hashlib.sha256(asked.encode()).hexdigest()[:32]}.json"
    try:
        found = find_files(name, config_name, data_files, revision)
    except DatasetError:
        if not is_hub:
            raise
        known = _remembered(memory)
        if not set(_names_in(split)) <= known.keys():
            # The library may have prepared it earlier.
            return by_library()
        return _picked(split, list(known), lambda key: Dataset.from_file(known[key]))
    if not found.is_ours or (is_hub and found.reader == "parquet"):
        return by_library()

    def part(key: str) -> Any:
        files = _translated(name, lambda: _downloaded(found.files[key], num_proc))
        try:
            path = str(arrow_file(folder, found.reader, files, found.separator, wanted))
            if is_hub:
                memory.parent.mkdir(parents=True, exist_ok=True)
                memory.write_text(json.dumps({**_remembered(memory), key: path}))
        except OSError as error:
            if (full := _full_cache(error)) is not None:
                raise full from error
            raise
        return Dataset.from_file(path)

    return _picked(split, list(found.files), part)


def _remembered(memory: Path) -> dict[str, str]:
    """Return split → Arrow file for a hub dataset that was read before, for use while the hub is unavailable."""
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}
    return {str(key): str(path) for key, path in known.items() if Path(path).exists()}


def _downloaded(files: Sequence[str], num_proc: int | None) -> list[str]:
    """Return local copies of a hub's files, from the cache of ``datasets``."""
    from datasets import DownloadConfig, DownloadManager

    if not files[0].startswith("hf://"):
        return list(files)
    manager = DownloadManager(download_config=DownloadConfig(num_proc=num_proc))
    paths: list[str] = manager.download(list(files))
    return paths


def _picked(split: str, splits: Sequence[str], load: Callable[[str], Any]) -> Any:
    """Return a split, or slices and sums of splits."""
    from datasets import concatenate_datasets

    if split in splits:
        return load(split)
    names = dict.fromkeys(_names_in(split))
    loaded = {name: load(name) for name in names if name in splits}
    lengths = {name: len(loaded[name]) if name in loaded else 0 for name in splits}
    parts = [loaded[name].select(range(first, max(first, last))) for name, first, last in _absolute(split, lengths)]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def _load(
    name: str,
    config_name: str | None,
    split: str,
    data_files: Sequence[str] | None,
    revision: str | None,
    streaming: bool,
    num_proc: int | None,
) -> Any:
    from datasets import Dataset, load_dataset, load_from_disk

    if not is_saved(name):
        check_exists(name, data_files)
        local = data_files is not None or Path(name).expanduser().is_dir()
        separator: dict[str, Any] = {"sep": "\t"} if name == "tsv" else {}
        # Texts such as "NA" and "null" are not missing values.
        separator |= {"keep_default_na": False} if name in ("csv", "tsv") else {}
        with _hub(name):
            return _translated(
                name,
                lambda: load_dataset(
                    "csv" if name == "tsv" else _expanded(name),
                    config_name,
                    split=split,
                    data_files=_listed(data_files),
                    revision=revision,
                    streaming=streaming,
                    num_proc=None if local or streaming else num_proc,
                    **separator,
                ),
            )
    saved = _translated(name, lambda: load_from_disk(str(Path(name).expanduser())))
    splits = {"train": saved} if isinstance(saved, Dataset) else saved
    if isinstance(saved, Dataset) and split.split("[")[0] != "train":
        raise DatasetError(
            f"distillation.dataset.split: expected 'train', or a slice of it, for the saved dataset {name!r}, which "
            f"has no splits, got {split!r}"
        )
    loaded = _picked(split, list(splits), lambda key: splits[key])
    return loaded.to_iterable_dataset() if streaming else loaded


def _translated(name: str, call: Callable[[], Any], data_files: Sequence[str] | None = None) -> Any:
    """Call ``datasets`` and translate its errors into terms of the settings."""
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    where = f"distillation.dataset.name: expected a dataset, got {name!r}"
    try:
        return call()
    except DatasetError:
        raise
    except StopIteration as error:
        # datasets 5.2 raises this for JSON files without rows.
        raise DatasetError(f"{where} without a single row; check data_files") from error
    except (DatasetNotFoundError, DatasetGenerationError, ValueError, OSError, RuntimeError, ImportError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        if (full := _full_cache(cause)) is not None:
            raise full from error
        remote = next((file for file in data_files or () if "://" in file), None)
        if remote is not None and isinstance(cause, ImportError):
            raise DatasetError(f"{where}, which cannot read {remote!r}: {needed_for(remote, cause)}") from error
        private = ", or log in with hf auth login (or set HF_TOKEN) if it is private or gated"
        login = private if isinstance(error, DatasetNotFoundError) else ""
        raise DatasetError(
            f"{where}: {first_line(cause)}; correct the name, config_name, split or data_files{login}"
        ) from error


def _full_cache(error: BaseException) -> CapacityError | None:
    """Return the error for a cache of ``datasets`` that cannot be written, if that is the cause."""
    from datasets import config

    reason = no_room(error)
    if reason is None and isinstance(error, PermissionError) and error.filename is not None:
        is_inside = Path(os.fsdecode(error.filename)).is_relative_to(config.HF_DATASETS_CACHE)
        reason = error.strerror if is_inside else None
    if reason is None:
        return None
    return CapacityError(
        f"{config.HF_DATASETS_CACHE}: expected to write the cache of datasets, got {reason!r}; make room, or export "
        "HF_DATASETS_CACHE, a folder that this machine can write and all workers can read"
    )


def _listed(data_files: Sequence[str] | None) -> list[str] | None:
    return [_expanded(file) for file in data_files] if data_files else None


def _expanded(path: str) -> str:
    """Return a path with ``~`` resolved. Other texts, such as URLs, are unchanged."""
    return str(Path(path).expanduser()) if path.startswith("~") else path
