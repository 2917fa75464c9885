"""Do students get better? A ladder of targets on one student, against labels alone and against the live teacher.

The text is the source of Python's standard library, which every machine has. A small teacher is trained on some of its
files, and students on the targets of others. A third part is held out from both. All students of a seed start from the
same weights and see the same batches. ``live`` runs the teacher in the loop, and ``offline`` keeps all entries, so the
two should be equal.

    python benchmarks/quality.py --out benchmarks/results/NAME.json --plot docs/figures/NAME.svg
    python benchmarks/quality.py --tiny    # does it run? the figures mean nothing

Less than half an hour on two cores. The plot needs matplotlib, which the project itself does not.

Dimension letters: N blocks, B blocks of a batch, T tokens of a block, V vocabulary.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import random
import statistics
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dask_logits import CachedLogitsDataset, Objective, collate, convert, distillation_loss, generate, load_config

T = 128
BINS = 15
# The gap is between these.
_BOUNDS = ("cross-entropy", "live")


class Way(NamedTuple):
    """A way to train: the cache it needs, and the loss."""

    k: int
    objective: Objective | None
    precision: Literal[8, 10, 12] | None = None
    position_share: float = 1.0
    # Of the label loss at all positions. The objective's own is at the positions with targets.
    label_share: float = 0.0
    # Draws of a position. 0: the k most probable tokens.
    draws: int = 0
    # Tried with --all only.
    is_further: bool = False


def ways(vocab_size: int, k: int) -> dict[str, Way]:
    """Return the ladder. An objective of None is the live teacher."""
    with warnings.catch_warnings():
        # Renormalised entries are here to show what the warning says.
        warnings.simplefilter("ignore")
        renormalised = Objective(tail="renormalised")
    ghost = Objective()
    return {
        "cross-entropy": Way(k, Objective(alpha=0.0)),
        f"renormalised, k = {k}": Way(k, renormalised),
        f"ghost, k = {k // 4}": Way(k // 4, ghost),
        f"ghost, k = {k}": Way(k, ghost),
        f"ghost, k = {4 * k}": Way(4 * k, ghost),
        f"ghost, k = {4 * k}, 50 % of the positions": Way(4 * k, ghost, position_share=0.5, is_further=True),
        f"ghost, k = {4 * k}, 20 % of the positions": Way(4 * k, ghost, position_share=0.2),
        f"half cross-entropy, half ghost at 20 %, k = {4 * k}": Way(
            4 * k, ghost, position_share=0.2, label_share=0.5, is_further=True
        ),
        f"half cross-entropy, half ghost, k = {4 * k}": Way(4 * k, ghost, label_share=0.5, is_further=True),
        f"residual, k = {k}": Way(k, Objective(tail="residual")),
        f"half cross-entropy, half ghost, k = {k}": Way(k, Objective(alpha=0.5), is_further=True),
        f"ghost, k = {k}, 8 bits": Way(k, ghost, 8),
        f"ghost, k = {k}, 10 bits": Way(k, ghost, 10),
        f"ghost, k = {k}, 12 bits": Way(k, ghost, 12),
        f"ghost, k = {4 * k}, 8 bits": Way(4 * k, ghost, 8, is_further=True),
        "12 draws": Way(k, ghost, 8, draws=12),
        "50 draws": Way(k, ghost, 8, draws=50, is_further=True),
        "offline": Way(vocab_size, ghost),
        "live": Way(k, None),
    }


def read_blocks(arguments: argparse.Namespace) -> dict[str, Tensor]:
    """Return the blocks of each part, [N, T]. A file is in one part only."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    stdlib = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in stdlib.rglob("*.py") if not {"site-packages", "test", "tests"} & set(path.parts))
    random.Random(0).shuffle(files)
    texts = [path.read_text(errors="ignore") for path in files]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=arguments.vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts[: arguments.files], trainer)
    remaining = iter(texts)
    parts = {}
    for name, n_blocks in arguments.blocks.items():
        ids: list[int] = []
        while len(ids) < n_blocks * T:
            ids += tokenizer.encode(next(remaining)).ids
        parts[name] = torch.tensor(ids[: n_blocks * T]).view(n_blocks, T)
    return parts


