"""No operation of scoring makes the host wait for the device, which on CUDA leaves the device idle between batches."""

from __future__ import annotations

import traceback

import numpy as np
import pytest
import torch
from builders import FAMILIES, VOCAB_SIZE, compact, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from dask_logits.data.items import plain_items
from dask_logits.teacher.model import ScoringPath, Teacher
from dask_logits.teacher.scoring import ScoringSettings, start_scoring
from dask_logits.worker.encoder import encoder_for

# Operations whose result, or its shape, the host must know.
WAITS = {
    f"aten.{name}"
    for name in (
        "_local_scalar_dense.default", "_unique2.default", "equal.default", "is_nonzero.default",
        "masked_select.default", "nonzero.default", "unique_consecutive.default", "unique_dim.default",
    )
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Notes the operations that would wait, with the place in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        picks = name.startswith(("aten.index.", "aten.index_put"))
        by_mask = picks and any(index is not None and index.dtype == torch.bool for index in args[1])
        repeats = name == "aten.repeat_interleave.Tensor" and not (kwargs or {}).get("output_size")
        if name in WAITS or by_mask or repeats:
            frames = [frame for frame in traceback.extract_stack() if "torch" not in frame.filename.split("/")]
            self.found.append(f"{name} in {frames[-2].filename}:{frames[-2].lineno}")
        return func(*args, **(kwargs or {}))


def waits(family: str) -> list[str]:
    """Score four documents in two batches, and return what waits."""
    path = ScoringPath(head="linear")
    settings = ScoringSettings(
        top_k=8, vocab_size=VOCAB_SIZE, batch_tokens=60, batch_size=None, head_rows=16, path=path
    )  # fmt: skip
    draw = np.random.default_rng(0)
    texts = [draw.integers(0, VOCAB_SIZE, n).astype(np.int32) for n in (30, 20, 10, 5)]
    teacher = Teacher(tiny_model(family), VOCAB_SIZE)
    encode = encoder_for(compact(8, VOCAB_SIZE), teacher.device)
    with Waits() as mode:
        scored = start_scoring(teacher, plain_items(texts), settings, encode=encode)()
    assert "topk_gaps_b0" in scored.encoded
    return mode.found


@pytest.mark.parametrize("family", FAMILIES)
def test_scoring_does_not_wait(family) -> None:
    assert waits(family) == []


def test_what_waits_is_noticed() -> None:
    mask = torch.tensor([True, False])
    with Waits() as mode:
        _ = bool(mask.any()), mask.nonzero(), torch.ones(2)[mask], torch.ones(2).repeat_interleave(torch.ones(2).long())
    assert len(mode.found) == 4
    teacher = Teacher(tiny_model("llama"), VOCAB_SIZE)
    with Waits() as mode, torch.inference_mode():
        teacher.logits_forward(torch.ones(1, 4, dtype=torch.int64))
    assert "masking_utils.py" in mode.found[0]
