"""Tokenizer → token ids, the same in every process: what the driver identified is what workers must find.

This is the home of transformers' tokenizers.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dask_logits.config import DatasetConfig, TeacherConfig
from dask_logits.data.values import BadRow, check_ids, check_text
from dask_logits.errors import DatasetError, TeacherError, first_line
from dask_logits.records import Array
from dask_logits.vocabulary import map_digest, token_crcs

# A tokenizer that covers less of the head than this is taken for another model's (Qwen, Phi and DeepSeek pad < 3 %).
_LEAST_COVERED = 0.9
# Of a long text so many characters are tokenized at first for each token that is kept, four times what is common.
_CHARACTERS_PER_TOKEN = 16
_LEAST_CHARACTERS = 4_096
# A prefix ends where a word ends, if one ends within so many characters.
_NEAR_CHARACTERS = 256


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
        How documents are made; max_length None: nothing is cut off.
    vocab_size
        Valid vocabulary.
    on_bad_row
        Whether a row that cannot be used is an error, or a document of 0 tokens.
    """

    path: str | None
    revision: str | None
    trust_remote_code: bool
    identity: str | None
    add_special_tokens: bool
    max_length: int | None
    vocab_size: int
    on_bad_row: Literal["fail", "skip"] = "fail"


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Consecutive documents of token ids.

    Parameters
    ----------
    tokens
        int32 ids of each row.
    skipped
        Row → why it could not be used; such a row has 0 tokens.
    n_double_bos
        Texts that begin with the token that the tokenizer adds at the beginning, so that they have it twice.
    """

    tokens: list[Array]
    skipped: dict[int, str]
    n_double_bos: int


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A loaded tokenizer's identity.

    Parameters
    ----------
    vocab_size
        Highest id it can produce, plus one.
    map_digest
        SHA-256 of its id → token map: equal where ids mean the same tokens.
    crcs
        [V] uint8, a byte of each id's token.
    digest
        SHA-256 of the map and of its rules: equal where the same text gives the same ids.
    end_id
        The id that ends a text; None if it has none.
    """

    vocab_size: int
    map_digest: str
    crcs: Array = field(compare=False, repr=False)
    digest: str
    end_id: int | None


