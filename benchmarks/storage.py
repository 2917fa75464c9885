"""Bytes per token, KL and speed of ways to store top-k targets, re-measured on the tokens of a plain cache.

Sizes are of all columns of a record (input id, logsumexp, tail, label), except where a layout has none. KL is of the
kept entries and the tail as one bucket, both renormalised, against the plain float16 log-probs, in nats a token.

    dask-logits generate … distillation.cache.profile=plain
    python benchmarks/storage.py output/RUN/teacher_logits.h5 --out benchmarks/results/NAME.json
    python benchmarks/storage.py output/RUN/teacher_logits.h5 --tiny    # does it run? the figures mean nothing

Megatron-LM's layout is that of its offline logits (pull request 5019): float16 values, uint16 ids and a byte for the
17th bit, zstd level 3; it has no tail and no labels.

DistillKit's is that of its captures (its README, "Logit Compression"), made anew here: the first values as bfloat16,
the others as the float32 coefficients of a least-squares fit over their rank, ids in as many bits as the vocabulary
needs, not compressed; no tail and no labels, so that KL is given the exact tail. "Recommended" and "budget" are the two
configurations it advises, with this k.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numcodecs.zstd import Zstd

from dask_logits.cache.partition import write_partition
from dask_logits.cache.pieces import PartitionPiece, consolidate
from dask_logits.cache.profile import PRECISIONS, Compact, Plain, id_table
from dask_logits.cache.reader import CacheReader
from dask_logits.records import TOKEN_ARRAYS, Array, Records, Statistics

PILOT_TOKENS = 10_000
BLOCK_TOKENS = 4_096


def kl(exact: dict[str, Array], other: dict[str, Array]) -> Array:
    """Return KL(exact ‖ other) per token."""

    def probabilities(tokens: dict[str, Array]) -> Array:
        p = np.exp(np.c_[tokens["topk_logprobs"].astype(np.float64), tokens["tail_logmass"].astype(np.float64)])
        return np.asarray(p / p.sum(1, keepdims=True))

    p, q = probabilities(exact), probabilities(other)
    tiny = np.finfo(np.float64).tiny
    return np.asarray((p * np.log(np.maximum(p, tiny) / np.maximum(q, tiny))).sum(1))


def rate(work: Callable[[], object], tokens: int, rounds: int = 5) -> float:
    """Return the median tokens/s of some rounds after a first."""
    seconds = []
    for _ in range(rounds + 1):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return tokens / statistics.median(seconds[1:])


def blocks(tokens: dict[str, Array]) -> list[dict[str, Array]]:
    """Cut arrays into blocks of 4,096 tokens."""
    n = len(tokens["input_ids"])
    return [
        {name: array[first : first + BLOCK_TOKENS] for name, array in tokens.items()}
        for first in range(0, n, BLOCK_TOKENS)
    ]


def compact(tokens: dict[str, Array], profile: Compact) -> dict[str, Any]:
    """Measure one precision: planes, chunks as in the cache, decompression and decoding."""
    codec = Zstd(level=1, checksum=True)
    stored = profile.encode(tokens)
    n, step = len(tokens["input_ids"]), profile.alignment
    frames: dict[str, list[bytes]] = {}
    size = {}
    for name, kind in profile.arrays.items():
        if kind.chunked:
            frames[name] = [
                bytes(codec.encode(np.ascontiguousarray(stored[name][i : i + step]))) for i in range(0, n, step)
            ]
            size[name] = sum(map(len, frames[name])) / n
        else:
            size[name] = stored[name].nbytes / n

    def decode() -> None:
        for i in range(0, n, BLOCK_TOKENS):
            chunks = range(i // step, -(-min(i + BLOCK_TOKENS, n) // step))
            part = {name: stored[name][i : i + BLOCK_TOKENS] for name in stored if name not in frames}
            for name, all_frames in frames.items():
                rows = np.empty((len(chunks) * step, profile.top_k), np.uint8)
                at = 0
                for chunk in chunks:
                    found = codec.decode(all_frames[chunk])
                    rows.reshape(-1)[at : at + len(found)] = np.frombuffer(found, np.uint8)
                    at += len(found)
                part[name] = rows[: len(part["input_ids"])]
            profile.decode(part)

    found = kl(tokens, profile.decode(stored))
    parts = blocks(tokens)
    return {
        "bytes_per_token": sum(size.values()),
        "of_which": size,
        "kl_mean": float(found.mean()),
        "kl_p99": float(np.quantile(found, 0.99)),
        "encode": rate(lambda: [profile.encode(part) for part in parts], n, 2),
        "decode": rate(decode, n),
    }


def distillkit(tokens: dict[str, Array], vocab_size: int, n_exact: int, powers: list[float]) -> dict[str, Any]:
    """Measure DistillKit's layout: exact values, and powers of the rank fitted to the others."""
    values = tokens["topk_logprobs"].astype(np.float32)
    k = values.shape[1]
    # To bfloat16, to the nearest.
    exact = ((values[:, :n_exact].copy().view(np.uint32) + 0x8000) & 0xFFFF0000).view(np.float32)
    terms = np.stack([np.arange(k - n_exact) ** power for power in powers], 1)
    coefficients = (values[:, n_exact:] @ np.linalg.pinv(terms).T).astype(np.float32)
    fitted = np.concatenate([exact, coefficients @ terms.T.astype(np.float32)], 1)
    found = kl(tokens, {**tokens, "topk_logprobs": fitted})
    id_bytes = -(-k * (vocab_size - 1).bit_length() // 8)
    return {
        "bytes_per_token": 4 + 2 * n_exact + 4 * len(powers) + id_bytes,
        "kl_mean": float(found.mean()),
        "kl_p99": float(np.quantile(found, 0.99)),
    }


def measure(tokens: dict[str, Array], vocab_size: int) -> dict[str, Any]:
    """Measure every layout on the same tokens."""
    n, k = tokens["topk_ids"].shape
    f32 = 3 * 4
    codec = Zstd(level=3)
    megatron = []
    for part in blocks(tokens):
        ids = part["topk_ids"].astype(np.uint32)
        raw = (
            part["topk_logprobs"].tobytes()
            + (ids & 0xFFFF).astype(np.uint16).tobytes()
            + (ids >> 16).astype(bool).tobytes()
        )
        megatron.append(bytes(codec.encode(raw)))
    table = id_table(tokens["topk_ids"][:PILOT_TOKENS], vocab_size)
    found: dict[str, Any] = {
        "int32 + float16": {"bytes_per_token": 4 + 6 * k + f32, "kl_mean": 0.0},
        "Megatron-LM, zstd-3 (no tail, no labels)": {
            "bytes_per_token": 4 + sum(map(len, megatron)) / n,
            "kl_mean": 0.0,
        },
        "DistillKit, recommended (no tail, no labels)": distillkit(tokens, vocab_size, 16, [0, 1, 2, 3, 4, 0.5]),
        "DistillKit, budget (no tail, no labels)": distillkit(tokens, vocab_size, 1, [0, 1, 0.5]),
        "plain": {
            "bytes_per_token": sum(tokens[name].nbytes for name in TOKEN_ARRAYS) / n,
            "kl_mean": 0.0,
        },
    }
    for precision in PRECISIONS:
        profile = Compact(top_k=k, vocab_size=vocab_size, precision=precision, id_table=table)
        found[f"compact, {precision} bits"] = compact(tokens, profile)
    identity = Compact(top_k=k, vocab_size=vocab_size, precision=8, id_table=np.arange(vocab_size))
    found["compact, 8 bits, ids not ranked"] = compact(tokens, identity)
    return found


def consolidation(tokens: dict[str, Array], vocab_size: int, copies: int) -> dict[str, float]:
    """Measure a run's consolidation, checksums, flush and read-back included, of one partition many times over."""
    n, k = tokens["topk_ids"].shape
    table = id_table(tokens["topk_ids"][:PILOT_TOKENS], vocab_size)
    profile = Compact(top_k=k, vocab_size=vocab_size, precision=8, id_table=table)
    with tempfile.TemporaryDirectory() as folder:
        attempt = Path(folder) / "000000.zarr"
        document = {"document_row": np.zeros(1, np.uint64), "document_offset": np.zeros(1, np.uint32)}
        records = Records(**tokens, **document, document_length=np.array([n], np.uint32))
        receipt = {
            "n_rows": 1,
            "statistics": Statistics.of(records),
            "content_digest": f"{0:064x}",
            "files": write_partition(attempt, records, profile),
        }
        pieces = [
            PartitionPiece(path=attempt, receipt=SimpleNamespace(**receipt, first_row=row), profile=profile)
            for row in range(copies)
        ]
        started = time.perf_counter()
        cache = Path(folder) / "cache.h5"
        consolidate(cache, lambda: pieces, profile=profile, packed=False, attributes={})
        seconds = time.perf_counter() - started
        size = cache.stat().st_size
    return {"bytes": size, "seconds": seconds, "bytes_per_second": size / seconds}


def main() -> None:
    """Measure, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--top-k", type=int, nargs="*", default=[64, 32])
    parser.add_argument("--copies", type=int, default=20)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="two copies, and only the cache's own k")
    arguments = parser.parse_args()
    reader = CacheReader(arguments.cache)
    if not isinstance(reader.profile, Plain):
        parser.error("expected a plain cache, got a compact one")
    if arguments.tiny:
        arguments.top_k, arguments.copies = [reader.top_k], 2
    whole = reader.tokens(0, reader.n_entries)
    found: dict[str, Any] = {"tokens": reader.n_tokens, "vocab_size": reader.vocab_size, "layouts": {}}
    for k in arguments.top_k:
        tokens = {**whole, "topk_ids": whole["topk_ids"][:, :k], "topk_logprobs": whole["topk_logprobs"][:, :k]}
        found["layouts"][str(k)] = measure(tokens, reader.vocab_size)
        print(f"k = {k}, {reader.n_tokens:,} tokens")
        for name, values in found["layouts"][str(k)].items():
            speed = f"{values['encode'] / 1e6:6.2f}  {values['decode'] / 1e6:6.2f}" if "decode" in values else ""
            print(f"  {name:44} {values['bytes_per_token']:7.1f} B  KL {values['kl_mean']:.1e}  {speed}")
    found["consolidation"] = consolidation(whole, reader.vocab_size, arguments.copies)
    print(f"consolidation: {found['consolidation']['bytes_per_second'] / 1e6:.0f} MB/s")
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
