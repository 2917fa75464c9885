"""The wheel and the sdist work without the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from builders import ROOT, sentences, write_json_lines


def build(target: str, source: Path, out: Path) -> Path:
    """Build one distribution, without an index and without a change to the source."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = out.glob("*.whl" if target == "wheel" else "*.tar.gz")
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


_ASSETS = ("page.css", "cell.css", "live.js", "explore.css", "explore.html", "explore.js")


def contents(wheel: Path) -> dict[str, int]:
    """Return name → CRC-32 of the files of a wheel; RECORD follows from the others."""
    with zipfile.ZipFile(wheel) as file:
        return {entry.filename: entry.CRC for entry in file.infolist() if not entry.filename.endswith("RECORD")}


def test_the_wheel_holds_types_configuration_and_launchers(wheel) -> None:
    names = contents(wheel)
    data = "dask_logits-0.1.0.data/data/share/dask-logits"
    assert {
        "dask_logits/py.typed",
        "dask_logits/conf/config.yaml",
        "dask_logits/teacher/cpu/fused.cpp",
        *(f"dask_logits/observe/{name}" for name in _ASSETS),
        f"{data}/slurm_teacher_logits.sh",
        f"{data}/monitor.ipynb",
    } <= names.keys()
    with zipfile.ZipFile(wheel) as file:
        scripts = file.read("dask_logits-0.1.0.dist-info/entry_points.txt").decode()
    assert "dask-logits = dask_logits.cli:main" in scripts
    assert "dask-logits-parallel = dask_logits.parallel:main" in scripts


def test_the_sdist_builds_the_same_wheel(wheel, tmp_path) -> None:
    sdist = build("sdist", ROOT, tmp_path / "sdist")
    with tarfile.open(sdist) as file:
        file.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    assert {"scripts", "tests", "docs", "benchmarks", "constraints.txt"} <= {path.name for path in source.iterdir()}
    assert contents(build("wheel", source, tmp_path / "wheel")) == contents(wheel)


@pytest.mark.parametrize("cluster", ["serial", pytest.param("local_cpu", marks=pytest.mark.slow)])
def test_the_wheel_scores_a_dataset_outside_the_checkout(cluster, wheel, llama, tmp_path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    # The dependencies are those of this environment; the package is the wheel's.
    packages = venv / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(packages)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    write_json_lines(tmp_path / "corpus.jsonl", sentences(6))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [
        str(python), "-m", "dask_logits", "generate", f"cluster={cluster}",
        f"distillation.teacher.model_path={llama}",
        "distillation.teacher.cache_dir=run",
        "distillation.teacher.generation.top_k=8",
        "distillation.teacher.generation.num_workers=1",
        "distillation.dataset.name=json",
        "distillation.dataset.data_files=corpus.jsonl",
        "distillation.dataset.max_length=64",
        "distillation.cluster.dashboard_address=null",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "still alive" not in done.stderr
    show = [str(python), "-c", "import dask_logits; print(dask_logits.__file__)"]
    where = subprocess.run(show, cwd=tmp_path, capture_output=True, text=True, env=environment, check=True).stdout
    assert Path(where).is_relative_to(venv)
    status = [str(python), "-m", "dask_logits", "status", "run", "--json"]
    said = subprocess.run(status, cwd=tmp_path, capture_output=True, text=True, env=environment, check=True).stdout
    assert json.loads(said)["state"] == "complete"


def test_versions_that_do_not_resolve_are_named(tmp_path) -> None:
    (tmp_path / "bad.txt").write_text("dask==1\ndask==2\n")
    script = [sys.executable, str(ROOT / "scripts" / "check_versions.py"), "--constraints", str(tmp_path / "bad.txt")]
    # Two versions of one package need no index.
    done = subprocess.run(script, env={**os.environ, "UV_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "check_versions: this does not resolve: bad.txt: '.[adapters,dashboard,dev," in done.stdout
    assert "dask-logits depends on dask==1 and dask==2" in done.stdout
