"""Bounded read-ahead of a stream in a background thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator

from dask_logits.data.source import Planned

# Maximum read-ahead in bytes of spooled rows, regardless of the number of documents.
_SPOOL_BYTES = 2 << 30
_STOP_SECONDS = 5.0


class ReadAhead:
    """Draws planned partitions in a thread.

    Parameters
    ----------
    planned
        Iterator to draw from, used only by the thread.
    documents
        Maximum number of waiting rows. None: nothing is spooled, and one waiting partition is enough.
    """

    def __init__(self, planned: Iterator[Planned], documents: int | None) -> None:
        self._planned = planned
        self._documents = documents
        self._ready: deque[Planned] = deque()
        self._unsettled: dict[int, Planned] = {}
        self._error: BaseException | None = None
        self._drained = self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._draw, name="read-ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Planned | None]:
        """Yield partitions, or None while none is ready.

        Raises
        ------
        BaseException
            Any error of reading, after all earlier partitions were yielded.
        """
        while True:
            with self._changed:
                if not self._ready and self._drained:
                    if self._error is not None:
                        raise self._error
                    return
                planned = self._ready.popleft() if self._ready else None
                self._changed.notify()
            yield planned

    def settle(self, index: int) -> None:
        """Record that a partition was committed or has failed, so that another may be drawn."""
        with self._changed:
            self._unsettled.pop(index, None)
            self._changed.notify()

    def stop(self) -> None:
        """End the thread. A read that hangs is left until the process ends."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join(_STOP_SECONDS)

    def _room(self) -> bool:
        if not self._ready:
            return True
        rows = sum(planned.partition.n_rows for planned in self._ready)
        size = sum(planned.n_bytes for planned in self._unsettled.values())
        return self._documents is not None and rows <= self._documents and size <= _SPOOL_BYTES

    def _draw(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped or self._room())
                    if self._stopped:
                        return
                planned = next(self._planned, None)
                with self._changed:
                    if planned is None:
                        return
                    self._unsettled[planned.partition.index] = planned
                    self._ready.append(planned)
        # Raised in the driver's thread.
        except BaseException as error:  # noqa: BLE001
            self._error = error
        finally:
            with self._changed:
                self._drained = True
