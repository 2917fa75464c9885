from __future__ import annotations

import dataclasses
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import compact, drawn_records, packed_records, plain, records, save_tokenizer, write_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dask_logits import (
    CachedLogitsDataset,
    CacheError,
    ConfigError,
    DatasetError,
    ItemOrder,
    ResumableSampler,
    collate,
    convert,
)
from dask_logits.cache.reader import CacheReader
from dask_logits.vocabulary import map_digest, token_crcs

LENGTHS = (4, 0, 2, 7, 1, 3)


def flattened(batch) -> dict[str, torch.Tensor]:
    """Return all tensors of a batch, those of its targets among the others."""
    targets = {} if "targets" not in batch else vars(batch["targets"])
    return {name: value for name, value in {**batch, **targets}.items() if isinstance(value, torch.Tensor)}


@pytest.fixture
def path(tmp_path):
    write_cache(tmp_path / "teacher_logits.h5", records(LENGTHS, k=3))
    return tmp_path / "teacher_logits.h5"


def flat(batches) -> list[tuple[int, list[int], list[float]]]:
    return [
        (int(row), ids[mask].tolist(), lse[mask].tolist())
        for batch in batches
        for row, ids, lse, mask in zip(
            batch["row"], batch["input_ids"], batch["targets"].logsumexp, batch["targets"].mask, strict=True
        )
    ]


def all_of(path, **options) -> CachedLogitsDataset:
    """Open a cache with its empty documents, so that item i is document i."""
    return CachedLogitsDataset(path, keep_empty=True, **options)


def test_items_are_the_documents(path) -> None:
    dataset, made = all_of(path), records(LENGTHS, k=3)
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
    assert len(CachedLogitsDataset(path.parent)) == 5


@pytest.mark.parametrize(("workers", "context"), [(0, None), (2, "fork"), (1, "spawn")])
def test_loader_workers_read_the_same(path, workers: int, context: str | None) -> None:
    dataset = all_of(path)
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


def test_opening_reads_only_the_beginning_of_a_long_item(tmp_path, monkeypatch) -> None:
    write_cache(tmp_path / "long.h5", records([10_000, 3]))
    read = []
    stored = CacheReader.stored
    monkeypatch.setattr(CacheReader, "stored", lambda *given: read.append(given[1:]) or stored(*given))
    dataset = CachedLogitsDataset(tmp_path / "long.h5")
    assert read == [(0, 4_096)]
    assert len(dataset[0]["input_ids"]) == 10_000


def test_items_do_not_alias_the_file(path) -> None:
    dataset = CachedLogitsDataset(path)
    before = dataset[0]["topk_logprobs"].clone()
    dataset[0]["topk_logprobs"].zero_()
    assert torch.equal(dataset[0]["topk_logprobs"], before)


def test_a_smaller_k_moves_mass_to_the_tail(path) -> None:
    whole, cut = all_of(path)[3], all_of(path, top_k=1)[3]
    assert cut["topk_ids"].shape == (7, 1)
    expected = torch.logaddexp(whole["tail_logmass"], whole["topk_logprobs"][:, 1:].float().logsumexp(-1))
    torch.testing.assert_close(cut["tail_logmass"], expected)
    assert all_of(path, top_k=1)[1]["tail_logmass"].shape == (0,)


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


@pytest.fixture
def dense(tmp_path):
    write_cache(tmp_path / "d.h5", records(LENGTHS, k=3), profile=compact(3))
    return tmp_path / "d.h5"


def equal(one, other) -> bool:
    one, other = (flattened(batch) for batch in (one, other))
    return one.keys() == other.keys() and all(
        torch.equal(one[name].nan_to_num(7), other[name].nan_to_num(7)) for name in one
    )


@pytest.mark.parametrize(("workers", "context"), [(0, None), (2, "fork"), (1, "spawn")])
def test_every_process_reads_the_same(dense, workers: int, context: str | None) -> None:
    dataset = all_of(dense)
    expected = [collate([dataset[i], dataset[i + 1]]) for i in (0, 2, 4)]
    loader = DataLoader(dataset, batch_size=2, collate_fn=collate, num_workers=workers, multiprocessing_context=context)
    assert all(equal(a, b) for a, b in zip(expected, loader, strict=True))


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize(("vocab_size", "precision"), [(50, 8), (300, 12), (70_000, 10)])
def test_codes_decode_to_what_workers_decode(tmp_path, top_k: int | None, vocab_size: int, precision: int) -> None:
    made = records(LENGTHS, k=3, vocab_size=vocab_size)
    write_cache(tmp_path / "c.h5", made, vocab_size=vocab_size, profile=compact(3, vocab_size, precision))
    here = all_of(tmp_path / "c.h5", top_k=top_k)
    there = all_of(tmp_path / "c.h5", top_k=top_k, decode="device")
    expected = collate([here[i] for i in range(6)])["targets"]
    coded = collate([there[i] for i in range(6)])["targets"]
    assert coded.codes["topk_ids_b0"].dtype == torch.uint8
    found = there.decoder()(coded)
    mask = expected.mask
    assert torch.equal(found.mask, mask)
    for name, values in flattened({"targets": expected}).items():
        assert torch.allclose(values[mask].nan_to_num(7), getattr(found, name)[mask].nan_to_num(7), atol=1e-6), name


