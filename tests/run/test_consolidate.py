"""A cache in several files: what it is made of, what a crash leaves, what readers and commands make of it."""

from __future__ import annotations

import json
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import warm
from builders import cache_dir, compact, plain, records, sentences, tree, write_json_lines

from dask_logits import (
    CachedLogitsDataset,
    CacheError,
    ConfigError,
    PartitionsFailedError,
    RunConflictError,
    convert,
    generate,
    load_config,
    merge,
    read_status,
)
from dask_logits.cache.partition import write_partition
from dask_logits.cache.pieces import PartitionPiece, consolidate
from dask_logits.cache.reader import CacheReader
from dask_logits.cli import main
from dask_logits.files.atomic import read_json
from dask_logits.ops.show import card
from dask_logits.records import Statistics, total_digest
from dask_logits.run import consolidate as run_consolidate
from dask_logits.run.consolidate import consolidate_run
from dask_logits.run.folder import RunFolder
from dask_logits.run.parts import RunPart

SMALL = "distillation.cache.max_file_size=1KB"
KEEP = "distillation.job.keep_partitions=true"


def run(overrides: list[str], *more: str) -> Path:
    return generate(load_config([*overrides, *more]))


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted((folder / "teacher_logits").iterdir())}


# Code that counts the files of a folder by name, each time that one is opened. Of receipts, readings are counted.
COUNTING = """
import collections, json, sys
from pathlib import Path

counts = collections.Counter()

def count(event, arguments):
    if event == "open" and str(arguments[0]).startswith(str(folder)):
        path = Path(arguments[0])
        if "receipts" not in path.parts:
            counts[path.name] += 1
        elif arguments[1] == "r":
            counts["receipts"] += 1

sys.addaudithook(count)
"""

OPENS = (
    """
import json, sys
from pathlib import Path
from fault_points import consolidate, make_run, publish
from dask_logits import read_status
from dask_logits.ops.check import check_files
from dask_logits.run.folder import RunFolder

folder, n = Path(sys.argv[1]), int(sys.argv[2])
make_run(folder, n)
for index in range(n):
    publish(folder, index)
"""
    + COUNTING
    + """
found = {}
for act in (read_status, check_files, consolidate):
    counts.clear()
    act(folder)
    found[act.__name__] = {name: counts[name] for name in ("run.json", "calibration.json", "receipts")}
print(json.dumps(found))
"""
)


def test_files_are_opened_a_constant_number_of_times(tmp_path) -> None:
    def opens(n: int) -> dict[str, dict[str, int]]:
        command = [sys.executable, "-c", OPENS, str(tmp_path / str(n)), str(n)]
        done = warm.run(command)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    few, many = opens(3), opens(12)
    for act, counts in few.items():
        for name in ("run.json", "calibration.json"):
            assert counts[name] == many[act][name] <= 6, (act, name, few, many)
        assert counts["receipts"] / 3 == many[act]["receipts"] / 12 <= 1, (act, few, many)


OF_A_JOB = (
    """
import json, shutil, sys
from pathlib import Path
from dask_logits import generate, load_config, retry
from dask_logits.run.consolidate import consolidate_run
from dask_logits.run.failures import Failure, note_failure
from dask_logits.run.folder import RunFolder

overrides = sys.argv[1:]
config = load_config([*overrides, "distillation.job.keep_partitions=true"])
folder = Path(config.teacher.cache_dir)
run = RunFolder(folder)
found = {}
"""
    + COUNTING
    + """

def counted(name, act):
    counts.clear()
    act()
    found[name] = {file: counts[file] for file in ("run.json", "calibration.json", "receipts")}

counted("a new run", lambda: generate(config))
counted("a complete run", lambda: generate(config))
run.cache_path.unlink()
counted("a run without its cache", lambda: generate(config))
run.cache_path.unlink()
shutil.rmtree(run.partitions_path / run.receipt(1).attempt)
counted("a run without a partition", lambda: generate(config))
run.cache_path.unlink()
shutil.rmtree(run.partitions_path / run.receipt(1).attempt)
run.receipt_path(1).unlink()
note_failure(run, Failure(index=1, kind="damaged", reason="its arrays changed"))
counted("retry", lambda: retry(folder))
run.cache_path.unlink()
counted("consolidate", lambda: consolidate_run(run, keep_partitions=True))
print(json.dumps([len(run.receipt_indices()), found]))
"""
)

