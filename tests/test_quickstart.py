"""The quickstart scores what fits into a few minutes, and never less than an earlier start."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
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
    path = ROOT / "scripts" / name
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize(
    ("name", "answers", "message"),
    [
        (
            "bin/python3",
            "-c) exit 1 ;;",
            "Python 3.11 to 3.13, got Python 3.10.4 as python3; put such a Python",
        ),
        (".venv/bin/python", "-c) exit 1 ;;", "got Python 3.10.4 as .venv/bin/python; put such a Python first in PATH"),
        (
            "bin/python3",
            "-m) exit 1 ;;",
            "make .venv, which failed; on Debian and Ubuntu install python3-venv",
        ),
    ],
    ids=["python", "venv", "no-venv"],
)
def test_an_unusable_python_is_refused_before_the_download(tmp_path, name, answers, message) -> None:
    (tmp_path / "scripts").mkdir()
    for copied in ("scripts/install.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / copied, tmp_path / copied)
    python = tmp_path / name
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/bash\ncase $1 in\n{answers}\n--version) echo Python 3.10.4 ;;\nesac\n")
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(tmp_path / "scripts" / "install.sh"), "quickstart"], capture_output=True, text=True,
        env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 1
    assert message in done.stderr
    assert "PyTorch" not in done.stderr
