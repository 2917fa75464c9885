"""What datasets over several caches ask of them.

Dimension letters: S sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_logits.errors import ConfigError

# Those that change what the items are, in the order of digests.
OPTIONS = ("top_k", "window", "max_tokens", "student_vocab_size")


def check_sources(sources: Mapping[str, Any], kinds: tuple[type[Any], ...], *shared: str) -> None:
    """Refuse sources whose items cannot be in one batch, or whose ids mean other tokens.

    Parameters
    ----------
    sources
        Name → opened cache.
    kinds
        Classes that they may have.
    shared
        Attributes of the datasets that must be equal.

    Raises
    ------
    ConfigError
        Naming two sources that differ.
    """
    if not sources:
        raise ConfigError("sources: expected at least one cache, got none")
    for name, source in sources.items():
        if not isinstance(source, kinds):
            raise ConfigError(f"sources: expected opened caches, got {type(source).__name__} for {name!r}")
        if not len(source):
            raise ConfigError(f"sources: expected caches with items, got none in {name!r}")
    first_name, first = next(iter(sources.items()))
    for name, source in sources.items():
        for what in shared:
            ours, theirs = getattr(first, what), getattr(source, what)
            if ours != theirs:
                cure = f"open them with the same {what}" if what in (*OPTIONS, "decode") else "mix caches that agree"
                raise ConfigError(
                    f"sources: expected the same {what}, got {ours} in {first_name!r} and {theirs} in {name!r}; {cure}"
                )
        maps = [one.attributes.get("tokenizer_map_digest") for one in (first, source)]
        if all(maps) and maps[0] != maps[1]:
            raise ConfigError(
                f"sources: expected teachers with one tokenizer, got others in {first_name!r} and {name!r}: an "
                "id would mean two tokens"
            )


def shares(weights: Mapping[str, float], sources: Mapping[str, object]) -> npt.NDArray[np.float64]:
    """Scale the weights of the sources so that they sum to one.

    Raises
    ------
    ConfigError
        If a source has no weight, or a weight is not a positive number.
    """
    if weights.keys() != sources.keys():
        raise ConfigError(f"weights: expected one for each of {sorted(sources)}, got {sorted(weights)}")
    wrong = {name: weight for name, weight in weights.items() if not 0 < weight < float("inf")}
    if wrong:
        raise ConfigError(f"weights: expected positive numbers, got {wrong}")
    weight_S = np.array([weights[name] for name in sources], np.float64)
    return np.asarray(weight_S / weight_S.sum())
