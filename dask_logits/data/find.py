"""Find the files of a dataset by its name, and say in terms of the settings why there are none."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dask_logits.config.groups import DatasetConfig
from dask_logits.data.hub import given_up_soon
from dask_logits.data.parquet_files import needed_for
from dask_logits.errors import CapacityError, DatasetError, first_line
from dask_logits.files.atomic import no_room

_OWN_READERS = ("json", "csv", "text", "parquet")
READERS = (*_OWN_READERS, "tsv", "arrow", "pandas", "webdataset", "xml", "hdf5")
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar")
_FILE_SUFFIXES = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "tsv", ".txt": "text", ".md": "text",
    ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
_COMPRESSIONS = {".gz", ".bz2", ".xz", ".zst"}


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


def is_saved(name: str) -> bool:
    """Whether a name is a ``save_to_disk`` folder."""
    folder = Path(name).expanduser()
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def is_hub(name: str) -> bool:
    """Whether a dataset of this name can only be on a hub."""
    return name not in READERS and not Path(name).expanduser().exists()


def find_files(config: DatasetConfig) -> FoundFiles:
    """Find the files of a dataset by its name, without reading them.

    Raises
    ------
    DatasetError
        If the dataset does not exist.
    """
    from datasets import load_dataset_builder

    builder = call_datasets(config, load_dataset_builder)
    files = {str(key): [str(file) for file in value] for key, value in (builder.config.data_files or {}).items()}
    separator = getattr(builder.config, "sep", None)
    return FoundFiles(
        reader=builder.name,
        files=files,
        # A comma may be the default of ``datasets``. Only a different separator comes from the dataset.
        separator="\t" if config.name == "tsv" else None if separator == "," else separator,
        is_configured=_has_options(builder.config),
    )


def call_datasets(config: DatasetConfig, load: Callable[..., Any], **options: Any) -> Any:
    """Have ``datasets`` find or load a dataset by its name.

    Raises
    ------
    DatasetError
        If it does not exist.
    """
    _check_exists(config)
    name, files = str(config.name), config.data_files
    with given_up_soon(name, is_hub(name)):
        return translated(
            config,
            lambda: load(
                "csv" if name == "tsv" else expanded(name),
                config.config_name,
                data_files=[expanded(file) for file in files] if files else None,
                revision=config.revision,
                **options,
            ),
        )


def translated(config: DatasetConfig, call: Callable[[], Any]) -> Any:
    """Call ``datasets`` and translate its errors into terms of the settings."""
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    where = f"distillation.dataset.name: expected a dataset, got {str(config.name)!r}"
    try:
        return call()
    except DatasetError:
        raise
    except StopIteration as error:
        # datasets 5.2 raises this for JSON files without rows.
        raise DatasetError(f"{where} without a single row; check data_files") from error
    except (DatasetNotFoundError, DatasetGenerationError, ValueError, OSError, RuntimeError, ImportError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        if (full := full_cache(cause)) is not None:
            raise full from error
        remote = next((file for file in config.data_files or () if "://" in file), None)
        if remote is not None and isinstance(cause, ImportError):
            raise DatasetError(f"{where}, which cannot read {remote!r}: {needed_for(remote, cause)}") from error
        private = ", or log in with hf auth login (or set HF_TOKEN) if it is private or gated"
        login = private if isinstance(error, DatasetNotFoundError) else ""
        raise DatasetError(
            f"{where}: {first_line(cause)}; correct the name, config_name, split or data_files{login}"
        ) from error


def full_cache(error: BaseException) -> CapacityError | None:
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


def expanded(path: str) -> str:
    """Return a path with ``~`` resolved. Other texts, such as URLs, are unchanged."""
    return str(Path(path).expanduser()) if path.startswith("~") else path


def _check_exists(config: DatasetConfig) -> None:
    """Refuse a name that must be a path but does not exist, before asking a hub, and files of a reader likewise.

    Raises
    ------
    DatasetError
        If a local file is named instead of a reader, or a path or pattern matches no file.
    """
    where, name = "distillation.dataset.name", str(config.name)
    if name in READERS:
        # ``datasets`` leaves a pattern without files out in silence if another one has some.
        for pattern in config.data_files or ():
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


def _has_options(config: Any) -> bool:
    """Whether a reader's options differ from its defaults, except for the separator."""
    plain = type(config)()
    known = {"name", "version", "data_dir", "data_files", "description", "sep", "delimiter"}
    names = {field.name for field in dataclasses.fields(config)} - known
    return any(getattr(config, name) != getattr(plain, name) for name in names)


def _matches(pattern: str) -> bool:
    """Whether there is a file at a path or pattern. Remote ones are left to ``datasets``."""
    from datasets.data_files import resolve_pattern

    local = expanded(pattern)
    try:
        return "://" in local or Path(local).exists() or bool(resolve_pattern(local, base_path=str(Path.cwd())))
    except (FileNotFoundError, ValueError):
        return False
