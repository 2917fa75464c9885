from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import VOCAB_SIZE, compact, content, plain, records, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from dask_logits.cache.profile import as_kept, code_bounds, encode_all, encode_records, gaps_of
from dask_logits.data.items import plain_items
from dask_logits.records import Extras
from dask_logits.teacher.draws import count_draws
from dask_logits.teacher.model import ScoringPath, Teacher
from dask_logits.teacher.scoring import ScoringSettings, start_scoring
from dask_logits.worker.encoder import Encoder, encoder_for

CPU = torch.device("cpu")


def on_device(profile, **arrays) -> dict[str, np.ndarray]:
    """Encode arrays as a device does."""
    return {name: tensor.numpy() for name, tensor in Encoder(profile, CPU)(
        {name: torch.from_numpy(array) for name, array in arrays.items()}
    ).items()}  # fmt: skip


@given(
    st.sampled_from([8, 10, 12]),
    st.sampled_from([1, 3, 64]),
    st.sampled_from([80, 256, 257, 65_537, 262_144]),
    st.integers(0, 99),
)
def test_a_device_encodes_the_same_bytes_as_the_host(precision, k, vocab_size, seed) -> None:
    draw = np.random.default_rng(seed)
    profile = compact(k, vocab_size, precision, seed)
    made = records((300,), k=k, vocab_size=80, seed=seed)
    scale_N1 = draw.choice([0.001, 0.1, 1, 5, 60], (300, 1))
    logprobs_NK = -np.sort(draw.exponential(size=(300, k)) * scale_N1, axis=1).astype(np.float16)
    logprobs_NK[:5, k // 2 + 1 :] = -np.inf
    logprobs_NK[5:9] = -0.0
    ids_NK = draw.integers(0, vocab_size, (300, k)).astype(np.int32)
    tokens = {**made.tokens(), "topk_ids": ids_NK, "topk_logprobs": logprobs_NK}
    stored = encode_all(tokens, profile)
    found = on_device(profile, topk_ids=ids_NK, topk_logprobs=logprobs_NK)
    np.testing.assert_array_equal(found.pop("topk_logprobs"), profile.decode(stored)["topk_logprobs"])
    assert set(found) == {name for name in stored if "_b" in name}
    for name, plane_NK in found.items():
        assert plane_NK.dtype == np.uint8
        np.testing.assert_array_equal(plane_NK, stored[name])


@pytest.mark.parametrize("vocab_size", [200, 70_000])
def test_a_device_encodes_draws_as_the_host_does(vocab_size) -> None:
    drawn_NS = torch.randint(vocab_size, (50, 12), generator=torch.Generator().manual_seed(0)) % 90
    ids_NK, counts_NK = (tensor.numpy() for tensor in count_draws(drawn_NS, 12))
    profile = compact(12, vocab_size, extras=Extras(draws=12))
    tokens = {**records((50,), vocab_size=80).tokens(), "topk_ids": ids_NK, "topk_counts": counts_NK}
    stored = encode_all(tokens, profile)
    found = on_device(profile, topk_ids=ids_NK, topk_counts=counts_NK)
    assert set(found) == {name for name in stored if "_b" in name}
    for name, plane_NK in found.items():
        np.testing.assert_array_equal(plane_NK, stored[name])
    np.testing.assert_array_equal(profile.decode(stored)["topk_ids"], ids_NK)


@pytest.mark.parametrize(("positions", "share"), [("all", 1.0), ("entropy", 0.3)])
@pytest.mark.parametrize("draws", [0, 9])
def test_scored_planes_are_those_of_the_records(positions, share, draws) -> None:
    teacher = Teacher(tiny_model("llama"), VOCAB_SIZE)
    settings = ScoringSettings(
        top_k=9, vocab_size=VOCAB_SIZE, batch_tokens=60, batch_size=None, head_rows=7, draws=draws,
        path=ScoringPath(head="linear"), positions=positions, position_share=share,
    )  # fmt: skip
    profile = compact(9, VOCAB_SIZE, extras=Extras(draws=draws, has_target_pos=positions == "entropy"))
    items = plain_items([np.arange(n, dtype=np.int32) for n in (30, 0, 20, 5)])
    unrounded = start_scoring(teacher, items, settings)()
    scored = start_scoring(teacher, items, settings, encode=encoder_for(profile, teacher.device))()
    assert unrounded.encoded == {}
    stored, kept = encode_records(scored.records, profile, scored.encoded)
    assert content(kept) == content(as_kept(unrounded.records, profile))
    for name, array in encode_all(unrounded.records.tokens(), profile).items():
        assert stored[name].dtype == array.dtype
        np.testing.assert_array_equal(stored[name], array)


def test_the_plain_profile_has_nothing_to_encode() -> None:
    assert encoder_for(plain(), CPU) is None
    assert encoder_for(compact(), CPU) is not None


@pytest.mark.parametrize("precision", [8, 10, 12])
def test_a_code_is_that_of_the_nearest_gap_on_the_scale_of_logarithms(precision) -> None:
    bounds_C, gaps = code_bounds(precision), gaps_of(precision)
    assert bounds_C.dtype == np.float32
    assert len(bounds_C) == len(gaps) - 1
    assert (np.diff(bounds_C) > 0).all()
    middle = np.expm1((np.log1p(gaps[:-2].astype(np.float64)) + np.log1p(gaps[1:-1].astype(np.float64))) / 2)
    np.testing.assert_allclose(bounds_C[:-1], middle, rtol=1e-5)
    np.testing.assert_array_equal(np.searchsorted(bounds_C, gaps, side="right"), np.arange(len(gaps)))
