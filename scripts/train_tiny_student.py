"""Train a tiny random student from a cache for a few steps, and show its distillation loss before and after.

``python scripts/train_tiny_student.py output/quickstart``; a plain loop to start your own from.
"""

from __future__ import annotations

import argparse
from itertools import chain, islice, repeat
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from dask_logits import CachedLogitsDataset, collate, distillation_loss


def loss_of(student: LlamaForCausalLM, batch: dict[str, Any]) -> torch.Tensor:
    """Return the distillation loss of a batch, in nats per token."""
    logits = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return distillation_loss(logits, batch["targets"], input_ids=batch["input_ids"]).loss


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", help="teacher_logits.h5, or the run folder it lies in")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256, help="tokens used of each document")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    dataset = CachedLogitsDataset(arguments.cache, max_tokens=arguments.tokens)
    print(dataset)
    student = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=dataset.vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=arguments.tokens,
        )
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    loader = DataLoader(dataset, arguments.batch_size, shuffle=True, collate_fn=collate)
    # The same documents before and after. Hold them out of the training in a loop of your own.
    sample = collate([dataset[i] for i in range(min(4, len(dataset)))])

    with torch.no_grad():
        before = loss_of(student, sample).item()
    epochs = chain.from_iterable(repeat(loader))
    for step, batch in enumerate(islice(epochs, arguments.steps), start=1):
        loss = loss_of(student, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0 or step in (1, arguments.steps):
            print(f"step {step:3d} of {arguments.steps}: {loss.item():.3f} nats per token", flush=True)
    with torch.no_grad():
        after = loss_of(student, sample).item()
    print(f"distillation loss on the first {len(sample['row'])} documents: {before:.3f} before, {after:.3f} after")
    if not after < before:
        raise SystemExit("the distillation loss did not fall")


if __name__ == "__main__":
    main()
