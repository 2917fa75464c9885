from __future__ import annotations

import pytest
from builders import sentences, write_json_lines
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer

from dask_logits import DatasetError, prepare_dataset
from dask_logits.config.groups import DatasetConfig
from dask_logits.data.find import find_files
from dask_logits.data.tokens import TokenizerSpec, read_documents

TEXTS = sentences(30, seed=4)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("max_samples", "count"), [(None, 30), ("all", 30), (7, 7), (99, 30)])
def test_rows_become_the_ids_that_the_job_would_score(streaming, max_samples, count, llama, tmp_path) -> None:
    path = write_json_lines(tmp_path / "d.jsonl", TEXTS)
    found = prepare_dataset(
        "json",
        AutoTokenizer.from_pretrained(llama),
        data_files=[str(path)],
        max_length=8,
        max_samples=max_samples,
        streaming=streaming,
    )
    assert isinstance(found, IterableDataset if streaming else Dataset)
    rows = list(found)
    assert [list(row) for row in rows] == [["input_ids"]] * count
    spec = TokenizerSpec(path=None, revision=None, trust_remote_code=False, identity=None, add_special_tokens=True,
                         max_length=8, vocab_size=104)  # fmt: skip
    own = AutoTokenizer.from_pretrained(llama)
    expected = [own(text, truncation=True, max_length=8)["input_ids"] for text in TEXTS[:count]]
    assert [row["input_ids"] for row in rows] == expected
    documents = read_documents([row["input_ids"] for row in rows], spec)
    assert [document.tolist() for document in documents.tokens] == expected


def test_several_processes_give_the_same(llama, tmp_path) -> None:
    Dataset.from_dict({"body": TEXTS, "n": range(30)}).save_to_disk(tmp_path / "d")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    one, two = (
        prepare_dataset(str(tmp_path / "d"), tokenizer, text_column="body", max_length=None, num_proc=processes)
        for processes in (None, 2)
    )
    assert one["input_ids"][:] == two["input_ids"][:]
    assert max(map(len, one["input_ids"])) == 30


def test_without_a_tokenizer_rows_stay_as_they_are(tmp_path) -> None:
    path = write_json_lines(tmp_path / "d.jsonl", TEXTS)
    assert prepare_dataset("json", data_files=[str(path)])["text"][:] == TEXTS


def test_ready_ids_are_taken_as_they_are(llama, tmp_path) -> None:
    Dataset.from_dict({"input_ids": [[1, 2], [3]], "text": ["a", "b"]}).save_to_disk(tmp_path / "d")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    found = prepare_dataset(str(tmp_path / "d"), tokenizer, text_column="input_ids")
    assert list(found) == [{"input_ids": [1, 2]}, {"input_ids": [3]}]
    with pytest.raises(DatasetError, match="both a column 'text' and a column 'input_ids'"):
        prepare_dataset(str(tmp_path / "d"), tokenizer)


def test_files_are_a_path_or_a_list_of_one_split(tmp_path) -> None:
    path = str(write_json_lines(tmp_path / "d.jsonl", TEXTS))
    assert (
        prepare_dataset("json", data_files=path)["text"] == prepare_dataset("json", data_files=[path])["text"] == TEXTS
    )
    with pytest.raises(
        DatasetError, match=r"data_files: expected a path or a list of paths, got a dict with \['train'\]"
    ):
        prepare_dataset("json", data_files={"train": path})


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_column": "txt"}, "expected one of the columns .*, got 'txt', did you mean 'text'"),
        ({"data_files": ["/no/such.jsonl"]}, r"data_files: expected .* got '/no/such\.jsonl', which matches no file"),
        ({"split": "tset"}, "expected .*split|split: expected one of .*'train'"),
    ],
)
def test_what_is_missing_is_named(streaming, changes, message, llama, tmp_path) -> None:
    path = write_json_lines(tmp_path / "d.jsonl", TEXTS)
    with pytest.raises(DatasetError, match=message):
        prepare_dataset(
            "json",
            AutoTokenizer.from_pretrained(llama),
            **{"data_files": [str(path)], "streaming": streaming, **changes},
        )


@pytest.mark.parametrize("streaming", [True, False])
def test_paths_may_begin_with_the_home_folder(streaming, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "folder").mkdir()
    write_json_lines(tmp_path / "folder" / "d.jsonl", TEXTS)
    limit = {"streaming": streaming, "max_samples": "all"}
    one = prepare_dataset("json", data_files=["~/folder/d.jsonl"], **limit)
    other = prepare_dataset("~/folder", **limit)
    assert [row["text"] for row in one] == [row["text"] for row in other] == TEXTS
    assert find_files(DatasetConfig(name="~/folder")).files["train"] == [str(tmp_path / "folder" / "d.jsonl")]