# How often each receipt is read: by the start, which asks what is done, by the consolidation and by the report.
READINGS = {
    "a new run": 2,
    "a complete run": 0,
    "a run without its cache": 3,
    "a run without a partition": 3,
    "retry": 3,
    "consolidate": 1,
}


def test_a_job_opens_files_a_constant_number_of_times(here) -> None:
    def opens(rows: int) -> tuple[int, dict[str, dict[str, int]]]:
        folder = f"distillation.teacher.cache_dir={cache_dir(here)}-{rows}"
        done = warm.run([sys.executable, "-c", OF_A_JOB, *here, folder, f"distillation.partition.rows={rows}"])
        assert done.returncode == 0, done.stderr
        n, found = json.loads(done.stdout.splitlines()[-1])
        return n, found

    (few, by_few), (many, by_many) = opens(14), opens(4)
    assert (few, many) == (3, 10)
    assert by_few.keys() == by_many.keys() == READINGS.keys()
    for act, counts in by_few.items():
        # A worker reads run.json before each commit.
        commits = {"run.json": many - few} if act == "a new run" else {}
        for name in ("run.json", "calibration.json"):
            assert counts[name] == by_many[act][name] - commits.get(name, 0) <= 30, (act, name, by_few, by_many)
        for n, found in ((few, counts), (many, by_many[act])):
            assert found["receipts"] <= READINGS[act] * n, (act, by_few, by_many)


def test_partitions_that_are_kept_lose_only_attempts_beside_that_of_their_receipt(here, monkeypatch) -> None:
    run(here, KEEP)
    folder, receipt = RunFolder(cache_dir(here)), RunFolder.receipt
    before, asked = tree(folder.partitions_path), []
    for name in ("000001.lost.zarr", "000009.lost.zarr"):
        shutil.copytree(folder.partitions_path / receipt(folder, 1).attempt, folder.partitions_path / name)
    monkeypatch.setattr(RunFolder, "receipt", lambda run, index: asked.append(index) or receipt(run, index))
    run(here, KEEP)
    after = tree(folder.partitions_path)
    assert {path.partition("/")[0] for path in after.keys() - before.keys()} == {"000009.lost.zarr"}
    assert after.items() >= before.items()
    assert asked == [1]


def test_a_large_cache_becomes_numbered_files_with_the_same_content(here, capsys) -> None:
    folder = cache_dir(here)
    single = run(here, KEEP)
    expected = list(CachedLogitsDataset(single, keep_empty=True))
    whole = read_status(folder)
    single.unlink()
    index = run(here, SMALL, KEEP)
    assert index == folder / "teacher_logits.index.json"
    assert not single.exists()
    assert [name[:6] for name in files(folder)] == ["00000-", "00001-", "00002-", "00003-"]
    for path in (index, folder, folder / "teacher_logits"):
        found = list(CachedLogitsDataset(path, keep_empty=True))
        assert len(found) == len(expected) == 40
        for one, other in zip(found, expected, strict=True):
            assert all(np.array_equal(one[name], other[name], equal_nan=True) for name in other)
    status = read_status(folder)
    assert (status.state, status.cache) == ("complete", str(index))
    assert (status.content_digest, status.statistics) == (whole.content_digest, whole.statistics)
    shown = card(folder)
    assert shown["files"] == 4
    assert {name: shown[name] for name in ("tokens", "content_digest", "kept_mass")} == {
        name: card_of_one for name, card_of_one in card(convert(index, folder / "one.h5", profile="plain")).items()
        if name in ("tokens", "content_digest", "kept_mass")
    }  # fmt: skip
    assert "shard" not in CacheReader(folder / "one.h5").attributes
    before = tree(folder)
    assert run(here, SMALL, KEEP) == index
    assert merge([folder]) == index
    assert tree(folder) == before
    main(["merge", str(folder), "--output", str(folder / "again.h5"), "--max-file-size", "1KB"])
    assert capsys.readouterr().out.splitlines()[-1] == str(folder / "again.index.json")
    assert json.loads((folder / "again.index.json").read_text())["content_digest"] == whole.content_digest


