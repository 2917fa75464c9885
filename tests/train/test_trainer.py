"""The Hugging Face trainer for students, against plain loops and against itself."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm
from builders import compact, drawn_records, records, save_tokenizer, tiny_model, write_cache
from dense_losses import default_dtype
from test_ensemble import of_teacher
from torch.utils.data import ConcatDataset, Subset
from transformers import (
    AutoTokenizer,
    BarkProcessor,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    Wav2Vec2FeatureExtractor,
)

from dask_logits import (
    CachedLogitsDataset,
    CacheError,
    ConfigError,
    DistillationConfig,
    DistillationTrainer,
    EnsembleDataset,
    ItemOrder,
    MixedDataset,
    Objective,
    StudentWithLoss,
    collate,
    collate_flat,
    distillation_loss,
)
from dask_logits.vocabulary import map_digest

# Twenty items of uneven length, and one without tokens that is left out.
LENGTHS = [3, 9, 5, 0, 7, 2, 12, 4, 6, 8, 11, 3, 10, 5, 7, 2, 9, 4, 6, 8, 5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caches")
    for name, lengths, seed in (("train", LENGTHS, 1), ("other", LENGTHS, 2), ("eval", [4, 11, 6, 9, 3, 8, 5], 3)):
        write_cache(folder / f"{name}.h5", records(lengths, k=4, seed=seed))
    write_cache(folder / "drawn.h5", drawn_records(records(LENGTHS, k=4, seed=1)))
    write_cache(folder / "some.h5", records(LENGTHS, k=4, seed=1).at(np.arange(1, sum(LENGTHS), 3)))
    for seed in (1, 2):
        write_cache(folder / f"teacher-{seed}.h5", of_teacher(seed, lengths=tuple(LENGTHS)))
    return folder


def ensemble(folder: Path) -> EnsembleDataset:
    return EnsembleDataset({name: CachedLogitsDataset(folder / f"{name}.h5") for name in ("teacher-1", "teacher-2")})


def mixture(folder: Path, **options: Any) -> MixedDataset:
    """Return 20 items of a cache and of an ensemble."""
    sources = {"one": CachedLogitsDataset(folder / "train.h5"), "several": ensemble(folder)}
    return MixedDataset(sources, n_items=20, **options)


@pytest.fixture
def dataset(folder: Path) -> CachedLogitsDataset:
    return CachedLogitsDataset(folder / "train.h5")


@pytest.fixture(params=["train", "some", "drawn", "ensemble", "mixture"])
def either(folder: Path, request: pytest.FixtureRequest) -> Any:
    made = {"ensemble": ensemble, "mixture": mixture}.get(request.param)
    return CachedLogitsDataset(folder / f"{request.param}.h5") if made is None else made(folder)


def settings(output: Path, **changes: Any) -> DistillationConfig:
    """Return arguments of a short run of SGD, whose steps are proportional to the gradient."""
    values = {
        "output_dir": str(output),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 0.05,
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "alpha": 0.7,
        "seed": 5,
    }
    return DistillationConfig(**{**values, **changes})


def student() -> torch.nn.Module:
    return tiny_model("llama").train()


def trained(output: Path, dataset: Any, *, model: Any = None, resume: Any = None, **changes: Any) -> Any:
    trainer = DistillationTrainer(model=model or student(), args=settings(output, **changes), train_dataset=dataset)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer: DistillationTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def steps(trainer: DistillationTrainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_close(found: dict, expected: dict, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=tolerance, rtol=tolerance)


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_it_trains_like_a_plain_loop_and_logs_both_terms(either, tmp_path) -> None:
    trainer = trained(tmp_path, either, lr_scheduler_type="constant", max_grad_norm=0.0)
    model, objective = student(), Objective(alpha=0.7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    order = ItemOrder(20, seed=5).items(0, 12).reshape(3, 4).tolist()
    for logged, items in zip(steps(trainer), order, strict=True):
        batch = collate([either[i] for i in items])
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        expected = distillation_loss(logits, batch["targets"], objective)
        expected.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for name in ("loss", "divergence", "cross_entropy"):
            assert logged[name] == pytest.approx(getattr(expected, name).item(), rel=2e-5), name
        assert logged["loss"] == pytest.approx(0.3 * logged["cross_entropy"] + 0.7 * logged["divergence"], rel=1e-5)
        assert logged["tokens_per_second"] > 0
    assert_close(weights(trainer), model.state_dict(), 1e-5)
    assert trainer.model_wrapped.head is not None


def test_a_log_of_several_steps_has_their_means(dataset, tmp_path) -> None:
    each = steps(trained(tmp_path, dataset, max_steps=4))
    (whole,) = steps(trained(tmp_path, dataset, max_steps=4, logging_steps=4))
    for name in ("loss", "divergence", "cross_entropy"):
        assert whole[name] == pytest.approx(sum(entry[name] for entry in each) / 4, rel=1e-6)


def test_changed_arguments_change_the_loss(dataset, tmp_path) -> None:
    expected = trained(tmp_path, dataset, alpha=0.2)
    searched = DistillationTrainer(
        model_init=lambda: student(), args=settings(tmp_path), train_dataset=dataset, eval_dataset=dataset
    )
    # What Trainer.hyperparameter_search does for a trial.
    searched.objective = None
    searched.args.alpha = 0.2
    searched.train()
    assert_equal(weights(searched), weights(expected))
    # Without model_init, the wrapped model stays.
    again = DistillationTrainer(model=student(), args=settings(tmp_path, max_steps=1), train_dataset=dataset)
    again.train()
    again.args.alpha = 0.0
    again.train()
    assert steps(again)[-1]["loss"] == pytest.approx(steps(again)[-1]["cross_entropy"], rel=1e-6)


def test_a_search_minimises_the_loss_of_the_evaluation(dataset, tmp_path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(Trainer, "hyperparameter_search", lambda trainer, *args, **options: asked.append(args[1]))
    searched = DistillationTrainer(
        model_init=lambda: student(), args=settings(tmp_path), train_dataset=dataset, eval_dataset=dataset
    )
    metrics = searched.evaluate()
    assert metrics["eval_divergence"] > 0
    searched.hyperparameter_search(n_trials=1)
    searched.hyperparameter_search(None, len)
    assert asked[0](metrics) == metrics["eval_loss"]
    assert asked[0]({"eval_a_loss": 1.0, "eval_b_loss": 2.0, "eval_a_divergence": 9.0, "epoch": 4.0}) == 3.0
    assert asked[1] is len


def test_accumulated_batches_equal_one(either, tmp_path) -> None:
    whole = trained(tmp_path, either)
    parts = trained(tmp_path, either, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert_close(weights(parts), weights(whole), 1e-6)
    for found, expected in zip(steps(parts), steps(whole), strict=True):
        for name in ("loss", "divergence", "cross_entropy", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5), name


def test_the_default_dtype_does_not_round_the_normaliser(dataset, tmp_path) -> None:
    trainer = DistillationTrainer(model=student(), args=settings(tmp_path), train_dataset=dataset)
    model, batch = trainer._wrap_model(trainer.model), collate([dataset[0], dataset[1]])
    with torch.no_grad():
        expected = trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(257))
        with default_dtype(torch.bfloat16):
            assert trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(257)) == expected


@pytest.mark.parametrize("changes", [{"remove_unused_columns": True}, {"dataloader_num_workers": 1}])
def test_targets_arrive_whatever_the_loader_does(dataset, tmp_path, changes) -> None:
    expected = trained(tmp_path, dataset, max_steps=1)
    assert_equal(weights(trained(tmp_path, dataset, max_steps=1, **changes)), weights(expected))


def test_gradient_checkpointing_changes_nothing(dataset, tmp_path) -> None:
    # transformers 5.23 renamed it.
    has_new_name = hasattr(DistillationConfig, "activation_checkpointing")
    name = "activation_checkpointing" if has_new_name else "gradient_checkpointing"
    found = trained(tmp_path, dataset, **{name: True})
    assert found.model.is_gradient_checkpointing
    expected = trained(tmp_path, dataset)
    assert [entry["loss"] for entry in steps(found)] == [entry["loss"] for entry in steps(expected)]
    assert_equal(weights(found), weights(expected))


def test_mixed_precision_is_close(dataset, tmp_path) -> None:
    found, expected = (trained(tmp_path, dataset, bf16=bf16, learning_rate=1e-4) for bf16 in (True, False))
    for half, full in zip(steps(found), steps(expected), strict=True):
        assert half["loss"] == pytest.approx(full["loss"], rel=0.05)
        assert half["loss"] != full["loss"]
    assert all(value.dtype == torch.float32 for value in weights(found).values())


# peft 0.19 takes every head for a tied one.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_lora_trains_its_adapters_alone(dataset, tmp_path) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        torch.manual_seed(2)
        return peft.get_peft_model(student(), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))

    before = {name: value.clone() for name, value in adapted().state_dict().items()}
    trainer = trained(tmp_path, dataset, model=adapted(), save_strategy="steps", save_steps=2, max_steps=4)
    assert len(trainer.model_wrapped.head.adapters) == 1
    after = weights(trainer)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in after if "lora_" in name}
    resumed = trained(tmp_path, dataset, model=adapted(), max_steps=4, resume=str(tmp_path / "checkpoint-2"))
    assert_equal(weights(resumed), after)


def test_a_head_that_is_not_linear_takes_full_logits(dataset, tmp_path) -> None:
    # OPT's own forward does not call its trunk.
    trainer = trained(tmp_path, dataset, model=tiny_model("opt", dropout=0.0).train(), max_steps=1)
    assert trainer.model_wrapped.head is None
    batch = collate([dataset[i] for i in ItemOrder(20, seed=5).items(0, 4).tolist()])
    logits = tiny_model("opt")(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = distillation_loss(logits, batch["targets"], Objective(alpha=0.7)).loss.item()
    assert steps(trainer)[0]["loss"] == pytest.approx(expected, rel=1e-5)


# Evaluation


def test_evaluation_counts_every_position_once(dataset, folder, tmp_path) -> None:
    held_out = CachedLogitsDataset(folder / "eval.h5")
    trainer = DistillationTrainer(
        model=student(),
        args=settings(tmp_path, per_device_eval_batch_size=3, eval_strategy="steps", eval_steps=2),
        train_dataset=dataset,
        eval_dataset=held_out,
    )
    found = trainer.evaluate()
    batch = collate(list(held_out))
    logits = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = distillation_loss(logits, batch["targets"], Objective(alpha=0.7))
    for name in ("loss", "divergence", "cross_entropy"):
        assert found[f"eval_{name}"] == pytest.approx(getattr(expected, name).item(), rel=1e-5), name
    trainer.train()
    (during,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry and entry["step"] == 2]
    assert during["eval_loss"] < found["eval_loss"]
    assert trainer.predict(Subset(held_out, range(7))).metrics["test_loss"] == trainer.evaluate()["eval_loss"]


def test_evaluation_drops_nothing(dataset, tmp_path) -> None:
    whole, dropping = (
        DistillationTrainer(
            model=student(),
            args=settings(tmp_path, per_device_eval_batch_size=8, dataloader_drop_last=drop),
            eval_dataset=dataset,
        )
        for drop in (False, True)
    )
    few = Subset(dataset, range(6))
    for given in (None, few):
        assert dropping.evaluate(given)["eval_loss"] == whole.evaluate(given)["eval_loss"]
    assert dropping.predict(few).metrics["test_loss"] == whole.predict(few).metrics["test_loss"]
    assert dropping.args.dataloader_drop_last


@pytest.mark.parametrize("metric", ["loss", "divergence", "eval_cross_entropy"])
def test_the_best_model_has_the_least_divergence(metric, dataset, tmp_path) -> None:
    best = {"load_best_model_at_end": True, "metric_for_best_model": metric, "save_strategy": "steps", "save_steps": 1}
    trainer = DistillationTrainer(
        model=student(),
        args=settings(tmp_path, eval_strategy="steps", eval_steps=1, **best),
        train_dataset=dataset,
        eval_dataset=dataset,
    )
    trainer.train()
    name = "eval_" + metric.removeprefix("eval_")
    values = [entry[name] for entry in trainer.state.log_history if name in entry]
    assert trainer.state.best_metric == min(values) < max(values)
    assert DistillationConfig(str(tmp_path), use_cpu=True, metric_for_best_model="accuracy").greater_is_better
    assert DistillationConfig(
        str(tmp_path), use_cpu=True, metric_for_best_model=metric, greater_is_better=True
    ).greater_is_better


def test_a_share_of_a_cache_may_be_held_out(dataset, tmp_path) -> None:
    trainer = DistillationTrainer(
        model=student(),
        args=settings(tmp_path),
        train_dataset=Subset(dataset, range(4, 20)),
        eval_dataset={"first": Subset(dataset, range(2)), "second": Subset(dataset, range(2, 4))},
    )
    trainer.train()
    assert {"eval_first_loss", "eval_second_cross_entropy"} <= trainer.evaluate().keys()


# Checkpoints


def run(output: Path, dataset: Any, *, resume: Any = None, **changes: Any) -> DistillationTrainer:
    """Train with AdamW and dropout, 5 steps an epoch, so that state and random numbers matter."""
    values = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "max_steps": 8, "learning_rate": 1e-3}
    model = tiny_model("llama", attention_dropout=0.2).train()
    return trained(output, dataset, model=model, resume=resume, **{**values, **changes})


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    output = tmp_path_factory.mktemp("undisturbed")
    return output, weights(run(output, CachedLogitsDataset(folder / "train.h5")))


@pytest.mark.parametrize("step", [3, 5, 7])
def test_a_resumed_run_equals_an_undisturbed_one(undisturbed, dataset, tmp_path, step) -> None:
    output, expected = undisturbed
    shutil.copytree(output / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    assert_equal(weights(run(tmp_path, dataset, resume=True)), expected)


def test_a_resumed_run_on_a_mixture_equals_an_undisturbed_one(folder, tmp_path) -> None:
    expected = weights(run(tmp_path / "one", mixture(folder)))
    shutil.copytree(tmp_path / "one" / "checkpoint-7", tmp_path / "two" / "checkpoint-7")
    with pytest.raises(CacheError, match="expected the cache that this checkpoint was trained on"):
        run(tmp_path / "two", mixture(folder, weights={"one": 3, "several": 1}), resume=True)
    assert_equal(weights(run(tmp_path / "two", mixture(folder), resume=True)), expected)


@pytest.mark.slow
def test_a_batch_size_that_was_found_is_resumed(dataset, tmp_path, monkeypatch) -> None:
    compute = DistillationTrainer.compute_loss

    def short_of_memory(self: Any, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory.")
        return compute(self, model, inputs, *args, **options)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", short_of_memory)
    expected = weights(run(tmp_path / "one", dataset, auto_find_batch_size=True))
    shutil.copytree(tmp_path / "one" / "checkpoint-3", tmp_path / "two" / "checkpoint-3")
    assert_equal(weights(run(tmp_path / "two", dataset, auto_find_batch_size=True, resume=True)), expected)


def test_a_checkpoint_names_the_cache_and_the_position(undisturbed, dataset) -> None:
    output, _ = undisturbed
    state = json.loads((output / "checkpoint-7" / "distillation_state.json").read_text())
    assert state["dataset"]["content_digest"] == dataset.content_digest
    sampler = state["sampler"]
    assert (sampler["epoch"], sampler["position"], sampler["seed"], sampler["n_items"]) == (1, 8, 5, 20)
    assert sampler["digest"] == dataset.content_digest


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"cache": "other"},
            CacheError,
            r"content digest {then}, got {now} \(.*other.h5\); resume with that of .*train.h5'",
        ),
        ({"top_k": 2}, ConfigError, r"train_dataset, top_k: expected 4, .*, got 2; open the cache with the same"),
        ({"seed": 6}, ConfigError, r"sampler state, seed: expected 6, got 5"),
        ({"batch": 2}, ConfigError, r"after 3 of which item 12 of epoch 0 is next, got steps of 2 items, with item 6"),
        ({"subset": 20}, ConfigError, r"train_dataset, subset: expected None, .*, got '\w{64}'"),
        ({"delete": True}, CacheError, r"distillation_state.json: expected the state that DistillationTrainer writes"),
        ({"damage": True}, CacheError, r"expected version to be 1, got 3; the file is damaged: resume from another"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_resumed_is_refused(undisturbed, folder, dataset, tmp_path, change, error, message) -> None:
    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(undisturbed[0] / "checkpoint-3", checkpoint)
    state = checkpoint / "distillation_state.json"
    if "delete" in change:
        state.unlink()
    if "damage" in change:
        state.write_text(json.dumps({**json.loads(state.read_text()), "version": 3}))
    given: Any = CachedLogitsDataset(folder / f"{change.get('cache', 'train')}.h5", top_k=change.get("top_k"))
    message = message.replace("{then}", dataset.content_digest).replace("{now}", given.content_digest)
    if "subset" in change:
        given = Subset(given, range(20))
    trainer = DistillationTrainer(
        model=student(),
        args=settings(tmp_path, seed=change.get("seed", 5), per_device_train_batch_size=change.get("batch", 4)),
        train_dataset=given,
    )
    with pytest.raises(error, match=message):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 0


# Two processes

_RANK = """
    import json, sys
    from pathlib import Path
    from test_trainer import CachedLogitsDataset, DistillationTrainer, settings, student, weights
    import torch

    folder, output = Path(sys.argv[1]), Path(sys.argv[2])

    def trainer(batch, **changes):
        return DistillationTrainer(
            model=student(), eval_dataset=CachedLogitsDataset(folder / "eval.h5"),
            args=settings(output, per_device_train_batch_size=batch, per_device_eval_batch_size=2, max_steps=8,
                          save_strategy="steps", save_steps=1, **changes),
            train_dataset=CachedLogitsDataset(folder / "train.h5"),
        )

    if __name__ == "__main__":
        first = trainer(1, gradient_accumulation_steps=2)
        first.train()
        found = first.evaluate()
        resumed = trainer(1, gradient_accumulation_steps=2)
        resumed.train(resume_from_checkpoint=str(output / "checkpoint-7"))
        if first.args.process_index == 0:
            wrapped = type(first.model_wrapped).__name__
            torch.save((wrapped, weights(first), weights(resumed), first.state.log_history, found), output / "found.pt")
        torch.distributed.destroy_process_group()