def test_what_cannot_be_decoded_there_is_refused(path, dense) -> None:
    with pytest.raises(ConfigError, match="decode: expected 'worker' for a plain cache"):
        CachedLogitsDataset(path, decode="device")
    with pytest.raises(ConfigError, match="decode: expected a compact cache, got a plain one"):
        CachedLogitsDataset(path).decoder()
    with pytest.raises(ConfigError, match="student_vocab_size: expected None with decode='device'"):
        CachedLogitsDataset(dense, decode="device", student_vocab_size=9)
    with pytest.raises(ConfigError, match="decode: expected 'worker' or 'device', got 'gpu'"):
        CachedLogitsDataset(dense, decode="gpu")


@pytest.mark.parametrize("profile", [plain(3), compact(3)])
@pytest.mark.parametrize("made", [records(LENGTHS, k=3), packed_records(), records((0, 0), k=3)])
@pytest.mark.parametrize("window", [1, 3, 5, 100])
def test_windows_cut_the_stream_of_all_tokens(tmp_path, profile, made, window: int) -> None:
    write_cache(tmp_path / "c.h5", made, profile=profile)
    whole = all_of(tmp_path / "c.h5")
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
    write_cache(
        path,
        dataclasses.replace(
            made,
            input_ids=made.input_ids % (highest + 1),
            label_logprob=np.full_like(made.label_logprob, np.nan),
        ),
    )
    dataset = all_of(path)
    student = all_of(path, student_vocab_size=highest + 1)
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
    with pytest.raises(
        DatasetError, match=r"student_vocab_size: expected input ids below 1, got \d+ in dataset row 0; leave"
    ):
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
    with pytest.raises(CacheError, match=r"got one of 1000 ids, in which id 402 is 'x'; choose"):
        CachedLogitsDataset(tmp_path / "c.h5", student_tokenizer=Words(other))
    with pytest.raises(
        CacheError,
        match=r"tokenizer of 1000 ids \(.*\), got one of 700 ids, which has no token with id 700; choose",
    ):
        CachedLogitsDataset(tmp_path / "c.h5", student_tokenizer=Words(words[:700]))
    convert(tmp_path / "c.h5", tmp_path / "plain.h5", profile="plain")
    for name in ("c.h5", "plain.h5"):
        with pytest.raises(CacheError, match="in which id 402 is"):
            CachedLogitsDataset(tmp_path / name, student_tokenizer=Words(other))
    # A token with the same byte.
    alike = next(word for i in range(10_000) if token_crcs({(word := f"y{i}"): 0}) == token_crcs({"w402": 0}))
    with pytest.raises(CacheError, match="got one of 1000 ids; choose a student"):
        CachedLogitsDataset(tmp_path / "c.h5", student_tokenizer=Words([*words[:402], alike, *words[403:]]))
    write_cache(tmp_path / "old.h5", records((3,)), tokenizer_map_digest=map_digest(vocabulary))
    with pytest.raises(CacheError, match="got one of 1000 ids; choose a student"):
        CachedLogitsDataset(tmp_path / "old.h5", student_tokenizer=Words(other))
    write_cache(tmp_path / "none.h5", records((3,)), tokenizer_map_digest="")
    with pytest.raises(CacheError, match="made from token ids without"):
        CachedLogitsDataset(tmp_path / "none.h5", student_tokenizer=Words(words))


@pytest.mark.parametrize(
    ("paths", "options", "message"),
    [
        ([], {}, "path: expected a cache, or several, got an empty list"),
        (None, {"top_k": "2"}, "top_k: expected 1 to 3, which the cache holds, got '2'"),
        (None, {"max_tokens": 0}, "max_tokens: expected a positive integer or None, got 0"),
        (None, {"window": True}, "window: expected a positive integer or None, got True"),
        (None, {"top_k": 1.0}, "top_k: expected 1 to 3, which the cache holds, got 1.0"),
    ],
)
def test_what_is_no_path_and_no_number_is_refused(tmp_path, paths, options, message) -> None:
    write_cache(tmp_path / "c.h5", records((3,), k=3))
    with pytest.raises(ConfigError) as caught:
        CachedLogitsDataset(tmp_path / "c.h5" if paths is None else paths, **options)
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


