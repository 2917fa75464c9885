"""The loss of a step from hidden states to gradients: time and memory, by vocabulary, against other ways to compute it.

Every way gets the same hidden states, weight and targets, and ends with the gradients to both. Ways are timed in turn,
round by round, in one process; medians count. Ratios are of processor time, which other work on the machine changes
less. The others are written here: ``dense`` and ``loop`` by autograd,
``renormalised`` in the shape of VeOmni's chunked top-k loss (one ``autograd.Function``, logits computed again in
backward, no tail). ``label loss`` is torch's ``linear_cross_entropy``, once in our chunks and once in its own: without
a teacher, the least that a loss over the vocabulary can cost.

*Memory* is the peak of the process beyond what it held before, the weights and hidden states included. ``beyond`` is
this without the two gradients and one chunk of logits.

    python benchmarks/loss.py --out benchmarks/results/NAME.json --plot docs/figures/NAME.svg
    python benchmarks/loss.py --tiny    # does it run? the figures mean nothing

The plot needs matplotlib, which the project itself does not.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from dask.system import CPU_COUNT
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import linear_cross_entropy

from dask_logits import Head, Objective, SparseTargets, distillation_loss, fused_distillation_loss

VOCABULARIES = (49_152, 151_936)
MIX = Objective(tail="residual", alpha=0.7)
CHUNK_BYTES = 128 * 2**20


def chunk_rows(tokens: int, vocabulary: int) -> int:
    """Return the rows of a chunk of the fused loss."""
    most = max(1, CHUNK_BYTES // (4 * vocabulary))
    return -(-tokens // -(-tokens // most))


def make_batch(tokens: int, vocabulary: int, width: int, k: int) -> tuple[Tensor, Tensor, SparseTargets]:
    """Return hidden states, a head's weight, and targets of a Zipf-like teacher."""
    torch.manual_seed(0)
    hidden_ND = torch.randn(tokens, width)
    weight_VD = torch.randn(vocabulary, width) * width**-0.5
    ids_NK = torch.stack([torch.randperm(vocabulary)[:k] for _ in range(tokens)])
    logp_NK = (-1.2 * torch.arange(1, k + 1).log()).expand(tokens, k)
    logp_NK = logp_NK - logp_NK.logsumexp(-1, keepdim=True) + torch.tensor(0.9).log()
    zeros_N = torch.zeros(tokens)
    targets = SparseTargets(
        input_ids=torch.zeros(tokens, dtype=torch.int64),
        topk_ids=ids_NK,
        topk_logprobs=logp_NK,
        tail_logmass=zeros_N + torch.tensor(0.1).log(),
        logsumexp=zeros_N,
        label_ids=ids_NK[:, 0].contiguous(),
        label_logprob=logp_NK[:, 0].contiguous(),
        mask=torch.ones(tokens, dtype=torch.bool),
        vocab_size=vocabulary,
    )
    return hidden_ND.requires_grad_(), weight_VD.requires_grad_(), targets


class Renormalised(torch.autograd.Function):
    """The chunked top-k loss without a tail, its logits computed again in backward."""

    rows = 1024

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, ids_NK: Tensor, logp_NK: Tensor) -> Tensor:
        """Return the mean of Σ p (log p − log q) over the kept ids."""
        parts = []
        for h_RD, ids_RK, logp_RK in zip(
            *(x.split(Renormalised.rows) for x in (hidden_ND, ids_NK, logp_NK)), strict=True
        ):
            logq_RK = (h_RD @ weight_VD.t()).float().log_softmax(-1).gather(1, ids_RK)
            parts.append((logp_RK.exp() * (logp_RK - logq_RK)).sum(-1))
        ctx.save_for_backward(hidden_ND, weight_VD, ids_NK, logp_NK)
        return torch.cat(parts).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Compute mass · softmax − p for each chunk."""
        hidden_ND, weight_VD, ids_NK, logp_NK = ctx.saved_tensors
        dh_ND, dw_VD = torch.empty_like(hidden_ND), torch.zeros_like(weight_VD)
        for rows in torch.arange(len(hidden_ND)).split(Renormalised.rows):
            p_RK = logp_NK[rows].exp()
            grad_RV = (hidden_ND[rows] @ weight_VD.t()).float().softmax(-1) * p_RK.sum(-1, keepdim=True)
            grad_RV.scatter_add_(1, ids_NK[rows], -p_RK)
            grad_RV = grad_RV * (grads[0] / len(hidden_ND))
            dh_ND[rows] = grad_RV @ weight_VD
            dw_VD += grad_RV.t() @ hidden_ND[rows]
        return dh_ND, dw_VD, None, None


def dense_rows(logits_RV: Tensor, ids_RK: Tensor, logp_RK: Tensor, logtail_R: Tensor) -> Tensor:
    """Return the forward KL with a ghost token, by autograd."""
    logq_RK = logits_RV.log_softmax(-1).gather(1, ids_RK)
    tail_R = torch.log1p(-logq_RK.exp().sum(-1).clamp(max=1 - 1e-6))
    return (logp_RK.exp() * (logp_RK - logq_RK)).sum(-1) + logtail_R.exp() * (logtail_R - tail_R)


def ways(hidden_ND: Tensor, weight_VD: Tensor, targets: SparseTargets) -> dict[str, Callable[[], None]]:
    """Return the ways to compute a step's loss and gradients."""
    ids_NK, logp_NK, logtail_N = targets.topk_ids, targets.topk_logprobs, targets.tail_logmass
    head = Head(weight=weight_VD)

    def loop() -> None:
        for rows in torch.arange(len(hidden_ND)).split(512):
            logits_RV = hidden_ND[rows] @ weight_VD.t()
            part = dense_rows(logits_RV, ids_NK[rows], logp_NK[rows], logtail_N[rows]).sum() / len(hidden_ND)
            part.backward()

    def label_loss(rows: int | None) -> None:
        options = LinearCrossEntropyOptions(batch_chunk_size=rows)
        linear_cross_entropy(hidden_ND, weight_VD, targets.label_ids, options=options).backward()

    return {
        "label loss": lambda: label_loss(chunk_rows(len(hidden_ND), len(weight_VD))),
        "label loss, default": lambda: label_loss(None),
        "fused": lambda: fused_distillation_loss(hidden_ND, head, targets).loss.backward(),
        "fused, mixed": lambda: fused_distillation_loss(hidden_ND, head, targets, MIX).loss.backward(),
        "fused, recompute": lambda: fused_distillation_loss(hidden_ND, head, targets, recompute=True).loss.backward(),
        "from logits": lambda: distillation_loss(hidden_ND @ weight_VD.t(), targets).loss.backward(),
        "renormalised": lambda: Renormalised.apply(hidden_ND, weight_VD, ids_NK, logp_NK).backward(),
        "loop": loop,
        "dense": lambda: dense_rows(hidden_ND @ weight_VD.t(), ids_NK, logp_NK, logtail_N).mean().backward(),
    }


