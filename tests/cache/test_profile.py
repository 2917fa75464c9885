from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from builders import compact, plain, records
from hypothesis import given
from hypothesis import strategies as st

from dask_logits.cache.profile import Compact, ProfileSpec, as_kept, encode_all, id_table, load_profile, save_id_table
from dask_logits.errors import CacheError
from dask_logits.records import TOKEN_ARRAYS

# KL that a precision may add, nats: docs/FORMAT.md.
KL = {8: 5e-5, 10: 3e-6, 12: 3e-7}


def realistic(k: int, n: int = 2_000, vocab_size: int = 1_000):
    """Return records with gaps as wide as a language model's."""
    made = records((n,), k=k, vocab_size=vocab_size, seed=3)
    draw = np.random.default_rng(4)
    logits = np.sort(draw.gumbel(size=(n, k)) * draw.uniform(0.5, 4, (n, 1)), axis=1)[:, ::-1]
    tail = draw.uniform(-8, -0.5, n)
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True)) + np.log1p(-np.exp(tail))[:, None]
    arrays = dict(made.arrays())
    return type(made)(
        **{**arrays, "topk_logprobs": logprobs.astype(np.float16), "tail_logmass": tail.astype(np.float32)}
    )


def probabilities(made) -> np.ndarray:
    p = np.exp(np.c_[made.topk_logprobs.astype(np.float64), made.tail_logmass.astype(np.float64)])
    return p / p.sum(1, keepdims=True)


@pytest.mark.parametrize("precision", [8, 10, 12])
def test_compact_adds_no_more_than_it_says(precision: int) -> None:
    made = realistic(64)
    found = as_kept(made, compact(64, 1_000, precision))
    np.testing.assert_array_equal(found.topk_ids, made.topk_ids)
    np.testing.assert_array_equal(found.input_ids, made.input_ids)
    p, q = probabilities(made), probabilities(found)
    assert 0 < (p * np.log(p / q)).sum(1).mean() <= KL[precision]
    assert (np.diff(found.topk_logprobs.astype(np.float32), axis=1) <= 0).all()
    np.testing.assert_array_equal(found.topk_logprobs[:, 0], made.topk_logprobs[:, 0])


@given(
    st.sampled_from([8, 10, 12]),
    st.sampled_from([1, 3, 64]),
    st.sampled_from([80, 256, 257, 65_536, 65_537, 262_144]),
    st.integers(0, 5),
    st.integers(0, 99),
)
def test_any_ids_survive(precision: int, k: int, vocab_size: int, n: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    made = records((n,), k=k, vocab_size=80)
    arrays = dict(made.arrays())
    ids = np.stack([draw.choice(vocab_size, k, replace=False) for _ in range(n)]) if n else np.empty((0, k))
    profile = compact(k, vocab_size, precision, seed)
    dtype = np.uint16 if vocab_size <= 65_536 else np.uint32
    arrays |= {"topk_ids": ids.astype(dtype), "input_ids": arrays["input_ids"].astype(dtype)}
    stored = profile.encode(arrays)
    for name, kind in profile.arrays.items():
        assert (stored[name].dtype, stored[name].shape[1:]) == (kind.dtype, kind.shape)
    found = profile.decode(stored)
    np.testing.assert_array_equal(found["topk_ids"], arrays["topk_ids"])
    assert {name: array.dtype for name, array in found.items()} == {
        name: arrays[name].dtype for name in profile.decode(stored)
    }


@pytest.mark.parametrize("precision", [8, 10, 12])
def test_extremes_stay_what_they_are(precision: int) -> None:
    profile = compact(4, precision=precision)
    made = records((2,), k=4)
    arrays = dict(made.arrays())
    arrays["topk_logprobs"] = np.array([[-0.0, -31.0, -45.0, -np.inf], [-1.0, -1.0, -1.0, -1.0]], np.float16)
    arrays["tail_logmass"] = np.array([-np.inf, -2.0], np.float32)
    arrays["label_logprob"] = np.array([np.nan, -3.0], np.float32)
    found = profile.decode(profile.encode(arrays))
    np.testing.assert_allclose(found["topk_logprobs"][0, :3], [0, -31, -32], atol=0.3)
    assert found["topk_logprobs"][0, 3] == -np.inf
    np.testing.assert_array_equal(found["topk_logprobs"][1], np.full(4, -1.0))
    np.testing.assert_array_equal(found["tail_logmass"], [-np.inf, -2.0])
    np.testing.assert_array_equal(found["label_logprob"], [np.nan, -3.0])


def test_the_id_table_is_by_frequency() -> None:
    table = id_table(np.array([[4, 2], [4, 0], [2, 4]], np.uint16), 6)
    assert table.tolist() == [4, 2, 0, 1, 3, 5]
    assert Compact(top_k=2, vocab_size=6, precision=8, id_table=table).id_rank.tolist() == [2, 3, 1, 4, 0, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id_table": np.array([0, 1, 1])}, "every id below 3 once"),
        ({"id_table": np.array([0, 1, 3])}, "every id below 3 once"),
        ({"id_table": np.array([0, 1])}, "every id below 3 once"),
        ({"chunk_tokens": 0}, "chunks of at most 1 MiB"),
        ({"chunk_tokens": 1 << 20}, "chunks of at most 1 MiB"),
    ],
)
def test_a_profile_that_cannot_be_is_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        Compact(**{"top_k": 2, "vocab_size": 3, "precision": 8, "id_table": np.arange(3), **changes})


