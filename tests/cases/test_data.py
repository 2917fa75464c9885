"""Data that people have: never silently the wrong tokens, and read where that is possible."""

from __future__ import annotations

import functools
import gzip
import http.server
import inspect
import json
import struct
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from text_inputs import (
    byte_level_tokenizer,
    corpus,
    documents,
    ids_spec,
    unigram_tokenizer,
    worker_rows,
    write_lines,
    zstd_frames,
)
from transformers.tokenization_mistral_common import MistralCommonBackend

from dask_logits import DatasetError, prepare_dataset
from dask_logits.config.groups import DatasetConfig, TeacherConfig
from dask_logits.data import tokens
from dask_logits.data.arrow import open_corpus
from dask_logits.data.columns import Column
from dask_logits.data.open import open_stream
from dask_logits.data.tokens import encode, inspect_tokenizer, read_documents
from dask_logits.data.values import BadRow, row_value

TEXTS = documents(12, 80)
PADDED = {
    "right": [
        {"input_ids": [5, 7, 9, 0, 0], "attention_mask": [1, 1, 1, 0, 0]},
        {"input_ids": [4], "attention_mask": [1]},
    ],
    "left": [
        {"input_ids": [0, 0, 5, 7, 9], "attention_mask": [0, 0, 1, 1, 1]},
        {"input_ids": [4], "attention_mask": [1]},
    ],
}


def streamed(name: str, *files, **settings) -> list:
    """Return the values of a stream as the driver sees them."""
    listed = tuple(str(file) for file in files) or None
    config = DatasetConfig(name=str(name), data_files=listed, streaming=True, max_samples="all", **settings)
    return list(open_stream(config).head())


# --- token ids ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out_however_rows_come(side: str, tmp_path: Path) -> None:
    rows = PADDED[side]
    path = write_lines(tmp_path / "d.jsonl", rows)
    Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    expected = [[5, 7, 9], [4]]
    assert worker_rows(corpus("json", path), tmp_path) == expected
    assert worker_rows(corpus("parquet", tmp_path / "d.parquet"), tmp_path) == expected
    assert worker_rows(corpus(tmp_path / "saved"), tmp_path) == expected
    assert worker_rows(open_corpus(DatasetConfig(), Dataset.from_list(rows)), tmp_path / "object") == expected
    assert worker_rows(open_corpus(DatasetConfig(), rows), tmp_path / "list") == expected
    assert streamed("json", path) == streamed("parquet", tmp_path / "d.parquet") == expected
    assert streamed(tmp_path / "saved") == expected
    assert list(open_stream(DatasetConfig(max_samples="all"), iter(rows)).head()) == expected


def test_padding_changes_the_identity_of_a_dataset() -> None:
    one, other = (
        open_corpus(DatasetConfig(), Dataset.from_list([{"input_ids": [5, 7, 9], "attention_mask": mask}]))
        for mask in ([1, 1, 1], [1, 1, 0])
    )
    assert one.content_digest != other.content_digest


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([1, 0, 1], "dataset row 1: expected an attention_mask that leaves out padding at the beginning and the end"),
        ([1, 1], "dataset row 1: expected 3 entries in 'attention_mask'"),
        ([1, 2, 1], "dataset row 1: expected an attention_mask of 0 and 1, got 2"),
    ],
)
def test_a_mask_with_holes_or_of_another_length_is_refused_naming_the_row(mask, message, tmp_path: Path) -> None:
    rows = [{"input_ids": [1], "attention_mask": [1]}, {"input_ids": [1, 2, 3], "attention_mask": mask}]
    Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    path = write_lines(tmp_path / "d.jsonl", rows)
    for found in (
        worker_rows(open_corpus(DatasetConfig(), Dataset.from_list(rows)), tmp_path),
        streamed("parquet", tmp_path / "d.parquet"),
    ):
        with pytest.raises(DatasetError, match=message):
            read_documents(found, ids_spec())
    with pytest.raises(DatasetError, match=r"dataset row 1: .*d\.jsonl, line 2: expected .*attention_mask"):
        read_documents(worker_rows(corpus("json", path), tmp_path), ids_spec())


