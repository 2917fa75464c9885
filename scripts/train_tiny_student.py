"""Train a tiny random student from a cache for a few steps and watch its distillation loss fall.

``python scripts/train_tiny_student.py output/quickstart``; a plain loop to start your own from.
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from dask_logits import CachedLogitsDataset, collate, sparse_forward_kl


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", help="teacher_logits.h5, or the run folder it lies in")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256, help="tokens used of each document")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    dataset = CachedLogitsDataset(arguments.cache)
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

    losses: list[float] = []
    while len(losses) < arguments.steps:
        for batch in loader:
            if len(losses) == arguments.steps:
                break
            batch = {name: value[:, : arguments.tokens] for name, value in batch.items() if value.dim() > 1}
            logits = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = sparse_forward_kl(
                logits, batch["topk_ids"], batch["topk_logprobs"], batch["tail_logmass"], batch["target_mask"]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if len(losses) % 5 == 1 or len(losses) == arguments.steps:
                print(f"step {len(losses):3d}  distillation loss {losses[-1]:.3f} nats/token")
    edge = max(1, len(losses) // 4)
    first, last = (sum(part) / edge for part in (losses[:edge], losses[-edge:]))
    print(f"mean of the first {edge} steps {first:.3f}, of the last {edge} {last:.3f}")
    if not last < first:
        raise SystemExit("the distillation loss did not fall")


if __name__ == "__main__":
    main()
