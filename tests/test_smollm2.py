"""The real teacher: SmolLM2-135M on real text."""

from __future__ import annotations

import json

import numpy as np
import pytest
from builders import ROOT, SMOLLM2, items
from plain_forward import assert_targets_match, plain_targets

from dask_logits import generate, load_config
from dask_logits.cache.reader import CacheReader

CORPUS = ROOT / "output" / "corpus" / "python-reference.jsonl"

pytestmark = pytest.mark.teacher


@pytest.fixture(scope="module", autouse=True)
def _prepared() -> None:
    if not (SMOLLM2 / "config.json").exists() or not CORPUS.exists():
        pytest.fail("run scripts/prepare_quickstart.py first (scripts/test.sh does)")


def test_cached_targets_equal_the_plain_forward_in_float32(tmp_path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cache = generate(
        load_config(
            [
                f"distillation.teacher.model_path={SMOLLM2}",
                "distillation.teacher.dtype=float32",
                "distillation.teacher.generation.torch_threads=1",
                f"distillation.teacher.cache_dir={tmp_path / 'run'}",
                "distillation.dataset.name=json",
                f"distillation.dataset.data_files={CORPUS}",
                "distillation.dataset.max_samples=4",
                "distillation.dataset.max_length=96",
                "cluster=serial",
            ]
        )
    )
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    texts = [json.loads(line)["text"] for line in CORPUS.read_text().splitlines()[:4]]
    reader = CacheReader(cache)
    assert reader.n_documents == 4
    compared = 0
    for document, text in zip(items(reader), texts, strict=True):
        ids = tokenizer(text, truncation=True, max_length=96)["input_ids"]
        np.testing.assert_array_equal(document["input_ids"], ids)
        compared += assert_targets_match(document, plain_targets(model, np.array(ids), 49_152, 64))
    assert compared > 0.9 * reader.n_tokens
