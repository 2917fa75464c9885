"""What a GPU does, in at most ten minutes: speed, memory and error of scoring, its parts, and a whole job.

Teachers have the shapes of known models and random weights, and documents are random ids: speed depends on neither.
Each part of the report starts only if there is time left. What was left out is listed, never guessed.

    python benchmarks/gpu.py --out benchmarks/results/DATE-GPU.json
    python benchmarks/gpu.py --tiny    # does it run? the figures mean nothing, and the device is the CPU

``loop`` is what people write today: a padded batch, ``.logits``, ``log_softmax`` in float32, ``torch.topk``. Its batch
is the fastest of several. The two alternate, and medians count. MFU is of a matrix product measured here.
vLLM scores the same documents in a process of its own, if it is installed here or in the environment of ``--vllm``.

Dimension letters: R positions, D hidden width, V vocabulary, K kept entries, B documents, T tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dask_logits.data.items import plain_items
from dask_logits.records import Array, ContentDigest
from dask_logits.teacher.cuda import kernels
from dask_logits.teacher.memory import is_out_of_memory
from dask_logits.teacher.meter import measure_cost
from dask_logits.teacher.model import ScoringPath, Teacher
from dask_logits.teacher.scoring import ScoringSettings, score_items
from dask_logits.teacher.selfcheck import check, try_compiled
from dask_logits.teacher.topk import kernels_agree, topk_with_tail
from dask_logits.worker.calibrate import auto_budgets

K = 64
LENGTHS = (512, 2048, 8192)
VOCABULARIES = (49_152, 128_256, 151_936, 262_144)
LOOP_BATCHES = (1, 4, 16)
PACKAGES = ("dask-logits", "torch", "triton", "transformers", "dask", "dask-cuda", "zarr", "h5py")


def shapes() -> dict[str, Any]:
    """Return the teachers' configurations: those of Llama 3.2 1B, Llama 3.1 8B, Qwen3 0.6B and Gemma 2 2B."""
    from transformers import Gemma2Config, LlamaConfig, Qwen3Config

    return {
        "1B": LlamaConfig(
            vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
            num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=16_384,
            tie_word_embeddings=True,
        ),
        "8B": LlamaConfig(
            vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=16_384,
        ),
        "Qwen3 0.6B": Qwen3Config(
            vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
            num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=16_384,
            tie_word_embeddings=True,
        ),
        "Gemma 2 2B": Gemma2Config(max_position_embeddings=16_384),
        "tiny": LlamaConfig(
            vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=128,
        ),
    }  # fmt: skip


class Bench:
    """The device, the time that is left, and the settings of the command line."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device("cpu" if arguments.tiny else "cuda")
        self.dtype = torch.float32 if arguments.tiny else torch.bfloat16
        self.left_out: list[str] = []
        self._deadline = time.monotonic() + arguments.seconds

    def run(self, name: str, part: Callable[[], Any]) -> Any:
        """Measure a part, unless there is no time or no memory for it. Return None then."""
        if time.monotonic() > self._deadline:
            self.left_out.append(f"{name}: no time")
            return None
        try:
            return part()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.left_out.append(f"{name}: out of memory")
            return None
        finally:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def seconds(self, function: Callable[[], object], rounds: int = 5) -> float:
        """Return the median time of a function on the device, after one call that is not counted."""
        function()
        found = []
        for _ in range(rounds):
            self.wait()
            started = time.perf_counter()
            function()
            self.wait()
            found.append(time.perf_counter() - started)
        return statistics.median(found)

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_bytes(self) -> int:
        """Return the largest memory in use since the last call."""
        if self.device.type != "cuda":
            return 0
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak


def documents(vocab_size: int, length: int, tokens: int) -> list[Array]:
    """Return random documents of one length."""
    generator = np.random.default_rng(length)
    return [generator.integers(0, vocab_size, length) for _ in range(max(2, tokens // length))]


def build(bench: Bench, config: Any) -> tuple[Teacher, ScoringSettings, dict[str, Any]]:
    """Build a teacher on the device, on its fastest eager path that agrees with the model."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with bench.device:
        model = AutoModelForCausalLM.from_config(config, dtype=bench.dtype).eval().requires_grad_(False)
    teacher = Teacher(model, config.vocab_size)
    choice = check(teacher, exact=True)
    batch_tokens, head_rows = auto_budgets(bench.device.type, "auto", "auto")
    path = choice.path
    if bench.device.type == "cuda" and kernels.available():
        logits_RV = torch.randn(512, config.vocab_size, device=bench.device).to(teacher.logits_dtype)
        path = dataclasses.replace(path, kernels=kernels_agree(logits_RV, K, path))
    settings = ScoringSettings(
        top_k=min(K, config.vocab_size), vocab_size=config.vocab_size, batch_tokens=batch_tokens, batch_size=None,
        head_rows=head_rows, path=path,
    )  # fmt: skip
    return teacher, settings, {"errors_nats": choice.errors, "refused": choice.refusals}