"""


def test_two_processes_equal_one(folder, tmp_path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(f"import sys; sys.path[:0] = {sys.path!r}\n" + textwrap.dedent(_RANK))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        warm.Popen(
            [sys.executable, str(script), str(folder), str(tmp_path)],
            env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for rank in "01"
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    wrapped, found, resumed, history, metrics = torch.load(tmp_path / "found.pt")
    assert wrapped == "DistributedDataParallel"
    assert_equal(resumed, found)
    one = DistillationTrainer(
        model=student(),
        args=settings(tmp_path, max_steps=8),
        train_dataset=CachedLogitsDataset(folder / "train.h5"),
        eval_dataset=CachedLogitsDataset(folder / "eval.h5"),
    )
    one.train()
    assert_close(found, weights(one), 1e-6)
    logged = [entry for entry in history if "loss" in entry]
    assert len(logged) == 8
    for entry, expected in zip(logged, steps(one), strict=True):
        for name in ("loss", "divergence", "cross_entropy"):
            assert entry[name] == pytest.approx(expected[name], rel=1e-5), name
    for name, value in one.evaluate().items():
        if name.endswith(("_loss", "_divergence", "_entropy")):
            assert metrics[name] == pytest.approx(value, rel=1e-5), name


# Refusals


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            [1, 2],
            "train_dataset: expected a CachedLogitsDataset, MixedDataset or EnsembleDataset, or a torch Subset of one, "
            "got list; open",
        ),
        (ConcatDataset([[1]]), r"train_dataset: expected a CachedLogitsDataset, .*, got ConcatDataset"),
    ],
    ids=["list", "concat"],
)
def test_another_dataset_is_refused(given, message, dataset, tmp_path) -> None:
    for named in ({"train_dataset": given}, {"train_dataset": dataset, "eval_dataset": given}):
        expected = message.replace("train_dataset", next(name for name in named if named[name] is given), 1)
        with pytest.raises(ConfigError, match=expected):
            DistillationTrainer(model=student(), args=settings(tmp_path), **named)


def test_encoded_items_are_refused(tmp_path) -> None:
    write_cache(tmp_path / "compact.h5", records((3, 5)), profile=compact())
    with pytest.raises(ConfigError, match="train_dataset: expected a dataset with decode='worker', got 'device'"):
        DistillationTrainer(
            model=student(),
            args=settings(tmp_path),
            train_dataset=CachedLogitsDataset(tmp_path / "compact.h5", decode="device"),
        )


def test_a_student_with_too_few_logits_is_refused(folder, dataset, tmp_path) -> None:
    small = tiny_model("llama", vocab_size=40)
    with pytest.raises(ConfigError, match=r"expected at least 50 logits, .*, got 40; .*student_vocab_size=40, skip_un"):
        DistillationTrainer(model=small, args=settings(tmp_path), train_dataset=dataset)
    narrow = CachedLogitsDataset(folder / "train.h5", student_vocab_size=40, skip_unrepresentable=True)
    trainer = trained(tmp_path, narrow, model=small, max_steps=1, per_device_train_batch_size=1)
    assert steps(trainer)[0]["loss"] > 0


def test_another_tokenizer_than_the_teachers_is_refused(dataset, tmp_path) -> None:
    for name, size in (("same", 104), ("other", 90)):
        save_tokenizer(tmp_path / name, size)
    same, other = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("same", "other"))
    known = {"tokenizer_map_digest": map_digest(same.get_vocab()), "tokenizer_ids": 104}
    write_cache(tmp_path / "c.h5", records(LENGTHS, k=4, seed=1), **known)
    named = CachedLogitsDataset(tmp_path / "c.h5")

    def trainer(processing_class: Any, **datasets: Any) -> DistillationTrainer:
        return DistillationTrainer(
            model=student(), args=settings(tmp_path), processing_class=processing_class, **datasets
        )

    for refused in (other, BarkProcessor(other)):
        for datasets in (
            {"train_dataset": named},
            {"train_dataset": dataset, "eval_dataset": Subset(named, range(4))},
            {"train_dataset": MixedDataset({"a": named, "b": dataset})},
        ):
            with pytest.raises(CacheError, match=r"processing_class: expected the teacher's .* 104 .*, got one of 90"):
                trainer(refused, **datasets)
    # A cache of token ids names no tokenizer, and a feature extractor has none.
    trainer(other, train_dataset=dataset)
    for fitting in (same, BarkProcessor(same), Wav2Vec2FeatureExtractor()):
        trainer(fitting, train_dataset=named)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor: expected 0.0, got 0.1; the teacher's distribution"),
        ({"train_sampling_strategy": "sequential"}, r"train_sampling_strategy: expected 'random', got 'sequential'"),
        ({"ignore_data_skip": True}, r"ignore_data_skip: expected False, got True"),
        (
            {"accelerator_config": {"split_batches": True}},
            "accelerator_config: expected split_batches=False, got True; each process reads its own batches",
        ),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config: expected dispatch_batches=False"),
        ({"alpha": 2.0}, r"alpha: expected a number from 0 to 1, got 2.0"),
        ({"tail": "residual", "divergence": "reverse_kl"}, r"tail: expected 'ghost' with the reverse KL"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_fit_are_refused(changes, message, dataset, tmp_path) -> None:
    with pytest.raises(ConfigError, match=message):
        DistillationTrainer(model=student(), args=settings(tmp_path, **changes), train_dataset=dataset)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"temperature": 2.0}, r"temperature: expected one that the cache has a tail for \(1\), got 2"),
        ({"tail": "ghost"}, "tail: expected 'auto' or 'sampled' for draws"),
    ],
)
def test_an_objective_that_the_evaluation_cannot_have_is_refused_before_training(
    objective, message, folder, tmp_path
) -> None:
    write_cache(tmp_path / "two.h5", records(LENGTHS, k=4, temperatures=True))
    lacking = "drawn" if "tail" in objective else "eval"
    with pytest.raises(ConfigError, match=message):
        DistillationTrainer(
            model=student(),
            args=settings(tmp_path, **objective),
            train_dataset=CachedLogitsDataset(tmp_path / "two.h5"),
            eval_dataset=CachedLogitsDataset(folder / f"{lacking}.h5"),
        )


def test_a_module_without_a_configuration_is_refused(dataset, tmp_path) -> None:
    with pytest.raises(ConfigError, match="model: expected a causal language model of transformers, got StudentWith"):
        DistillationTrainer(model=StudentWithLoss(student()), args=settings(tmp_path), train_dataset=dataset)


def test_several_gpus_in_one_process_are_refused(dataset, tmp_path) -> None:
    class TwoGpus(DistillationConfig):
        n_gpu = 2

    with pytest.raises(ConfigError, match="n_gpu: expected one GPU per process, got 2; start the script with torchrun"):
        DistillationTrainer(model=student(), args=TwoGpus(str(tmp_path)), train_dataset=dataset)


def test_arguments_of_another_class_and_flat_batches_are_refused(dataset, tmp_path) -> None:
    with pytest.raises(ConfigError, match="args: expected a DistillationConfig, got TrainingArguments"):
        DistillationTrainer(model=student(), args=TrainingArguments(str(tmp_path), use_cpu=True), train_dataset=dataset)
    trainer = DistillationTrainer(
        model=student(), args=settings(tmp_path), train_dataset=dataset, data_collator=collate_flat
    )
    with pytest.raises(ConfigError, match="data_collator: expected batches of padded items, got position_ids"):
        trainer.train()


def test_the_command_line_parser_of_transformers_reads_the_arguments(tmp_path) -> None:
    (args,) = HfArgumentParser(DistillationConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "--divergence", "jsd", "--tail", "residual", "--alpha", "0.5"]
    )
    assert args.objective == Objective(divergence="jsd", tail="residual", alpha=0.5)
    assert args.shuffle == "block"
