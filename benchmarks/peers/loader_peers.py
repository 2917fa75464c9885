"""MosaicML's MDS and LitData on the records of ``flat.bin``: tokens/s of random items and of their own shuffled order.

python loader_peers.py FOLDER K TOKENS     (called by benchmarks/loader.py; prints JSON)
"""

import importlib.util
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


def documents(folder: Path, k: int) -> Iterator[np.ndarray]:
    """Yield the bytes of the first quarter of the documents: [T, 6 K] each."""
    flat = np.memmap(folder / "flat.bin", np.uint8, "r").reshape(-1, 6 * k)
    ends = np.load(folder / "ends.npy")
    count = len(ends) // 4
    for index in range(count):
        yield flat[int(ends[index - 1]) if index else 0 : int(ends[index])]


def random_items(dataset: Any, read: Callable[[Any], int], tokens: int) -> float:
    """Return the tokens/s of items in a random order."""
    draw = random.Random(1)
    for _ in range(200):
        read(dataset[draw.randrange(len(dataset))])
    done, started = 0, time.perf_counter()
    while done < tokens:
        done += read(dataset[draw.randrange(len(dataset))])
    return done / (time.perf_counter() - started)


def in_order(dataset: Any, read: Callable[[Any], int]) -> float:
    """Return the tokens/s of the dataset's own order."""
    done, started = 0, time.perf_counter()
    for item in dataset:
        done += read(item)
    return done / (time.perf_counter() - started)


def main() -> None:
    """Write the records both ways, read them, print the figures."""
    if len(sys.argv) != 4:
        sys.exit("usage: loader_peers.py FOLDER K TOKENS")
    for name in ("streaming", "litdata"):
        if importlib.util.find_spec(name) is None:
            sys.exit(
                f"loader_peers: the package {name!r} is not installed here; make an environment of its own from "
                "benchmarks/peers/requirements-loader.txt, and run this with its python"
            )
    folder, k, tokens = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    found = {}
    from streaming import MDSWriter, StreamingDataset

    with MDSWriter(out=str(folder / "mds"), columns={"rows": "bytes"}) as writer:
        for rows in documents(folder, k):
            writer.write({"rows": rows.tobytes()})
    mds = StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=1)

    def read_mds(item: dict[str, bytes]) -> int:
        rows = np.frombuffer(item["rows"], np.uint8).reshape(-1, 6 * k).copy()
        return len(rows)

    found["MosaicML MDS, documents"] = random_items(mds, read_mds, tokens)
    found["MosaicML MDS, its shuffled order"] = in_order(mds, read_mds)

    from litdata import StreamingDataset as LitDataset
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder / "lit"), chunk_bytes="64MB")
    for index, rows in enumerate(documents(folder, k)):
        writer[index] = rows.tobytes()
    writer.done()
    writer.merge()
    lit = LitDataset(str(folder / "lit"), shuffle=True)

    def read_lit(item: bytes) -> int:
        return len(np.frombuffer(item, np.uint8).reshape(-1, 6 * k).copy())

    found["LitData, its shuffled order"] = in_order(lit, read_lit)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
