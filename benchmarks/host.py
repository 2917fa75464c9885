"""Does the host keep a fast device busy? A whole job with a stub in the place of the device.

The stub works on one batch after the other at a given rate and takes no processor time: a result appears when a device
of this speed would have it, and the thread that needs it sleeps until then. Its targets are drawn, with a teacher's
spread of ids and log-probs. Everything else is the real job: reading, tokenizing, batches, delivery, digests, storage.

    python benchmarks/host.py --tokens 4000000 --out benchmarks/results/NAME.json
    python benchmarks/host.py --tiny    # does it run? the figures mean nothing

``busy`` is the share of the time between the first batch and the last result in which the device worked. Processor
seconds count all threads in this time, so they depend less on what else the machine does. The profiles alternate, and
medians count.

Dimension letters: B sequences, T tokens, R positions, V vocabulary, K kept entries.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dask_logits import generate, load_config
from dask_logits.job import serial_executor
from dask_logits.records import Array
from dask_logits.teacher import scoring
from dask_logits.teacher.transfer import OutputRing

MODEL = "output/models/SmolLM2-135M-Instruct"
CORPUS = "output/corpus/python-reference.jsonl"
PROFILES = ("plain", "compact")
PARTS = ("read", "tokenize", "wait", "score", "write")
# Share of a batch's time that passes before its first row of logits.
TRUNK = 0.75
DRAWN_ROWS = 256


class Device:
    """Works on one thing after the other, at a rate in tokens/s. Times are those of ``time.time``."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.free_at = 0.0
        # Start and end of each piece of work, and the processor seconds used by this process when it was queued.
        self.work: list[tuple[float, float, float]] = []

    def queue(self, tokens: float) -> None:
        """Add work for a number of tokens."""
        start = max(time.time(), self.free_at)
        self.free_at = start + tokens / self.rate
        self.work.append((start, self.free_at, time.process_time()))

    def since(self, moment: float) -> dict[str, float]:
        """Return the span from a moment's first work to the last result, the busy share, and the processor seconds."""
        work = [piece for piece in self.work if piece[0] >= moment]
        span = work[-1][1] - work[0][0]
        busy = sum(end - start for start, end, _ in work)
        return {"seconds": span, "busy": busy / span, "processor_seconds": work[-1][2] - work[0][2]}


class LateRing(OutputRing):
    """A ring whose results arrive when the device has computed them."""

    device: Device

    def put(self, results: dict[str, Tensor], deliver: Callable[[dict[str, Array]], None]) -> None:
        """Queue results."""
        ready_at = self.device.free_at

        def late(arrays: dict[str, Array]) -> None:
            time.sleep(max(0.0, ready_at - time.time()))
            deliver(arrays)

        super().put(results, late)


