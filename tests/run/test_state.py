"""What of a run counts as done: receipts, partitions and cache, lost, damaged, away or written meanwhile."""

from __future__ import annotations

import shutil

import pytest
from builders import cache_dir, digest, run, tree

import dask_logits
from dask_logits import read_status, verify
from dask_logits.cache.reader import CacheReader
from dask_logits.job.serial_executor import SerialExecutor
from dask_logits.observe.live import LiveRun
from dask_logits.run.consolidate import consolidate_run
from dask_logits.run.failures import Failure, note_failure
from dask_logits.run.folder import RunFolder, Share
from dask_logits.run.state import RunState, discard_stale


def test_partitions_that_are_gone_are_not_counted(here, cache) -> None:
    whole = digest(cache)
    cache.unlink()
    status = read_status(cache_dir(here))
    assert (status.state, status.committed, status.committed_rows, status.statistics.tokens) == ("stopped", 0, 0, 0)
    assert digest(run(here)) == whole


def test_a_status_that_is_read_while_the_cache_is_written_is_read_again(here, monkeypatch) -> None:
    run(here, "distillation.job.keep_partitions=true")
    folder = cache_dir(here)
    (folder / "teacher_logits.h5").unlink()
    receipt_indices = RunFolder.receipt_indices

    def consolidated_first(run):
        monkeypatch.undo()
        consolidate_run(run, keep_partitions=False)
        return receipt_indices(run)

    monkeypatch.setattr(RunFolder, "receipt_indices", consolidated_first)
    status = read_status(folder)
    assert (status.state, status.committed, status.committed_rows) == ("complete", 4, 40)


def test_a_damaged_receipt_beside_a_cache_takes_nothing_away(here, cache, caplog) -> None:
    keep = "distillation.job.keep_partitions=true"
    run(here, keep, "distillation.teacher.generation.force_regenerate=true")
    folder, whole = cache_dir(here), digest(cache)
    receipt = folder / "receipts" / "000" / "000001.json"
    for damage in (lambda: receipt.write_text("{"), receipt.unlink):
        damage()
        before = tree(folder / "partitions")
        status = read_status(folder)
        assert (status.state, status.committed, status.committed_rows) == ("complete", 4, 40)
        assert "sums leave out 1 partition of the cache, because receipts are damaged or gone" in caplog.text
        caplog.clear()
        assert digest(run(here, keep)) == whole
        assert tree(folder / "partitions") == before
        report = verify(folder)
        (problem,) = [problem for check in report.checks for problem in check.problems]
        assert problem.startswith("partition 000001: expected a receipt for its rows and arrays, got ")
        assert report.unfinished is None


def test_a_receipt_that_cannot_be_read_now_is_kept(here, cache) -> None:
    receipt = cache_dir(here) / "receipts" / "000" / "000001.json"
    run(here, "distillation.job.keep_partitions=true", "distillation.teacher.generation.force_regenerate=true")
    cache.unlink()
    aside = receipt.rename(receipt.with_suffix(".kept"))
    receipt.symlink_to(receipt)
    before = tree(cache_dir(here) / "partitions")
    for look in (read_status, lambda folder: run(here)):
        with pytest.raises(dask_logits.CacheError, match=r"000001\.json: expected to read it, got .*; see that it can"):
            look(cache_dir(here))
    assert not verify(cache_dir(here)).ok
    assert tree(cache_dir(here) / "partitions") == before
    aside.replace(receipt)
    assert run(here) == cache


@pytest.mark.parametrize("name", ["teacher_logits.h5", "partitions"])
def test_what_was_moved_to_a_disk_that_is_away_is_not_taken_for_gone(name, here, tmp_path) -> None:
    cache = run(here, "distillation.job.keep_partitions=true")
    folder, whole = cache_dir(here), digest(cache)
    if name == "partitions":
        cache.unlink()
    (folder / name).rename(tmp_path / "disk")
    (folder / name).symlink_to(tmp_path / "disk")
    (tmp_path / "disk").rename(tmp_path / "away")
    before = tree(folder / "receipts")
    with pytest.raises(dask_logits.CacheError, match="expected what it is a link to, got nothing at"):
        run(here, "distillation.job.keep_partitions=true")
    assert tree(folder / "receipts") == before
    (tmp_path / "away").rename(tmp_path / "disk")
    assert digest(run(here, "distillation.job.keep_partitions=true")) == whole


