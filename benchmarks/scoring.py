"""Scoring alone, in this process: speed by document length, vocabulary and k; accuracy of what is kept.

Documents are pieces of one length cut from real text; other vocabularies are the same architecture with random weights.
Cases of a table are timed in turn, round by round (vocabularies one by one); medians count. MFU is of a matrix product
measured in this run.

    python benchmarks/scoring.py --out benchmarks/results/NAME.json --plot docs/figures/NAME.svg
    python benchmarks/scoring.py --tiny    # does it run? the figures mean nothing

The plot needs matplotlib, which the project itself does not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from dask.system import CPU_COUNT

from dask_logits.config.groups import TeacherConfig
from dask_logits.data.items import plain_items
from dask_logits.records import Array
from dask_logits.teacher.checkpoint import TeacherSpec, inspect_teacher, load_teacher
from dask_logits.teacher.meter import measure_cost
from dask_logits.teacher.model import Teacher
from dask_logits.teacher.scoring import ScoringSettings, score_items
from dask_logits.teacher.selfcheck import check, try_compiled
from dask_logits.worker.calibrate import auto_budgets

MODEL = "output/models/SmolLM2-135M-Instruct"
CORPUS = "output/corpus/python-reference.jsonl"
LENGTHS = (32, 128, 512, 2048, 8192)
VOCABULARIES = (49_152, 151_936, 262_144)
KS = (8, 64, 256)


def read_tokens(arguments: argparse.Namespace, count: int) -> Array:
    """Return the first tokens of the corpus, as one stream."""
    import numpy as np
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    parts: list[Array] = []
    with arguments.corpus.open() as lines:
        for line in lines:
            parts.append(np.array(tokenizer(json.loads(line)["text"])["input_ids"], np.int64))
            if sum(map(len, parts)) >= count:
                break
    return np.concatenate(parts)[:count]


def vocabulary_of(model: str) -> int:
    """Return the ids that a teacher's tokenizer gives."""
    from transformers import AutoTokenizer

    return len(AutoTokenizer.from_pretrained(model))


def load(path: str, dtype: str, threads: int, vocab_size: int, *, compiled: bool) -> tuple[Teacher, ScoringSettings]:
    """Load a teacher as a worker does, on its fastest path."""
    facts = inspect_teacher(TeacherConfig(model_path=path))
    spec = TeacherSpec(
        path=path, revision=None, identity=facts.identity, dtype=dtype, device="cpu", torch_threads=threads,
        trust_remote_code=False,
    )  # fmt: skip
    teacher = load_teacher(spec, vocab_size)
    check(teacher, exact=True)
    if compiled:
        try_compiled(teacher)
    batch_tokens, head_rows = auto_budgets("cpu", "auto", "auto")
    return teacher, ScoringSettings(
        top_k=64, vocab_size=vocab_size, batch_tokens=batch_tokens, batch_size=None, head_rows=head_rows,
        path=teacher.path,
    )  # fmt: skip


