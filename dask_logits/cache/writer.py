"""Writer of a cache: one HDF5 file under a temporary name, completeness flag last. ``docs/FORMAT.md`` specifies it.

Contiguous arrays are written by h5py. Compressed chunks bypass its filters. A CRC-32 is stored for each MiB of every
contiguous array and for each chunk.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from dask_logits.cache.chunks import LEVEL, TRAILER_BYTES, compress, whole_chunks, with_trailer
from dask_logits.cache.layout import (
    ALIGNMENT_BYTES,
    CRC_BLOCK_BYTES,
    FORMAT,
    FORMAT_VERSION,
    INDEX,
    ZSTD_FILTER,
    BlockCrc,
)
from dask_logits.cache.profile import Compact, Profile, Stored, entries_of, file_arrays
from dask_logits.cache.sink import Sink
from dask_logits.errors import CacheError
from dask_logits.files.atomic import sync
from dask_logits.records import EVERY_TOKEN, OPTIONAL_TOKEN_ARRAYS, Array

# A reader that does not know them would compute another content digest, ignore a mask, mix up positions, or take the
# segments of a block for documents that were scored apart.
_CRITICAL = (*OPTIONAL_TOKEN_ARRAYS, "block_length")


class CacheWriter:
    """Writes a cache piece by piece under a temporary name.

    Parameters
    ----------
    path
        Temporary name. The caller renames the file once :meth:`finish` has returned.
    profile
        Storage of token arrays.
    n_tokens, n_documents
        Final sizes.
    n_targets
        Positions with targets. None: every token.
    entries
        Final lengths of the token axis and the target axis, each a sum of :func:`entries_of` over all pieces. None:
        those of one piece.
    n_blocks
        Packed blocks. None if documents were not packed.
    """

    def __init__(
        self,
        path: Path,
        *,
        profile: Profile,
        n_tokens: int,
        n_documents: int,
        n_targets: int | None = None,
        entries: tuple[int, int] | None = None,
        n_blocks: int | None = None,
    ) -> None:
        self.path = path
        self.profile = profile
        # A lookup by name costs more than writing a chunk.
        self._datasets: dict[str, h5py.Dataset] = {}
        self._filled: dict[str, int] = {}
        self._crcs: dict[str, BlockCrc] = {}
        # v110, because HDF5 1.14 cannot read the files that libver="latest" writes today.
        self._sink = Sink(path)
        self._file = h5py.File(
            self._sink, "w", libver=("v110", "v110"), alignment_threshold=1, alignment_interval=ALIGNMENT_BYTES
        )
        n_targets = n_tokens if n_targets is None else n_targets
        n_entries, n_target_entries = entries_of(profile, n_tokens, n_targets) if entries is None else entries
        chosen = {"n_targets": n_targets, "n_target_entries": n_target_entries}
        self._sizes = {
            "n_tokens": n_tokens,
            "n_entries": n_entries,
            "n_documents": n_documents,
            **(chosen if profile.extras.has_target_pos else {}),
            "top_k": profile.top_k,
            **({"draws": profile.extras.draws} if profile.extras.draws else {}),
            "vocab_size": profile.vocab_size,
            **({} if n_blocks is None else {"n_blocks": n_blocks}),
        }
        self._chunk_crcs: dict[str, list[int]] = {}
        try:
            self._create_all(file_arrays(profile, (n_entries, n_target_entries), n_documents, n_blocks))
        except BaseException as error:
            # HDF5 crashes at exit if it closes a file after its sink.
            self.__exit__(type(error), error, None)
            raise

    def _create_all(self, arrays: Mapping[str, Stored]) -> None:
        """Create all arrays, and write the tables."""
        for name, stored in arrays.items():
            if stored.chunked:
                self._create_chunked(name, stored.shape)
            else:
                self._create(name, stored.shape, stored.dtype)
            if name in _CRITICAL:
                self._file[name].attrs["critical"] = True
        for name, table in self.profile.tables.items():
            self._create_filled(name, table)

    def _create(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._datasets[name] = self._file.create_dataset(name, shape=shape, dtype=dtype.newbyteorder("<"))
        self._filled[name] = 0
        self._crcs[name] = BlockCrc()

    def _create_filled(self, name: str, array: Array) -> None:
        self._create(name, array.shape, array.dtype)
        self.append(name, array)

    def _create_chunked(self, name: str, shape: tuple[int, ...]) -> None:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((self.profile.alignment, *shape[1:]))
        # Optional, so that HDF5 does not need the plugin to create a dataset that we compress ourselves.
        properties.set_filter(ZSTD_FILTER, h5py.h5z.FLAG_OPTIONAL, (LEVEL,))
        properties.set_fletcher32()
        # No timestamps: the same targets give the same bytes.
        properties.set_obj_track_times(False)
        space = h5py.h5s.create_simple(shape)
        created = h5py.h5d.create(self._file.id, name.encode(), h5py.h5t.STD_U8LE, space, properties)
        self._datasets[name] = h5py.Dataset(created)
        self._filled[name] = 0
        self._chunk_crcs[name] = []

    def append(self, name: str, block: Array) -> None:
        """Write the next entries of one contiguous array."""
        first = self._filled[name]
        dataset = self._datasets[name]
        if block.dtype != dataset.dtype:
            raise CacheError.at(self.path, f"expected {name} as {dataset.dtype}, got {block.dtype}")
        if len(block):
            dataset[first : first + len(block)] = block
        self._sink.check()
        self._filled[name] = first + len(block)
        self._crcs[name].update(block)

    def append_chunks(self, frames: Mapping[str, Sequence[bytes | memoryview]]) -> None:
        """Write the next chunks of all chunked arrays unchanged, those of the same tokens side by side."""
        datasets = {name: self._datasets[name].id for name in frames}
        for parts in zip(*frames.values(), strict=True):
            for name, frame in zip(frames, parts, strict=True):
                data = bytes(frame)
                first = self._filled[name]
                datasets[name].write_direct_chunk((first, 0), with_trailer(data))
                self._filled[name] = first + self.profile.alignment
                self._chunk_crcs[name].append(zlib.crc32(data))
        self._sink.check()

    def append_tokens(self, tokens: Mapping[str, Array]) -> None:
        """Encode and write the next tokens. All but the last targets of a piece fill whole chunks."""
        stored = self.profile.pack(self.profile.encode(tokens))
        frames: dict[str, list[bytes]] = {}
        for name, kind in self.profile.arrays.items():
            if not kind.chunked:
                self.append(name, stored[name])
                continue
            frames[name] = [compress(chunk) for chunk in whole_chunks(stored[name], self.profile.alignment)]
        self.append_chunks(frames)

    def align(self) -> None:
        """Pad contiguous token arrays to the next chunk, where the next piece begins (:func:`entries_of`)."""
        chosen, n_tokens = self.profile.extras.has_target_pos, self._filled["input_ids"]
        for name, kind in self.profile.arrays.items():
            short = -self._filled[name] % self.profile.alignment
            if chosen and name in EVERY_TOKEN:
                short = int(self.profile.alignment > 1)
            if short:
                self.append(name, np.full((short, *kind.shape), n_tokens if name == "target_pos" else 0, kind.dtype))

    def finish(self, attributes: Mapping[str, Any]) -> None:
        """Write the index, checksums and attributes, the completeness flag last, and flush to the disk.

        ``token_crcs`` among the attributes is written as an array.

        Raises
        ------
        CacheError
            If an array was not filled.
        OSError
            If there is no space, also raised by :meth:`append` and :meth:`append_chunks`.
        """
        for name, filled in self._filled.items():
            if filled != len(self._datasets[name]):
                raise CacheError.at(self.path, f"expected {len(self._datasets[name])} entries of {name}, got {filled}")
        if "token_crcs" in attributes:
            self._create_filled("token_crcs", attributes["token_crcs"])
        for name, crcs in self._chunk_crcs.items():
            places: list[Any] = []
            self._datasets[name].id.chunk_iter(places.append)
            places.sort(key=lambda chunk: chunk.chunk_offset)
            columns = ([chunk.byte_offset for chunk in places], [chunk.size - TRAILER_BYTES for chunk in places], crcs)
            for (part, dtype), column in zip(INDEX.items(), columns, strict=True):
                self._create_filled(f"chunks/{name}/{part}", np.asarray(column, dtype))
        for name, crc in self._crcs.items():
            self._file.create_dataset(f"crc32/{name}", data=np.array(crc.values(), np.uint32))
        header = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "profile": self.profile.name,
            **self._sizes,
            "crc32_block_bytes": CRC_BLOCK_BYTES,
            "temperature": 1.0,
            "target_shift": 1,
            "order": f"{'count' if self.profile.extras.draws else 'logprob'} descending, ties by lower id",
        }
        if isinstance(self.profile, Compact):
            header |= {"precision": self.profile.precision, "chunk_tokens": self.profile.alignment}
        for key, value in {**header, **attributes}.items():
            if isinstance(value, np.ndarray):
                continue
            value = json.dumps(value) if isinstance(value, dict | list) else value
            self._file.attrs[key] = _fixed(value) if isinstance(value, str) else value
        self._file.flush()
        self._sink.check()
        self._file.attrs["complete"] = True
        self._file.close()
        self._sink.check()
        sync(self.path)

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        except Exception:
            # HDF5 cannot close a file that an interrupt left half flushed. Keep the interrupt.
            if kind is None:
                raise
        finally:
            self._sink.close()
            if kind is not None:
                self.path.unlink(missing_ok=True)


def _fixed(text: str) -> Array:
    """Return a fixed-length text, because HDF5 2.0 crashes on damaged heaps of variable-length texts."""
    data = text.encode()
    return np.array(data, h5py.string_dtype("utf-8", max(1, len(data))))