def test_partitions_behind_a_link_are_deleted_and_the_link_stays(here, scored, tmp_path) -> None:
    disk = scored.partitions_path.rename(tmp_path / "disk")
    scored.partitions_path.symlink_to(disk)
    (disk / "notes.txt").write_text("mine")
    run(here)
    assert [path.name for path in disk.iterdir()] == ["notes.txt"]
    assert scored.partitions_path.is_symlink()
    assert read_status(scored.path).state == "complete"


def test_the_message_of_many_damaged_partitions_counts_all_and_names_the_first_ones(here) -> None:
    run(here, KEEP, "distillation.partition.rows=1").unlink()
    folder = RunFolder(cache_dir(here))
    for attempt in folder.partitions_path.iterdir():
        (attempt / "zarr.json").write_text("{")
    with pytest.raises(PartitionsFailedError, match="expected 40 partitions as committed, got other files") as caught:
        consolidate_run(folder)
    lines = caught.value.message.splitlines()
    assert (len(lines), len(caught.value.reasons)) == (23, 40)
    assert lines[20].startswith("  partition 000019: ")
    assert lines[21] == f"  and 20 more, which `dask-logits status {folder.path}` lists"
    assert len(read_status(folder.path).failed) == 40


def test_files_are_as_large_as_allowed(here) -> None:
    folder = cache_dir(here)
    single = run(here, KEEP)
    single.unlink()
    assert run(here, KEEP, "distillation.cache.max_file_size=1GB") == single
    single.unlink()
    limit = (
        run_consolidate._FILE_BYTES + sum(piece.n_bytes for piece in RunPart.open(RunFolder(folder)).pieces) * 3 // 4
    )
    run(here, KEEP, f"distillation.cache.max_file_size={limit}")
    assert len(files(folder)) == 2
    assert all(path.stat().st_size <= limit for path in (folder / "teacher_logits").iterdir())


def test_an_index_of_many_files_needs_few_descriptors(cache, tmp_path) -> None:
    n_open, (soft, hard) = len(list(Path("/proc/self/fd").iterdir())), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 100, hard))
    try:
        run_consolidate.write_index(tmp_path / "all.index.json", [cache] * 40, n_rows=40)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(read_json(tmp_path / "all.index.json")["caches"]) == 40


def test_what_a_crash_left_is_taken_up_and_nothing_looks_complete_before_the_index(here, monkeypatch) -> None:
    folder = cache_dir(here)
    write, written = run_consolidate._write, []

    def crash(*given) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(given[0])
        write(*given)

    monkeypatch.setattr(run_consolidate, "_write", crash)
    with pytest.raises(KeyboardInterrupt):
        run(here, SMALL)
    assert read_status(folder).state == "scored"
    with pytest.raises(CacheError, match=r"expected the parts of all 40 rows of the job, got 24 rows in 2 parts"):
        CachedLogitsDataset(folder / "teacher_logits")
    before = files(folder)
    monkeypatch.setattr(run_consolidate, "_write", write)
    run(here, SMALL)
    after = files(folder)
    assert {name: after[name] for name in before} == before
    assert len(after) == 4
    assert read_status(folder).state == "complete"


def test_a_grown_run_and_another_limit_leave_no_old_files(here) -> None:
    folder = cache_dir(here)
    run(here, SMALL, "distillation.dataset.max_samples=24")
    old = files(folder)
    assert len(CachedLogitsDataset(folder, keep_empty=True)) == 24
    index = run(here, SMALL)
    assert not old.keys() & files(folder).keys()
    assert len(CachedLogitsDataset(folder, keep_empty=True)) == 40
    digest = read_status(folder).content_digest
    assert {path.name for path in folder.glob("teacher_logits*")} == {"teacher_logits", index.name}
    run(here, "distillation.teacher.generation.force_regenerate=true")
    assert {path.name for path in folder.glob("teacher_logits*")} == {"teacher_logits.h5"}
    assert read_status(folder).content_digest == digest
    assert not (folder / "previous").exists()


