"""Whole jobs over data that people have."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import teacher_inputs
from builders import cache_dir, digest, items, run, sentences, tiny_model
from datasets import Dataset
from text_inputs import byte_level_tokenizer, write_lines

import dask_logits
from dask_logits import ConfigError, PartitionsFailedError, load_config, read_status
from dask_logits.cache.reader import CacheReader
from dask_logits.job.prepare import prepare
from dask_logits.job.run import retry
from dask_logits.ops.show import card, card_lines
from dask_logits.run.folder import RunFolder

TEXTS = sentences(40, seed=3)


@pytest.fixture
def base(here: list[str]) -> list[str]:
    """A job whose data is still to be named."""
    return [o for o in here if "dataset.name" not in o and "data_files" not in o]


def receipts(run_folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (run_folder / "receipts").rglob("*.json")}


def damaged_lines(path: Path, row: int = 30) -> Path:
    lines = [json.dumps({"text": text}).encode() for text in TEXTS]
    lines[row] = lines[row][:12] + b"\xff\xfe"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.mark.parametrize("way", ["regular", "stream"])
def test_a_damaged_line_fails_its_partition_and_the_repaired_file_completes(way, base, tmp_path: Path) -> None:
    path = damaged_lines(tmp_path / "d.jsonl")
    mine = [*base, "distillation.dataset.name=json", f"distillation.dataset.data_files={path}"]
    if way == "stream":
        mine = [o for o in mine if "partition.rows" not in o]
        mine += ["distillation.dataset.streaming=true", "distillation.dataset.max_samples=all"]
        mine += ["distillation.dataset.streaming_chunk_size=12"]
    for _ in range(2):
        with pytest.raises(
            PartitionsFailedError, match=r"dataset row 30: .*d\.jsonl, line 31: expected UTF-8"
        ) as caught:
            run(mine)
        assert list(caught.value.reasons) == [2]
    before = receipts(cache_dir(base))
    assert len(before) == 3
    write_lines(path, [{"text": text} for text in TEXTS])
    repaired = digest(run(mine) if way == "regular" else retry(cache_dir(base)))
    after = receipts(cache_dir(base))
    assert {name: after[name] for name in before} == before
    assert repaired == digest(run(mine, f"distillation.teacher.cache_dir={tmp_path / 'whole'}"))


def test_a_repaired_file_may_differ_in_nothing_else(base, tmp_path: Path) -> None:
    path = damaged_lines(tmp_path / "d.jsonl")
    mine = [*base, "distillation.dataset.name=json", f"distillation.dataset.data_files={path}"]
    with pytest.raises(PartitionsFailedError, match="line 31"):
        run(mine)
    write_lines(path, [{"text": text} for text in ["other", *TEXTS[1:]]])
    with pytest.raises(dask_logits.RunConflictError, match=r"dataset\.content"):
        run(mine)


def test_skipped_rows_are_documents_without_tokens_and_counted(base, tmp_path: Path, caplog) -> None:
    path = damaged_lines(tmp_path / "d.jsonl")
    cache = run(
        base,
        "distillation.dataset.name=json",
        f"distillation.dataset.data_files={path}",
        "distillation.dataset.on_bad_row=skip",
    )
    found = list(items(CacheReader(cache)))
    assert [int(item["row"]) for item in found] == list(range(40))
    assert [row for row, item in enumerate(found) if not len(item["input_ids"])] == [30]
    made = card(cache)
    assert "skipped rows      1" in card_lines(made)
    assert (made["skipped_rows"], made["dataset"]["column"], made["dataset"]["on_bad_row"]) == (1, "text", "skip")
    assert "skipped 1 row that cannot be used" in caplog.text
    assert "skipped dataset row 30: " in caplog.text


def test_a_second_bos_is_warned_of_once_and_counted(base, tmp_path: Path, caplog) -> None:
    tokenizer = byte_level_tokenizer(bos="<|end|>")
    tokenizer.save_pretrained(tmp_path / "teacher")
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "teacher")
    mine = [o for o in base if "model_path" not in o] + [f"distillation.teacher.model_path={tmp_path / 'teacher'}"]
    cache = run(mine, dataset=[f"<|end|>{text}" for text in TEXTS[:6]] + TEXTS[6:])
    (warning,) = [record for record in caplog.records if "have it twice" in record.getMessage()]
    assert warning.levelname == "WARNING"
    assert warning.getMessage().startswith("6 of 40 texts ")
    assert "distillation.dataset.add_special_tokens=false" in warning.getMessage()
    assert "rows with 2 BOS   6" in card_lines(card(cache))


def test_padded_ids_give_the_cache_of_the_ids_alone(base, tmp_path: Path) -> None:
    ids = [[1 + i % 5] * (i % 7) for i in range(40)]
    rows = [
        {"input_ids": [0] * (9 - len(row)) + row, "attention_mask": [0] * (9 - len(row)) + [1] * len(row)}
        for row in ids
    ]
    padded = run(base, dataset=Dataset.from_list(rows))
    plain = run(
        base, f"distillation.teacher.cache_dir={tmp_path / 'plain'}", dataset=[{"input_ids": row} for row in ids]
    )
    assert digest(padded) == digest(plain)


@pytest.mark.parametrize("column", ["text", "input_ids"])
def test_the_column_that_is_used_is_said_everywhere(column: str, base, caplog) -> None:
    rows = [{"text": text, "input_ids": [1 + i % 5] * (1 + i % 7)} for i, text in enumerate(TEXTS)]
    caplog.set_level("INFO", "dask_logits")
    cache = run(base, f"distillation.dataset.text_column={column}", dataset=rows)
    assert f"documents are taken from the column {column!r}" in caplog.messages
    assert RunFolder(cache_dir(base)).manifest().what["dataset.column"] == column
    (shown,) = (line for line in card_lines(card(cache)) if line.startswith("read with "))
    assert f"column {column}, " in shown
    lengths = [len(item["input_ids"]) for item in items(CacheReader(cache))]
    assert lengths == [min(16, len(row["text"].split()) if column == "text" else len(row["input_ids"])) for row in rows]


def test_max_length_fits_the_teacher_by_default(base, tmp_path: Path) -> None:
    mine = [o for o in base if "max_length" not in o]
    job = prepare(load_config(mine, dataset_given=True), TEXTS)
    assert job.items.max_length == job.what["dataset.max_length"] == job.config.dataset.max_length == 256
    with pytest.raises(ConfigError, match="max_length: expected at most the teacher's 256 positions, got 2048"):
        prepare(load_config([*mine, "distillation.dataset.max_length=2048"], dataset_given=True), TEXTS)
    windows = ["distillation.dataset.long_documents=window", "distillation.dataset.window_stride=300"]
    with pytest.raises(ConfigError, match="window_stride: expected at most max_length 256, got 300"):
        prepare(load_config([*mine, *windows], dataset_given=True), TEXTS)


def test_max_length_is_at_most_2048_by_default_and_an_argument_of_the_call(tmp_path: Path, monkeypatch) -> None:
    folder = teacher_inputs.teacher(tmp_path / "teacher", max_position_embeddings=4096)
    settled = []

    def settle(config, dataset):
        settled.append(prepare(config, dataset).items.max_length)
        return tmp_path

    monkeypatch.setattr("dask_logits.job.run.generate", settle)
    for more in ({}, {"max_length": 3000}):
        dask_logits.generate_teacher_logits(str(folder), TEXTS, tmp_path / "run", device="cpu", **more)
    assert settled == [2048, 3000]


def test_a_resumed_run_keeps_the_max_length_it_was_begun_with(base, tmp_path: Path) -> None:
    run(base, dataset=TEXTS)
    mine = [o for o in base if "max_length" not in o]
    assert prepare(load_config(mine, dataset_given=True), TEXTS).items.max_length == 16


def test_retry_completes_a_stream_whose_damaged_parquet_file_was_restored(base, tmp_path: Path, caplog) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(4):
        Dataset.from_dict({"text": TEXTS[i * 10 : i * 10 + 10]}).to_parquet(folder / f"{i}.parquet")
    file = folder / "1.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:-30])
    mine = [o for o in base if "partition.rows" not in o] + [
        "distillation.dataset.name=parquet",
        f"distillation.dataset.data_files={folder}/*.parquet",
        "distillation.dataset.streaming=true",
        "distillation.dataset.max_samples=all",
        "distillation.dataset.streaming_chunk_size=5",
    ]
    with pytest.raises(PartitionsFailedError, match=r"(?s)1\.parquet: expected readable Parquet.*`dask-logits retry "):
        run(mine)
    before = receipts(cache_dir(base))
    assert len(before) == 3
    file.write_bytes(whole)
    assert pq.ParquetFile(file).metadata.num_rows == 10
    restored = digest(retry(cache_dir(base)))
    # What comes after the file has other row numbers now, and is scored anew.
    (message,) = (text for text in caplog.messages if "can be read now" in text)
    assert message.startswith(str(file))
    assert message.endswith("and 2 committed partitions must be scored again")
    assert receipts(cache_dir(base))["000000.json"] == before["000000.json"]
    assert read_status(cache_dir(base)).state == "complete"
    assert restored == digest(run(mine, f"distillation.teacher.cache_dir={tmp_path / 'whole'}"))
