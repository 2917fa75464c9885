"""Dataset + tokenizer → token ids of any range of rows, read by each worker from the Arrow files themselves.

The driver opens the dataset, finds the column, hashes the rows that are used and cuts them into slices of files; a
worker reads its slices and tokenises them. No row passes through Dask. A dataset whose rows are not plainly those of
its files (in memory, selected, shuffled, sliced) is written once into the run folder.

This is the home of ``datasets`` and of transformers' tokenizers.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dask_logits.config import DatasetConfig, TeacherConfig, nearest
from dask_logits.errors import DatasetError, TeacherError
from dask_logits.records import Array

if TYPE_CHECKING:
    from datasets import Dataset

_HASH_ROWS = 10_000
_SAMPLE_ROWS = 256
# A tokenizer that covers less of the head than this is taken for another model's (Qwen, Phi and DeepSeek pad < 3 %).
_LEAST_COVERED = 0.9


@dataclass(frozen=True, kw_only=True)
class FileRows:
    """A range of rows of one Arrow file."""

    path: str
    first: int
    n_rows: int


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """How text becomes ids, and whether ids can be trusted.

    Parameters
    ----------
    path, revision, trust_remote_code
        What to load; path None: the rows hold ids already.
    identity
        Digest the loaded tokenizer must have.
    add_special_tokens, max_length
        How documents are made.
    vocab_size
        Valid vocabulary.
    """

    path: str | None
    revision: str | None
    trust_remote_code: bool
    identity: str | None
    add_special_tokens: bool
    max_length: int
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A loaded tokenizer's identity.

    Parameters
    ----------
    vocab_size
        Highest id it can produce, plus one.
    map_digest
        SHA-256 of its id → token map: equal where ids mean the same tokens.
    digest
        SHA-256 of the map and of its rules: equal where the same text gives the same ids.
    """

    vocab_size: int
    map_digest: str
    digest: str