def test_an_index_that_disagrees_with_its_files_is_refused(here) -> None:
    folder = cache_dir(here)
    index = run(here, SMALL)
    first, second, *_ = sorted((folder / "teacher_logits").iterdir())
    bytes_of_second = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(CacheError, match="merge again"):
        CachedLogitsDataset(index)
    assert read_status(folder).state == "damaged"
    second.unlink()
    with pytest.raises(CacheError, match="expected a cache, got nothing"):
        run(here, SMALL)
    second.write_bytes(bytes_of_second)
    said = json.loads(index.read_text())
    index.write_text(json.dumps({**said, "version": 2}))
    with pytest.raises(CacheError, match=r"expected dask_logits\.index version 1, got 'dask_logits\.index' version 2"):
        CachedLogitsDataset(index)
    index.write_text(json.dumps({**said, "n_rows": 41}))
    with pytest.raises(CacheError, match=r"expected .* with 41 rows of the whole job, got 40; merge again"):
        CachedLogitsDataset(index)
    for name in ("documents", "tokens"):
        more = [{**said["caches"][0], name: 999}, *said["caches"][1:]]
        index.write_text(json.dumps({**said, "caches": more}))
        with pytest.raises(CacheError, match=rf"expected .* with 999 {name}, got \d+; merge again"):
            CachedLogitsDataset(index)
    fewer = {**said, "caches": said["caches"][:3]}
    index.write_text(json.dumps(fewer))
    with pytest.raises(CacheError, match=r"expected caches with content .* in all, got"):
        CachedLogitsDataset(index)
    fewer["content_digest"] = total_digest(entry["content_digest"] for entry in fewer["caches"])
    index.write_text(json.dumps(fewer))
    with pytest.raises(CacheError, match="expected the parts of all 40 rows"):
        CachedLogitsDataset(index)


def test_a_size_that_is_none_is_refused(here) -> None:
    for size in ("20 apples", "0", "-1GB"):
        with pytest.raises(ConfigError, match=r"distillation\.cache\.max_file_size: expected a size such as '20GB'"):
            load_config([*here, f"distillation.cache.max_file_size='{size}'"])
    with pytest.raises(ConfigError, match="expected a size"):
        merge([cache_dir(here)], max_file_size="much")


@pytest.mark.parametrize("profile", ["plain", "compact"])
def test_how_large_a_file_becomes_is_known_before(tmp_path, profile) -> None:
    made = records((400, 1_000, 30), k=16, vocab_size=5_000)
    stored = plain(16, 5_000) if profile == "plain" else compact(16, 5_000, chunk_tokens=512)
    files = write_partition(tmp_path / "p.zarr", made, stored)
    receipt = SimpleNamespace(
        first_row=0, n_rows=3, files=files, statistics=Statistics.of(made), content_digest=f"{0:064x}"
    )
    piece = PartitionPiece(path=tmp_path / "p.zarr", receipt=receipt, profile=stored)
    consolidate(tmp_path / "c.h5", lambda: [piece], profile=stored, packed=False, attributes={})
    tables = sum(table.nbytes for table in stored.tables.values())
    size = (tmp_path / "c.h5").stat().st_size
    assert size <= piece.n_bytes + tables + run_consolidate._FILE_BYTES
    assert piece.n_bytes + tables == pytest.approx(size, rel=0.2)


@pytest.mark.parametrize("theirs", [None, "1KB"])
@pytest.mark.parametrize("ours", [None, "1KB"])
def test_a_cache_of_another_job_is_never_written_over(here, tmp_path, theirs, ours) -> None:
    other = write_json_lines(tmp_path / "other.jsonl", sentences(40, seed=9))
    folders = [tmp_path / name for name in ("mine", "theirs")]
    run(here, f"distillation.teacher.cache_dir={folders[0]}", KEEP)
    more = [f"distillation.dataset.data_files={other}", f"distillation.teacher.cache_dir={folders[1]}"]
    run(here, *more, *([] if theirs is None else [SMALL]))
    before = tree(folders[1])
    for wanted in ("teacher_logits.h5", "teacher_logits.index.json"):
        indexed = wanted.endswith(".json")
        if indexed and not (folders[1] / wanted).exists():
            continue
        with pytest.raises(RunConflictError, match="expected no file, or an older cache of this job, got another"):
            merge([folders[0]], output=folders[1] / wanted, max_file_size=ours, index=indexed)
    assert tree(folders[1]).items() >= before.items()


def test_numbered_files_that_a_cache_is_made_of_are_left(here, tmp_path) -> None:
    folder = cache_dir(here)
    run(here, SMALL)
    parts = tmp_path / "parts"
    shutil.copytree(folder / "teacher_logits", parts)
    before = tree(parts)
    merge([parts], output=tmp_path / "parts.h5")
    assert tree(parts).items() >= before.items()
    assert len(CachedLogitsDataset(tmp_path / "parts.h5", keep_empty=True)) == 40
