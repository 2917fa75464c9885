"""How fast caches are read, beside other ways to store and read the same records.

The records are a plain cache's, many times over. A reader gives the arrays of one item. Documents are read in a random
order; blocks are windows of 4,096 tokens, in a random order. Speeds are tokens a second, medians of rounds in which all
readers take turns; ``cold``: the file's pages are dropped before each round. Then DataLoaders with workers.

    dask-logits generate … distillation.cache.profile=plain
    python benchmarks/loader.py output/RUN/teacher_logits.h5 --out benchmarks/results/NAME.json
    python benchmarks/loader.py output/RUN/teacher_logits.h5 --tiny    # does it run? the figures mean nothing

MosaicML's MDS and LitData run in an environment of their own (``--peers PYTHON``, with the packages of
benchmarks/peers/requirements-loader.txt).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader

from dask_logits import CachedLogitsDataset, ItemOrder, collate
from dask_logits.cache.profile import Compact, Plain, Profile, id_table
from dask_logits.cache.reader import CacheReader
from dask_logits.cache.writer import CacheWriter

Reader = Callable[[int], int]


def write_cache(path: Path, source: CacheReader, profile: Profile, copies: int) -> None:
    """Write a cache that holds another one many times over."""
    tokens = source.tokens(0, source.n_entries)
    lengths = np.asarray(source.arrays["document_length"])
    n, d = source.n_tokens, source.n_documents
    step = -(-n // profile.alignment) * profile.alignment
    with CacheWriter(
        path, profile=profile, n_tokens=n * copies, n_documents=d * copies, entries=(step * copies,) * 2
    ) as writer:
        for copy in range(copies):
            writer.append_tokens(tokens)
            writer.align()
            writer.append("document_row", np.arange(copy * d, (copy + 1) * d, dtype=np.uint64))
            writer.append("document_offset", np.zeros(d, np.uint32))
            writer.append("document_length", lengths)
            starts = copy * step + np.cumsum(lengths, dtype=np.uint64) - lengths
            writer.append("document_start", starts.astype(np.uint64))
        writer.finish({"content_digest": "0" * 64})


def write_others(folder: Path, source: CacheReader, copies: int) -> None:
    """Write the records as a flat binary file, as a plain HDF5 file of rows, and as Arrow lists."""
    from datasets import Dataset, Features, Sequence, Value

    tokens = source.tokens(0, source.n_entries)
    ids, logprobs = tokens["topk_ids"].astype(np.int32), tokens["topk_logprobs"]
    with (folder / "flat.bin").open("wb") as file:
        for _ in range(copies):
            np.concatenate([ids.view(np.uint8), logprobs.view(np.uint8)], 1).tofile(file)
    lengths = np.tile(np.asarray(source.arrays["document_length"]), copies).astype(np.int64)
    np.save(folder / "ends.npy", np.cumsum(lengths))
    with h5py.File(folder / "naive.h5", "w") as file:
        for name, array in (("ids", ids), ("logprobs", logprobs)):
            made = file.create_dataset(name, (len(array) * copies, source.top_k), array.dtype, chunks=True)
            for copy in range(copies):
                made[copy * len(array) : (copy + 1) * len(array)] = array

    def rows() -> Iterator[dict[str, Any]]:
        ends = np.cumsum(np.asarray(source.arrays["document_length"]), dtype=np.int64)
        for _ in range(max(1, copies // 4)):
            for start, stop in zip(np.append(0, ends[:-1]), ends, strict=True):
                yield {"ids": ids[start:stop].reshape(-1), "logprobs": logprobs[start:stop].reshape(-1)}

    features = Features({"ids": Sequence(Value("int32")), "logprobs": Sequence(Value("float16"))})
    Dataset.from_generator(rows, features=features, cache_dir=str(folder / "hf")).save_to_disk(str(folder / "arrow"))


def readers(folder: Path, window: int) -> dict[str, tuple[Reader, int, Path]]:
    """Return name → (read item i and return its tokens, items, file)."""
    found: dict[str, tuple[Reader, int, Path]] = {}

    def of_dataset(dataset: CachedLogitsDataset) -> Reader:
        return lambda index: len(dataset[index]["input_ids"])

    for profile in ("plain", "compact"):
        path = folder / f"{profile}.h5"
        documents, windows = CachedLogitsDataset(path), CachedLogitsDataset(path, window=window)
        found[f"{profile}, documents"] = (of_dataset(documents), len(documents), path)
        found[f"{profile}, blocks"] = (of_dataset(windows), len(windows), path)
    codes = CachedLogitsDataset(folder / "compact.h5", decode="device", window=window)
    found["compact, blocks of codes"] = (of_dataset(codes), len(codes), folder / "compact.h5")

    ends = np.load(folder / "ends.npy")
    k = CacheReader(folder / "plain.h5").top_k
    flat = np.memmap(folder / "flat.bin", np.uint8, "r").reshape(-1, 6 * k)

    def memmap(index: int) -> int:
        start, stop = (int(ends[index - 1]) if index else 0), int(ends[index])
        rows = np.array(flat[start:stop])
        torch.from_numpy(rows[:, : 4 * k].view(np.int32)), torch.from_numpy(rows[:, 4 * k :].view(np.float16))
        return stop - start

    found["flat memmap, int32 + float16, documents"] = (memmap, len(ends), folder / "flat.bin")
    naive = h5py.File(folder / "naive.h5")

    def per_item(index: int) -> int:
        start, stop = (int(ends[index - 1]) if index else 0), int(ends[index])
        torch.from_numpy(naive["ids"][start:stop]), torch.from_numpy(naive["logprobs"][start:stop])
        return stop - start

    found["h5py for each item, documents"] = (per_item, len(ends), folder / "naive.h5")
    from datasets import load_from_disk

    arrow = load_from_disk(str(folder / "arrow")).with_format("numpy")

    def of_arrow(index: int) -> int:
        item = arrow[index]
        torch.from_numpy(np.array(item["ids"]).reshape(-1, k)), torch.from_numpy(np.array(item["logprobs"]))
        return len(item["ids"]) // k

    found["Hugging Face datasets, documents"] = (of_arrow, len(arrow), folder / "arrow")
    return found


def drop_pages(path: Path) -> None:
    """Ask the system to forget a file."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def one_round(read: Reader, n_items: int, seed: int, tokens: int) -> float:
    """Return the tokens/s of reading random items until there are enough tokens."""
    draw = random.Random(seed)
    done = 0
    started = time.perf_counter()
    while done < tokens:
        done += read(draw.randrange(n_items))
    return done / (time.perf_counter() - started)


