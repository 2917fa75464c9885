"""Train two tiny random students on the same batches, one from a cache and one from the labels alone, and compare them.

``python scripts/train_tiny_student.py output/quickstart``; a plain loop to start your own from.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import chain, islice, repeat
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from transformers import LlamaConfig, LlamaForCausalLM

from dask_logits import CachedLogitsDataset, DistillationLoss, Objective, collate, distillation_loss
from dask_logits.errors import DaskLogitsError

# Share of the divergence from the teacher in the loss. The rest is the cross-entropy with the labels.
STUDENTS = {"the teacher": 1.0, "labels alone": 0.0}


def new_student(vocab_size: int, tokens: int) -> LlamaForCausalLM:
    """Return a student, always with the same random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, max_position_embeddings=tokens, **sizes))


def loss_of(student: LlamaForCausalLM, batch: dict[str, Any], alpha: float) -> DistillationLoss:
    """Return the loss of a batch, and its two terms in nats per token."""
    logits = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return distillation_loss(logits, batch["targets"], Objective(alpha=alpha), input_ids=batch["input_ids"])


def train(student: LlamaForCausalLM, batches: Iterator[dict[str, Any]], steps: int, alpha: float) -> None:
    """Take some steps."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for step, batch in enumerate(islice(batches, steps), start=1):
        loss = loss_of(student, batch, alpha).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0 or step in (1, steps):
            print(f"  step {step:3d} of {steps}: {loss.item():.3f} nats per token", flush=True)


def main() -> None:
    """Parse the command line, train and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", help="teacher_logits.h5, or the run folder it lies in")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256, help="tokens used of each document")
    arguments = parser.parse_args()

    dataset = CachedLogitsDataset(arguments.cache, max_tokens=arguments.tokens)
    print(dataset)
    # Neither student is trained on the last documents.
    n_training = len(dataset) - min(4, len(dataset) // 2)
    training = Subset(dataset, range(n_training))
    held_out = [dataset[i] for i in range(n_training, len(dataset))]
    found = {"nothing yet": new_student(dataset.vocab_size, arguments.tokens)}
    for name, alpha in STUDENTS.items():
        print(f"a student that learns from {name}:")
        found[name] = new_student(dataset.vocab_size, arguments.tokens)
        # The same batches in the same order for both.
        order = torch.Generator().manual_seed(0)
        loader = DataLoader(training, arguments.batch_size, shuffle=True, collate_fn=collate, generator=order)
        train(found[name], chain.from_iterable(repeat(loader)), arguments.steps, alpha)
    print(f"on {len(held_out)} documents that no student has seen, in nats per token:")
    with torch.no_grad():
        terms = {name: loss_of(student, collate(held_out), 0.5) for name, student in found.items()}
    for name, one in terms.items():
        figures = f"{one.divergence:.3f} from the teacher, {one.cross_entropy:.3f} from the text"
        print(f"  learned from {name + ':':13} {figures}")


if __name__ == "__main__":
    try:
        main()
    except DaskLogitsError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error
