"""Over many families of transformers the path is exact beyond their windows, or refused with the reason."""

from __future__ import annotations

import re

import pytest
import torch
from builders import ROOT
from families import FAMILIES, measure

_FEW = ["cohere2", "deepseek_v3", "deepseek_v32", "falcon_h1", "gemma2", "gemma3n_text", "gpt_oss", "granite", "llama",
        "llama4_text", "mistral", "nanochat", "qwen3_moe", "qwen3_next"]  # fmt: skip
# Largest difference of any log-prob in float32, and RMS error relative to the model's own in bfloat16. Where rounding
# decides which expert is chosen, two equally good paths differ by up to 2.7; elsewhere by 1.2.
_LARGEST_NATS = 1e-4
_LARGEST_RATIO = 4.0


@pytest.mark.parametrize("family", _FEW)
def test_the_path_is_exact_in_float32(family: str) -> None:
    assert_exact(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(_FEW)))
def test_every_path_is_exact_in_float32(family: str) -> None:
    assert_exact(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_path_is_as_exact_as_the_model_in_bfloat16(family: str) -> None:
    assert measure(family, torch.bfloat16).ratio <= _LARGEST_RATIO


def assert_exact(family: str) -> None:
    result = measure(family, torch.float32)
    assert result.largest <= _LARGEST_NATS
    assert result.path.startswith("blocks linear") or result.refusals


def test_the_page_lists_every_family() -> None:
    page = (ROOT / "docs" / "FAMILIES.md").read_text()
    rows = re.findall(r"^\| ([\w-]+) \| (?:blocks|model) ", page, re.MULTILINE)
    assert rows == FAMILIES
    assert len(rows) >= 60