def test_documents_without_a_token_are_left_out_unless_asked_for(path) -> None:
    dataset, whole = CachedLogitsDataset(path), all_of(path)
    assert (len(dataset), len(whole)) == (5, 6)
    assert [int(item["row"]) for item in dataset] == [0, 2, 3, 4, 5]
    assert [int(item["row"]) for item in whole] == list(range(6))
    assert int(dataset[-1]["row"]) == 5
    with pytest.raises(IndexError, match="item 5"):
        dataset[5]
    assert [batch["row"].tolist() for batch in DataLoader(dataset, batch_size=2)] == [[0, 2], [3, 4], [5]]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 3))
@settings(max_examples=25)
def test_the_order_and_the_sampler_reach_every_item_and_no_other(lengths, seed) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_cache(Path(folder) / "c.h5", records(lengths, k=2, seed=seed))
        dataset = CachedLogitsDataset(Path(folder) / "c.h5")
        sampler = ResumableSampler(ItemOrder(len(dataset), seed=seed), digest=dataset.content_digest)
        rows = sorted(int(dataset[i]["row"]) for i in sampler)
        assert rows == [row for row, length in enumerate(lengths) if length]


def test_empty_documents_of_several_parts_are_left_out(tmp_path) -> None:
    same = {"fingerprint": "f", "plan_digest": "p", "n_rows": 6, "partial": True}
    write_cache(tmp_path / "a.h5", records((0, 7, 0), k=3, first_row=3), **same)
    write_cache(tmp_path / "b.h5", records((4, 0, 2), k=3), **same)
    dataset = CachedLogitsDataset([tmp_path / "a.h5", tmp_path / "b.h5"])
    assert [(int(item["row"]), len(item["input_ids"])) for item in dataset] == [(0, 4), (2, 2), (4, 7)]
    assert dataset.n_tokens == 13


def test_documents_that_the_student_cannot_represent_are_left_out_when_asked(tmp_path) -> None:
    path, made = tmp_path / "c.h5", records((4, 3, 0, 5, 2), k=3)
    ids = made.input_ids.copy() % 40
    ids[[5, 13]] = 45, 49
    nan = np.full_like(made.label_logprob, np.nan)
    write_cache(path, dataclasses.replace(made, input_ids=ids, label_logprob=nan))
    dataset = CachedLogitsDataset(path, student_vocab_size=40, skip_unrepresentable=True)
    assert [int(item["row"]) for item in dataset] == [0, 3]
    assert "items: 2, 1 empty left out, 2 with tokens that the student lacks left out" in repr(dataset)
    short = CachedLogitsDataset(path, student_vocab_size=40, skip_unrepresentable=True, max_tokens=1)
    assert [int(item["row"]) for item in short] == [0, 1, 3, 4]
    windows = CachedLogitsDataset(path, student_vocab_size=40, skip_unrepresentable=True, window=6)
    assert [windows[i]["segments"].tolist() for i in range(2)] == [[[0, 0, 4], [3, 0, 2]], [[3, 2, 3]]]
    with pytest.raises(DatasetError, match=r"got 45 in dataset row 1; leave such documents out with skip_unrep"):
        list(CachedLogitsDataset(path, student_vocab_size=40))
    with pytest.raises(ConfigError, match="skip_unrepresentable: expected student_vocab_size, too, got None"):
        CachedLogitsDataset(path, skip_unrepresentable=True)


def test_blocks_that_the_student_cannot_represent_are_left_out_when_asked(tmp_path) -> None:
    made = packed_records()
    ids = made.input_ids % 40
    ids[8] = 49
    nan = np.full_like(made.label_logprob, np.nan)
    write_cache(tmp_path / "c.h5", dataclasses.replace(made, input_ids=ids, label_logprob=nan))
    dataset = CachedLogitsDataset(tmp_path / "c.h5", student_vocab_size=40, skip_unrepresentable=True)
    assert [item["segments"].tolist() for item in dataset] == [[[0, 0, 4], [1, 0, 0], [2, 0, 2]], [[3, 6, 1]]]


@pytest.mark.parametrize("made", [records(LENGTHS, k=3), packed_records()], ids=["documents", "blocks"])
def test_only_the_first_tokens_of_each_item(tmp_path, made) -> None:
    write_cache(tmp_path / "c.h5", made, profile=compact(3))
    whole, short = (CachedLogitsDataset(tmp_path / "c.h5", max_tokens=n) for n in (None, 3))
    assert len(whole) == len(short)
    for one, other in zip(whole, short, strict=True):
        for name in ("input_ids", "topk_ids", "topk_logprobs", "label_logprob", "tail_logmass"):
            assert torch.equal(one[name][:3].nan_to_num(7), other[name].nan_to_num(7))
        assert other["segments"][:, 2].sum() == min(3, len(one["input_ids"]))
    assert short.n_tokens == sum(len(item["input_ids"]) for item in short) < whole.n_tokens
    windows = CachedLogitsDataset(tmp_path / "c.h5", max_tokens=3, window=4)
    assert torch.equal(*(torch.cat([item["input_ids"] for item in found]) for found in (windows, short)))