def test_a_text_beside_ids_is_used_only_where_it_is_chosen(tmp_path: Path) -> None:
    rows = [{"text": text, "input_ids": [i, 2]} for i, text in enumerate(TEXTS)]
    path = write_lines(tmp_path / "d.jsonl", rows)
    Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    for open_it in (
        lambda **more: corpus("json", path, **more),
        lambda **more: corpus("parquet", tmp_path / "d.parquet", **more),
        lambda **more: open_corpus(DatasetConfig(**more), Dataset.from_list(rows)),
        lambda **more: open_stream(DatasetConfig(max_samples="all", **more), iter(rows)),
        lambda **more: open_stream(
            DatasetConfig(name="parquet", data_files=(str(tmp_path / "d.parquet"),), max_samples="all", **more)
        ),
    ):
        with pytest.raises(DatasetError, match=r"both a column 'text' and a column 'input_ids'.*text_column=text"):
            open_it()
        assert list(open_it(text_column="text").head()) == TEXTS
        assert list(open_it(text_column="input_ids").head()) == [[i, 2] for i in range(len(TEXTS))]


def test_ids_that_appear_only_further_down_beside_a_text_are_refused(tmp_path: Path) -> None:
    rows = [{"text": "red"}] * 200 + [{"text": "red", "input_ids": [3]}]
    path = write_lines(tmp_path / "d.jsonl", rows)
    with pytest.raises(DatasetError, match="both a column 'text' and a column 'input_ids'"):
        corpus("json", path)
    with pytest.raises(DatasetError, match="both a column 'text' and a column 'input_ids'"):
        streamed("json", path)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2]], r"expected a flat list of token ids, got a list at position 0.*is this a batch"),
        ([1.0, 330.5], r"expected a flat list of token ids, which are integers, got float 1.0 at position 0"),
        ([1, None], r"got null at position 1"),
        ("1 2", r"expected a list of token ids, got str '1 2'"),
        ([True], r"got bool True at position 0"),
    ],
)
def test_ids_of_another_shape_or_type_are_refused_naming_the_row(ids, message, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"input_ids": [3]}, {"input_ids": ids}])
    with pytest.raises(DatasetError, match=rf"dataset row 1: .*line 2: .*{message}"):
        read_documents(worker_rows(corpus("json", path), tmp_path), ids_spec())
    with pytest.raises(DatasetError, match=rf"dataset row 1: .*{message}"):
        read_documents(streamed("json", path), ids_spec())


@pytest.mark.parametrize(
    ("ids", "message"), [([[1, 2]], r"got lists of list.*row 0: .*flat list"), ([1.5], r"got lists of double.*row 0")]
)
def test_a_typed_column_of_another_shape_is_refused_at_once(ids, message) -> None:
    with pytest.raises(DatasetError, match=rf"expected lists of integers in the column 'input_ids', {message}"):
        open_corpus(DatasetConfig(), Dataset.from_dict({"input_ids": [ids]}))


# --- text -----------------------------------------------------------------------------------------------------------


