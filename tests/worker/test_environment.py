"""What decides the last bits of targets is stated, and differences are named with their fixes."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from dask_logits import TeacherError
from dask_logits.job.retry_policy import classify
from dask_logits.run.plan import Partition
from dask_logits.worker import environment as module
from dask_logits.worker.environment import describe, differences, environment, fix_for
from dask_logits.worker.task import PartitionTask, process_partition


def test_an_environment_states_packages_sources_and_instruction_set() -> None:
    here = environment("cpu")
    assert list(here) == ["dask_logits", "torch", "transformers", "tokenizers", "cpu"]
    assert "sources " in here["dask_logits"]
    code = "from dask_logits.worker.environment import environment; print(environment('cpu')['cpu'])"
    lesser = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    said = subprocess.run([sys.executable, "-c", code], env=lesser, capture_output=True, text=True, check=True).stdout
    assert said.strip().endswith(" DEFAULT")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_worker_without_a_gpu_is_the_cause_and_not_a_partition(tmp_path) -> None:
    fields = dict.fromkeys(field.name for field in dataclasses.fields(PartitionTask))
    partition = Partition(index=0, first_row=0, n_rows=1)
    teacher = SimpleNamespace(device="cuda")
    task = PartitionTask(**{**fields, "run": str(tmp_path), "partition": partition, "teacher": teacher})
    with pytest.raises(TeacherError, match="expected a CUDA device in this worker, got none") as caught:
        process_partition(task)
    assert classify(caught.value) == "device"


def test_a_changed_source_is_another_environment(tmp_path, monkeypatch) -> None:
    (tmp_path / "worker").mkdir()
    (tmp_path / "records.py").write_text("one = 1\n")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "worker" / "environment.py"))
    before = module._source_digest()
    (tmp_path / "records.py").write_text("one = 2\n")
    assert module._source_digest() != before


def test_differences_are_named_with_what_to_do() -> None:
    run = {"torch": "2.13.0", "cpu": "x86_64 AVX2"}
    assert differences(run, run) == {}
    differing = differences(run, {"torch": "2.12.0", "gpu": "A100"})
    assert describe(differing) == (
        "cpu: expected x86_64 AVX2, got none; gpu: expected none, got A100; torch: expected 2.13.0, got 2.12.0"
    )
    assert fix_for(differing) == (
        "use machines with one instruction set, and unset ATEN_CPU_CAPABILITY; use GPUs of one model; "
        "install the same packages on every machine"
    )
