"""The private parts of transformers that this package uses, each with a test.

transformers 5.23 has a public setter of the attention (``set_attn_implementation``, transformers#38974), but no getter.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

# Held while a thread enters or leaves `one_sequence_per_row`, and the function that it replaces, for each one inside.
_ENTERING = threading.Lock()
_examine: list[Callable[[Any], Any]] = []


def attention_of(config: Any) -> str | None:
    """Return the name of the attention that a model with this configuration uses."""
    name: str | None = getattr(config, "_attn_implementation", None)
    return name


def unsplittable(model: Any) -> list[str]:
    """Return the names of the classes whose modules must stay on one device."""
    return list(getattr(model, "_no_split_modules", None) or ())


def kept_in_float32(model: Any, *, is_half: bool) -> set[str]:
    """Return parts of the names of parameters that a family keeps in float32, more of them with float16."""
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return names | set(getattr(model, "_keep_in_fp32_modules", None) or ()) if is_half else names


def repeat_grouped_heads() -> None:
    """Have the keys and values of grouped heads repeated before attention, in this process.

    transformers 5.23 leaves that to torch, which has a kernel for grouped heads in flash attention and cuDNN only.
    Otherwise torch 2.13 computes the scores of all pairs of positions at one time (PyTorch 191085).
    """
    from transformers.integrations import sdpa_attention

    # transformers 5.10 gives it no values.
    sdpa_attention.use_gqa_in_sdpa = lambda *given: False


@contextlib.contextmanager
def one_sequence_per_row() -> Iterator[None]:
    """Have no batch examined for several sequences packed into a row.

    transformers 5.23 examines the positions on the device before it makes a mask, once for each kind of layer. On CUDA
    the host then waits until the device has done all earlier work, and the device until the host has sent the next.

    The last thread to leave restores transformers' own function, so threads may enter and leave in any order.
    """
    from transformers import masking_utils

    with _ENTERING:
        _examine.append(_examine[0] if _examine else masking_utils.find_packed_sequence_indices)
        masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        with _ENTERING:
            own = _examine.pop()
            if not _examine:
                masking_utils.find_packed_sequence_indices = own
