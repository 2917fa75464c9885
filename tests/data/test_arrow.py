from __future__ import annotations

import os
import shutil
import time
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from builders import HEAD_WIDTH, VOCAB_SIZE, save_tokenizer, sentences, write_json_lines
from datasets import Dataset, DatasetDict, Features, Sequence, Value, concatenate_datasets, load_dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dask_logits.config.groups import DatasetConfig, TeacherConfig
from dask_logits.data import arrow as home
from dask_logits.data import arrow_cache
from dask_logits.data.arrow import hash_rows, open_corpus, slice_files
from dask_logits.data.columns import Column
from dask_logits.data.find import find_files
from dask_logits.data.source import FileRows, read_rows, write_spool
from dask_logits.data.tokens import TokenizerSpec, inspect_tokenizer, read_documents
from dask_logits.errors import DatasetError, TeacherError
from dask_logits.run.folder import RunFolder
from dask_logits.run.plan_log import PlanLog


def ids_spec(**changes) -> TokenizerSpec:
    values = {
        "path": None,
        "revision": None,
        "trust_remote_code": False,
        "identity": None,
        "add_special_tokens": True,
        "max_length": 10,
        "vocab_size": VOCAB_SIZE,
    }
    return TokenizerSpec(**{**values, **changes})


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.data())
def test_slices_of_files_cover_a_range_exactly(sizes: list[int], data) -> None:
    rows = [(str(f), r) for f, size in enumerate(sizes) for r in range(size)]
    first = data.draw(st.integers(0, len(rows)))
    count = data.draw(st.integers(0, len(rows) - first))
    files = [FileRows(path=str(f), first=0, n_rows=size) for f, size in enumerate(sizes)]
    found = [(part.path, r) for part in slice_files(files, first, count) for r in
             range(part.first, part.first + part.n_rows)]  # fmt: skip
    assert found == rows[first : first + count]


@pytest.mark.parametrize("without", [[], [3], [0, 1, 4, 5, 7, 8, 10], [9, 2, 6, 13], range(14)])
def test_rows_are_hashed_without_some_as_if_those_had_no_value(without, monkeypatch) -> None:
    monkeypatch.setattr(home, "_HASH_ROWS", 4)
    texts = [str(row) for row in range(14)]
    expected = [None if row in without else text for row, text in enumerate(texts)]
    made = [Dataset.from_dict({"text": rows}, Features(text=Value("string"))) for rows in (texts, expected)]
    for rows in ((0, 14), (1, 12), (5, 3)):
        assert hash_rows(made[0], ["text"], *rows, without=frozenset(without)) == hash_rows(made[1], ["text"], *rows)


def test_the_number_of_rows_left_out_of_a_hash_hardly_costs_time() -> None:
    dataset = Dataset.from_dict({"text": ["x"] * 40_000})

    def seconds(without: range) -> float:
        started = time.process_time()
        hash_rows(dataset, ["text"], 0, len(dataset), without=frozenset(without))
        return time.process_time() - started

    seconds(range(1))
    assert seconds(range(0, 40_000, 4)) < 10 * seconds(range(0, 40_000, 10_000))


def test_rows_that_are_as_planned_are_hashed_once(tmp_path, monkeypatch) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "red"}\n{"text": \n{"text": "sun"}\n')
    opened = open_corpus(DatasetConfig(name="json", data_files=(str(tmp_path / "d.jsonl"),)))
    log = PlanLog(RunFolder(tmp_path / "run"))
    list(opened.plan(log, 1, lambda index: False))
    assert log.segments()[0].source["bad_rows"] == [1]
    monkeypatch.setattr(opened, "_hashed", None)
    opened.check(log)
    list(opened.plan(log, 1, lambda index: False))


def test_json_lines_are_read_from_their_arrow_files(corpus) -> None:
    opened = open_corpus(DatasetConfig(name="json", data_files=(str(corpus),)))
    assert (opened.n_rows, opened.column) == (40, Column.named("text"))
    files = opened.files
    assert files is not None
    assert sum(file.n_rows for file in files) == 40


@pytest.mark.parametrize("reader", ["text", "parquet"])
def test_other_local_readers(reader: str, tmp_path) -> None:
    texts = sentences(9)
    path = tmp_path / f"data.{reader}"
    if reader == "text":
        path.write_text("\n".join(texts))
    else:
        Dataset.from_dict({"text": texts}).to_parquet(path)
    opened = open_corpus(DatasetConfig(name=reader, data_files=(str(tmp_path / "*"),)))
    assert list(opened.head()) == texts


def test_saved_folders_and_their_splits(tmp_path) -> None:
    Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "one")
    DatasetDict({"left": Dataset.from_dict({"text": ["c"]})}).save_to_disk(tmp_path / "many")
    assert list(open_corpus(DatasetConfig(name=str(tmp_path / "one"))).head()) == ["a", "b"]
    assert list(open_corpus(DatasetConfig(name=str(tmp_path / "many"), split="left")).head()) == ["c"]
    with pytest.raises(
        DatasetError, match=r"dataset\.split: expected one of \['left'\], .*got 'lefd', did you mean 'left'"
    ):
        open_corpus(DatasetConfig(name=str(tmp_path / "many"), split="lefd"))


