"""Streams: the same rows as a brute-force read, at constant look-ahead, resumed without a row lost or taken twice."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import warm
from builders import cache_dir, digest, items, run, sentences, tree, wait_for, write_json_lines
from datasets import Dataset, IterableDataset
from test_cluster import COMMAND
from transformers import AutoTokenizer

import dask_logits
from dask_logits import read_status, verify
from dask_logits.cache.reader import CacheReader
from dask_logits.run.folder import RunFolder

CHUNK = "distillation.dataset.streaming_chunk_size=10"


def write_parquet(path: Path, texts: list, row_groups: list[int], column: str = "text") -> None:
    schema = pa.schema([(column, pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        rest = iter(texts)
        for size in row_groups:
            writer.write_table(pa.table({column: list(itertools.islice(rest, size))}, schema=schema))
    assert not list(rest)


def parquet_folder(folder: Path, texts: list, sizes=((3, 3, 5), (45, 2), (1,), (9, 12, 20))) -> Path:
    """Several files with uneven row groups, one of them huge for chunks of 10."""
    folder.mkdir()
    rest = iter(texts)
    for name, groups in zip(("a0", "a1", "b0", "b1"), sizes, strict=True):
        write_parquet(folder / f"{name}.parquet", list(itertools.islice(rest, sum(groups))), list(groups))
    assert not list(rest)
    return folder


TEXTS = sentences(100, seed=5)


@pytest.fixture
def stream(here: list[str]) -> list[str]:
    return [
        *(o for o in here if "dataset.name" not in o and "data_files" not in o and "partition.rows" not in o),
        "distillation.dataset.streaming=true",
        "distillation.dataset.max_samples=all",
        "distillation.job.retries=0",
        # Two runs are compared byte by byte: an endless plan would settle these by the clock.
        "distillation.teacher.generation.batch_tokens=4096",
        "distillation.scoring.compile=never",
        CHUNK,
    ]


@pytest.fixture
def parquet(stream: list[str], tmp_path: Path) -> list[str]:
    folder = parquet_folder(tmp_path / "data", TEXTS)
    files = [f"{folder}/a*.parquet", f"{folder}/b*.parquet"]
    return [*stream, "distillation.dataset.name=parquet", f"distillation.dataset.data_files=[{','.join(files)}]"]


def assert_holds(cache: Path, texts: list, llama: Path) -> None:
    """Every row once, in order, with its own tokens."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    found = list(items(CacheReader(cache)))
    assert [int(item["row"]) for item in found] == list(range(len(texts)))
    for item, text in zip(found, texts, strict=True):
        ids = tokenizer(text, truncation=True, max_length=16)["input_ids"] if text else []
        assert item["input_ids"].tolist() == ids


def plan_of(run_folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((run_folder / "plan").rglob("*.json"))]


def test_parquet_files_are_read_in_place(parquet, llama) -> None:
    cache = run(parquet)
    assert_holds(cache, TEXTS, llama)
    plan = plan_of(cache_dir(parquet))
    assert [entry.get("cuts") for entry in plan] == [
        [[1, 6], [1, 5]], [[4, 10], [1, 5], [1, 2]], [[1, 1]], [[1, 9], [1, 12], [1, 20]], None,
    ]  # fmt: skip
    assert plan[-1] == {"end": "exhausted", "partitions": 12, "rows": 100}
    assert not (cache_dir(parquet) / "spool").exists()
    status = read_status(cache_dir(parquet))
    assert (status.state, status.partitions, status.rows) == ("complete", 12, 100)


def json_lines(folder: Path) -> list[str]:
    for i in range(3):
        write_json_lines(folder / f"{i}.jsonl", TEXTS[i * 40 : (i + 1) * 40])
    return ["distillation.dataset.name=json", f"distillation.dataset.data_files={folder}/*.jsonl"]


def gzipped(folder: Path) -> list[str]:
    names = json_lines(folder)
    for path in folder.glob("*.jsonl"):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    return [names[0], names[1] + ".gz"]


def saved(folder: Path) -> list[str]:
    Dataset.from_dict({"text": TEXTS}).save_to_disk(folder / "saved")
    return [f"distillation.dataset.name={folder / 'saved'}"]


