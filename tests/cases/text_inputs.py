"""Inputs that people have and that once went wrong, made from small texts."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
from builders import VOCAB_SIZE

from dask_logits.config.groups import DatasetConfig
from dask_logits.data.arrow import Corpus, open_corpus, slice_files
from dask_logits.data.source import read_rows
from dask_logits.data.tokens import TokenizerSpec


def documents(count: int, longest: int = 10**9) -> list[str]:
    """Return real texts: parts of the Python language reference."""
    from pydoc_data.topics import topics

    parts = [part[:longest] for text in topics.values() for part in text.split("\n\n\n") if len(part) > 40]
    return parts[:count]


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def zstd_frames(path: Path, *frames: bytes) -> Path:
    """Write Zstandard frames one after the other, as parallel compressors do."""
    made = b""
    for frame in frames:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(frame)
        made += sink.getvalue().to_pybytes()
    path.write_bytes(made)
    return path


def corpus(name: str | Path, *files: Path | str, **settings) -> Corpus:
    """Open a regular dataset."""
    listed = tuple(str(file) for file in files) or None
    return open_corpus(DatasetConfig(name=str(name), data_files=listed, **settings))


def worker_rows(opened: Corpus, folder: Path) -> list:
    """Return the rows of a regular dataset as a worker reads them."""
    files = opened.files or opened.materialise(folder / "materialised")
    return read_rows(slice_files(files, 0, opened.n_rows), opened.column)


def ids_spec(**changes) -> TokenizerSpec:
    """Return how rows that hold ids are read."""
    values = {
        "path": None,
        "revision": None,
        "trust_remote_code": False,
        "identity": None,
        "add_special_tokens": True,
        "max_length": None,
        "vocab_size": VOCAB_SIZE,
    }
    return TokenizerSpec(**{**values, **changes})


def byte_level_tokenizer(bos: str | None = None):
    """Return a byte-level BPE tokenizer, trained on real text; with `bos`, one that adds it at the beginning."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(documents(40), trainer)
    if bos is not None:
        made.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", pad_token="<|end|>", bos_token=bos)


def unigram_tokenizer():
    """Return a Unigram tokenizer in the manner of SentencePiece."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=600, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    made.train_from_iterator(documents(40), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
