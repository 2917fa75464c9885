"""Batches of items: padded, flat, through loaders, and the targets they carry."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from builders import compact, drawn_records, records, write_cache
from dense_losses import default_dtype
from torch.utils.data import ConcatDataset, DataLoader, Subset

from dask_logits import (
    CachedLogitsDataset,
    ConfigError,
    DatasetError,
    MixedDataset,
    SparseTargets,
    collate,
    collate_flat,
)

LENGTHS = (4, 0, 2, 7, 1, 3)
IN_TARGETS = ("topk_ids", "topk_logprobs", "logsumexp", "tail_logmass", "label_logprob", "label_ids", "input_ids")


@pytest.fixture
def path(tmp_path):
    write_cache(tmp_path / "teacher_logits.h5", records(LENGTHS, k=3))
    return tmp_path / "teacher_logits.h5"


@pytest.fixture
def dataset(path) -> CachedLogitsDataset:
    return CachedLogitsDataset(path, keep_empty=True)


def equal(one: SparseTargets, other: SparseTargets) -> bool:
    return one.vocab_size == other.vocab_size and all(
        torch.equal(getattr(one, name).nan_to_num(7), getattr(other, name).nan_to_num(7))
        for name in (*IN_TARGETS, "mask")
    )


def test_the_default_dtype_changes_no_targets(tmp_path) -> None:
    write_cache(tmp_path / "warm.h5", records(LENGTHS, k=3, temperatures=True))
    first, second, *_ = CachedLogitsDataset(tmp_path / "warm.h5")
    one, other = (dataclasses.replace(item, temperatures=(0.7, 1.3)) for item in (first, second))
    mixed = dataclasses.replace(other, tensors={**other.tensors, "topk_logprobs_T": torch.zeros(2, 3, 2)})
    expected = collate([one, mixed])["targets"].topk_logprobs_NKJ
    with default_dtype(torch.bfloat16):
        assert torch.equal(collate([one, mixed])["targets"].topk_logprobs_NKJ, expected)


def test_collate_pads_and_makes_labels(dataset) -> None:
    batch = collate([dataset[0], dataset[1], dataset[2]], pad_id=9)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "targets", "row", "segments"}
    targets, ids = batch["targets"], dataset[0]["input_ids"].tolist()
    assert batch["input_ids"][0].tolist() == ids
    assert batch["input_ids"][2].tolist()[2:] == [9, 9]
    assert batch["labels"][0].tolist() == ids
    assert batch["labels"][2].tolist() == [*dataset[2]["input_ids"].tolist(), -100, -100]
    assert targets.label_ids[0].tolist() == [*ids[1:], -100]
    assert targets.label_ids[2].tolist() == [dataset[2]["input_ids"][1].item(), -100, -100, -100]
    assert targets.label_ids[1].tolist() == [-100] * 4
    assert targets.mask.sum(1).tolist() == [4, 0, 2]
    assert torch.equal(batch["attention_mask"].bool(), targets.mask)
    assert targets.shape == (3, 4)
    assert targets.topk_ids.shape == targets.topk_logprobs.shape == (3, 4, 3)
    assert torch.isnan(targets.label_logprob[2, 2:]).all()
    assert targets.vocab_size == 50


def test_label_ids_are_what_label_logprob_is_of(dataset) -> None:
    targets = collate(list(dataset))["targets"]
    assert torch.equal(targets.label_ids >= 0, ~torch.isnan(targets.label_logprob))


def test_a_token_of_the_next_document_is_no_label(path) -> None:
    windows = CachedLogitsDataset(path, window=5)
    # Documents of 4, 2, 7, 1 and 3 tokens.
    batch = collate([windows[0], windows[1]])
    ids = [windows[i]["input_ids"].tolist() for i in range(2)]
    assert batch["targets"].label_ids.tolist() == [
        [*ids[0][1:4], -100, -100],
        [-100, *ids[1][2:5], -100],
    ]
    # Models shift these themselves.
    assert batch["labels"].tolist() == [[*ids[0][:4], -100], [ids[1][0], -100, *ids[1][2:5]]]


def test_a_flat_batch_is_the_padded_one_without_padding(dataset) -> None:
    items = list(dataset)
    flat, padded = collate_flat(items), collate(items)
    mask = padded["targets"].mask
    for name in IN_TARGETS:
        one, other = (getattr(batch["targets"], name) for batch in (flat, padded))
        assert torch.equal(one[0].nan_to_num(7), other[mask].nan_to_num(7)), name
    assert flat["targets"].mask.all()
    assert flat["cu_seqlens"].tolist() == [0, 4, 4, 6, 13, 14, 17]
    assert flat["cu_seqlens"].dtype == torch.int32
    assert flat["position_ids"][0].tolist() == [i for length in LENGTHS for i in range(length)]
    assert torch.equal(flat["segments"], padded["segments"])
    labels = padded["labels"].clone()
    labels[:, 0] = -100
    assert torch.equal(flat["labels"][0], labels[mask])
    assert flat["targets"].check_alignment(flat["input_ids"]) is None


def test_a_flat_batch_needs_no_decoding(tmp_path) -> None:
    write_cache(tmp_path / "d.h5", records(LENGTHS, k=3), profile=compact(3))
    here, there = (CachedLogitsDataset(tmp_path / "d.h5", decode=decode) for decode in ("worker", "device"))
    found = there.decoder()(collate_flat([there[0], there[3]])["targets"])
    assert equal(found, collate_flat([here[0], here[3]])["targets"])


@pytest.mark.parametrize(("workers", "context"), [(0, None), (2, "fork"), (1, "spawn")])
def test_a_loader_without_a_collate_function_gives_the_same_batches(dataset, workers: int, context) -> None:
    loaders = [
        DataLoader(dataset, batch_size=4, num_workers=workers, multiprocessing_context=context, **more)
        for more in ({}, {"collate_fn": collate})
    ]
    for one, other in zip(*loaders, strict=True):
        assert equal(one["targets"], other["targets"])
        assert torch.equal(one["labels"], other["labels"])


def test_items_of_subsets_and_joined_datasets_collate(dataset) -> None:
    for here in (Subset(dataset, [3, 0]), ConcatDataset([dataset, dataset])):
        (batch,) = DataLoader(here, batch_size=len(here))
        assert batch["targets"].mask.sum() == sum(len(item["input_ids"]) for item in here)


def test_all_tokens_of_an_item_without_a_mask_are_learned(dataset, tmp_path) -> None:
    chats = records((4, 5), k=3, masked=True)
    write_cache(tmp_path / "chats.h5", chats)
    masked = CachedLogitsDataset(tmp_path / "chats.h5")
    for items in ([dataset[0], *masked], [*masked, dataset[0]]):
        learned = collate(items)["targets"].mask.sum(1).tolist()
        assert sorted(learned) == sorted([4, int(chats.loss_mask[:4].sum()), int(chats.loss_mask[4:].sum())])


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (lambda: records((3,), k=2), "number of entries, got 3 and 2"),
        (lambda: records((3,), k=3, temperatures=True), r"temperatures, got none and \(0.5, 2.0\)"),
        (lambda: drawn_records(records((3,), k=3)), "number of draws, got none and 7"),
    ],
)
def test_items_of_caches_that_do_not_agree_are_refused(dataset, tmp_path, other, what) -> None:
    write_cache(tmp_path / "other.h5", other())
    items = [dataset[0], CachedLogitsDataset(tmp_path / "other.h5")[0]]
    for function in (collate, collate_flat):
        with pytest.raises(DatasetError, match=f"collate: expected items with the same {what} in one batch; open"):
            function(items)
    with pytest.raises(DatasetError, match="same vocabulary, got 50 and 40 in one batch"):
        collate([dataset[0], dataclasses.replace(dataset[0], vocab_size=40)])


def test_codes_of_other_tables_are_refused(tmp_path) -> None:
    coded = {}
    for seed, name in enumerate("ab"):
        write_cache(tmp_path / f"{name}.h5", records((3, 4), k=3), profile=compact(3, seed=seed))
        coded[name] = CachedLogitsDataset(tmp_path / f"{name}.h5", decode="device")
    with pytest.raises(DatasetError, match="same id table of codes, got "):
        collate([coded["a"][0], coded["b"][0]])
    with pytest.raises(ConfigError, match="decoder: expected the codes of its own cache, got those of one with other"):
        coded["b"].decoder()(collate([coded["a"][0]])["targets"])
    with pytest.raises(ConfigError, match="decode: expected 'worker' for sources with different id tables, got 'dev"):
        MixedDataset(coded)
    assert len(MixedDataset({"a": coded["a"], "again": CachedLogitsDataset(tmp_path / "a.h5", decode="device")})) == 4


def test_targets_move_and_pickle_as_one(dataset) -> None:
    targets = collate(list(dataset))["targets"]
    moved = targets.to("meta", non_blocking=True)
    assert {getattr(moved, name).device.type for name in (*IN_TARGETS, "mask")} == {"meta"}
    assert moved.device.type == "meta"
    assert equal(pickle.loads(pickle.dumps(targets)), targets)
    with pytest.raises(dataclasses.FrozenInstanceError):
        targets.mask = None


def test_a_loader_pins_all_targets(dataset, monkeypatch) -> None:
    # Pinning needs an accelerator; here only which tensors it reaches.
    pinned: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.data_ptr()) or tensor)
    from torch.utils.data._utils.pin_memory import pin_memory

    batch = collate(list(dataset))
    found = pin_memory(batch)
    assert isinstance(found["targets"], SparseTargets)
    assert {getattr(batch["targets"], name).data_ptr() for name in (*IN_TARGETS, "mask")} <= set(pinned)


def test_accelerate_moves_the_targets(dataset) -> None:
    from accelerate.utils import send_to_device

    batch = send_to_device(collate(list(dataset)), "meta", non_blocking=True)
    assert batch["targets"].device.type == batch["input_ids"].device.type == "meta"


def test_targets_cannot_be_sliced(dataset) -> None:
    targets = collate(list(dataset))["targets"]
    with pytest.raises(TypeError, match=r"SparseTargets cannot be sliced: .* nothing is shifted. .*max_tokens=..."):
        targets[:, 1:]
    with pytest.raises(TypeError, match="not iterable"):
        iter(targets)


def test_targets_of_different_shapes_are_refused(dataset) -> None:
    targets = collate(list(dataset))["targets"]
    with pytest.raises(ConfigError, match=r"tail_logmass: expected the shape \(6, 7\), got \(6, 6\)"):
        dataclasses.replace(targets, tail_logmass=targets.tail_logmass[:, 1:])
    with pytest.raises(ConfigError, match=r"topk_ids: expected the shape \(6, 7, 3\), got \(6, 6, 3\)"):
        dataclasses.replace(targets, topk_ids=targets.topk_ids[:, 1:])


@pytest.mark.parametrize("profile", [None, compact(3), compact(3, precision=12)])
def test_the_cached_tokens_are_aligned_with_the_targets(tmp_path, profile) -> None:
    write_cache(tmp_path / "c.h5", records((30, 50), k=3), profile=profile)
    for options in ({}, {"top_k": 1}, {"window": 11}, {"max_tokens": 5}):
        dataset = CachedLogitsDataset(tmp_path / "c.h5", **options)
        batch = collate(list(dataset), pad_id=4)
        batch["targets"].check_alignment(batch["input_ids"])


def test_other_tokens_than_the_teachers_are_refused(dataset) -> None:
    batch = collate(list(dataset))
    ids, targets = batch["input_ids"], batch["targets"]
    other = ids.clone()
    other[3, 2] += 1
    message = rf"other tokens than the teacher at 1 of 17 positions, first at \(3, 2\): the cache has token {ids[3, 2]}"
    with pytest.raises(DatasetError, match=message):
        targets.check_alignment(other)
    with pytest.raises(DatasetError, match=r"have the shape \(6, 6\), but the targets have the shape \(6, 7\)"):
        targets.check_alignment(ids[:, 1:])
    for shift, where in ((1, "right"), (-1, "left")):
        with pytest.raises(DatasetError, match=f"They are the cached tokens, shifted to the {where} by one position"):
            targets.check_alignment(ids.roll(shift, 1))
    padding = torch.where(targets.mask, ids, 33)
    targets.check_alignment(padding)


@pytest.mark.parametrize("shift", [1, -1])
def test_targets_shifted_against_their_tokens_are_refused(tmp_path, shift: int) -> None:
    write_cache(tmp_path / "c.h5", records((40,), k=3), profile=compact(3))
    batch = collate(list(CachedLogitsDataset(tmp_path / "c.h5")))
    targets = batch["targets"]
    names = ("topk_ids", "topk_logprobs", "tail_logmass")
    shifted = dataclasses.replace(targets, **{name: getattr(targets, name).roll(shift, 1) for name in names})
    with pytest.raises(DatasetError, match=r"The targets do not belong to these tokens: at .* positions disagree"):
        shifted.check_alignment(batch["input_ids"])


def test_what_is_no_item_is_refused(dataset) -> None:
    with pytest.raises(DatasetError, match="expected the items of a CachedLogitsDataset, unchanged, got dict"):
        collate([dict(dataset[0])])
    for function in (collate, collate_flat):
        with pytest.raises(DatasetError, match="expected at least one item, got an empty list"):
            function([])
