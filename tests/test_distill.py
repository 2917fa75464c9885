"""scripts/distill.py: a student from a cache, its curve and its refusals."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import yaml
from builders import drawn_records, records, save_tokenizer, tiny_model, write_cache
from transformers import AutoModelForCausalLM, AutoTokenizer

from dask_logits import CachedLogitsDataset, Objective, collate, distillation_loss
from dask_logits.records import Records
from dask_logits.vocabulary import map_digest

ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "scripts" / "distill.py")
SMALL = ["student.model.hidden_size=32", "student.model.intermediate_size=64", "student.model.num_hidden_layers=1"]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    write_cache(tmp_path / "teacher_logits.h5", records([20, 30, 0, 10, 25, 15] * 4, k=8))
    return tmp_path


def distill(cache: Path, *more: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    output = cache / "student"
    given = [f"distillation.teacher.cache_dir={cache}", f"student.output_dir={output}", "student.batch_tokens=128"]
    monkeypatch.setattr("sys.argv", [SCRIPT, *given, "student.held_out=0.2", "student.warmup_steps=2", *more])
    runpy.run_path(SCRIPT, run_name="__main__")
    return output


def test_a_random_student_learns_what_is_held_out_from_it(cache, monkeypatch, capsys) -> None:
    more = ["student.steps=12", "student.eval_steps=5", "student.learning_rate=0.003", *SMALL]
    output = distill(cache, *more, monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    assert "on 4 held-out items, in nats per token:\n" in out
    before, after = map(float, re.findall(r"^  (?:before|after 12 steps): +([\d.]+) from the teacher", out, re.M))
    curve = json.loads((output / "curve.json").read_text())
    assert [entry["step"] for entry in curve["held_out"]] == [0, 5, 10, 12]
    assert [entry["step"] for entry in curve["train"]] == list(range(1, 13))
    assert sum(entry["loss"] for entry in curve["train"][-3:]) < sum(entry["loss"] for entry in curve["train"][:3])
    assert curve["held_out"][-1]["divergence"] == pytest.approx(after, abs=1e-3)
    assert curve["settings"]["steps"] == 12
    assert "cross-entropy, held out" in (output / "curve.html").read_text()

    dataset = CachedLogitsDataset(cache / "teacher_logits.h5")
    assert curve["content_digest"] == dataset.content_digest
    batch = collate([dataset[i] for i in range(16, 20)])
    logits = AutoModelForCausalLM.from_pretrained(output)(batch["input_ids"], batch["attention_mask"]).logits
    found = distillation_loss(logits, batch["targets"], Objective(alpha=0.9))
    assert found.loss.item() == pytest.approx(curve["held_out"][-1]["loss"], rel=1e-4)
    assert before != after


def test_a_student_learns_from_draws(cache, monkeypatch) -> None:
    write_cache(cache / "teacher_logits.h5", drawn_records(records([20, 30, 0, 10, 25, 15], k=8)))
    output = distill(cache, "student.steps=2", "student.eval_steps=2", *SMALL, monkeypatch=monkeypatch)
    curve = json.loads((output / "curve.json").read_text())
    dataset = CachedLogitsDataset(cache / "teacher_logits.h5")
    batch = collate([dataset[4]])
    logits = AutoModelForCausalLM.from_pretrained(output)(batch["input_ids"], batch["attention_mask"]).logits
    found = distillation_loss(logits, batch["targets"], Objective(tail="sampled", alpha=0.9))
    assert found.loss.item() == pytest.approx(curve["held_out"][-1]["loss"], rel=1e-4)


def test_a_student_continues_from_its_folder(cache, monkeypatch) -> None:
    tiny_model("llama").save_pretrained(cache / "started")
    output = distill(cache, f"student.model_path={cache / 'started'}", "student.steps=1", monkeypatch=monkeypatch)
    assert json.loads((output / "config.json").read_text())["hidden_size"] == 32


def named_tokenizer(cache: Path) -> Path:
    """Write a cache that names its tokenizer, whose folder is returned."""
    teacher = cache / "teacher"
    save_tokenizer(teacher, 50)
    known = {
        "tokenizer_map_digest": map_digest(AutoTokenizer.from_pretrained(teacher).get_vocab()),
        "tokenizer_ids": 50,
    }
    made = records([20, 30, 10, 25], k=8)
    write_cache(cache / "teacher_logits.h5", made, teacher_path=str(teacher), **known)
    return teacher


def test_a_random_student_is_saved_with_the_teachers_tokenizer_and_can_continue(cache, monkeypatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(named_tokenizer(cache))
    vocabulary = tokenizer.get_vocab()
    output = distill(cache, "student.steps=1", *SMALL, monkeypatch=monkeypatch)
    assert AutoTokenizer.from_pretrained(output).get_vocab() == vocabulary
    # Llama's configuration has 2 by default.
    assert tokenizer.eos_token_id != 2
    saved = AutoModelForCausalLM.from_pretrained(output)
    assert saved.generation_config.eos_token_id == saved.config.eos_token_id == tokenizer.eos_token_id
    more = [f"student.model_path={output}", f"student.output_dir={cache / 'continued'}"]
    distill(cache, "student.steps=1", *more, monkeypatch=monkeypatch)
    assert AutoTokenizer.from_pretrained(cache / "continued").get_vocab() == vocabulary


@pytest.mark.parametrize(
    ("n_ids", "message"),
    [
        (60, "student.model_path: expected the teacher's tokenizer of 50 ids (…), got one of 60 ids; choose a student"),
        (None, "student.model_path: expected a tokenizer, its folder or its hub name, got '…'"),
    ],
    ids=["other", "none"],
)
def test_a_student_without_the_teachers_tokenizer_is_refused(cache, monkeypatch, capsys, n_ids, message) -> None:
    named_tokenizer(cache)
    student = cache / "other"
    tiny_model("llama").save_pretrained(student)
    if n_ids:
        save_tokenizer(student, n_ids)
        changed = (student / "tokenizer.json").read_text().replace('"red"', '"crimson"')
        (student / "tokenizer.json").write_text(changed)
    with pytest.raises(SystemExit, match="2"):
        distill(cache, f"student.model_path={student}", monkeypatch=monkeypatch)
    begin, _, end = message.partition("…")
    assert re.search(f"{re.escape(begin)}.*{re.escape(end)}", capsys.readouterr().err)
    assert not (cache / "student").exists()


def test_a_student_with_too_few_logits_is_refused(cache, monkeypatch, capsys) -> None:
    tiny_model("llama", vocab_size=40).save_pretrained(cache / "small")
    with pytest.raises(SystemExit, match="2"):
        distill(cache, f"student.model_path={cache / 'small'}", monkeypatch=monkeypatch)
    assert (
        "student.model_path: expected at least 50 logits, the vocabulary of the cache, got 40"
        in capsys.readouterr().err
    )


def test_batches_keep_to_their_tokens_and_lose_no_item(cache) -> None:
    items = list(CachedLogitsDataset(cache / "teacher_logits.h5"))
    batches = list(runpy.run_path(SCRIPT)["batches"](items, 64))
    assert all(batch["input_ids"].numel() <= 64 for batch in batches)
    assert [row for batch in batches for row in batch["row"].tolist()] == [item["row"].item() for item in items]
    (alone, *_) = runpy.run_path(SCRIPT)["batches"](items, 1)
    assert alone["input_ids"].shape == (1, 20)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["student.stpes=3"], r"student.stpes: unknown setting, did you mean 'student.steps'\?"),
        (["student.steps=0", "student.alpha=x"], r"2 problems .*\n  student.steps: it should be greater than or equal"),
        (["student.alpha=2"], r"alpha: expected a number from 0 to 1, got 2"),
        (["distillation.teacher.cache_dir=nowhere"], r"nowhere"),
        (["student.model_path=nowhere"], r"student.model_path: expected a causal language model .*, got 'nowhere': "),
        (["student.model.model_type=lama"], r"student.model: expected a causal language model .*Unrecognized model id"),
        (["student.device=cuda"], r"student.device: expected 'auto' or 'cpu', because no GPU is visible, got 'cuda'"),
        (
            ["student.held_out=0.999"],
            r"student.held_out: expected a share that leaves items .*, got 0.999 of 20 items; ",
        ),
    ],
    ids=["unknown", "several", "objective", "cache", "folder", "type", "device", "share"],
)
def test_settings_that_do_not_fit_are_refused(cache, monkeypatch, capsys, given, message) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        distill(cache, *given, *SMALL, monkeypatch=monkeypatch)
    assert re.search(message, capsys.readouterr().err)
    assert not (cache / "student").exists()


def test_an_output_folder_that_cannot_be_written_is_refused_before_the_training(cache, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        distill(cache, f"student.output_dir={cache / 'teacher_logits.h5'}", *SMALL, monkeypatch=monkeypatch)
    err = capsys.readouterr().err
    assert re.search(r"student.output_dir: expected a folder that can be written, got '.*h5': .*File exists", err)
    # The label of the progress bar.
    assert not re.search(r"^training", err, re.MULTILINE)


def test_every_setting_is_described_and_has_a_default() -> None:
    text = (ROOT / "config" / "student" / "default.yaml").read_text()
    settings = runpy.run_path(SCRIPT)["StudentSettings"]
    assert list(yaml.safe_load(text)) == list(settings.model_fields)


def test_the_tiny_student_is_a_smaller_one() -> None:
    read = runpy.run_path(SCRIPT)["read_settings"]
    tiny, whole = read(["student=tiny", "student.seed=3"]), read(["student.seed=3"])
    differing = {name for name, value in tiny.model_dump().items() if value != whole.model_dump()[name]}
    assert differing == set(yaml.safe_load((ROOT / "config" / "student" / "tiny.yaml").read_text())) - {"defaults"}
    assert tiny.model == whole.model | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def test_it_is_compared_with_a_student_of_the_text_alone(cache, monkeypatch, capsys) -> None:
    # Six times the same document, so that held-out ones can be learned.
    one = records((30,), k=8)
    tokens = {name: np.concatenate([array] * 6) for name, array in one.tokens().items()}
    places = {"document_row": np.arange(6, dtype=np.uint64), "document_offset": np.zeros(6, np.uint32)}
    write_cache(cache / "teacher_logits.h5", Records(**tokens, **places, document_length=np.full(6, 30, np.uint32)))
    more = ["student.compare_with_labels=true", "student.steps=12", "student.learning_rate=0.01", *SMALL]
    output = distill(cache, *more, monkeypatch=monkeypatch)
    found = dict(re.findall(r"^  (.*?): +([\d.]+) from the teacher", capsys.readouterr().out, re.M))
    assert list(found) == ["before", "after 12 steps", "after 12 steps on labels alone"]
    assert min(found, key=lambda name: float(found[name])) == "after 12 steps"
    curve = json.loads((output / "curve.json").read_text())
    alone = curve["labels_alone"]
    # The same weights, then the same batches.
    for name in ("divergence", "cross_entropy"):
        assert alone["held_out"][0][name] == curve["held_out"][0][name]
        assert alone["train"][0][name] == curve["train"][0][name]
    assert alone["held_out"][-1]["loss"] == alone["held_out"][-1]["cross_entropy"]
