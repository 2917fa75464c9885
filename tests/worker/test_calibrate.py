"""The calibration: what it settles, when it tries what, and what it does when that fails."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import VOCAB_SIZE

from dask_logits import __version__
from dask_logits.config.groups import TeacherConfig
from dask_logits.data.items import plain_items
from dask_logits.errors import CapacityError, TeacherError
from dask_logits.teacher.checkpoint import TeacherSpec, inspect_teacher, load_teacher
from dask_logits.teacher.model import ScoringPath
from dask_logits.teacher.scoring import ScoringSettings, score_items
from dask_logits.worker import calibrate as calibration
from dask_logits.worker.calibrate import CalibrationTask, calibrate


@pytest.fixture
def task(llama):
    draw = np.random.default_rng(0)
    documents = tuple(draw.integers(VOCAB_SIZE, size=n).astype(np.int32) for n in (30, 4, 17, 60, 9) * 4)
    spec = TeacherSpec(
        path=str(llama), revision=None, identity=inspect_teacher(TeacherConfig(model_path=str(llama))).identity,
        dtype="bfloat16", device="cpu", torch_threads=1, trust_remote_code=False,
    )  # fmt: skip

    def make(**changes) -> CalibrationTask:
        names = {field.name for field in dataclasses.fields(ScoringSettings)}
        scoring = ScoringSettings(**{
            "top_k": 8, "vocab_size": VOCAB_SIZE, "batch_tokens": 128, "batch_size": None, "head_rows": 16,
            "path": ScoringPath(), **{name: value for name, value in changes.items() if name in names},
        })  # fmt: skip
        values = {
            "teacher": spec, "documents": documents, "plan_tokens": 1_000, "scoring": scoring,
            "batch_tokens_fixed": True, "head_rows_fixed": True, "logits": "exact", "compile": "auto",
        }  # fmt: skip
        others = {name: value for name, value in changes.items() if name not in names}
        return CalibrationTask(**{**values, **others})

    return make


def test_a_short_plan_is_scored_as_it_is(task) -> None:
    found, _ = calibrate(task(batch_tokens_fixed=False))
    assert ScoringPath(**found.numerics.path.model_dump()) == ScoringPath(attention="blocks", head="linear", exact=True)
    assert found.numerics.batch_tokens == 128
    assert found.trials_tokens_per_second == {}
    assert found.compile_seconds is None
    assert 0 < found.mfu < 1


def test_model_logits_are_asked_for(task) -> None:
    assert not calibrate(task(logits="model"))[0].numerics.path.exact


def test_a_long_plan_tries_larger_batches_and_keeps_what_is_faster(task, monkeypatch) -> None:
    monkeypatch.setitem(calibration._MOST_BATCH_TOKENS, "cpu", 256)
    found, _ = calibrate(task(batch_tokens_fixed=False, plan_tokens=None, compile="never"))
    rates = found.trials_tokens_per_second
    assert set(rates) == {"batch_tokens=128", "batch_tokens=256"}
    faster = rates["batch_tokens=256"] >= 1.03 * rates["batch_tokens=128"]
    assert found.numerics.batch_tokens == (256 if faster else 128)


@pytest.mark.parametrize(("minutes", "tries_compiled"), [(1.4, False), (9, True), (60, True)])
def test_its_cost_is_a_small_part_of_the_plan(task, monkeypatch, minutes: float, tries_compiled: bool) -> None:
    rate, spent = 230, []

    def slowly(*args, **settings):
        scored = score_items(*args, **settings)
        spent.append(scored.records.n_tokens / rate)
        return dataclasses.replace(scored, seconds=scored.seconds | {"score": spent[-1]})

    monkeypatch.setattr(calibration, "score_items", slowly)
    # Compiling takes real time; here it changes nothing, and is timed like the rest.
    monkeypatch.setattr(calibration, "try_compiled", lambda teacher, longest: 0.0)
    draw = np.random.default_rng(0)
    documents = tuple(draw.integers(VOCAB_SIZE, size=250).astype(np.int32) for _ in range(40))
    plan_tokens = round(60 * minutes * rate)
    found, _ = calibrate(task(documents=documents, plan_tokens=plan_tokens, batch_tokens_fixed=False))
    assert sum(spent) <= 0.1 * 60 * minutes
    assert ("compiled" in found.trials_tokens_per_second) == tries_compiled
    assert 0 <= found.tokens - calibration.sample_tokens(plan_tokens) < 250


def test_trials_that_would_take_long_are_left_out(task, monkeypatch) -> None:
    bounded, _ = calibrate(task(batch_tokens_fixed=False, plan_tokens=10**9, most_trial_seconds=1e-3))
    monkeypatch.setattr(calibration, "_UNKNOWN_SECONDS", 1e-3)
    for found in (bounded, calibrate(task(batch_tokens_fixed=False, plan_tokens=None))[0]):
        assert found.trials_tokens_per_second == {}
        assert not found.numerics.path.compiled


@pytest.mark.parametrize(
    ("device", "plan_tokens", "wanted"),
    # At a million tokens/s.
    [("cpu", 10**9, [3_000]), ("cuda", 10**9, [131_072]), ("cuda", 10**8, []), ("cuda", 4 * 10**8, [131_072])],
)
def test_compiled_layers_are_timed_on_work_for_the_device(device, plan_tokens, wanted, task, monkeypatch) -> None:
    monkeypatch.setattr(calibration, "try_compiled", lambda teacher, longest: 0.0)
    monkeypatch.setattr(calibration, "score_items", lambda teacher, items, settings: None)
    teacher = SimpleNamespace(device=torch.device(device), path=ScoringPath(compiled=True), take=lambda path: None)
    scored = SimpleNamespace(seconds={"score": 0.01}, records=SimpleNamespace(n_tokens=10_000))
    asked = task(plan_tokens=plan_tokens)
    trials = calibration._Trials(teacher, plain_items(asked.documents), scored, asked, lambda step: None)
    raced = []
    monkeypatch.setattr(trials, "_race", lambda a, b, tokens: raced.append(tokens) or (1.0, 2.0))
    settings = ScoringSettings(
        top_k=8, vocab_size=VOCAB_SIZE, batch_tokens=16_384, batch_size=None, head_rows=16, path=ScoringPath()
    )  # fmt: skip
    assert trials.compiled(settings, asked, {}).path.compiled == bool(wanted)
    assert raced == wanted


@pytest.mark.parametrize("is_faster_with_more", [False, True])
@pytest.mark.parametrize(("device", "seconds"), [("cpu", 9.0), ("cuda", 1.0)])
def test_the_first_use_of_a_shape_on_a_gpu_is_not_counted(
    device, seconds, is_faster_with_more, task, monkeypatch
) -> None:
    # The GPU is pretended, and what it does at its first batch of a shape takes eight seconds.
    teacher = SimpleNamespace(device=torch.device(device), devices=[], dtype=torch.float32)
    seen, steps = set(), []

    def score(teacher, items, settings):
        shape = (settings.batch_tokens, *(len(item.tokens) for item in items))
        found = SimpleNamespace(seconds={"score": 1.0 if shape in seen else 9.0}, records=SimpleNamespace(n_tokens=1))
        seen.add(shape)
        return found

    def larger_batches(self, settings):
        return dataclasses.replace(settings, batch_tokens=256) if is_faster_with_more else settings

    monkeypatch.setattr(calibration, "load_teacher", lambda *given, on_life: teacher)
    monkeypatch.setattr(calibration, "measure_cost", lambda teacher: None)
    monkeypatch.setattr(calibration, "check", lambda *given, **more: SimpleNamespace(errors={}))
    monkeypatch.setattr(calibration, "_with_kernels", lambda *given: ScoringPath())
    monkeypatch.setattr(calibration, "score_items", score)
    monkeypatch.setattr(calibration._Trials, "larger_batches", larger_batches)
    monkeypatch.setattr(calibration, "_report", lambda task, settings, scored, *others: scored)
    scored, _ = calibrate(task(batch_tokens_fixed=False, compile="never"), steps.append)
    assert scored.seconds["score"] == seconds
    # There is a sign of life before each time that the sample is scored.
    times = (2 if device == "cuda" else 1) * (2 if is_faster_with_more else 1)
    assert sum(step.startswith("scoring") for step in steps) == times


def test_a_package_that_is_not_installed_is_calibrated_too(task, monkeypatch) -> None:
    def version_of(name: str) -> str:
        assert name != "dask-logits"
        return version(name)

    monkeypatch.setattr(calibration, "version", version_of)
    assert calibrate(task())[0].versions["dask-logits"] == __version__


def test_compiled_layers_are_kept_if_they_pay(task) -> None:
    found, _ = calibrate(task(compile="always"))
    assert found.numerics.path.compiled
    # 0 if an earlier test has compiled them in this process.
    assert found.compile_seconds is not None
    assert found.errors_nats["compiled"] <= 4 * found.errors_nats["rounding"]
    assert set(found.trials_tokens_per_second) == {"eager", "compiled"}


def test_a_worker_that_calibrates_again_still_runs_what_it_compiled(task) -> None:
    # A worker of a standing cluster, which holds the teacher of the run before.
    chosen = ScoringPath(**calibrate(task(compile="always"))[0].numerics.path.model_dump())
    asked = task()
    teacher = load_teacher(asked.teacher, VOCAB_SIZE)
    settings = ScoringSettings(
        top_k=8, vocab_size=VOCAB_SIZE, batch_tokens=128, batch_size=None, head_rows=16, path=chosen
    )  # fmt: skip

    def logsumexp(path: ScoringPath) -> np.ndarray:
        given = dataclasses.replace(settings, path=path)
        return score_items(teacher, plain_items(asked.documents), given).records.logsumexp

    before = logsumexp(chosen)
    calibrate(task(compile="always"))
    assert load_teacher(asked.teacher, VOCAB_SIZE) is teacher
    np.testing.assert_array_equal(logsumexp(chosen), before)
    assert (logsumexp(dataclasses.replace(chosen, compiled=False)) != before).any()


def _broken(*_: object, **__: object) -> None:
    raise RuntimeError("no C++ compiler\nand more")


def test_where_nothing_can_be_compiled_auto_goes_on_and_always_is_refused(task, monkeypatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", _broken)
    assert not calibrate(task(plan_tokens=None))[0].numerics.path.compiled
    with pytest.raises(TeacherError, match=r"scoring\.compile: expected to compile .* got no C\+\+ compiler; install"):
        calibrate(task(compile="always"))


def test_the_heads_chunk_is_halved_while_memory_is_short(task, monkeypatch) -> None:
    score = calibration.score_items

    def short(teacher, items, settings, **more):
        if settings.head_rows > 32:
            raise CapacityError("head_rows: expected to fit")
        return score(teacher, items, settings, **more)

    monkeypatch.setattr(calibration, "score_items", short)
    found, _ = calibrate(task(head_rows=128, head_rows_fixed=False))
    assert found.numerics.head_rows == 32
    with pytest.raises(CapacityError, match="head_rows: expected to fit"):
        calibrate(task(head_rows=128))


def test_a_calibration_without_memory_says_what_to_do(task, monkeypatch) -> None:
    def full(teacher):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr(calibration, "measure_cost", full)
    with pytest.raises(CapacityError, match=r"expected to fit into memory, got CUDA error.*; stop other processes"):
        calibrate(task())
