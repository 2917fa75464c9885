"""Tiny real teachers, corpora and one Dask worker that most jobs of the suite share."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
import warm
from builders import SuiteWorker, cache_dir, save_tokenizer, sentences, small_job, tiny_model, write_json_lines

if TYPE_CHECKING:
    from dask_logits.run.folder import RunFolder

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# An example takes many times as long on a loaded machine.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs, unless only tests that need one are run (``pytest -m gpu``). So results do not depend on them."""
    if not selects_gpu_tests_only(config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def selects_gpu_tests_only(expression: str) -> bool:
    """Whether a marker expression selects tests with the marker ``gpu``, and no others.

    >>> [selects_gpu_tests_only(each) for each in ("gpu", "gpu and not slow", "slow and gpu")]
    [True, True, True]
    >>> [selects_gpu_tests_only(each) for each in ("", "not gpu", "slow and not gpu", "gpu or slow")]
    [False, False, False, False]
    """
    words = re.findall(r"\w+", expression)
    return "gpu" in words and "or" not in words and "not gpu" not in " ".join(words)


@pytest.fixture(scope="session", autouse=True)
def _datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("hf-datasets")


@pytest.fixture(scope="session")
def fork_server() -> None:
    """Dask starts its workers as forks of a process that has imported what they need."""
    warm.serve()


@pytest.fixture
def new_interpreters(fork_server: None) -> Iterator[None]:
    """Dask starts its workers as new interpreters, as it does for users."""
    import dask

    with dask.config.set({warm.METHOD: "spawn"}):
        yield


@pytest.fixture(params=["refuses", "never replies"])
def unreachable_hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a hub that refuses connections, or accepts them and never replies. Requests are sent there."""
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        if request.param == "refuses":
            server.close()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        yield address


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return family → folder with a tiny teacher and its tokenizer, built once."""
    made: dict[str, Path] = {}

    def build(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(f"teacher-{family}")
            tiny_model(family).save_pretrained(folder)
            save_tokenizer(folder)
            made[family] = folder
        return made[family]

    return build


@pytest.fixture(scope="session")
def llama(teacher_folder: Callable[[str], Path]) -> Path:
    return teacher_folder("llama")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSON-lines corpus of 40 documents, one of them empty."""
    rows = sentences(40)
    rows[7] = ""
    return write_json_lines(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", rows)


@pytest.fixture(scope="session")
def suite_worker(fork_server: None) -> Iterator[SuiteWorker]:
    """One scheduler with one worker process, which the suite's jobs join."""
    worker = SuiteWorker()
    yield worker
    worker.close()


@pytest.fixture
def scheduler(suite_worker: SuiteWorker) -> str:
    """Address of the suite's scheduler, whose worker answers."""
    return suite_worker.address()


@pytest.fixture
def overrides(llama: Path, corpus: Path, tmp_path: Path, fork_server: None) -> list[str]:
    """Overrides of a small job on a cluster of its own. Takes seconds to start: use ``here`` where any will do."""
    return small_job(llama, corpus, tmp_path / "run")


@pytest.fixture
def joined(overrides: list[str], scheduler: str) -> list[str]:
    """The same job on the suite's worker."""
    return [*overrides, f"distillation.cluster.scheduler={scheduler}"]


@pytest.fixture
def here(overrides: list[str]) -> list[str]:
    """The same job in this process, without a cluster."""
    return [*overrides, "cluster=serial"]


@pytest.fixture(scope="session")
def _finished(llama: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dask_logits import generate, load_config

    folder = tmp_path_factory.mktemp("finished") / "run"
    generate(load_config([*small_job(llama, corpus, folder), "cluster=serial"]))
    return folder


@pytest.fixture
def cache(here: list[str], _finished: Path) -> Path:
    """The cache of the small job: a copy of the suite's finished run."""
    return shutil.copytree(_finished, cache_dir(here)) / "teacher_logits.h5"


@pytest.fixture(scope="session")
def _stopped(llama: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dask_logits import generate, load_config

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("dask_logits.job.run.consolidate_run", stop)
        with pytest.raises(KeyboardInterrupt):
            generate(load_config([*small_job(llama, corpus, folder), "cluster=serial"]))
    return folder


@pytest.fixture
def scored(here: list[str], _stopped: Path) -> RunFolder:
    """A run of four committed partitions, stopped before its cache was written: a copy of the suite's."""
    from dask_logits.run.folder import RunFolder

    return RunFolder(shutil.copytree(_stopped, cache_dir(here)))
