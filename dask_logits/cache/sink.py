"""A file object for h5py that records write errors instead of raising them inside HDF5.

After a failed write, HDF5 2.0 cannot close the file, and closing another one later crashes the process. Therefore the
first error is stored for the caller to raise, and later writes are discarded. An interrupt is stored, too, because h5py
3.16 may raise an AttributeError in its place. This costs a Python call for each write, which is a chunk or a block of
an array.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any


class Sink(io.RawIOBase):
    """A new file with random read and write access.

    Parameters
    ----------
    path
        Path of the file. An older file is replaced.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._place = self._end = 0
        self._error: OSError | KeyboardInterrupt | None = None

    def check(self) -> None:
        """Raise the first write error or interrupt.

        Raises
        ------
        OSError
            With the system's error number and the path.
        """
        if isinstance(self._error, OSError):
            raise OSError(self._error.errno, self._error.strerror, str(self.path))
        if self._error is not None:
            raise KeyboardInterrupt

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position."""
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._end}[whence]
        return self._place

    def tell(self) -> int:
        """Return the position."""
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Read available bytes."""
        view = memoryview(buffer).cast("B")
        data = os.pread(self._handle, len(view), self._place)
        view[: len(data)] = data
        self._place += len(data)
        return len(data)

    def write(self, data: Any) -> int:
        """Write the data unless an earlier write failed. Report success in any case."""
        rest, place = memoryview(data).cast("B"), self._place
        size = len(rest)
        self._place += size
        self._end = max(self._end, self._place)
        try:
            while len(rest) and self._error is None:
                n = os.pwrite(self._handle, rest, place)
                rest, place = rest[n:], place + n
        except (OSError, KeyboardInterrupt) as error:
            self._error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        """Resize the file."""
        self._end = self._place if size is None else size
        try:
            if self._error is None:
                os.ftruncate(self._handle, self._end)
        except (OSError, KeyboardInterrupt) as error:
            self._error = error
        return self._end

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            os.close(self._handle)
        super().close()
