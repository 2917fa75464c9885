"""The job against the loop people write today, on the same text and teacher, alternating in one run.

The loop: documents in dataset order, four at a time, padded to the longest of the four, an attention mask, the model's
``.logits``, ``log_softmax`` in float32, ``torch.topk``, appended to a resizable HDF5 file with padding stripped.
Ours: ``dask-logits generate cluster=serial``, from the first partition's start to the renamed HDF5, by the times in its
``status.json``. Imports and loading the model and the tokenizer are left out of all. The meter's limit is a GEMM of the
same dtype measured in the same run.

    python benchmarks/capture.py --documents 45 --rounds 3 --out benchmarks/results/NAME.json
    python benchmarks/capture.py --tiny    # does it run? the figures mean nothing
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

MODEL = "output/models/SmolLM2-135M-Instruct"
CORPUS = "output/corpus/python-reference.jsonl"


def loop(arguments: argparse.Namespace, path: Path) -> dict[str, float]:
    """Run the padded batch-4 loop in this process."""
    import h5py
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dask_logits.worker.task import peak_rss_bytes

    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "right"
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
    texts = read_texts(arguments)
    tokens = 0
    started = time.perf_counter()
    with h5py.File(path, "w") as file, torch.inference_mode():
        ids = file.create_dataset("ids", (0, arguments.k), np.int32, maxshape=(None, arguments.k), chunks=True)
        logprobs = file.create_dataset(
            "logprobs", (0, arguments.k), np.float16, maxshape=(None, arguments.k), chunks=True
        )
        for first in range(0, len(texts), 4):
            batch = tokenizer(
                texts[first : first + 4], padding=True, truncation=True, max_length=arguments.max_length,
                return_tensors="pt",
            )  # fmt: skip
            logits = model(**batch).logits
            top = logits.float().log_softmax(-1).topk(arguments.k)
            keep = batch["attention_mask"].bool()
            count = int(keep.sum())
            for dataset, values in ((ids, top.indices), (logprobs, top.values)):
                dataset.resize(tokens + count, 0)
                dataset[tokens:] = values[keep].numpy()
            tokens += count
    seconds = time.perf_counter() - started
    return {
        "tokens": tokens,
        "seconds": seconds,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def ours(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the job in this process, and read what it recorded of itself."""
    from dask_logits import generate, load_config

    settings = [
        f"distillation.teacher.model_path={arguments.model}",
        f"distillation.teacher.dtype={arguments.dtype}",
        f"distillation.teacher.cache_dir={folder}",
        f"distillation.teacher.generation.top_k={arguments.k}",
        f"distillation.teacher.generation.torch_threads={arguments.threads}",
        f"distillation.scoring.compile={arguments.compile}",
        "distillation.dataset.name=json",
        f"distillation.dataset.data_files={arguments.corpus}",
        f"distillation.dataset.max_samples={arguments.documents}",
        f"distillation.dataset.max_length={arguments.max_length}",
        "cluster=serial",
    ]
    cache = generate(load_config(settings))
    receipts = [json.loads(path.read_text()) for path in (folder / "receipts").rglob("*.json")]
    calibration = json.loads((folder / "calibration.json").read_text())
    entered = json.loads((folder / "status.json").read_text())["entered"]
    parts: Counter[str] = Counter()
    for receipt in receipts:
        parts.update(receipt["seconds"])
    return {
        "tokens": sum(receipt["statistics"]["tokens"] for receipt in receipts),
        "seconds": entered["done"] - entered["running"],
        "consolidate_seconds": entered["done"] - entered["consolidating"],
        "peak_rss_bytes": max(receipt["peak_rss_bytes"] for receipt in receipts),
        "cache_bytes": cache.stat().st_size,
        "compile_seconds": calibration["compile_seconds"] or 0.0,
        "trials": calibration["trials_tokens_per_second"],
        "parts": parts,
    }


def gemm(arguments: argparse.Namespace) -> dict[str, float]:
    """Measure the rate of a large matrix product, the limit of everything here."""
    import torch

    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    n = 64 if arguments.tiny else 2048
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    rates = []
    for _ in range(30):
        started = time.perf_counter()
        torch.mm(a, b)
        rates.append(2 * n**3 / (time.perf_counter() - started))
    # Medians everywhere: the others are not at their best all the time either.
    return {"gflops": statistics.median(rates[5:]) / 1e9, "best_gflops": max(rates) / 1e9}


