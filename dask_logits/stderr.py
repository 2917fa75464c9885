"""A standard error stream that never blocks: output that its reader does not accept is dropped and counted.

A pipe without a reader, or a terminal stopped with Ctrl-S, blocks every write once it is full. The job would hang,
along with its workers, log and watchdog. Therefore the file descriptor is replaced by a pipe. One thread of this
process reads the pipe and another writes the output. This covers the log, the progress display, other libraries and
the workers, which inherit the descriptor. It costs two threads, and the last lines if the process is killed.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import select
import sys
import threading
from collections.abc import Iterator
from typing import BinaryIO

_STDERR = 2
_CHUNK_BYTES = 4096
# Up to 16 MiB are buffered for a slow reader.
_MOST_CHUNKS = 4096
_FLUSH_SECONDS = 2.0


@contextlib.contextmanager
def unblocked_stderr() -> Iterator[None]:
    """Prevent writes to standard error from blocking or failing.

    If ``sys.stderr`` does not use the file descriptor of standard error, nothing is changed.
    """
    try:
        is_ours = sys.stderr is not None and sys.stderr.fileno() == _STDERR
    except (OSError, ValueError):
        is_ours = False
    if not is_ours:
        yield
        return
    replaced = sys.stderr
    replaced.flush()
    pump = _Pump(os.dup(_STDERR))
    if os.isatty(pump.target):
        sys.stderr = _Terminal(os.fdopen(_STDERR, "wb", buffering=0, closefd=False), pump.target)
    try:
        yield
    finally:
        sys.stderr = replaced
        pump.close()


class _Terminal(io.TextIOWrapper):
    """Terminal text stream that writes through a pipe.

    Parameters
    ----------
    binary
        The pipe.
    terminal
        File descriptor of the terminal, which libraries query for its type and width.
    """

    def __init__(self, binary: BinaryIO, terminal: int) -> None:
        super().__init__(binary, encoding=sys.stderr.encoding, errors=sys.stderr.errors, write_through=True)
        self._terminal = terminal

    def fileno(self) -> int:
        return self._terminal

    def isatty(self) -> bool:
        return True


class _Pump:
    """Forwards output: one thread always reads, another writes when the reader accepts output.

    Parameters
    ----------
    target
        File descriptor to write to, in place of that of standard error, which becomes a pipe.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self._is_lost = False
        self._chunks: queue.Queue[bytes | None] = queue.Queue(_MOST_CHUNKS)
        self._source, sink = os.pipe()
        self._stopped, self._stop = os.pipe()
        os.dup2(sink, _STDERR)
        os.close(sink)
        self._reader = threading.Thread(target=self._read, daemon=True, name="dask_logits-stderr-reader")
        self._writer = threading.Thread(target=self._write, daemon=True, name="dask_logits-stderr-writer")
        self._reader.start()
        self._writer.start()

    def close(self) -> None:
        """Restore standard error. If its reader is gone or does not read, later output is discarded."""
        os.close(self._stop)
        self._reader.join()
        self._writer.join(_FLUSH_SECONDS)
        if self._is_lost or self._writer.is_alive():
            discard = os.open(os.devnull, os.O_WRONLY)
            os.dup2(discard, _STDERR)
            os.close(discard)
        else:
            os.dup2(self.target, _STDERR)
            os.close(self.target)
        os.close(self._source)
        os.close(self._stopped)

    def _read(self) -> None:
        dropped_bytes = n_last = 0
        while n_last < _MOST_CHUNKS:
            ready, _, _ = select.select([self._source, self._stopped], [], [])
            if self._source not in ready:
                break
            # Other processes may still write.
            n_last += self._stopped in ready
            if not (chunk := os.read(self._source, _CHUNK_BYTES)):
                break
            try:
                if dropped_bytes:
                    self._chunks.put_nowait(
                        f"[dask-logits: dropped {dropped_bytes:,} bytes of the log, because nobody read it]\n".encode()
                    )
                    dropped_bytes = 0
                self._chunks.put_nowait(chunk)
            except queue.Full:
                dropped_bytes += len(chunk)
        # The buffer is full: do not wait for the writer.
        with contextlib.suppress(queue.Full):
            self._chunks.put(None, timeout=_FLUSH_SECONDS)

    def _write(self) -> None:
        while (chunk := self._chunks.get()) is not None:
            try:
                while chunk and not self._is_lost:
                    try:
                        chunk = chunk[os.write(self.target, chunk) :]
                    except BlockingIOError:
                        select.select([], [self.target], [])
            except OSError:
                self._is_lost = True
