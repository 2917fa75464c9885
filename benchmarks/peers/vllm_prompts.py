"""vLLM on the documents of ``benchmarks/capture.py`` or ``benchmarks/gpu.py``: prompt log-probs of every position.

It prints one JSON line a round. It runs in an environment of its own (``benchmarks/peers/requirements-vllm.txt``). The
engine is loaded and warmed with one document first; what is timed is ``generate`` over all documents and its flat lists
turned into arrays on disk.

    ENVIRONMENT/bin/python benchmarks/peers/vllm_prompts.py --model FOLDER --corpus FILE --documents 45
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus", required=True, help="JSON lines, each with a text or input_ids")
    parser.add_argument("--documents", type=int, default=45)
    parser.add_argument("--k", type=int, default=64, help="prompt log-probs per position; 0: none are asked for")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--memory", type=float, default=0.3, help="share of the memory that vLLM takes")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--compile", action="store_true", help="use compiled code and CUDA graphs")
    arguments = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        sys.exit(
            "vllm_prompts: vLLM is not installed here; make an environment of its own as "
            "benchmarks/peers/requirements-vllm.txt says, and run this with its python"
        )
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": str(arguments.threads),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{arguments.threads - 1}",
    }
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    rows = [json.loads(line) for line in Path(arguments.corpus).read_text().splitlines()[: arguments.documents]]
    has_ids = "input_ids" in rows[0]
    if has_ids:
        documents = [row["input_ids"][: arguments.max_length] for row in rows]
    else:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        documents = [
            tokenizer(row["text"], truncation=True, max_length=arguments.max_length)["input_ids"] for row in rows
        ]
    prompts = [{"prompt_token_ids": ids} for ids in documents if ids]
    engine = LLM(
        arguments.model,
        dtype="bfloat16",
        max_logprobs=max(arguments.k, 1),
        enable_prefix_caching=False,
        max_num_batched_tokens=arguments.batch_tokens,
        max_model_len=arguments.max_length + 1,
        enforce_eager=not arguments.compile,
        skip_tokenizer_init=has_ids,
        gpu_memory_utilization=arguments.memory,
    )
    sampling = SamplingParams(
        max_tokens=1,
        temperature=0,
        detokenize=False,
        prompt_logprobs=arguments.k or None,
        flat_logprobs=True,
    )
    engine.generate(prompts[:1], sampling, use_tqdm=False)
    for _ in range(arguments.rounds):
        started = time.perf_counter()
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        if arguments.k:
            with tempfile.TemporaryDirectory() as folder:
                flat = [output.prompt_logprobs for output in outputs]
                np.save(Path(folder) / "ids.npy", np.concatenate([np.array(f.token_ids, np.int32) for f in flat]))
                np.save(Path(folder) / "logprobs.npy", np.concatenate([np.array(f.logprobs, np.float16) for f in flat]))
        seconds = time.perf_counter() - started
        print(json.dumps({"tokens": sum(map(len, documents)), "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
