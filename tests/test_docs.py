"""What the documents say is run."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shlex
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from builders import (
    compact,
    drawn_records,
    extras_of,
    plain,
    records,
    save_tokenizer,
    sentences,
    tiny_model,
    write_cache,
    write_json_lines,
)

from dask_logits import cli
from dask_logits.cache.profile import as_kept
from dask_logits.config.compose import load_config
from dask_logits.records import OPTIONAL_TOKEN_ARRAYS, TOKEN_ARRAYS, Extras

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(("dask-logits", "scripts/generate"))]


# Their datasets are on the hub: tests/test_hub.py runs them by name, tests/job/test_static.py the launcher.
@pytest.mark.parametrize("command", [c for c in commands() if "distillation" in c[-1]], ids=lambda c: c[1])
def test_commands_of_the_readme_are_valid(command: list[str]) -> None:
    overrides = [word for word in command if word.startswith("distillation.")]
    assert load_config(overrides).dataset.name in ("Salesforce/wikitext", "HuggingFaceFW/fineweb")


# tests/test_site.py: docs/reference/commands.md has all of them.
def test_the_readme_shows_the_commands_of_a_run_and_no_other_words() -> None:
    shown = set(re.findall(r"dask-logits ([a-z]+)", README))
    assert shown >= {"plan", "generate", "status", "report", "explore", "merge"}
    assert shown <= set(cli.commands.commands)


def test_settings_named_in_the_documents_exist() -> None:
    from dask_logits.config.root import settings

    known = {setting.path for setting in settings()}
    groups = {path.rsplit(".", n)[0] for path in known for n in (1, 2, 3)}
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "scripts").iterdir()):
        for name in re.findall(r"distillation(?:\.[a-z_]+)+", path.read_text()):
            assert name in known | groups, f"{path.name}: {name}"


def test_files_named_in_the_readme_exist() -> None:
    for name in re.findall(r"(?:scripts|docs|benchmarks)/[\w./-]+\.(?:sh|py|md)", README):
        assert (ROOT / name).exists(), name


def test_the_training_example_trains_and_says_so(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output" / "quickstart").mkdir(parents=True)
    write_cache(tmp_path / "output" / "quickstart" / "teacher_logits.h5", records((200, 0, 300) * 10, k=4))
    (example,) = [block for block in blocks("python") if "distillation_loss" in block]
    torch.manual_seed(0)
    exec(example, {})
    losses = [
        float(loss) for loss in re.findall(r"^step +\d+: ([\d.]+) nats per token$", capsys.readouterr().out, re.M)
    ]
    assert len(losses) == 10
    assert sum(losses[-3:]) < sum(losses[:3])


def test_the_one_call_example_runs(tmp_path, monkeypatch, fork_server) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model("llama", max_position_embeddings=2048).save_pretrained("teacher")
    save_tokenizer(Path("teacher"))
    write_json_lines(Path("corpus.jsonl"), sentences(5))
    (example,) = [block for block in blocks("python") if "generate_teacher_logits(" in block]
    found: dict = {"__name__": "__main__"}
    exec(example, found)
    assert found["cache"] == tmp_path / "output" / "logits" / "teacher_logits.h5"


def test_the_format_example_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    *examples, of_draws = blocks("python", (ROOT / "docs" / "FORMAT.md").read_text())
    profiles = (plain(4, 300), plain(4, 300, Extras(has_target_pos=True)), compact(4, 300))
    for example, profile in zip(examples, profiles, strict=True):
        made = records((5, 3), k=4, vocab_size=300)
        if profile.extras.has_target_pos:
            made = made.at(np.array([1, 4, 6]))
        write_cache(tmp_path / "teacher_logits.h5", made, vocab_size=300, profile=profile)
        found: dict = {}
        exec(example, found)
        kept = as_kept(made, profile)
        n_targets = 5 if made.target_pos is None else 2
        assert found["next_token_ids"].tolist() == kept.topk_ids[:n_targets].tolist()
        assert found["next_token_logprobs"].astype(np.float16).tolist() == kept.topk_logprobs[:n_targets].tolist()
        assert found.get("positions", np.array([1, 4])).tolist() == [1, 4]
    made = drawn_records(records((5, 3), vocab_size=300), vocab_size=300)
    write_cache(tmp_path / "teacher_logits.h5", made, vocab_size=300, profile=compact(7, 300, extras=extras_of(made)))
    found = {}
    exec(of_draws, found)
    rows = np.arange(4)[:, None] * np.ones((1, 7), np.int64)
    is_present = made.topk_counts[:4] > 0
    for name, wanted in (("ids", made.topk_ids[:4]), ("counts", made.topk_counts[:4]), ("position", rows)):
        assert found[name].tolist() == wanted[is_present].tolist()


def test_the_content_digest_is_that_of_the_format_document(tmp_path) -> None:
    made = dataclasses.replace(
        records((4, 0, 2, 6, 1), k=3, masked=True).at(np.array([1, 2, 7, 9, 12])),
        document_row=np.array([0, 1, 2, 3, 3], np.uint64),
        document_offset=np.array([0, 0, 0, 0, 6], np.uint32),
        block_length=np.array([6, 6, 1], np.uint32),
    )
    expected = write_cache(tmp_path / "c.h5", made)
    order = ("input_ids", "topk_ids", "topk_logprobs", "logsumexp", "tail_logmass", "label_logprob", "loss_mask",
             "target_pos")  # fmt: skip
    total = 0
    with h5py.File(tmp_path / "c.h5") as file:
        arrays = {name: file[name][:] for name in file if isinstance(file[name], h5py.Dataset)}
    head = ";".join(f"{name} {arrays[name].dtype.str} {list(arrays[name].shape[1:])}" for name in order)
    assert head.startswith("input_ids <u2 [];topk_ids <u2 [3];topk_logprobs <f2 [3];")
    assert head.endswith(";loss_mask |u1 [];target_pos <u8 []")
    places = [arrays[f"document_{name}"].tolist() for name in ("row", "offset", "start", "length")]
    for row, offset, start, length in zip(*places, strict=True):
        first, last = np.searchsorted(arrays["target_pos"], np.array([start, start + length], np.uint64))
        data = f"{head}document ({row}, {offset}) {length}".encode()
        for name in order:
            tokens = name in ("input_ids", "loss_mask")
            part = arrays[name][start : start + length] if tokens else arrays[name][first:last]
            data += (part - np.uint64(start) if name == "target_pos" else part).tobytes()
        total += int.from_bytes(hashlib.sha256(data).digest(), "big")
    for text in ("block (0, 0) 6", "block (3, 0) 6", "block (3, 6) 1"):
        total += int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
    assert f"{total % 2**256:064x}" == expected


def test_the_format_document_names_every_array() -> None:
    text = (ROOT / "docs" / "FORMAT.md").read_text()
    logical, _, stored = text.partition("## Profile `compact`")
    arrays = [
        *TOKEN_ARRAYS,
        *OPTIONAL_TOKEN_ARRAYS,
        "document_row",
        "document_offset",
        "document_start",
        "document_length",
    ]
    assert re.findall(r"^\| `(\w+)` \|", logical, re.M) == [*arrays, "block_length", "block_start", "token_crcs"]
    wide = compact(4, 70_000, precision=12)
    for name in (*wide.arrays, *wide.tables, "chunks/<name>/offset", "crc32/<name>"):
        short = re.sub(r"_b\d$", "_b", name)
        assert f"`{name}`" in stored or (f"`{short}1`" in stored and f"`_{name[-2:]}`" in stored), name


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 250
