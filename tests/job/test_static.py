"""Static workers that share a run folder or have their own, the launcher that starts them, and the merge."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warm
from builders import SuiteWorker, cache_dir, digest, run, tree
from datasets import Dataset
from filelock import SoftFileLease
from test_report import checked

import dask_logits
from dask_logits import CachedLogitsDataset, load_config, merge, parallel, read_status
from dask_logits.cache.reader import CacheReader
from dask_logits.cli import main
from dask_logits.config.groups import DatasetConfig
from dask_logits.data.arrow import open_corpus
from dask_logits.files.lock import lease
from dask_logits.job.gpus import HIDDEN
from dask_logits.observe.report import report_html
from dask_logits.run.failures import Failure, note_failure
from dask_logits.run.folder import CONSOLIDATION_LOCK, RunFolder

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "scripts" / "generate_teacher_logits_parallel.sh"
GENERATION = "distillation.teacher.generation"


def share(worker: int, total: int) -> list[str]:
    return [f"{GENERATION}.worker_id={worker}", f"{GENERATION}.total_workers={total}"]


@pytest.fixture
def small(overrides: list[str]) -> list[str]:
    """Partitions of 5 rows: 8 of them."""
    return [o for o in overrides if "partition.rows" not in o] + ["distillation.partition.rows=5"]


def job(llama: Path, corpus: Path, folder: Path, *more: str) -> Path:
    return run(
        [
            f"distillation.teacher.model_path={llama}",
            f"distillation.teacher.cache_dir={folder}",
            "distillation.teacher.generation.top_k=8",
            "distillation.teacher.generation.torch_threads=1",
            "distillation.dataset.name=json",
            f"distillation.dataset.data_files={corpus}",
            "distillation.dataset.max_length=16",
            "distillation.partition.rows=5",
            "distillation.cluster.dashboard_address=null",
            *more,
        ]
    )


@pytest.fixture(scope="module")
def whole(llama: Path, corpus: Path, suite_worker: SuiteWorker, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Content of the same job done by a cluster."""
    folder = tmp_path_factory.mktemp("whole")
    return digest(job(llama, corpus, folder, f"distillation.cluster.scheduler={suite_worker.address()}"))