@pytest.mark.parametrize("make", [json_lines, gzipped, saved])
def test_named_streams_without_random_access(make, stream, llama, tmp_path) -> None:
    (tmp_path / "data").mkdir()
    cache = run(stream, *make(tmp_path / "data"))
    assert_holds(cache, TEXTS, llama)
    assert not (cache_dir(stream) / "spool").exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda: IterableDataset.from_generator(lambda: ({"text": text} for text in TEXTS)),
        lambda: ({"text": text, "other": 1} for text in TEXTS),
        lambda: iter(TEXTS),
        lambda: Dataset.from_dict({"text": TEXTS}),
        lambda: Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(num_shards=3),
    ],
    ids=["iterable dataset", "generator", "texts", "regular dataset", "sharded"],
)
def test_objects_are_streams_too(make, stream, llama) -> None:
    assert_holds(run(stream, dataset=make()), TEXTS, llama)


def test_a_stream_of_ids(stream, tmp_path, llama) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    rows = ({"input_ids": np.array(tokenizer(text)["input_ids"])} for text in TEXTS)
    assert_holds(run(stream, dataset=rows), TEXTS, llama)


def test_a_stream_and_a_regular_dataset_give_the_same_cache(stream, here, tmp_path) -> None:
    data = write_json_lines(tmp_path / "d.jsonl", TEXTS)
    named = ["distillation.dataset.name=json", f"distillation.dataset.data_files={data}"]
    regular = run([o for o in here if "partition.rows" not in o], *named, "distillation.partition.rows=10")
    streamed = run(stream, *named, f"distillation.teacher.cache_dir={tmp_path / 'other'}")
    assert digest(streamed) == digest(regular)


@pytest.mark.parametrize("samples", [25, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 100, 500))])
def test_max_samples_is_exact_and_may_grow(samples, parquet, stream, llama, tmp_path) -> None:
    data = write_json_lines(tmp_path / "d.jsonl", TEXTS)
    lines = [*stream, "distillation.dataset.name=json", f"distillation.dataset.data_files={data}"]
    more = max(70, samples)
    for overrides in (parquet, [*lines, f"distillation.teacher.cache_dir={tmp_path / 'other'}"]):
        cache = run(overrides, f"distillation.dataset.max_samples={samples}")
        assert_holds(cache, TEXTS[:samples], llama)
        before = {path: path.stat().st_mtime_ns for path in (cache.parent / "receipts").rglob("*.json")}
        assert_holds(run(overrides, f"distillation.dataset.max_samples={more}"), TEXTS[:more], llama)
        assert {path: path.stat().st_mtime_ns for path in before} == before
        if samples < 70:
            with pytest.raises(dask_logits.RunConflictError, match="max_samples: the run has 70, now 69"):
                run(overrides, "distillation.dataset.max_samples=69")


def test_a_regular_dataset_may_grow_by_max_samples_and_not_by_itself(here, llama, tmp_path) -> None:
    data = write_json_lines(tmp_path / "d.jsonl", TEXTS[:60])
    named = [*here, f"distillation.dataset.data_files={data}"]
    assert_holds(run(named, "distillation.dataset.max_samples=30"), TEXTS[:30], llama)
    grown = run(named, "distillation.dataset.max_samples=60")
    assert_holds(grown, TEXTS[:60], llama)
    assert [entry.get("cuts") for entry in plan_of(cache_dir(here))] == [
        [[2, 12], [1, 6]], None, [[2, 12], [1, 6]], None,
    ]  # fmt: skip
    write_json_lines(data, TEXTS)
    with pytest.raises(dask_logits.RunConflictError, match=r"dataset\.rows: the run has 60, now 100"):
        run(named)
    write_json_lines(data, ["other", *TEXTS[1:60]])
    with pytest.raises(dask_logits.RunConflictError, match=r"dataset\.content: the run has"):
        run(named)


class StopError(Exception):
    """Ends a driver in the middle."""


