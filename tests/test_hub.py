"""Datasets and teachers by their hub names, through the real libraries, from a stand-in hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders import save_tokenizer, sentences, tiny_model
from fake_hub import FakeHub, fake_hub, make_hub_repos

from dask_logits.cache.reader import CacheReader

TEXTS = sentences(60, seed=11, longest=12)
RUNNER = """
import json, sys
from dask_logits import DaskLogitsError, generate, load_config, prepare_dataset

if __name__ == "__main__":
    jobs = json.loads(sys.argv[1])
    for overrides in jobs:
        try:
            generate(load_config([*overrides, "cluster=serial"]))
        except DaskLogitsError as error:
            print(json.dumps(str(error)))
"""


def run_jobs(hub: FakeHub, home: Path, jobs: list[list[str]]) -> list[str]:
    """Run jobs in a process that knows only the stand-in hub; return their errors."""
    return [json.loads(line) for line in run_script(RUNNER, hub, home, json.dumps(jobs)).splitlines()]


def run_script(text: str, hub: FakeHub, home: Path, argument: str) -> str:
    """Run a script in a process that knows only the stand-in hub; return its output."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HTTP_PROXY": hub.endpoint,
        "HTTPS_PROXY": hub.endpoint,
        "NO_PROXY": "127.0.0.1",
    }
    script = home.parent / "runner.py"
    script.write_text(text)
    done = subprocess.run(
        [sys.executable, str(script), argument], capture_output=True, text=True, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def base(llama: Path) -> list[str]:
    return [
        f"distillation.teacher.model_path={llama}",
        "distillation.teacher.generation.top_k=4",
        "distillation.teacher.generation.torch_threads=1",
        "distillation.dataset.max_length=16",
        "distillation.dataset.num_proc=1",
        "distillation.dataset.streaming_chunk_size=7",
    ]


def named(base: list[str], folder: Path, name: str, config: str, *more: str) -> list[str]:
    return [
        *base,
        f"distillation.teacher.cache_dir={folder}",
        f"distillation.dataset.name={name}",
        f"distillation.dataset.config_name={config}",
        *more,
    ]


def lengths(folder: Path) -> list[int]:
    return CacheReader(folder / "teacher_logits.h5").arrays["document_length"].tolist()


def test_wikitext_c4_and_fineweb_by_their_names(base, tmp_path) -> None:
    make_hub_repos(tmp_path / "hub", TEXTS)
    stream = ["distillation.dataset.streaming=true"]
    every, some = [*stream, "distillation.dataset.max_samples=all"], [*stream, "distillation.dataset.max_samples=9"]
    jobs = {
        "wikitext": named(base, tmp_path / "wikitext", "Salesforce/wikitext", "wikitext-2-raw-v1"),
        "c4": named(base, tmp_path / "c4", "allenai/c4", "en", *every),
        "fineweb": named(base, tmp_path / "fineweb", "HuggingFaceFW/fineweb", "sample-10BT", *every),
        "typo": named(base, tmp_path / "typo", "HuggingFaceFW/finewebb", "sample-10BT", *some),
        "teacher": named(
            ["distillation.teacher.model_path=gated/teacher", *base[1:]], tmp_path / "t", "allenai/c4", "en", *every
        ),
    }
    with fake_hub(tmp_path / "hub") as hub:
        errors = run_jobs(hub, tmp_path / "home", list(jobs.values()))
        commit = hub.commit("HuggingFaceFW/fineweb").sha
    typo, teacher = errors
    assert typo.startswith("distillation.dataset.name: expected a dataset, got 'HuggingFaceFW/finewebb'")
    assert teacher.startswith("distillation.teacher.model_path: expected a causal language model, got 'gated/teacher'")
    assert all("log in with hf auth login (or set HF_TOKEN) if it is private or gated" in error for error in errors)
    expected = [len(text.split()) for text in TEXTS]
    for name in ("wikitext", "c4", "fineweb"):
        assert lengths(tmp_path / name) == expected, name
    plan = json.loads((tmp_path / "fineweb" / "plan" / "000" / "000000.json").read_text())
    assert plan["source"]["file"] == f"hf://datasets/HuggingFaceFW/fineweb@{commit}/sample/10BT/000_00000.parquet"
    assert plan["source"]["etag"]


@pytest.mark.slow
def test_only_the_files_that_are_needed_are_fetched(base, tmp_path) -> None:
    make_hub_repos(tmp_path / "hub", TEXTS)
    job = named(base, tmp_path / "run", "HuggingFaceFW/fineweb", "sample-10BT", "distillation.dataset.streaming=true")
    with fake_hub(tmp_path / "hub") as hub:
        assert run_jobs(hub, tmp_path / "home", [[*job, "distillation.dataset.max_samples=9"]]) == []
        assert hub.files_read() == {"sample/10BT/000_00000.parquet"}
        assert lengths(tmp_path / "run") == [len(text.split()) for text in TEXTS[:9]]
        # The branch moves on; the run stays at the commit it was planned with.
        commit = hub.commit("HuggingFaceFW/fineweb").sha
        assert json.loads((tmp_path / "run" / "run.json").read_text())["commit"] == commit
        make_hub_repos(tmp_path / "hub", sentences(60, seed=12, longest=12))
        assert hub.commit("HuggingFaceFW/fineweb").sha != commit
        assert run_jobs(hub, tmp_path / "home", [[*job, "distillation.dataset.max_samples=all"]]) == []
    assert lengths(tmp_path / "run") == [len(text.split()) for text in TEXTS]


@pytest.mark.slow
def test_what_was_read_from_a_hub_is_used_when_the_hub_is_unavailable(base, tmp_path) -> None:
    make_hub_repos(tmp_path / "hub", TEXTS)
    with fake_hub(tmp_path / "hub") as hub:
        job = named(base, tmp_path / "one", "allenai/c4", "en")
        assert run_jobs(hub, tmp_path / "home", [job]) == []
    again = named(base, tmp_path / "two", "allenai/c4", "en")
    other = named(base, tmp_path / "other", "allenai/c4-new", "en")
    (error,) = run_jobs(hub, tmp_path / "home", [again, other])
    assert "cannot be reached, and 'allenai/c4-new' was not downloaded before" in error
    assert lengths(tmp_path / "two") == lengths(tmp_path / "one") == [len(text.split()) for text in TEXTS]


LOAD = """
import json, sys
from dask_logits.config.groups import TeacherConfig
from dask_logits.teacher import checkpoint, loading

loading._BEAT_SECONDS = 0.0
for name in json.loads(sys.argv[1]):
    facts = checkpoint.inspect_teacher(TeacherConfig(model_path=name))
    spec = checkpoint.TeacherSpec(path=name, revision=facts.revision, identity=facts.identity, dtype="float32",
                                  device="cpu", torch_threads=1, trust_remote_code=False)
    signs = []
    teacher = checkpoint.load_teacher(spec, 104, lambda: signs.append(1))
    print(len(signs) - len(list(teacher.model.parameters())))
    checkpoint._LOADED.clear()
"""


def test_a_download_of_a_teacher_gives_signs_of_life(llama, tmp_path) -> None:
    """One for each piece that arrives, beside those of the parameters, and none once it is in the hub's cache."""
    (tmp_path / "hub" / "org").mkdir(parents=True)
    (tmp_path / "hub" / "org" / "whole").symlink_to(llama)
    sharded = tmp_path / "hub" / "org" / "sharded"
    tiny_model("llama").save_pretrained(sharded, max_shard_size="20KB")
    save_tokenizer(sharded)
    with fake_hub(tmp_path / "hub") as hub:
        counts = run_script(LOAD, hub, tmp_path / "home", json.dumps(["org/whole", "org/sharded", "org/whole"]))
    whole, in_parts, cached = map(int, counts.split())
    assert whole >= 1
    assert in_parts >= len(list(sharded.glob("*.safetensors"))) > 2
    assert cached == 0
