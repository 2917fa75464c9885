"""A reader in processes of its own, and what it is given to read."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from guided import bases, job

from dask_logits import generate, load_config


@pytest.fixture(scope="session")
def look() -> Iterator[Callable[[Path], str]]:
    """Return folder → what went wrong there, by a reader whose time, memory and files are bounded."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("victim.py"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:

        def ask(folder: Path) -> str:
            process.stdin.write(f"{folder}\n")
            process.stdin.flush()
            said: str = json.loads(process.stdout.readline())
            return said

        yield ask
        process.stdin.close()


@pytest.fixture(scope="session")
def made(suite_worker, tmp_path_factory) -> list[Path]:
    """Small caches of every version, and runs; they stay as they are."""
    folder = tmp_path_factory.mktemp("fuzz")
    generate(load_config([*job(folder / "job"), f"distillation.cluster.scheduler={suite_worker.address()}"]))
    return bases(folder / "bases", folder / "job" / "run")


@pytest.fixture
def fresh(tmp_path) -> Callable[[], Path]:
    """Return folders that are not there yet."""
    numbers = itertools.count()
    (tmp_path / "cases").mkdir()
    return lambda: tmp_path / "cases" / str(next(numbers))
