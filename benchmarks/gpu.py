"""What a GPU does, in at most ten minutes: speed, memory and error of scoring, its parts, and a whole job.

Teachers have the shapes of known models and random weights, and documents are random ids: speed depends on neither.
The job comes first, because it says whether all of this works. Each part starts only if there is time left. What was
left out or failed is listed, never guessed. The file has all figures so far, also if the process is killed.
Two teachers get a whole job and vLLM: the first one, and the second one with an eighth of the tokens. With two GPUs or
more, the first one is also scored by two workers, and by one worker over two GPUs.

    python benchmarks/gpu.py --out benchmarks/results/DATE-GPU.json
    python benchmarks/gpu.py --tiny    # does it run? the figures mean nothing, and the device is the CPU

``loop`` is what people write today: the model as it is loaded, a padded batch, ``.logits``, ``log_softmax`` in float32,
``torch.topk``. Its batch is the fastest of several. The two alternate, and medians count. MFU is of a matrix product
measured here. The host share is the part of the scoring time in which no measured stage runs on the device.
vLLM scores the same documents in a process of its own, if it is installed here or in the environment of ``--vllm``.

Dimension letters: R positions, D hidden width, V vocabulary, K kept entries, B documents, T tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dask_logits.data.items import plain_items
from dask_logits.errors import first_line
from dask_logits.records import Array, digest_of
from dask_logits.teacher.checkpoint import choose_kernels
from dask_logits.teacher.cuda import kernels
from dask_logits.teacher.memory import is_out_of_memory
from dask_logits.teacher.meter import Cost, measure_cost
from dask_logits.teacher.model import ScoringPath, Teacher
from dask_logits.teacher.scoring import ScoringSettings, score_items
from dask_logits.teacher.selfcheck import check, try_compiled
from dask_logits.teacher.topk import kernels_agree, topk_with_tail
from dask_logits.teacher.torch_internals import grow_segments
from dask_logits.worker.calibrate import auto_budgets

K = 64
LENGTHS = (512, 2048, 8192)
VOCABULARIES = (49_152, 128_256, 151_936, 262_144)
LOOP_BATCHES = (1, 4, 16)
DEVICE_STAGES = ("trunk", "head", "tail", "refine", "transfer")
GENERATION = "distillation.teacher.generation"
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
        self.found: dict[str, Any] = {}
        self._deadline = time.monotonic() + arguments.seconds

    def run(self, name: str, part: Callable[[], Any]) -> Any:
        """Measure a part, unless there is no time for it. Return None then, and if it fails."""
        if not self.has_time(name):
            return None
        started = time.monotonic()
        try:
            return part()
        except Exception as error:  # noqa: BLE001 - one failure must not cost the other figures
            if is_out_of_memory(error):
                self.left_out.append(f"{name}: out of memory")
            else:
                self.left_out.append(f"{name}: failed with {type(error).__name__}: {first_line(error)}")
                traceback.print_exc()
            return None
        finally:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            print(f"{name}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)

    def has_time(self, name: str) -> bool:
        """Whether a part may begin. If not, note that it is left out."""
        if time.monotonic() > self._deadline:
            self.left_out.append(f"{name}: no time")
            return False
        return True

    def keep(self) -> None:
        """Write the figures so far to the file."""
        out = self.arguments.out
        if out is None:
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_suffix(".part")
        part.write_text(json.dumps(self.found | {"left_out": self.left_out}, indent=1, default=str) + "\n")
        part.replace(out)

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


def build(bench: Bench, name: str, config: Any) -> tuple[Teacher, ScoringSettings, dict[str, Any]]:
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
        agree = bench.run(f"{name}, kernels", lambda: kernels_agree(logits_RV, K, path))
        path = dataclasses.replace(path, kernels=bool(agree))
    settings = ScoringSettings(
        top_k=min(K, config.vocab_size), vocab_size=config.vocab_size, batch_tokens=batch_tokens, batch_size=None,
        head_rows=head_rows, path=path,
    )  # fmt: skip
    return teacher, settings, {"errors_nats": choice.errors, "refused": choice.refusals}


def compiled(teacher: Teacher, settings: ScoringSettings) -> tuple[ScoringSettings, dict[str, Any]]:
    """Compile the teacher's layers if that is possible, and return what it took."""
    # The loop before it has left the model as it is loaded.
    teacher.take(settings.path)
    started = time.perf_counter()
    try:
        error = try_compiled(teacher)
    except RuntimeError as refused:
        return settings, {"compiled": False, "compile_refused": str(refused)}
    seconds = time.perf_counter() - started
    facts = {"compiled": True, "compile_error_nats": error, "compile_seconds": seconds}
    return dataclasses.replace(settings, path=teacher.path), facts


