"""The state of a run as its files show it: who is at work, since when, and what to run next."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import cache_dir, sentences
from test_monitor import FACTS, run_folder

from dask_logits import Monitor, RunConflictError, generate, load_config, read_status
from dask_logits.config.compose import generate_command
from dask_logits.files.atomic import replace_json
from dask_logits.files.lock import lease
from dask_logits.records import Statistics
from dask_logits.run.failures import Failure, note_failure
from dask_logits.run.folder import RunFolder, Share, lock_name

CALIBRATING = {"state": "calibrating", "step": "loading the teacher", "since": time.time() - 80}


def driver_record(folder: Path, **facts) -> None:
    """Write what a driver leaves before its calibration has ended."""
    folder.mkdir(exist_ok=True)
    replace_json(RunFolder(folder).status_path(Share()), {**FACTS, "at": time.time(), **facts})


def test_a_run_is_visible_while_it_calibrates(tmp_path) -> None:
    folder = tmp_path / "run"
    driver_record(folder, **CALIBRATING)
    (folder / lock_name(Share())).touch()
    status = read_status(folder)
    assert (status.state, status.step, status.running) == ("calibrating", "loading the teacher", 1)
    assert "\nstate         calibrating since " in "\n".join(status.lines())
    assert re.search(r"\(\d+ min \d+ s\): loading the teacher$", status.lines()[1])
    assert status.next_command == f"dask-logits status {folder}"
    shown = Monitor(folder).watch(seconds=0.01, until=0)
    assert shown is not None
    assert shown.state == "calibrating"


def test_a_driver_that_was_killed_is_not_taken_to_be_at_work(tmp_path) -> None:
    folder = tmp_path / "run"
    driver_record(folder, **CALIBRATING)
    lock = folder / lock_name(Share())
    with lease(lock):
        assert read_status(folder).state == "calibrating"
    status = read_status(folder)
    assert (status.state, status.running) == ("stopped", 0)
    assert status.reason == "the driver ended during the calibration; nothing is scored yet"
    held = f"from dask_logits.files.lock import lease\nwith lease(Path({str(lock)!r})):\n print(flush=True)\n input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"from pathlib import Path\n{held}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    assert read_status(folder).state == "calibrating"
    holder.kill()
    holder.communicate()
    assert lock.stat().st_size
    assert read_status(folder).state == "stopped"


def test_stopped_and_failed_runs_name_the_next_command(tmp_path) -> None:
    stopped = read_status(run_folder(tmp_path / "stopped", state="stopped"))
    assert (stopped.state, stopped.next_command) == ("stopped", "start the job again with the same command")
    folder = run_folder(tmp_path / "failed", state="failed", reason="no space left")
    failed = read_status(folder)
    assert (failed.state, failed.reason) == ("failed", "no space left")
    assert "reason        no space left" in failed.lines()
    note_failure(RunFolder(folder), Failure(index=0, kind="data", reason="a row"))
    assert read_status(folder).state == "failed"


def test_the_command_that_goes_on_is_made_of_the_settings_of_the_run(here, monkeypatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("dask_logits.job.run.score", stop)
        with pytest.raises(KeyboardInterrupt):
            generate(load_config(here))
    status = read_status(cache_dir(here))
    assert status.state == "stopped"
    words = shlex.split(status.next_command.replace("\\\n", " "))
    assert words[:2] == ["dask-logits", "generate"]
    assert load_config(words[2:]) == load_config(here)
    generate(load_config(words[2:]))
    complete = read_status(cache_dir(here))
    assert (complete.state, complete.since) == ("complete", None)
    run = cache_dir(here)
    assert complete.lines()[-3:] == [
        f"next          dask-logits show {run}",
        f"              dask-logits verify {run}",
        f"              training: CachedLogitsDataset('{run}'), see docs/DISTILLATION.md",
    ]


def test_the_command_that_goes_on_continues_a_forced_run_that_has_grown_and_moved(here, monkeypatch, tmp_path) -> None:
    forced = ["distillation.teacher.generation.force_regenerate=true", "distillation.dataset.max_samples=12"]
    generate(load_config([*here, *forced]))
    run_id = RunFolder(cache_dir(here)).manifest().run_id

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("dask_logits.job.driver._Driver.on_receipt", stop)
        with pytest.raises(KeyboardInterrupt):
            generate(load_config([*here, "distillation.dataset.max_samples=40"]))
    moved = RunFolder(cache_dir(here).rename(tmp_path / "moved"))
    status = read_status(moved.path)
    assert (status.state in ("stopped", "scored"), status.partitions) == (True, 4)
    words = shlex.split(status.next_command.replace("\\\n", " "))
    assert not [word for word in words if "force_regenerate" in word or "temperatures" in word]
    generate(load_config(words[2:]))
    complete = read_status(moved.path)
    assert (complete.state, complete.committed_rows) == ("complete", 40)
    assert moved.manifest().run_id == run_id
    assert not cache_dir(here).exists()


def test_no_command_is_named_for_a_stream_that_stopped_while_it_grew_to_an_unknown_number_of_rows(
    here, monkeypatch, tmp_path
) -> None:
    for i in range(3):
        pq.write_table(pa.table({"text": sentences(30, seed=i)}), tmp_path / f"{i}.parquet")
    stream = [
        *here,
        "distillation.dataset.name=parquet",
        f"distillation.dataset.data_files={tmp_path}/*.parquet",
        "distillation.dataset.streaming=true",
        "distillation.dataset.streaming_chunk_size=4",
    ]
    generate(load_config([*stream, "distillation.dataset.max_samples=12"]))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("dask_logits.job.driver._Driver.on_receipt", stop)
        with pytest.raises(KeyboardInterrupt):
            generate(load_config([*stream, "distillation.dataset.max_samples=all"]))
    stopped = read_status(cache_dir(here))
    assert (stopped.state, stopped.planned_all, stopped.rows > 12) == ("stopped", False, True)
    assert stopped.next_command == "start the job again with the same command"
    generate(load_config([*stream, "distillation.dataset.max_samples=all"]))
    assert read_status(cache_dir(here)).committed_rows == 90


def test_figures_that_are_not_finite_are_null_in_json(tmp_path) -> None:
    status = read_status(run_folder(tmp_path / "run"))
    sums = Statistics(documents=1, tokens=2, labels=1, label_logprob=-math.inf, kept_mass=1.0)
    values = json.loads(dataclasses.replace(status, statistics=sums).to_json(), parse_constant=pytest.fail)
    assert (values["perplexity"], values["kept_mass"]) == (None, 0.5)
    empty = json.loads(dataclasses.replace(status, statistics=Statistics()).to_json(), parse_constant=pytest.fail)
    assert (empty["perplexity"], empty["kept_mass"], empty["tokens_per_second"]) == (None, None, None)


def test_settings_with_special_characters_survive_the_command() -> None:
    overrides = [
        "distillation.teacher.model_path=\"my 'teacher', v1\"",
        "distillation.dataset.name=json",
        'distillation.dataset.data_files=["a=b.jsonl","true"]',
        'distillation.teacher.generation.devices="0,1"',
        'distillation.dataset.split="train[:10%]"',
        'distillation.teacher.cache_dir="runs of \\\\ and \\" \\\\\\\\"',
    ]
    config = load_config(overrides)
    command = generate_command(config.model_dump())
    assert command is not None
    assert load_config(shlex.split(command.replace("\\\n", " "))[2:]) == config
    assert generate_command({"dataset": {"name": None}}) is None


def test_a_start_that_is_refused_leaves_no_record(overrides, tmp_path) -> None:
    nowhere = ["distillation.cluster.scheduler=tcp://127.0.0.1:1", "distillation.cluster.wait_seconds=1"]
    with pytest.raises(Exception, match="expected a scheduler at"):
        generate(load_config([*overrides, *nowhere]))
    assert not list(tmp_path.iterdir())
    with pytest.raises(RunConflictError, match=r"expected a run folder with run\.json, got none"):
        read_status(cache_dir(overrides))


def test_a_record_of_a_killed_driver_does_not_keep_the_next_one_out(here) -> None:
    folder = cache_dir(here)
    driver_record(folder, **CALIBRATING)
    assert generate(load_config(here)).exists()
