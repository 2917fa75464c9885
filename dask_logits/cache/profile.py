"""Storage profiles of token arrays: *plain*, or *compact* as byte planes. ``docs/FORMAT.md`` specifies both.

Compact takes about 124 instead of 270 bytes per token at K = 64:

* **ids**: ``rank = id_rank[id]``, ordered by frequency among the top-k of the calibration, so that the upper byte of
  most ranks is 0. The rank bytes of a chunk are separate planes, because two planes in one zstd block would share one
  code table. The lowest plane does not compress and is stored uncompressed.
* **log-probs**: the most probable entry as float16. The others are gaps below it, rounded on a scale that is fine for
  small gaps and coarse for large ones (``code = round(c · log1p(gap))``, companding as in ITU-T G.711). They are stored
  as differences along the row, which are small and never negative. The table from codes to gaps is stored as data.
  Codes are found by comparison with bounds, so that every device computes the same ones.
* ``logsumexp``, ``label_logprob`` and the tails as float16, the precision of plain log-probs.

Draws have counts in place of log-probs, and all of their planes are compressed, without the absent entries
(:mod:`dask_logits.cache.packed`): 36 bytes per token at 50 draws, of which 17 are distinct.

Dimension letters: N positions, K kept entries, V vocabulary, J temperatures.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from dask_logits.cache.layout import BLOCKS, DOCUMENTS, round_up
from dask_logits.cache.packed import COUNTS, pack, unpack
from dask_logits.errors import CacheError
from dask_logits.files.atomic import create_bytes
from dask_logits.records import ALL_TOKEN_ARRAYS, EVERY_TOKEN, NO_EXTRAS, Array, Extras, Records, id_dtype, schema

Precision = Literal[8, 10, 12]
PRECISIONS: tuple[Precision, ...] = (8, 10, 12)
# Approximate size of a plane's chunk. Larger ones gain nothing and make readers of short documents decode neighbours.
_CHUNK_BYTES = 32 << 10
_MOST_CHUNK_BYTES = 1 << 20
# Larger gaps are clipped: a kept entry e^-32 times as probable as the first is irrelevant.
_RANGE_NATS = 32.0
# Tokens encoded or decoded at a time, so that intermediate arrays fit into a core's cache.
_BLOCK_TOKENS = 1024
# Upper bound for an array of one dimension.
_NPY_HEADER_BYTES = 4096
_HALVED = tuple(name for name, array in ALL_TOKEN_ARRAYS.items() if array.compact == "half")
# Of them, the input ids come first in a file and are always there.
_UNCHANGED = tuple(name for name, array in ALL_TOKEN_ARRAYS.items() if array.compact == "unchanged")


@dataclass(frozen=True)
class Stored:
    """One stored array.

    Parameters
    ----------
    dtype, shape
        Dtype and shape of an entry.
    chunked
        Stored in chunks of the profile's ``alignment`` entries, compressed by zstd. Otherwise contiguous.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...] = ()
    chunked: bool = False


def _half(array: Array) -> Array:
    return array.astype(np.float16)


@dataclass(frozen=True, kw_only=True)
class Plain:
    """Logical arrays, stored unchanged.

    Parameters
    ----------
    top_k, vocab_size
        Sizes of the records.
    extras
        Their optional arrays.
    """

    top_k: int
    vocab_size: int
    extras: Extras = NO_EXTRAS
    name: ClassVar[Literal["plain"]] = "plain"
    alignment: ClassVar[int] = 1

    def equals(self, other: Profile) -> bool:
        """Whether another profile decodes the stored arrays to the same values."""
        return self == other

    @cached_property
    def arrays(self) -> dict[str, Stored]:
        """Name → storage of each array of the token axis."""
        entries = schema(self.top_k, self.vocab_size, self.extras)
        return {name: Stored(*entries[name]) for name in self.extras.token_arrays}

    @property
    def tables(self) -> dict[str, Array]:
        """Name → array needed for decoding."""
        return _temperatures(self.extras)

    def encode(self, tokens: Mapping[str, Array]) -> dict[str, Array]:
        """Encode logical arrays into stored ones, which are written as they are."""
        return dict(tokens)

    pack = unpack = encode

    def decode(self, stored: Mapping[str, Array], half: Callable[[Array], Array] | None = None) -> dict[str, Array]:
        """Decode stored arrays into logical ones."""
        return dict(stored)


