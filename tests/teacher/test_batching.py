from hypothesis import given
from hypothesis import strategies as st

from dask_logits.teacher.batching import plan_batches

lengths_of_documents = st.lists(st.integers(0, 300), max_size=80)


@given(lengths_of_documents, st.integers(1, 1000), st.none() | st.integers(1, 8))
def test_every_document_with_tokens_is_in_exactly_one_batch(lengths, batch_tokens, batch_size) -> None:
    batches = plan_batches(lengths, batch_tokens=batch_tokens, batch_size=batch_size)
    assert sorted(i for batch in batches for i in batch) == [i for i, n in enumerate(lengths) if n]


@given(lengths_of_documents, st.integers(1, 1000), st.none() | st.integers(1, 8))
def test_batches_stay_in_their_bounds(lengths, batch_tokens, batch_size) -> None:
    for batch in plan_batches(lengths, batch_tokens=batch_tokens, batch_size=batch_size):
        width = max(lengths[i] for i in batch)
        assert lengths[batch[0]] == width
        assert len(batch) == 1 or width * len(batch) <= batch_tokens
        assert batch_size is None or len(batch) <= batch_size


def test_a_gpu_can_launch_the_attention_of_the_largest_batch() -> None:
    batches = plan_batches([2] * 65_536 + [1], batch_tokens=1 << 20)
    assert list(map(len, batches)) == [65_535, 2]
    assert list(map(len, plan_batches([1] * 70_000, batch_tokens=1 << 20, batch_size=70_000))) == [65_535, 4_465]
    # A user's smaller limit holds.
    assert set(map(len, plan_batches([1] * 70_000, batch_tokens=1 << 20, batch_size=7))) == {7}


def test_padding_of_uneven_documents_is_small() -> None:
    lengths = [(i * 7919) % 500 + 1 for i in range(400)]
    batches = plan_batches(lengths, batch_tokens=4096)
    padded = sum(lengths[batch[0]] * len(batch) for batch in batches)
    assert padded <= 1.05 * sum(lengths)