def compiled(teacher: Teacher, settings: ScoringSettings) -> tuple[ScoringSettings, dict[str, Any]]:
    """Compile the teacher's layers if that is possible, and return what it took."""
    started = time.perf_counter()
    try:
        error = try_compiled(teacher)
    except RuntimeError as refused:
        return settings, {"compiled": False, "compile_refused": str(refused)}
    path = dataclasses.replace(teacher.path, kernels=settings.path.kernels)
    seconds = time.perf_counter() - started
    facts = {"compiled": True, "compile_error_nats": error, "compile_seconds": seconds}
    return dataclasses.replace(settings, path=path), facts


def loop(teacher: Teacher, texts: list[Array], batch: int, k: int) -> float:
    """Score documents as people do today, and return the seconds."""
    started = time.perf_counter()
    with torch.inference_mode():
        for first in range(0, len(texts), batch):
            ids_BT = torch.from_numpy(np.stack(texts[first : first + batch])).to(teacher.device)
            logits_BTV = teacher.model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False).logits
            top = logits_BTV.float().log_softmax(-1).topk(k)
            top.indices.int().cpu(), top.values.half().cpu()
    return time.perf_counter() - started


def digest(teacher: Teacher, texts: list[Array], settings: ScoringSettings) -> str:
    """Return the content digest of the targets."""
    found = ContentDigest()
    found.update(score_items(teacher, plain_items(texts), settings).records)
    return found.hexdigest()


