from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from builders import compact, packed_records, plain, records, write_cache
from torch.utils.data import DataLoader

from dask_logits import CachedLogitsDataset, CacheError, ConfigError, DatasetError, collate, collate_flat, convert
from dask_logits.tokenmap import map_digest, token_crcs

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


@pytest.fixture
def dense(tmp_path):
    write_cache(tmp_path / "d.h5", records(LENGTHS, k=3), profile=compact(3))
    return tmp_path / "d.h5"


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].nan_to_num(7), other[name].nan_to_num(7)) for name in one
    )


@pytest.mark.parametrize(("workers", "context"), [(0, None), (2, "fork"), (1, "spawn")])
def test_both_engines_read_the_same_in_every_process(dense, workers: int, context: str | None) -> None:
    fast, slow = CachedLogitsDataset(dense), CachedLogitsDataset(dense, engine="h5py")
    assert all(equal(fast[i], slow[i]) for i in range(6))
    batches = [
        list(DataLoader(d, batch_size=2, collate_fn=collate, num_workers=workers, multiprocessing_context=context))
        for d in (fast, slow)
    ]
    assert len(batches[0]) == 3
    assert all(equal(a, b) for a, b in zip(*batches, strict=True))


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize(("vocab_size", "precision"), [(50, 8), (300, 12), (70_000, 10)])
def test_codes_decode_to_what_workers_decode(tmp_path, top_k: int | None, vocab_size: int, precision: int) -> None:
    made = records(LENGTHS, k=3, vocab_size=vocab_size)
    write_cache(tmp_path / "c.h5", made, vocab_size=vocab_size, profile=compact(3, vocab_size, precision))
    here = CachedLogitsDataset(tmp_path / "c.h5", top_k=top_k)
    there = CachedLogitsDataset(tmp_path / "c.h5", top_k=top_k, decode="device")
    expected = collate([here[i] for i in range(6)])
    batch = collate([there[i] for i in range(6)])
    assert batch["topk_ids_b0"].dtype == torch.uint8
    assert "topk_ids" not in batch
    found = there.decoder()(batch)
    assert found.keys() == expected.keys()
    mask = expected["target_mask"]
    for name, values in expected.items():
        one, other = (values[mask], found[name][mask]) if values.shape[:2] == mask.shape else (values, found[name])
        assert torch.allclose(one.nan_to_num(7), other.nan_to_num(7), atol=1e-6), name


def test_what_cannot_be_decoded_there_is_refused(path, dense) -> None:
    with pytest.raises(ConfigError, match="decode: expected 'worker' for a plain cache"):
        CachedLogitsDataset(path, decode="device")
    with pytest.raises(ConfigError, match="decode: expected a compact cache, got a plain one"):
        CachedLogitsDataset(path).decoder()
    with pytest.raises(ConfigError, match="student_vocab_size: expected None with decode='device'"):
        CachedLogitsDataset(dense, decode="device", student_vocab_size=9)
    with pytest.raises(ConfigError, match="decode: expected 'worker' or 'device', got 'gpu'"):
        CachedLogitsDataset(dense, decode="gpu")
    with pytest.raises(ConfigError, match="engine: expected 'fast' or 'h5py', got 'zarr'"):
        CachedLogitsDataset(dense, engine="zarr")


@pytest.mark.parametrize("profile", [plain(3), compact(3)])
@pytest.mark.parametrize("made", [records(LENGTHS, k=3), packed_records(), records((0, 0), k=3)])
@pytest.mark.parametrize("window", [1, 3, 5, 100])
def test_windows_cut_the_stream_of_all_tokens(tmp_path, profile, made, window: int) -> None:
    write_cache(tmp_path / "c.h5", made, profile=profile)
    whole = CachedLogitsDataset(tmp_path / "c.h5")
    windows = CachedLogitsDataset(tmp_path / "c.h5", window=window)
    items, cut = [whole[i] for i in range(len(whole))], [windows[i] for i in range(len(windows))]
    assert [len(item["input_ids"]) for item in cut] == [
        min(window, made.n_tokens - first) for first in range(0, made.n_tokens, window)
    ]
    for name in ("input_ids", "topk_ids", "topk_logprobs", "label_logprob") if cut else ():
        one, other = (torch.cat([item[name] for item in found]) for found in (items, cut))
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))

    def places(found) -> list[tuple[int, int]]:
        return [
            (row, offset + i)
            for item in found
            for row, offset, length in item["segments"].tolist()
            for i in range(length)
        ]

    assert places(cut) == places(items)
    assert all(item["row"] == item["segments"][0, 0] for item in cut)


