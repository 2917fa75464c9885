"""SIGKILL at the steps of publishing a partition and of writing the cache: what is left is whole or invisible."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import warm
from builders import tree
from fault_points import PARTITIONS, STUBS, consolidate, make_run, publish

from dask_logits import CachedLogitsDataset, CacheError
from dask_logits.cache.partition import PartitionReader
from dask_logits.cache.profile import load_profile
from dask_logits.cache.reader import CacheReader
from dask_logits.run.folder import RunFolder
from dask_logits.run.records import Receipt
from dask_logits.run.state import RunState
from dask_logits.worker import task as task_module

SCRIPT = Path(__file__).with_name("fault_points.py")


@pytest.fixture(autouse=True)
def _stubs_are_undone(monkeypatch) -> None:
    for name in STUBS:
        monkeypatch.setattr(task_module, name, getattr(task_module, name))


def killed(act: str, base: Path, stride: int) -> list[tuple[Path, str]]:
    """Kill the act at every n-th step and each of the last; return what is left, and where it was killed."""
    done = warm.run([sys.executable, str(SCRIPT), act, str(base), str(stride)], timeout=3600)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in done.stdout.splitlines()]
    return [(base.with_name(f"{base.name}.{step['step']}"), step["at"]) for step in steps]


def receipts(run: RunFolder) -> list[Receipt]:
    state = RunState.find(run)
    assert state is not None
    return list(state.committed())


# Every step takes minutes.
STRIDES = pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.slow)])


@STRIDES
def test_a_partition_is_there_whole_or_not_at_all(tmp_path, stride) -> None:
    whole = make_run(tmp_path / "whole")
    publish(whole.path)
    (expected,) = receipts(whole)
    make_run(tmp_path / "run")
    left = killed("publish", tmp_path / "run", stride)
    # Every array's files, the flushes, the receipt's temporary file, its link, and the removal of that.
    assert len(left) > 25
    assert {"fsync", "os.link"} <= {at.split()[0] for _, at in left}
    seen = set()
    for folder, at in left:
        run = RunFolder(folder)
        found = receipts(run)
        seen.add(len(found))
        for receipt in found:
            PartitionReader(run.partitions_path / receipt.attempt, load_profile(run.profile())).check(receipt.files)
        publish(folder)
        (again,) = receipts(run)
        assert again.content_digest == expected.content_digest, at
        assert not found or again == found[0], at
    assert seen == {0, 1}


@STRIDES
@pytest.mark.parametrize("older", [False, True])
def test_a_cache_is_there_whole_or_not_at_all(tmp_path, older, stride) -> None:
    run = make_run(tmp_path / "run")
    for index in range(PARTITIONS):
        publish(run.path, index)
    shutil.copytree(run.path, tmp_path / "whole")
    consolidate(tmp_path / "whole")
    expected = CacheReader(tmp_path / "whole" / "teacher_logits.h5").attributes["content_digest"]
    if older:
        # Killed between the rename and the removal of the partitions.
        shutil.copy(tmp_path / "whole" / "teacher_logits.h5", run.cache_path)
    left = killed("consolidate", run.path, stride)
    assert len(left) > (3 if older else 25)
    for folder, at in left:
        cache = folder / "teacher_logits.h5"
        if cache.exists():
            CacheReader(cache).verify_checksums()
            assert len(CachedLogitsDataset(cache, keep_empty=True)) == 15
        else:
            with pytest.raises(CacheError):
                CachedLogitsDataset(folder)
        consolidate(folder)
        assert CacheReader(cache).attributes["content_digest"] == expected, at
        assert not [name for name in tree(folder) if name.endswith(".tmp")], at
        assert not (folder / "partitions").exists()


def test_many_attempts_at_once_leave_one_result(tmp_path) -> None:
    run = make_run(tmp_path / "run")
    children = []
    for _ in range(4):
        code = f"import sys; sys.path[:0] = {[str(SCRIPT.parent), str(SCRIPT.parents[1])]!r}\n"
        code += f"from pathlib import Path; from fault_points import publish; publish(Path({str(run.path)!r}), 1)"
        children.append(warm.Popen([sys.executable, "-c", code]))
    assert [child.wait(120) for child in children] == [0] * 4
    receipt = run.receipt(1)
    assert [path.name for path in run.partitions_path.iterdir()] == [receipt.attempt]
    PartitionReader(run.partitions_path / receipt.attempt, load_profile(run.profile())).check(receipt.files)


@pytest.mark.parametrize("linked", [False, True])
def test_an_attempt_whose_receipt_cannot_be_written_is_not_left(tmp_path, linked) -> None:
    run = make_run(tmp_path / "run")
    code = f"""
import sys; sys.path[:0] = {[str(SCRIPT.parent), str(SCRIPT.parents[1])]!r}
from pathlib import Path
import fault_points
from dask_logits.worker import task
create = task.create_json
def fail(path, value):
    if {linked}:
        create(path, value)
    raise OSError(5, "Input/output error")
task.create_json = fail
fault_points.publish(Path({str(run.path)!r}), 1)
"""
    done = warm.run([sys.executable, "-c", code])
    assert "Input/output error" in done.stderr
    # It may have been written, and only its folder not flushed.
    names = [run.receipt(1).attempt] if linked else []
    assert [path.name for path in run.partitions_path.iterdir()] == names
