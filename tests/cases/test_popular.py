"""The most downloaded families: each one's targets equal the plain float32 forward of the model that was saved."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import HEAD_WIDTH, VOCAB_SIZE, run
from plain_forward import K, assert_targets_match, plain_targets, settings
from popular import BY_TYPE, FAMILIES, Family, save_family

from dask_logits.config.groups import TeacherConfig
from dask_logits.data.items import plain_items
from dask_logits.job.recompute import verify
from dask_logits.teacher.checkpoint import TeacherSpec, inspect_teacher, load_teacher
from dask_logits.teacher.meter import measure_cost
from dask_logits.teacher.scoring import score_items
from dask_logits.teacher.selfcheck import check
from dask_logits.train.dataset import CachedLogitsDataset

# Beyond every window, chunk and index_topk of the tiny configurations.
LENGTHS = [1, 40, 0, 23]
# A wrapper with several head widths, one of another class than the causal mapping names, and routed experts.
REPRESENTATIVE = ["gemma4", "qwen3_vl", "gpt_oss"]
TABLE = Path(__file__).parents[2] / "docs" / "TEACHERS.md"


def documents() -> list[np.ndarray]:
    draw = np.random.default_rng(3)
    return [draw.integers(VOCAB_SIZE, size=length).astype(np.int32) for length in LENGTHS]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_a_saved_checkpoint_is_scored_as_its_plain_forward(family: Family, tmp_path) -> None:
    model = save_family(tmp_path, family)
    facts = inspect_teacher(TeacherConfig(model_path=str(tmp_path)))
    spec = TeacherSpec(
        path=str(tmp_path), revision=None, identity=facts.identity, dtype="float32", device="cpu", torch_threads=1,
        trust_remote_code=False,
    )  # fmt: skip
    teacher = load_teacher(spec, VOCAB_SIZE)
    assert measure_cost(teacher).linear_flops > 0
    path = check(teacher, exact=True).path
    records = score_items(teacher, plain_items(documents()), settings(path=path)).records
    start = 0
    for document in documents():
        stop = start + len(document)
        if len(document):
            found = {name: array[start:stop] for name, array in records.arrays() if len(array) == records.n_tokens}
            assert assert_targets_match(found, plain_targets(model, document, VOCAB_SIZE, K)) > 0
        start = stop
    assert start == records.n_tokens


def check_run(family: Family, folder: Path, overrides: list[str]) -> None:
    """Run ``generate`` on a family's checkpoint in bfloat16, verify the cache, and compare its targets."""
    model = save_family(folder / "teacher", family, "bfloat16")
    rows = [{"input_ids": document.tolist()} for document in documents()]
    (folder / "ids.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache = run(
        overrides,
        f"distillation.teacher.model_path={folder / 'teacher'}",
        f"distillation.dataset.data_files={folder / 'ids.jsonl'}",
        "distillation.teacher.dtype=float32",
        "distillation.dataset.max_length=64",
        "distillation.cache.profile=plain",
    )
    report = verify(cache.parent, recompute=2)
    assert report.ok, report
    dataset = CachedLogitsDataset(cache, keep_empty=True)
    # Some families' tokenizers add tokens of their own to the saved ones.
    assert VOCAB_SIZE <= dataset.vocab_size <= HEAD_WIDTH
    for item, document in zip(dataset, documents(), strict=True):
        if len(document):
            plain = plain_targets(model, document, dataset.vocab_size, K)
            np.testing.assert_array_equal(item["input_ids"], document)
            logp = plain["logp"][:, :K]
            assert (np.abs(np.asarray(item["topk_logprobs"]) - logp) <= 1e-4 + np.abs(logp) * 2.0**-11).all()


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_a_representative_family_from_generate_to_a_verified_cache(name: str, here, tmp_path) -> None:
    check_run(BY_TYPE[name], tmp_path, here)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_every_family_from_generate_to_a_verified_cache(family: Family, here, tmp_path) -> None:
    check_run(family, tmp_path, here)


def test_the_table_of_teachers_lists_every_family_that_is_tested() -> None:
    rows = [line.split("|")[2].strip(" `") for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    assert [row for row in rows if row in BY_TYPE] == [family.model_type for family in FAMILIES]


def test_a_wrapper_is_scored_without_loading_its_other_parts_where_its_family_allows_it(tmp_path) -> None:
    save_family(tmp_path, BY_TYPE["llama4"])
    facts = inspect_teacher(TeacherConfig(model_path=str(tmp_path)))
    stored = sum(
        tensor.numel()
        for file in tmp_path.glob("*.safetensors")
        for name, tensor in _tensors(file).items()
        if "vision" not in name and "projector" not in name
    )
    assert facts.parameters == stored


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)
