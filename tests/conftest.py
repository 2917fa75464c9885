"""Tiny real teachers, corpora and one Dask worker that most jobs of the suite share."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parents[1]
SMOLLM2 = ROOT / "output" / "models" / "SmolLM2-135M-Instruct"
WORDS = ["red", "green", "blue", "cat", "dog", "sun", "moon", "tree", "sea", "hill", "runs", "sings", "sleeps", "a", "the"]
HEAD_WIDTH = 112
VOCAB_SIZE = 104


@pytest.fixture(scope="session", autouse=True)
def _datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("hf-datasets")


def save_tokenizer(folder: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """Save a tokenizer of words with `vocab_size` ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = WORDS + [f"w{i}" for i in range(vocab_size - len(WORDS) - 1)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(folder)


def tiny_model(family: str, **overrides):
    """Build a random causal model with a head wider than the tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {
        "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 0, "eos_token_id": 0},
        "gemma2": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 8,
            "final_logit_softcapping": 5.0,
        },
        "granite": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "logits_scaling": 3.0,
        },
        "phi": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    }[family]
    positions = {} if family == "gpt2" else {"max_position_embeddings": 256}
    config = AutoConfig.for_model(family, vocab_size=HEAD_WIDTH, **{**positions, **small, **overrides})
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # The default spread leaves random logits nearly flat; a sharp head makes mistakes visible.
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return model


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return family → folder with a tiny teacher and its tokenizer, built once."""
    made: dict[str, Path] = {}

    def build(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(f"teacher-{family}")
            tiny_model(family).save_pretrained(folder)
            save_tokenizer(folder)
            made[family] = folder
        return made[family]

    return build


@pytest.fixture(scope="session")
def llama(teacher_folder: Callable[[str], Path]) -> Path:
    return teacher_folder("llama")


def sentences(count: int, seed: int = 1, longest: int = 30) -> list[str]:
    """Return documents of very uneven length."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.choice([1, 2, 5, 9, longest]))) for _ in range(count)]


def write_json_lines(path: Path, rows: list) -> Path:
    """Write rows as JSON lines; plain strings become a ``text`` column."""
    rows = [{"text": row} if isinstance(row, str) or row is None else row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSON-lines corpus of 40 documents, one of them empty."""
    rows = sentences(40)
    rows[7] = ""
    return write_json_lines(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", rows)


@pytest.fixture(scope="session")
def scheduler() -> Iterator[str]:
    """Address of one scheduler with one worker process, which the suite's jobs join."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1, threads_per_worker=1, memory_limit=None, dashboard_address=None, host="127.0.0.1"
    ) as cluster:
        yield cluster.scheduler_address


@pytest.fixture
def overrides(llama: Path, corpus: Path, tmp_path: Path) -> list[str]:
    """Overrides of a small job on a cluster of its own."""
    return [
        f"distillation.teacher.model_path={llama}",
        f"distillation.teacher.cache_dir={tmp_path / 'run'}",
        "distillation.teacher.generation.top_k=8",
        "distillation.teacher.generation.torch_threads=1",
        "distillation.dataset.name=json",
        f"distillation.dataset.data_files={corpus}",
        "distillation.dataset.max_length=16",
        "distillation.partition.rows=12",
        "distillation.cluster.dashboard_address=null",
    ]


@pytest.fixture
def joined(overrides: list[str], scheduler: str) -> list[str]:
    """The same job on the suite's worker."""
    return [*overrides, f"distillation.cluster.scheduler={scheduler}"]


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
