"""Benchmarks run with tiny arguments; the figures mean nothing."""

from __future__ import annotations

import dataclasses
import gc
import json
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import warm
from builders import ROOT, VOCAB_SIZE, records, tiny_model, write_cache

from dask_logits.teacher import scoring
from dask_logits.teacher.model import ScoringPath, Teacher
from dask_logits.teacher.scoring import ScoringSettings
from dask_logits.teacher.selfcheck import check
from dask_logits.teacher.transfer import OutputRing
from dask_logits.teacher.transformers_internals import attention_of

BENCHMARKS = ROOT / "benchmarks"


def run(name: str, *arguments: object) -> None:
    """Run a benchmark in this process."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", [name, *map(str, arguments)])
        patched.setenv("TOKENIZERS_PARALLELISM", "false")
        threads = torch.get_num_threads()
        try:
            runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
        finally:
            torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def _few_objects() -> Iterator[None]:
    """Leave what other tests have imported out of the collections that benchmarks ask for: 0.3 s each."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "teacher_logits.h5"
    write_cache(path, records((200, 150, 170), k=8))
    return path


def test_every_benchmark_has_a_tiny_mode() -> None:
    names = {path.name for path in BENCHMARKS.glob("*.py")}
    assert names == {
        "capture.py",
        "gpu.py",
        "host.py",
        "loader.py",
        "loss.py",
        "quality.py",
        "scoring.py",
        "storage.py",
        "stream.py",
    }
    assert {path.name for path in (BENCHMARKS / "peers").glob("*.py")} == {"loader_peers.py", "vllm_prompts.py"}
    for name in names:
        assert f"benchmarks/{name}" in (BENCHMARKS / name).read_text()
        assert "--tiny " in (BENCHMARKS / name).read_text()


def test_loader_runs(cache, tmp_path, capsys) -> None:
    run("loader.py", cache, "--tiny", "--out", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["tokens"] == 4 * 520
    assert found["warm"].keys() >= {"plain, documents", "compact, blocks", "flat memmap, int32 + float16, documents"}
    assert "resident MiB" in capsys.readouterr().out


def test_storage_runs(cache, tmp_path, capsys) -> None:
    run("storage.py", cache, "--tiny", "--out", tmp_path / "out.json")
    assert "consolidation" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["layouts"].keys() == {"8"}


def test_stream_runs(llama, corpus, capsys) -> None:
    run("stream.py", "--tiny", "--model", llama, "--corpus", corpus)
    assert "tokenised before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ways", "number"),
    [
        (["--ways", "half cross-entropy, half ghost at 20 %, k = 32", "50 draws", "offline"], 5),
        pytest.param([], 13, marks=pytest.mark.slow),
        pytest.param(["--all"], 19, marks=pytest.mark.slow),
    ],
)
def test_quality_runs(ways, number, tmp_path, capsys) -> None:
    run("quality.py", "--tiny", "--out", tmp_path / "out.json", *ways)
    found = json.loads((tmp_path / "out.json").read_text())["ways"]
    assert len(found) == number
    assert found["cross-entropy"]["gap_closed_cross_entropy"] == 0
    assert found["offline"]["cross_entropy"] == pytest.approx(found["live"]["cross_entropy"], abs=0.005)
    assert "offline and live differ by at most 0.00" in capsys.readouterr().out


