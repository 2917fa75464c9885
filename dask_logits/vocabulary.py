"""Compare the id-to-token maps of tokenizers by digest, and locate a difference by one byte per id.

The teacher's targets are valid for a student only if both tokenizers map ids to the same tokens. Whether they split
text alike does not matter, because the cache stores ids.

Dimension letters: V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dask_logits.errors import CacheError


class HasVocabulary(Protocol):
    """Tokenizer interface, named as in ``transformers`` and ``tokenizers``."""

    def get_vocab(self) -> Mapping[str, int]:
        """Return token → id."""


def map_digest(vocabulary: Mapping[str, int]) -> str:
    """Return the SHA-256 of an id → token map.

    >>> map_digest({"a": 0, "b": 1}) == map_digest({"b": 1, "a": 0})
    True
    """
    pairs = sorted((i, token) for token, i in vocabulary.items())
    return hashlib.sha256(json.dumps(pairs, ensure_ascii=False).encode()).hexdigest()


def token_crcs(vocabulary: Mapping[str, int]) -> npt.NDArray[np.uint8]:
    """Return the lowest byte of the CRC-32 of each id's token in UTF-8, 0 for missing ids: [V].

    >>> token_crcs({"a": 0, "b": 2})
    array([ 67,   0, 249], dtype=uint8)
    """
    crcs = np.zeros(max(vocabulary.values(), default=-1) + 1, np.uint8)
    for token, i in vocabulary.items():
        crcs[i] = zlib.crc32(token.encode(errors="surrogatepass")) & 0xFF
    return crcs


def check_tokenizer(
    attributes: Mapping[str, Any],
    teacher_crcs: npt.NDArray[np.uint8] | None,
    tokenizer: HasVocabulary,
    where: str,
    setting: str = "student_tokenizer",
) -> None:
    """Refuse a student's tokenizer that maps ids to different tokens than the teacher's.

    Parameters
    ----------
    attributes
        Attributes of a cache.
    teacher_crcs
        :func:`token_crcs` of the teacher's tokenizer. None: unknown.
    tokenizer
        The student's tokenizer.
    where
        The cache, for error messages.
    setting
        What the tokenizer was given as, for error messages.

    Raises
    ------
    CacheError
        If a token differs, naming the first id whose byte differs, or if the cache does not name its tokenizer.
    """
    whole = tokenizer.get_vocab()
    n_teacher = int(attributes.get("tokenizer_ids") or max(whole.values(), default=-1) + 1)
    # Tokens added for the student after the teacher's are harmless.
    vocabulary = {token: i for token, i in whole.items() if i < n_teacher}
    expected = attributes.get("tokenizer_map_digest")
    if not expected:
        raise CacheError(
            f"{where}: expected a cache that names its tokenizer, got one made from token ids without; compare them "
            f"yourself, and leave {setting} out",
            where,
        )
    if map_digest(vocabulary) == expected:
        return
    n_ids = max(whole.values(), default=-1) + 1
    place = ""
    if teacher_crcs is not None:
        student_crcs = token_crcs(vocabulary)
        n_common = min(len(teacher_crcs), len(student_crcs))
        # Different tokens share a byte once in 256 cases.
        differing = np.flatnonzero(teacher_crcs[:n_common] != student_crcs[:n_common])
        first = int(differing[0]) if len(differing) else n_common
        if first < max(len(teacher_crcs), len(student_crcs)):
            found = next((token for token, i in vocabulary.items() if i == first), None)
            place = f", which has no token with id {first}" if found is None else f", in which id {first} is {found!r}"
    raise CacheError(
        f"{setting}: expected the teacher's tokenizer of {n_teacher} ids ({where}), got one of {n_ids} ids"
        f"{place}; choose a student with the teacher's tokenizer",
        where,
    )