def test_windows_go_over_several_caches_in_dataset_order(tmp_path) -> None:
    same = {"fingerprint": "f", "plan_digest": "p", "n_rows": 6, "partial": True}
    write_cache(tmp_path / "a.h5", records(LENGTHS[3:], k=3, first_row=3), **same)
    write_cache(tmp_path / "b.h5", records(LENGTHS[:3], k=3), **same)
    windows = CachedLogitsDataset([tmp_path / "a.h5", tmp_path / "b.h5"], window=4)
    assert [item["segments"].tolist() for item in (windows[i] for i in range(len(windows)))] == [
        [[0, 0, 4]], [[2, 0, 2], [3, 0, 2]], [[3, 2, 4]], [[3, 6, 1], [4, 0, 1], [5, 0, 2]], [[5, 2, 1]],
    ]  # fmt: skip


def test_ids_the_student_lacks_go_to_the_tail_and_are_counted(tmp_path) -> None:
    made, path, highest = records(LENGTHS, k=3), tmp_path / "c.h5", 19
    write_cache(path, dataclasses.replace(made, input_ids=made.input_ids % (highest + 1)))
    dataset = CachedLogitsDataset(path)
    student = CachedLogitsDataset(path, student_vocab_size=highest + 1)
    seen = 0
    for i in range(6):
        item, cut = dataset[i], student[i]
        lost = item["topk_ids"] > highest
        assert int(cut["n_beyond"]) == int(lost.sum())
        seen += int(lost.sum())
        assert (cut["topk_ids"] <= highest).all()
        p = cut["topk_logprobs"].double().exp().sum(-1) + cut["tail_logmass"].double().exp()
        torch.testing.assert_close(p, torch.ones_like(p), atol=3e-3, rtol=0)
        for t in range(len(lost)):
            kept = item["topk_ids"][t][~lost[t]].tolist()
            assert cut["topk_ids"][t][: len(kept)].tolist() == kept
            assert (cut["topk_logprobs"][t][len(kept) :] == -torch.inf).all()
    assert seen
    assert collate([student[i] for i in range(6)])["n_beyond"].sum() == seen
    assert CachedLogitsDataset(path, student_vocab_size=1_000)[0]["n_beyond"] == 0
    with pytest.raises(DatasetError, match=r"student_vocab_size: expected input ids below 1, got \d+ in dataset row 0"):
        CachedLogitsDataset(path, student_vocab_size=1)[0]
    with pytest.raises(ConfigError, match="student_vocab_size: expected a positive integer"):
        CachedLogitsDataset(path, student_vocab_size=0)


class Words:
    def __init__(self, words: list[str]) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}


