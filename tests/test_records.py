import dataclasses
import itertools

import numpy as np
import pytest
from builders import content, packed_records, records
from hypothesis import given
from hypothesis import strategies as st

from dask_logits.records import TOKEN_ARRAYS, Records, Statistics


def test_shapes_that_disagree_are_refused() -> None:
    good = dict(records().arrays())
    with pytest.raises(ValueError, match="logsumexp: expected 5 entries, got 4"):
        Records(**{**good, "logsumexp": good["logsumexp"][:4]})
    with pytest.raises(ValueError, match="document_length: expected a sum of 5, got 6"):
        Records(**{**good, "document_length": np.array([3, 1, 2], np.uint32)})
    with pytest.raises(ValueError, match="topk_logprobs: expected"):
        Records(**{**good, "topk_logprobs": good["topk_logprobs"][:, :1]})


def documents(made: Records, first: int, stop: int) -> Records:
    """Return a run of the documents of records."""
    ends = np.append(0, np.cumsum(made.document_length, dtype=np.int64))
    return Records(
        **{
            name: array[slice(*ends[[first, stop]])] if name in TOKEN_ARRAYS else array[first:stop]
            for name, array in made.arrays()
        }
    )


@given(st.lists(st.integers(0, 7), max_size=4), st.permutations(range(5)))
def test_content_digest_does_not_depend_on_how_documents_are_cut_or_ordered(cuts: list[int], order: list[int]) -> None:
    made = records((3, 0, 2, 5, 1, 0, 4))
    bounds = sorted({0, 7, *cuts})
    parts = [documents(made, first, stop) for first, stop in itertools.pairwise(bounds)]
    assert content(*(parts[i] for i in order if i < len(parts))) == content(made)


def test_content_digest_sees_every_bit_of_every_array_and_its_place() -> None:
    made = records((3, 0, 2), k=3)
    found = {content(made)}
    for name, array in made.arrays():
        for index in range(len(array)):
            if name == "document_length":
                continue
            changed = array.copy()
            changed[index : index + 1].reshape(-1).view(np.uint8)[0] ^= 1
            found.add(content(dataclasses.replace(made, **{name: changed})))
    for lengths in ((2, 1, 2), (3, 2, 0), (0, 3, 2)):
        found.add(content(dataclasses.replace(made, document_length=np.array(lengths, np.uint32))))
    found.add(content(dataclasses.replace(made, logsumexp=made.logsumexp.astype(np.float64))))
    found.add(content(documents(made, 0, 1)))
    assert len(found) == 1 + 6 * 5 + 2 * 3 + 3 + 1 + 1


def test_content_digest_sees_packing() -> None:
    made = packed_records()
    other = dataclasses.replace(made, block_length=np.array([6, 7], np.uint32))
    none = dataclasses.replace(made, block_length=None)
    assert len({content(made), content(other), content(none)}) == 3


def test_statistics_add_up() -> None:
    one, two = records((4, 2), seed=1), records((3,), seed=2)
    total = Statistics.of(one) + Statistics.of(two)
    tail = np.concatenate([one.tail_logmass, two.tail_logmass]).astype(float)
    labels = np.concatenate([one.label_logprob, two.label_logprob])
    assert total.mean_kept_mass == pytest.approx(1 - np.exp(tail).mean(), abs=1e-6)
    assert total.perplexity == pytest.approx(np.exp(-np.nanmean(labels)), rel=1e-5)
    assert (total.documents, total.tokens, total.labels) == (3, 9, 6)
