import numpy as np
import pytest
from builders import records
from hypothesis import given
from hypothesis import strategies as st

from dask_logits.records import ContentDigest, Records, Statistics


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