def test_a_second_bos_is_counted(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(bos="<|end|>")
    tokenizer.save_pretrained(tmp_path / "t")
    settled = {"column": Column.named("text"), "head_width": len(tokenizer), "max_length": 64}
    teacher = TeacherConfig(model_path=str(tmp_path / "t"))
    _, spec = inspect_tokenizer(teacher, DatasetConfig(), **settled)
    rows = ["<|end|>user hello", "plain", None, "<|end|>"]
    assert read_documents(rows, spec).n_double_bos == 2
    _, spec = inspect_tokenizer(teacher, DatasetConfig(add_special_tokens=False), **settled)
    assert read_documents(rows, spec).n_double_bos == 0


def test_texts_that_look_like_missing_values_stay_texts(tmp_path: Path) -> None:
    texts = ["NA", "null", "nan", "None", "", "1.50", "true", 'said "so"', "two\nlines", "a,b"]
    rows = "text,n\n" + "".join('"' + text.replace('"', '""') + f'",{i}\n' for i, text in enumerate(texts))
    (tmp_path / "d.csv").write_text(rows)
    (tmp_path / "plain.csv").write_text("n,text\n1,NA\n2,1.50\n")
    assert worker_rows(corpus("csv", tmp_path / "d.csv"), tmp_path) == texts
    assert streamed("csv", tmp_path / "d.csv") == texts
    assert worker_rows(corpus("csv", tmp_path / "plain.csv"), tmp_path) == ["NA", "1.50"]
    assert prepare_dataset("csv", data_files=[str(tmp_path / "plain.csv")])["text"][:] == ["NA", "1.50"]


@pytest.mark.parametrize("name", ["tsv", "csv"])
def test_tab_separated_files_are_read(name: str, tmp_path: Path) -> None:
    texts = [text.replace("\n", " ").replace('"', "") for text in TEXTS]
    (tmp_path / "t.tsv").write_text("text\tn\n" + "".join(f"{text}\t{i}\n" for i, text in enumerate(texts)))
    assert worker_rows(corpus(name, tmp_path / "t.tsv"), tmp_path) == streamed(name, tmp_path / "t.tsv") == texts


def test_a_csv_document_may_be_longer_than_a_field_usually_is(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("text\n" + "x" * 300_000 + "\n")
    assert [len(text) for text in worker_rows(corpus("csv", tmp_path / "d.csv"), tmp_path)] == [300_000]


def test_csv_rows_with_other_fields_are_bad_rows(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text('text,n\nred,1\ngreen\nblue,2,3\n"cat" dog,4\nsun,5\n')
    found = worker_rows(corpus("csv", tmp_path / "d.csv"), tmp_path)
    assert [found[0], found[-1]] == ["red", "sun"]
    assert [row.reason.split(": ")[0][-6:] for row in found[1:-1]] == ["line 3", "line 4", "line 5"]


def test_a_bad_csv_row_of_several_lines_is_named_by_its_first(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text('text,n\nred,1\n"green\nblue" cat,2\n"dog\nsun"\n"sea\nsky",3\n')
    found = worker_rows(corpus("csv", tmp_path / "d.csv"), tmp_path)
    assert [found[0], found[-1]] == ["red", "sea\nsky"]
    assert [row.reason.split(": ")[0][-6:] for row in found[1:-1]] == ["line 3", "line 5"]


@pytest.mark.parametrize("on_bad_row", ["fail", "skip"])
def test_a_csv_quote_that_is_never_closed_loses_no_rows_silently(on_bad_row: str, tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text('n,text\n1,red cat\n2,"dog sun\n' + "3,tree sea\n" * 9)
    with pytest.raises(DatasetError, match=r"d\.csv: the quote that opens at line 3 is never closed; fix the file"):
        corpus("csv", tmp_path / "d.csv", on_bad_row=on_bad_row)
    # A stream breaks off here.
    assert streamed("csv", tmp_path / "d.csv", on_bad_row=on_bad_row) == ["red cat"]


def test_only_the_used_column_is_read_and_typed(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": text, "url": "u"} for text in TEXTS[:4]])
    write_lines(tmp_path / "b.jsonl", [{"text": text, "a": {"q": 1.5}, "d": None} for text in TEXTS[4:8]])
    write_lines(tmp_path / "c.jsonl", [{"text": text, "url": 7} for text in TEXTS[8:]])
    assert worker_rows(corpus("json", tmp_path / "*.jsonl"), tmp_path) == TEXTS
    assert worker_rows(corpus(tmp_path), tmp_path) == streamed(tmp_path) == TEXTS
    for i, kind in enumerate((pa.string(), pa.int64())):
        table = pa.table({"text": TEXTS[i * 6 : i * 6 + 6], "other": pa.array([None] * 6, kind)})
        pq.write_table(table, tmp_path / f"{i}.parquet")
    assert worker_rows(corpus("parquet", tmp_path / "*.parquet"), tmp_path) == TEXTS
    assert streamed("parquet", tmp_path / "*.parquet") == TEXTS


def test_first_rows_without_a_text_do_not_settle_its_type(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": None, "k": 1}] * 20)
    write_lines(tmp_path / "b.jsonl", [{"text": text, "k": None} for text in TEXTS])
    expected = [None] * 20 + TEXTS
    assert worker_rows(corpus("json", tmp_path / "*.jsonl"), tmp_path) == expected
    assert streamed("json", tmp_path / "*.jsonl") == expected


def test_a_json_array_is_read_like_json_lines(tmp_path: Path) -> None:
    rows = [{"text": text} for text in TEXTS]
    (tmp_path / "d.json").write_text(json.dumps(rows, indent=2))
    assert worker_rows(corpus("json", tmp_path / "d.json"), tmp_path) == streamed("json", tmp_path / "d.json") == TEXTS


def compressed(folder: Path, kind: str) -> Path:
    lines = [(json.dumps({"text": text}) + "\n").encode() for text in TEXTS]
    first, second = b"".join(lines[:5]), b"".join(lines[5:])
    if kind == "zst":
        return zstd_frames(folder / "d.jsonl.zst", first, second)
    if kind == "pzst":
        # pzstd writes a skippable frame before each part, with its size.
        parts = [zstd_frames(folder / "part", part).read_bytes() for part in (first, second)]
        path = folder / "d.jsonl.zst"
        path.write_bytes(b"".join(struct.pack("<III", 0x184D2A50, 4, len(part)) + part for part in parts))
        return path
    path = folder / "d.jsonl.gz"
    path.write_bytes(gzip.compress(first) + gzip.compress(second))
    return path


@pytest.mark.parametrize("kind", ["zst", "pzst", "gz"])
def test_compressed_files_are_read_to_their_end_or_refused(kind: str, tmp_path: Path) -> None:
    path = compressed(tmp_path, kind)
    assert worker_rows(corpus("json", path), tmp_path) == streamed("json", path) == TEXTS
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DatasetError, match=r"expected to read the file to its end.*restore the file"):
        corpus("json", path)


def bad_utf8() -> list[bytes]:
    rows = [json.dumps({"text": text}).encode() for text in TEXTS]
    rows[4] = rows[4][:30] + b"\xff\xfe" + rows[4][30:]
    return rows


def lone_surrogate() -> list[bytes]:
    rows = [json.dumps({"text": text}).encode() for text in TEXTS]
    rows[4] = b'{"text": "half a pair \\ud83d here"}'
    return rows


def cut_line() -> list[bytes]:
    rows = [json.dumps({"text": text}).encode() for text in TEXTS]
    rows[4] = rows[4][:20]
    return rows


@pytest.mark.parametrize("make", [bad_utf8, lone_surrogate, cut_line])
def test_a_damaged_line_is_one_bad_row_named_by_file_and_line(make, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\n".join(make()) + b"\n")
    for found in (worker_rows(corpus("json", path), tmp_path), streamed("json", path)):
        assert [row for row in found if not isinstance(row, BadRow)] == TEXTS[:4] + TEXTS[5:]
        assert isinstance(found[4], BadRow)
        assert f"{path}, line 5: expected" in found[4].reason


def test_a_text_of_parquet_that_is_no_utf8_is_one_bad_row(tmp_path: Path) -> None:
    texts = [text.encode() for text in TEXTS]
    texts[4] = b"\xff\xfe"
    column = pa.array(texts, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "d.parquet")
    for found in (
        worker_rows(corpus("parquet", tmp_path / "d.parquet"), tmp_path),
        streamed("parquet", tmp_path / "d.parquet"),
    ):
        assert [row for row in found if not isinstance(row, BadRow)] == TEXTS[:4] + TEXTS[5:]
        assert isinstance(found[4], BadRow)


def test_a_damaged_text_inside_of_a_struct_or_a_list_is_one_bad_row(tmp_path: Path) -> None:
    raw = pa.array([b"red", b"\xff\xfe", b"sun"], pa.binary()).view(pa.string())
    structs = pa.StructArray.from_arrays([raw], ["text"])
    roles = pa.array(["user"] * 3)
    messages = pa.ListArray.from_arrays([0, 1, 2, 3], pa.StructArray.from_arrays([roles, raw], ["role", "content"]))
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"doc": structs, "messages": messages}), path)
    chat = '{"messages": [{"role": "user", "content": "%s"}]}'
    for chosen, expected in (
        ({"text_column": "doc.text"}, ["red", "sun"]),
        ({"messages_column": "messages"}, [chat % "red", chat % "sun"]),
    ):
        for found in (
            worker_rows(corpus("parquet", path, **chosen), tmp_path),
            streamed("parquet", path, **chosen),
            streamed("parquet", path, split="train[:3]", **chosen),
        ):
            assert [found[0], found[2]] == expected
            assert "got bytes that are not valid UTF-8" in found[1].reason


def test_bad_rows_fail_or_are_documents_without_tokens() -> None:
    rows = [[1], BadRow(reason="damaged"), [200], [2]]
    with pytest.raises(DatasetError, match=r"dataset row 11: damaged; fix the row, or set .*on_bad_row=skip"):
        read_documents(rows, ids_spec(), first_row=10)
    found = read_documents(rows, ids_spec(on_bad_row="skip"), first_row=10)
    assert [tokens.tolist() for tokens in found.tokens] == [[1], [], [], [2]]
    assert list(found.skipped) == [11, 12]


def test_a_text_inside_a_struct_is_named_by_its_path(tmp_path: Path) -> None:
    rows = [{"doc": {"text": text, "n": 1}} for text in TEXTS]
    path = write_lines(tmp_path / "d.jsonl", rows)
    Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for name, *files in (["json", path], ["parquet", tmp_path / "d.parquet"], [tmp_path / "saved"]):
        assert worker_rows(corpus(name, *files, text_column="doc.text"), tmp_path / str(name)) == TEXTS
        assert streamed(name, *files, text_column="doc.text") == TEXTS
    with pytest.raises(DatasetError, match=r"expected texts in the column 'doc'.*such as"):
        corpus(tmp_path / "saved", text_column="doc")
    with pytest.raises(DatasetError, match=r"dataset row 0: .*expected a column 'doc\.body', got \['n', 'text'\]"):
        read_documents(streamed("json", path, text_column="doc.body"), ids_spec(path="unused"))


def test_chats_are_refused_with_what_to_do(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "Explain."}]}]
    path = write_lines(tmp_path / "d.jsonl", rows)
    for chosen in ({}, {"text_column": "messages"}):
        with pytest.raises(DatasetError, match=r"set distillation\.dataset\.messages_column="):
            read_documents(streamed("json", path, **chosen), ids_spec(path="unused"))
        with pytest.raises(DatasetError, match=r"set distillation\.dataset\.messages_column="):
            open_corpus(DatasetConfig(**chosen), Dataset.from_list(rows))


@pytest.mark.parametrize("make", [byte_level_tokenizer, unigram_tokenizer], ids=["byte-level BPE", "Unigram"])
def test_a_prefix_of_a_long_text_gives_the_tokens_of_the_whole(make, monkeypatch) -> None:
    tokenizer = make()
    text = "\n\n".join(documents(60))[:40_000]
    texts = [text, "x" * 20_000, text.replace(" ", ""), " " * 20_000 + text, "\u00e9\u0301 \u4e2d" * 8_000, "short", ""]
    texts += [text[start:] for start in (1, 398, 795)]
    # The bounds are made small, so that little text is long.
    monkeypatch.setattr(tokens, "_LEAST_CHARACTERS", 64)
    whole = tokenizer(texts, verbose=False)["input_ids"]
    for length in (1, 10, 64, 300):
        assert encode(tokenizer, texts, True, length) == [ids[:length] for ids in whole]


def test_a_token_at_the_end_of_texts_is_not_put_at_the_cut(monkeypatch) -> None:
    from tokenizers import processors

    tokenizer = byte_level_tokenizer()
    ends = ("<|end|>", tokenizer.convert_tokens_to_ids("<|end|>"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("$A <|end|>", special_tokens=[ends])
    text = "\n\n".join(documents(60))
    whole = tokenizer(text, verbose=False)["input_ids"]
    assert whole[-1] == ends[1]
    monkeypatch.setattr(tokens, "_LEAST_CHARACTERS", 64)
    for length in (1, 6, len(whole) - 1, len(whole), len(whole) + 5):
        assert encode(tokenizer, [text], True, length) == [whole[:length]]
    assert encode(tokenizer, ["short"], True, 64) == tokenizer(["short"])["input_ids"]


def test_of_a_long_text_little_is_tokenized() -> None:
    tokenizer = byte_level_tokenizer()
    seen = []

    def counting(texts, **settings):
        seen.extend(map(len, texts))
        return tokenizer(texts, **settings)

    counting.num_special_tokens_to_add = tokenizer.num_special_tokens_to_add
    encode(counting, ["x" * 2_000_000, "\n\n".join(documents(100)) * 10], True, 64)
    assert sum(seen) < 100_000


def test_a_tokenizer_is_called_with_nothing_that_mistrals_own_refuses() -> None:
    # transformers chooses it for a folder with tekken.json where mistral-common is installed.
    known = inspect.signature(MistralCommonBackend.__call__).parameters
    tokenizer = byte_level_tokenizer()

    def refusing(texts, **settings):
        assert set(settings) <= set(known)
        return tokenizer(texts, **settings)

    refusing.num_special_tokens_to_add = tokenizer.num_special_tokens_to_add
    for length in (None, 4):
        assert encode(refusing, TEXTS[:2], True, length) == [
            tokenizer(text)["input_ids"][:length] for text in TEXTS[:2]
        ]


# --- splits, names and objects --------------------------------------------------------------------------------------

SPLITS = [
    ("training[:5]", TEXTS[:5]),
    ("training+validation", TEXTS[:8] + TEXTS[8:]),
    ("validation[1:3]+training[:2]", TEXTS[9:11] + TEXTS[:2]),
]


@pytest.fixture
def split_data(tmp_path: Path) -> dict[str, list]:
    parts = {"training": TEXTS[:8], "validation": TEXTS[8:]}
    DatasetDict({name: Dataset.from_dict({"text": texts}) for name, texts in parts.items()}).save_to_disk(
        tmp_path / "dd"
    )
    (tmp_path / "files").mkdir()
    (tmp_path / "parquet").mkdir()
    for name, texts in parts.items():
        hub_name = {"training": "train", "validation": "validation"}[name]
        write_lines(tmp_path / "files" / f"{hub_name}.jsonl", [{"text": text} for text in texts])
        Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "parquet" / f"{hub_name}.parquet")
    return {"dd": tmp_path / "dd", "files": tmp_path / "files", "parquet": tmp_path / "parquet"}


@pytest.mark.parametrize(("split", "expected"), SPLITS)
@pytest.mark.parametrize("kind", ["dd", "files", "parquet"])
def test_slices_and_sums_of_splits_work_alike(
    kind: str, split: str, expected: list, split_data, tmp_path: Path
) -> None:
    split = split if kind == "dd" else split.replace("training", "train")
    assert worker_rows(corpus(split_data[kind], split=split), tmp_path) == expected
    assert streamed(split_data[kind], split=split) == expected


@pytest.mark.parametrize("kind", ["dd", "files", "parquet"])
def test_percentages_need_a_known_length(kind: str, split_data, tmp_path: Path) -> None:
    name = "training" if kind == "dd" else "train"
    assert worker_rows(corpus(split_data[kind], split=f"{name}[:25%]"), tmp_path) == TEXTS[:2]
    assert worker_rows(corpus(split_data[kind], split=f"{name}[-2:]"), tmp_path) == TEXTS[6:8]
    if kind != "dd":
        with pytest.raises(DatasetError, match=r"expected slices by row numbers .* for a stream"):
            streamed(split_data[kind], split=f"{name}[:25%]")
    with pytest.raises(DatasetError, match=rf"expected one of .*'{name}'.*did you mean '{name}'"):
        corpus(split_data[kind], split=f"{name}x[:3]")


def test_lists_of_texts_and_of_dicts_are_datasets(tmp_path: Path) -> None:
    assert worker_rows(open_corpus(DatasetConfig(), TEXTS), tmp_path / "a") == TEXTS
    rows = [{"text": text, "other": i if i % 2 else str(i)} for i, text in enumerate(TEXTS)]
    assert worker_rows(open_corpus(DatasetConfig(), rows), tmp_path / "b") == TEXTS
    found = worker_rows(open_corpus(DatasetConfig(), [{"text": "red"}, {"text": 5}, {"body": "x"}]), tmp_path / "c")
    assert found[0] == "red"
    assert [row.reason for row in found[1:]] == ["expected a text, got int 5", "expected a column 'text', got ['body']"]


def test_an_object_of_several_splits_is_refused_naming_them() -> None:
    splits = DatasetDict({"left": Dataset.from_dict({"text": TEXTS})})
    message = r"expected one split, got a DatasetDict with the splits \['left'\]; pass one of them"
    with pytest.raises(DatasetError, match=message):
        open_corpus(DatasetConfig(), splits)
    with pytest.raises(DatasetError, match=message):
        open_stream(DatasetConfig(max_samples="all"), splits)


def test_batches_of_rows_are_refused_with_a_clear_message() -> None:
    batches = iter([{"text": ["red", "green"]}])
    found = list(open_stream(DatasetConfig(max_samples="all"), batches).head())
    with pytest.raises(DatasetError, match=r"dataset row 0: expected a text, got list .*is this a batch of rows"):
        read_documents(found, ids_spec(path="unused"))
    assert "is this a batch" in row_value({"input_ids": [[1], [2]]}, Column.named("input_ids")).reason


def test_folders_with_an_equals_sign_are_read(tmp_path: Path) -> None:
    for day, texts in (("01", TEXTS[:6]), ("02", TEXTS[6:])):
        folder = tmp_path / f"date=2024-01-{day}"
        folder.mkdir()
        Dataset.from_dict({"text": texts}).to_parquet(folder / "p.parquet")
    assert worker_rows(corpus("parquet", tmp_path / "*" / "*.parquet"), tmp_path) == TEXTS
    assert streamed(tmp_path) == TEXTS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no/such", "looks like a path and does not exist"),
        ("/no/such", "looks like a path and does not exist"),
        ("~/no-such-folder", "looks like a path and does not exist"),
        ("data/part/x", "looks like a path and does not exist"),
        ("corpus.jsonl.zst", "looks like a path and does not exist"),
        ("here/typo", "looks like a path and does not exist"),
        ("here/d.jsonl", "got the file 'here/d.jsonl'; set .*name=json and .*data_files=here/d.jsonl"),
    ],
)
def test_names_that_are_paths_are_refused_before_a_hub_is_asked(name, message, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "here").mkdir()
    write_lines(tmp_path / "here" / "d.jsonl", [{"text": "red"}])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match=message):
        corpus(name)
    with pytest.raises(DatasetError, match=message):
        streamed(name)


