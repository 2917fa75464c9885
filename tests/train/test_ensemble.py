from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import compact, extras_of, packed_records, records, write_cache
from dense_losses import dense_divergence
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from dask_logits import (
    CachedLogitsDataset,
    CacheError,
    ConfigError,
    EnsembleDataset,
    ItemOrder,
    MixedDataset,
    Objective,
    ResumableSampler,
    collate,
    collate_flat,
    distillation_loss,
)
from dask_logits.records import Records
from dask_logits.train.checkpoint import DistillationState, TrainedOn
from dask_logits.train.ensemble import mix_cells

LENGTHS = (3, 5, 2, 4)


def of_teacher(seed: int, k: int = 4, lengths: tuple[int, ...] = LENGTHS, **options) -> Records:
    """Return a teacher's records of the documents that all teachers here score."""
    texts = records(lengths, k=k, **options)
    made = records(lengths, k=k, seed=seed, **options)
    is_label = made.topk_ids == np.append(texts.input_ids[1:], 0)[:, None]
    label = np.where(is_label, made.topk_logprobs, -np.inf).max(1)
    label = np.where(is_label.any(1), label, -30.0) + 0 * made.label_logprob
    return dataclasses.replace(
        made, input_ids=texts.input_ids, loss_mask=texts.loss_mask, label_logprob=label.astype(np.float32)
    )


@pytest.fixture
def sources(tmp_path) -> dict[str, CachedLogitsDataset]:
    return {name: opened(tmp_path / f"{name}.h5", of_teacher(seed)) for seed, name in enumerate("abc", start=1)}


def opened(path: Path, made: Records, **options) -> CachedLogitsDataset:
    write_cache(path, made, tokenizer_map_digest="a" * 64)
    return CachedLogitsDataset(path, **options)


