"""The private part of torch that the training side uses, with a test."""

from __future__ import annotations

from collections.abc import Callable

# torch 2.13 documents this table as the way to register a type in default_collate, but exports it nowhere else
# (PyTorch 97498).
from torch.utils.data._utils.collate import default_collate_fn_map


def register_collate(kind: type, collate: Callable[..., object]) -> None:
    """Have torch's default ``collate_fn`` call a function for items of a type.

    Parameters
    ----------
    kind
        The type.
    collate
        Takes the items.
    """
    default_collate_fn_map[kind] = lambda items, *, collate_fn_map: collate(items)