class Corpus:
    """An opened dataset: the rows that are used, and where workers find them.

    Parameters
    ----------
    dataset
        All rows.
    n_rows
        Rows used, from the first.
    column
        ``input_ids`` or the text column.
    """

    def __init__(self, dataset: Dataset, n_rows: int, column: str) -> None:
        self.dataset = dataset
        self.n_rows = n_rows
        self.column = column

    @property
    def is_text(self) -> bool:
        """Whether rows must be tokenised."""
        return self.column != "input_ids"

    @functools.cached_property
    def content_digest(self) -> str:
        """SHA-256 of the used rows of the used column, however they are chunked or stored."""
        return hash_rows(self.dataset, self.column, self.n_rows)

    def files(self) -> list[FileRows] | None:
        """Return the files that hold exactly the dataset's rows in order, or None if they are not plainly in files."""
        if self.dataset._indices is not None or not self.dataset.cache_files:
            return None
        paths = [entry["filename"] for entry in self.dataset.cache_files]
        files = [FileRows(path=path, first=0, n_rows=len(_open_arrow(path))) for path in paths]
        if sum(file.n_rows for file in files) != len(self.dataset):
            return None
        if any(self.column not in _open_arrow(path).column_names for path in paths):
            return None
        return files

    def sample(self) -> list[Any]:
        """Return a fixed sample of rows, spread evenly, for estimates."""
        count = min(self.n_rows, _SAMPLE_ROWS)
        rows = [i * self.n_rows // count for i in range(count)]
        return list(self.dataset.select_columns([self.column])[rows][self.column])

    def rows(self, first: int, count: int) -> list[Any]:
        """Return up to `count` of the used rows."""
        stop = min(first + count, self.n_rows)
        return list(self.dataset.select_columns([self.column])[first:stop][self.column])

    def materialise(self, folder: Path) -> list[FileRows]:
        """Write the used rows to a folder, or take the ones that are there, and return their files.

        Raises
        ------
        DatasetError
            If the folder holds other rows.
        """
        from datasets import load_from_disk

        if not folder.exists():
            aside = folder.with_name(f".{folder.name}.{os.getpid()}")
            shutil.rmtree(aside, ignore_errors=True)
            self.dataset.select_columns([self.column]).select(range(self.n_rows)).save_to_disk(str(aside))
            aside.replace(folder)
        written = Corpus(load_from_disk(str(folder)), self.n_rows, self.column)
        files = written.files()
        if files is None or len(written.dataset) != self.n_rows or written.content_digest != self.content_digest:
            raise DatasetError(f"{folder}: expected the rows this run was made with, got others; delete the folder")
        return files


def open_corpus(config: DatasetConfig, dataset: Dataset | None = None) -> Corpus:
    """Open the dataset and find its column.

    Parameters
    ----------
    config
        Which dataset and column; only the column settings matter if `dataset` is given.
    dataset
        An opened dataset.

    Raises
    ------
    DatasetError
        If the dataset is missing or empty or lacks the column.
    """
    opened = _load(config) if dataset is None else dataset
    n_rows = len(opened) if config.max_samples in (None, "all") else min(len(opened), int(config.max_samples))
    columns = opened.column_names
    column = "input_ids" if "input_ids" in columns else config.text_column
    if column not in columns:
        raise DatasetError(
            f"distillation.dataset.text_column: expected one of the columns {columns}, got {column!r}"
            f"{nearest(column, columns)}"
        )
    if n_rows == 0:
        raise DatasetError(
            "distillation.dataset.name: expected at least one row, got an empty dataset; check the split"
        )
    return Corpus(opened, n_rows, column)


def inspect_tokenizer(
    config: TeacherConfig, dataset: DatasetConfig, corpus: Corpus, head_width: int
) -> tuple[Tokenizer | None, TokenizerSpec]:
    """Load the tokenizer in the driver and settle the valid vocabulary.

    Parameters
    ----------
    config, dataset
        Settings.
    corpus
        The rows; text needs a tokenizer, ids do not.
    head_width
        Logit width of the teacher.

    Raises
    ------
    TeacherError
        If text has no tokenizer, or the tokenizer does not match the teacher's vocabulary.
    """
    path = config.tokenizer_path or str(config.model_path)
    if Path(path).expanduser().is_dir():
        # Workers may have another working directory.
        path = str(Path(path).expanduser().absolute())
    revision = config.revision if config.tokenizer_path is None else None
    tokenizer: Tokenizer | None = None
    try:
        tokenizer = _identify(_read_tokenizer(path, revision, config.trust_remote_code))
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        if corpus.is_text or config.tokenizer_path is not None:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise TeacherError(
                f"distillation.teacher.tokenizer_path: expected a tokenizer, got {path!r}: {reason}; "
                "set it to the teacher's tokenizer, or give rows with input_ids"
            ) from error
    if tokenizer is not None and dataset.vocab_size is None:
        _check_match(tokenizer.vocab_size, head_width, path)
    vocab_size = dataset.vocab_size or (tokenizer.vocab_size if tokenizer else head_width)
    if vocab_size > head_width:
        raise TeacherError(
            f"distillation.dataset.vocab_size: expected at most the teacher's logit width {head_width}, "
            f"got {vocab_size}"
        )
    return tokenizer, TokenizerSpec(
        path=path if corpus.is_text else None,
        revision=revision,
        trust_remote_code=config.trust_remote_code,
        identity=tokenizer.digest if tokenizer else None,
        add_special_tokens=dataset.add_special_tokens,
        max_length=dataset.max_length,
        vocab_size=vocab_size,
    )


def tokenize(rows: Sequence[Any], spec: TokenizerSpec, *, first_row: int = 0) -> list[Array]:
    """Turn rows into documents of token ids, cut at ``max_length``.

    Parameters
    ----------
    rows
        Texts, or lists of ids; None is an empty document.
    spec
        The tokenizer, or none for ids.
    first_row
        Dataset row of the first, for messages.

    Returns
    -------
    list of int32 arrays

    Raises
    ------
    DatasetError
        If a row is not text (not ids), or holds an id outside the valid vocabulary; names the row.
    TeacherError
        If this process finds another tokenizer than the driver.
    """
    expected = list if spec.path is None else str
    for i, row in enumerate(rows):
        if row is not None and not isinstance(row, expected):
            raise DatasetError(
                f"dataset row {first_row + i}: expected {expected.__name__}, got {type(row).__name__} {row!r:.80}; "
                "name another column or clean the row",
                row=first_row + i,
            )
    if spec.path is None:
        ids = [row or [] for row in rows]
    else:
        tokenizer = _load_tokenizer(spec.path, spec.revision, spec.trust_remote_code, spec.identity)
        filled = [i for i, row in enumerate(rows) if row]
        ids = [[] for _ in rows]
        if filled:
            encoded = tokenizer(
                [rows[i] for i in filled],
                add_special_tokens=spec.add_special_tokens,
                truncation=True,
                max_length=spec.max_length,
                return_attention_mask=False,
                return_token_type_ids=False,
            )["input_ids"]
            for i, row_ids in zip(filled, encoded, strict=True):
                ids[i] = row_ids
    return [_checked(row_ids[: spec.max_length], spec.vocab_size, first_row + i) for i, row_ids in enumerate(ids)]


def read_documents(files: Sequence[FileRows], column: str, spec: TokenizerSpec, *, first_row: int) -> list[Array]:
    """Read and tokenise consecutive rows from Arrow files."""
    rows: list[Any] = []
    for file in files:
        rows += _open_arrow(file.path)[file.first : file.first + file.n_rows][column]
    return tokenize(rows, spec, first_row=first_row)


def slice_files(files: Sequence[FileRows], first: int, n_rows: int) -> tuple[FileRows, ...]:
    """Cut the range of rows [first, first + n_rows) out of consecutive files.

    >>> parts = [FileRows(path="a", first=0, n_rows=3), FileRows(path="b", first=0, n_rows=4)]
    >>> [(part.path, part.first, part.n_rows) for part in slice_files(parts, 2, 3)]
    [('a', 2, 1), ('b', 0, 2)]
    """
    starts = [0, *itertools.accumulate(file.n_rows for file in files)]
    pieces = []
    i = bisect.bisect_right(starts, first) - 1
    while n_rows > 0 and i < len(files):
        skip = first - starts[i]
        taken = min(n_rows, files[i].n_rows - skip)
        if taken > 0:
            pieces.append(FileRows(path=files[i].path, first=files[i].first + skip, n_rows=taken))
        first, n_rows, i = first + taken, n_rows - taken, i + 1
    return tuple(pieces)


def hash_rows(dataset: Dataset, column: str, n_rows: int) -> str:
    """Digest the first rows of a column by content: lengths and values, in order."""
    lengths, values = hashlib.sha256(), hashlib.sha256()
    narrow = dataset.select_columns([column]).with_format("arrow")
    for first in range(0, n_rows, _HASH_ROWS):
        table = narrow[first : min(first + _HASH_ROWS, n_rows)]
        for chunk in _flat_chunks(table[column]):
            lengths.update(chunk[0].tobytes())
            values.update(chunk[1])
    return hashlib.sha256(lengths.digest() + values.digest()).hexdigest()


def _flat_chunks(column: Any) -> Iterator[tuple[Array, bytes]]:
    """Yield each chunk's row lengths (−1 for null) as int64, and its values' bytes."""
    for chunk in column.chunks:
        if pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
            rows = chunk.cast(pa.large_list(pa.int64()))
            yield _lengths(rows), rows.flatten().to_numpy(zero_copy_only=False).astype("<i8").tobytes()
        else:
            rows = chunk.cast(pa.large_binary()) if pa.types.is_binary(chunk.type) else chunk.cast(pa.large_string())
            yield (
                _lengths(rows.cast(pa.large_binary())),
                b"".join(value.as_buffer() for value in rows if value.is_valid),
            )


def _lengths(rows: Any) -> Array:
    import pyarrow.compute as pc

    counts = pc.binary_length(rows) if pa.types.is_large_binary(rows.type) else pc.list_value_length(rows)
    filled: Array = counts.fill_null(-1).to_numpy(zero_copy_only=False).astype("<i8")
    return filled


def _load(config: DatasetConfig) -> Dataset:
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    name = str(config.name)
    where = f"distillation.dataset.name: expected a dataset, got {name!r}"
    folder = Path(name).expanduser()
    saved = (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()
    try:
        if saved:
            loaded = load_from_disk(str(folder))
        else:
            loaded = load_dataset(
                name,
                config.config_name,
                split=config.split,
                data_files=list(config.data_files) if config.data_files else None,
                revision=config.revision,
                num_proc=config.num_proc if config.data_files is None and not folder.is_dir() else None,
            )
    except StopIteration as error:
        # datasets 5.2 says so of JSON files without a row.
        raise DatasetError(f"{where} without a single row; check data_files") from error
    except (DatasetNotFoundError, FileNotFoundError, DatasetGenerationError, ValueError, OSError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise DatasetError(f"{where}: {reason}; correct the name, config_name, split or data_files") from error
    if isinstance(loaded, DatasetDict):
        if config.split not in loaded:
            raise DatasetError(
                f"distillation.dataset.split: expected one of {list(loaded)}, got {config.split!r}"
                f"{nearest(config.split, list(loaded))}"
            )
        loaded = loaded[config.split]
    if not isinstance(loaded, Dataset):
        raise DatasetError(f"{where}, which is a {type(loaded).__name__}; expected a regular dataset")
    return loaded


def _open_arrow(path: str) -> Any:
    state = Path(path).stat()
    return _map_arrow(path, state.st_ino, state.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _map_arrow(path: str, inode: int, changed: int) -> Any:
    """Map an Arrow file; the state is part of the key, because a worker may outlive the file of an earlier run."""
    from datasets import Dataset

    return Dataset.from_file(path)


@functools.lru_cache(maxsize=2)
def _load_tokenizer(path: str, revision: str | None, trust_remote_code: bool, identity: str | None) -> Any:
    """Load the tokenizer the driver saw, or the one this process already holds."""
    loaded = _read_tokenizer(path, revision, trust_remote_code)
    found = _identify(loaded).digest
    if found != identity:
        raise TeacherError(
            f"distillation.teacher.tokenizer_path: expected the tokenizer {str(identity)[:16]}… that the driver saw, "
            f"got {found[:16]}… at {path!r}; give every machine the same files"
        )
    return loaded


def _read_tokenizer(path: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)


def _identify(loaded: Any) -> Tokenizer:
    ids = loaded.get_vocab()
    map_lines = json.dumps(sorted((i, token) for token, i in ids.items()), ensure_ascii=False)
    backend = getattr(loaded, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    # Left there by the last call, not part of the tokenizer.
    rules.update(truncation=None, padding=None)
    rule_lines = json.dumps([type(loaded).__name__, rules], sort_keys=True, ensure_ascii=False)
    return Tokenizer(
        vocab_size=max(ids.values(), default=-1) + 1,
        map_digest=hashlib.sha256(map_lines.encode()).hexdigest(),
        digest=hashlib.sha256((map_lines + rule_lines).encode()).hexdigest(),
    )


def _check_match(vocab_size: int, head_width: int, path: str) -> None:
    if vocab_size > head_width or vocab_size < _LEAST_COVERED * head_width:
        raise TeacherError(
            f"distillation.teacher.tokenizer_path: expected a tokenizer for the teacher's {head_width} logits, got "
            f"{path!r} with {vocab_size} ids; give the teacher's own tokenizer, or say which ids are valid with "
            "distillation.dataset.vocab_size"
        )


def _checked(ids: Sequence[int], vocab_size: int, row: int) -> Array:
    array = np.asarray(ids, dtype=np.int64)
    if array.size and (array.min() < 0 or array.max() >= vocab_size):
        bad = int(array[(array < 0) | (array >= vocab_size)][0])
        raise DatasetError(
            f"dataset row {row}: expected token ids in [0, {vocab_size}), got {bad}; tokenise with the teacher's "
            "tokenizer, or set distillation.dataset.vocab_size",
            row=row,
        )
    return array.astype(np.int32)
