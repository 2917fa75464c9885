"""What decides the last bits of targets is stated, and differences are named with their fixes."""

from __future__ import annotations

import os
import subprocess
import sys

from dask_logits.worker import environment as module
from dask_logits.worker.environment import describe, differences, environment, fix_for


def test_an_environment_states_packages_sources_and_instruction_set() -> None:
    here = environment("cpu")
    assert list(here) == ["dask_logits", "torch", "transformers", "tokenizers", "cpu"]
    assert "sources " in here["dask_logits"]
    code = "from dask_logits.worker.environment import environment; print(environment('cpu')['cpu'])"
    lesser = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    said = subprocess.run([sys.executable, "-c", code], env=lesser, capture_output=True, text=True, check=True).stdout
    assert said.strip().endswith(" DEFAULT")


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