def new_model(vocab_size: int, width: int, layers: int, seed: int) -> Any:
    """Return a Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=T, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def optimizer_of(model: Any, rate: float, steps: int) -> tuple[Any, Any]:
    """Return AdamW, and a schedule that warms up and then falls as a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    warm = max(1, steps // 20)

    def share(step: int) -> float:
        return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def order(n: int, batch: int, seed: int) -> Iterator[list[int]]:
    """Yield the places of batches without end, each epoch in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        places = torch.randperm(n, generator=generator).tolist()
        yield from (places[first : first + batch] for first in range(0, n - batch + 1, batch))


def train_teacher(arguments: argparse.Namespace, blocks_NT: Tensor) -> Any:
    """Train the teacher on labels."""
    model = new_model(arguments.vocab_size, arguments.teacher_width, 4, seed=0)
    optimizer, schedule = optimizer_of(model, 2e-3, arguments.teacher_steps)
    for places in itertools.islice(order(len(blocks_NT), 16, seed=0), arguments.teacher_steps):
        ids_BT = blocks_NT[places]
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def write_cache(folder: Path, teacher: Path, blocks_NT: Tensor, way: Way) -> tuple[CachedLogitsDataset, float]:
    """Score the blocks, or convert a cache of the same targets. Return the dataset, and its bytes per token."""
    from datasets import Dataset

    name = f"k{way.k}-{way.precision}-{way.position_share}-{way.draws}"
    generation = "distillation.teacher.generation"
    entries = [f"{generation}.top_k={way.k}"]
    if way.draws:
        entries = [f"{generation}.targets=sample", f"{generation}.draws={way.draws}"]
    settings = [
        f"distillation.teacher.model_path={teacher}",
        f"distillation.teacher.cache_dir={folder / name}",
        *entries,
        f"distillation.cache.profile={'plain' if way.precision is None else 'compact'}",
        f"distillation.cache.precision={way.precision or 8}",
        "cluster=serial",
    ]
    if way.position_share < 1:
        settings += [f"{generation}.positions=entropy", f"{generation}.position_share={way.position_share}"]
    path = folder / name / "teacher_logits.h5"
    plain = folder / f"k{way.k}-None-{way.position_share}-0" / "teacher_logits.h5"
    if way.precision is not None and not way.draws and plain.exists():
        path = convert(plain, folder / f"{name}.h5", profile="compact", precision=way.precision)
    elif not path.exists():
        data = Dataset.from_dict({"input_ids": blocks_NT.tolist()})
        generate(load_config(settings, dataset_given=True), data)
    return CachedLogitsDataset(path), path.stat().st_size / blocks_NT.numel()


def live_loss(logits_BTV: Tensor, teacher: Any, ids_BT: Tensor) -> Tensor:
    """Return the KL divergence from the teacher's whole distribution, a mean over all positions."""
    with torch.no_grad():
        logp_BTV = teacher(input_ids=ids_BT).logits.log_softmax(-1)
    logq_BTV = logits_BTV.log_softmax(-1)
    return functional.kl_div(logq_BTV, logp_BTV, log_target=True, reduction="sum") / ids_BT.numel()


def train_student(
    arguments: argparse.Namespace, way: Way, dataset: CachedLogitsDataset, teacher: Any, seed: int
) -> tuple[Any, float]:
    """Train a student. Return it, and the median milliseconds of a step."""
    student = new_model(arguments.vocab_size, arguments.student_width, 2, seed)
    optimizer, schedule = optimizer_of(student, 3e-3, arguments.student_steps)
    times = []
    for places in itertools.islice(order(len(dataset), 16, seed), arguments.student_steps):
        started = time.perf_counter()
        batch = collate([dataset[place] for place in places])
        logits_BTV = student(input_ids=batch["input_ids"]).logits
        if way.objective is None:
            loss = live_loss(logits_BTV, teacher, batch["input_ids"])
        else:
            loss = distillation_loss(logits_BTV, batch["targets"], way.objective).loss
        if way.label_share:
            label_loss = functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
            loss = way.label_share * label_loss + (1 - way.label_share) * loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        times.append(1e3 * (time.perf_counter() - started))
    return student.eval(), statistics.median(times)


@torch.no_grad()
def evaluate(models: Sequence[Any], teacher: Any, blocks_NT: Tensor) -> list[dict[str, float]]:
    """Return cross-entropy, KL from the teacher (nats per token) and calibration error of each on held-out text."""
    sums = [{"cross_entropy": 0.0, "kl": 0.0} for _ in models]
    hits = [torch.zeros(BINS, 3, dtype=torch.float64) for _ in models]
    for ids_BT in blocks_NT.split(32):
        logp_BTV = teacher(input_ids=ids_BT).logits[:, :-1].log_softmax(-1)
        labels_BT = ids_BT[:, 1:]
        for model, each, into_N3 in zip(models, sums, hits, strict=True):
            logq_BTV = model(input_ids=ids_BT).logits[:, :-1].log_softmax(-1)
            each["cross_entropy"] -= float(logq_BTV.gather(-1, labels_BT[..., None]).sum())
            each["kl"] += float((logp_BTV.exp() * (logp_BTV - logq_BTV)).sum())
            best = logq_BTV.max(-1)
            p_N = best.values.exp().flatten().double()
            each_N3 = torch.stack([torch.ones_like(p_N), p_N, (best.indices == labels_BT).flatten().double()], -1)
            into_N3.index_add_(0, (p_N * BINS).long().clamp(max=BINS - 1), each_N3)
    n_tokens = blocks_NT.shape[0] * (T - 1)
    return [
        {**{name: value / n_tokens for name, value in each.items()},
         "calibration_error": float((found_N3[:, 1] - found_N3[:, 2]).abs().sum() / n_tokens)}
        for each, found_N3 in zip(sums, hits, strict=True)
    ]  # fmt: skip


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train all students of all seeds."""
    parts = read_blocks(arguments)
    teacher = train_teacher(arguments, parts["teacher"])
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "teacher"
        teacher.save_pretrained(path)
        found = {"teacher": evaluate([teacher], teacher, parts["held_out"])[0]}
        ladder = ways(arguments.vocab_size, arguments.k)
        usual = {name for name, way in ladder.items() if arguments.all or not way.is_further}
        wanted = {*_BOUNDS, *arguments.ways} if arguments.ways else usual
        for name, way in ladder.items():
            if name not in wanted:
                continue
            dataset, size = write_cache(Path(folder), path, parts["student"], way)
            trained = [train_student(arguments, way, dataset, teacher, seed) for seed in range(arguments.seeds)]
            quality = evaluate([student for student, _ in trained], teacher, parts["held_out"])
            seeds = [{**each, "ms_per_step": step} for each, (_, step) in zip(quality, trained, strict=True)]
            live = way.objective is None
            said = dataset.attributes["statistics"]
            per_target = {key: said[key] / said["targets"] for key in ("kept_mass", "distinct")}
            rows[name] = {"seeds": seeds, "bytes_per_token": None if live or not way.objective.alpha else size}
            rows[name] |= {} if live else per_target
            print(name, {key: round(statistics.mean(one[key] for one in seeds), 4) for key in seeds[0]}, flush=True)
    return found | {"ways": summarised(rows)}


def summarised(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Add means, and the share of the gap between labels alone and the live teacher that is closed, seed by seed."""
    first, last = (rows[name]["seeds"] for name in _BOUNDS)
    for row in rows.values():
        seeds = row["seeds"]
        row |= {key: statistics.mean(one[key] for one in seeds) for key in seeds[0]}
        for key in ("cross_entropy", "kl"):
            shares = [
                (a[key] - one[key]) / (a[key] - b[key]) for a, one, b in zip(first, seeds, last, strict=True)
            ]  # fmt: skip
            row[f"gap_closed_{key}"] = statistics.mean(shares)
            row[f"gap_closed_{key}_each"] = shares
    return rows


def report(found: dict[str, Any]) -> None:
    """Print the table."""
    print(f"teacher: cross-entropy {found['teacher']['cross_entropy']:.3f} nats per held-out token")
    print(f"{'':40s}  cross-entropy   gap closed       KL  calibration  bytes/token  ms/step")
    for name, row in found["ways"].items():
        size = "" if row["bytes_per_token"] is None else f"{row['bytes_per_token']:.0f}"
        print(
            f"{name:40s} {row['cross_entropy']:14.4f} {100 * row['gap_closed_cross_entropy']:10.0f} % "
            f"{row['kl']:8.4f} {row['calibration_error']:12.3f} {size:>12s} {row['ms_per_step']:8.1f}"
        )
    if "offline" not in found["ways"]:
        return
    ends = (found["ways"][name]["seeds"] for name in ("offline", "live"))
    worst = max(abs(one["cross_entropy"] - other["cross_entropy"]) for one, other in zip(*ends, strict=True))
    print(f"offline and live differ by at most {worst:.4f} nats")


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw the share of the gap that each way closes, with a dot per seed."""
    import matplotlib

    matplotlib.use("svg")
    # The same figures give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "dask_logits"
    from matplotlib import pyplot

    names = list(found["ways"])
    figure, axis = pyplot.subplots(figsize=(8, 1 + len(names) / 4), layout="constrained")
    axis.barh(names, [100 * found["ways"][name]["gap_closed_cross_entropy"] for name in names], color="#9ecae1")
    for name in names:
        for share in found["ways"][name]["gap_closed_cross_entropy_each"]:
            axis.plot(100 * share, name, "o", color="#08519c", markersize=3)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("% of the gap in held-out cross-entropy between labels alone and the live teacher")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--student-steps", type=int, default=200)
    parser.add_argument("--teacher-steps", type=int, default=500)
    parser.add_argument("--all", action="store_true", help="also the further ways, in half as much time again")
    parser.add_argument("--ways", nargs="*", help="only these, and those that the gap is between")
    parser.add_argument("--tiny", action="store_true", help="tiny models, a few steps, one seed")
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file")
    parser.add_argument("--plot", type=Path, help="draw the shares into this SVG file")
    arguments = parser.parse_args()
    if arguments.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot: expected matplotlib, got none; install it")
    arguments.vocab_size, arguments.files = 1024, 200
    arguments.teacher_width, arguments.student_width = 256, 64
    arguments.blocks = {"teacher": 8000, "student": 1000, "held_out": 200}
    if arguments.tiny:
        arguments.seeds, arguments.k, arguments.student_steps, arguments.teacher_steps = 1, 8, 2, 2
        arguments.vocab_size, arguments.files, arguments.teacher_width, arguments.student_width = 300, 4, 16, 8
        arguments.blocks = {"teacher": 16, "student": 16, "held_out": 4}
    started = time.perf_counter()
    found = measure(arguments)
    found["minutes"] = (time.perf_counter() - started) / 60
    found["settings"] = {name: value for name, value in vars(arguments).items() if name not in ("out", "plot", "tiny")}
    report(found)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.plot is not None:
        plot(found, arguments.plot)


if __name__ == "__main__":
    main()