@pytest.mark.parametrize(
    "change",
    [
        lambda ds: ds.select([3, 1, 2]),
        lambda ds: ds.shuffle(seed=0),
        lambda ds: ds.select(range(2, 9)),
        lambda ds: Dataset.from_dict({"text": ds["text"][:]}),
        lambda ds: ds.rename_column("text", "body").rename_column("body", "text"),
        lambda ds: ds.map(lambda row: {"text": row["text"] + " red"}),
        lambda ds: concatenate_datasets([ds, ds]),
        lambda ds: concatenate_datasets([Dataset.from_dict({"text": ["sea"] * 5}), ds.select(range(35))]),
        lambda ds: ds.add_column("body", ["moon"] * 40).remove_columns("text").rename_column("body", "text"),
        lambda ds: ds.with_format("torch"),
    ],
    ids=["select", "shuffle", "slice", "in-memory", "renamed", "mapped", "concatenated", "mixed", "swapped", "torch"],
)
def test_any_dataset_object_is_read_back_row_by_row(change, llama, corpus, tmp_path) -> None:
    dataset = change(load_dataset("json", data_files=str(corpus), split="train"))
    opened = open_corpus(DatasetConfig(), dataset)
    _, spec = inspect_tokenizer(
        TeacherConfig(model_path=str(llama)),
        DatasetConfig(),
        column=opened.column,
        head_width=HEAD_WIDTH,
        max_length=2048,
    )
    files = opened.files or opened.materialise(tmp_path / "dataset")
    found = read_documents(read_rows(slice_files(files, 0, opened.n_rows), opened.column), spec).tokens
    expected = read_documents(list(dataset["text"]), spec).tokens
    assert [d.tolist() for d in found] == [d.tolist() for d in expected]


def test_ids_of_fixed_length_are_read(tmp_path) -> None:
    features = Features({"input_ids": Sequence(Value("int32"), length=3)})
    opened = open_corpus(DatasetConfig(), Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5, 6]]}, features=features))
    files = opened.materialise(tmp_path / "dataset")
    found = read_documents(read_rows(files, Column.named("input_ids")), ids_spec()).tokens
    assert [d.tolist() for d in found] == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda ds: DatasetDict({"left": ds}), r"expected one split, got a DatasetDict .* such as dataset\['left'\]"),
        (lambda ds: [3], "expected a list of texts or of dicts, got int 3"),
        (lambda ds: ds.to_pandas(), "expected a datasets.Dataset, a list or a stream of rows, got DataFrame"),
        (lambda ds: ds.with_transform(lambda rows: rows), "got a dataset with a transform"),
    ],
    ids=["dict", "list", "frame", "transform"],
)
def test_objects_that_are_no_regular_dataset_are_refused(make, message) -> None:
    with pytest.raises(DatasetError, match=message):
        open_corpus(DatasetConfig(), make(Dataset.from_dict({"text": ["red"]})))


def test_a_saved_dataset_without_splits_takes_no_other_split(tmp_path) -> None:
    Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "one")
    assert open_corpus(DatasetConfig(name=str(tmp_path / "one"), split="train[:1]")).n_rows == 1
    with pytest.raises(DatasetError, match=r"split: expected 'train', or a slice of it, .* got 'test\[:1\]'"):
        open_corpus(DatasetConfig(name=str(tmp_path / "one"), split="test[:1]"))


