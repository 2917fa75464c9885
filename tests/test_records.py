import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_logits.records import ContentDigest, Records, Statistics, schema


def records(lengths=(3, 0, 2), k: int = 2, vocab_size: int = 50, seed: int = 0, first_row: int = 0) -> Records:
    """Return random but well-formed records."""
    draw = np.random.default_rng(seed)
    n = int(sum(lengths))
    logits = draw.normal(size=(n, vocab_size)).astype(np.float64) * 2
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    lse = np.log(np.exp(logits).sum(1))
    logp = np.take_along_axis(logits, order, 1) - lse[:, None]
    labels = draw.integers(vocab_size, size=n)
    label_logprob = (logits[np.arange(n), labels] - lse).astype(np.float32)
    ends = np.cumsum(lengths)
    label_logprob[[end - 1 for end, length in zip(ends, lengths, strict=True) if length]] = np.nan
    types = schema(k, vocab_size)
    return Records(
        input_ids=draw.integers(vocab_size, size=n).astype(types["input_ids"][0]),
        topk_ids=order.astype(types["topk_ids"][0]),
        topk_logprobs=logp.astype(np.float16),
        logsumexp=lse.astype(np.float32),
        tail_logmass=np.log1p(-np.exp(logp).sum(1)).astype(np.float32),
        label_logprob=label_logprob,
        document_row=np.arange(first_row, first_row + len(lengths), dtype=np.uint64),
        document_offset=np.zeros(len(lengths), np.uint32),
        document_length=np.array(lengths, np.uint32),
    )


def test_shapes_that_disagree_are_refused() -> None:
    good = dict(records().arrays())
    with pytest.raises(ValueError, match="logsumexp: expected 5 entries, got 4"):
        Records(**{**good, "logsumexp": good["logsumexp"][:4]})
    with pytest.raises(ValueError, match="document_length: expected a sum of 5, got 6"):
        Records(**{**good, "document_length": np.array([3, 1, 2], np.uint32)})
    with pytest.raises(ValueError, match="topk_logprobs: expected"):
        Records(**{**good, "topk_logprobs": good["topk_logprobs"][:, :1]})


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_content_digest_does_not_depend_on_how_arrays_are_cut(cuts: list[int]) -> None:
    array = np.arange(40, dtype=np.uint32).reshape(20, 2)
    whole, pieces = ContentDigest(), ContentDigest()
    whole.update("a", array)
    at = 0
    for cut in [*cuts, 20]:
        pieces.update("a", array[at : at + cut])
        at = min(20, at + cut)
    assert pieces.hexdigest() == whole.hexdigest()


def test_content_digest_sees_values_dtype_shape_and_name() -> None:
    def digest(name: str, array: np.ndarray) -> str:
        found = ContentDigest()
        found.update(name, array)
        return found.hexdigest()

    base = np.arange(6, dtype=np.uint16)
    variants = [
        digest("a", base),
        digest("b", base),
        digest("a", base.astype(np.uint32)),
        digest("a", base.reshape(3, 2)),
        digest("a", base[::-1]),
    ]
    assert len(set(variants)) == 5


def test_statistics_add_up() -> None:
    one, two = records((4, 2), seed=1), records((3,), seed=2)
    total = Statistics.of(one) + Statistics.of(two)
    tail = np.concatenate([one.tail_logmass, two.tail_logmass]).astype(float)
    labels = np.concatenate([one.label_logprob, two.label_logprob])
    assert total.mean_kept_mass == pytest.approx(1 - np.exp(tail).mean(), abs=1e-6)
    assert total.perplexity == pytest.approx(np.exp(-np.nanmean(labels)), rel=1e-5)
    assert (total.documents, total.tokens, total.labels) == (3, 9, 6)