@pytest.mark.parametrize(("name", "file"), [("json", "tpyo.jsonl"), ("parquet", "*.parquet"), ("text", "none/**.txt")])
def test_data_files_that_match_no_file_are_named(name: str, file: str, tmp_path: Path, monkeypatch) -> None:
    write_lines(tmp_path / "here.jsonl", [{"text": "red"}])
    monkeypatch.chdir(tmp_path)
    for read in (corpus, streamed):
        with pytest.raises(DatasetError) as caught:
            read(name, "here.jsonl", file)
        assert str(caught.value) == (
            "distillation.dataset.data_files: expected paths or patterns of existing files, "
            f"got {file!r}, which matches no file; correct it"
        )


def test_a_hub_that_does_not_answer_is_given_up_within_seconds(unreachable_hub) -> None:
    from huggingface_hub import constants

    started = time.monotonic()
    with pytest.raises(DatasetError, match=f"{unreachable_hub} cannot be reached, and 'some/name' was not downloaded"):
        corpus("some/name")
    assert time.monotonic() - started < 20
    assert constants.HF_HUB_OFFLINE is False


@pytest.fixture
def web(tmp_path: Path):
    (tmp_path / "web").mkdir()
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    handler = functools.partial(quiet, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield tmp_path / "web", f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_files_are_read_over_http(web, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads http with aiohttp, the extra [http]")
    folder, address = web
    write_lines(folder / "d.jsonl", [{"text": text} for text in TEXTS])
    assert worker_rows(corpus("json", f"{address}/d.jsonl"), tmp_path) == TEXTS
    assert streamed("json", f"{address}/d.jsonl") == TEXTS


@pytest.mark.parametrize(
    ("url", "extra", "package"),
    [
        ("s3://bucket/d.jsonl", "s3", "s3fs"),
        ("gs://bucket/d.parquet", "gcs", "gcsfs"),
        ("https://example.invalid/d.jsonl", "http", "aiohttp"),
    ],
)
def test_stores_say_what_to_install(url: str, extra: str, package: str) -> None:
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(DatasetError, match=rf"pip install -c constraints\.txt '\.\[{extra}\]'"):
        corpus("json", url)
    with pytest.raises(DatasetError, match=rf"pip install -c constraints\.txt '\.\[{extra}\]'"):
        streamed("json", url)