def test_a_slice_of_a_split_is_not_mistaken_for_its_files(corpus) -> None:
    opened = open_corpus(DatasetConfig(name="json", data_files=(str(corpus),), split="train[10:30]"))
    assert opened.n_rows == 20
    assert opened.files is None


def test_a_materialised_dataset_is_checked_when_it_is_used_again(tmp_path) -> None:
    one = open_corpus(DatasetConfig(), Dataset.from_dict({"text": ["a", "b"]}))
    other = open_corpus(DatasetConfig(), Dataset.from_dict({"text": ["a", "c"]}))
    assert one.materialise(tmp_path / "d") == one.materialise(tmp_path / "d")
    with pytest.raises(DatasetError, match="expected the rows this run was made with"):
        other.materialise(tmp_path / "d")


@pytest.mark.parametrize("name", ["*.arrow", "dataset_info.json", "state.json"])
@pytest.mark.parametrize("is_cut", [True, False])
def test_a_materialised_dataset_that_was_cut_or_lost_files_is_written_again(tmp_path, name, is_cut) -> None:
    opened = open_corpus(DatasetConfig(), Dataset.from_dict({"text": ["a", "b"]}))
    before = opened.materialise(tmp_path / "d")
    file = next((tmp_path / "d").glob(name))
    if is_cut:
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.unlink()
    again = opened.materialise(tmp_path / "d")
    assert [(rows.path, rows.n_rows) for rows in again] == [(rows.path, rows.n_rows) for rows in before]


def test_a_materialised_dataset_for_which_there_is_no_room_leaves_nothing(tmp_path, monkeypatch) -> None:
    def fill(dataset: Dataset, folder: str) -> None:
        Path(folder).mkdir()
        Path(folder, "data-00000-of-00001.arrow").write_bytes(b"cut")
        raise OSError(28, "No space left on device")

    opened = open_corpus(DatasetConfig(), Dataset.from_dict({"text": ["a", "b"]}))
    monkeypatch.setattr(Dataset, "save_to_disk", fill)
    with pytest.raises(OSError, match="No space left"):
        opened.materialise(tmp_path / "d")
    assert list(tmp_path.iterdir()) == []


def test_content_digest_is_of_the_rows_not_of_their_storage() -> None:
    texts = [*sentences(30), None]
    whole = Dataset.from_dict({"text": texts})
    cut = concatenate_datasets([Dataset.from_dict({"text": texts[:11]}), Dataset.from_dict({"text": texts[11:]})])
    digest = open_corpus(DatasetConfig(), whole).content_digest
    assert open_corpus(DatasetConfig(), cut).content_digest == digest
    assert open_corpus(DatasetConfig(), whole.add_column("n", list(range(31)))).content_digest == digest
    assert open_corpus(DatasetConfig(max_samples=30), whole).content_digest != digest
    here = Dataset.from_dict({"text": ["".join(texts[:2]), "", *texts[2:]]})
    assert open_corpus(DatasetConfig(), here).content_digest != digest


def test_content_digest_of_ids() -> None:
    one = open_corpus(DatasetConfig(), Dataset.from_dict({"input_ids": [[1, 2], [3]]}))
    same = open_corpus(
        DatasetConfig(text_column="input_ids"), Dataset.from_dict({"input_ids": [[1, 2], [3]], "text": ["x", "y"]})
    )
    moved = open_corpus(DatasetConfig(), Dataset.from_dict({"input_ids": [[1], [2, 3]]}))
    assert one.content_digest == same.content_digest != moved.content_digest


def test_ids_are_taken_as_they_are_and_cut() -> None:
    found = read_documents([[1, 2, 3], [], None, list(range(20))], ids_spec()).tokens
    assert [len(d) for d in found] == [3, 0, 0, 10]
    assert found[0].dtype == np.int32


