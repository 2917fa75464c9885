"""What one reader of a stream can deliver: rows spooled as they came, against rows tokenised before they are spooled.

The corpus is the Python reference repeated; alternating, medians. The second rate bounds how many workers a reader that
tokenises could feed.

    python benchmarks/stream.py --copies 40 --rounds 3
    python benchmarks/stream.py --tiny    # does it run? the figures mean nothing
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from dask_logits.config.groups import DatasetConfig
from dask_logits.data.stream import RowStream
from dask_logits.data.tokens import encode
from dask_logits.run.folder import RunFolder
from dask_logits.run.plan_log import PlanLog

MODEL = "output/models/SmolLM2-135M-Instruct"
CORPUS = "output/corpus/python-reference.jsonl"


def spool(rows: list[dict[str, str]]) -> float:
    """Plan and spool all rows; return the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        stream = RowStream([rows], DatasetConfig(text_column="text"), {})
        started = time.perf_counter()
        for _ in stream.plan(PlanLog(RunFolder(Path(folder))), 1000, lambda index: True):
            pass
        return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default=MODEL, help="folder with the tokenizer")
    parser.add_argument("--corpus", type=Path, default=Path(CORPUS), help="JSON lines with a text each")
    parser.add_argument("--tiny", action="store_true", help="the corpus once, one round")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.copies, arguments.rounds = 1, 1
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = [json.loads(line) for line in arguments.corpus.read_text().splitlines()] * arguments.copies
    texts = [row["text"] for row in rows]
    tokens = 0
    as_they_came, tokenised = [], []
    for _ in range(arguments.rounds):
        as_they_came.append(spool(rows))
        started = time.perf_counter()
        ids = encode(tokenizer, texts, True, 2048)
        encoding = time.perf_counter() - started
        tokens = sum(map(len, ids))
        tokenised.append(encoding + spool([{"text": None, "input_ids": row} for row in ids]))
    plain, slow = statistics.median(as_they_came), statistics.median(tokenised)
    print(f"{len(rows):,} rows, {tokens:,} tokens, {os.cpu_count()} cores")
    print(f"as they came       {tokens / plain:12,.0f} tokens/s")
    print(f"tokenised before   {tokens / slow:12,.0f} tokens/s")
    print(f"ratio              {slow / plain:12.1f}")


if __name__ == "__main__":
    main()
