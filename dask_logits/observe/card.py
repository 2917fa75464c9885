"""What a cache is, on one screen: from its header alone, but for the curve of kept mass when it has none.

Dimension letters: N tokens, K kept entries.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from dask_logits.records import Array, Statistics, kept_mass_by_k, total_digest
from dask_logits.store.cache import CacheReader
from dask_logits.store.durable import expanded
from dask_logits.store.find import find_caches
from dask_logits.store.profile import Compact

# Tokens from which the curve is taken where the calibration left none.
_SAMPLE_TOKENS = 100_000


def card(path: str | Path) -> dict[str, Any]:
    """Return what a cache says of itself.

    Parameters
    ----------
    path
        A cache file, an index over several, or the run folder it lies in.

    Returns
    -------
    dict
        JSON values: sizes, profile, teacher, tokenizer, data, content digest, statistics, kept mass by k.

    Raises
    ------
    CacheError
        If it is not a complete cache.
    """
    path = expanded(path)
    readers = [CacheReader(file) for file in find_caches(path)]
    reader = readers[0]
    said = reader.attributes
    n_bytes, n_tokens = sum(one.path.stat().st_size for one in readers), sum(one.n_tokens for one in readers)
    what, calibration = said.get("what") or {}, said.get("calibration") or {}
    numerics = calibration.get("numerics") or {}
    sums = [Statistics.from_json(one.attributes["statistics"]) for one in readers if "statistics" in one.attributes]
    statistics = sum(sums, Statistics()) if sums else None
    teacher = said.get("teacher") or {}
    data = {name.removeprefix("dataset."): value for name, value in what.items() if name.startswith("dataset.")}
    return {
        "file": str(reader.path if len(readers) == 1 else path),
        "files": len(readers),
        "bytes": n_bytes,
        "format_version": str(said["format_version"]),
        "profile": said["profile"],
        "precision": reader.profile.precision if isinstance(reader.profile, Compact) else None,
        "documents": sum(one.n_documents for one in readers),
        "empty_documents": sum(one.n_empty for one in readers),
        "skipped_rows": statistics.skipped_rows or None if statistics else None,
        "double_bos_rows": statistics.double_bos_rows or None if statistics else None,
        "items": sum(one.n_items for one in readers),
        "tokens": n_tokens,
        "top_k": reader.top_k,
        "vocab_size": reader.vocab_size,
        "bytes_per_token": round(n_bytes / max(1, n_tokens), 1),
        "rows": said.get("n_rows"),
        "partial": bool(said.get("partial")) and len(readers) == 1,
        "teacher": said.get("teacher_path"),
        "teacher_identity": teacher.get("identity"),
        "teacher_revision": teacher.get("revision"),
        "dtype": numerics.get("dtype"),
        "device": numerics.get("device"),
        "tokenizer_map_digest": said.get("tokenizer_map_digest") or None,
        "dataset": {name: value for name, value in data.items() if value is not None},
        "plan_digest": said.get("plan_digest"),
        "content_digest": total_digest(one.attributes["content_digest"] for one in readers),
        "kept_mass": _number(statistics.mean_kept_mass) if statistics else None,
        "perplexity": _number(statistics.perplexity) if statistics else None,
        "kept_mass_by_k": calibration.get("kept_mass_by_k") or kept_mass_by_k(_sample(reader)),
    }


def card_lines(found: dict[str, Any]) -> list[str]:
    """Return a card for people.

    >>> card_lines({"tokens": 1200, "teacher": None, "kept_mass_by_k": {"1": 0.5, "2": 0.75}})
    ['tokens            1,200', 'kept mass by k    1: 0.500  2: 0.750']
    """
    lines = []
    for name, value in found.items():
        if value is None or value == {}:
            continue
        if name == "kept_mass_by_k":
            text = "  ".join(f"{k}: {mass:.3f}" for k, mass in value.items())
        elif isinstance(value, dict):
            text = json.dumps(value, ensure_ascii=False)
        elif isinstance(value, int) and not isinstance(value, bool):
            text = f"{value:,}"
        else:
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
        lines.append(f"{name.replace('_', ' '):17} {text}")
    return lines


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


def _sample(reader: CacheReader) -> Array:
    """Return the log-probs of the first items."""
    count = int(np.searchsorted(np.cumsum(reader.item_lengths()), _SAMPLE_TOKENS)) + 1
    rows = [reader.item(index)["topk_logprobs"] for index in range(min(reader.n_items, count))]
    return np.concatenate(rows) if rows else np.empty((0, reader.top_k))
