from __future__ import annotations

import collections
import pickle

import numpy as np
import pytest
import torch
from builders import records, write_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dask_logits import (
    CachedLogitsDataset,
    CacheError,
    ConfigError,
    ItemOrder,
    MixedDataset,
    ResumableSampler,
    collate_flat,
)
from dask_logits.train.checkpoint import DistillationState, TrainedOn
from dask_logits.train.mixture import _counts


@pytest.fixture
def sources(tmp_path) -> dict[str, CachedLogitsDataset]:
    """Caches of 6, 3 and 10 documents."""
    made = {}
    for number, (name, count) in enumerate({"web": 6, "code": 3, "chat": 10}.items()):
        path = tmp_path / f"{name}.h5"
        write_cache(
            path, records([number + 1 + i % 3 for i in range(count)], k=3, seed=number), tokenizer_map_digest="a" * 64
        )
        made[name] = CachedLogitsDataset(path)
    return made


def drawn(mixed: MixedDataset) -> dict[int, list[int]]:
    """Return the rows that each source gives, in order."""
    found = collections.defaultdict(list)
    for item in mixed:
        found[int(item["source"])].append(int(item["row"]))
    return found


def test_without_weights_every_item_comes_once(sources) -> None:
    mixed = MixedDataset(sources)
    assert len(mixed) == 19
    assert {source: sorted(rows) for source, rows in drawn(mixed).items()} == {
        0: [*range(6)],
        1: [*range(3)],
        2: [*range(10)],
    }
    order = [int(item["source"]) for item in mixed]
    assert order != sorted(order)
    assert "code: 3 of 3 items" in repr(mixed)


def test_weights_are_met_exactly_until_the_first_source_is_used_up(sources) -> None:
    mixed = MixedDataset(sources, weights={"web": 1, "code": 1, "chat": 2})
    assert len(mixed) == 12
    assert {source: len(rows) for source, rows in drawn(mixed).items()} == {0: 3, 1: 3, 2: 6}


def test_a_source_is_passed_over_again_in_another_order(sources) -> None:
    mixed = MixedDataset(sources, weights={"web": 1, "code": 2, "chat": 1}, n_items=48)
    found = drawn(mixed)
    assert {source: len(rows) for source, rows in found.items()} == {0: 12, 1: 24, 2: 12}
    assert collections.Counter(found[1]) == {0: 8, 1: 8, 2: 8}
    assert max(collections.Counter(found[2]).values()) == 2


def test_an_item_is_that_of_its_cache(sources) -> None:
    names = list(sources)
    for item in MixedDataset(sources, seed=3):
        own = sources[names[int(item["source"])]]
        (same,) = [other for other in own if int(other["row"]) == int(item["row"])]
        assert all(torch.equal(item[name], same[name]) for name in same if item[name].dtype != torch.float32)


def test_the_order_is_the_same_everywhere_and_follows_the_seed(sources) -> None:
    one, two, other = (MixedDataset(sources, seed=seed) for seed in (1, 1, 2))
    again = pickle.loads(pickle.dumps(one))
    places = [[(int(i["source"]), int(i["row"])) for i in mixed] for mixed in (one, two, again, other)]
    assert places[0] == places[1] == places[2] != places[3]
    assert one.content_digest == two.content_digest != other.content_digest
    assert one.content_digest != MixedDataset(sources, weights=dict.fromkeys(sources, 1.0), seed=1).content_digest


def test_batches_samplers_and_loaders_take_it(sources) -> None:
    mixed = MixedDataset(sources)
    sampler = ResumableSampler(ItemOrder(len(mixed), seed=0), num_replicas=1, rank=0, digest=mixed.content_digest)
    batches = list(DataLoader(mixed, batch_size=4, sampler=sampler, num_workers=1))
    assert sum(len(batch["row"]) for batch in batches) == 19
    assert torch.cat([batch["source"] for batch in batches]).bincount().tolist() == [6, 3, 10]
    assert collate_flat([mixed[0], mixed[1]])["source"].shape == (2,)
    with pytest.raises(IndexError):
        mixed[19]
    assert int(mixed[-1]["row"]) == int(mixed[18]["row"])


@settings(max_examples=60)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 500))
def test_counts_are_whole_and_near_their_shares(weights, n_items) -> None:
    shares = np.array(weights) / sum(weights)
    counts = _counts(shares, n_items)
    assert counts.sum() == n_items
    assert (np.abs(counts - shares * n_items) <= 1 + 1e-6).all()


def test_what_cannot_be_mixed_is_refused(sources, tmp_path) -> None:
    def refused(message: str, given=sources, **options) -> None:
        with pytest.raises(ConfigError, match=message):
            MixedDataset(given, **options)

    def with_other(made, **attributes) -> dict:
        write_cache(tmp_path / "other.h5", made, **attributes)
        return {"web": sources["web"], "other": CachedLogitsDataset(tmp_path / "other.h5")}

    refused("sources: expected at least one cache, got none", {})
    refused("expected opened caches, got str for 'web'", {"web": "web.h5"})
    refused(r"weights: expected one for each of \['chat', 'code', 'web'\], got \['web'\]", weights={"web": 1})
    refused("weights: expected positive numbers, got {'code': 0}", weights={"web": 1, "code": 0, "chat": 1})
    refused("n_items: expected a positive integer or None, got 0", n_items=0)
    refused(
        "same top_k, got 3 in 'web' and 2 in 'other'; open them with the same top_k", with_other(records((2,), k=2))
    )
    refused(
        "one tokenizer, got others in 'web' and 'other'", with_other(records((2,), k=3), tokenizer_map_digest="b" * 64)
    )
    refused("expected caches with items, got none in 'other'", with_other(records((0,), k=3)))


def test_texts_and_chats_are_mixed(sources, tmp_path) -> None:
    chats = records((4, 5), k=3, masked=True)
    write_cache(tmp_path / "chats.h5", chats, tokenizer_map_digest="a" * 64)
    mixed = MixedDataset({"web": sources["web"], "chats": CachedLogitsDataset(tmp_path / "chats.h5")})
    (batch,) = DataLoader(mixed, batch_size=8)
    learned = batch["targets"].mask.sum(1)
    lengths = batch["attention_mask"].sum(1)
    assert torch.equal(learned[batch["source"] == 0], lengths[batch["source"] == 0])
    assert int(learned[batch["source"] == 1].sum()) == int(chats.loss_mask.sum())


def test_a_checkpoint_knows_its_mixture(sources, tmp_path) -> None:
    mixed = MixedDataset(sources, weights={"web": 1, "code": 1, "chat": 2})
    state = DistillationState(version=1, dataset=TrainedOn.of(mixed), sampler={})
    assert state.dataset.path.count(".h5") == 3
    state.check(tmp_path, TrainedOn.of(MixedDataset(sources, weights={"web": 2, "code": 2, "chat": 4})))
    with pytest.raises(CacheError, match="expected the cache that this checkpoint was trained on"):
        state.check(tmp_path, TrainedOn.of(MixedDataset(sources)))