def vllm(arguments: argparse.Namespace) -> dict[str, float]:
    """Run vLLM's CPU build in its own environment."""
    command = [arguments.vllm, "benchmarks/peers/vllm_prompts.py", "--model", str(arguments.model.absolute())]
    for name in ("documents", "k", "threads", "max_length"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    done = subprocess.run([*command, "--corpus", str(arguments.corpus.absolute())], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"vllm failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def read_texts(arguments: argparse.Namespace) -> list[str]:
    """Return the documents both sides score."""
    lines = arguments.corpus.read_text().splitlines()[: arguments.documents]
    return [json.loads(line)["text"] for line in lines]


def flops_per_token(arguments: argparse.Namespace) -> float:
    """Two per weight of every matrix product, and attention over half the document on average."""
    from transformers import AutoConfig, AutoTokenizer

    c = AutoConfig.from_pretrained(arguments.model)
    ids = AutoTokenizer.from_pretrained(arguments.model)(
        read_texts(arguments), truncation=True, max_length=arguments.max_length
    )
    lengths = [len(document) for document in ids["input_ids"]]
    head_dim = c.hidden_size // c.num_attention_heads
    layer = c.hidden_size * head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
    layer += 3 * c.hidden_size * c.intermediate_size
    weights = c.num_hidden_layers * layer + c.vocab_size * c.hidden_size
    attention = sum(n * n for n in lengths) / sum(lengths) / 2 * 4 * c.hidden_size * c.num_hidden_layers
    return 2 * weights + attention


def measured(arguments: argparse.Namespace, side: str) -> dict[str, float]:
    """Run one side in a fresh process."""
    command = [sys.executable, __file__, "--side", side, "--documents", str(arguments.documents)]
    command += ["--tiny"] if arguments.tiny else []
    for name in ("k", "threads", "dtype", "max_length", "compile", "model", "corpus"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Alternate the sides and sum up by medians."""
    sides = ["gemm", "loop", "ours", *(["vllm"] if arguments.vllm else [])]
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(arguments.rounds):
        for side, found in rounds.items():
            found.append(vllm(arguments) if side == "vllm" else measured(arguments, side))
            print(f"round {number + 1} {side}: {found[-1]}", file=sys.stderr)
    flops = flops_per_token(arguments)
    limit = statistics.median(found["gflops"] for found in rounds["gemm"]) * 1e9 / flops
    rates = {side: [r["tokens"] / r["seconds"] for r in rounds[side]] for side in sides if side != "gemm"}
    ratios = {
        side: [a / b for a, b in zip(rates["ours"], rates[side], strict=True)] for side in rates if side != "ours"
    }
    middle = sorted(rounds["ours"], key=lambda r: r["seconds"])[len(rounds["ours"]) // 2]
    return {
        "tokens": rounds["ours"][0]["tokens"],
        "gflop_per_token": flops / 1e9,
        "gemm_gflops": limit * flops / 1e9,
        "limit_tokens_per_second": limit,
        "tokens_per_second": {side: statistics.median(found) for side, found in rates.items()},
        "ratio": {side: statistics.median(found) for side, found in ratios.items()},
        "ratios": ratios,
        "mfu": {side: statistics.median(found) / limit for side, found in rates.items()},
        "peak_rss_bytes": {side: max(r["peak_rss_bytes"] for r in rounds[side]) for side in rates if side != "vllm"},
        "compile_seconds": statistics.median(r["compile_seconds"] for r in rounds["ours"]),
        "parts_seconds": middle["parts"],
        "parts_of_seconds": middle["seconds"],
        "rounds": rounds,
        "settings": {
            name: getattr(arguments, name) for name in ("documents", "k", "threads", "dtype", "max_length", "compile")
        },
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("dask-logits", "torch", "transformers", "distributed")},
    }


def main() -> None:
    """Parse the command line; without ``--side`` compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(MODEL), help="the teacher's folder")
    parser.add_argument("--corpus", type=Path, default=Path(CORPUS), help="JSON lines with a text each")
    parser.add_argument("--tiny", action="store_true", help="a few short documents, one round, float32, not compiled")
    parser.add_argument("--documents", type=int, default=45)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--compile", default="always", choices=["always", "never"])
    parser.add_argument("--vllm", help="python of an environment with benchmarks/peers/requirements-vllm.txt")
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file")
    parser.add_argument("--side", choices=["loop", "ours", "gemm"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tiny and arguments.side is None:
        arguments.documents, arguments.rounds, arguments.max_length, arguments.k = 4, 1, 32, 8
        arguments.dtype, arguments.compile, arguments.threads = "float32", "never", 1
    with tempfile.TemporaryDirectory() as folder:
        match arguments.side:
            case "loop":
                print(json.dumps(loop(arguments, Path(folder) / "loop.h5")))
            case "ours":
                print(json.dumps(ours(arguments, Path(folder) / "run")))
            case "gemm":
                print(json.dumps(gemm(arguments)))
            case None:
                report(compare(arguments), arguments.out)


def report(found: dict[str, Any], out: Path | None) -> None:
    """Print the table and keep the figures."""
    from dask_logits.run.timings import shares

    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{found['tokens']:,} tokens, {found['gflop_per_token']:.3f} GFLOP/token")
    print(f"GEMM {found['gemm_gflops']:.0f} GFLOP/s: at most {found['limit_tokens_per_second']:.0f} tokens/s")
    names = {"loop": "padded batch-4 loop", "vllm": "vLLM, CPU build", "ours": "dask_logits"}
    print("                     tokens/s    MFU   peak RSS   ours / it")
    for side, name in names.items():
        if side in found["mfu"]:
            rss = f"{found['peak_rss_bytes'][side] / 2**30:5.2f} GiB" if side != "vllm" else "        –"
            ratio = f"{found['ratio'][side]:9.2f}" if side != "ours" else ""
            print(f"{name:20s} {found['tokens_per_second'][side]:8.0f}  {found['mfu'][side]:5.2f}  {rss} {ratio}")
    print(f"worker: {shares(found['parts_seconds'])}; compiled in {found['compile_seconds']:.0f} s, not counted")


if __name__ == "__main__":
    main()