def memory_bytes(field: str) -> int:
    """Read a figure of this process, VmRSS or VmHWM."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found
    return int(found[1]) * 1024


def measured(way: Callable[[], None], tensors: tuple[Tensor, ...]) -> tuple[float, float, int]:
    """Run a way once. Return its seconds, those of the processor, and the bytes it added to the process at its peak."""
    for tensor in tensors:
        tensor.grad = None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_bytes("VmRSS")
    start, start_cpu = time.perf_counter(), time.process_time()
    way()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    return seconds, cpu_seconds, memory_bytes("VmHWM") - before


def compare(arguments: argparse.Namespace, vocabulary: int) -> dict[str, dict[str, Any]]:
    """Measure all ways at one vocabulary."""
    hidden_ND, weight_VD, targets = make_batch(arguments.tokens, vocabulary, arguments.width, arguments.k)
    known = ways(hidden_ND, weight_VD, targets)
    wanted = {name: known[name] for name in arguments.ways or known}
    # Buffers of the matrix library are allocated once, by any product.
    (hidden_ND.detach() @ weight_VD.detach()[:4096].t()).sum()
    seconds: dict[str, list[float]] = {name: [] for name in wanted}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in wanted}
    peaks: dict[str, list[int]] = {name: [] for name in wanted}
    for _ in range(arguments.rounds):
        for name, way in wanted.items():
            took, took_cpu, peak = measured(way, (hidden_ND, weight_VD))
            seconds[name].append(took)
            cpu_seconds[name].append(took_cpu)
            peaks[name].append(peak)
    gradients = 4 * (hidden_ND.numel() + weight_VD.numel())
    chunk = 4 * vocabulary * chunk_rows(arguments.tokens, vocabulary)
    return {
        name: {
            "seconds": seconds[name],
            "cpu_seconds": cpu_seconds[name],
            "ratio": statistics.median(
                a / b for a, b in zip(cpu_seconds[name], cpu_seconds["label loss"], strict=True)
            ),
            "peak_bytes": max(peaks[name]),
            "beyond_bytes": max(peaks[name]) - gradients - chunk,
        }
        for name in wanted
    }


def plot(tables: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Draw time and memory of each way."""
    import matplotlib

    matplotlib.use("svg")
    # The same figures give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "dask_logits"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    height = 0.8 / len(tables)
    for i, (vocabulary, rows) in enumerate(tables.items()):
        places = [place + i * height for place in range(len(rows))]
        axes[0].barh(places, [row["ratio"] for row in rows.values()], height, label=f"V = {vocabulary}")
        axes[1].barh(places, [row["peak_bytes"] / 2**30 for row in rows.values()], height)
    axes[0].set_yticks(range(len(rows)), list(rows))
    axes[0].invert_yaxis()
    axes[0].set_xlabel("processor time, relative to the label loss")
    axes[1].set_xlabel("peak memory, GiB")
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=576, help="of the hidden states")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=int(CPU_COUNT))
    parser.add_argument("--ways", nargs="+", help="only these, 'label loss' among them")
    parser.add_argument("--tiny", action="store_true", help="few tokens, small vocabularies, one round")
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file")
    parser.add_argument("--plot", type=Path, help="draw time and memory into this SVG file")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.tokens, arguments.width, arguments.k, arguments.rounds = 32, 8, 4, 1
        arguments.vocabularies = (300, 400)
    torch.set_num_threads(arguments.threads)
    tables = {}
    for vocabulary in arguments.vocabularies:
        tables[str(vocabulary)] = rows = compare(arguments, vocabulary)
        print(f"V = {vocabulary:<15d} seconds  CPU seconds  ratio  peak MiB  beyond MiB", flush=True)
        for name, row in rows.items():
            print(
                f"{name:>19s} {statistics.median(row['seconds']):7.2f}  {statistics.median(row['cpu_seconds']):11.2f}  "
                f"{row['ratio']:5.2f}  "
                f"{row['peak_bytes'] / 2**20:8.0f}  {row['beyond_bytes'] / 2**20:10.0f}"
            )
    if arguments.out is not None:
        found = {
            "tables": tables,
            "settings": {name: getattr(arguments, name) for name in ("tokens", "width", "k", "rounds", "threads")},
            "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
            "versions": {name: version(name) for name in ("dask-logits", "torch")},
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.plot is not None:
        plot(tables, arguments.plot)


if __name__ == "__main__":
    main()