def loop(teacher: Teacher, texts: list[Array], batch: int, k: int) -> float:
    """Score documents as people do today, and return the seconds."""
    teacher.take(ScoringPath())
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
    return digest_of([score_items(teacher, plain_items(texts), settings).records])


def host_share(stages: Mapping[str, float]) -> float:
    """Return the share of the scoring time in which no stage runs on the device."""
    return max(0.0, 1 - sum(stages.get(stage, 0.0) for stage in DEVICE_STAGES) / stages["score"])


def score(bench: Bench, name: str, config: Any, facts: dict[str, Any]) -> None:
    """Measure one teacher at every length, and whether its bytes depend on the batch."""
    teacher, settings, more = build(bench, name, config)
    cost = measure_cost(teacher)
    parameters = sum(parameter.numel() for parameter in teacher.model.parameters())
    facts |= more | {"peak_tflops": cost.peak_flops / 1e12, "parameters": parameters, "rows": []}

    def row(kind: str, length: int, settings: ScoringSettings) -> None:
        texts = documents(config.vocab_size, length, bench.arguments.tokens)
        found = bench.run(f"{name}, {kind}, {length}", lambda: measure(bench, teacher, settings, texts))
        if found is not None:
            mfu = cost.mfu(cost.flops(map(len, texts)), found["seconds"])
            facts["rows"].append(found | {"layers": kind, "length": length, "mfu": mfu})
            bench.keep()

    lengths = bench.arguments.lengths
    row("eager", lengths[0], settings)
    kind = "eager"
    if not bench.arguments.tiny:
        settings, more = bench.run(f"{name}, compiling", lambda: compiled(teacher, settings)) or (settings, {})
        facts |= more
        kind = "compiled" if settings.path.compiled else "eager"
    facts["path"] = dataclasses.asdict(settings.path)
    for length in lengths[kind == "eager" :]:
        row(kind, length, settings)
    facts["same_bytes"] = bench.run(f"{name}, bytes", lambda: same_bytes(bench, teacher, settings, config.vocab_size))
    bench.keep()


