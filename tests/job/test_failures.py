"""One bad partition: what it leaves behind, who names its row, and that the others do not suffer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import dask
import pytest
from builders import cache_dir, digest, small_job, tree
from distributed import Client, LocalCluster, WorkerPlugin

import dask_logits
from dask_logits import CacheError, CapacityError, PartitionsFailedError, generate, load_config, read_status, retry
from dask_logits.cache import partition
from dask_logits.cache.reader import CacheReader
from dask_logits.cli import main
from dask_logits.job import run as home
from dask_logits.run.failures import read_failures
from dask_logits.run.folder import RunFolder

SMALL = "distillation.partition.rows=4"


class Poison(WorkerPlugin):
    """Makes a row deadly in every worker, restarted ones too, while a flag file is there."""

    def __init__(self, flag: Path, row: int, act: str) -> None:
        self.flag, self.row, self.act = flag, row, act

    def setup(self, worker) -> None:
        from dask_logits.data import tokens
        from dask_logits.worker import task

        read, write, flag, row, act = tokens.read_documents, task.write_partition, self.flag, self.row, self.act

        def read_poison(rows, spec, *, first_row=0):
            if flag.exists() and first_row <= row < first_row + len(rows):
                import time

                if act == "die":
                    os._exit(1)
                if act == "hang":
                    time.sleep(120)
                if act == "hold":
                    # Backtracks for ever, with Python's lock in its hands.
                    re.match("(a+)+$", "a" * 64 + "b")
                if act == "raise":
                    raise ValueError("odd text")
            return read(rows, spec, first_row=first_row)

        def write_full(attempt, records, *given):
            files = write(attempt, records, *given)
            if flag.exists() and act == "full" and row in records.document_row:
                raise OSError(28, "No space left on device")
            return files

        task.read_documents = tokens.read_documents = read_poison
        task.write_partition = write_full


@contextlib.contextmanager
def poisoned(folder: Path, row: int, act: str, *, threads: int = 2, workers: int = 1) -> Iterator[tuple[str, Path]]:
    """Give the address of a cluster in which a row is deadly, and the flag."""
    flag = folder / "flag"
    flag.touch()
    settings = {
        "distributed.scheduler.allowed-failures": 1,
        "distributed.scheduler.worker-saturation": 1.0,
        "distributed.deploy.lost-worker-timeout": "1 day",
    }
    with dask.config.set(settings):
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=threads,
            memory_limit=None,
            dashboard_address="127.0.0.1:0",
            host="127.0.0.1",
        )
        try:
            with Client(cluster) as client:
                client.register_plugin(Poison(flag, row, act))
                yield cluster.scheduler_address, flag
        finally:
            # distributed 2026.7.1 may hang in closing a cluster whose worker has died.
            with contextlib.suppress(TimeoutError):
                cluster.close(timeout=10)


@pytest.fixture(scope="module")
def expected(llama, corpus, tmp_path_factory) -> str:
    """Content digest of an undisturbed run."""
    undisturbed = small_job(llama, corpus, tmp_path_factory.mktemp("whole"))
    return digest(generate(load_config([*undisturbed, SMALL, "cluster=serial"])))


@pytest.mark.parametrize(
    ("act", "kind", "reason"),
    [
        pytest.param("die", "worker-death", "its worker died 2 times", marks=pytest.mark.slow),
        ("raise", "data", "odd text"),
        pytest.param(
            "hang",
            "hang",
            "no sign of life for 25 s (distillation.job.stall_seconds), on its own, too",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_deadly_row_is_quarantined_and_named(overrides, expected, tmp_path, act, kind, reason, capsys) -> None:
    with poisoned(tmp_path, 17, act) as (address, flag):
        run = cache_dir(overrides)
        patience = "distillation.job.stall_seconds=25" if act == "hang" else "distillation.job.stall_seconds=60"
        config = load_config([*overrides, SMALL, f"distillation.cluster.scheduler={address}", patience])
        with pytest.raises(PartitionsFailedError) as caught:
            generate(config)
        assert caught.value.reasons == {4: reason}
        assert f"dask-logits retry {run}" in str(caught.value)
        entry = read_failures(RunFolder(run), lambda indices: ())[4]
        assert (entry.kind, entry.reason, entry.rows) == (kind, reason, ())
        signs = {"die": "last worker tcp://", "raise": "ValueError: odd text", "hang": "worker tcp://"}
        assert signs[act] in entry.evidence
        assert all(re.fullmatch(r"tcp://\S+ on \S+", worker) for worker in entry.workers)
        assert entry.workers
        status = read_status(run)
        assert (status.state, status.committed, status.failed) == ("failed", 9, {4: f"{kind}: {reason}"})
        before = {name: data for name, data in tree(run).items() if name.startswith("receipts")}

        if act != "hang":
            with pytest.raises(SystemExit) as exit_status:
                main(["retry", str(run), "--bisect"])
            assert exit_status.value.code == 1
            assert "because of dataset rows 17" in capsys.readouterr().err
            assert read_status(run).failed == {4: f"{kind}: {reason} (dataset rows 17)"}
        assert {name: data for name, data in tree(run).items() if name.startswith("receipts")} == before

        flag.unlink()
        assert CacheReader(retry(run)).attributes["content_digest"] == expected
    assert not list((run / "failures").iterdir())
    assert read_status(run).failed == {}


@pytest.mark.slow
@pytest.mark.parametrize("act", ["hold", "hang"])
def test_a_hanging_partition_does_not_hold_up_other_workers(joined, overrides, tmp_path, act) -> None:
    # Two workers: while one hangs, the other goes on, and the stall is seen all the same.
    single = "distillation.partition.rows=1"
    # The calibration is not what must be soon.
    generate(load_config([*joined, single])).unlink()
    shutil.rmtree(cache_dir(overrides) / "receipts")
    with poisoned(tmp_path, 3, act, workers=2, threads=1) as (address, _):
        more = [f"distillation.cluster.scheduler={address}", single, "distillation.job.stall_seconds=40"]
        with pytest.raises(PartitionsFailedError) as caught:
            generate(load_config([*overrides, *more]))
        assert list(caught.value.reasons) == [3]
    assert read_status(cache_dir(overrides)).committed == 39


def test_without_room_the_job_stops_and_resumes_when_there_is(overrides, expected, tmp_path) -> None:
    with poisoned(tmp_path, 30, "full", threads=1) as (address, flag):
        config = load_config([*overrides, SMALL, f"distillation.cluster.scheduler={address}"])
        with pytest.raises(CapacityError, match=r"expected room to write partition 000007, got 'No space left") as no:
            generate(config)
        assert no.value.ran
        assert read_status(cache_dir(overrides)).committed == 7
        assert len(list((cache_dir(overrides) / "partitions").iterdir())) == 7
        flag.unlink()
        assert CacheReader(generate(config)).attributes["content_digest"] == expected


def with_room_for(kib: int | None, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command that can write no file larger than so many KiB; its workers are elsewhere."""
    limit = "" if kib is None else f"ulimit -f {kib}; "
    words = ["bash", "-c", f'{limit}exec "$@"', "bash", sys.executable, "-m", "dask_logits", *command]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "hf")}
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_without_room_for_the_drivers_own_files_it_says_so_and_resumes(joined, expected, tmp_path) -> None:
    run, job = cache_dir(joined), ["generate", *joined, SMALL]
    # So that the dataset is in the cache of its library.
    assert with_room_for(None, tmp_path, "plan", *job[1:]).returncode == 0
    message = r"expected to be able to write .*, got 'File too large'; whatever was complete before is good: make room"
    refused = with_room_for(1, tmp_path, *job)
    assert (refused.returncode, run.exists()) == (2, False)
    assert re.search(message, refused.stderr), refused.stderr
    # Enough for everything but the cache, which HDF5 writes.
    full = with_room_for(8, tmp_path, *job)
    assert full.returncode == 1
    assert re.search(message, full.stderr), full.stderr
    assert read_status(run).committed == 10
    assert not [path for path in run.rglob("*") if path.suffix in (".h5", ".tmp")]
    cache = generate(load_config(job[1:]))
    assert CacheReader(cache).attributes["content_digest"] == expected
    target = tmp_path / "other" / "c.h5"
    for command in (["convert", str(cache), str(target), "--profile=plain"], ["merge", str(run), f"--output={target}"]):
        full = with_room_for(8, tmp_path, *command)
        assert re.search(message, full.stderr), full.stderr
        assert not target.exists()