def drawn(vocab_size: int, k: int, rows: int) -> dict[str, Tensor]:
    """Return targets of random logits, in which some ids are more frequent than others."""
    generator = torch.Generator().manual_seed(0)
    frequency_V = -torch.arange(1, vocab_size + 1).log()[torch.randperm(vocab_size, generator=generator)]
    logits_RV = frequency_V + 2.5 * torch.randn(min(rows, DRAWN_ROWS), vocab_size, generator=generator)
    top = logits_RV.log_softmax(-1).topk(k)
    copies = -(-rows // DRAWN_ROWS)
    found = {
        "topk_ids": top.indices.int(),
        "topk_logprobs": top.values.half(),
        "logsumexp": logits_RV.logsumexp(-1),
        "tail_logmass": torch.log1p(-top.values.exp().sum(-1).clamp(max=0.999)),
        "label_logprob": top.values[:, 0].contiguous(),
    }
    return {name: tensor.repeat(copies, *(1,) * (tensor.dim() - 1))[:rows] for name, tensor in found.items()}


@contextlib.contextmanager
def stub(device: Device, pool: dict[str, Tensor], in_flight: int) -> Iterator[None]:
    """Put the device in the place of the real one in scoring, with some partitions at one time, as on a GPU."""

    def states(run: Any, tokens_BT: Array) -> Tensor:
        device.queue(TRUNK * tokens_BT.size)
        return torch.zeros(*tokens_BT.shape, 1)

    planes: dict[str, Tensor] = {}

    def targets(run: Any, rows_R: Tensor, labels_R: Tensor, keys_R: Tensor | None) -> dict[str, Tensor]:
        device.queue((1 - TRUNK) * len(rows_R))
        if run.encode is not None and not planes:
            # The device would do this for every chunk, so it takes no processor time.
            planes.update(run.encode(pool))
        found = pool if run.encode is None else pool | planes
        return {name: tensor[: len(rows_R)] for name, tensor in found.items()}

    LateRing.device = device
    replaced = [
        (serial_executor, "partitions_each", lambda device: in_flight),
        (scoring, "OutputRing", LateRing),
        # The logits would be on the device. Here they take no memory.
        (scoring, "padded_width", lambda vocab_size: 0),
        (scoring._Run, "_states", states),
        (scoring._Run, "_targets", targets),
    ]
    real = [getattr(owner, name) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(replaced, real, strict=True):
            setattr(owner, name, value)


def make_teacher(folder: Path, model: Path) -> int:
    """Save a one-layer teacher for a model's tokenizer. Return its vocabulary."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=8192,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return len(tokenizer)


def write_corpus(path: Path, arguments: argparse.Namespace, folder: Path) -> int:
    """Write the corpus again and again until it has enough tokens. Return the number of documents."""
    from transformers import AutoTokenizer

    texts = [json.loads(line)["text"] for line in arguments.corpus.read_text().splitlines()]
    ids = AutoTokenizer.from_pretrained(folder)(texts, truncation=True, max_length=arguments.max_length)["input_ids"]
    left, count = arguments.tokens, 0
    with path.open("w") as file:
        for text, row in itertools.cycle(zip(texts, ids, strict=True)):
            if left <= 0:
                return count
            file.write(json.dumps({"input_ids": row} if arguments.ids else {"text": text}) + "\n")
            left, count = left - len(row), count + 1
    return count


def measured(
    arguments: argparse.Namespace, folder: Path, profile: str, in_flight: int, pool: dict[str, Tensor]
) -> dict[str, Any]:
    """Run the job with one profile, and read what the device and the receipts recorded."""
    device = Device(arguments.rate)
    with tempfile.TemporaryDirectory(dir=folder) as run, stub(device, pool, in_flight):
        settings = [
            f"distillation.teacher.model_path={folder / 'teacher'}",
            "distillation.teacher.dtype=float32",
            f"distillation.teacher.cache_dir={run}",
            f"distillation.teacher.generation.top_k={arguments.k}",
            f"distillation.teacher.generation.batch_tokens={arguments.batch_tokens}",
            f"distillation.teacher.generation.head_rows={arguments.head_rows}",
            "distillation.teacher.generation.torch_threads=1",
            "distillation.scoring.compile=never",
            f"distillation.cache.profile={profile}",
            "distillation.dataset.name=json",
            f"distillation.dataset.data_files={folder / 'corpus.jsonl'}",
            f"distillation.dataset.max_length={arguments.max_length}",
            f"distillation.partition.rows={arguments.rows}",
            "cluster=serial",
        ]
        generate(load_config(settings))
        entered = json.loads(Path(run, "status.json").read_text())["entered"]
        receipts = [json.loads(path.read_text()) for path in Path(run, "receipts").rglob("*.json")]
    parts: Counter[str] = Counter()
    for receipt in receipts:
        parts.update({name: receipt["seconds"].get(name, 0.0) for name in PARTS})
    tokens = sum(receipt["statistics"]["tokens"] for receipt in receipts)
    found = device.since(entered["running"])
    return found | {
        "tokens": tokens,
        "partitions": len(receipts),
        "tokens_per_second": tokens / found["seconds"],
        "processor_microseconds_per_token": 1e6 * found["processor_seconds"] / tokens,
        "parts": parts,
    }


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(MODEL), help="folder with a tokenizer")
    parser.add_argument("--corpus", type=Path, default=Path(CORPUS), help="JSON lines with a text each")
    parser.add_argument("--rate", type=float, default=500_000, help="tokens/s of the device")
    parser.add_argument("--tokens", type=int, default=3_000_000)
    parser.add_argument("--rows", type=int, default=300, help="documents of a partition")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profiles", nargs="+", choices=PROFILES, default=PROFILES)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[3], help="partitions at one time")
    parser.add_argument("--ids", action="store_true", help="rows of token ids instead of text")
    parser.add_argument("--tiny", action="store_true", help="some documents of 32 tokens, one round")
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file")
    arguments = parser.parse_args()
    # The budgets of a GPU.
    arguments.batch_tokens, arguments.head_rows = 16_384, 4096
    if arguments.tiny:
        arguments.tokens, arguments.rows, arguments.k, arguments.max_length, arguments.rounds = 500, 12, 8, 32, 1
    ways = list(itertools.product(arguments.profiles, arguments.in_flight))
    rounds: dict[str, list[dict[str, Any]]] = {f"{profile}, {count}": [] for profile, count in ways}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocab_size = make_teacher(folder / "teacher", arguments.model)
        write_corpus(folder / "corpus.jsonl", arguments, folder / "teacher")
        pool = drawn(vocab_size, arguments.k, arguments.head_rows)
        for _ in range(arguments.rounds):
            for (profile, in_flight), found in zip(ways, rounds.values(), strict=True):
                found.append(measured(arguments, folder, profile, in_flight, pool))
    report(rounds, arguments.out)


def report(rounds: dict[str, list[dict[str, Any]]], out: Path | None) -> None:
    """Print the table and keep the figures."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(rounds, indent=1) + "\n")
    print("profile, in flight   busy   tokens/s   processor µs per token   seconds of " + ", ".join(PARTS))
    for way, found in rounds.items():
        middle = {key: statistics.median(one[key] for one in found) for key in found[0] if key != "parts"}
        parts = ", ".join(f"{statistics.median(one['parts'][name] for one in found):.2f}" for name in PARTS)
        print(
            f"{way:18s} {middle['busy']:6.3f} {middle['tokens_per_second']:10.0f} "
            f"{middle['processor_microseconds_per_token']:10.2f} {'':14s} {parts}"
        )


if __name__ == "__main__":
    main()