def stop_after(monkeypatch, receipts: int) -> None:
    """Let the driver fail at its n-th receipt, as if it had been killed there."""
    from dask_logits.job.progress import JobProgress

    original, counted = JobProgress.partition, itertools.count(1)

    def partition(self, statistics) -> None:
        if next(counted) == receipts:
            raise StopError
        original(self, statistics)

    monkeypatch.setattr(JobProgress, "partition", partition)


@pytest.mark.parametrize(
    ("source", "samples"),
    [
        ("parquet", "all"),
        ("lines", "55"),
        pytest.param("parquet", "55", marks=pytest.mark.slow),
        pytest.param("lines", "all", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_stream_resumes_exactly(source, samples, parquet, stream, tmp_path, monkeypatch) -> None:
    data = write_json_lines(tmp_path / "d.jsonl", TEXTS)
    lines = [*stream, "distillation.dataset.name=json", f"distillation.dataset.data_files={data}"]
    mine = [*(parquet if source == "parquet" else lines), f"distillation.dataset.max_samples={samples}"]
    whole = digest(run(mine, f"distillation.teacher.cache_dir={tmp_path / 'undisturbed'}"))
    # One more may be committed after each interruption.
    for receipts in (2, 1, 1):
        with monkeypatch.context() as patched:
            stop_after(patched, receipts)
            with pytest.raises(StopError):
                run(mine)
        assert read_status(cache_dir(stream)).state in ("failed", "scored")
    assert digest(run(mine)) == whole
    assert plan_of(cache_dir(stream)) == plan_of(tmp_path / "undisturbed")


def test_a_stream_whose_driver_was_killed_equals_an_undisturbed_one(parquet, overrides, tmp_path) -> None:
    rows = [{"text": text} for text in sentences(120, seed=8)]
    data = write_json_lines(tmp_path / "many.jsonl", rows)
    lines = ["distillation.dataset.name=json", f"distillation.dataset.data_files={data}"]
    stream = [o for o in parquet if "cluster" not in o and "data_files" not in o and "dataset.name" not in o]
    mine = [*stream, *lines, "distillation.dataset.streaming_chunk_size=2", "distillation.dataset.max_samples=70"]
    whole = digest(run([*mine, "cluster=serial"], f"distillation.teacher.cache_dir={tmp_path / 'undisturbed'}"))
    local = [*mine, "distillation.cluster.dashboard_address=null"]
    driver = warm.Popen([*COMMAND, *local], start_new_session=True, stderr=subprocess.PIPE)
    receipts = cache_dir(parquet) / "receipts"
    wait_for(lambda: len(list(receipts.rglob("*.json"))) > 5, driver)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()
    assert read_status(cache_dir(parquet)).state == "stopped"
    assert digest(run([*mine, "cluster=serial"])) == whole
    assert plan_of(cache_dir(parquet)) == plan_of(tmp_path / "undisturbed")


def test_the_first_partition_is_committed_before_the_stream_is_read_beyond_the_window(stream, monkeypatch) -> None:
    read, seen = itertools.count(), []
    drawn = 0

    def rows():
        nonlocal drawn
        for i in range(400):
            drawn = next(read) + 1
            yield {"text": f"w{i % 50} red"}

    from dask_logits.job.progress import JobProgress

    original = JobProgress.partition
    monkeypatch.setattr(JobProgress, "partition", lambda self, s: (seen.append(drawn), original(self, s)))
    monkeypatch.setattr("dask_logits.job.calibration.CALIBRATION_TOKENS", 100)
    run(stream, "distillation.dataset.streaming_buffer_size=40", "distillation.cluster.wait_seconds=60", dataset=rows())
    assert len(seen) == 40
    # What the estimate peeked at comes first; then what is committed, what is in flight, and the look-ahead.
    assert seen[0] <= 256 + 50
    assert all(drawn <= max(256, 10 * (i + 1)) + 10 + 40 for i, drawn in enumerate(seen))


def test_of_many_files_only_those_that_are_needed_are_opened(stream, tmp_path, monkeypatch) -> None:
    from dask_logits.data import parquet

    (tmp_path / "many").mkdir()
    write_parquet(tmp_path / "many" / "00000.parquet", TEXTS, [50, 50])
    for i in range(1, 1000):
        shutil.copyfile(tmp_path / "many" / "00000.parquet", tmp_path / "many" / f"{i:05d}.parquet")
    opened = set()
    original = parquet.read_footer
    monkeypatch.setattr(parquet, "read_footer", lambda path: (opened.add(path), original(path))[1])
    many = [*stream, "distillation.dataset.name=parquet", f"distillation.dataset.data_files={tmp_path}/many/*.parquet"]
    cache = run(many, "distillation.dataset.max_samples=60")
    assert CacheReader(cache).n_documents == 60
    assert {Path(path).name for path in opened} == {"00000.parquet"}


def test_a_damaged_parquet_file_is_reported_and_the_rest_completes(parquet, llama, tmp_path) -> None:
    file = tmp_path / "data" / "a1.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    for _ in range(2):
        with pytest.raises(dask_logits.PartitionsFailedError, match=r"a1.parquet: expected readable Parquet") as caught:
            run(parquet)
        assert list(caught.value.reasons) == [2]
        status = read_status(cache_dir(parquet))
        assert (status.committed, status.partitions, status.state) == (6, 7, "failed")
        assert list(status.failed) == [2]
    file.write_bytes(whole)
    assert_holds(run(parquet), TEXTS, llama)


def test_damaged_rows_of_a_parquet_file_fail_alone(parquet, llama, tmp_path) -> None:
    file = tmp_path / "data" / "b1.parquet"
    whole = file.read_bytes()
    place = pq.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    file.write_bytes(whole[:place] + bytes(40) + whole[place + 40 :])
    with pytest.raises(dask_logits.PartitionsFailedError, match=r"b1.parquet, rows 9 to 20") as caught:
        run(parquet)
    assert list(caught.value.reasons) == [10]
    assert read_status(cache_dir(parquet)).committed == 11
    file.write_bytes(whole)
    assert_holds(run(parquet), TEXTS, llama)


def test_a_grown_stream_whose_further_rows_cannot_be_read_is_not_complete(parquet, llama, tmp_path) -> None:
    run([*parquet, "distillation.dataset.max_samples=58"])
    files = {name: (tmp_path / "data" / f"{name}.parquet") for name in ("b0", "b1")}
    whole = {name: file.read_bytes() for name, file in files.items()}
    for name, file in files.items():
        file.write_bytes(whole[name][:-20])
    for _ in range(2):
        with pytest.raises(dask_logits.PartitionsFailedError, match="expected readable Parquet"):
            run(parquet)
        status = read_status(cache_dir(parquet))
        assert (status.state, len(status.failed)) == ("failed", 2)
        assert verify(cache_dir(parquet)).unfinished is not None
    for name, file in files.items():
        file.write_bytes(whole[name])
    assert_holds(run(parquet), TEXTS, llama)


def test_a_truncated_gzip_in_the_middle_is_reported_and_the_rest_completes(stream, llama, tmp_path) -> None:
    (tmp_path / "data").mkdir()
    mine = [*stream, *gzipped(tmp_path / "data")]
    file = tmp_path / "data" / "1.jsonl.gz"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        dask_logits.PartitionsFailedError, match=r"row [4-7]\d: the stream broke off here .* got EOFError"
    ) as caught:
        run(mine)
    (failed,) = caught.value.reasons
    status = read_status(cache_dir(stream))
    assert failed >= 4
    assert status.committed == status.partitions - 1
    other = tmp_path / "data" / "0.jsonl.gz"
    first = other.read_bytes()
    other.write_bytes(gzip.compress(b'{"text": "another"}\n'))
    with pytest.raises(dask_logits.RunConflictError, match=r"dataset file 0: the run has '0.jsonl.gz: \d+ bytes"):
        run(mine)
    other.write_bytes(first)
    file.write_bytes(whole)
    assert_holds(run(mine), TEXTS, llama)


def test_a_generator_that_raises_keeps_what_came_before(stream, llama) -> None:
    def rows(fails: bool):
        for i, text in enumerate(TEXTS):
            if fails and i == 47:
                raise RuntimeError("the source went away")
            yield {"text": text}

    for _ in range(2):
        with pytest.raises(
            dask_logits.PartitionsFailedError, match=r"row 47: .* RuntimeError: the source went away"
        ) as caught:
            run(stream, dataset=rows(True))
        assert list(caught.value.reasons) == [5]
        assert read_status(cache_dir(stream)).committed == 5
    assert_holds(run(stream, dataset=rows(False)), TEXTS, llama)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"body": "red"}, r"dataset row 33: expected a column 'text', got \['body'\]"),
        ({"text": 5}, r"dataset row 33: expected a text, got int 5"),
        ({"text": "a\ud83d"}, r"dataset row 33: expected a text, got one that is not valid Unicode"),
        ("red", r"dataset row 33: expected a column 'text', got str"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_and_fails_its_partition_alone(row, message, stream) -> None:
    rows = [{"text": text} for text in TEXTS]
    rows[33] = row
    with pytest.raises(dask_logits.PartitionsFailedError, match=message) as caught:
        run(stream, dataset=iter(rows))
    assert list(caught.value.reasons) == [3]
    assert read_status(cache_dir(stream)).committed == 9
    before = tree(cache_dir(stream) / "receipts")
    cache = run(stream, dataset=({"text": text} for text in TEXTS))
    after = tree(cache_dir(stream) / "receipts")
    assert {name: after[name] for name in before} == before
    assert len(after) == 10
    assert CacheReader(cache).n_documents == 100


def test_a_stream_that_is_another_one_is_refused(stream, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        with pytest.raises(StopError):
            run(stream, dataset=iter(TEXTS))
    with pytest.raises(dask_logits.RunConflictError, match="expected rows 0 to 9 of the stream as they were planned"):
        run(stream, dataset=iter(["other", *TEXTS[1:]]))
    with pytest.raises(dask_logits.RunConflictError, match=r"got others, or fewer"):
        run(stream, dataset=iter(TEXTS[:5]))
    # The first rows are the same, later ones are not.
    with pytest.raises(dask_logits.RunConflictError, match="expected rows 10 to 19 of the stream"):
        run(stream, dataset=iter([*TEXTS[:15], "other", *TEXTS[16:]]))
    run(stream, dataset=iter(TEXTS))
    with pytest.raises(dask_logits.RunConflictError, match="expected rows 0 to 9 of the stream as they were planned"):
        run(stream, dataset=iter(["other", *TEXTS[1:]]))


def test_a_stream_takes_its_time_to_come_to_where_it_was(stream, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        stop_after(patched, 6)
        with pytest.raises(StopError):
            run(stream, dataset=iter(TEXTS))

    def slow():
        for i, text in enumerate(TEXTS):
            time.sleep(0.15 if 10 < i < 50 else 0)
            yield text

    assert CacheReader(run(stream, "distillation.job.stall_seconds=3", dataset=slow())).n_documents == 100


def test_a_source_that_does_not_answer_is_asked_again_and_loses_nothing(parquet, llama, monkeypatch) -> None:
    from dask_logits.data import parquet as planner
    from dask_logits.data import parquet_files as home

    original, asked = planner.read_footer, itertools.count(1)

    def flaky(refusals: int):
        def read_footer(path: str):
            if path.endswith("b0.parquet") and next(asked) <= refusals:
                raise ConnectionResetError("peer")
            return original(path)

        return read_footer

    monkeypatch.setattr(home, "_WAIT_SECONDS", (0.01, 0.01))
    monkeypatch.setattr(planner, "read_footer", flaky(5))
    with pytest.raises(dask_logits.DatasetError, match=r"b0.parquet: expected to read it, got peer; see that it can"):
        run(parquet)
    assert_holds(run(parquet), TEXTS, llama)


def test_a_stream_that_does_not_answer_is_no_damage(stream, llama) -> None:
    def rows():
        yield from TEXTS[:47]
        raise ConnectionResetError("peer")

    with pytest.raises(dask_logits.DatasetError, match="expected to read on, got ConnectionResetError: peer"):
        run(stream, dataset=rows())
    assert_holds(run(stream, dataset=iter(TEXTS)), TEXTS, llama)


def test_what_waits_before_an_updated_place_is_scored(stream, llama, tmp_path, monkeypatch) -> None:
    (tmp_path / "data").mkdir()
    mine = [*stream, *gzipped(tmp_path / "data")]
    file = tmp_path / "data" / "1.jsonl.gz"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(dask_logits.PartitionsFailedError):
        run(mine)
    for index in (1, 3, 5):
        RunFolder(cache_dir(stream)).receipt_path(index).unlink()
    file.write_bytes(whole)
    assert_holds(run(mine), TEXTS, llama)


def test_files_that_come_later_are_refused(parquet, tmp_path) -> None:
    run(parquet)
    shutil.copyfile(tmp_path / "data" / "b1.parquet", tmp_path / "data" / "b2.parquet")
    with pytest.raises(dask_logits.RunConflictError, match=r"dataset\.n_files: the run has 4, now 5"):
        run(parquet)


@pytest.mark.parametrize("change", ["size", "content", "order"])
def test_a_parquet_source_that_changed_is_refused(change, parquet, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        stop_after(patched, 4)
        with pytest.raises(StopError):
            run(parquet)
    file = tmp_path / "data" / "a0.parquet"
    if change == "size":
        write_parquet(file, TEXTS[1:12], [3, 3, 5])
    elif change == "content":
        write_parquet(file, [text[::-1] for text in TEXTS[:11]], [3, 3, 5])
    else:
        file.rename(tmp_path / "data" / "a9.parquet")
    before = tree(cache_dir(parquet) / "receipts")
    with pytest.raises(dask_logits.RunConflictError, match="dataset file"):
        run(parquet)
    assert tree(cache_dir(parquet) / "receipts") == before


def test_a_touched_parquet_file_is_the_same_file(parquet, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        stop_after(patched, 4)
        with pytest.raises(StopError):
            run(parquet)
    for file in (tmp_path / "data").iterdir():
        file.touch()
    assert read_status(run(parquet).parent).state == "complete"


def test_a_parquet_file_without_rows_that_has_some_later_is_refused(parquet, tmp_path) -> None:
    empty = tmp_path / "data" / "a2.parquet"
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), empty)
    run(parquet)
    run(parquet)
    before = tree(cache_dir(parquet))
    write_parquet(empty, ["red cat"], [1])
    with pytest.raises(dask_logits.RunConflictError, match=r"a2\.parquet: the run has '0 rows', now '1 rows'"):
        run(parquet)
    assert tree(cache_dir(parquet)) == before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (["distillation.dataset.max_samples=null"], "ConfigError", "The stream may be endless"),
        (
            ["distillation.dataset.text_column=body"],
            "DatasetError",
            r"expected one of the columns \['text'\], got 'body'",
        ),
        (["distillation.dataset.split=test"], "DatasetError", r"expected one of \['train'\], or slices and sums"),
        (["distillation.dataset.split=train[:5%]"], "DatasetError", r"expected slices by row numbers"),
        (
            ["distillation.dataset.data_files=/no/such/*.parquet"],
            "DatasetError",
            r"data_files: expected .* got '/no/such/\*\.parquet', which matches no file",
        ),
        (["distillation.dataset.data_files={empty}"], "DatasetError", "expected a Parquet file with rows, got none"),
        (
            ["distillation.dataset.name=json", "distillation.dataset.data_files={empty}"],
            "DatasetError",
            "expected a stream of rows, got no row",
        ),
    ],
)
def test_bad_streams_are_refused_and_nothing_changes_on_disk(parquet, tmp_path, changes, error, message) -> None:
    (tmp_path / "empty").write_bytes(b"")
    before = tree(tmp_path)
    with pytest.raises(getattr(dask_logits, error), match=message):
        run(parquet, *(change.format(empty=tmp_path / "empty") for change in changes))
    assert tree(tmp_path) == before
    assert not cache_dir(parquet).exists()


def test_a_stream_object_needs_a_bound_too(stream) -> None:
    with pytest.raises(dask_logits.ConfigError, match="The stream may be endless"):
        dask_logits.generate_teacher_logits(
            stream[0].partition("=")[2], iter(TEXTS), cache_dir(stream), device="cpu", top_k=4
        )
    with pytest.raises(dask_logits.DatasetError, match="expected a stream of mappings or texts, got int 3"):
        run(stream, dataset=iter([3]))
