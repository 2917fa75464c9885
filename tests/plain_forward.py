"""The oracle of scoring: a model's own forward, document by document, without padding."""

from __future__ import annotations

import numpy as np
import torch
from builders import VOCAB_SIZE

from dask_logits.teacher.model import ScoringPath
from dask_logits.teacher.scoring import ScoringSettings

K = 8


def settings(**changes) -> ScoringSettings:
    values = {
        "top_k": K, "vocab_size": VOCAB_SIZE, "batch_tokens": 90, "batch_size": None, "head_rows": 16,
        "path": ScoringPath(head="linear"),
    }  # fmt: skip
    return ScoringSettings(**{**values, **changes})


def plain_targets(model, document: np.ndarray, vocab_size: int, k: int) -> dict[str, np.ndarray]:
    """The teacher's plain forward on one document, in float64 after the logits."""
    with torch.inference_mode():
        tokens = torch.from_numpy(document[None].astype(np.int64))
        logits = model(input_ids=tokens, use_cache=False).logits[0, :, :vocab_size].double()
    logp = logits.log_softmax(-1)
    ids = np.argsort(-logits.numpy(), axis=1, kind="stable")
    logp_sorted = np.take_along_axis(logp.numpy(), ids, 1)
    label = np.full(len(document), np.nan)
    label[:-1] = logp.numpy()[np.arange(len(document) - 1), document[1:]]
    return {
        "ids": ids,
        "logp": logp_sorted,
        "logsumexp": logits.logsumexp(-1).numpy(),
        "tail": np.log(np.exp(logp_sorted[:, k:]).sum(1)),
        "label": label,
    }


def assert_targets_match(found: dict[str, np.ndarray], plain: dict[str, np.ndarray], atol: float = 1e-4) -> int:
    """Compare stored targets with the plain forward: the tolerance of float32 plus the rounding to float16.

    Ids are compared as sets where the k-th and the next entry are further apart than the tolerance, and in order where
    all are; returns in how many rows the sets were compared.
    """
    k = found["topk_ids"].shape[1]
    logp = plain["logp"][:, :k]
    assert (np.abs(found["topk_logprobs"] - logp) <= atol + np.abs(logp) * 2.0**-11).all()
    np.testing.assert_allclose(found["logsumexp"], plain["logsumexp"], atol=atol)
    np.testing.assert_allclose(found["tail_logmass"], plain["tail"], atol=atol)
    np.testing.assert_allclose(found["label_logprob"], plain["label"], atol=atol)
    gaps = np.abs(np.diff(plain["logp"][:, : k + 1], axis=1))
    ids, expected = found["topk_ids"], plain["ids"][:, :k]
    clear = gaps[:, -1] > atol
    np.testing.assert_array_equal(np.sort(ids[clear], 1), np.sort(expected[clear], 1))
    ordered = (gaps > atol).all(1)
    np.testing.assert_array_equal(ids[ordered], expected[ordered])
    return int(clear.sum())
