"""Looks at the heaps of an HDF5 file before HDF5 does.

HDF5 keeps texts of variable length in heaps (signature ``GCOL``), each a row of objects with their sizes, and its
release 2.0 goes round for ever where a size is 0 or wraps around. Our writer makes no heap, so only a file that says it
has one is read through for them, once, at the disk's speed.
"""

from __future__ import annotations

import mmap
from pathlib import Path

_SIGNATURE = b"GCOL"
_VERSION = 1
# Of a heap, and of an object in it; sizes are 8 bytes, at the end of both.
_HEADER_BYTES = 16
_SIZE_BYTES = 8


def broken_heap(path: Path) -> int | None:
    """Return where a heap begins that HDF5 may not come back from; None if there is none.

    Parameters
    ----------
    path
        An HDF5 file whose sizes take 8 bytes.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(_SIGNATURE)
        while at >= 0:
            if _is_broken(data, at):
                return at
            at = data.find(_SIGNATURE, at + 1)
    return None


def _is_broken(data: mmap.mmap, at: int) -> bool:
    """Whether the objects of a heap do not lie one behind the other, inside it.

    Object 0 is what is free, its own header included; others are followed by room up to a multiple of 8 bytes.
    """
    end = at + _number(data, at + _HEADER_BYTES - _SIZE_BYTES)
    if data[at + 4 : at + 5] != bytes([_VERSION]) or end > len(data):
        # Other bytes that look like a heap's; or HDF5 refuses it.
        return False
    place = at + _HEADER_BYTES
    while place + _HEADER_BYTES <= end:
        size = _number(data, place + _HEADER_BYTES - _SIZE_BYTES)
        is_free = data[place : place + 2] == b"\0\0"
        takes = size if is_free else _HEADER_BYTES + -(-size // 8) * 8
        if not 0 < takes <= end - place:
            return True
        place += takes
    return False


def _number(data: mmap.mmap, at: int) -> int:
    return int.from_bytes(data[at : at + _SIZE_BYTES], "little")