def test_text_becomes_ids_and_empty_stays_empty(llama) -> None:
    _, spec = inspect_tokenizer(
        TeacherConfig(model_path=str(llama)),
        DatasetConfig(),
        column=Column.named("text"),
        head_width=HEAD_WIDTH,
        max_length=2,
    )
    found = read_documents(["red green blue", "", None, "red"], spec).tokens
    assert [d.tolist() for d in found] == [[1, 2], [], [], [1]]


@pytest.mark.parametrize(
    ("rows", "spec", "message"),
    [
        (["a", 5], {"path": "t"}, r"dataset row 101: expected a text, got int 5"),
        ([[1], "x"], {}, r"dataset row 101: expected a list of token ids, got str 'x'"),
        ([[1], [2, 104]], {}, r"dataset row 101: expected token ids in \[0, 104\), got 104"),
        ([[1], [2, None]], {}, r"dataset row 101: expected a flat list of token ids"),
        ([[1], [-3]], {}, r"dataset row 101: expected token ids in \[0, 104\), got -3"),
    ],
)
def test_rows_that_cannot_be_used_are_named(rows, spec, message) -> None:
    with pytest.raises(DatasetError, match=message) as caught:
        read_documents(rows, ids_spec(**spec), first_row=100)
    assert caught.value.row == 101


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "no-such-dataset-anywhere"}, r"dataset\.name: expected a dataset, got 'no-such-dataset-anywhere'"),
        (
            {"name": "json", "data_files": ("/no/such.jsonl",)},
            r"dataset\.data_files: expected .* got '/no/such\.jsonl'",
        ),
        ({"name": "json", "split": "validatoin"}, r"dataset\.split: expected one of \['train'\], or slices"),
        ({"name": "json", "text_column": "txt"}, r"dataset\.text_column: expected one of .*'txt', did you mean 'text'"),
    ],
)
def test_a_missing_dataset_split_or_column_is_refused(config, message, corpus) -> None:
    with pytest.raises(DatasetError, match=message):
        open_corpus(DatasetConfig(**{"data_files": (str(corpus),), **config}))


def test_an_empty_dataset_is_refused(tmp_path) -> None:
    empty = Dataset.from_dict({"text": []})
    with pytest.raises(DatasetError, match="expected at least one row, got an empty dataset"):
        open_corpus(DatasetConfig(), empty)


def test_max_samples_takes_the_first_rows() -> None:
    dataset = Dataset.from_dict({"text": ["a", "b", "c"]})
    assert list(open_corpus(DatasetConfig(max_samples=2), dataset).head()) == ["a", "b"]
    assert open_corpus(DatasetConfig(max_samples=9), dataset).n_rows == 3
    assert open_corpus(DatasetConfig(max_samples="all"), dataset).n_rows == 3


