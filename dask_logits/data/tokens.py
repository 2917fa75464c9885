"""Convert text to token ids, identically in every process: workers must load the driver's tokenizer.

This is the only module that imports transformers' tokenizers.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dask_logits.config.groups import DatasetConfig, TeacherConfig
from dask_logits.data.chat import encode_chat, has_date, template_digest
from dask_logits.data.columns import Column
from dask_logits.data.values import BadRow, check_ids, check_text, with_mask
from dask_logits.errors import DatasetError, TeacherError, first_line
from dask_logits.records import Array
from dask_logits.vocabulary import map_digest, token_crcs

logger = logging.getLogger(__name__)

# A tokenizer that covers less of the head than this is assumed to be another model's (Qwen, Phi, DeepSeek pad < 3 %).
_LEAST_COVERED = 0.9
# Characters of a long text that are tokenized first for each kept token: four times the usual ratio.
_CHARACTERS_PER_TOKEN = 16
_LEAST_CHARACTERS = 4_096
# A prefix ends at the end of a word if there is one within this many characters.
_NEAR_CHARACTERS = 256


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """Rules for converting rows to ids, and for validating them.

    Parameters
    ----------
    path, revision, trust_remote_code
        Tokenizer to load. If path is None, rows already hold ids.
    identity
        Required digest of the loaded tokenizer.
    add_special_tokens, max_length
        How documents are made. If max_length is None, they are not truncated.
    vocab_size
        Valid vocabulary.
    on_bad_row
        Whether an unusable row is an error, or a document of 0 tokens.
    chat_template
        Digest of the template that renders rows, which are chats. None: rows are no chats.
    template_date
        ISO date that the template prints. None: it prints none.
    is_masked
        Whether some tokens are not learned by a student.
    """

    path: str | None
    revision: str | None
    trust_remote_code: bool
    identity: str | None
    add_special_tokens: bool
    max_length: int | None
    vocab_size: int
    on_bad_row: Literal["fail", "skip"] = "fail"
    chat_template: str | None = None
    template_date: str | None = None
    is_masked: bool = False


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Consecutive documents of token ids.

    Parameters
    ----------
    tokens
        int32 ids of each row.
    skipped
        Row → reason why it could not be used. Such a row has 0 tokens.
    n_double_bos
        Number of texts that begin with the tokenizer's BOS token, so that it occurs twice.
    masks
        Which tokens of each row a student learns, bool. None: all.
    """

    tokens: list[Array]
    skipped: dict[int, str]
    n_double_bos: int
    masks: list[Array] | None = None


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Identity of a loaded tokenizer.

    Parameters
    ----------
    vocab_size
        Highest possible id, plus one.
    base_size
        Number of tokens that were not added to the tokenizer later.
    map_digest
        SHA-256 of its id → token map, equal if ids mean the same tokens.
    crcs
        [V] uint8, one byte of each id's token.
    digest
        SHA-256 of the map and the rules, equal if the same text gives the same ids.
    end_id
        The end-of-text id, None if it has none.
    """

    vocab_size: int
    base_size: int
    map_digest: str
    crcs: Array = field(compare=False, repr=False)
    digest: str
    end_id: int | None


def inspect_tokenizer(
    config: TeacherConfig,
    dataset: DatasetConfig,
    *,
    column: Column,
    head_width: int,
    max_length: int | None,
    template_date: str | None = None,
) -> tuple[Tokenizer | None, TokenizerSpec]:
    """Load the tokenizer in the driver and determine the valid vocabulary.

    Parameters
    ----------
    config, dataset
        Settings of the teacher and the dataset.
    column
        Column of the documents. Texts and chats require a tokenizer.
    head_width
        Logit width of the teacher.
    max_length
        Tokens kept of a document. None: all.
    template_date
        ISO date of a run, for chat templates that print one. None: today.

    Raises
    ------
    TeacherError
        If text has no tokenizer, or chats no template, or the tokenizer does not match the teacher's vocabulary.
    """
    is_text, is_chat = column.kind != "ids", column.kind == "chat"
    path = config.tokenizer_path or str(config.model_path)
    if Path(path).expanduser().is_dir():
        # Workers may have another working directory.
        path = str(Path(path).expanduser().absolute())
    revision = config.revision if config.tokenizer_path is None else None
    tokenizer: Tokenizer | None = None
    template: str | None = None
    printed: str | None = None
    try:
        loaded = _read_tokenizer(path, revision, config.trust_remote_code)
        tokenizer, template = _identify(loaded), template_digest(loaded) if is_chat else None
        if is_chat and has_date(loaded):
            printed = template_date or date.today().isoformat()
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        if is_text or config.tokenizer_path is not None:
            raise TeacherError(
                f"distillation.teacher.tokenizer_path: expected a tokenizer, got {path!r}: {first_line(error)}; "
                "set it to the teacher's tokenizer, or give rows with input_ids"
            ) from error
    if tokenizer is not None and dataset.vocab_size is None:
        _check_match(tokenizer, head_width, path)
    vocab_size = dataset.vocab_size or (min(tokenizer.vocab_size, head_width) if tokenizer else head_width)
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
        chat_template=template,
        template_date=printed,
        is_masked=column.mask is not None or (is_chat and dataset.learn == "assistant"),
    )


def local_tokenizer(path: str, digest: str) -> Any | None:
    """Load a tokenizer from this machine's files to decode token ids. No network is used, and no code of the files.

    Parameters
    ----------
    path
        A folder, or a hub name that was downloaded before.
    digest
        Expected ``map_digest`` of its id → token map.

    Returns
    -------
    PreTrainedTokenizerBase or None
        None if there is none, or another one.
    """
    try:
        loaded = _read_tokenizer(str(Path(path).expanduser()), None, False, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError, TypeError, RuntimeError):
        return None
    return loaded if map_digest(loaded.get_vocab()) == digest else None


def read_documents(rows: Sequence[Any], spec: TokenizerSpec, *, first_row: int = 0) -> Documents:
    """Convert rows to documents of token ids, truncated to ``max_length`` if set.

    Parameters
    ----------
    rows
        Texts or lists of ids. None is an empty document.
    spec
        The tokenizer, or none for ids.
    first_row
        Dataset row of the first, for messages.

    Raises
    ------
    DatasetError
        If a row is not text (or not ids), or holds an id outside the valid vocabulary, and bad rows are errors. The
        message names the row.
    TeacherError
        If this process loads another tokenizer than the driver.
    """
    skipped: dict[int, str] = {}

    def usable(row: int, value: Any) -> Any:
        """Return a value, or None for an unusable one that is skipped."""
        if not isinstance(value, BadRow):
            return value
        if spec.on_bad_row == "fail":
            cure = "fix the row, or set distillation.dataset.on_bad_row=skip in a new run"
            raise DatasetError(f"dataset row {row}: {value.reason}; {cure}", row=row)
        skipped[row] = value.reason
        return None

    check = check_ids if spec.path is None else check_text
    values = [usable(i, row if isinstance(row, BadRow) else check(row)) for i, row in enumerate(rows, first_row)]
    n_double_bos = 0 if spec.path is None else _tokenize(values, spec)
    tokens, masks = [], []
    for row, value in enumerate(values, first_row):
        ids_T = np.array((usable(row, value) or [])[: spec.max_length], np.int64)
        mask_T = ids_T >= 0 if spec.is_masked else np.ones(len(ids_T), bool)
        ids_T = np.where(mask_T, ids_T, ~ids_T)
        wrong = ids_T[(ids_T < 0) | (ids_T >= spec.vocab_size)]
        if len(wrong):
            reason = (
                f"expected token ids in [0, {spec.vocab_size}), got {wrong[0]}; tokenize with the teacher's tokenizer, "
                "or set distillation.dataset.vocab_size"
            )
            usable(row, BadRow(reason=reason))
            ids_T, mask_T = ids_T[:0], mask_T[:0]
        tokens.append(ids_T.astype(np.int32))
        masks.append(mask_T)
    return Documents(tokens=tokens, skipped=skipped, n_double_bos=n_double_bos, masks=masks if spec.is_masked else None)


def _tokenize(values: list[Any], spec: TokenizerSpec) -> int:
    """Replace texts and chats by their ids. Return the number of texts that begin with the BOS token twice."""
    filled = [i for i, value in enumerate(values) if isinstance(value, str) and value]
    if not filled:
        return 0
    tokenizer = _loaded(spec)
    if spec.chat_template is not None:
        for i in filled:
            found = encode_chat(tokenizer, values[i], marks=spec.is_masked, date=spec.template_date)
            values[i] = found if isinstance(found, BadRow) else with_mask(*found) if spec.is_masked else found[0]
        return 0
    encoded = encode(tokenizer, [values[i] for i in filled], spec.add_special_tokens, spec.max_length)
    for i, ids in zip(filled, encoded, strict=True):
        values[i] = ids
    bos = tokenizer.bos_token_id if spec.add_special_tokens else None
    return 0 if bos is None else sum(ids[:2] == [bos, bos] for ids in encoded)


def sample_documents(rows: Iterable[tuple[int, Any]], spec: TokenizerSpec) -> Iterator[Documents]:
    """Yield the document of each usable (row number, row) of a sample.

    Raises
    ------
    DatasetError
        If no row is usable.
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
    """Return the ids of texts, truncated to `max_length` if it is given.

    Only a prefix of a text much longer than `max_length` tokens is tokenized.
    """
    ids_of = functools.partial(_encode, tokenizer, add_special_tokens=add_special_tokens, max_length=max_length)
    if max_length is None:
        return ids_of(texts)
    start = max(_LEAST_CHARACTERS, _CHARACTERS_PER_TOKEN * max_length)
    short = iter(ids_of([text for text in texts if len(text) <= 4 * start]))
    return [next(short) if len(text) <= 4 * start else _encode_long(ids_of, text, start, max_length) for text in texts]