@dataclass(frozen=True, kw_only=True, eq=False)
class Compact:
    """Byte planes of ranks and companded gaps.

    Parameters
    ----------
    top_k, vocab_size
        Sizes of the records.
    extras
        Their optional arrays.
    precision
        Bits of a gap's code.
    id_table
        [V], ids by falling frequency. It is a permutation, so every id can be represented.
    gap_table
        [2^precision] float32, gap in nats of each code. None: the table of this version.
    chunk_tokens
        Tokens of a chunk. None: about 32 KiB of each plane.

    Raises
    ------
    ValueError
        If the id table is not a permutation, or a chunk is empty or larger than 1 MiB.
    """

    top_k: int
    vocab_size: int
    precision: Precision
    id_table: Array
    extras: Extras = NO_EXTRAS
    gap_table: Array | None = None
    chunk_tokens: int | None = None
    name: ClassVar[Literal["compact"]] = "compact"

    def __post_init__(self) -> None:
        if not np.array_equal(np.sort(self.id_table), np.arange(self.vocab_size)):
            raise ValueError(f"id_table: expected every id below {self.vocab_size} once, got {self.id_table.shape}")
        if not 0 < self.alignment * self.top_k <= _MOST_CHUNK_BYTES:
            raise ValueError(f"chunk_tokens: expected chunks of at most 1 MiB, got {self.alignment} tokens")

    def equals(self, other: Profile) -> bool:
        """Whether another profile decodes the stored arrays to the same values."""
        return (
            isinstance(other, Compact)
            and (self.top_k, self.vocab_size, self.precision) == (other.top_k, other.vocab_size, other.precision)
            and (self.extras, self.alignment) == (other.extras, other.alignment)
            and self.tables_digest == other.tables_digest
        )

    @cached_property
    def tables_digest(self) -> str:
        """SHA-256 of the tables that decode the codes."""
        tables = (self.id_table.astype("<u4"), self.gaps.astype("<f4"))
        return hashlib.sha256(b"".join(table.tobytes() for table in tables)).hexdigest()

    @property
    def alignment(self) -> int:
        """Tokens of a chunk. Every partition starts at a chunk boundary."""
        return self.alignment_for(self.top_k) if self.chunk_tokens is None else self.chunk_tokens

    @staticmethod
    def alignment_for(top_k: int) -> int:
        """Number of tokens whose planes take about 32 KiB each, a power of two."""
        least = 3 if top_k << 3 <= _MOST_CHUNK_BYTES else 0
        return 1 << max(least, min(12, (_CHUNK_BYTES // top_k).bit_length() - 1))

    @cached_property
    def id_rank(self) -> Array:
        """[V] uint32, position of each id in the table."""
        rank = np.empty(self.vocab_size, np.uint32)
        rank[self.id_table] = np.arange(self.vocab_size, dtype=np.uint32)
        return rank

    @cached_property
    def gaps(self) -> Array:
        """[2^precision] float32, gap in nats of each code. The last code means probability 0."""
        return gaps_of(self.precision) if self.gap_table is None else self.gap_table.astype(np.float32)

    @property
    def n_id_planes(self) -> int:
        """Number of bytes of a rank."""
        return max(1, -(-(self.vocab_size - 1).bit_length() // 8))

    @property
    def n_gap_planes(self) -> int:
        """Number of bytes of a code."""
        return 1 if self.precision == 8 else 2

    @cached_property
    def arrays(self) -> dict[str, Stored]:
        """Name → storage of each array of the token axis."""
        byte, f16 = np.dtype(np.uint8), np.dtype(np.float16)
        entries = schema(self.top_k, self.vocab_size, self.extras)
        chunked = Stored(byte, (self.top_k,), chunked=True)
        if self.extras.draws:
            of_entries = dict.fromkeys(self._planes, chunked)
        else:
            of_entries = {
                "topk_ids_b0": Stored(byte, (self.top_k,)),
                **{f"topk_ids_b{i}": chunked for i in range(1, self.n_id_planes)},
                **{f"topk_gaps_b{i}": chunked for i in range(self.n_gap_planes)},
                "top1_logprob": Stored(f16),
            }
        return {
            "input_ids": Stored(id_dtype(self.vocab_size)),
            **of_entries,
            **{name: Stored(f16, entries[name][1]) for name in self._names(_HALVED)},
            **{name: Stored(*entries[name]) for name in self._names(_UNCHANGED[1:])},
        }

    @property
    def _planes(self) -> list[str]:
        """Names of the arrays that are packed."""
        return [*(f"topk_ids_b{i}" for i in range(self.n_id_planes)), COUNTS] if self.extras.draws else []

    def pack(self, stored: Mapping[str, Array]) -> dict[str, Array]:
        """Return encoded arrays, from the first of a chunk, in the form that is written."""
        if not self.extras.draws:
            return dict(stored)
        return {**stored, **pack({name: stored[name] for name in self._planes}, self.alignment)}

    def unpack(self, stored: Mapping[str, Array]) -> dict[str, Array]:
        """Return arrays as encoded from those that are written.

        Raises
        ------
        ValueError
            If the counts are not those of positions.
        """
        if not self.extras.draws:
            return dict(stored)
        planes = {name: stored[name] for name in self._planes}
        return {**stored, **unpack(planes, self.alignment, self.extras.draws)}

    def _names(self, names: tuple[str, ...]) -> list[str]:
        """Return those of some arrays that are there."""
        return [name for name in names if name in self.extras.token_arrays]

    @property
    def tables(self) -> dict[str, Array]:
        """Name → array needed for decoding."""
        return {"id_table": self.id_table.astype(np.uint32), "gap_table": self.gaps, **_temperatures(self.extras)}

    def encode(self, tokens: Mapping[str, Array], planes: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Encode logical arrays into stored ones.

        Parameters
        ----------
        tokens
            Logical arrays.
        planes
            Planes of the ids and gaps, if a device has computed them (:mod:`dask_logits.worker.encoder`).
        """
        return {
            **(self._encoded_entries(tokens) if planes is None else planes),
            **({COUNTS: tokens[COUNTS]} if self.extras.draws else {}),
            **({} if self.extras.draws else {"top1_logprob": _half(tokens["topk_logprobs"][:, 0])}),
            **{name: _half(tokens[name]) for name in self._names(_HALVED)},
            **{name: tokens[name] for name in self._names(_UNCHANGED)},
        }

    def _encoded_entries(self, tokens: Mapping[str, Array]) -> dict[str, Array]:
        rank_NK = np.take(self.id_rank, tokens["topk_ids"])
        if self.extras.draws:
            return _byte_planes("topk_ids", np.where(tokens[COUNTS] > 0, rank_NK, 0), self.n_id_planes)
        logprobs_NK = tokens["topk_logprobs"].astype(np.float32)
        gap_NK = logprobs_NK[:, :1] - logprobs_NK
        code_NK = np.searchsorted(code_bounds(self.precision), gap_NK, side="right").astype(np.uint16)
        step_NK = np.diff(code_NK, axis=1, prepend=np.zeros((len(code_NK), 1), np.uint16))
        return _byte_planes("topk_ids", rank_NK, self.n_id_planes) | _byte_planes(
            "topk_gaps", step_NK, self.n_gap_planes
        )

    def decode(self, stored: Mapping[str, Array], half: Callable[[Array], Array] = _half) -> dict[str, Array]:
        """Decode stored arrays into logical ones.

        Parameters
        ----------
        stored
            Stored arrays.
        half
            Converts float32 to float16. numpy's conversion takes a quarter of the total decoding time.
        """
        ids_NK = self._ids(stored)
        if self.extras.draws:
            of_entries = {"topk_ids": np.where(stored[COUNTS] > 0, ids_NK, 0).astype(ids_NK.dtype),
                          COUNTS: stored[COUNTS]}  # fmt: skip
        else:
            of_entries = {"topk_ids": ids_NK, "topk_logprobs": half(self._logprobs(stored))}
        return {
            **of_entries,
            **{name: stored[name].astype(np.float32) for name in self._names(_HALVED)},
            **{name: stored[name] for name in self._names(_UNCHANGED)},
        }

    @cached_property
    def _narrow_table(self) -> Array:
        return self.id_table.astype(id_dtype(self.vocab_size))

    def _ids(self, stored: Mapping[str, Array]) -> Array:
        rank_NK: Array = stored["topk_ids_b0"].astype(np.uint16 if self.n_id_planes <= 2 else np.uint32)
        for i in range(1, self.n_id_planes):
            plane_NK = stored[f"topk_ids_b{i}"].astype(rank_NK.dtype)
            np.bitwise_or(rank_NK, plane_NK << 8 * i, out=rank_NK)
        # Clipped, because bounds checks cost more than the lookup. Checksums guarantee valid ranks.
        ids: Array = np.take(self._narrow_table, rank_NK, mode="clip")
        return ids

    def _logprobs(self, stored: Mapping[str, Array]) -> Array:
        step_NK = stored["topk_gaps_b0"]
        if self.n_gap_planes == 2:
            step_NK = step_NK | stored["topk_gaps_b1"].astype(np.uint16) << 8
        # 8-bit codes fit into a byte, but numpy adds bytes at a third of the speed.
        code_NK = np.add.accumulate(step_NK, axis=1, dtype=np.uint16)
        gap_NK = np.take(self.gaps, code_NK, mode="clip")
        top_N1 = stored["top1_logprob"].astype(np.float32)[:, None]
        logprobs_NK: Array = np.subtract(top_N1, gap_NK, out=gap_NK)
        return logprobs_NK


def _byte_planes(name: str, values_NK: Array, count: int) -> dict[str, Array]:
    """Return the bytes of some integers, the lowest first."""
    return {f"{name}_b{i}": (values_NK >> 8 * i).astype(np.uint8) for i in range(count)}


def _temperatures(extras: Extras) -> dict[str, Array]:
    return {"temperatures": np.array(extras.temperatures, np.float64)} if extras.temperatures else {}


Profile = Plain | Compact


def entries_of(profile: Profile, n_tokens: int, n_targets: int) -> tuple[int, int]:
    """Return the entries that a partition takes on the token axis and on the target axis of a cache.

    A partition begins with a chunk, so the axis of the chunked arrays is padded. If that is the target axis alone, one
    spare entry of the token axis follows the tokens. It is the `target_pos` of all padding.

    >>> entries_of(Plain(top_k=1, vocab_size=9, extras=Extras(has_target_pos=True)), 10, 4)
    (10, 4)
    """
    if not profile.extras.has_target_pos:
        entries = round_up(n_tokens, profile.alignment)
        return entries, entries
    return n_tokens + (profile.alignment > 1), round_up(n_targets, profile.alignment)


def file_arrays(
    profile: Profile, entries: tuple[int, int], n_documents: int, n_blocks: int | None
) -> dict[str, Stored]:
    """Return name → storage and whole shape of what a cache holds of its partitions, in the order of the file.

    Parameters
    ----------
    profile
        Storage of token arrays.
    entries
        Lengths of the token axis and the target axis.
    n_documents, n_blocks
        Lengths of the others. None: documents were not packed.
    """
    kinds = schema(profile.top_k, profile.vocab_size)
    starts = np.dtype(np.uint64)
    columns = dict.fromkeys(DOCUMENTS, n_documents) | ({} if n_blocks is None else dict.fromkeys(BLOCKS, n_blocks))
    return {
        **{
            name: replace(kind, shape=(entries[0 if name in EVERY_TOKEN else 1], *kind.shape))
            for name, kind in profile.arrays.items()
        },
        **{name: Stored(kinds[name][0] if name in kinds else starts, (n,)) for name, n in columns.items()},
    }


def encode_all(tokens: Mapping[str, Array], profile: Profile) -> dict[str, Array]:
    """Encode a whole partition's tokens, some at a time."""
    if isinstance(profile, Plain):
        return profile.encode(tokens)
    n_tokens, n_targets = len(tokens["input_ids"]), len(tokens["topk_ids"])
    out = {
        name: np.empty((n_tokens if name in EVERY_TOKEN else n_targets, *kind.shape), kind.dtype)
        for name, kind in profile.arrays.items()
    }
    return _filled(out, tokens, profile.encode)


def _filled(
    out: dict[str, Array], arrays: Mapping[str, Array], convert: Callable[[Mapping[str, Array]], dict[str, Array]]
) -> dict[str, Array]:
    """Convert arrays of the token axis into others, some tokens at a time."""
    for first in range(0, len(arrays["input_ids"]), _BLOCK_TOKENS):
        part = {name: array[first : first + _BLOCK_TOKENS] for name, array in arrays.items()}
        for name, array in convert(part).items():
            out[name][first : first + _BLOCK_TOKENS] = array
    return out


def as_kept(records: Records, profile: Profile) -> Records:
    """Return records with their values after storing and reading, including the loss of precision."""
    return encode_records(records, profile)[1]


def encode_records(
    records: Records, profile: Profile, planes: Mapping[str, Array] | None = None
) -> tuple[dict[str, Array], Records]:
    """Return the stored token arrays of records, and the records with their values after reading.

    Parameters
    ----------
    records
        The records.
    profile
        The profile.
    planes
        Planes that a device has computed. It has also replaced the log-probs by those that are read.
    """
    tokens = records.tokens()
    if isinstance(profile, Plain):
        return tokens, records
    if planes:
        stored = profile.encode(tokens, planes)
        kept = {name: stored[name].astype(np.float32) for name in _HALVED if name in stored}
    else:
        stored = encode_all(tokens, profile)
        kept = _filled({name: np.empty_like(array) for name, array in tokens.items()}, stored, profile.decode)
    return stored, replace(records, **kept)


@lru_cache
def code_bounds(precision: Precision) -> Array:
    """Return the least gap of each code but 0: [2^precision - 1] float32, ascending. The last is infinite.

    A code is ``round(c · log1p(gap))`` in float32. The last digit of float32 logarithms differs between libraries and
    machines. Bounds make the codes the same everywhere.
    """
    codes = np.arange(1, (1 << precision) - 1)
    # Bisection over the bits of float32, which are in the order of the values.
    low, high = np.zeros(len(codes), np.int32), np.full(len(codes), np.float32(_RANGE_NATS).view(np.int32))
    while (low < high).any():
        middle = low + (high - low) // 2
        logs = np.log1p(middle.view(np.float32).astype(np.float64)).astype(np.float32)
        is_reached = np.rint(_codes_per_log(precision) * logs) >= codes
        low, high = np.where(is_reached, low, middle + 1), np.where(is_reached, middle, high)
    return np.append(low.view(np.float32), np.float32(np.inf))


def gaps_of(precision: Precision) -> Array:
    """Return the gap in nats of each code: [2^precision] float32. The last code means probability 0."""
    table = np.expm1(np.arange(1 << precision) / _codes_per_log(precision)).astype(np.float32)
    table[-1] = np.inf
    return table


def _codes_per_log(precision: Precision) -> float:
    return float(((1 << precision) - 2) / np.log1p(_RANGE_NATS))


def id_table(topk_ids: Array, vocab_size: int) -> Array:
    """Return all ids by falling frequency in a sample, ties and unseen ids by lower id: [V] uint32.

    >>> id_table(np.array([[3, 1], [3, 0]]), 5).tolist()
    [3, 0, 1, 2, 4]
    """
    counts = np.bincount(topk_ids.reshape(-1).astype(np.int64), minlength=vocab_size)
    return np.argsort(-counts, kind="stable").astype(np.uint32)


@dataclass(frozen=True, kw_only=True)
class ProfileSpec:
    """Picklable description of a profile, for other processes.

    Parameters
    ----------
    name, top_k, vocab_size, precision
        Attributes of the profile.
    id_table
        File of the compact profile's id table, named by its SHA-256.
    extras
        The optional arrays.
    """

    name: Literal["plain", "compact"]
    top_k: int
    vocab_size: int
    precision: Precision = 8
    id_table: str | None = None
    extras: Extras = NO_EXTRAS


@lru_cache(maxsize=4)
def load_profile(spec: ProfileSpec) -> Profile:
    """Build a profile from its description.

    Raises
    ------
    CacheError
        If the id table is missing or damaged.
    """
    if spec.name == "plain":
        return Plain(top_k=spec.top_k, vocab_size=spec.vocab_size, extras=spec.extras)
    path = Path(str(spec.id_table))
    table_bytes = spec.vocab_size * np.dtype(np.uint32).itemsize
    is_table = path.is_file() and table_bytes < path.stat().st_size <= table_bytes + _NPY_HEADER_BYTES
    data = path.read_bytes() if is_table else b""
    if hashlib.sha256(data).hexdigest() != path.stem:
        raise CacheError.at(
            path,
            f"expected the id table with this SHA-256, got {'another' if path.exists() else 'nothing'}; "
            "restore it, or run again with distillation.teacher.generation.force_regenerate=true",
        )
    # The .npy header is known, so it is not parsed.
    table = np.frombuffer(data[-table_bytes:], "<u4")
    try:
        return Compact(
            top_k=spec.top_k,
            vocab_size=spec.vocab_size,
            precision=spec.precision,
            id_table=table,
            extras=spec.extras,
        )
    except ValueError as error:
        raise CacheError.at(path, f"expected an id table, got {error}; restore it") from error


def save_id_table(folder: Path, table: Array) -> str:
    """Write an id table to a file named by its SHA-256, unless it exists. Return the SHA-256."""
    table = table.astype(np.uint32)
    digest = hashlib.sha256(_npy(table)).hexdigest()
    save_array(folder / f"{digest}.npy", table)
    return digest


def save_array(path: Path, array: Array) -> None:
    """Write an array as ``.npy``, unless the file exists."""
    create_bytes(path, _npy(array))


def _npy(array: Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def earns(top_k: int, vocab_size: int, tokens: int | None, partition_tokens: float) -> bool:
    """Whether compact makes a job's cache smaller: its table costs up to 4 V bytes, a partition half a chunk.

    >>> earns(64, 49_152, 100_000, 100_000), earns(64, 49_152, 1_000, 1_000), earns(64, 49_152, None, 300)
    (True, False, False)
    """
    chunk = Compact.alignment_for(top_k)
    return top_k > 1 and partition_tokens >= 8 * chunk and (tokens is None or tokens * top_k >= 8 * vocab_size)
