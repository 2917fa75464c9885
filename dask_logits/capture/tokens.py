"""Tokenizer → token ids, the same in every process: what the driver identified is what workers must find.

This is the home of transformers' tokenizers.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dask_logits.config import DatasetConfig, TeacherConfig
from dask_logits.errors import DatasetError, TeacherError, first_line
from dask_logits.records import Array
from dask_logits.tokenmap import map_digest, token_crcs

# A tokenizer that covers less of the head than this is taken for another model's (Qwen, Phi and DeepSeek pad < 3 %).
_LEAST_COVERED = 0.9


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
    """

    path: str | None
    revision: str | None
    trust_remote_code: bool
    identity: str | None
    add_special_tokens: bool
    max_length: int | None
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
    )


def tokenize(rows: Sequence[Any], spec: TokenizerSpec, *, first_row: int = 0) -> list[Array]:
    """Turn rows into documents of token ids, cut at ``max_length`` if there is one.

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
            encoded = encode(tokenizer, [rows[i] for i in filled], spec.add_special_tokens, spec.max_length)
            for i, row_ids in zip(filled, encoded, strict=True):
                ids[i] = row_ids
    return [_checked(row_ids[: spec.max_length], spec.vocab_size, first_row + i) for i, row_ids in enumerate(ids)]


def encode(tokenizer: Any, texts: Sequence[str], add_special_tokens: bool, max_length: int | None) -> list[list[int]]:
    """Return the ids of texts, cut at `max_length` if it is given."""
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


def _checked(ids: Sequence[int], vocab_size: int, row: int) -> Array:
    try:
        array = np.asarray(ids, dtype=np.int64)
    except (TypeError, ValueError) as error:
        raise DatasetError(f"dataset row {row}: expected a flat list of token ids, got {error}", row=row) from error
    if array.size and (array.min() < 0 or array.max() >= vocab_size):
        bad = int(array[(array < 0) | (array >= vocab_size)][0])
        raise DatasetError(
            f"dataset row {row}: expected token ids in [0, {vocab_size}), got {bad}; tokenise with the teacher's "
            "tokenizer, or set distillation.dataset.vocab_size",
            row=row,
        )
    return array.astype(np.int32)
