"""Convert a cache to another profile: all data is verified, all attributes are kept.

Compact to plain keeps the content and its digest. Plain to compact rounds log-probs, as a job with the compact profile
would. Its id table is computed from the cache's own first tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dask_logits.cache.find import CacheFiles, check_one_job, check_whole
from dask_logits.cache.pieces import cache_pieces, consolidate
from dask_logits.cache.profile import PRECISIONS, Compact, Plain, Precision, Profile, id_table
from dask_logits.cache.reader import CacheReader
from dask_logits.errors import CacheError, ConfigError, RunConflictError
from dask_logits.files.atomic import expanded, room
from dask_logits.files.lock import lease
from dask_logits.run.folder import CONSOLIDATION_LOCK

# Tokens whose kept ids determine the table. More tokens save less than a byte per token.
_TABLE_TOKENS = 50_000
# Attributes set by the new file.
_OWN = {
    "format", "format_version", "profile", "n_tokens", "n_entries", "n_targets", "n_target_entries", "n_documents",
    "n_blocks", "top_k", "draws", "vocab_size", "precision", "source_precision", "chunk_tokens", "crc32_block_bytes",
    "temperature", "target_shift", "order", "content_digest", "complete",
}  # fmt: skip
# Attributes of a numbered file only.
_OF_A_PART = {"partial", "shard", "made_of"}


def convert(
    source: str | Path,
    target: str | Path,
    *,
    profile: Literal["plain", "compact"],
    precision: Precision = 8,
) -> Path:
    """Rewrite a cache in another profile.

    Parameters
    ----------
    source
        A cache file, or an index, whose files are joined.
    target
        File to write. An existing cache of the same run is replaced when the new one is complete.
    profile
        ``plain`` or ``compact``.
    precision
        Bits of a log-prob in the compact profile: 8, 10 or 12.

    Returns
    -------
    Path
        The new file.

    Raises
    ------
    CacheError
        If the source is damaged or is the target, or if its files are not of one job or omit rows of it.
    ConfigError
        If profile or precision has another value.
    RunConflictError
        If the target is not a cache of the same run, or another process writes a cache in its folder.
    CapacityError
        If the target cannot be written, or a disk fails.
    """
    if profile not in ("plain", "compact"):
        raise ConfigError(f"profile: expected 'plain' or 'compact', got {profile!r}")
    if precision not in PRECISIONS:
        raise ConfigError(f"precision: expected one of {PRECISIONS}, got {precision!r}")
    source, target = (expanded(path) for path in (source, target))
    cache = CacheFiles.open(source)
    readers = cache.readers
    if target.exists() and any(target.samefile(reader.path) for reader in readers):
        raise CacheError.at(target, "expected another file than the source, got the same; name a new one")
    reader = readers[0]
    _check_target(target, reader)
    attributes = {name: value for name, value in reader.said().items() if name not in _OWN}
    if len(readers) > 1:
        check_one_job(readers)
        check_whole(readers)
        attributes = {name: value for name, value in attributes.items() if name not in _OF_A_PART}
        if cache.statistics is not None:
            attributes["statistics"] = cache.statistics.model_dump()
    made: Profile = Plain(top_k=reader.top_k, vocab_size=reader.vocab_size, extras=reader.profile.extras)
    if profile == "compact":
        made = _compact(reader, precision)
    if known := [bits for bits in map(_precision, readers) if bits is not None]:
        attributes["source_precision"] = min(known)
    pieces = sorted((piece for one in readers for piece in cache_pieces(one)), key=lambda piece: piece.first_row)
    with room(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with lease(target.parent / CONSOLIDATION_LOCK):
            consolidate(target, lambda: pieces, profile=made, packed=reader.is_packed, attributes=attributes)
    return target


def _check_target(target: Path, source: CacheReader) -> None:
    """Refuse to overwrite anything but a cache of the same run."""
    if not target.exists() and not target.is_symlink():
        return
    said: Mapping[str, Any] = {}
    with contextlib.suppress(CacheError):
        said = CacheReader(target).attributes
    if any(name not in said or said[name] != source.attributes.get(name) for name in ("fingerprint", "run_id")):
        raise RunConflictError(
            f"{target}: expected no file, or an older cache of the same run as {source.path}, got another; name a new "
            "file, or move that one"
        )


def _precision(reader: CacheReader) -> Precision | None:
    """Return the fewest bits that a cache's log-probs were ever stored in. None: only as float16."""
    found = [reader.header.source_precision, getattr(reader.profile, "precision", None)]
    return min((bits for bits in found if bits is not None), default=None)


def _compact(reader: CacheReader, precision: Precision) -> Compact:
    if isinstance(reader.profile, Compact):
        table = reader.profile.id_table
    else:
        ids = np.asarray(reader.arrays["topk_ids"][:_TABLE_TOKENS])
        if reader.profile.extras.draws:
            ids = ids[reader.arrays["topk_counts"][:_TABLE_TOKENS] > 0]
        table = id_table(ids, reader.vocab_size)
    return Compact(
        top_k=reader.top_k,
        vocab_size=reader.vocab_size,
        precision=precision,
        id_table=table,
        extras=reader.profile.extras,
    )