def test_a_students_tokenizer_has_to_be_the_teachers(tmp_path) -> None:
    words = [f"w{i}" for i in range(1_000)]
    vocabulary = Words(words).get_vocab()
    known = {"tokenizer_map_digest": map_digest(vocabulary), "tokenizer_ids": 1_000}
    write_cache(tmp_path / "c.h5", records((3,)), profile=compact(), **known, token_crcs=token_crcs(vocabulary))
    CachedLogitsDataset(tmp_path / "c.h5", student_tokenizer=Words(words))
    CachedLogitsDataset(tmp_path / "c.h5", student_tokenizer=Words([*words, "<pad>"]))
    other = [*words[:402], "x", *words[403:]]
    with pytest.raises(CacheError, match=r"first differs at id 402, which is 'x' there"):
        CachedLogitsDataset(tmp_path / "c.h5", student_tokenizer=Words(other))
    with pytest.raises(
        CacheError,
        match=r"of the 1000 ids of .*, got one of 700 ids that first differs at id 700, which is no token there",
    ):
        CachedLogitsDataset(tmp_path / "c.h5", student_tokenizer=Words(words[:700]))
    convert(tmp_path / "c.h5", tmp_path / "plain.h5", profile="plain")
    for name in ("c.h5", "plain.h5"):
        with pytest.raises(CacheError, match="at id 402"):
            CachedLogitsDataset(tmp_path / name, student_tokenizer=Words(other), engine="h5py")
    # A token with the same byte.
    alike = next(word for i in range(10_000) if token_crcs({(word := f"y{i}"): 0}) == token_crcs({"w402": 0}))
    with pytest.raises(CacheError, match="got one of 1000 ids; give the student"):
        CachedLogitsDataset(tmp_path / "c.h5", student_tokenizer=Words([*words[:402], alike, *words[403:]]))
    write_cache(tmp_path / "old.h5", records((3,)), tokenizer_map_digest=map_digest(vocabulary))
    with pytest.raises(CacheError, match="got one of 1000 ids; give the student"):
        CachedLogitsDataset(tmp_path / "old.h5", student_tokenizer=Words(other))
    write_cache(tmp_path / "none.h5", records((3,)), tokenizer_map_digest="")
    with pytest.raises(CacheError, match="made from token ids without"):
        CachedLogitsDataset(tmp_path / "none.h5", student_tokenizer=Words(words))


def test_a_flat_batch_is_the_padded_one_without_padding(path) -> None:
    dataset = CachedLogitsDataset(path)
    items = [dataset[i] for i in range(6)]
    flat_batch, padded = collate_flat(items), collate(items)
    mask = padded["target_mask"]
    for name in ("input_ids", "next_ids", "topk_ids", "topk_logprobs", "logsumexp", "tail_logmass", "label_logprob"):
        assert torch.equal(flat_batch[name][0].nan_to_num(7), padded[name][mask].nan_to_num(7))
    assert flat_batch["cu_seqlens"].tolist() == [0, 4, 4, 6, 13, 14, 17]
    assert flat_batch["cu_seqlens"].dtype == torch.int32
    assert flat_batch["position_ids"][0].tolist() == [i for length in LENGTHS for i in range(length)]
    assert torch.equal(flat_batch["segments"], padded["segments"])
    labels = padded["labels"].clone()
    labels[:, 0] = -100
    assert torch.equal(flat_batch["labels"][0], labels[mask])


def test_packing_needs_no_decoding(dense) -> None:
    there = CachedLogitsDataset(dense, decode="device")
    here = CachedLogitsDataset(dense)
    found = there.decoder()(collate_flat([there[0], there[3]]))
    expected = collate_flat([here[0], here[3]])
    assert torch.equal(found["topk_ids"], expected["topk_ids"])
    assert torch.equal(found["topk_logprobs"], expected["topk_logprobs"])


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ([], {}, "path: expected a cache, or several, got an empty list"),
        (None, {"top_k": "2"}, "top_k: expected 1 to 3, which the cache holds, got '2'"),
        (None, {"top_k": 1.0}, "top_k: expected 1 to 3, which the cache holds, got 1.0"),
    ],
)
def test_what_is_no_path_and_no_number_is_refused(tmp_path, given, settings, message) -> None:
    write_cache(tmp_path / "c.h5", records((3,), k=3))
    with pytest.raises(ConfigError) as caught:
        CachedLogitsDataset(tmp_path / "c.h5" if given is None else given, **settings)
    assert message in str(caught.value)


def test_the_content_of_all_files_is_told_apart(tmp_path) -> None:
    same = {"fingerprint": "f", "plan_digest": "p", "n_rows": 6, "partial": True}
    digests = [
        write_cache(tmp_path / name, records(lengths, k=3, first_row=row), **same)
        for name, lengths, row in (("a.h5", LENGTHS[:3], 0), ("b.h5", LENGTHS[3:], 3), ("c.h5", (1, 1, 1), 3))
    ]
    one, other = (CachedLogitsDataset([tmp_path / "a.h5", tmp_path / name]) for name in ("b.h5", "c.h5"))
    assert one.attributes["content_digest"] == other.attributes["content_digest"] == digests[0]
    assert one.content_digest != other.content_digest
