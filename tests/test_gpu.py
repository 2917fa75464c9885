"""What a GPU must do like a CPU. Bodies that make sense without one also run on the CPU.

Letters: M positions with targets, K kept entries, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from builders import VOCAB_SIZE, cache_dir, digest, run, share_a_gpu, tiny_model
from torch import Tensor

from dask_logits import read_status
from dask_logits.cache.reader import CacheReader
from dask_logits.data.items import plain_items
from dask_logits.records import Array
from dask_logits.teacher.cuda import kernels
from dask_logits.teacher.model import Teacher
from dask_logits.teacher.scoring import Scored, ScoringSettings, score_items
from dask_logits.teacher.selfcheck import check

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
K, HEAD_ROWS = 8, 64


def texts(lengths=(90, 40, 25, 7)) -> list[Array]:
    draw = np.random.default_rng(0)
    return [draw.integers(VOCAB_SIZE, size=n).astype(np.int32) for n in lengths]


def teacher_on(device: str, family: str, dtype: torch.dtype = torch.bfloat16) -> Teacher:
    return Teacher(tiny_model(family).to(device, dtype), VOCAB_SIZE)


def settings_of(teacher: Teacher) -> ScoringSettings:
    """Return settings for one batch on the path that the self-check chooses."""
    path = check(teacher, exact=True).path
    return ScoringSettings(
        top_k=K, vocab_size=VOCAB_SIZE, batch_tokens=1 << 20, batch_size=None, head_rows=HEAD_ROWS, path=path
    )  # fmt: skip


def score(teacher: Teacher, documents: list[Array]) -> Scored:
    """Score documents in one batch on the path that the self-check chooses."""
    return score_items(teacher, plain_items(documents), settings_of(teacher))


@torch.inference_mode()
def logprobs(model: torch.nn.Module, documents: list[Array], device: str) -> Tensor:
    """Return what the model's own forward gives for each document alone: float64 [M, V] on the CPU."""
    found = [model(input_ids=torch.from_numpy(ids)[None].long().to(device)).logits[0] for ids in documents]
    return torch.cat(found)[:, :VOCAB_SIZE].double().log_softmax(-1).cpu()


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_rounded_teacher_with_grouped_heads_is_as_near_to_float32_as_its_own_forward(device, family) -> None:
    documents = texts()
    teacher = teacher_on(device, family)
    exact_MV = logprobs(tiny_model(family).bfloat16().float(), documents, "cpu")
    own_MV = logprobs(teacher.model, documents, device)
    records = score(teacher, documents).records
    ids_MK = torch.from_numpy(records.topk_ids.astype(np.int64))
    error_MK = torch.from_numpy(records.topk_logprobs).double() - exact_MV.gather(1, ids_MK)
    own_error_MK = (own_MV - exact_MV).gather(1, ids_MK)
    assert 0 < error_MK.square().mean().sqrt() <= 1.5 * own_error_MK.square().mean().sqrt() + 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_every_chunk_of_the_head_goes_through_the_kernels() -> None:
    check_every_chunk_goes_through_the_kernels("cuda", torch.bfloat16)


