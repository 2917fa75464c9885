"""Show a cache's metadata on one screen, from its header alone, except for a missing kept-mass curve.

Dimension letters: N tokens, K kept entries.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from dask_logits.cache.find import CacheFiles
from dask_logits.cache.profile import Compact
from dask_logits.cache.reader import CacheReader
from dask_logits.files.atomic import expanded
from dask_logits.records import Array, kept_mass_by_k
from dask_logits.run.records import Calibration
from dask_logits.run.timings import plural

# Tokens used for the curve if the calibration recorded none.
_SAMPLE_TOKENS = 100_000
_SHOWN_FILES = 3
# Figure → its label for display, unless it is the name. Rows are those of the dataset, documents the result of
# tokenization. For windows and packed blocks see `card_lines`.
_LABELS = {
    "dtype": "teacher dtype",
    "device": "scored on",
    "dataset_settings": "read with",
    "rows": "dataset rows",
    "double_bos_rows": "rows with 2 BOS",
    "items": "blocks",
    "learned": "tokens learned",
    "distinct": "distinct draws",
    "vocab_size": "vocabulary",
    "perplexity": "teacher perplexity",
    "precision": "bits of a log-prob",
    "bytes_per_token": "bytes/token",
    "partial": "part of a job",
    "tokenizer_map_digest": "tokenizer",
    "plan_digest": "plan",
    "content_digest": "content",
}


def card(path: str | Path) -> dict[str, Any]:
    """Return a cache's metadata.

    Parameters
    ----------
    path
        A cache file, an index over several, or its run folder.

    Returns
    -------
    dict
        JSON values: sizes, profile, teacher, tokenizer, data, content digest, statistics, kept mass by k.

    Raises
    ------
    CacheError
        If it is not a complete cache.
    """
    cache = CacheFiles.open(expanded(path))
    readers, n_bytes, n_tokens, statistics = cache.readers, cache.n_bytes, cache.n_tokens, cache.statistics
    reader = readers[0]
    said = reader.attributes
    what, copied = reader.header.what or {}, reader.header.calibration
    calibration = None if copied is None else Calibration.parse(reader.path, copied)
    draws = reader.profile.extras.draws
    teacher = said.get("teacher") or {}
    named: Any = said.get("dataset")
    known = {name.removeprefix("dataset."): value for name, value in what.items() if name.startswith("dataset.")}
    data = [*(named if isinstance(named, dict) else {}).items(), *known.items()]
    return {
        "file": str(reader.path if len(readers) == 1 else cache.path),
        "teacher": said.get("teacher_path"),
        "teacher_revision": teacher.get("revision"),
        "dtype": calibration.numerics.dtype if calibration else None,
        "device": calibration.numerics.device if calibration else None,
        "dataset": {name: value for name, value in data if value is not None},
        "rows": said.get("n_rows"),
        "documents": cache.n_documents,
        "empty_documents": sum(one.n_empty for one in readers),
        "skipped_rows": statistics.skipped_rows or None if statistics else None,
        "double_bos_rows": statistics.double_bos_rows or None if statistics else None,
        "items": cache.firsts[-1],
        "tokens": n_tokens,
        "learned": statistics.learned if statistics and reader.profile.extras.is_masked else None,
        "targets": sum(one.n_targets for one in readers) if reader.profile.extras.has_target_pos else None,
        "top_k": None if draws else reader.top_k,
        "draws": draws or None,
        "distinct": round(statistics.mean_distinct, 2) if draws and statistics else None,
        "temperatures": [1.0, *reader.profile.extras.temperatures] if reader.profile.extras.temperatures else None,
        "vocab_size": reader.vocab_size,
        "kept_mass": _number(statistics.mean_kept_mass) if statistics and not draws else None,
        "kept_mass_by_k": (
            {} if draws else (calibration and calibration.kept_mass_by_k) or kept_mass_by_k(_sample(reader))
        ),
        "perplexity": _number(statistics.perplexity) if statistics else None,
        "profile": said["profile"],
        "precision": reader.profile.precision if isinstance(reader.profile, Compact) and not draws else None,
        "format_version": str(said["format_version"]),
        "files": len(readers),
        "bytes": n_bytes,
        "bytes_per_token": round(n_bytes / max(1, n_tokens), 1),
        "partial": bool(said.get("partial")) and len(readers) == 1,
        "teacher_identity": teacher.get("identity"),
        "tokenizer_map_digest": said.get("tokenizer_map_digest") or None,
        "plan_digest": said.get("plan_digest"),
        "content_digest": cache.content_digest,
    }


def card_lines(found: dict[str, Any]) -> list[str]:
    """Format a card for display: origin, size and storage of a cache.

    >>> card_lines({"rows": 3, "tokens": 1200, "teacher": None, "kept_mass_by_k": {"1": 0.5, "2": 0.75}})
    ['dataset rows      3', 'tokens            1,200', 'kept mass by k    1: 0.500  2: 0.750']
    """
    settings = dict(found.get("dataset") or {})
    is_packed = settings.get("packing") == "concat"
    is_cut = settings.get("long_documents") == "window"
    noun = "segments" if is_packed else "windows" if is_cut else "documents"
    labels = {**_LABELS, "documents": noun, "empty_documents": f"empty {noun}"}
    named = {"dataset": _dataset_text(settings), "dataset_settings": settings}
    rows = [row for item in found.items() for row in (named.items() if item[0] == "dataset" else [item])]
    return [
        f"{labels.get(name, name.replace('_', ' ')):17} {_text(name, value)}"
        for name, value in rows
        if value not in (None, {}, "") and (is_packed or name != "items")
    ]


def _dataset_text(settings: dict[str, Any]) -> str:
    """Name the dataset, and remove the naming settings from `settings`."""
    named = {name: settings.pop(name, None) for name in ("name", "config_name", "split", "revision", "data_files")}
    files = named.pop("data_files") or []
    more = f", +{plural(len(files) - _SHOWN_FILES, 'file')}" if len(files) > _SHOWN_FILES else ""
    of_files = f"({', '.join(map(str, files[:_SHOWN_FILES]))}{more})" if files else ""
    texts = [str(named["name"] or ""), str(named["config_name"] or ""), of_files]
    split = f"split {named['split']}" if named["split"] and named["name"] else ""
    revision = f"revision {named['revision']}" if named["revision"] else ""
    return ", ".join(filter(None, (" ".join(filter(None, texts)), split, revision)))


def _text(name: str, value: Any) -> str:
    if name == "kept_mass_by_k":
        return "  ".join(f"{k}: {mass:.3f}" for k, mass in value.items())
    if name == "dataset_settings":
        return ", ".join(
            f"{key} {str(item).lower() if isinstance(item, bool) else item}" for key, item in value.items()
        )
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


def _sample(reader: CacheReader) -> Array:
    """Return the log-probs of the first items."""
    count = int(np.searchsorted(np.cumsum(reader.item_lengths()), _SAMPLE_TOKENS)) + 1
    rows = [reader.item(index)["topk_logprobs"] for index in range(min(reader.n_items, count))]
    return np.concatenate(rows) if rows else np.empty((0, reader.top_k))
