"""Every block of docs/DISTILLATION.md, in a folder that holds what the quickstart leaves and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from builders import sentences, write_json_lines
from test_documents import DISTILLATION, JOIN, ROOT, fill, inside, quickstart, run_document

import dask_logits
from dask_logits.cli import main


@pytest.fixture
def after_quickstart(tmp_path: Path, scheduler: str) -> Iterator[Path]:
    """A folder like a checkout in which the quickstart has run, on the suite's worker."""
    for name in ("scripts", "config", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "scheduler.json").write_text(json.dumps({"address": scheduler}))
    fill(tmp_path)
    write_json_lines(tmp_path / "output" / "corpus" / "python-reference.jsonl", sentences(12, longest=60))
    with inside(tmp_path):
        main(["generate", *quickstart(), JOIN])
        yield tmp_path


def test_every_block_runs_from_the_quickstart_alone(after_quickstart, capsys) -> None:
    names = run_document(DISTILLATION, after_quickstart)
    out = capsys.readouterr().out
    assert len(re.findall(r"^step \d: [\d.]+ nats per token$", out, re.M)) == 5
    assert names["student"].lm_head.weight.grad.abs().sum() > 0
    assert names["with_loss"].head is not None
    torch.testing.assert_close(names["fused"].loss, names["result"].loss)
    assert names["each"].loss.shape == names["uncertain"].shape
    assert names["trainer"].state.global_step == 4
    assert {"divergence", "cross_entropy", "tokens_per_second"} <= names["trainer"].state.log_history[0].keys()
    assert "held out: " in out
    assert "student and curve: output/curve" in out
    assert len(names["parts"]) == len(names["dataset"]) == 12
    assert len(names["both"]) > 12
    assert names["present"].all()
    assert names["at_some"].n_tokens == int(names["part"]["targets"].mask.sum())
    assert names["at_some"].n_tokens < int(names["part"]["attention_mask"].sum())
    assert names["drawn"]["targets"].draws == 50
    assert names["of_draws"].loss > 0
    assert names["first_of_document"].sum() > 1
    assert len(names["row_of_token"]) == len(names["offset"]) == len(names["block"]["input_ids"])
    assert names["sampler"].epoch == 2
    assert names["targets"].topk_logprobs.shape[:2] == names["batch"]["input_ids"].shape
    assert "student_vocab_size: " in repr(names["narrow"])


def test_the_losses_in_the_page_are_those_there_are() -> None:
    losses = {name for name in dask_logits.__all__ if name.endswith("_loss")}
    section = DISTILLATION.read_text().partition("## Losses")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+_loss)` \|", section, re.M)) == losses