def test_every_chunk_of_the_head_goes_through_the_interpreted_kernels() -> None:
    pytest.importorskip("triton")
    # As on a GPU, float32 logits are not rounded first. Triton reads the variable when it is imported.
    code = "import test_gpu, torch; test_gpu.check_every_chunk_goes_through_the_kernels('cpu', torch.float32)"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def check_every_chunk_goes_through_the_kernels(device: str, dtype: torch.dtype) -> None:
    """Count the calls of the kernels for some documents, and compare the targets with those by torch."""
    documents, called = texts((70, 20)), []
    with pytest.MonkeyPatch.context() as patched:
        for name in ("block_statistics", "largest"):
            whole = getattr(kernels, name)
            patched.setattr(kernels, name, lambda *given, name=name, whole=whole: called.append(name) or whole(*given))
        teacher = teacher_on(device, "qwen3", dtype)
        plain = settings_of(teacher)
        fast = dataclasses.replace(plain, path=dataclasses.replace(plain.path, kernels=True))
        by_torch = score_items(teacher, plain_items(documents), plain).records
        assert called == []
        # Switching to the kernels runs each of them once.
        teacher.take(fast.path)
        assert sorted(called) == ["block_statistics", "largest"]
        called.clear()
        by_kernels = score_items(teacher, plain_items(documents), fast).records
    chunks = -(-sum(map(len, documents)) // HEAD_ROWS)
    # The largest blocks of a chunk are chosen, then the largest of their logits.
    assert (called.count("block_statistics"), called.count("largest")) == (chunks, 2 * chunks)
    np.testing.assert_array_equal(by_kernels.topk_ids, by_torch.topk_ids)
    np.testing.assert_allclose(by_kernels.logsumexp, by_torch.logsumexp, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_batch_that_does_not_fit_a_gpu_is_halved() -> None:
    documents = texts((250,) * 1024)
    teacher = teacher_on("cuda", "qwen3")
    torch.cuda.reset_peak_memory_stats()
    whole = score(teacher, documents)
    assert whole.splits == {}
    peak = torch.cuda.max_memory_allocated()
    weights = torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    room = weights + (peak - weights) // 2
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        halved = score(teacher, documents)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    ((_, sizes),) = halved.splits.items()
    assert len(sizes) > 1
    assert sum(sizes) == len(documents)
    np.testing.assert_allclose(halved.records.logsumexp, whole.records.logsumexp, atol=0.05)


@pytest.mark.parametrize("device", DEVICES)
def test_the_receipts_name_the_device(overrides, device) -> None:
    run(overrides, "cluster=serial", f"distillation.teacher.generation.device={device}")
    receipts = [json.loads(path.read_text()) for path in (cache_dir(overrides) / "receipts").rglob("*.json")]
    gpus = [torch.cuda.get_device_properties(0)] if device == "cuda" else []
    assert len(receipts) == 4
    assert {tuple(receipt["gpus"]) for receipt in receipts} == {tuple(f"{gpu.name} GPU-{gpu.uuid}" for gpu in gpus)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_one_and_two_workers_on_a_gpu_give_the_same_bytes(overrides, teacher_folder, tmp_path, monkeypatch) -> None:
    from distributed import LocalCluster

    share_a_gpu(monkeypatch)
    rounded = [f"distillation.teacher.model_path={teacher_folder('qwen3')}", "distillation.teacher.dtype=bfloat16",
               "distillation.partition.rows=4"]  # fmt: skip
    one = run(overrides, *rounded, "cluster=serial", f"distillation.teacher.cache_dir={tmp_path / 'one'}")
    with LocalCluster(
        n_workers=2, threads_per_worker=3, memory_limit=None, dashboard_address="127.0.0.1:0", host="127.0.0.1"
    ) as cluster:
        two = run(overrides, *rounded, f"distillation.cluster.scheduler={cluster.scheduler_address}")
    receipts = [json.loads(path.read_text()) for path in (cache_dir(overrides) / "receipts").rglob("*.json")]
    assert len({receipt["process"] for receipt in receipts}) == 2
    assert digest(one) == digest(two)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_a_teacher_spread_over_two_gpus_gives_the_targets_of_one(overrides, tmp_path) -> None:
    exact = [
        "distillation.teacher.dtype=float32",
        "cluster=local_cuda",
        "distillation.teacher.generation.num_workers=1",
    ]
    one = run(overrides, *exact, f"distillation.teacher.cache_dir={tmp_path / 'one'}")
    two = run(overrides, *exact, "distillation.teacher.generation.gpus_per_worker=2")
    receipts = [json.loads(path.read_text()) for path in (cache_dir(overrides) / "receipts").rglob("*.json")]
    assert {len(set(receipt["gpus"])) for receipt in receipts} == {2}
    assert read_status(cache_dir(overrides)).state == "complete"
    arrays, spread = CacheReader(one).arrays, CacheReader(two).arrays
    np.testing.assert_allclose(spread["logsumexp"], arrays["logsumexp"], atol=1e-4)
    np.testing.assert_array_equal(spread["topk_ids"][:, 0], arrays["topk_ids"][:, 0])
