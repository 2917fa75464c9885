"""Load big weights without harm: few processes of a host at a time, with signs of life.

Loading takes minutes from slow storage, while a worker scores no tokens. Each parameter that arrives is a sign of life,
and so is each piece of a download. So a slow load is not mistaken for a hang, and a hanging one still is. A process
that waits for others reports life when weights arrive there. A shared disk serves a few readers faster than many, and
the first one fills the page cache for the others.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from dask_logits.files.lock import slot

# Processes of one user that load on a host at a time.
_LOADS_AT_A_TIME = 2
# Every sign of life is a message to the driver.
_BEAT_SECONDS = 0.5


@contextlib.contextmanager
def loading(on_life: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Wait until this process may load, and report signs of life from then on.

    Yields a function for other signs of life than parameters that arrive.

    Parameters
    ----------
    on_life
        Called at most twice a second whenever weights arrive, in this process or in one for which it waits.
    """
    folder = Path(tempfile.gettempdir()) / f"dask_logits-{os.getuid()}"
    with slot(folder, _LOADS_AT_A_TIME, _seldom(on_life)) as progress:

        def arrived() -> None:
            progress()
            on_life()

        beat = _seldom(arrived)
        with _reported(beat):
            yield beat


def download_bar(beat: Callable[[], None]) -> type:
    """Return a class of progress bars for downloads from the hub, which call a function whenever bytes arrive."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            beat()
            shown: bool | None = super().update(n)
            return shown

    return Bar


def _seldom(on_life: Callable[[], None]) -> Callable[[], None]:
    last = float("-inf")

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last >= _BEAT_SECONDS:
            last = time.monotonic()
            on_life()

    return beat


@contextlib.contextmanager
def _reported(beat: Callable[[], None]) -> Iterator[None]:
    """Call a function whenever transformers' progress bar advances, which it does with every parameter."""
    from transformers.utils.logging import set_tqdm_hook

    def start(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return factory(*(_watched(args[0], beat), *args[1:]) if args else (), **kwargs)

    before = set_tqdm_hook(start)
    try:
        yield
    finally:
        set_tqdm_hook(before)


def _watched(values: Iterable[Any], beat: Callable[[], None]) -> Iterator[Any]:
    for value in values:
        beat()
        yield value
