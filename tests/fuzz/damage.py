"""Damages files in ways that are drawn: their bytes, the fields of their JSON, the arrays and attributes of their HDF5.

Checksums are made to fit again at times, because somebody who means harm would do that, too.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dask_logits.cache.layout import BlockCrc

# A whole number from 0, below what is given.
Pick = Callable[[int], int]

NESTED: Any = 1
for _ in range(250):
    NESTED = [NESTED]
HOSTILE: list[Any] = [
    0, 1, -1, 2**16, 2**31 - 1, 2**31, 2**32, 2**48 - 1, 2**48, 2**62, 2**63, 2**64 - 1, 2**64, 10**400, -(2**63), 0.5,
    1e308, float("nan"), float("inf"), "", "a", "..", "../..", "/", "/dev/zero", "a/../../b", "\0", "é" * 300,
    "0" * 64, None, True, False, [], {}, [[]], [1, 2], NESTED, {"a": {}}, "[" * 2000, "{\"a\":", "1e400",
]  # fmt: skip
# What h5py, numpy and json say of a step that the steps before it made impossible.
_CANNOT = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    RuntimeError,
    OverflowError,
    AttributeError,
    MemoryError,
    Warning,
)
# Larger arrays are claims.
_MOST_BYTES = 1 << 20
_SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (2**20,), (2**40,), (2**30, 2**30), (4, 2), (3, 3, 3)]
_TYPES = ["u1", "<u2", "<u4", "<u8", "<i8", "<f2", "<f4", "<f8", "S5", h5py.string_dtype()]


def damage(bases: list[Path], folder: Path, pick: Pick) -> None:
    """Copy one of some folders, and damage one to four places of its files."""
    shutil.copytree(bases[pick(len(bases))], folder)
    for _ in range(1 + pick(4)):
        # A step that cannot be done, because of the steps before it, is left out.
        with contextlib.suppress(*_CANNOT):
            _step(folder, pick)


def _step(folder: Path, pick: Pick) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = files[pick(len(files))]
    how = pick(4)
    if how and path.suffix == ".json":
        _json(path, pick)
    elif how and path.suffix == ".h5":
        _hdf5(path, pick)
    else:
        _bytes(path, pick)
    if pick(2):
        reseal(folder)


def _bytes(path: Path, pick: Pick) -> None:
    data = bytearray(path.read_bytes())
    at = pick(len(data) + 1)
    match pick(5):
        case 0:
            data[at : at + 1] = bytes([pick(256)])
        case 1:
            data[at : at + 8] = (pick(1 << 16) if pick(2) else 2 ** pick(64)).to_bytes(8, "little")
        case 2:
            del data[at:]
        case 3:
            data[at:at] = bytes([pick(256)]) * (1 + pick(64))
        case _:
            length = 1 + pick(256)
            to = pick(len(data) + 1)
            data[at : at + length] = data[to : to + length]
    path.write_bytes(data)


def _json(path: Path, pick: Pick) -> None:
    value = json.loads(path.read_text())
    places: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        at = waiting.pop(0)
        found = list(at.items() if isinstance(at, dict) else enumerate(at))
        places += [(at, key) for key, _ in found]
        waiting += [inner for _, inner in found if isinstance(inner, dict | list)]
    if not places:
        return
    at, key = places[pick(len(places))]
    match pick(6):
        case 0:
            del at[key]
        case 1:
            at[key] = pick(1 << 16)
        case 2:
            other, other_key = places[pick(len(places))]
            at[key] = other[other_key]
        case _:
            at[key] = HOSTILE[pick(len(HOSTILE))]
    path.write_text(json.dumps(value))


def _hdf5(path: Path, pick: Pick) -> None:
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        name = sorted(names)[pick(len(names))]
        match pick(7):
            case 0 | 1:
                attribute = sorted(file.attrs)[pick(len(file.attrs))]
                value = HOSTILE[pick(len(HOSTILE))] if pick(2) else pick(1 << 16)
                text = json.dumps(value) if isinstance(value, list | dict) else value
                file.attrs[attribute] = np.bytes_(text.encode()) if isinstance(text, str) and pick(4) else text
            case 2:
                del file.attrs[sorted(file.attrs)[pick(len(file.attrs))]]
            case 3 | 4:
                _element(file, name, pick)
            case 5:
                del file[name]
                shape = _SHAPES[pick(len(_SHAPES))]
                more = {"chunks": True, "compression": "gzip"} if pick(2) and shape else {}
                file.create_dataset(name, shape, _TYPES[pick(len(_TYPES))], **more)
            case _:
                del file[name]
                links = [h5py.SoftLink("/" + name), h5py.ExternalLink("../outside.h5", name), file["/"], None]
                link = links[pick(len(links))]
                if link is not None:
                    file[name] = link


def _element(file: h5py.File, name: str, pick: Pick) -> None:
    array = file[name]
    if array.nbytes > _MOST_BYTES:
        return
    if array.chunks is None:
        values = array[...].reshape(-1)
        raw = (2 ** pick(64) - pick(2) if pick(2) else pick(1 << 16)).to_bytes(8, "little")
        values[pick(len(values))] = np.frombuffer(raw[: values.itemsize], values.dtype)[0]
        array[...] = values.reshape(array.shape)
        return
    chunk = (pick(-(-array.shape[0] // array.chunks[0])) * array.chunks[0], 0)
    data = bytearray(array.id.read_direct_chunk(chunk)[1])
    data[pick(len(data))] = pick(256)
    array.id.write_direct_chunk(chunk, bytes(data))


def reseal(folder: Path) -> None:
    """Make checksums fit again: of caches, and of partitions in receipts."""
    for path in sorted(folder.rglob("*.h5")):
        with contextlib.suppress(*_CANNOT), h5py.File(path, "r+") as file:
            for name in _sums(file["crc32"]):
                if max(file[name].nbytes, file["crc32"][name].nbytes) <= _MOST_BYTES:
                    crc = BlockCrc()
                    crc.update(file[name][...])
                    file[f"crc32/{name}"][...] = crc.values()
    for path in sorted(folder.rglob("receipts/*/*.json")):
        with contextlib.suppress(*_CANNOT):
            receipt = json.loads(path.read_text())
            attempt = folder / "partitions" / receipt["attempt"]
            for name in receipt["files"]:
                data = (attempt / name).read_bytes()
                receipt["files"][name] = [len(data), zlib.crc32(data)]
            path.write_text(json.dumps(receipt))


def _sums(group: h5py.Group) -> list[str]:
    names: list[str] = []
    group.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return names