def test_scoring_runs(llama, corpus, tmp_path) -> None:
    run("scoring.py", "--tiny", "--model", llama, "--corpus", corpus, "--threads", 1, "--out", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["throughput"].keys() == {"length", "k", "vocabulary"}
    assert found["accuracy"]["rms_nats_bfloat16"] < 0.01


def test_gpu_runs(tmp_path, capsys) -> None:
    # Stands in for an environment with vLLM, which scores the longer documents and fails with the shorter ones.
    script = "case \"$*\" in *vllm_prompts*' --max-length 16 '*) echo no room >&2; exit 1;; esac"
    (tmp_path / "python").write_text(f'#!/bin/sh\n{script}\necho \'{{"tokens": 64, "seconds": 0.5}}\'\n')
    (tmp_path / "python").chmod(0o700)
    run("gpu.py", "--tiny", "--vllm", tmp_path / "python", "--out", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["left_out"] == ["two GPUs: 0 visible", "vLLM, tiny, 16: it failed with: no room"]
    assert found["vllm"] == {"tiny": [{"length": 32, "tokens_per_second": 128.0}]}
    assert found["two GPUs"] is None
    assert found["scoring"]["tiny"]["same_bytes"] == {"twice": True, "half_batches": True}
    assert [(row["layers"], row["length"]) for row in found["scoring"]["tiny"]["rows"]] == [
        ("eager", 16),
        ("eager", 32),
    ]
    assert found["heads"].keys() == {"bfloat16", "float32 out"}
    assert found["attentions"].keys() == {"flash", "cuDNN"}
    one = found["job"]["tiny"]
    assert (one["verified"], one["tokens"], one["cluster"]) == (True, 64, "serial")
    assert one["peak_share_of_plan"] == one["peak_bytes"] / one["planned_bytes"] > 0
    # On a CPU the stages fill nearly all of the time. In the small job, the first calls count.
    assert 0 <= one["host_share"] < 1
    for row in found["scoring"]["tiny"]["rows"]:
        device = sum(seconds for stage, seconds in row["stages"].items() if stage != "score")
        assert row["host_share"] == pytest.approx(max(0, 1 - device / row["stages"]["score"]))
    out = capsys.readouterr().out
    assert "of the plan's" in out
    assert "ours / loop" in out
    assert "ours / vLLM" in out


def test_gpu_keeps_its_figures_if_a_part_fails_or_time_is_short(tmp_path) -> None:
    bench_of = runpy.run_path(str(BENCHMARKS / "gpu.py"))["Bench"]
    arguments = SimpleNamespace(tiny=True, seconds=60, out=tmp_path / "new" / "out.json")
    bench = bench_of(arguments)
    bench.found["first"] = bench.run("first", lambda: 1)
    bench.found["second"] = bench.run("second", lambda: {}["column"])
    bench.keep()
    arguments.seconds = -1
    assert bench_of(arguments).run("third", lambda: 1) is None
    wanted = {"first": 1, "second": None, "left_out": ["second: failed with KeyError: 'column'"]}
    assert json.loads(arguments.out.read_text()) == wanted


def test_the_loop_of_the_gpu_benchmark_is_the_model_as_it_is_loaded() -> None:
    """Our attention and our compiled layers would make it faster."""
    loop = runpy.run_path(str(BENCHMARKS / "gpu.py"))["loop"]
    teacher = Teacher(tiny_model("gemma2"), VOCAB_SIZE)
    own = attention_of(teacher.model.config)
    teacher.take(ScoringPath(head="linear", attention="blocks"))
    seen = []
    teacher.model.register_forward_pre_hook(lambda *_: seen.append(attention_of(teacher.model.config)))
    loop(teacher, [np.arange(4), np.arange(4)], 1, 2)
    assert seen == [own, own]


def test_compiled_rows_of_the_gpu_benchmark_have_the_path_that_was_accepted(monkeypatch) -> None:
    # Compiling takes real time; here it changes nothing.
    monkeypatch.setattr(Teacher, "_compile", lambda self: None)
    names = runpy.run_path(str(BENCHMARKS / "gpu.py"))
    teacher = Teacher(tiny_model("llama"), VOCAB_SIZE)
    accepted = check(teacher, exact=True).path
    assert (accepted.attention, accepted.head) == ("blocks", "linear")
    settings = ScoringSettings(
        top_k=2, vocab_size=VOCAB_SIZE, batch_tokens=64, batch_size=None, head_rows=64, path=accepted
    )  # fmt: skip
    # The rows before it end with the loop.
    names["loop"](teacher, [np.arange(4)], 1, 2)
    settings, facts = names["compiled"](teacher, settings)
    assert facts["compiled"]
    assert settings.path == dataclasses.replace(accepted, compiled=True)


def test_gpu_compares_one_gpu_with_two_workers_and_with_one_worker_over_two(monkeypatch) -> None:
    names = runpy.run_path(str(BENCHMARKS / "gpu.py"))
    bench = names["Bench"](SimpleNamespace(tiny=True, seconds=60, job_tokens=64))
    asked = []

    # A job needs the GPUs. It stands in with figures only.
    def job(bench, config, cluster, tokens, gpus, *more) -> dict[str, float]:
        asked.append((cluster, tokens, gpus, *more))
        return {"tokens_per_second_without_consolidation": 100.0 * len(gpus) - 20 * len(more)}

    monkeypatch.setitem(names["two_gpus"].__globals__, "job", job)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3,1")
    found = names["two_gpus"](bench, None)
    assert found["share_of_twice_one"] == {"two": 1.0, "layers over two": 0.9}
    assert asked == [
        ("local_cuda", 64, ("5",)),
        ("local_cuda", 64, ("5", "3")),
        ("local_cuda", 64, ("5", "3"), "distillation.teacher.generation.gpus_per_worker=2"),
    ]


def test_gpu_says_why_vllm_is_left_out() -> None:
    vllm = runpy.run_path(str(BENCHMARKS / "gpu.py"))["vllm"]
    bench = SimpleNamespace(arguments=SimpleNamespace(vllm="false"), left_out=[])
    assert vllm(bench, "tiny", None) is None
    assert bench.left_out == ["vLLM: not installed for false; give the python of its environment with --vllm"]


def test_host_runs(llama, corpus, tmp_path, capsys) -> None:
    run("host.py", "--tiny", "--model", llama, "--corpus", corpus, "--profiles", "compact", "--out", tmp_path / "out")
    (found,) = json.loads((tmp_path / "out").read_text())["compact, 3"]
    assert found["tokens"] >= 500
    assert found["partitions"] > 1
    assert 0 < found["busy"] < 1
    assert "processor µs per token" in capsys.readouterr().out
    assert scoring.OutputRing is OutputRing


def test_loss_runs(tmp_path, capsys) -> None:
    run("loss.py", "--tiny", "--threads", 1, "--out", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["tables"].keys() == {"300", "400"}
    assert found["tables"]["300"].keys() >= {"label loss", "fused", "fused, recompute", "renormalised", "loop", "dense"}
    assert "beyond MiB" in capsys.readouterr().out


def test_capture_runs(llama, corpus, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: warm.run(command))
    run("capture.py", "--tiny", "--model", llama, "--corpus", corpus, "--out", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert [round_["tokens"] for round_ in found["rounds"]["loop"]] == [found["tokens"]]
    assert found["ratio"].keys() == {"loop"}
    assert "padded batch-4 loop" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "package", "arguments"),
    [
        ("loader_peers.py", "streaming", ["FOLDER", "8", "100"]),
        ("vllm_prompts.py", "vLLM", ["--model", "FOLDER", "--corpus", "FILE"]),
    ],
)
def test_peers_name_the_package_they_lack(name, package, arguments) -> None:
    script = str(BENCHMARKS / "peers" / name)
    done = warm.run([sys.executable, script, *arguments])
    assert done.returncode == 1
    assert package in done.stderr
    assert "not installed here; make an environment of its own" in done.stderr
