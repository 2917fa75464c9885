"""Which id means which token: told apart by digest, the place of a difference by the digests of ranges of ids.

The teacher's targets mean something to a student only if both map ids to the same tokens; whether two tokenizers split
text alike does not matter, because the cache stores ids.

Dimension letters: V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from dask_logits.errors import CacheError

# Ranges of ids that are told apart: 2 KB in the cache.
_RANGES = 256
_DIGITS = 8


class HasVocabulary(Protocol):
    """What is needed of a tokenizer, by the name that ``transformers`` and ``tokenizers`` give it."""

    def get_vocab(self) -> Mapping[str, int]:
        """Return token → id."""


def map_digest(vocabulary: Mapping[str, int]) -> str:
    """Return SHA-256 of an id → token map.

    >>> map_digest({"a": 0, "b": 1}) == map_digest({"b": 1, "a": 0})
    True
    """
    return hashlib.sha256(_lines(sorted((i, token) for token, i in vocabulary.items()))).hexdigest()


def map_ranges(vocabulary: Mapping[str, int]) -> list[str]:
    """Return the digests of at most 256 ranges of equally many ids, 8 digits each."""
    pairs = sorted((i, token) for token, i in vocabulary.items())
    width = _width(pairs[-1][0] + 1 if pairs else 0)
    ranges: list[list[tuple[int, str]]] = [[] for _ in range(-(-(pairs[-1][0] + 1) // width) if pairs else 0)]
    for i, token in pairs:
        ranges[i // width].append((i, token))
    return [hashlib.sha256(_lines(part)).hexdigest()[:_DIGITS] for part in ranges]


def check_tokenizer(attributes: Mapping[str, Any], tokenizer: HasVocabulary, where: str) -> None:
    """Refuse a student's tokenizer that maps ids to other tokens than the teacher's.

    Parameters
    ----------
    attributes
        Of a cache.
    tokenizer
        The student's.
    where
        The cache, for the message.

    Raises
    ------
    CacheError
        If it does, naming the first range of ids where; or if the cache does not say which tokenizer it is of.
    """
    whole = tokenizer.get_vocab()
    n_teacher = int(attributes.get("tokenizer_ids") or max(whole.values(), default=-1) + 1)
    # Tokens that were added for the student behind the teacher's do no harm.
    vocabulary = {token: i for token, i in whole.items() if i < n_teacher}
    expected = attributes.get("tokenizer_map_digest")
    if not expected:
        raise CacheError(
            f"{where}: expected a cache that names its tokenizer, got one made from token ids without; compare them "
            "yourself, and leave student_tokenizer out",
            where,
        )
    if map_digest(vocabulary) == expected:
        return
    teacher, student = attributes.get("tokenizer_map_ranges") or [], map_ranges(vocabulary)
    n_ids = max(whole.values(), default=-1) + 1
    place = ""
    if teacher and len(teacher) == len(student):
        first = next(i for i, (a, b) in enumerate(zip(teacher, student, strict=True)) if a != b) * _width(n_teacher)
        tokens = {i: token for token, i in vocabulary.items()}
        stop = first + _width(n_teacher)
        place = f" that first differs among ids {first} to {stop - 1} (there {first} is {tokens.get(first)!r})"
    raise CacheError(
        f"student_tokenizer: expected the map of the {n_teacher} ids of {where}, got one of {n_ids} ids{place}; give "
        "the student the teacher's tokenizer",
        where,
    )


def _width(n_ids: int) -> int:
    return max(1, -(-n_ids // _RANGES))


def _lines(pairs: Sequence[tuple[int, str]]) -> bytes:
    return json.dumps(pairs, ensure_ascii=False).encode()