def score(bench: Bench, name: str, config: Any) -> dict[str, Any]:
    """Measure one teacher at every length, and whether its bytes depend on the batch."""
    teacher, settings, facts = build(bench, config)
    cost = measure_cost(teacher)
    facts |= {"peak_tflops": cost.peak_flops / 1e12, "parameters": sum(p.numel() for p in teacher.model.parameters())}
    texts = documents(config.vocab_size, bench.arguments.lengths[0], bench.arguments.tokens)
    facts["eager"] = bench.run(f"{name}, eager", lambda: measure(bench, teacher, settings, texts))
    if not bench.arguments.tiny:
        settings, more = compiled(teacher, settings)
        facts |= more
    facts["path"] = dataclasses.asdict(settings.path)
    rows = []
    for length in bench.arguments.lengths:
        texts = documents(config.vocab_size, length, bench.arguments.tokens)
        row = bench.run(f"{name}, {length}", lambda texts=texts: measure(bench, teacher, settings, texts))
        if row is not None:
            seconds = row["seconds"]
            row |= {"length": length, "mfu": cost.mfu(cost.flops(map(len, texts)), seconds)}
            rows.append(row)
    texts = documents(config.vocab_size, bench.arguments.lengths[0], bench.arguments.tokens)
    halved = dataclasses.replace(settings, batch_tokens=settings.batch_tokens // 2)
    first = digest(teacher, texts, settings)
    facts["same_bytes"] = {
        "twice": digest(teacher, texts, settings) == first,
        "half_batches": digest(teacher, texts, halved) == first,
    }
    return facts | {"rows": rows}


def measure(bench: Bench, teacher: Teacher, settings: ScoringSettings, texts: list[Array]) -> dict[str, Any]:
    """Time scoring and the loop in turn, after a round that is not counted."""
    tokens = sum(map(len, texts))
    best = 0
    rates: dict[int, float] = {}
    for batch in LOOP_BATCHES:
        bench.run(f"loop, batch {batch}", lambda batch=batch: rates.update({batch: loop(teacher, texts, batch, K)}))
    if rates:
        best = min(rates, key=lambda batch: rates[batch])
    bench.peak_bytes()
    spans, others, peak = [], [], 0
    for number in range(bench.arguments.rounds + 1):
        found = score_items(teacher, plain_items(texts), settings).seconds
        peak = max(peak, bench.peak_bytes())
        other = loop(teacher, texts, best, settings.top_k) if best else float("nan")
        bench.peak_bytes()
        if number:
            spans.append(found)
            others.append(other)
    middle = sorted(spans, key=lambda span: span["score"])[len(spans) // 2]
    seconds = statistics.median(span["score"] for span in spans)
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "tail_microseconds_per_token": 1e6 * middle["tail"] / tokens,
        "stages": middle,
        "peak_bytes": peak,
        "loop_batch": best,
        "loop_tokens_per_second": tokens / statistics.median(others),
        "ratio": statistics.median(other / span["score"] for other, span in zip(others, spans, strict=True)),
    }


def tails(bench: Bench) -> list[dict[str, Any]]:
    """Compare ways to the largest logits and their logsumexp, in microseconds per position."""
    rows = []
    for vocab_size in bench.arguments.vocabularies:
        for dtype in (torch.bfloat16, torch.float32):
            logits_RV = torch.randn(bench.arguments.rows, vocab_size, device=bench.device).to(dtype)
            k = min(K, vocab_size)
            ways: dict[str, Callable[[], object]] = {
                "torch.topk": lambda x=logits_RV, k=k: (x.float().logsumexp(-1), x.topk(k)),
                "blocks": lambda x=logits_RV, k=k: topk_with_tail(x, k),
            }
            if bench.device.type == "cuda" and kernels.available():
                ways["kernels"] = lambda x=logits_RV, k=k: topk_with_tail(x, k, path=ScoringPath(kernels=True))
            each = {way: 1e6 * bench.seconds(call) / bench.arguments.rows for way, call in ways.items()}
            rows.append({"vocabulary": vocab_size, "dtype": str(dtype).removeprefix("torch."), **each})
    return rows


def heads(bench: Bench) -> dict[str, Any]:
    """Compare a rounded head with one whose logits leave the product in float32: time, and error in logits."""
    width, vocab_size = (64, 384) if bench.arguments.tiny else (4096, 128_256)
    hidden_RD = torch.randn(bench.arguments.rows, width, device=bench.device).bfloat16()
    weight_DV = torch.randn(width, vocab_size, device=bench.device).bfloat16() / width**0.5
    exact_RV = hidden_RD[:64].double() @ weight_DV.double()

    def wide(x_RD: Tensor) -> Tensor:
        if bench.device.type == "cuda":
            return torch.mm(x_RD, weight_DV, out_dtype=torch.float32)
        return x_RD.float() @ weight_DV.float()

    ways: dict[str, Callable[[Tensor], Tensor]] = {"bfloat16": lambda x_RD: x_RD @ weight_DV, "float32 out": wide}
    return {
        name: {
            "milliseconds": 1e3 * bench.seconds(lambda way=way: way(hidden_RD)),
            "rms_error": float((way(hidden_RD[:64]).double() - exact_RV).square().mean().sqrt()),
        }
        for name, way in ways.items()
    }


def job(bench: Bench, config: Any) -> dict[str, Any]:
    """Run a whole job on a folder with the teacher, from token ids to HDF5, and read what it recorded of itself."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from dask_logits import generate, load_config, verify

    length = bench.arguments.lengths[0]
    texts = documents(config.vocab_size, length, bench.arguments.tokens)
    with tempfile.TemporaryDirectory() as folder:
        with bench.device:
            AutoModelForCausalLM.from_config(config, dtype=bench.dtype).save_pretrained(f"{folder}/teacher")
        settings = [
            f"distillation.teacher.model_path={folder}/teacher",
            f"distillation.teacher.cache_dir={folder}/run",
            f"distillation.dataset.max_length={length}",
            f"cluster={'serial' if bench.arguments.tiny else 'local_cuda'}",
        ]
        data = Dataset.from_dict({"input_ids": [text.tolist() for text in texts]})
        cache = generate(load_config(settings, dataset_given=True), data)
        entered = json.loads(Path(folder, "run", "status.json").read_text())["entered"]
        calibration = json.loads(Path(folder, "run", "calibration.json").read_text())
        receipts = [json.loads(path.read_text()) for path in Path(folder, "run", "receipts").rglob("*.json")]
        tokens, seconds = sum(map(len, texts)), entered["done"] - entered["running"]
        return {
            "tokens_per_second": tokens / seconds,
            "calibrated_tokens_per_second": calibration["tokens_per_second"],
            "bytes_per_token": cache.stat().st_size / tokens,
            "peak_device_bytes": calibration["peak_device_bytes"],
            "gpus": sorted({gpu for receipt in receipts for gpu in receipt["gpus"]}),
            "verified": verify(cache).ok,
        }


def vllm(bench: Bench, config: Any) -> list[dict[str, Any]] | None:
    """Have vLLM score documents of each length, with a prompt log-prob for each entry that we keep."""
    from transformers import AutoModelForCausalLM

    python = bench.arguments.vllm or sys.executable
    if subprocess.run([python, "-c", "import vllm"], capture_output=True).returncode:
        bench.left_out.append(f"vLLM: not installed for {python}; give the python of its environment with --vllm")
        return None
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        with bench.device:
            AutoModelForCausalLM.from_config(config, dtype=bench.dtype).save_pretrained(f"{folder}/teacher")
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        for length in bench.arguments.lengths:
            texts = documents(config.vocab_size, length, bench.arguments.tokens)
            corpus = Path(folder, "corpus.jsonl")
            corpus.write_text("".join(json.dumps({"input_ids": text.tolist()}) + "\n" for text in texts))
            command = [
                python, str(Path(__file__).parent / "peers" / "vllm_prompts.py"), "--compile",
                *("--model", f"{folder}/teacher", "--corpus", corpus, "--documents", len(texts), "--k", K),
                *("--max-length", length, "--rounds", bench.arguments.rounds),
                *("--batch-tokens", 16_384, "--memory", 0.8),
            ]  # fmt: skip
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                bench.left_out.append(f"vLLM, {length}: it failed with: {reason}")
                continue
            found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            rate = statistics.median(one["tokens"] / one["seconds"] for one in found)
            rows.append({"length": length, "tokens_per_second": rate})
    return rows


def versions() -> dict[str, str | None]:
    """Return the versions of the packages that matter."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def report(found: dict[str, Any]) -> None:
    """Print one table per part."""
    print("teacher      length   tokens/s    MFU   tail µs   peak GiB    loop   ours / loop")
    for name, teacher in found["scoring"].items():
        for row in teacher["rows"] if teacher else []:
            print(
                f"{name:12s} {row['length']:6d} {row['tokens_per_second']:10.0f} {row['mfu'] or float('nan'):6.2f} "
                f"{row['tail_microseconds_per_token']:9.2f} {row['peak_bytes'] / 2**30:10.2f} "
                f"{row['loop_tokens_per_second']:7.0f} {row['ratio']:8.2f}"
            )
        if teacher:
            print(f"{'':12s} same bytes: {teacher['same_bytes']}, path {teacher['path']}")
    ours = {
        row["length"]: row["tokens_per_second"]
        for row in (next(iter(found["scoring"].values())) or {"rows": []})["rows"]
    }
    for row in found["vllm"] or []:
        ratio = ours.get(row["length"], float("nan")) / row["tokens_per_second"]
        print(f"vLLM         {row['length']:6d} {row['tokens_per_second']:10.0f}   ours / vLLM {ratio:.2f}")
    for row in found["tails"] or []:
        each = ", ".join(f"{name} {value:.2f}" for name, value in row.items() if isinstance(value, float))
        print(f"top-{K} of {row['vocabulary']:7d} {row['dtype']:9s} µs per position: {each}")
    print(f"head: {found['heads']}\njob: {found['job']}")
    print("\n".join(f"left out: {line}" for line in found["left_out"]))


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480, help="after which no part begins")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=65_536, help="of each case")
    parser.add_argument("--shapes", nargs="+", default=["1B", "8B", "Qwen3 0.6B", "Gemma 2 2B"], help="which teachers")
    parser.add_argument("--vllm", help="python of an environment with vLLM, for the first teacher")
    parser.add_argument("--tiny", action="store_true", help="a tiny teacher on the CPU, one round")
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file")
    arguments = parser.parse_args()
    arguments.lengths, arguments.vocabularies, arguments.rows = LENGTHS, VOCABULARIES, 4096
    if arguments.tiny:
        arguments.shapes, arguments.rounds, arguments.tokens, arguments.rows = ["tiny"], 1, 64, 8
        arguments.lengths, arguments.vocabularies = (16, 32), (384,)
    bench, known = Bench(arguments), shapes()
    found: dict[str, Any] = {
        "tails": bench.run("tails", lambda: tails(bench)),
        "heads": bench.run("heads", lambda: heads(bench)),
        "scoring": {
            name: bench.run(name, lambda name=name: score(bench, name, known[name])) for name in arguments.shapes
        },
        "job": bench.run("job", lambda: job(bench, known[arguments.shapes[0]])),
        "vllm": bench.run("vLLM", lambda: vllm(bench, known[arguments.shapes[0]])),
    }
    found |= {"left_out": bench.left_out, "versions": versions(), "command": vars(arguments) | {"out": None}}
    found["device"] = torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu"
    report(found)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