def _encode(tokenizer: Any, texts: Sequence[str], add_special_tokens: bool, max_length: int | None) -> list[list[int]]:
    if not texts:
        return []
    # A tokenizer cuts the text to make room for the special tokens, also for those after it.
    room = tokenizer.num_special_tokens_to_add() if add_special_tokens else 0
    ids: list[list[int]] = tokenizer(
        list(texts),
        add_special_tokens=add_special_tokens,
        truncation=max_length is not None,
        max_length=None if max_length is None else max_length + room,
        # No return_token_type_ids: the tokenizer of mistral-common refuses it.
        return_attention_mask=False,
        # A warning about texts longer than the model's positions is irrelevant: such documents are cut into items.
        verbose=False,
    )["input_ids"]
    return [document[:max_length] for document in ids]


def _encode_long(
    ids_of: Callable[[Sequence[str]], list[list[int]]], text: str, start: int, max_length: int
) -> list[int]:
    """Tokenize growing prefixes of a text until the kept tokens no longer depend on the cut.

    A cut affects only nearby tokens: tokenizers split at white space first, and a merge or a best segmentation of
    pieces of bounded length does not depend on distant text. A prefix is accepted if it fills `max_length` and a prefix
    of twice its length gives the same tokens.
    """
    before: list[int] | None = None
    length = start
    while length < len(text):
        (ids,) = ids_of([text[: _cut(text, length)]])
        if len(ids) == max_length and ids == before:
            return ids
        before, length = ids, 2 * length
    return ids_of([text])[0]


