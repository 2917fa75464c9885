"""Print how many documents of the quickstart this machine scores in about 2.5 minutes, or ``all``.

It times a few forward passes of the teacher, which takes seconds. A run folder that exists already is not shrunk: its
number of documents is printed again. What was found is explained on stderr.

    python scripts/choose_documents.py TEACHER CORPUS RUN [--seconds 150]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import accumulate
from pathlib import Path

MAX_LENGTH = 1024
# Tokens of a timed pass, passes after the first, and the fewest documents worth a quickstart.
PASS_TOKENS, PASSES, AT_LEAST = 256, 3, 10


def choose(lengths: list[int], tokens_per_second: float, seconds: float) -> int:
    """Return how many documents from the first on can be scored in some seconds.

    >>> choose([100] * 50, 20.0, 100.0), choose([100] * 50, 1.0, 100.0), choose([100] * 5, 20.0, 100.0)
    (20, 10, 5)
    """
    fitting = sum(total <= tokens_per_second * seconds for total in accumulate(lengths))
    return min(max(fitting, AT_LEAST), len(lengths))


def measure(teacher: str, ids: list[int]) -> float:
    """Return the tokens/s of the teacher's forward pass on this machine, in the dtype that the job will choose."""
    import torch
    from transformers import AutoModelForCausalLM

    from dask_logits.teacher.checkpoint import resolve_dtype

    model = AutoModelForCausalLM.from_pretrained(
        teacher, dtype=getattr(torch, resolve_dtype("auto", "bfloat16", "cpu"))
    )
    input_ids = torch.tensor([ids[:PASS_TOKENS]])
    seconds = []
    with torch.inference_mode():
        for _ in range(PASSES + 1):
            started = time.perf_counter()
            model(input_ids)
            seconds.append(time.perf_counter() - started)
    return input_ids.numel() / min(seconds[1:])


def main() -> None:
    """Print the number of documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seconds", type=float, default=150.0, help="of scoring; default: 150")
    arguments = parser.parse_args()
    texts = [json.loads(line)["text"] for line in arguments.corpus.read_text().splitlines()]

    def answer(n: int, reason: str) -> None:
        print(f"quickstart: {reason}", file=sys.stderr)
        print("all" if n >= len(texts) else n)

    if (arguments.run / "run.json").exists():
        from dask_logits import read_status

        n = read_status(arguments.run).rows
        if n:
            return answer(n, f"{arguments.run} has a run of {n} of {len(texts)} documents; continuing with these.")
    import torch

    if torch.cuda.is_available():
        return answer(len(texts), f"scoring all {len(texts)} documents on the GPU.")
    from transformers import AutoTokenizer

    print("quickstart: measuring the teacher's speed on this machine (a few seconds)", file=sys.stderr)
    tokenizer = AutoTokenizer.from_pretrained(arguments.teacher)
    ids = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
    rate = measure(arguments.teacher, max(ids, key=len))
    n = choose([len(document) for document in ids], rate, arguments.seconds)
    part = sum(map(len, ids[:n]))
    return answer(
        n,
        f"the teacher scores about {rate:,.0f} tokens/s here. Scoring {'all' if n == len(texts) else 'the first'} {n} "
        f"of {len(texts)} documents ({part:,} tokens) takes about {max(1, round(part / rate / 60))} min.",
    )


if __name__ == "__main__":
    main()