def test_a_cache_that_is_written_while_receipts_are_read_loses_none(here, monkeypatch) -> None:
    cache = run(here, "distillation.job.keep_partitions=true")
    cache.unlink()
    folder, receipt = RunFolder(cache_dir(here)), RunFolder.receipt
    before = tree(folder.path / "receipts")

    def consolidated_first(run, index):
        if index == 1:
            monkeypatch.undo()
            consolidate_run(run, keep_partitions=False)
        return receipt(run, index)

    monkeypatch.setattr(RunFolder, "receipt", consolidated_first)
    state = RunState.find(folder)
    assert state is not None
    done = discard_stale(state, Share())
    assert (done.indices, done.rows) == ({0, 1, 2, 3}, 40)
    assert done.statistics == read_status(folder.path).statistics
    assert tree(folder.path / "receipts") == before


def test_a_start_reads_each_receipt_once(scored, monkeypatch) -> None:
    scored.receipt_path(1).write_text("{")
    receipt, asked = RunFolder.receipt, []
    monkeypatch.setattr(RunFolder, "receipt", lambda run, index: asked.append(index) or receipt(run, index))
    state = RunState.find(scored)
    assert state is not None
    done = discard_stale(state, Share())
    assert (done.indices, asked) == ({0, 2, 3}, [0, 1, 2, 3])
    assert not scored.receipt_path(1).exists()


def test_a_static_worker_reads_the_receipts_of_its_share_only(scored) -> None:
    scored.receipt_path(1).unlink()
    # It cannot be read now.
    scored.receipt_path(1).symlink_to(scored.receipt_path(1))
    state = RunState.find(scored)
    assert state is not None
    assert discard_stale(state, Share(worker=0, total=2)).indices == {0, 2}
    with pytest.raises(dask_logits.CacheError, match=r"000001\.json: expected to read it, got .*; see that it can"):
        discard_stale(state, Share(worker=1, total=2))
    assert scored.receipt_path(1).is_symlink()


def test_a_grown_run_needs_no_receipts_of_what_its_cache_holds(here, tmp_path, monkeypatch) -> None:
    whole = digest(run(here, f"distillation.teacher.cache_dir={tmp_path / 'whole'}"))
    run(here, "distillation.dataset.max_samples=24")
    folder = cache_dir(here)
    (folder / "receipts" / "000" / "000000.json").unlink()
    (folder / "receipts" / "000" / "000001.json").write_text("{")
    with monkeypatch.context() as patched:
        # Ends when all is planned.
        patched.setattr(SerialExecutor, "run", lambda self, tasks, *_: list(tasks).index(0))
        with pytest.raises(ValueError, match="0 is not in list"):
            run(here)
    assert (read_status(folder).committed, read_status(folder).committed_rows) == (2, 24)
    assert verify(folder).unfinished == "2 of 4 partitions not committed"
    assert digest(run(here)) == whole
    assert sorted(path.name for path in (folder / "receipts" / "000").iterdir()) == [
        "000001.json", "000002.json", "000003.json",
    ]  # fmt: skip
    assert read_status(folder).committed == 4


def test_a_partition_with_a_damaged_receipt_is_computed_again(here, cache) -> None:
    whole, receipt = digest(cache), cache_dir(here) / "receipts" / "000" / "000001.json"
    run(here, "distillation.job.keep_partitions=true", "distillation.teacher.generation.force_regenerate=true")
    cache.unlink()
    receipt.write_text("{")
    assert read_status(cache_dir(here)).committed == 3
    report = verify(cache_dir(here))
    assert not report.ok
    assert report.unfinished == "1 of 4 partitions not committed"
    assert digest(run(here)) == whole
    assert verify(cache_dir(here)).ok


def test_a_failure_is_shown_and_retried_until_its_receipt_is_valid(here, scored) -> None:
    for index in (1, 2):
        note_failure(scored, Failure(index=index, kind="damaged", reason="its arrays changed"))
    assert read_status(scored.path).failed == {}
    shutil.rmtree(scored.partitions_path / scored.receipt(2).attempt)
    status = read_status(scored.path)
    assert (status.failed, status.committed) == ({2: "damaged: its arrays changed"}, 3)
    assert LiveRun(scored.path).read().failures.keys() == {2}
    assert f"dask-logits retry {scored.path}" in status.next_command
    dask_logits.retry(scored.path)
    assert read_status(scored.path).state == "complete"


def test_a_damaged_manifest_says_what_is_still_good(here, cache) -> None:
    (cache_dir(here) / "run.json").write_text("{")
    with pytest.raises(dask_logits.CacheError, match="restore the file from a copy; a cache beside it is read without"):
        run(here)
    assert CacheReader(cache).n_documents == 40