def _cut(text: str, length: int) -> int:
    """Return the end of a word shortly before `length`, or `length` if there is none."""
    for place in range(length, length - _NEAR_CHARACTERS, -1):
        if text[place].isspace() and not text[place - 1].isspace():
            return place
    return length


def _loaded(spec: TokenizerSpec) -> Any:
    """Return the tokenizer, as the driver saw it."""
    return _load_tokenizer(str(spec.path), spec.revision, spec.trust_remote_code, spec.identity, spec.chat_template)


@functools.lru_cache(maxsize=2)
def _load_tokenizer(
    path: str, revision: str | None, trust_remote_code: bool, identity: str | None, template: str | None
) -> Any:
    """Load the driver's tokenizer, or reuse the one held by this process."""
    loaded = _read_tokenizer(path, revision, trust_remote_code)
    found = _identify(loaded).digest
    if found != identity:
        raise TeacherError(
            f"distillation.teacher.tokenizer_path: expected the tokenizer {str(identity)[:16]}… that the driver saw, "
            f"got {found[:16]}… at {path!r}; give every machine the same files"
        )
    if template is not None and template_digest(loaded) != template:
        raise TeacherError(
            f"distillation.teacher.tokenizer_path: expected the chat template {template[:16]}… that the "
            f"driver saw, got another at {path!r}; give every machine the same files"
        )
    return loaded


def _read_tokenizer(path: str, revision: str | None, trust_remote_code: bool, *, local_files_only: bool = False) -> Any:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(
        path, revision=revision, trust_remote_code=trust_remote_code, local_files_only=local_files_only
    )
    # Documents are truncated at their end, regardless of the saved setting.
    loaded.truncation_side = "right"
    return loaded


def _identify(loaded: Any) -> Tokenizer:
    ids = loaded.get_vocab()
    digest = map_digest(ids)
    backend = getattr(loaded, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    # State left by the last call, not part of the tokenizer.
    rules.update(truncation=None, padding=None)
    rule_lines = json.dumps([type(loaded).__name__, rules], sort_keys=True, ensure_ascii=False)
    return Tokenizer(
        vocab_size=max(ids.values(), default=-1) + 1,
        base_size=loaded.vocab_size,
        map_digest=digest,
        crcs=token_crcs(ids),
        digest=hashlib.sha256((digest + rule_lines).encode()).hexdigest(),
        end_id=loaded.eos_token_id,
    )


def _check_match(tokenizer: Tokenizer, head_width: int, path: str) -> None:
    if tokenizer.base_size > head_width or tokenizer.vocab_size < _LEAST_COVERED * head_width:
        raise TeacherError(
            f"distillation.teacher.tokenizer_path: expected a tokenizer for the teacher's {head_width} logits, got "
            f"{path!r} with {tokenizer.vocab_size} ids; give the teacher's own tokenizer, or say which ids are valid "
            "with distillation.dataset.vocab_size"
        )
    if tokenizer.vocab_size > head_width:
        # Such as the image token of Gemma 3 1B, or a token for padding.
        logger.warning(
            "the tokenizer has added tokens without logits: %d ids for %d logits; a row with one of them is a bad row",
            tokenizer.vocab_size,
            head_width,
        )