def loaders(folder: Path, tokens: int, window: int) -> dict[str, float]:
    """Return the tokens/s of DataLoaders with 0, 1 and 2 workers, in the order that training reads."""
    found = {}
    for profile, decode in (("plain", "worker"), ("compact", "worker"), ("compact", "device")):
        dataset = CachedLogitsDataset(folder / f"{profile}.h5", decode=decode, window=window)
        order = ItemOrder(len(dataset), seed=1).items(0, min(len(dataset), tokens // window)).tolist()
        for workers in (0, 1, 2):
            loader = DataLoader(dataset, batch_size=8, sampler=order, collate_fn=collate, num_workers=workers)
            batches = iter(loader)
            done = next(batches)["input_ids"].numel()
            started, done = time.perf_counter(), 0
            for batch in batches:
                done += batch["input_ids"].numel()
            found[f"{profile}, decode={decode}, {workers} workers"] = done / (time.perf_counter() - started)
    return found


def resident(dataset: CachedLogitsDataset) -> list[int]:
    """Return private resident bytes after each quarter of an epoch in block order."""
    order = ItemOrder(len(dataset), seed=2)
    found = []
    for quarter in range(4):
        bounds = [len(dataset) * (quarter + i) // 4 for i in (0, 1)]
        for item in order.items(*bounds).tolist():
            dataset[item]
        found.append(int(psutil.Process().memory_full_info().uss))
    return found


def main() -> None:
    """Write the files, measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--copies", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="read in each round")
    parser.add_argument("--window", type=int, default=4_096, help="tokens of a block")
    parser.add_argument("--tiny", action="store_true", help="four copies, one round, a few tokens")
    parser.add_argument("--folder", type=Path, help="where the files go; default: a temporary folder")
    parser.add_argument("--peers", help="python of an environment with benchmarks/peers/requirements-loader.txt")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.copies, arguments.rounds, arguments.tokens, arguments.window = 4, 1, 1_000, 32
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        source = CacheReader(arguments.cache)
        if not isinstance(source.profile, Plain):
            parser.error("expected a plain cache, got a compact one")
        table = id_table(np.asarray(source.arrays["topk_ids"][:10_000]), source.vocab_size)
        compact = Compact(top_k=source.top_k, vocab_size=source.vocab_size, precision=8, id_table=table)
        for profile in (source.profile, compact):
            write_cache(folder / f"{profile.name}.h5", source, profile, arguments.copies)
        write_others(folder, source, arguments.copies)
        warm: dict[str, list[float]] = {}
        cold: dict[str, list[float]] = {}
        found = readers(folder, arguments.window)
        for seed in range(arguments.rounds):
            for name, (read, n_items, _) in found.items():
                warm.setdefault(name, []).append(one_round(read, n_items, seed, arguments.tokens))
        for seed in range(min(3, arguments.rounds)):
            for name, (read, n_items, path) in found.items():
                drop_pages(path)
                cold.setdefault(name, []).append(one_round(read, n_items, 99 + seed, arguments.tokens // 4))
        peers = {}
        if arguments.peers:
            script = str(Path(__file__).parent / "peers" / "loader_peers.py")
            command = [arguments.peers, script, str(folder), str(source.top_k), str(arguments.tokens)]
            peers = json.loads(
                subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
            )
        result = {
            "tokens": source.n_tokens * arguments.copies,
            "top_k": source.top_k,
            "bytes": {name: path.stat().st_size for name, (_, _, path) in found.items() if path.is_file()},
            "warm": {name: statistics.median(rates[1:] or rates) for name, rates in warm.items()} | peers,
            "cold": {name: statistics.median(rates) for name, rates in cold.items()},
            "loaders": loaders(folder, 4 * arguments.tokens, arguments.window // 2),
            "resident_bytes_by_quarter": resident(CachedLogitsDataset(folder / "compact.h5")),
        }
    for name, rate in result["warm"].items():
        dropped = f"{result['cold'][name] / 1e6:6.2f}" if name in result["cold"] else ""
        print(f"{name:42} {rate / 1e6:6.2f} M tokens/s  {dropped}")
    for name, rate in result["loaders"].items():
        print(f"{name:42} {rate / 1e6:6.2f} M tokens/s")
    print("resident MiB by quarter of an epoch:", [size >> 20 for size in result["resident_bytes_by_quarter"]])
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