def same_bytes(bench: Bench, teacher: Teacher, settings: ScoringSettings, vocab_size: int) -> dict[str, bool]:
    """Whether the targets are the same when they are computed again, and in smaller batches."""
    texts = documents(vocab_size, bench.arguments.lengths[0], bench.arguments.tokens)
    halved = dataclasses.replace(settings, batch_tokens=settings.batch_tokens // 2)
    first = digest(teacher, texts, settings)
    return {
        "twice": digest(teacher, texts, settings) == first,
        "half_batches": digest(teacher, texts, halved) == first,
    }


def measure(bench: Bench, teacher: Teacher, settings: ScoringSettings, texts: list[Array]) -> dict[str, Any]:
    """Time scoring and the loop in turn, after a round that is not counted."""
    tokens = sum(map(len, texts))
    best = 0
    rates: dict[int, float] = {}
    # The first run prepares what all need.
    bench.run("loop, first run", lambda: loop(teacher, texts[:1], 1, settings.top_k))
    for batch in LOOP_BATCHES:
        seconds = bench.run(f"loop, batch {batch}", lambda batch=batch: loop(teacher, texts, batch, settings.top_k))
        rates |= {} if seconds is None else {batch: seconds}
    if rates:
        best = min(rates, key=lambda batch: rates[batch])
    bench.peak_bytes()
    spans, others, peak = [], [], 0
    for number in range(bench.arguments.rounds + 1):
        teacher.take(settings.path)
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
        "host_share": host_share(middle),
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


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that CUDA shows to this process."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else list(map(str, range(count)))


def job(bench: Bench, config: Any, cluster: str, tokens: int, gpus: tuple[str, ...] = (), *more: str) -> dict[str, Any]:
    """Run a whole job on a folder with the teacher, from token ids to HDF5, and read what it recorded of itself."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from dask_logits import generate, load_config, verify
    from dask_logits.job.prepare import prepare

    length = bench.arguments.lengths[0]
    texts = documents(config.vocab_size, length, tokens)
    with tempfile.TemporaryDirectory() as folder:
        with bench.device:
            AutoModelForCausalLM.from_config(config, dtype=bench.dtype).save_pretrained(f"{folder}/teacher")
        if bench.device.type == "cuda":
            # The workers are other processes.
            torch.cuda.empty_cache()
        settings = [
            f"distillation.teacher.model_path={folder}/teacher",
            f"distillation.teacher.cache_dir={folder}/run",
            f"distillation.dataset.max_length={length}",
            f"cluster={cluster}",
            *([f"{GENERATION}.devices=[{','.join(gpus)}]"] if gpus else []),
            *more,
        ]
        data = Dataset.from_dict({"input_ids": [text.tolist() for text in texts]})
        settled = load_config(settings, dataset_given=True)
        cache = generate(settled, data)
        # The run knows the digests of the weights by now.
        planned_bytes = prepare(settled, data).estimate.worker_bytes
        entered = json.loads(Path(folder, "run", "status.json").read_text())["entered"]
        calibration = json.loads(Path(folder, "run", "calibration.json").read_text())
        receipts = [json.loads(path.read_text()) for path in Path(folder, "run", "receipts").rglob("*.json")]
        tokens, seconds = sum(map(len, texts)), entered["done"] - entered["running"]
        scoring = entered["consolidating"] - entered["running"]
        cost = Cost(**calibration["cost"])
        flops = cost.flops(map(len, texts)) / max(1, len(gpus))
        peak_bytes = calibration["peak_device_bytes"] or calibration["peak_rss_bytes"]
        stages: Counter[str] = Counter()
        for receipt in receipts:
            stages.update(receipt["seconds"])
        return {
            "cluster": cluster,
            "tokens": tokens,
            "partitions": len(receipts),
            "tokens_per_second": tokens / seconds,
            "mfu": cost.mfu(flops, seconds),
            "tokens_per_second_without_consolidation": tokens / scoring,
            "mfu_without_consolidation": cost.mfu(flops, scoring),
            "stages": stages,
            "host_share": host_share(stages),
            "calibrated_tokens_per_second": calibration["tokens_per_second"],
            "calibration_seconds": entered["running"] - entered["calibrating"],
            "numerics": calibration["numerics"],
            "bytes_per_token": cache.stat().st_size / tokens,
            "planned_bytes": planned_bytes,
            "peak_bytes": peak_bytes,
            "peak_share_of_plan": peak_bytes / planned_bytes,
            "gpus": sorted({gpu for receipt in receipts for gpu in receipt["gpus"]}),
            "verified": verify(cache).ok,
        }


def two_gpus(bench: Bench, config: Any) -> dict[str, Any] | None:
    """Compare jobs on one GPU, on two with a worker each, and on two that share the layers of one worker's teacher."""
    gpus = tuple(visible_gpus()[:2])
    if len(gpus) < 2:
        bench.left_out.append(f"two GPUs: {len(gpus)} visible")
        return None
    ways = {"one": (gpus[:1],), "two": (gpus,), "layers over two": (gpus, f"{GENERATION}.gpus_per_worker=2")}
    jobs = {
        name: bench.run(
            f"two GPUs, {name}", lambda way=way: job(bench, config, "local_cuda", bench.arguments.job_tokens, *way)
        )
        for name, way in ways.items()
    }
    rates = {name: found["tokens_per_second_without_consolidation"] for name, found in jobs.items() if found}
    each = {name: rate / (2 * rates["one"]) for name, rate in rates.items() if name != "one" and "one" in rates}
    return {"jobs": jobs, "share_of_twice_one": each}


def vllm(bench: Bench, name: str, config: Any) -> list[dict[str, Any]] | None:
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
            if not bench.has_time(f"vLLM, {name}, {length}"):
                continue
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
                bench.left_out.append(f"vLLM, {name}, {length}: it failed with: {reason}")
                continue
            found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            rate = statistics.median(one["tokens"] / one["seconds"] for one in found)
            rows.append({"length": length, "tokens_per_second": rate})
    return rows


def attentions(bench: Bench, config: Any) -> dict[str, float]:
    """Compare attention without and with cuDNN, which prepares each shape, on documents of mixed lengths. Tokens/s."""
    teacher, settings, _ = build(bench, "attentions", config)
    teacher.take(settings.path)
    draw = np.random.default_rng(0)
    longest = bench.arguments.lengths[1]
    rates: dict[str, list[float]] = {"flash": [], "cuDNN": []}
    for number in range(2 * bench.arguments.rounds):
        name = list(rates)[number % 2]
        torch.backends.cuda.enable_cudnn_sdp(name == "cuDNN")
        lengths = draw.integers(longest // 8, longest, max(2, 2 * bench.arguments.tokens // longest))
        texts = [draw.integers(0, config.vocab_size, length) for length in lengths]
        seconds = score_items(teacher, plain_items(texts), settings).seconds["score"]
        rates[name].append(float(lengths.sum() / seconds))
    torch.backends.cuda.enable_cudnn_sdp(False)
    return {name: statistics.median(found) for name, found in rates.items()}


def versions() -> dict[str, str | None]:
    """Return the versions of the packages that matter."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def report(bench: Bench) -> None:
    """Print one table per part."""
    found = bench.found
    print("teacher      layers   length   tokens/s    MFU   tail µs   host share   peak GiB    loop   ours / loop")
    for name, teacher in found["scoring"].items():
        for row in teacher.get("rows", []):
            print(
                f"{name:12s} {row['layers']:8s} {row['length']:6d} {row['tokens_per_second']:10.0f} "
                f"{row['mfu'] or float('nan'):6.2f} {row['tail_microseconds_per_token']:9.2f} "
                f"{row['host_share']:12.2f} "
                f"{row['peak_bytes'] / 2**30:10.2f} {row['loop_tokens_per_second']:7.0f} {row['ratio']:8.2f}"
            )
        print(f"{'':12s} same bytes: {teacher.get('same_bytes')}, path {teacher.get('path')}")
    for name, rows in found["vllm"].items():
        scored = found["scoring"].get(name, {}).get("rows", [])
        ours = {row["length"]: row["tokens_per_second"] for row in scored}
        for row in rows or []:
            ratio = ours.get(row["length"], float("nan")) / row["tokens_per_second"]
            print(f"vLLM {name:7s} {row['length']:6d} {row['tokens_per_second']:10.0f}   ours / vLLM {ratio:.2f}")
    for name, one in found["job"].items():
        if one:
            print(
                f"job {name:8s} {one['tokens_per_second']:10.0f} tokens/s, MFU {one['mfu'] or float('nan'):.2f}, host "
                f"share {one['host_share']:.2f}, peak {one['peak_bytes'] / 2**30:.2f} GiB, "
                f"{one['peak_share_of_plan']:.2f} of the plan's"
            )
    for row in found["tails"] or []:
        each = ", ".join(f"{name} {value:.2f}" for name, value in row.items() if isinstance(value, float))
        print(f"top-{K} of {row['vocabulary']:7d} {row['dtype']:9s} µs per position: {each}")
    print(f"head: {found['heads']}\nattention, mixed lengths: {found['attentions']}\njobs: {found['job']}")
    print(f"two GPUs: {found['two GPUs']}")
    print("\n".join(f"left out: {line}" for line in bench.left_out))


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=420, help="after which no part begins")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=65_536, help="of each case")
    parser.add_argument("--job-tokens", type=int, default=3_000_000, help="of the first whole job")
    parser.add_argument("--shapes", nargs="+", default=["1B", "8B", "Qwen3 0.6B", "Gemma 2 2B"], help="which teachers")
    parser.add_argument("--vllm", help="python of an environment with vLLM, for the first two")
    parser.add_argument("--tiny", action="store_true", help="a tiny teacher on the CPU, one round")
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file")
    arguments = parser.parse_args()
    arguments.lengths, arguments.vocabularies, arguments.rows = LENGTHS, VOCABULARIES, 4096
    if arguments.tiny:
        arguments.shapes, arguments.rounds, arguments.tokens, arguments.rows = ["tiny"], 1, 64, 8
        arguments.job_tokens = 64
        arguments.lengths, arguments.vocabularies = (16, 32), (384,)
    bench, known = Bench(arguments), shapes()
    if bench.device.type == "cuda":
        grow_segments()
        choose_kernels("bfloat16", torch.cuda.get_device_capability())
    device = torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu"
    command = vars(arguments) | {"out": None}
    found = bench.found = {"device": device, "versions": versions(), "command": command, "scoring": {}}

    found["job"], found["vllm"] = {}, {}

    def part(figures: dict[str, Any], key: str, name: str, measured: Callable[[], Any]) -> None:
        figures[key] = bench.run(name, measured)
        bench.keep()

    def jobs(name: str, tokens: int) -> None:
        part(found["job"], name, f"job, {name}", lambda: job(bench, known[name], cluster, tokens, one))
        if found["job"][name] is None:
            part(found["job"], name, f"job, {name}, serial", lambda: job(bench, known[name], "serial", tokens))

    cluster = "serial" if arguments.tiny else "local_cuda"
    one = () if arguments.tiny else tuple(visible_gpus()[:1])
    first, second = known[arguments.shapes[0]], arguments.shapes[1:2]
    jobs(arguments.shapes[0], arguments.job_tokens)
    part(found, "tails", "tails", lambda: tails(bench))
    part(found, "heads", "heads", lambda: heads(bench))
    part(found, "attentions", "attentions", lambda: attentions(bench, first))
    for name in arguments.shapes:
        if name in second:
            jobs(name, arguments.job_tokens // 8)
        facts = found["scoring"][name] = {}
        bench.run(name, lambda name=name, facts=facts: score(bench, name, known[name], facts))
        bench.keep()
    part(found, "two GPUs", "two GPUs", lambda: two_gpus(bench, first))
    for name in (arguments.shapes[0], *second):
        part(found["vllm"], name, f"vLLM, {name}", lambda name=name: vllm(bench, name, known[name]))
    report(bench)


if __name__ == "__main__":
    main()
