"""The private parts of transformers that this package uses, each with a test.

transformers 5.23 has a public setter of the attention (``set_attn_implementation``, transformers#38974), but no getter.
"""

from __future__ import annotations

from typing import Any


def attention_of(config: Any) -> str | None:
    """Return the name of the attention that a model with this configuration uses."""
    name: str | None = getattr(config, "_attn_implementation", None)
    return name


def unsplittable(model: Any) -> list[str]:
    """Return the names of the classes whose modules must stay on one device."""
    return list(getattr(model, "_no_split_modules", None) or ())
