from __future__ import annotations

import inspect
import math
from pathlib import Path

import pytest
from builders import sentences
from datasets import Dataset

from dask_logits import CachedLogitsDataset, ConfigError, generate_teacher_logits
from dask_logits.config.root import settings

PARAMETERS = {
    "teacher_model_path": inspect.Parameter.empty,
    "dataset": inspect.Parameter.empty,
    "cache_dir": "output/teacher_logits",
    "top_k": 64,
    "batch_size": None,
    "device": "auto",
    "force_regenerate": False,
    "num_workers": None,
    "devices": None,
    "worker_id": None,
    "total_workers": None,
    "streaming": False,
    "streaming_chunk_size": 1000,
    "max_samples": None,
    "max_length": None,
    "text_column": None,
    "messages_column": None,
    "mask_column": None,
    "targets": "topk",
    "draws": None,
    "seed": None,
    "temperatures": (),
    "positions": "all",
    "position_share": None,
}


def test_the_signature_is_the_one_scripts_know() -> None:
    found = {name: p.default for name, p in inspect.signature(generate_teacher_logits).parameters.items()}
    assert list(found.items()) == list(PARAMETERS.items())


def test_one_call_from_dataset_to_cache(tmp_path, fork_server) -> None:
    from builders import save_tokenizer, tiny_model

    tiny_model("llama", max_position_embeddings=2048).save_pretrained(tmp_path / "teacher")
    save_tokenizer(tmp_path / "teacher")
    texts = sentences(12)
    path = generate_teacher_logits(
        str(tmp_path / "teacher"),
        Dataset.from_dict({"text": texts}),
        tmp_path / "run",
        top_k=4,
        device="cpu",
        temperatures=[2],
        positions="entropy",
        position_share=0.5,
    )
    assert path == tmp_path / "run" / "teacher_logits.h5"
    assert isinstance(path, Path)
    found = CachedLogitsDataset(path)
    assert [len(item["input_ids"]) for item in found] == [len(text.split()) for text in texts]
    assert found.temperatures == (2.0,)
    assert [len(item["target_pos"]) for item in found] == [math.ceil(len(text.split()) / 2) for text in texts]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"streaming": True}, "expected a number of rows for a stream, got null"),
        ({"worker_id": 2, "total_workers": 2}, "worker_id: expected less than total_workers 2, got 2"),
        ({"top_k": 0}, "expected int ≥ 1, got 0"),
        ({"device": "tpu"}, "got 'tpu'"),
    ],
)
def test_what_it_cannot_do_is_refused_plainly(changes, message, tmp_path) -> None:
    with pytest.raises(ConfigError, match=message):
        generate_teacher_logits("teacher", Dataset.from_dict({"text": ["a"]}), tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_the_defaults_are_those_of_the_settings() -> None:
    parameters = inspect.signature(generate_teacher_logits).parameters
    defaults = {setting.path.rpartition(".")[2]: setting.default for setting in settings()}
    given = {name: each.default for name, each in parameters.items() if each.default is not each.empty}
    assert given == {name: None if name == "max_length" else defaults[name] for name in given}