def with_vocabulary(model: str, folder: Path, vocab_size: int) -> str:
    """Save the teacher's architecture with another vocabulary and random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model, vocab_size=vocab_size)
    torch.manual_seed(0)
    path = folder / f"vocabulary-{vocab_size}"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return str(path)


def timed(teacher: Teacher, cases: dict[str, tuple[list[Array], ScoringSettings]], rounds: int) -> list[dict[str, Any]]:
    """Score every case in turn, round by round, and report medians."""
    cost = measure_cost(teacher)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, (documents, settings) in cases.items():
            scored = score_items(teacher, plain_items(documents), settings)
            # The first round warms buffers and compiled shapes.
            if number:
                found[name].append(scored.seconds)
    rows = []
    for name, (documents, _) in cases.items():
        tokens = sum(map(len, documents))
        seconds = statistics.median(spans["score"] for spans in found[name])
        parts = {part: statistics.median(spans[part] for spans in found[name]) for part in found[name][0]}
        named = sum(value for part, value in parts.items() if part != "score")
        rows.append(
            {
                "case": name,
                "tokens": tokens,
                "tokens_per_second": tokens / seconds,
                "mfu": cost.mfu(cost.flops(map(len, documents)), seconds) or float("nan"),
                "shares": {part: value / seconds for part, value in parts.items() if part != "score"}
                | {"rest": 1 - named / seconds},
            }
        )
    return rows


def throughput(arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Make the three tables."""
    stream = read_tokens(arguments, max(arguments.lengths[-1], arguments.tokens))
    middle = cut(stream[: arguments.tokens], arguments.length)
    teacher, settings = load(
        arguments.model, arguments.dtype, arguments.threads, arguments.vocabularies[0], compiled=not arguments.tiny
    )
    tables = {
        "length": timed(
            teacher,
            {str(n): (cut(stream[: max(n, arguments.tokens)], n), settings) for n in arguments.lengths},
            arguments.rounds,
        ),
        "k": timed(
            teacher, {str(k): (middle, dataclasses.replace(settings, top_k=k)) for k in arguments.ks}, arguments.rounds
        ),
        "vocabulary": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for vocab_size in arguments.vocabularies:
            path = with_vocabulary(arguments.model, Path(folder), vocab_size)
            teacher, settings = load(path, arguments.dtype, arguments.threads, vocab_size, compiled=not arguments.tiny)
            tables["vocabulary"] += timed(teacher, {str(vocab_size): (middle, settings)}, arguments.rounds)
    return tables


def cut(stream: Array, length: int) -> list[Array]:
    """Cut a stream of tokens into documents of one length."""
    return [stream[first : first + length] for first in range(0, len(stream) - length + 1, length)]


def accuracy(arguments: argparse.Namespace) -> dict[str, float]:
    """Compare what is kept with an all-float32 forward, and its ids with those of a float32 head on the same trunk."""
    length = arguments.length
    documents = cut(read_tokens(arguments, 2 * arguments.tokens), length)
    teacher, settings = load(
        arguments.model, arguments.dtype, arguments.threads, arguments.vocabularies[0], compiled=not arguments.tiny
    )
    # One document a batch, so that the trunk can be repeated on the same shapes.
    settings = dataclasses.replace(
        settings, batch_tokens=length, top_k=arguments.ks[-1] if arguments.tiny else settings.top_k
    )
    records = score_items(teacher, plain_items(documents), settings).records
    equal = []
    with torch.inference_mode():
        weight_VD = teacher.head.weight.float()
        for first, document in zip(range(0, records.n_tokens, length), documents, strict=True):
            hidden_TD = teacher.hidden_states(torch.from_numpy(document)[None])[0].float()
            best_TK = (hidden_TD @ weight_VD.t())[:, : settings.vocab_size].topk(settings.top_k).indices.sort(-1).values
            kept_TK = torch.from_numpy(records.topk_ids[first : first + length].astype("int64")).sort(-1).values
            equal.append((best_TK == kept_TK).all(-1))
    del teacher
    reference, _ = load(arguments.model, "float32", arguments.threads, arguments.vocabularies[0], compiled=False)
    errors = check(reference, exact=True).errors
    squares = []
    with torch.inference_mode():
        for first, document in zip(range(0, records.n_tokens, length), documents, strict=True):
            logprobs_TV = reference.logits_forward(torch.from_numpy(document)[None])[0].log_softmax(-1)
            ids_TK = torch.from_numpy(records.topk_ids[first : first + length].astype("int64"))
            kept_TK = torch.from_numpy(records.topk_logprobs[first : first + length]).float()
            squares.append((logprobs_TV.gather(-1, ids_TK) - kept_TK).double().square())
    return {
        "rows": records.n_tokens,
        "rms_nats_bfloat16": float(torch.cat(squares).mean().sqrt()),
        "rms_nats_float32": max(error for way, error in errors.items() if way in ("linear", "blocks")),
        "equal_sets": float(torch.cat(equal).double().mean()),
    }


def plot(tables: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the three tables side by side."""
    import matplotlib

    matplotlib.use("svg")
    # The same figures give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "dask_logits"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3), sharey=True, layout="constrained")
    titles = {"length": "tokens a document", "vocabulary": "vocabulary", "k": "k"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        rows = tables[name]
        axis.plot([row["case"] for row in rows], [row["tokens_per_second"] for row in rows], marker="o")
        axis.set_xlabel(title)
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("tokens/s")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="of a case, at least")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=int(CPU_COUNT))
    parser.add_argument("--model", default=MODEL, help="the teacher's folder")
    parser.add_argument("--corpus", type=Path, default=Path(CORPUS), help="JSON lines with a text each")
    parser.add_argument("--tiny", action="store_true", help="short documents, one round, float32, not compiled")
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file")
    parser.add_argument("--plot", type=Path, help="draw the tables into this SVG file")
    arguments = parser.parse_args()
    arguments.dtype, arguments.length = "bfloat16", 512
    arguments.lengths, arguments.vocabularies, arguments.ks = LENGTHS, VOCABULARIES, KS
    if arguments.tiny:
        arguments.dtype, arguments.length, arguments.tokens, arguments.rounds = "float32", 32, 64, 1
        arguments.lengths, arguments.vocabularies, arguments.ks = (8, 32), (vocabulary_of(arguments.model),), (2, 8)
    tables = throughput(arguments)
    for name, rows in tables.items():
        print(f"by {name:12s} tokens/s    MFU   shares")
        for row in rows:
            parts = ", ".join(f"{part} {100 * share:.1f} %" for part, share in row["shares"].items())
            print(f"{row['case']:>15s} {row['tokens_per_second']:8.0f}  {row['mfu']:5.2f}   {parts}")
    exact = accuracy(arguments)
    print(exact)
    if arguments.out is not None:
        found = {
            "throughput": tables,
            "accuracy": exact,
            "settings": {name: getattr(arguments, name) for name in ("tokens", "rounds", "threads")},
            "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
            "versions": {name: version(name) for name in ("dask-logits", "torch", "transformers")},
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.plot is not None:
        plot(tables, arguments.plot)


if __name__ == "__main__":
    main()