def test_a_run_of_a_python_object_is_taken_up_with_this_object_only(here) -> None:
    rows = [{"text": "red cat"}, {"text": "the sea"}]
    named = ("dataset.name", "data_files")
    generate(load_config([o for o in here if not any(name in o for name in named)], dataset_given=True), rows)
    folder = cache_dir(here)
    with pytest.raises(
        dask_logits.RunConflictError, match=r"got one of a Python object; call dask_logits\.retry with the run"
    ):
        retry(folder)
    assert retry(folder, rows) == folder / "teacher_logits.h5"
    with pytest.raises(dask_logits.RunConflictError, match=r"of a Python object; verify it without --recompute"):
        dask_logits.verify(folder, recompute=1)


@pytest.mark.slow
def test_without_room_for_the_cache_of_datasets_its_folder_is_named(joined, tmp_path) -> None:
    for command in ("plan", "generate"):
        full = with_room_for(1, tmp_path, command, *joined)
        assert (full.returncode, cache_dir(joined).exists()) == (2, False), full.stderr
        assert f"{tmp_path / 'hf'}: expected to write the cache of datasets, got 'File too large'" in full.stderr


@pytest.mark.parametrize("cut", [-1, *(pytest.param(cut, marks=pytest.mark.slow) for cut in (0, 10))])
def test_partitions_that_changed_on_disk_are_taken_back_and_computed_again(joined, expected, cut) -> None:
    keep = load_config([*joined, SMALL, "distillation.job.keep_partitions=true"])
    cache = generate(keep)
    run = cache_dir(joined)
    cache.unlink()
    attempt = json.loads((run / "receipts" / "000" / "000002.json").read_text())["attempt"]
    shard = next(path for path in (run / "partitions" / attempt / "topk_ids" / "c").rglob("*") if path.is_file())
    shard.write_bytes(shard.read_bytes()[:cut])
    with pytest.raises(PartitionsFailedError, match="expected 1 partition as committed") as caught:
        generate(keep)
    assert list(caught.value.reasons) == [2]
    assert not cache.exists()
    assert read_status(run).failed[2].startswith("damaged: ")
    assert CacheReader(generate(keep)).attributes["content_digest"] == expected
    assert read_status(run).failed == {}