def some_teachers(count: int, rows: int, vocab_size: int, k: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return distributions [S, T, V] in float64, and their kept ids, log-probs and tails."""
    draw = torch.Generator().manual_seed(seed)
    logp = (torch.randn(count, rows, vocab_size, generator=draw, dtype=torch.float64) * 2).log_softmax(-1)
    top = logp.topk(k)
    return logp.exp(), top.indices, top.values, logp.scatter(-1, top.indices, -torch.inf).logsumexp(-1)


@settings(max_examples=60)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(12, 20), st.integers(0, 1000))
def test_cells_are_those_of_the_dense_mixture(count, k, vocab_size, seed) -> None:
    p, ids, logp, logtail = some_teachers(count, 5, vocab_size, k, seed)
    share = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    share /= share.sum()
    mixed_ids, mixed_logp, mixed_logtail = mix_cells(ids, logp[None], logtail[None], share)
    mixture = (share[:, None, None] * p).sum(0)
    for t in range(5):
        common = set.intersection(*({*row.tolist()} for row in ids[:, t]))
        present = mixed_logp[0, t] > -torch.inf
        assert set(mixed_ids[t][present].tolist()) == common
        assert present.tolist() == sorted(present.tolist(), reverse=True)
        expected = mixture[t, mixed_ids[t][present]]
        torch.testing.assert_close(mixed_logp[0, t][present].exp(), expected, rtol=0, atol=1e-12)
        assert (expected.diff() <= 0).all()
        torch.testing.assert_close(mixed_logtail[0, t].exp(), 1 - expected.sum(), rtol=0, atol=1e-12)


def test_all_entries_of_all_teachers_give_the_whole_mixture() -> None:
    p, ids, logp, logtail = some_teachers(3, 4, 10, 10, 0)
    share = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    mixed_ids, mixed_logp, mixed_logtail = mix_cells(ids, logp[None], logtail[None], share)
    found = torch.zeros(4, 10, dtype=torch.float64).scatter(1, mixed_ids, mixed_logp[0].exp())
    torch.testing.assert_close(found, (share[:, None, None] * p).sum(0), rtol=0, atol=1e-12)
    assert (mixed_logtail == -torch.inf).all()


def test_an_absent_entry_is_no_id() -> None:
    logp = torch.tensor([[[[-0.5, -torch.inf]], [[-0.7, -torch.inf]]]])
    ids, mixed_logp, logtail = mix_cells(
        torch.tensor([[[3, 0]], [[5, 0]]]), logp, torch.tensor([[[-0.9], [-0.6]]]), torch.tensor([0.5, 0.5])
    )
    assert ids.shape == (1, 2)
    assert (mixed_logp == -torch.inf).all()
    assert logtail.exp().item() == pytest.approx((np.exp([-0.5, -0.7, -0.9, -0.6]) / 2).sum())


def test_an_item_is_the_mixture_of_the_items(sources) -> None:
    weights = {"a": 2.0, "b": 1.0, "c": 1.0}
    mixed = EnsembleDataset(sources, weights=weights)
    assert len(mixed) == 4
    assert mixed.n_tokens == 14
    for i, item in enumerate(mixed):
        own = {name: source[i] for name, source in sources.items()}
        assert torch.equal(item["input_ids"], own["a"]["input_ids"])
        assert torch.equal(item["segments"], own["a"]["segments"])
        for t in range(len(item["input_ids"])):
            p, tail = {}, 0.0
            for name, one in own.items():
                kept = one["topk_logprobs"][t].double().exp()
                kept *= (1 - one["tail_logmass"][t].double().exp()) / kept.sum()
                for token, value in zip(one["topk_ids"][t].tolist(), kept.tolist(), strict=True):
                    p.setdefault(token, []).append(weights[name] / 4 * value)
                tail += weights[name] / 4 * one["tail_logmass"][t].exp().item()
            common = {token: sum(values) for token, values in p.items() if len(values) == 3}
            present = item["topk_logprobs"][t] > -torch.inf
            ids, values = (item[key][t][present].tolist() for key in ("topk_ids", "topk_logprobs"))
            found = dict(zip(ids, np.exp(values).tolist(), strict=True))
            assert found == pytest.approx(common, rel=1e-5)
            assert item["tail_logmass"][t].exp().item() == pytest.approx(1 - sum(common.values()), rel=1e-4)
    assert "items: 4" in repr(mixed)
    assert "a: weight 0.5" in repr(mixed)


def test_label_logprobs_are_mixed_even_where_no_teacher_kept_the_label(tmp_path) -> None:
    made = [of_teacher(1), of_teacher(2)]
    values = [np.where(np.isnan(one.label_logprob), np.nan, -20.0 - i) for i, one in enumerate(made)]
    sources = {
        name: opened(tmp_path / f"{name}.h5", dataclasses.replace(one, label_logprob=value.astype(np.float32)))
        for name, one, value in zip("ab", made, values, strict=True)
    }
    for item in EnsembleDataset(sources):
        assert item["label_logprob"][-1].isnan()
        torch.testing.assert_close(
            item["label_logprob"][:-1], torch.full((len(item["input_ids"]) - 1,), np.log((1 + np.exp(-1)) / 2) - 20)
        )


def test_neither_order_nor_scale_of_the_weights_matters(sources) -> None:
    weights = {"a": 0.1, "b": 0.2, "c": 0.3}
    one = EnsembleDataset(sources, weights=weights)
    names = ("c", "a", "b")
    two = EnsembleDataset({name: sources[name] for name in names}, weights={name: 7 * weights[name] for name in names})
    assert one.content_digest == two.content_digest
    for left, right in zip(one, two, strict=True):
        assert all(torch.equal(left[name].nan_to_num(), right[name].nan_to_num()) for name in left)
    assert EnsembleDataset(sources).content_digest != one.content_digest


def test_one_teacher_twice_is_that_teacher(tmp_path) -> None:
    made = of_teacher(1, temperatures=True)
    cache = opened(tmp_path / "a.h5", made)
    same = EnsembleDataset({"one": cache, "two": CachedLogitsDataset(tmp_path / "a.h5")}, weights={"one": 3, "two": 1})
    logits = torch.randn(2, 5, 50)
    for objective in (Objective(), Objective(temperature=2.0, alpha=0.5), Objective(tail="residual", alpha=0.7)):
        own, found = (
            distillation_loss(logits, collate([one[0], one[1]])["targets"], objective).loss for one in (cache, same)
        )
        torch.testing.assert_close(found, own, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "total_variation"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_losses_are_those_of_the_mixture_on_its_cells(divergence, temperature, tmp_path) -> None:
    made = [of_teacher(seed, k=40, temperatures=True) for seed in (1, 2)]
    mixed = EnsembleDataset(
        {name: opened(tmp_path / f"{name}.h5", one) for name, one in zip("ab", made, strict=True)},
        weights={"a": 3, "b": 1},
    )
    assert mixed.temperatures == (0.5, 2.0)
    objective = Objective(divergence=divergence, temperature=temperature)
    logits = torch.randn(1, 3, 50, dtype=torch.float64, requires_grad=True)
    loss = distillation_loss(logits, collate([mixed[0]])["targets"], objective).loss
    loss.backward()

    dense_logits = logits.detach()[0].clone().requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    for t in range(3):
        p = {}
        for one, share in zip(made, (0.75, 0.25), strict=True):
            tail = np.exp(float(one.tail_logmass[t] if temperature == 1 else one.tail_logmass_T[t, 1]))
            kept = torch.from_numpy(one.topk_logprobs[t]).double().div(temperature).softmax(-1) * (1 - tail)
            for token, value in zip(one.topk_ids[t].tolist(), kept.tolist(), strict=True):
                p.setdefault(token, []).append(share * value)
        common = {token: sum(values) for token, values in p.items() if len(values) == 2}
        assert 25 < len(common) < 40
        q = (dense_logits[t] / temperature).softmax(-1)
        own, student = torch.tensor([*common.values()], dtype=torch.float64), q[[*common]]
        cells = (torch.cat([part, 1 - part.sum(0, keepdim=True)]) for part in (own, student))
        expected = expected + temperature**2 * dense_divergence(*cells, objective) / 3
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.grad[0], dense_logits.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_mixture_takes_ensembles_and_caches(temperature, tmp_path) -> None:
    caches = {
        name: opened(tmp_path / f"{name}.h5", of_teacher(seed, temperatures=True)) for seed, name in enumerate("abc")
    }
    ensemble = EnsembleDataset({name: caches[name] for name in "ab"})
    assert ensemble.attributes["tokenizer_map_digest"] == "a" * 64
    assert "content_digest" not in ensemble.attributes
    mixed = MixedDataset({"both": ensemble, "one": caches["c"]})
    order = sorted(range(len(mixed)), key=lambda i: (int(mixed[i]["source"]), int(mixed[i]["row"])))
    logits, objective = torch.randn(8, 5, 50), Objective(temperature=temperature)
    batch = collate([mixed[i] for i in order])
    assert batch["source"].tolist() == [0] * 4 + [1] * 4
    found = distillation_loss(logits, batch["targets"], objective, per_token=True).loss
    for dataset, part in ((ensemble, slice(4)), (caches["c"], slice(4, 8))):
        own = collate([dataset[i] for i in range(4)])["targets"]
        expected = distillation_loss(logits[part], own, objective, per_token=True).loss
        torch.testing.assert_close(found[part], expected, rtol=1e-5, atol=1e-6)


def test_only_temperatures_of_all_teachers_are_left(tmp_path) -> None:
    with_tails = opened(tmp_path / "a.h5", of_teacher(1, temperatures=True))
    mixed = EnsembleDataset({"a": with_tails, "b": opened(tmp_path / "b.h5", of_teacher(2))})
    assert mixed.temperatures == ()
    targets = collate([mixed[0]])["targets"]
    logits = torch.randn(1, 3, 50)
    assert distillation_loss(logits, targets).loss > 0
    with pytest.raises(ConfigError, match=r"temperature: expected one that the cache has a tail for \(1\), got 2"):
        distillation_loss(logits, targets, Objective(temperature=2.0))
    with pytest.warns(UserWarning, match="renormalised"):
        renormalised = Objective(temperature=2.0, tail="renormalised")
    with pytest.raises(ConfigError, match=r"temperature: expected one that the cache has a tail for \(1\), got 2"):
        distillation_loss(logits, targets, renormalised)


def test_loaders_samplers_and_pickles_take_it(sources) -> None:
    mixed = EnsembleDataset(sources)
    again = pickle.loads(pickle.dumps(mixed))
    assert again.content_digest == mixed.content_digest
    sampler = ResumableSampler(ItemOrder(len(mixed), seed=0), num_replicas=1, rank=0, digest=mixed.content_digest)
    batches = list(DataLoader(again, batch_size=2, sampler=sampler, num_workers=2))
    assert sorted(torch.cat([batch["row"] for batch in batches]).tolist()) == [0, 1, 2, 3]
    for batch in batches:
        expected = collate([mixed[row] for row in batch["row"].tolist()])
        assert torch.equal(batch["targets"].topk_logprobs, expected["targets"].topk_logprobs)
        batch["targets"].check_alignment(batch["input_ids"])
    flat = collate_flat([mixed[0], mixed[1]])
    assert flat["targets"].topk_logprobs_NKJ.shape == (1, 8, 4, 0)
    with pytest.raises(IndexError):
        mixed[4]


def test_a_label_that_one_teacher_kept_contradicts_nothing(tmp_path) -> None:
    made = [of_teacher(1, k=2), of_teacher(2, k=2)]
    # The label is the first teacher's best token, which the second one did not keep.
    ids = [np.tile(np.array(row, one.topk_ids.dtype), (14, 1)) for row, one in zip(([7, 3], [3, 9]), made, strict=True)]
    logp = np.tile(np.log(np.array([[0.8, 0.1]])).astype(np.float16), (14, 1))
    tail, no_label = np.full(14, np.log(0.1), np.float32), 0 * made[0].label_logprob
    sources = {}
    for name, one, topk_ids, label in zip("ab", made, ids, (np.log(0.8), np.log(0.01)), strict=True):
        changed = dataclasses.replace(
            one,
            input_ids=np.full(14, 7, one.input_ids.dtype),
            topk_ids=topk_ids,
            topk_logprobs=logp,
            tail_logmass=tail,
            label_logprob=(no_label + label).astype(np.float32),
        )
        sources[name] = opened(tmp_path / f"{name}.h5", changed)
    batch = collate([EnsembleDataset(sources)[0]])
    batch["targets"].check_alignment(batch["input_ids"])
    assert batch["targets"].topk_logprobs.exp()[0, 0].tolist() == pytest.approx([0.45, 0.0], rel=1e-3)
    assert batch["targets"].label_logprob.exp()[0, 0].item() == pytest.approx(0.405, rel=1e-3)


def test_windows_masks_packed_blocks_and_narrow_students_are_mixed(tmp_path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        made = of_teacher(seed, masked=True)
        made = dataclasses.replace(made, input_ids=made.input_ids % 40)
        write_cache(tmp_path / f"{name}.h5", made, profile=compact(top_k=4, extras=extras_of(made)))
    paths = {name: tmp_path / f"{name}.h5" for name in "ab"}
    options = {"window": 6, "student_vocab_size": 40, "top_k": 3}
    mixed = EnsembleDataset({name: CachedLogitsDataset(path, **options) for name, path in paths.items()})
    assert [len(item["input_ids"]) for item in mixed] == [6, 6, 2]
    assert mixed.is_masked
    item, own = mixed[0], CachedLogitsDataset(paths["a"], **options)[0]
    assert torch.equal(item["loss_mask"], own["loss_mask"])
    assert torch.equal(item["segments"], own["segments"])
    assert int(item["topk_ids"].max()) < 40
    assert item["n_beyond"] == sum(CachedLogitsDataset(path, **options)[0]["n_beyond"] for path in paths.values())

    blocks = packed_records()
    write_cache(tmp_path / "blocks.h5", blocks)
    both = {name: CachedLogitsDataset(tmp_path / "blocks.h5") for name in "ab"}
    assert [len(item["input_ids"]) for item in EnsembleDataset(both)] == [6, 6, 1]


def test_what_cannot_be_mixed_is_refused(sources, tmp_path) -> None:
    def refused(message: str, given, **options) -> None:
        with pytest.raises(ConfigError, match=message):
            EnsembleDataset(given, **options)

    def with_other(made: Records, **options) -> dict[str, CachedLogitsDataset]:
        return {"a": sources["a"], "other": opened(tmp_path / "other.h5", made, **options)}

    refused("expected at least one cache, got none", {})
    refused(r"weights: expected one for each of \['a', 'b', 'c'\], got \['a'\]", sources, weights={"a": 1})
    for weight in (0, -1, float("inf"), float("nan")):
        refused("weights: expected positive numbers, got {'b': ", sources, weights={"a": 1, "b": weight, "c": 1})
    refused("same top_k, got 4 in 'a' and 3 in 'other'; open them with the same top_k", with_other(of_teacher(2, k=3)))
    refused("same max_tokens, got None in 'a' and 2 in 'other'; open", with_other(of_teacher(2), max_tokens=2))
    refused("same is_masked, got False in 'a' and True in 'other'", with_other(of_teacher(2, masked=True)))
    shorter = with_other(of_teacher(2, lengths=(3, 5, 2)))
    refused("4 tokens from token 0 of dataset row 3 as item 3 of 'a' .* and nothing of 'other'", shorter)
    longer = with_other(of_teacher(2, lengths=(3, 4, 3, 4)))
    refused("5 tokens from token 0 of dataset row 1 as item 1 of 'a' .* and 4 tokens from token 0 of dataset", longer)
    write_cache(tmp_path / "other.h5", of_teacher(2), tokenizer_map_digest="b" * 64)
    refused("one tokenizer, got others", {"a": sources["a"], "other": CachedLogitsDataset(tmp_path / "other.h5")})
    write_cache(tmp_path / "compact.h5", of_teacher(2), profile=compact(top_k=4))
    coded = CachedLogitsDataset(tmp_path / "compact.h5", decode="device")
    refused("expected caches opened with decode='worker', got 'device'", {"a": coded, "b": coded})


def test_other_tokens_and_masks_are_refused_when_they_are_read(tmp_path) -> None:
    made = [of_teacher(seed, masked=True) for seed in (1, 2)]
    other = made[1].input_ids.copy()
    other[4] += 1
    mask = made[1].loss_mask.copy()
    mask[9] = 1 - mask[9]
    changed = dataclasses.replace(made[1], input_ids=other, loss_mask=mask)
    sources = {name: opened(tmp_path / f"{name}.h5", one) for name, one in zip("ab", (made[0], changed), strict=True)}
    mixed = EnsembleDataset(sources)
    with pytest.raises(
        ConfigError, match=r"same input_ids, got \d+ in '\w' \(.*\.h5\) and \d+ in .* position 1 .* row 1;"
    ):
        mixed[1]
    with pytest.raises(
        ConfigError, match=r"same loss_mask, got \w+ in .* at position 1 of the item, in dataset row 2;"
    ):
        mixed[2]
    assert len(mixed[3]["input_ids"]) == 4
    other = made[1].input_ids.copy()
    other[0] += 1
    first = dataclasses.replace(made[1], input_ids=other)
    with pytest.raises(ConfigError, match=r"same input_ids, .* position 0 of the item, in dataset row 0;"):
        EnsembleDataset({"a": sources["a"], "b": opened(tmp_path / "first.h5", first)})


def test_targets_at_chosen_positions_are_mixed_where_all_teachers_have_them(tmp_path) -> None:
    made = [of_teacher(seed) for seed in (1, 2)]
    places = {"same": (np.array([0, 2, 4, 9, 12]),) * 2, "other": (np.array([0, 2, 9]), np.array([0, 2, 10]))}
    whole, same, other = (
        {
            name: opened(tmp_path / f"{what}-{name}.h5", one if at is None else one.at(at))
            for name, one, at in zip("ab", made, ats, strict=True)
        }
        for what, ats in {"whole": (None, None), **places}.items()
    )
    items, all_items = EnsembleDataset(same), EnsembleDataset(whole)
    for item, expected in zip(items, all_items, strict=True):
        at = item["target_pos"]
        for name in ("topk_ids", "topk_logprobs", "tail_logmass", "label_logprob"):
            torch.testing.assert_close(item[name], expected[name][at], equal_nan=True, rtol=0, atol=0)
    batch = collate([items[i] for i in range(len(items))])
    assert int(batch["targets"].mask.sum()) == 5
    with pytest.raises(ConfigError, match=r"expected targets at the same positions, .* row 2; score with positions="):
        EnsembleDataset(other)[2]
    with pytest.raises(ConfigError, match="expected the same has_target_pos"):
        EnsembleDataset({"a": whole["a"], "b": same["b"]})


def test_a_checkpoint_knows_its_teachers(sources, tmp_path) -> None:
    mixed = EnsembleDataset(sources)
    state = DistillationState(version=1, dataset=TrainedOn.of(mixed), sampler={})
    assert state.dataset.path.count(".h5") == 3
    state.check(tmp_path, TrainedOn.of(EnsembleDataset(dict(reversed(sources.items())))))
    for other in (EnsembleDataset({name: sources[name] for name in "ab"}), sources["a"]):
        with pytest.raises(CacheError, match="expected the cache that this checkpoint was trained on"):
            state.check(tmp_path, TrainedOn.of(other))