def inspect_tokenizer(
    config: TeacherConfig, dataset: DatasetConfig, *, is_text: bool, head_width: int, max_length: int | None
) -> tuple[Tokenizer | None, TokenizerSpec]:
    """Load the tokenizer in the driver and settle the valid vocabulary.

    Parameters
    ----------
    config, dataset
        Settings.
    is_text
        Whether rows are text, which needs a tokenizer; ids do not.
    head_width
        Logit width of the teacher.
    max_length
        Tokens kept of a document; None: all.

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
        if is_text or config.tokenizer_path is not None:
            raise TeacherError(
                f"distillation.teacher.tokenizer_path: expected a tokenizer, got {path!r}: {first_line(error)}; "
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
        path=path if is_text else None,
        revision=revision,
        trust_remote_code=config.trust_remote_code,
        identity=tokenizer.digest if tokenizer else None,
        add_special_tokens=dataset.add_special_tokens,
        max_length=max_length,
        vocab_size=vocab_size,
        on_bad_row=dataset.on_bad_row,
    )


def tokenize(rows: Sequence[Any], spec: TokenizerSpec, *, first_row: int = 0) -> list[Array]:
    """Return the token ids of rows, as :func:`read_documents` does."""
    return read_documents(rows, spec, first_row=first_row).tokens


def read_documents(rows: Sequence[Any], spec: TokenizerSpec, *, first_row: int = 0) -> Documents:
    """Turn rows into documents of token ids, cut at ``max_length`` if there is one.

    Parameters
    ----------
    rows
        Texts, or lists of ids; None is an empty document.
    spec
        The tokenizer, or none for ids.
    first_row
        Dataset row of the first, for messages.

    Raises
    ------
    DatasetError
        If a row is not text (not ids), or holds an id outside the valid vocabulary, and bad rows are errors; names the
        row.
    TeacherError
        If this process finds another tokenizer than the driver.
    """
    skipped: dict[int, str] = {}

    def bad(i: int, reason: str) -> None:
        if spec.on_bad_row == "fail":
            raise DatasetError(
                f"dataset row {first_row + i}: {reason}; fix the row, or set distillation.dataset.on_bad_row=skip in a "
                "new run",
                row=first_row + i,
            )
        skipped[first_row + i] = reason

    values: list[Any] = []
    for i, row in enumerate(rows):
        value = row if isinstance(row, BadRow) else check_ids(row) if spec.path is None else check_text(row)
        if isinstance(value, BadRow):
            bad(i, value.reason)
        values.append(None if isinstance(value, BadRow) else value)
    n_double_bos = 0
    ids: list[list[int]] = [[] for _ in values] if spec.path else [value or [] for value in values]
    filled = [i for i, value in enumerate(values) if value]
    if spec.path is not None and filled:
        tokenizer = _load_tokenizer(spec.path, spec.revision, spec.trust_remote_code, spec.identity)
        encoded = encode(tokenizer, [values[i] for i in filled], spec.add_special_tokens, spec.max_length)
        bos = tokenizer.bos_token_id
        for i, row_ids in zip(filled, encoded, strict=True):
            ids[i] = row_ids
            n_double_bos += spec.add_special_tokens and bos is not None and row_ids[:2] == [bos, bos]
    tokens = []
    for i, row_ids in enumerate(ids):
        array = np.asarray(row_ids[: spec.max_length], dtype=np.int64)
        if array.size and (array.min() < 0 or array.max() >= spec.vocab_size):
            wrong = int(array[(array < 0) | (array >= spec.vocab_size)][0])
            bad(
                i,
                f"expected token ids in [0, {spec.vocab_size}), got {wrong}; tokenize with the teacher's tokenizer, or "
                "set distillation.dataset.vocab_size",
            )
            array = array[:0]
        tokens.append(array.astype(np.int32))
    return Documents(tokens=tokens, skipped=skipped, n_double_bos=n_double_bos)


def sample_documents(rows: Iterable[tuple[int, Any]], spec: TokenizerSpec) -> Iterator[Documents]:
    """Yield the document of each (row number, row) of a sample that can be used.

    Raises
    ------
    DatasetError
        If none of them can be used.
    """
    first_error: DatasetError | None = None
    found = 0
    for row, value in rows:
        try:
            documents = read_documents([value], spec, first_row=row)
        except DatasetError as error:
            first_error = first_error or error
            continue
        if documents.skipped:
            first_error = first_error or DatasetError(f"dataset row {row}: {documents.skipped[row]}", row=row)
        else:
            found += 1
        yield documents
    if first_error is not None and not found:
        raise first_error


def encode(tokenizer: Any, texts: Sequence[str], add_special_tokens: bool, max_length: int | None) -> list[list[int]]:
    """Return the ids of texts, cut at `max_length` if it is given.

    Of a text that is much longer than `max_length` tokens only a prefix is tokenized.
    """

    if max_length is None:
        return _encode(tokenizer, texts, add_special_tokens, None)
    start = max(_LEAST_CHARACTERS, _CHARACTERS_PER_TOKEN * max_length)
    short = iter(_encode(tokenizer, [t for t in texts if len(t) <= 4 * start], add_special_tokens, max_length))
    return [
        next(short)
        if len(text) <= 4 * start
        else _encode_long(
            lambda prefix: _encode(tokenizer, [prefix], add_special_tokens, max_length)[0], text, start, max_length
        )
        for text in texts
    ]


def _encode(tokenizer: Any, texts: Sequence[str], add_special_tokens: bool, max_length: int | None) -> list[list[int]]:
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(
        list(texts),
        add_special_tokens=add_special_tokens,
        truncation=max_length is not None,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=False,
        # Longer than the model's positions is no accident here: such documents are cut into items.
        verbose=False,
    )["input_ids"]
    return ids


def _encode_long(encode_one: Callable[[str], list[int]], text: str, start: int, max_length: int) -> list[int]:
    """Tokenize growing prefixes of a text until the tokens that are kept no longer depend on where it was cut.

    A cut changes only tokens near it: tokenizers split at white space first, and a merge or a best segmentation of
    pieces of bounded length does not depend on text that is far away. A prefix is taken if it fills `max_length` and
    one of twice its length gives the same tokens.
    """
    before: list[int] | None = None
    length = start
    while length < len(text):
        ids = encode_one(text[: _cut(text, length)])
        if len(ids) == max_length and ids == before:
            return ids
        before, length = ids, 2 * length
    return encode_one(text)


def _cut(text: str, length: int) -> int:
    """Return a place before `length` where a word ends, if there is one near it."""
    for place in range(length, length - _NEAR_CHARACTERS, -1):
        if text[place].isspace() and not text[place - 1].isspace():
            return place
    return length


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

    loaded = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    # Documents are cut at their end, whatever the tokenizer was saved with.
    loaded.truncation_side = "right"
    return loaded


def _identify(loaded: Any) -> Tokenizer:
    ids = loaded.get_vocab()
    digest = map_digest(ids)
    backend = getattr(loaded, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    # Left there by the last call, not part of the tokenizer.
    rules.update(truncation=None, padding=None)
    rule_lines = json.dumps([type(loaded).__name__, rules], sort_keys=True, ensure_ascii=False)
    return Tokenizer(
        vocab_size=max(ids.values(), default=-1) + 1,
        map_digest=digest,
        crcs=token_crcs(ids),
        digest=hashlib.sha256((digest + rule_lines).encode()).hexdigest(),
        end_id=loaded.eos_token_id,
    )


def _check_match(vocab_size: int, head_width: int, path: str) -> None:
    if vocab_size > head_width or vocab_size < _LEAST_COVERED * head_width:
        raise TeacherError(
            f"distillation.teacher.tokenizer_path: expected a tokenizer for the teacher's {head_width} logits, got "
            f"{path!r} with {vocab_size} ids; give the teacher's own tokenizer, or say which ids are valid with "
            "distillation.dataset.vocab_size"
        )