class TestTokenizerMatch:
    corpus = Dataset.from_dict({"text": ["red"]})

    def settle(self, path, head_width=HEAD_WIDTH, dataset=None, **config):
        opened = open_corpus(DatasetConfig(), dataset or self.corpus)
        return inspect_tokenizer(
            TeacherConfig(model_path=str(path)),
            DatasetConfig(**config),
            column=opened.column,
            head_width=head_width,
            max_length=2048,
        )

    def test_a_padded_head_is_fine(self, llama) -> None:
        tokenizer, spec = self.settle(llama)
        assert (tokenizer.vocab_size, spec.vocab_size) == (VOCAB_SIZE, VOCAB_SIZE)

    @pytest.mark.parametrize("head_width", [VOCAB_SIZE - 1, 2 * VOCAB_SIZE])
    def test_another_models_tokenizer_is_refused(self, llama, head_width) -> None:
        with pytest.raises(TeacherError, match=rf"for the teacher's {head_width} logits, got .* with {VOCAB_SIZE} ids"):
            self.settle(llama, head_width)

    def test_added_tokens_beyond_the_head_are_not_valid(self, tmp_path, caplog) -> None:
        # As Gemma 3 1B has one for images, and many fine-tuned models one for padding.
        save_tokenizer(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        loaded.add_special_tokens({"pad_token": "<pad>"})
        loaded.save_pretrained(tmp_path)
        tokenizer, spec = self.settle(tmp_path, head_width=VOCAB_SIZE)
        assert (tokenizer.vocab_size, spec.vocab_size) == (VOCAB_SIZE + 1, VOCAB_SIZE)
        assert f"{VOCAB_SIZE + 1} ids for {VOCAB_SIZE} logits; a row with one of them is a bad row" in caplog.text
        with pytest.raises(DatasetError, match=rf"row 1: expected token ids in \[0, {VOCAB_SIZE}\), got {VOCAB_SIZE}"):
            read_documents(["red", "red <pad>"], spec)
        with pytest.raises(TeacherError, match=rf"for the teacher's {VOCAB_SIZE - 1} logits"):
            self.settle(tmp_path, head_width=VOCAB_SIZE - 1)

    def test_unless_the_valid_ids_are_said(self, llama) -> None:
        assert self.settle(llama, 2 * VOCAB_SIZE, vocab_size=150)[1].vocab_size == 150
        with pytest.raises(TeacherError, match="expected at most the teacher's logit width 112, got 113"):
            self.settle(llama, vocab_size=113)

    def test_text_without_a_tokenizer_is_refused(self, tmp_path) -> None:
        with pytest.raises(TeacherError, match=r"teacher\.tokenizer_path: expected a tokenizer"):
            self.settle(tmp_path)

    def test_ids_need_none(self, tmp_path) -> None:
        tokenizer, spec = self.settle(tmp_path, dataset=Dataset.from_dict({"input_ids": [[1]]}))
        assert tokenizer is None
        assert (spec.path, spec.vocab_size) == (None, HEAD_WIDTH)

    def test_its_identity_is_its_map_and_rules(self, llama, tmp_path) -> None:
        save_tokenizer(tmp_path)
        first, spec = self.settle(llama)
        read_documents(["red " * 50], spec)
        assert self.settle(llama)[0] == first == self.settle(tmp_path)[0]
        save_tokenizer(tmp_path / "other", VOCAB_SIZE - 1)
        assert self.settle(tmp_path / "other")[0].map_digest != first.map_digest


def test_another_tokenizer_at_the_same_path_is_refused(llama) -> None:
    with pytest.raises(TeacherError, match="expected the tokenizer abc… that the driver saw"):
        read_documents(["red"], ids_spec(path=str(llama), identity="abc"))


def test_a_file_that_was_written_anew_is_read_anew(tmp_path) -> None:
    for texts in (["red", "green"], ["blue", "cat"]):
        opened = open_corpus(DatasetConfig(), Dataset.from_dict({"input_ids": [[len(text)] for text in texts]}))
        files = opened.materialise(tmp_path / "dataset")
        found = read_documents(read_rows(files, Column.named("input_ids")), ids_spec()).tokens
        assert [d.tolist() for d in found] == [[len(text)] for text in texts]
        shutil.rmtree(tmp_path / "dataset")


def test_rows_written_as_json_with_null_text(tmp_path) -> None:
    path = write_json_lines(tmp_path / "x.jsonl", ["red", None, "blue"])
    opened = open_corpus(DatasetConfig(name="json", data_files=(str(path),)))
    assert list(opened.head()) == ["red", None, "blue"]


def test_processes_of_one_number_on_two_machines_convert_the_same_files_at_once(tmp_path, monkeypatch) -> None:
    corpus = write_json_lines(tmp_path / "corpus.jsonl", ["red"] * 3_000)
    config = DatasetConfig(name="json", data_files=(str(corpus),))
    found, tables, others = find_files(config), arrow_cache._tables, []

    def convert() -> Path:
        return arrow_cache.arrow_file(tmp_path / "cache", found, found.files["train"], config)

    def interrupted(*given, **settings):
        is_first = not others
        for table in tables(*given, **settings):
            yield table
            if is_first:
                is_first = False
                others.append(None)
                others.append(convert())

    monkeypatch.setattr(arrow_cache, "_tables", interrupted)
    converted = convert()
    assert others == [None, converted]
    assert pa.ipc.open_stream(converted.read_bytes()).read_all().num_rows == 3_000
    assert list(converted.parent.iterdir()) == [converted]


def test_a_spool_file_for_which_there_is_no_room_leaves_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=0))
    (tmp_path / ".0.arrow.00000000").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_spool(tmp_path / "0.arrow", pa.table({"text": ["red" * 10_000]}))
    assert list(tmp_path.iterdir()) == []