def test_profiles_are_equal_by_what_they_mean() -> None:
    assert compact().equals(compact())
    assert not compact().equals(compact(seed=1))
    assert not compact().equals(compact(precision=10))
    assert not compact().equals(compact(chunk_tokens=8))
    assert not compact().equals(plain())
    assert not plain().equals(compact())
    assert plain().equals(plain())
    assert not plain().equals(plain(3))


def test_an_id_table_travels_by_its_digest(tmp_path) -> None:
    table = np.arange(50, dtype=np.uint32)[::-1]
    digest = save_id_table(tmp_path / "tables", table)
    assert save_id_table(tmp_path / "tables", table) == digest
    path = tmp_path / "tables" / f"{digest}.npy"
    spec = ProfileSpec(name="compact", top_k=2, vocab_size=50, precision=10, id_table=str(path))
    found = load_profile(spec)
    assert found.equals(Compact(top_k=2, vocab_size=50, precision=10, id_table=table))
    load_profile.cache_clear()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CacheError, match="expected the id table with this SHA-256, got another"):
        load_profile(spec)
    path.unlink()
    with pytest.raises(CacheError, match="got nothing"):
        load_profile(spec)


def test_chunks_hold_about_as_many_bytes_whatever_k() -> None:
    assert [Compact.alignment_for(k) for k in (1, 8, 32, 64, 100, 256)] == [4096, 4096, 1024, 512, 256, 128]


def test_a_partition_is_encoded_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory: what is between is as large as a block, not as the partition; and the result is the same."""
    profile, made = compact(64, 1_000), realistic(64)
    arrays = dict(made.arrays())
    whole = profile.encode(arrays)
    kept = as_kept(made, profile)
    monkeypatch.setattr("dask_logits.cache.profile._BLOCK_TOKENS", 300)
    tokens = {name: arrays[name] for name in TOKEN_ARRAYS}
    for name, array in encode_all(tokens, profile).items():
        np.testing.assert_array_equal(array, whole[name])
    for name, array in as_kept(made, profile).arrays():
        np.testing.assert_array_equal(array, getattr(kept, name))
    tracemalloc.start()
    encode_all(tokens, profile)
    codes = sum(array.nbytes for array in whole.values())
    assert tracemalloc.get_traced_memory()[1] < 2.5 * codes
    tracemalloc.stop()


@pytest.mark.parametrize("top_k", [131_072, 131_073, 151_936])
def test_as_many_entries_as_a_vocabulary_has_fit_a_chunk(top_k) -> None:
    made = Compact(top_k=top_k, vocab_size=152_000, precision=8, id_table=np.arange(152_000, dtype=np.uint32))
    assert 0 < made.alignment * top_k <= 1 << 20
