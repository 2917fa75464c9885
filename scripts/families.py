"""Write docs/FAMILIES.md: the path that the self-check takes for each family, and how exact it is."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from families import FAMILIES, LENGTHS, measure  # noqa: E402

HEADER = """# Families

The scoring path that the self-check takes for {count} families of transformers {version}, on a CPU. Each is a tiny
random model with what is special about its family switched on: soft caps, logit factors, sinks, biases, experts, and
windows, chunks and `index_topk` of 16 tokens. Documents of {lengths} tokens are scored in one padded batch and
compared with the model's own forward of each document alone.

- **Path**: attention (`blocks`, or the `model`'s own) and head (`linear` with its factor and soft cap, `replay` of the
  family's code, or the whole `forward`).
- **float32**: largest difference of any log-prob, in nats.
- **bfloat16**: RMS distance from the forward in float32, divided by that of the model's own forward in bfloat16. At a
  ratio of 1 the path is as exact as the model itself. Ratios beyond 1.2 belong to mixtures of experts, where rounding
  decides which expert is chosen and a few tokens move the figure.
- **Refused**: why a faster way is not taken. The model's own code is used instead, which is slower and as exact.

`python scripts/families.py` writes this page; `tests/teacher/test_families.py` checks it.

| family | path | float32 | bfloat16 | refused |
|---|---|---|---|---|
"""


def main() -> None:
    """Measure every family and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="families to measure; none: all, and write the page")
    names = parser.parse_args().families
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = [row(family) for family in names or FAMILIES]
    if not names:
        header = HEADER.format(count=len(rows), version=transformers.__version__, lengths=", ".join(map(str, LENGTHS)))
        (ROOT / "docs" / "FAMILIES.md").write_text(header + "\n".join(rows) + "\n")


def row(family: str) -> str:
    """Return a line of the table."""
    exact, half = (measure(family, dtype) for dtype in (torch.float32, torch.bfloat16))
    paths = exact.path if exact.path == half.path else f"{exact.path}; in bfloat16 {half.path}"
    refusals = "; ".join(f"{way}: {reason}" for way, reason in {**exact.refusals, **half.refusals}.items())
    line = f"| {family} | {paths} | {exact.largest:.1e} | {half.ratio:.2f} | {refusals} |"
    print(line, flush=True)
    return line


if __name__ == "__main__":
    main()
