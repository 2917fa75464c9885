"""Forced starts: the old run stays until the new one is complete, whatever interrupts them."""

from __future__ import annotations

import json
import os

import pytest
from builders import cache_dir, digest, items, nan_teacher, run, tree, write_json_lines

import dask_logits
from dask_logits import CachedLogitsDataset, read_status
from dask_logits.cache.reader import CacheReader
from dask_logits.errors import CacheError, RunConflictError
from dask_logits.files.lock import lease
from dask_logits.run.folder import RUN_NAMES


def test_a_late_receipt_of_a_run_that_was_replaced_is_not_taken(here, cache) -> None:
    whole, receipt = digest(cache), cache_dir(here) / "receipts" / "000" / "000002.json"
    cache.unlink()
    stale = json.loads(receipt.read_text()) | {"run_id": "another"}
    receipt.write_text(json.dumps(stale))
    assert digest(run(here)) == whole
    assert json.loads(receipt.read_text())["run_id"] != "another"


@pytest.mark.parametrize("moved", [0, 1, 3, 5])
def test_a_replacement_cut_off_while_the_old_run_is_moved_leaves_the_old_run(here, cache, moved) -> None:
    whole, run_folder = digest(cache), cache_dir(here)
    aside = run_folder / ".setting-aside"
    aside.mkdir()
    for name in [name for name in RUN_NAMES if (run_folder / name).exists()][:moved]:
        (run_folder / name).replace(aside / name)
    assert digest(run(here)) == whole
    assert not aside.exists()
    assert not (run_folder / "previous").exists()


def test_a_replacement_that_was_not_tidied_up_is_not_taken_for_an_unfinished_one(here, cache) -> None:
    run_folder = cache_dir(here)
    (run_folder / "previous").mkdir()
    (run_folder / "previous" / "run.json").write_text("{}")
    (run_folder / "previous" / ".set-aside").touch()
    new = run(here, "distillation.teacher.generation.force_regenerate=true", "distillation.teacher.generation.top_k=4")
    assert CacheReader(new).top_k == 4
    assert not (run_folder / "previous").exists()


def test_a_folder_that_only_has_the_name_of_a_replaced_run_is_left_alone(here) -> None:
    own = cache_dir(here) / "previous" / "results.h5"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    before = digest(run(here))
    assert own.read_text() == "mine"
    there = tree(cache_dir(here))
    with pytest.raises(RunConflictError, match="previous: expected no such folder"):
        run(here, "distillation.teacher.generation.force_regenerate=true")
    assert tree(cache_dir(here)) == there
    assert digest(run(here)) == before


@pytest.mark.parametrize("forced", [(), ("distillation.teacher.generation.force_regenerate=true",)])
def test_a_cut_cache_is_made_anew_by_force_or_after_it_was_deleted(here, forced) -> None:
    cache = run(here, *forced)
    whole = digest(cache)
    os.truncate(cache, cache.stat().st_size // 2)
    with pytest.raises(CacheError, match="delete it and run the job again"):
        run(here)
    if forced:
        assert digest(run(here, *forced)) == whole
    else:
        cache.unlink()
        assert digest(run(here)) == whole


def test_force_keeps_the_old_run_until_the_new_one_is_complete(here, cache, monkeypatch) -> None:
    old, run_folder = digest(cache), cache_dir(here)
    force = ["distillation.teacher.generation.force_regenerate=true", "distillation.teacher.generation.top_k=4"]

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("dask_logits.job.run.consolidate_run", stop)
        with pytest.raises(KeyboardInterrupt):
            run(here, *force)
    assert digest(run_folder / "previous" / "teacher_logits.h5") == old
    assert read_status(run_folder).state == "scored"
    receipts = tree(run_folder / "receipts")
    new = run(here, *force)
    assert tree(run_folder / "receipts") == receipts, "an interrupted replacement is resumed, not begun again"
    assert CacheReader(new).top_k == 4
    assert not (run_folder / "previous").exists()


def test_a_forced_start_in_an_empty_folder_goes_on_where_it_was(here, monkeypatch) -> None:
    run_folder = cache_dir(here)
    force = "distillation.teacher.generation.force_regenerate=true"
    with monkeypatch.context() as patched:
        patched.setattr("dask_logits.job.run.consolidate_run", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(here, force)
    receipts = tree(run_folder / "receipts")
    whole = digest(run(here, force))
    assert tree(run_folder / "receipts") == receipts
    # Complete, it is begun again; and what was allowed for that start is not what a retry does.
    made = json.loads((run_folder / "run.json").read_text())["run_id"]
    assert digest(run(here, force)) == whole
    manifest = json.loads((run_folder / "run.json").read_text())
    assert manifest["run_id"] != made
    assert manifest["how"]["teacher"]["generation"]["force_regenerate"] is True
    before = tree(run_folder)
    dask_logits.retry(run_folder)
    assert tree(run_folder) == before


def test_a_replacement_with_partitions_behind_a_link_begins_again(here, cache, tmp_path, monkeypatch) -> None:
    force, partitions = "distillation.teacher.generation.force_regenerate=true", cache_dir(here) / "partitions"

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("dask_logits.job.run.consolidate_run", stop)
        with pytest.raises(KeyboardInterrupt):
            run(here, force, "distillation.teacher.generation.top_k=4")
    disk = partitions.rename(tmp_path / "disk")
    partitions.symlink_to(disk)
    new = run(here, force, "distillation.teacher.generation.top_k=3")
    assert CacheReader(new).top_k == 3
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("name", [".driver-0-of-2.lock", ".consolidate.lock"])
def test_a_run_that_somebody_is_at_work_on_is_not_replaced(here, overrides, name) -> None:
    share = ["distillation.teacher.generation.worker_id=1", "distillation.teacher.generation.total_workers=2"]
    run(overrides, *share)
    before = tree(cache_dir(here))
    with (
        lease(cache_dir(here) / name),
        pytest.raises(dask_logits.RunConflictError, match="expected to be the only driver of"),
    ):
        run(here, "distillation.teacher.generation.force_regenerate=true")
    assert tree(cache_dir(here)).items() >= before.items()
    assert not (cache_dir(here) / "previous").exists()


def test_a_replacement_that_goes_on_with_other_data_begins_again(here, cache, corpus, tmp_path, monkeypatch) -> None:
    from dask_logits.job import run as home

    data = tmp_path / "d.jsonl"
    force = ["distillation.teacher.generation.force_regenerate=true", f"distillation.dataset.data_files={data}"]
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    write_json_lines(data, [f"{text} red" for text in texts])
    with monkeypatch.context() as patched:
        patched.setattr(home, "consolidate_run", stop)
        with pytest.raises(KeyboardInterrupt):
            run(here, *force)
    with pytest.raises(dask_logits.CacheError, match=r"expected teacher_logits\.h5 in it"):
        CachedLogitsDataset(cache_dir(here))
    write_json_lines(data, [f"{text} blue" for text in texts])
    found = items(CacheReader(run(here, *force)))
    assert {int(item["input_ids"][-1]) for item in found if len(item["input_ids"]) < 16} == {3}


def test_force_refused_by_the_teacher_leaves_the_old_run(here, cache, tmp_path) -> None:
    before = tree(cache_dir(here))
    bad = nan_teacher(tmp_path / "bad", "red")
    with pytest.raises(dask_logits.TeacherError, match="expected finite logits"):
        run(here, "distillation.teacher.generation.force_regenerate=true", f"distillation.teacher.model_path={bad}")
    assert tree(cache_dir(here)) == before