def test_partitions_that_cannot_be_read_for_a_while_are_not_taken_back(joined, expected, monkeypatch) -> None:
    def fail(file: Path) -> int:
        raise OSError(5, "Input/output error")

    run = cache_dir(joined)
    with monkeypatch.context() as patched:
        patched.setattr(partition, "_crc32", fail)
        with pytest.raises(CacheError, match=r"expected to read it, got \[Errno 5\].*check the disk") as caught:
            # Workers write in another process, where nothing fails.
            generate(load_config([*joined, SMALL]))
    assert caught.value.ran
    assert (read_status(run).committed, read_status(run).failed) == (10, {})
    before = tree(run / "receipts")
    assert CacheReader(generate(load_config([*joined, SMALL]))).attributes["content_digest"] == expected
    assert tree(run / "receipts") == before


def test_the_message_of_many_failures_counts_all_and_names_the_first_ones(tmp_path) -> None:
    failed = {index: f"row {index}" for index in range(50_000)}
    error = home._failure(failed, SimpleNamespace(run=RunFolder(tmp_path)))
    assert error.reasons == failed
    lines = error.message.splitlines()
    assert lines[0].startswith("50,000 of ")
    assert lines[20] == "  partition 000019: row 19"
    assert lines[21] == f"  and 49,980 more, which `dask-logits status {tmp_path}` lists"
    assert len(lines) == 23


def test_retry_says_when_there_is_nothing_to_take_up(joined, tmp_path, capsys) -> None:
    run = cache_dir(joined)
    with pytest.raises(dask_logits.RunConflictError, match=r"expected a run folder with run\.json, got none"):
        retry(run)
    cache = generate(load_config(joined))
    assert retry(run) == cache
    cache.unlink()
    (run / "receipts" / "000" / "000001.json").unlink()
    before = tree(run)
    with pytest.raises(dask_logits.RunConflictError, match="expected partitions that failed, got none"):
        retry(run)
    for given, message in [
        ("distillation.teacher.generation.top_k=3", "expected partitions that failed"),
        (
            "distillation.cluster.kin=x",
            "distillation.cluster.kin: unknown setting, did you mean 'distillation.cluster.kind'?",
        ),
        ("cluster=local_cpu", "expected distillation.SETTING=VALUE"),
    ]:
        with pytest.raises(SystemExit) as caught:
            main(["retry", str(run), given])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
    assert tree(run) == before