@pytest.mark.parametrize("kind", ["most probable", "draws", "some positions"])
def test_a_window_has_no_label_where_a_document_was_cut(tmp_path, kind) -> None:
    made = records((6, 5, 7), k=3)
    if kind == "draws":
        made = drawn_records(made)
    if kind == "some positions":
        made = made.at(np.array([1, 3, 4, 8, 9, 14]))
    write_cache(tmp_path / "c.h5", made)
    (window,) = CachedLogitsDataset(tmp_path / "c.h5", max_tokens=4, window=12)
    targets = collate([window])["targets"]
    real = torch.tensor([True, True, True, False] * 3)[None]
    if kind == "some positions":
        assert window["target_pos"].tolist() == [1, 3, 6, 7, 11]
        real &= targets.mask
    assert torch.equal(targets.label_ids >= 0, real)
    assert torch.equal(targets.label_ids[real], targets.input_ids.roll(-1, 1)[real])


def test_a_window_has_no_label_where_a_block_was_left_out(tmp_path) -> None:
    made = packed_records()
    ids, logprobs = made.input_ids % 40, made.label_logprob.copy()
    ids[8] = 49
    # Inside a cut document the next token is known, also after a block.
    logprobs[[5, 11]] = -2.0
    write_cache(tmp_path / "c.h5", dataclasses.replace(made, input_ids=ids, label_logprob=logprobs))
    options = {"student_vocab_size": 40, "skip_unrepresentable": True}
    (window,) = CachedLogitsDataset(tmp_path / "c.h5", window=7, **options)
    assert window["segments"][:, 0].tolist() == [0, 2, 3]
    assert collate([window])["targets"].label_ids[0, 5:].tolist() == [-100, -100]


def test_a_dataset_says_what_it_is(path, tmp_path) -> None:
    write_cache(tmp_path / "d.h5", records(LENGTHS, k=3), teacher_path="some/teacher", profile=compact(3))
    assert repr(CachedLogitsDataset(tmp_path / "d.h5", top_k=2, max_tokens=5)) == (
        f"CachedLogitsDataset(\n    path: {tmp_path / 'd.h5'}\n    teacher: some/teacher\n"
        "    items: 5, 1 empty left out\n    tokens: 15\n    top_k: 2 of a vocabulary of 50\n    profile: compact\n"
        "    max_tokens: 5\n)"
    )
    assert "teacher: unknown\n    items: 6\n" in repr(all_of(path))


def test_a_students_tokenizer_may_be_named_by_its_folder(tmp_path) -> None:
    from transformers import AutoTokenizer

    for name, size in (("same", 104), ("other", 90)):
        save_tokenizer(tmp_path / name, size)
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "same").get_vocab()
    known = {"tokenizer_map_digest": map_digest(vocabulary), "tokenizer_ids": 104}
    write_cache(tmp_path / "c.h5", records((3,), vocab_size=104), vocab_size=104, **known)
    CachedLogitsDataset(tmp_path / "c.h5", student_tokenizer=str(tmp_path / "same"))
    with pytest.raises(CacheError, match="got one of 90 ids"):
        CachedLogitsDataset(tmp_path / "c.h5", student_tokenizer=tmp_path / "other")
    for tokenizer, message in (
        ("./nowhere", r"expected a folder with a tokenizer, got './nowhere', which does not exist"),
        (tmp_path, r"expected a tokenizer, its folder or its hub name, got '.*': \w+"),
        (5, r"expected a tokenizer, or its folder or hub name, got int"),
    ):
        with pytest.raises(ConfigError, match="student_tokenizer: " + message):
            CachedLogitsDataset(tmp_path / "c.h5", student_tokenizer=tokenizer)


@pytest.mark.parametrize("shift", [1, -1])
def test_a_cache_whose_targets_are_shifted_is_refused(tmp_path, shift: int) -> None:
    made = records((9, 4), k=3, vocab_size=8)
    rolled = {name: np.roll(getattr(made, name), shift, 0) for name in ("topk_ids", "topk_logprobs", "tail_logmass")}
    write_cache(tmp_path / "c.h5", dataclasses.replace(made, **rolled), vocab_size=8)
    with pytest.raises(CacheError, match=r"c.h5: The targets do not belong to these tokens: at \(0, \d\) the teacher"):
        CachedLogitsDataset(tmp_path / "c.h5")
