"""The whole job on a real worker process: what it writes, what it refuses, how it resumes."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import (
    VOCAB_SIZE,
    cache_dir,
    digest,
    items,
    nan_teacher,
    run,
    save_tokenizer,
    tiny_model,
    tree,
    write_json_lines,
)
from datasets import Dataset, load_dataset
from plain_forward import assert_targets_match, plain_targets

import dask_logits
from dask_logits import CachedLogitsDataset, load_config, read_status
from dask_logits.cache.profile import load_profile
from dask_logits.cache.reader import CacheReader
from dask_logits.job import retry_policy
from dask_logits.job.serial_executor import SerialExecutor
from dask_logits.run.folder import RunFolder
from dask_logits.run.plan_log import PlanLog
from dask_logits.worker import task as task_module


def test_the_cache_holds_every_document_once_in_order_with_the_teachers_targets(here, cache, corpus, llama) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    tokenizer = AutoTokenizer.from_pretrained(llama)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    found = list(items(CacheReader(cache)))
    assert [int(d["row"]) for d in found] == list(range(40))
    for document, text in zip(found, texts, strict=True):
        ids = tokenizer(text, truncation=True, max_length=16)["input_ids"] if text else []
        assert document["input_ids"].tolist() == ids
        if ids:
            assert_targets_match(document, plain_targets(model, np.array(ids), VOCAB_SIZE, 8))
    assert len(found[7]["input_ids"]) == 0
    assert len(CachedLogitsDataset(cache, student_tokenizer=tokenizer)) == 39
    other = {**tokenizer.get_vocab(), "odd": 5}
    with pytest.raises(dask_logits.CacheError, match="ids, in which id 5 is "):
        CachedLogitsDataset(cache, student_tokenizer=SimpleNamespace(get_vocab=lambda: other))


def test_what_lands_on_disk(here, cache) -> None:
    run_folder = cache_dir(here)
    names = {str(path.relative_to(run_folder)) for path in run_folder.rglob("*") if path.is_file()}
    assert names == {
        "run.json", "calibration.json", "status.json", "teacher_logits.h5", "report.html",
        "tables/token_crcs.npy", "plan/000/000000.json", "plan/000/000001.json",
        *(f"receipts/000/00000{i}.json" for i in range(4)),
    }  # fmt: skip
    assert all(path.stat().st_size < 3_000 for path in (run_folder / "receipts" / "000").iterdir())
    manifest = json.loads((run_folder / "run.json").read_text())
    assert manifest["total_workers"] == 1
    plan = [json.loads((run_folder / "plan" / "000" / f"00000{i}.json").read_text()) for i in range(2)]
    assert plan[0]["cuts"] == [[3, 12], [1, 4]]
    assert plan[1] == {"end": "exhausted", "partitions": 4, "rows": 40}
    calibration = json.loads((run_folder / "calibration.json").read_text())
    assert calibration["numerics"]["path"]["head"] == "linear"
    mass = list(calibration["kept_mass_by_k"].values())
    assert mass == sorted(mass)
    assert list(calibration["kept_mass_by_k"]) == ["1", "2", "4", "8"]
    assert CacheReader(cache).attributes["fingerprint"] == manifest["fingerprint"]
    assert len(CachedLogitsDataset(run_folder, keep_empty=True)) == 40


def test_a_finished_run_is_a_no_op(here, cache) -> None:
    def written() -> dict[str, int]:
        files = (path for path in cache_dir(here).rglob("*") if path.is_file())
        return {str(path): path.stat().st_mtime_ns for path in files}

    before = written()
    assert run(here) == cache
    assert written() == before


def test_status_reads_files_only(here, cache) -> None:
    status = read_status(cache_dir(here))
    reader = CacheReader(cache)
    assert (status.state, status.partitions, status.committed, status.rows) == ("complete", 4, 4, 40)
    assert status.statistics.tokens == reader.n_tokens
    assert status.statistics.mean_kept_mass == pytest.approx(
        1 - np.exp(reader.arrays["tail_logmass"].astype(float)).mean(), abs=1e-6
    )
    assert status.content_digest == digest(cache)
    assert json.loads(status.to_json())["cache"] == str(cache)
    assert f"cache         {cache}" in status.lines()
    with pytest.raises(dask_logits.RunConflictError, match=r"expected a run folder with run\.json, got none"):
        read_status(cache_dir(here).parent)


def test_a_second_start_does_not_read_the_weights_again(here, cache, monkeypatch) -> None:
    monkeypatch.setattr("dask_logits.teacher.identity._of_content", lambda path: pytest.fail(f"{path} was read"))
    (cache_dir(here) / "teacher_logits.h5").unlink()
    next((cache_dir(here) / "receipts" / "000").iterdir()).unlink()
    assert run(here) == cache


def test_resume_computes_only_what_is_missing(here, tmp_path) -> None:
    keep = "distillation.job.keep_partitions=true"
    first = run(here, keep)
    whole, receipts = digest(first), cache_dir(here) / "receipts" / "000"
    kept = {path.name: path.read_text() for path in receipts.iterdir()}
    first.unlink()
    (receipts / "000001.json").unlink()
    (receipts / "000003.json").unlink()
    assert read_status(cache_dir(here)).state == "stopped"
    assert digest(run(here, keep)) == whole
    after = {path.name: path.read_text() for path in receipts.iterdir()}
    assert {name for name in kept if kept[name] != after[name]} == {"000001.json", "000003.json"}
    attempts = {path.name for path in (cache_dir(here) / "partitions").iterdir()}
    assert attempts == {json.loads(text)["attempt"] for text in after.values()}
    run(here)
    assert not (cache_dir(here) / "partitions").exists()


def test_rows_without_text_are_told_of(here, tmp_path, caplog) -> None:
    data = write_json_lines(tmp_path / "few.jsonl", ["a text", None, "", "another text"])
    few = f"distillation.dataset.data_files={data}"
    made = run(here, few)
    assert "documents without a token: 2 of 4; their rows are null, empty or skipped" in caplog.text
    assert CacheReader(made).n_empty == 2


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_a_column_without_any_text_is_refused(streaming, here, tmp_path) -> None:
    data = write_json_lines(tmp_path / "none.jsonl", [None, "", None])
    wanted = [f"distillation.dataset.data_files={data}", "distillation.dataset.max_samples=all"]
    with pytest.raises(dask_logits.DatasetError, match="expected text or ids in 'text', got null or nothing in 3 rows"):
        run(here, *wanted, f"distillation.dataset.streaming={streaming}")
    assert not cache_dir(here).exists()


def test_a_damaged_cache_is_the_users_to_delete(here, cache) -> None:
    whole = digest(cache)
    cache.write_bytes(cache.read_bytes()[:1000])
    before = tree(cache_dir(here))
    status = read_status(cache_dir(here))
    assert (status.state, "truncated" in status.reason) == ("damaged", True)
    assert status.next_command == "restore the cache, or delete it and start the job again with the same command"
    with pytest.raises(dask_logits.CacheError, match="truncated"):
        run(here)
    assert tree(cache_dir(here)) == before
    cache.unlink()
    assert digest(run(here)) == whole


def test_a_refused_start_leaves_an_empty_folder_empty(here) -> None:
    cache_dir(here).mkdir()
    with pytest.raises(dask_logits.ClusterError):
        run(here, "cluster=scheduler", "distillation.cluster.scheduler=tcp://127.0.0.1:1",
            "distillation.cluster.wait_seconds=1")  # fmt: skip
    assert not list(cache_dir(here).iterdir())


def test_a_dataset_folder_beside_the_run_is_not_deleted(here, corpus) -> None:
    mine = cache_dir(here) / "dataset"
    Dataset.from_dict({"text": ["red"]}).save_to_disk(mine)
    with pytest.raises(dask_logits.RunConflictError, match=r"expected run\.json beside \['dataset'\]"):
        run(here, f"distillation.dataset.name={mine}", "distillation.dataset.data_files=null")
    assert mine.exists()


def test_another_partition_size_or_place_gives_the_same_documents(here, cache, tmp_path) -> None:
    other = run(here, f"distillation.teacher.cache_dir={tmp_path / 'other'}", "distillation.partition.rows=5")
    for one, two in zip(items(CacheReader(cache)), items(CacheReader(other)), strict=True):
        np.testing.assert_array_equal(one["input_ids"], two["input_ids"])
        np.testing.assert_allclose(one["logsumexp"], two["logsumexp"], atol=1e-4)


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("distillation.teacher.generation.top_k=4", "teacher.generation.top_k"),
        ("distillation.dataset.max_length=15", "dataset.max_length"),
        ("distillation.dataset.max_samples=39", "dataset.max_samples"),
        ("distillation.partition.rows=13", "partition.rows"),
        ("distillation.teacher.dtype=bfloat16", "teacher.dtype"),
        ("distillation.teacher.generation.batch_tokens=100", "teacher.generation.batch_tokens"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(here, cache, override, name) -> None:
    before = tree(cache_dir(here))
    with pytest.raises(dask_logits.RunConflictError, match="made with other settings") as caught:
        run(here, override)
    assert name in caught.value.differences
    assert tree(cache_dir(here)) == before


def test_other_weights_under_the_same_path_are_refused(here, llama, tmp_path) -> None:
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    mine = [*here, f"distillation.teacher.model_path={model}"]
    run(mine)
    other = tiny_model("llama")
    with torch.no_grad():
        other.get_output_embeddings().weight[0, 0] += 1
    other.save_pretrained(model)
    with pytest.raises(dask_logits.RunConflictError) as caught:
        run(mine)
    assert list(caught.value.differences) == ["teacher.content"]


def test_a_status_file_that_a_crash_left_empty_is_written_anew(here, cache) -> None:
    status = cache_dir(here) / "status.json"
    cache.unlink()
    status.write_text("")
    (cache_dir(here) / "receipts" / "000" / "000001.json").unlink()
    assert read_status(cache_dir(here)).state == "stopped"
    assert digest(run(here))
    assert json.loads(status.read_text())["state"] == "done"


def test_an_unfinished_run_of_rows_in_memory_grows(here, monkeypatch) -> None:
    from dask_logits.job import run as home

    rows = Dataset.from_dict({"text": [f"w{i} red" for i in range(40)]})
    base = [o for o in here if "dataset.name" not in o and "data_files" not in o]

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(home, "consolidate_run", stop)
        with pytest.raises(KeyboardInterrupt):
            run(base, "distillation.dataset.max_samples=20", dataset=rows)
    cache = run(base, dataset=rows)
    assert CacheReader(cache).n_documents == 40
    # Nothing is left to do, not even to start a cluster for.
    assert run([*base, "distillation.cluster.wait_seconds=0"], dataset=rows) == cache


def test_a_bad_row_fails_its_partition_and_no_other(here, corpus, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("dask_logits.job.calibration.CALIBRATION_TOKENS", 20)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    texts[30] = "red w50"
    data = write_json_lines(tmp_path / "bad.jsonl", texts)
    bad = nan_teacher(tmp_path / "bad-teacher", "w50")
    mine = [*here, f"distillation.dataset.data_files={data}", f"distillation.teacher.model_path={bad}"]
    for _ in range(2):
        with pytest.raises(dask_logits.PartitionsFailedError, match="dataset row 30: expected finite logits") as caught:
            run(mine)
        assert list(caught.value.reasons) == [2]
        assert read_status(cache_dir(here)).committed == 3
    assert not (cache_dir(here) / "teacher_logits.h5").exists()


def test_a_systematic_error_stops_the_job_at_once(here, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("dask_logits.job.calibration.CALIBRATION_TOKENS", 1)
    data = write_json_lines(tmp_path / "d.jsonl", ["green"] + ["red w50"] * 39)
    bad = nan_teacher(tmp_path / "bad-teacher", "w50")
    mine = [*here, f"distillation.dataset.data_files={data}", f"distillation.teacher.model_path={bad}"]
    with pytest.raises(dask_logits.PartitionsFailedError, match="2 partitions failed and none succeeded"):
        run(mine, "distillation.job.max_failures=2", "distillation.partition.rows=4")


def test_a_store_that_stops_answering_stops_the_job(here, monkeypatch) -> None:
    monkeypatch.setattr(retry_policy, "_FIRST_REST_SECONDS", 0.01)
    mine = [*here, "distillation.partition.rows=2"]
    read_rows = task_module.read_rows

    def read(files, column):
        if files[0].first >= 12:
            raise TimeoutError(110, "Connection timed out")
        return read_rows(files, column)

    with monkeypatch.context() as patched:
        patched.setattr(task_module, "read_rows", read)
        with pytest.raises(
            dask_logits.PartitionsFailedError,
            match=r"3 partitions in a row could not be read or written, so .* because: .*Connection timed out",
        ) as caught:
            run(mine, "distillation.job.max_failures=3")
    # Of 14. One of those before them may have been committed meanwhile.
    assert 3 <= len(caught.value.reasons) <= 5
    status = read_status(cache_dir(here))
    assert len(status.failed) == len(caught.value.reasons)
    assert status.committed in (5, 6)
    assert CacheReader(run(mine)).n_documents == 40


def test_an_io_error_is_tried_again(here, monkeypatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(SerialExecutor, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            run(here)
    blocker = cache_dir(here) / "partitions"
    blocker.write_text("a file where the folder should be")
    thread = threading.Timer(4.0, blocker.unlink)
    thread.start()
    cache = run(here, "distillation.job.retries=4")
    thread.join()
    assert CacheReader(cache).n_documents == 40


def test_dataset_objects_of_any_kind(here, cache, corpus, tmp_path) -> None:
    base = [o for o in here if "dataset.name" not in o and "data_files" not in o]
    plain = load_dataset("json", data_files=str(corpus), split="train")
    for name, dataset in {
        "file": plain,
        "memory": Dataset.from_dict({"text": plain["text"][:]}),
        "shuffled-back": plain.select(range(39, -1, -1)).select(range(39, -1, -1)),
    }.items():
        mine = [*base, f"distillation.teacher.cache_dir={tmp_path / name}"]
        assert digest(run(mine, dataset=dataset)) == digest(cache), name
        assert not (tmp_path / name / "dataset").exists()


def test_ready_input_ids_equal_text(here, cache, tmp_path) -> None:
    reader = CacheReader(cache)
    rows = [{"input_ids": document["input_ids"].tolist()} for document in items(reader)]
    data = write_json_lines(tmp_path / "ids.jsonl", rows)
    other = run(here, f"distillation.dataset.data_files={data}", f"distillation.teacher.cache_dir={tmp_path / 'ids'}")
    assert digest(other) == digest(cache)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (["distillation.teacher.generation.top_k=105"], "ConfigError", "expected at most 104, the number of token"),
        (["distillation.dataset.max_length=257"], "ConfigError", "max_length: expected at most the teacher's 256"),
        (["distillation.teacher.model_path=/no/such/model"], "TeacherError", "expected a folder with a model"),
        (["distillation.teacher.tokenizer_path=/no/such/tokenizer"], "TeacherError", "expected a tokenizer"),
        (["distillation.teacher.tokenizer_path={narrow}"], "TeacherError", "112 logits, got .* 50 ids"),
        (["distillation.dataset.data_files={empty}"], "DatasetError", "expected a dataset with at least one row"),
        (["distillation.dataset.name=no-such-dataset"], "DatasetError", "expected a dataset"),
        (["distillation.dataset.text_column=body"], "DatasetError", "expected one of the columns"),
        (["distillation.teacher.cache_dir={file}/run"], "ConfigError", "expected a folder that can be written"),
        (["distillation.teacher.cache_dir=/proc/x"], "ConfigError", r"cache_dir: expected a folder that can be"),
        (["distillation.teacher.model_path={nan}"], "TeacherError", "dataset row .*expected finite logits"),
        (["distillation.cluster.kind=scheduler", "distillation.cluster.scheduler=tcp://127.0.0.1:1",
          "distillation.cluster.wait_seconds=1"], "ClusterError", "expected a scheduler at 'tcp://127.0.0.1:1'"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_and_nothing_changes_on_disk(here, tmp_path, changes, error, message) -> None:
    (tmp_path / "file").write_text("not a folder")
    made = {"file": tmp_path / "file", "nan": nan_teacher(tmp_path / "nan", "red")}
    made["narrow"], made["empty"] = tmp_path / "narrow", write_json_lines(tmp_path / "empty.jsonl", [])
    save_tokenizer(made["narrow"], 50)
    before = tree(tmp_path)
    with pytest.raises(getattr(dask_logits, error), match=message):
        run(here, *(change.format(**made) for change in changes))
    assert tree(tmp_path) == before
    assert not cache_dir(here).exists()


def test_a_folder_with_another_purpose_is_refused(here) -> None:
    (cache_dir(here) / "receipts").mkdir(parents=True)
    with pytest.raises(dask_logits.RunConflictError, match=r"expected run\.json beside"):
        run(here)


def test_a_job_that_cannot_fit_is_refused(here, overrides, monkeypatch) -> None:
    monkeypatch.setattr("dask_logits.job.capacity.free_disk_bytes", lambda path: 1000)
    with pytest.raises(dask_logits.CapacityError, match=r"free for .* tokens") as caught:
        run(here)
    assert caught.value.needed_bytes > caught.value.free_bytes == 1000
    monkeypatch.undo()
    monkeypatch.setattr("dask_logits.job.capacity.free_memory_bytes", lambda: 1 << 20)
    with pytest.raises(dask_logits.CapacityError, match=r"use fewer workers, lower distillation\.teacher"):
        run(overrides)
    assert not cache_dir(here).exists()


def test_nothing_bulky_goes_through_dask(here, cache) -> None:
    import pickle

    from dask_logits.job.driver import tasks
    from dask_logits.job.prepare import prepare

    job = prepare(load_config(here))
    calibration = RunFolder(cache_dir(here)).calibration()
    planned = job.source.plan(PlanLog(job.run), job.partition_rows, lambda index: True)
    sizes = [len(pickle.dumps(task)) for task in tasks(job, calibration, planned, pytest.fail)]
    assert len(sizes) == 4
    assert max(sizes) < 2_500


def texts_of(corpus: Path) -> list[list[int]]:
    """The whole token ids of each document of the corpus."""
    from transformers import PreTrainedTokenizerFast

    made = corpus.parent / "tokenizer"
    save_tokenizer(made)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(made)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    return [tokenizer(text)["input_ids"] if text else [] for text in texts]


@pytest.mark.parametrize("stride", [None, 3])
def test_windows_store_every_token_of_a_long_document_once(stride, here, corpus, llama) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    way = ["distillation.dataset.long_documents=window", "distillation.dataset.max_length=7"]
    cache = run(here, *way, *([] if stride is None else [f"distillation.dataset.window_stride={stride}"]))
    expected = texts_of(corpus)
    dataset = CachedLogitsDataset(cache)
    found: dict[int, list[int]] = {row: [] for row in range(40)}
    for item in dataset:
        ((row, offset, length),) = item["segments"].tolist()
        assert (row, offset, length) == (int(item["row"]), len(found[row]), len(item["input_ids"]))
        found[row] += item["input_ids"].tolist()
        if offset:
            context = 0 if stride is None else 7 - stride
            window = np.array(expected[row][offset - context : offset + length])
            plain = plain_targets(model, window, VOCAB_SIZE, 8)
            np.testing.assert_allclose(item["logsumexp"], plain["logsumexp"][context:], atol=1e-4)
            is_last = offset + length == len(expected[row])
            assert torch.isnan(item["label_logprob"]).tolist() == [False] * (length - 1) + [is_last]
    assert list(found.values()) == expected
    assert len(dataset) > 40
    assert json.loads((cache.parent / "run.json").read_text())["what"]["dataset.long_documents"] == "window"


def test_packed_blocks_are_full_and_list_their_segments(here, corpus, llama) -> None:
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    way = ["distillation.dataset.packing=concat", "distillation.dataset.separator_id=103"]
    with pytest.raises(dask_logits.ConfigError, match=r"separator_id: expected a token id below 104 .* names none"):
        run(here, way[0])
    cache = run(here, *way)
    what = json.loads((cache.parent / "run.json").read_text())["what"]
    assert (what["dataset.packing"], what["dataset.separator_id"]) == ("concat", 103)
    dataset = CachedLogitsDataset(cache)
    expected = texts_of(corpus)
    streams = [
        [token for ids in expected[first : first + 12] if ids for token in [*ids, 103]] for first in range(0, 40, 12)
    ]
    blocks = [stream[i : i + 16] for stream in streams for i in range(0, len(stream), 16)]
    assert [item["input_ids"].tolist() for item in dataset] == blocks
    for item in dataset:
        place = 0
        for row, offset, length in item["segments"].tolist():
            part = item["input_ids"][place : place + length].tolist()
            assert part == [*expected[row], 103][offset : offset + length]
            place += length
        assert place == len(item["input_ids"])
        plain = plain_targets(model, item["input_ids"].numpy(), VOCAB_SIZE, 8)
        np.testing.assert_allclose(item["tail_logmass"], plain["tail"], atol=1e-4)
    reader = CacheReader(cache)
    assert sorted(set(reader.arrays["document_row"].tolist())) == list(range(40))
    assert reader.attributes["statistics"]["blocks"] == len(dataset)
    (batch,) = DataLoader(dataset, batch_size=len(dataset), collate_fn=dask_logits.collate)
    assert batch["segments"].shape[:1] == (len(dataset),)
    assert batch["segments"][..., 2].sum() == reader.n_tokens


def test_a_packed_run_grows_too(here, corpus) -> None:
    way = ["distillation.dataset.packing=concat", "distillation.dataset.separator_id=103"]
    run(here, *way, "distillation.dataset.max_samples=24")
    grown = CachedLogitsDataset(run(here, *way))
    stream = [token for ids in texts_of(corpus) if ids for token in [*ids, 103]]
    assert [token for item in grown for token in item["input_ids"].tolist()] == stream


def test_a_compact_cache_holds_what_a_plain_one_holds(here, tmp_path) -> None:
    """The same also after it was made plain."""

    def job(name: str, *more: str) -> Path:
        return run(here, f"distillation.teacher.cache_dir={tmp_path / name}", *more)

    exact = CacheReader(job("plain"))
    assert exact.attributes["profile"] == "plain"
    compact = "distillation.cache.profile=compact"
    path = job("compact", compact, "distillation.cache.precision=12")
    reader = CacheReader(path)
    assert (reader.attributes["profile"], reader.attributes["precision"]) == ("compact", 12)
    for one, other in zip(items(exact), items(reader), strict=True):
        assert one["input_ids"].tolist() == other["input_ids"].tolist()
        assert one["topk_ids"].tolist() == other["topk_ids"].tolist()
        np.testing.assert_allclose(one["topk_logprobs"], other["topk_logprobs"], atol=0.02)
    dask_logits.convert(path, tmp_path / "again.h5", profile="plain")
    assert digest(tmp_path / "again.h5") == digest(path)
    with pytest.raises(dask_logits.RunConflictError, match=r"  distillation\.cache\.precision: the run has 12, now 8"):
        job("compact", compact)


def test_a_resumed_compact_run_ends_like_an_undisturbed_one(here, tmp_path) -> None:
    compact = "distillation.cache.profile=compact"
    keep = [compact, "distillation.job.keep_partitions=true"]
    expected = digest(run(here, *keep))
    folder = cache_dir(here)
    (folder / "teacher_logits.h5").unlink()
    RunFolder(folder).receipt_path(2).unlink()
    assert digest(run(here, *keep)) == expected
    (folder / "teacher_logits.h5").unlink()
    (table,) = (path for path in (folder / "tables").iterdir() if path.name != "token_crcs.npy")
    table.write_bytes(b"lost")
    load_profile.cache_clear()
    with pytest.raises(dask_logits.CacheError, match="expected the id table with this SHA-256, got another"):
        run(here, *keep)
