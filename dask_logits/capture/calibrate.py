"""Calibration: one small task on a worker, before partition 0, that settles what the run then keeps.

It takes the first tokens of the plan, finds the head path that reproduces the teacher's forward, scores them, and
reports how much probability each k keeps, how fast it went and how much memory it took. The driver writes the result
to ``calibration.json`` once; every later start of the run reads it.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch

from dask_logits.capture.scoring import ScoringSettings, measure
from dask_logits.capture.task import peak_rss_bytes
from dask_logits.capture.teacher import TeacherSpec, choose_head, load_teacher
from dask_logits.records import Array, Records, Statistics
from dask_logits.store.durable import Json

# Of the whole plan, or all of it if it has fewer.
TOKENS = 10_000
_AUTO_BATCH_TOKENS = {"cpu": 4_096, "cuda": 16_384}
_AUTO_HEAD_ROWS = {"cpu": 256, "cuda": 4_096}
_VERSIONS = ("dask-logits", "torch", "transformers", "datasets", "numpy", "zarr", "h5py")


@dataclass(frozen=True, kw_only=True)
class CalibrationTask:
    """What the calibration needs.

    Parameters
    ----------
    teacher
        The teacher, its dtype and device resolved.
    documents
        Token ids of the first documents of the plan.
    top_k, vocab_size, batch_size
        Settings.
    batch_tokens, head_rows
        Settings; ``auto`` resolved by :func:`auto_budgets`.
    """

    teacher: TeacherSpec
    documents: tuple[Array, ...]
    top_k: int
    vocab_size: int
    batch_size: int | None
    batch_tokens: int
    head_rows: int


def auto_budgets(device: str, batch_tokens: int | str, head_rows: int | str) -> tuple[int, int]:
    """Resolve ``auto`` for the token budget and the head chunk.

    >>> auto_budgets("cpu", "auto", 100)
    (4096, 100)
    """
    return (
        _AUTO_BATCH_TOKENS[device] if batch_tokens == "auto" else int(batch_tokens),
        _AUTO_HEAD_ROWS[device] if head_rows == "auto" else int(head_rows),
    )


def first_documents(documents: Sequence[Array], tokens: int = TOKENS) -> tuple[Array, ...]:
    """Return as many leading documents as it takes to reach a number of tokens.

    >>> len(first_documents([np.zeros(6), np.zeros(6), np.zeros(6)], tokens=10))
    2
    """
    reached = np.cumsum([len(document) for document in documents])
    return tuple(documents[: int(np.searchsorted(reached, tokens)) + 1])


def calibrate(task: CalibrationTask) -> Json:
    """Settle the numerics of a run on a worker.

    Returns
    -------
    dict
        What ``calibration.json`` will hold.

    Raises
    ------
    TeacherError
        If the teacher cannot be loaded, is not causal, or its logits are not finite.
    """
    teacher = load_teacher(task.teacher, task.vocab_size)
    head, errors = choose_head(teacher)
    settings = ScoringSettings(
        top_k=task.top_k,
        vocab_size=task.vocab_size,
        batch_tokens=task.batch_tokens,
        batch_size=task.batch_size,
        head_rows=task.head_rows,
        head=head,
    )
    records, tokens_per_second = measure(teacher, task.documents, settings)
    statistics = Statistics.of(records)
    cuda = task.teacher.device == "cuda"
    return {
        "numerics": {
            "dtype": task.teacher.dtype,
            "device": task.teacher.device,
            "torch_threads": task.teacher.torch_threads,
            "head": head,
            "batch_tokens": task.batch_tokens,
            "batch_size": task.batch_size,
            "head_rows": task.head_rows,
        },
        "head_errors_nats": errors,
        "kept_mass_by_k": kept_mass_by_k(records),
        "tokens": records.n_tokens,
        "perplexity": statistics.perplexity if statistics.labels else None,
        "tokens_per_second": round(tokens_per_second, 1),
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "device_name": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in _VERSIONS},
    }


def kept_mass_by_k(records: Records) -> dict[str, float]:
    """Return k → mean probability that the k most probable entries keep, for powers of two and K."""
    if not records.n_tokens:
        return {}
    cumulative_K = np.exp(records.topk_logprobs.astype(np.float32)).mean(0, dtype=np.float64).cumsum()
    ks = sorted({2**i for i in range(records.top_k.bit_length()) if 2**i <= records.top_k} | {records.top_k})
    return {str(k): round(float(cumulative_K[k - 1]), 5) for k in ks}