@pytest.fixture(scope="module")
def made(llama: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three workers' shares in folders of their own."""
    folder = tmp_path_factory.mktemp("parts")
    for worker in range(3):
        job(llama, corpus, folder / f"worker-{worker}", *share(worker, 3))
    return folder


@pytest.fixture
def parts(made: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    shutil.copytree(made, tmp_path / "parts")
    return tmp_path / "parts"


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the launcher as a user does, in new interpreters."""
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(["bash", str(LAUNCHER), *arguments], capture_output=True, text=True, env=environment)


@pytest.fixture
def launched(monkeypatch, fork_server) -> Callable[..., int]:
    """Run the launcher in this process, and its workers as forks. Return its exit status."""
    monkeypatch.setattr(
        parallel, "subprocess", SimpleNamespace(DEVNULL=subprocess.DEVNULL, Popen=warm.Popen, run=warm.run)
    )

    def call(*arguments: str) -> int:
        with pytest.raises(SystemExit) as ended:
            parallel.main(arguments)
        return ended.value.code

    return call


def check_launched(folder: Path, errors: str, expected: str) -> None:
    """Check logs, receipts and cache of two workers."""
    assert "worker 0: done\n" in errors
    assert "worker 1: done\n" in errors
    # Each line of a worker's log is shown while the worker runs.
    for number in (0, 1):
        log = (folder / "logs" / f"worker-{number}.log").read_text().splitlines()
        assert log
        assert [f"[worker {number}] {line}" for line in log] == [
            line for line in errors.splitlines() if line.startswith(f"[worker {number}]")
        ]
    assert digest(folder / "teacher_logits.h5") == expected
    assert sorted(path.name for path in (folder / "logs").iterdir()) == ["worker-0.log", "worker-1.log"]
    owners = {json.loads(p.read_text())["partition"]: json.loads(p.read_text())["process"]
              for p in (folder / "receipts").rglob("*.json")}  # fmt: skip
    assert len({owners[i] for i in (0, 2, 4, 6)}) == len({owners[i] for i in (1, 3, 5, 7)}) == 1
    assert owners[0] != owners[1]


@pytest.mark.slow
def test_the_script_runs_workers_side_by_side_and_merges(small, whole) -> None:
    done = launch("2", "--", *small)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(cache_dir(small) / "teacher_logits.h5")
    check_launched(cache_dir(small), done.stderr, whole)


def test_the_launcher_runs_workers_side_by_side_and_merges(small, whole, launched, capfd) -> None:
    folder = cache_dir(small)
    assert launched("2", "--", *small) == 0
    check_launched(folder, capfd.readouterr().err, whole)
    before = tree(folder / "receipts")
    assert launched("2", "--", *small) == 0
    assert tree(folder / "receipts") == before


def test_the_launcher_resumes_with_the_threads_of_the_run_on_another_machine(
    small, whole, launched, monkeypatch
) -> None:
    run(small, *share(0, 2))
    monkeypatch.setattr("dask_logits.job.gpus.cores", lambda: 64)
    assert launched("2", "--", *(setting for setting in small if "torch_threads" not in setting)) == 0
    assert digest(cache_dir(small) / "teacher_logits.h5") == whole


def test_the_launcher_reports_a_worker_that_failed_and_does_the_rest_when_run_again(
    small, whole, launched, capfd
) -> None:
    folder = cache_dir(small)
    ended = threading.Event()

    def kill_the_second() -> None:
        while not (pid := SoftFileLease(folder / ".driver-1-of-2.lock").pid) and not ended.is_set():
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)

    with ThreadPoolExecutor(1) as pool:
        killer = pool.submit(kill_the_second)
        try:
            assert launched("2", "--", *small) == 1
        finally:
            ended.set()
        killer.result()
    errors = capfd.readouterr().err
    assert "worker 0: done" in errors
    assert "worker 1: failed with exit status 137" in errors
    assert not (folder / "teacher_logits.h5").exists()
    assert launched("--no-merge", "2", "--", *small) == 0
    assert read_status(folder).state == "scored"
    assert digest(merge([folder])) == whole


@pytest.mark.parametrize(
    ("visible", "arguments", "expected"),
    [
        (None, [], ["0", "1", "0"]),
        ("1", [], ["1", "1", "1"]),
        (None, ["4,5"], ["4", "5", "4"]),
        (None, [f"{GENERATION}.devices=[4,5]"], ["4", "5", "4"]),
        (None, [f"{GENERATION}.gpus_per_worker=2"], ["0,1", "0,1", "0,1"]),
        ("3,1,0,2,5", [f"{GENERATION}.gpus_per_worker=2"], ["3,1", "0,2", "3,1"]),
        (None, ["4,5,6,7", f"{GENERATION}.gpus_per_worker=2"], ["4,5", "6,7", "4,5"]),
        (None, ["4,5,6,7", f"{GENERATION}.num_workers=2"], ["4,5", "6,7", "4,5"]),
        ("", [], None),
        ("-1", [], None),
        ("NoDevFiles", [], None),
        (None, [f"{GENERATION}.device=cpu"], None),
        (None, ["distillation.cluster.kind=local_cpu"], None),
        ("", [f"{GENERATION}.num_workers=2"], None),
    ],
)
def test_the_launcher_gives_visible_gpus_and_a_share_of_the_cores(
    visible, arguments, expected, tmp_path, monkeypatch, capfd
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for module in ("gpus", "workers"):
        n_gpus = 2 if visible is None else 0 if visible in HIDDEN else len(visible.split(","))
        monkeypatch.setattr(f"dask_logits.job.{module}.visible_gpus", lambda n_gpus=n_gpus: n_gpus)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr("dask_logits.job.gpus.cores", lambda: 12)
    started: list[tuple[list[str], str | None]] = []

    def start(command: list[str], *, env: dict[str, str], **_: object) -> SimpleNamespace:
        started.append((command, env.get("CUDA_VISIBLE_DEVICES")))
        return SimpleNamespace(pid=1, poll=lambda: 0, terminate=lambda: None, wait=lambda: 0)

    monkeypatch.setattr(parallel, "subprocess", SimpleNamespace(DEVNULL=None, run=subprocess.run, Popen=start))
    job = ["distillation.teacher.model_path=a", "distillation.dataset.name=b"]
    with pytest.raises(SystemExit) as ended:
        parallel.main(["--no-merge", "3", *arguments, *job, f"distillation.teacher.cache_dir={tmp_path / 'run'}"])
    assert ended.value.code == 0
    assert [gpu for _, gpu in started] == (expected or [visible] * 3)
    where = f" on GPU {expected[0]}" if expected else ""
    assert f"worker 0: process 1{where}, log " in capfd.readouterr().err
    for command, _ in started:
        threads = 2 if f"{GENERATION}.num_workers=2" in arguments else 4
        assert f"{GENERATION}.torch_threads={threads}" in command


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--", f"{GENERATION}.gpus_per_worker=3"], "gpus_per_worker: expected 3 visible GPUs, got 0; lower it"),
        (["0,1", "--"], "devices: expected visible GPUs for '0,1', got none"),
    ],
)
def test_the_launcher_refuses_gpus_that_are_not_there(arguments, problem, small, launched, capfd) -> None:
    assert launched("2", *arguments, *small) == 2
    assert f"{GENERATION}.{problem}" in capfd.readouterr().err
    assert not cache_dir(small).exists()


@pytest.mark.parametrize("arguments", [[], ["0"], ["two"], ["2", "--merge"]])
def test_the_launcher_explains_itself(arguments) -> None:
    done = launch(*arguments)
    assert done.returncode == 2
    assert "Usage: dask-logits-parallel [OPTIONS] N [DEVICES] [SETTING=VALUE]..." in done.stderr


def test_the_launcher_refuses_a_wrong_setting_before_it_writes(small) -> None:
    done = launch("2", "--", *small, "distillation.dataset.nam=c4")
    assert done.returncode == 2
    assert "did you mean 'distillation.dataset.name'" in done.stderr
    assert not cache_dir(small).exists()


def test_retry_takes_up_what_failed_in_any_share(small, whole) -> None:
    folder = cache_dir(small)
    for worker in (1, 0):
        run(small, *share(worker, 2))
    # The one is lost, the other, of the other share, damaged.
    RunFolder(folder).receipt_path(2).unlink()
    RunFolder(folder).receipt_path(5).write_text("{")
    for index in (2, 5):
        note_failure(RunFolder(folder), Failure(index=index, kind="data", reason="odd"))
    one = {name: data for name, data in tree(folder / "receipts").items() if data != b"{"}
    assert dask_logits.retry(folder, overrides=[f"{GENERATION}.worker_id=0"]) == folder
    assert read_status(folder).failed == {5: "data: odd"}
    assert dask_logits.retry(folder) == folder
    assert read_status(folder).failed == {}
    assert tree(folder / "receipts").items() >= one.items()
    assert digest(merge([folder])) == whole


def test_a_second_driver_of_a_share_is_refused_and_another_share_is_not(small) -> None:
    folder = cache_dir(small)
    folder.mkdir()
    with (
        lease(folder / ".driver-0-of-2.lock"),
        pytest.raises(dask_logits.RunConflictError, match="only driver of share 0-of-2 of this run"),
    ):
        run(small, *share(0, 2))
    with lease(folder / ".driver-0-of-2.lock"):
        assert run(small, *share(1, 2)) == folder
    assert read_status(folder).committed == 4
    before = tree(folder)
    for other in (share(0, 3), []):
        with pytest.raises(dask_logits.RunConflictError) as caught:
            run(small, *other)
        assert list(caught.value.differences) == ["teacher.generation.total_workers"]
    with pytest.raises(
        dask_logits.RunConflictError, match=r"got gaps: partition 000000 \(worker 0 of 2\), partition 000002"
    ) as caught:
        merge([folder])
    assert tree(folder) == before


def test_parts_in_folders_of_their_own_become_one_cache(parts, whole, small, capsys) -> None:
    cache = merge([parts], num_workers=3)
    assert cache == parts / "teacher_logits.h5"
    assert digest(cache) == whole
    first = cache.stat().st_mtime_ns
    main_arguments = ["merge", "--input-dir", str(parts), "--num-workers", "3"]
    main(main_arguments)
    assert capsys.readouterr().out.strip() == str(cache)
    assert cache.stat().st_mtime_ns == first
    script = [sys.executable, str(ROOT / "scripts" / "merge_teacher_logits.py"), *main_arguments[1:]]
    assert warm.run(script).stdout.strip() == str(cache)
    assert CacheReader(cache).attributes["statistics"]["documents"] == 40
    page = checked(report_html(cache))
    assert f"tokens{CacheReader(cache).n_tokens}documents40kept mass" in page.text
    assert f"content digest{whole}" in page.text
    assert "Environment and numerics" in page.text
    assert "sleeps" in page.text, "texts are decoded with the teacher's tokenizer"


def test_an_index_over_parts_copies_nothing_twice(parts, whole, small) -> None:
    index = merge([parts], index=True)
    assert index == parts / "teacher_logits.index.json"
    caches = sorted(parts.glob("*/teacher_logits.h5"))
    assert len(caches) == 3
    before = {path: path.stat().st_mtime_ns for path in [*caches, index]}
    assert merge([parts], index=True) == index
    assert {path: path.stat().st_mtime_ns for path in before} == before
    one = merge([parts], output=parts.parent / "one.h5")
    assert digest(one) == whole
    plain = CachedLogitsDataset(one, keep_empty=True)
    for path in (index, parts, caches, caches[::-1]):
        joined = CachedLogitsDataset(path, keep_empty=True)
        assert len(joined) == len(plain) == 40
        for item, expected in zip(joined, plain, strict=True):
            assert all((item[name].numpy().tobytes() == expected[name].numpy().tobytes()) for name in expected)
    shutil.copyfile(one, caches[1])
    with pytest.raises(dask_logits.CacheError, match="merge again"):
        CachedLogitsDataset(index)
    with pytest.raises(dask_logits.CacheError, match="expected every row in one cache only, got row 0 in two"):
        CachedLogitsDataset(caches)
    caches_alone = parts.parent / "alone"
    caches_alone.mkdir()
    shutil.rmtree(parts / "worker-1")
    for i, path in enumerate(sorted(parts.glob("*/teacher_logits.h5"))):
        shutil.copyfile(path, caches_alone / f"{i}.h5")
    with pytest.raises(dask_logits.RunConflictError, match="got gaps: rows 5 to 9, rows 20 to 24, rows 35 to 39"):
        merge([caches_alone])


def test_an_index_lists_each_row_once_and_disturbs_nobody(parts) -> None:
    before = tree(parts)
    with lease(parts / "worker-1" / CONSOLIDATION_LOCK), pytest.raises(dask_logits.RunConflictError, match="worker-1"):
        merge([parts], index=True)
    assert not (parts / "worker-1" / "teacher_logits.h5").exists()
    assert not (parts / "teacher_logits.index.json").exists()
    shutil.copytree(parts / "worker-1", parts / "worker-1-copy")
    with pytest.raises(dask_logits.RunConflictError, match="--index: expected each row in one part"):
        merge([parts], index=True)
    shutil.rmtree(parts / "worker-1-copy")
    assert tree(parts).items() >= before.items()
    assert len(CachedLogitsDataset(merge([parts], index=True), keep_empty=True)) == 40


@pytest.mark.parametrize(("name", "index"), [("out", False), ("out.json", False), ("out.h5", True), ("", False)])
def test_a_name_that_no_reader_would_take_for_a_cache_is_refused(parts, name, index) -> None:
    before = tree(parts)
    with pytest.raises(dask_logits.ConfigError, match="--output: expected a file like teacher_logits"):
        merge([parts], output=parts / name, index=index, max_file_size="1KB")
    assert tree(parts) == before


def test_an_index_first_and_a_merge_after_it_leave_the_run_whole(small, scheduler, whole) -> None:
    run(small, *share(0, 2))
    run(small, *share(1, 2))
    folder = cache_dir(small)
    merge([folder], index=True)
    assert len(CachedLogitsDataset(folder / "teacher_logits.index.json", keep_empty=True)) == 40
    for _ in range(2):
        assert digest(merge([folder], num_workers=2)) == whole
    assert read_status(folder).state == "complete"


def test_parts_that_are_named_are_left_alone(parts, whole, small) -> None:
    named = [parts / f"worker-{worker}" for worker in range(3)]
    before = [tree(part) for part in named]
    for _ in range(2):
        assert merge(named) == parts / "teacher_logits.h5"
    assert digest(parts / "teacher_logits.h5") == whole
    assert [tree(part) for part in named] == before


def test_a_part_that_was_interrupted_is_told_as_gaps(parts) -> None:
    run_folder = RunFolder(parts / "worker-2")
    (run_folder.plan_path(1)).unlink()
    for receipt in run_folder.receipts(range(8)):
        if receipt.partition > 2:
            run_folder.receipt_path(receipt.partition).unlink()
    with pytest.raises(
        dask_logits.RunConflictError, match=r"got gaps: partition 000005 \(worker 2 of 3\); run the job"
    ):
        merge([parts])


def test_parts_that_leave_rows_out_or_are_of_other_rows_are_not_served_as_one(parts, small, tmp_path, corpus) -> None:
    merge([parts], index=True)
    caches = sorted(parts.glob("*/teacher_logits.h5"))
    with pytest.raises(dask_logits.CacheError, match="expected the parts of all 40 rows of the job, got 30 rows in 2"):
        CachedLogitsDataset(caches[:2])
    other = tmp_path / "other.jsonl"
    other.write_text(corpus.read_text().replace("red", "blue"))
    elsewhere = [f"distillation.dataset.data_files={other}", f"distillation.teacher.cache_dir={tmp_path / 'e'}"]
    run([*small, *share(1, 3), *elsewhere])
    with pytest.raises(dask_logits.RunConflictError, match=r"got another one:\n  plan: "):
        merge([caches[0].parent, tmp_path / "e", caches[2].parent])


def test_several_workers_write_a_dataset_in_memory_once(tmp_path, corpus) -> None:
    rows = Dataset.from_dict({"text": corpus.read_text().splitlines()})

    def write(_: int) -> list:
        return open_corpus(DatasetConfig(), rows)._materialise(RunFolder(tmp_path))

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(write, range(8)))
    assert all(files == found[0] for files in found)


def test_caches_alone_are_merged_too(parts, whole, tmp_path) -> None:
    merge([parts], index=True)
    (tmp_path / "caches").mkdir()
    for worker in range(3):
        shutil.copyfile(parts / f"worker-{worker}" / "teacher_logits.h5", tmp_path / "caches" / f"{worker}.h5")
    assert digest(merge([tmp_path / "caches"])) == whole
    assert digest(merge([tmp_path / "caches"])) == whole


def test_what_does_not_belong_together_is_not_merged(parts, small, tmp_path) -> None:
    run([*small, *share(1, 3), f"{GENERATION}.top_k=4", f"distillation.teacher.cache_dir={tmp_path / 'other'}"])
    before = tree(parts)
    with pytest.raises(dask_logits.RunConflictError, match=r"another one:\n  teacher\.generation\.top_k: 8 and 4\n"):
        merge([parts / "worker-0", tmp_path / "other", parts / "worker-2"], output=tmp_path / "x.h5")
    with pytest.raises(
        dask_logits.RunConflictError, match=r"gaps: partition 000001 \(worker 1 of 3\), partition 000004 "
    ):
        merge([parts / "worker-0", parts / "worker-2"], output=tmp_path / "x.h5")
    with pytest.raises(dask_logits.RunConflictError, match=r"--num-workers: expected the 3 workers .* got 4"):
        merge([parts], num_workers=4)
    with pytest.raises(dask_logits.CacheError, match="nothing-here: expected a cache, got nothing"):
        merge([tmp_path / "nothing-here"])
    assert tree(parts) == before
    assert not (tmp_path / "x.h5").exists()


def test_overlaps_are_taken_once_if_they_are_equal(parts, whole, tmp_path, caplog) -> None:
    shutil.copytree(parts / "worker-1", parts / "worker-1-again")
    assert digest(merge([parts])) == whole
    assert "taken once, being there more than once with equal targets: rows 5 to 9" in caplog.text
    receipt = RunFolder(parts / "worker-1-again").receipt_path(4)
    facts = json.loads(receipt.read_text())
    receipt.write_text(json.dumps({**facts, "content_digest": "0" * 64}))
    (parts / "teacher_logits.h5").unlink()
    with pytest.raises(dask_logits.RunConflictError, match="expected rows 20 to 24 once, or with equal targets"):
        merge([parts])
    assert not (parts / "teacher_logits.h5").exists()


def test_static_workers_share_a_stream(small, scheduler, tmp_path, corpus) -> None:
    stream = [
        *(o for o in small if "partition.rows" not in o),
        "distillation.dataset.streaming=true",
        "distillation.dataset.max_samples=33",
        "distillation.dataset.streaming_chunk_size=5",
    ]
    one = [*stream, f"distillation.cluster.scheduler={scheduler}", f"distillation.teacher.cache_dir={tmp_path / 'one'}"]
    expected = digest(run(one))
    run(stream, *share(1, 2))
    run(stream, *share(0, 2))
    with pytest.raises(dask_logits.RunConflictError, match="max_samples: the run has 33, now 32"):
        run(stream, *share(0, 2), "distillation.dataset.max_samples=32")
    assert digest(merge([cache_dir(small)], num_workers=2)) == expected
    assert not (cache_dir(small) / "spool").exists()


@pytest.mark.parametrize(
    ("worker", "visible", "gpus", "expected"),
    [(0, None, 4, "0"), (3, None, 4, "3"), (5, None, 4, "1"), (1, "6,7", 2, "7"), (2, "6,7", 2, "6"), (0, "3", 1, "3")],
)
def test_a_static_worker_takes_one_gpu_in_turn(worker, visible, gpus, expected, monkeypatch) -> None:
    from dask_logits.job import gpus as home
    from dask_logits.job.workers import local_workers, runs_here

    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(home, "visible_gpus", lambda: gpus)
    needed = ["distillation.teacher.model_path=t", "distillation.dataset.name=d", *share(worker, 8)]
    config = load_config(needed)
    generation = config.teacher.generation
    assert home.gpu_groups(generation) == [[expected]]
    assert local_workers(generation, config.cluster, "cuda") == 1
    assert runs_here(generation, config.cluster)
