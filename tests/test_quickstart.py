"""The quickstart scores what fits into a few minutes, and never less than an earlier start."""

from __future__ import annotations

import runpy
import sys

import pytest
from builders import ROOT

from dask_logits import generate, load_config

SCRIPT = str(ROOT / "scripts" / "choose_documents.py")


def choose(monkeypatch, capsys, *arguments: object) -> tuple[str, str]:
    """Return what the script prints, and how it explains it."""
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, arguments)])
    capsys.readouterr()
    runpy.run_path(SCRIPT, run_name="__main__")
    captured = capsys.readouterr()
    return captured.out.strip(), captured.err


def test_documents_are_chosen_by_the_speed_of_the_teacher(llama, corpus, tmp_path, monkeypatch, capsys) -> None:
    answer, reason = choose(monkeypatch, capsys, llama, corpus, tmp_path / "run")
    assert answer == "all"
    assert "Scoring all 40 of 40 documents" in reason
    answer, reason = choose(monkeypatch, capsys, llama, corpus, tmp_path / "run", "--seconds", "0")
    assert answer == "10"
    assert "Scoring the first 10 of 40 documents" in reason


def test_an_earlier_run_is_continued_with_its_documents(
    llama, corpus, scheduler, tmp_path, monkeypatch, capsys
) -> None:
    run = tmp_path / "run"
    overrides = [
        f"distillation.teacher.model_path={llama}", f"distillation.teacher.cache_dir={run}",
        "distillation.teacher.generation.top_k=8", "distillation.dataset.name=json",
        f"distillation.dataset.data_files={corpus}", "distillation.dataset.max_length=64",
        f"distillation.cluster.scheduler={scheduler}",
    ]  # fmt: skip
    for n, expected in (("12", "12"), ("all", "all")):
        generate(load_config([*overrides, f"distillation.dataset.max_samples={n}"]))
        answer, reason = choose(monkeypatch, capsys, llama, corpus, run, "--seconds", "0")
        assert answer == expected
        assert "continuing with these" in reason


@pytest.mark.parametrize("name", ["check", "docs.sh", "install.sh", "quickstart.sh", "test.sh"])
def test_scripts_are_valid_and_executable(name) -> None:
    import os
    import subprocess

    path = ROOT / "scripts" / name
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)
