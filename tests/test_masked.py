"""Jobs on chats and on masked token ids, from the row to the loss."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import compact, digest, extras_of, plain, records, run, write_cache, write_json_lines
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from dask_logits import (
    CachedLogitsDataset,
    DatasetError,
    Objective,
    RunConflictError,
    TeacherError,
    collate,
    collate_flat,
    convert,
    distillation_loss,
    generate_teacher_logits,
    load_config,
    merge,
    verify,
)
from dask_logits.cache.reader import CacheReader
from dask_logits.job.prepare import prepare
from dask_logits.job.run import _dated
from dask_logits.ops.show import card

# "moon" begins a turn and "sea" ends it, in the words of the tests' tokenizer.
TEMPLATE = (
    "{% for m in messages %}moon {{ m['role'] }} {{ m['content'] }} sea\n{% endfor %}"
    "{% if add_generation_prompt %}moon assistant{% endif %}"
)
TURNS = [("user", "red cat runs"), ("assistant", "a green dog sings"), ("user", "the sun"), ("assistant", "sleeps")]


_ONE, _TWO = "a green dog sings sea", "a green dog sings sea sleeps sea"
# What the chats of the fixture teach, without the empty one.
TAUGHT = [_ONE, _TWO, _ONE, _ONE, _TWO, _ONE, _TWO]


def chat(turns) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture(scope="module")
def chat_teacher(llama, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "teacher"
    shutil.copytree(llama, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def chats(here, chat_teacher, tmp_path) -> list[str]:
    rows = [{"messages": chat(TURNS[: 2 * (i % 2 + 1)])} for i in range(8)]
    rows[3]["messages"] = []
    file = write_json_lines(tmp_path / "chats.jsonl", rows)
    return [
        *here,
        f"distillation.teacher.model_path={chat_teacher}",
        f"distillation.dataset.data_files={file}",
        "distillation.dataset.messages_column=messages",
        "distillation.dataset.max_length=64",
        "distillation.partition.rows=3",
    ]


def words(dataset, chat_teacher) -> list[str]:
    """Return the texts of the tokens that each item teaches."""
    tokenizer = AutoTokenizer.from_pretrained(chat_teacher)
    return [tokenizer.decode(item["input_ids"][1:][item["loss_mask"][:-1]]) for item in dataset]


def test_a_student_learns_what_the_assistant_says(chats, chat_teacher) -> None:
    path = run(chats)
    dataset = CachedLogitsDataset(path)
    assert len(dataset) == 7
    assert words(dataset, chat_teacher) == TAUGHT
    assert verify(path.parent).ok
    found = card(path)
    assert found["learned"] == 4 * 5 + 3 * 7
    assert (found["dataset"]["column"], found["dataset"]["learn"]) == ("messages", "assistant")
    (batch,) = DataLoader(dataset, batch_size=7)
    targets = batch["targets"]
    assert int(targets.mask.sum()) == found["learned"]
    # Labels are those of a causal model that shifts inside.
    assert torch.equal(batch["labels"][:, 1:] != -100, targets.mask[:, :-1])
    assert torch.equal(targets.label_ids[targets.mask], batch["labels"][batch["labels"] != -100])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(chat_teacher)(batch["input_ids"]).logits[..., :104]
    result = distillation_loss(logits, targets, Objective(alpha=0.5))
    rows, labels = logits[targets.mask], targets.label_ids[targets.mask]
    torch.testing.assert_close(result.cross_entropy, torch.nn.functional.cross_entropy(rows, labels))
    assert 0 <= result.divergence < 1e-3
    assert run(chats) == path


def test_a_run_keeps_the_date_of_its_first_start(chats, chat_teacher, tmp_path) -> None:
    folder = tmp_path / "dated"
    shutil.copytree(chat_teacher, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ 'hill' if strftime_now('%Y-%m-%d') == '2001-02-03' else 'sun' }} " + TEMPLATE
    tokenizer.save_pretrained(folder)
    chats = [*chats, f"distillation.teacher.model_path={folder}"]
    path = run(chats)

    def first_words() -> set[str]:
        return {tokenizer.decode(item["input_ids"][:1]) for item in CachedLogitsDataset(path)}

    assert first_words() == {"sun"}
    # As if the run had been started on another day, and stopped before its first partition.
    manifest = path.parent / "run.json"
    record = json.loads(manifest.read_text())
    assert date.fromisoformat(record["template_date"]) <= date.today()
    manifest.write_text(json.dumps(record | {"template_date": "2001-02-03"}))
    path.unlink()
    assert run(chats) == path
    assert first_words() == {"hill"}
    assert verify(path.parent, recompute=4).ok
    # A job that was prepared before it could know the run takes over the run's date.
    job = prepare(load_config([*chats, "distillation.teacher.generation.force_regenerate=true"]))
    assert job.tokenizer_spec.template_date != "2001-02-03"
    assert _dated(job).tokenizer_spec.template_date == "2001-02-03"


def test_all_tokens_are_learned_when_asked(chats) -> None:
    dataset = CachedLogitsDataset(run(chats, "distillation.dataset.learn=all"))
    assert "loss_mask" not in dataset[0]
    assert "learned" not in {name for name, value in card(dataset.paths[0]).items() if value is not None}


@pytest.mark.parametrize(
    "way",
    [
        ["distillation.dataset.long_documents=window", "distillation.dataset.max_length=6"],
        [
            "distillation.dataset.packing=concat",
            "distillation.dataset.max_length=10",
            "distillation.dataset.separator_id=0",
        ],
        ["distillation.dataset.streaming=true", "distillation.dataset.max_samples=all"],
        ["distillation.cache.profile=compact"],
    ],
)
def test_a_mask_stays_with_its_tokens(chats, chat_teacher, way) -> None:
    path = run(chats, *way)
    tokens = np.concatenate([item["input_ids"].numpy() for item in CachedLogitsDataset(path)])
    mask = np.concatenate([item["loss_mask"].numpy() for item in CachedLogitsDataset(path)])
    tokenizer = AutoTokenizer.from_pretrained(chat_teacher)
    at = np.flatnonzero(mask[:-1])
    assert mask[-1] == 0
    found = tokenizer.decode(tokens[at + 1]).split()
    if "window" in way[0]:
        # Also a token that begins the next window is learned, once.
        assert found == [word for text in TAUGHT for word in text.split()]
    assert set(found) <= {"a", "green", "dog", "sings", "sea", "sleeps"}
    assert len(found) > 20
    assert verify(path).ok


def test_static_workers_and_conversions_keep_the_mask(chats, tmp_path) -> None:
    whole = digest(run(chats))
    share = [f"distillation.teacher.cache_dir={tmp_path / 'shared'}", "distillation.teacher.generation.total_workers=2"]
    for worker in (0, 1):
        run(chats, *share, f"distillation.teacher.generation.worker_id={worker}")
    merged = merge([tmp_path / "shared"])
    assert digest(merged) == whole
    other = convert(merged, tmp_path / "other.h5", profile="compact")
    back = convert(other, tmp_path / "back.h5", profile="plain")
    masks = [
        np.concatenate([item["loss_mask"].numpy() for item in CachedLogitsDataset(p)]) for p in (merged, other, back)
    ]
    assert all(np.array_equal(masks[0], mask) for mask in masks[1:])
    assert verify(tmp_path / "shared", recompute=3, seed=1).ok


def test_token_ids_with_a_mask(here, llama, tmp_path) -> None:
    rows = [{"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]}, {"input_ids": [7], "labels": [-100]}]
    path = generate_teacher_logits(
        str(llama), rows, tmp_path / "run", top_k=8, device="cpu", num_workers=1, mask_column="labels"
    )
    one, two = CachedLogitsDataset(path)
    assert one["loss_mask"].tolist() == [False, True, True, False]
    assert two["loss_mask"].tolist() == [False]
    flat = collate_flat([one, two])
    assert flat["labels"].tolist() == [[-100, -100, 5, 6, -100]]
    assert flat["targets"].mask.tolist() == [[False, True, True, False, False]]
    batch = collate([two])
    assert distillation_loss(torch.zeros(1, 1, 104), batch["targets"]).loss == 0


def test_what_cannot_be_learned_from_is_refused_before_anything_is_written(chats, here, llama, tmp_path) -> None:
    file = write_json_lines(tmp_path / "users.jsonl", [{"messages": chat(TURNS[:1])}] * 3)
    with pytest.raises(
        DatasetError, match=r"messages_column: expected tokens that a student learns, got none in 3 rows"
    ):
        run(chats, f"distillation.dataset.data_files={file}")
    with pytest.raises(TeacherError, match="expected a tokenizer with a chat template, got one without"):
        run(chats, f"distillation.teacher.model_path={llama}")
    assert not (tmp_path / "run").exists()


def test_a_chat_that_cannot_be_rendered_is_named_or_skipped(chats, tmp_path) -> None:
    rows = [{"messages": chat(TURNS)}, {"messages": [{"content": "no role"}]}, {"messages": chat(TURNS[:2])}]
    file = write_json_lines(tmp_path / "odd.jsonl", rows)
    few = [f"distillation.dataset.data_files={file}", "distillation.dataset.on_bad_row=skip"]
    path = run(chats, *few)
    assert card(path)["skipped_rows"] == 1
    assert [len(item["input_ids"]) > 0 for item in CachedLogitsDataset(path, keep_empty=True)] == [True, False, True]


masked = records((4, 0, 3), k=3, masked=True)


@pytest.mark.parametrize("profile", [plain(3, extras=extras_of(masked)), compact(3, extras=extras_of(masked))])
def test_a_cache_keeps_a_mask(tmp_path, profile) -> None:
    path = tmp_path / "teacher_logits.h5"
    write_cache(path, masked, profile=profile)
    np.testing.assert_array_equal(CacheReader(path).tokens(0, 7)["loss_mask"], masked.loss_mask)
    windows = list(CachedLogitsDataset(path, window=3))
    assert torch.cat([item["loss_mask"] for item in windows]).tolist() == masked.loss_mask.astype(bool).tolist()


def test_verify_finds_a_mask_that_cannot_be(tmp_path) -> None:
    wrong = masked.loss_mask.copy()
    wrong[[1, 3]] = 2, 1
    write_cache(tmp_path / "c.h5", dataclasses.replace(masked, loss_mask=wrong))
    problems = [problem for check in verify(tmp_path / "c.h5").checks for problem in check.problems]
    assert [problem.split(":")[0] for problem in problems] == ["row 0, token 1", "row 0, token 3"]


def test_what_was_read_with_a_mask_is_not_resumed_without(chats) -> None:
    run(chats)
    with pytest.raises(RunConflictError, match=r"dataset\.learn: the run has 'assistant', now 'all'"):
        run(chats, "distillation.dataset.learn=all")


def test_a_run_names_its_template_and_is_not_resumed_with_another(chats, chat_teacher, tmp_path) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(chat_teacher, folder)
    chats = [*chats, f"distillation.teacher.model_path={folder}"]
    path = run(chats)
    digest_of = {
        template: hashlib.sha256(json.dumps(template).encode()).hexdigest() for template in (TEMPLATE, TEMPLATE + " ")
    }
    what = json.loads((path.parent / "run.json").read_text())["what"]
    assert what["dataset.chat_template"] == digest_of[TEMPLATE]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE + " "
    tokenizer.save_pretrained(folder)
    with pytest.raises(RunConflictError) as refused:
        run(chats)
    assert refused.value.differences == {"dataset.chat_template": tuple(digest_of.values())}


def test_a_chat_with_tools_is_scored(chats, chat_teacher, tmp_path) -> None:
    rows = [{"messages": chat(TURNS), "tools": json.dumps([{"name": "look"}])}]
    file = write_json_lines(tmp_path / "tools.jsonl", rows)
    folder = tmp_path / "teacher"
    shutil.copytree(chat_teacher, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% if tools %}hill {{ tools[0]['name'] }} {% endif %}" + TEMPLATE
    tokenizer.save_pretrained(folder)
    path = run(chats, f"distillation.dataset.data_files={file}", f"distillation.teacher.model_path={folder}")
    (item,) = CachedLogitsDataset(path)
    assert AutoTokenizer.from_pretrained(folder).decode(item["input_ids"]).startswith("hill [UNK] moon")
