from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from builders import records, write_cache
from torch.utils.data import DataLoader

from dask_logits import CachedLogitsDataset, CacheError, ConfigError, collate

LENGTHS = (4, 0, 2, 7, 1, 3)


@pytest.fixture
def path(tmp_path):
    write_cache(tmp_path / "teacher_logits.h5", records(LENGTHS, k=3))
    return tmp_path / "teacher_logits.h5"


def flat(batches) -> list[tuple[int, list[int], list[float]]]:
    return [
        (int(row), ids[mask].tolist(), lse[mask].tolist())
        for batch in batches
        for row, ids, lse, mask in zip(
            batch["row"], batch["input_ids"], batch["logsumexp"], batch["target_mask"], strict=True
        )
    ]


def test_items_are_the_documents(path) -> None:
    dataset, made = CachedLogitsDataset(path), records(LENGTHS, k=3)
    assert len(dataset) == 6
    starts = np.concatenate([[0], np.cumsum(LENGTHS)])
    for i, item in enumerate(dataset):
        part = slice(starts[i], starts[i + 1])
        assert item["row"] == i
        assert item["input_ids"].tolist() == made.input_ids[part].tolist()
        assert item["topk_ids"].shape == (LENGTHS[i], 3)
        np.testing.assert_array_equal(item["topk_logprobs"].numpy(), made.topk_logprobs[part])
        np.testing.assert_array_equal(item["label_logprob"].numpy(), made.label_logprob[part])
    assert dataset[-1]["row"] == 5
    with pytest.raises(IndexError, match="item 6"):
        dataset[6]


def test_a_run_folder_is_a_path_too(path) -> None:
    assert len(CachedLogitsDataset(path.parent)) == 6


@pytest.mark.parametrize(("workers", "context"), [(0, None), (2, "fork"), (1, "spawn")])
def test_loader_workers_read_the_same(path, workers: int, context: str | None) -> None:
    dataset = CachedLogitsDataset(path)
    dataset[0]
    loader = DataLoader(dataset, batch_size=2, collate_fn=collate, num_workers=workers, multiprocessing_context=context)
    found = flat(loader)
    assert [row for row, _, _ in found] == list(range(6))
    assert found == flat([collate([dataset[i]]) for i in range(6)])


def test_pickling_carries_no_open_file(path) -> None:
    dataset = CachedLogitsDataset(path)
    data = pickle.dumps(dataset)
    assert len(data) < 2_000
    assert pickle.loads(data)[3]["input_ids"].tolist() == dataset[3]["input_ids"].tolist()


def test_items_do_not_alias_the_file(path) -> None:
    dataset = CachedLogitsDataset(path)
    before = dataset[0]["topk_logprobs"].clone()
    dataset[0]["topk_logprobs"].zero_()
    assert torch.equal(dataset[0]["topk_logprobs"], before)


def test_a_smaller_k_moves_mass_to_the_tail(path) -> None:
    whole, cut = CachedLogitsDataset(path)[3], CachedLogitsDataset(path, top_k=1)[3]
    assert cut["topk_ids"].shape == (7, 1)
    expected = torch.logaddexp(whole["tail_logmass"], whole["topk_logprobs"][:, 1:].float().logsumexp(-1))
    torch.testing.assert_close(cut["tail_logmass"], expected)
    assert CachedLogitsDataset(path, top_k=1)[1]["tail_logmass"].shape == (0,)


@pytest.mark.parametrize("top_k", [0, 4, -1])
def test_a_k_the_cache_does_not_hold_is_refused(path, top_k: int) -> None:
    with pytest.raises(ConfigError, match=r"top_k: expected 1 to 3, which the cache holds"):
        CachedLogitsDataset(path, top_k=top_k)


def test_truncated_and_missing_files_are_refused(path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CacheError, match="truncated"):
        CachedLogitsDataset(path)
    with pytest.raises(CacheError, match="expected a cache, got nothing"):
        CachedLogitsDataset(path.with_name("none.h5"))


def test_collate_pads_and_shifts(path) -> None:
    dataset = CachedLogitsDataset(path)
    batch = collate([dataset[0], dataset[1], dataset[2]], pad_id=9)
    ids = dataset[0]["input_ids"].tolist()
    assert batch["input_ids"][0].tolist() == ids
    assert batch["input_ids"][2].tolist()[2:] == [9, 9]
    assert batch["labels"][0].tolist() == ids
    assert batch["labels"][2].tolist() == [*dataset[2]["input_ids"].tolist(), -100, -100]
    assert batch["next_ids"][0].tolist() == [*ids[1:], -100]
    assert batch["next_ids"][2].tolist() == [dataset[2]["input_ids"][1].item(), -100, -100, -100]
    assert batch["next_ids"][1].tolist() == [-100] * 4
    assert batch["target_mask"].sum(1).tolist() == [4, 0, 2]
    assert torch.equal(batch["attention_mask"].bool(), batch["target_mask"])
    assert batch["topk_ids"].shape == batch["topk_logprobs"].shape == (3, 4, 3)
    assert torch.isnan(batch["label_logprob"][2, 2:]).all()


def test_next_ids_are_what_label_logprob_is_of(path) -> None:
    batch = collate(list(CachedLogitsDataset(path)))
    assert torch.equal(batch["next_ids"] >= 0, ~torch.isnan(batch["label_logprob"]))
