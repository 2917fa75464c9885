"""The arrays of one partition, passed between all layers, and the digest of their content.

The layout is ragged: a flat token axis with one entry per real token, and a document axis with bounds. Padding is never
stored. Only plain integers and numpy are used, independent of teacher and file format.

There are two axes of positions: the tokens, and those of them that have targets. They are the same one unless a job
keeps targets at chosen positions only (``target_pos``).

Targets are the most probable tokens with their log-probs and a tail, or draws from the teacher's distribution: the
distinct tokens drawn, and how often each was.

Dimension letters: N tokens, M positions with targets, D documents, B blocks, K kept entries per position,
J temperatures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from dask_logits.fields import Count, NumberOrInfinity, Record

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class TokenArray:
    """Dtype, shape and storage of one array of the token axis.

    Parameters
    ----------
    dtype
        Dtype of a value. None: that of a token id.
    per
        An entry is one value, one per kept entry (K), or one per further temperature (J).
    has_every_token
        Whether it has an entry for each token. Otherwise it has one for each position with targets.
    extra
        The field of :class:`Extras` that says whether it is there. None: it always is.
    is_of_top_k
        Whether it is absent from targets that are draws.
    compact
        How the compact profile stores it: as it is, as float16, or by the profile's own code.
    """

    dtype: type[np.generic] | None
    per: Literal["position", "K", "J"] = "position"
    has_every_token: bool = False
    extra: str | None = None
    is_of_top_k: bool = False
    compact: Literal["unchanged", "half", "own"] = "unchanged"


# In canonical order, those that are always there first.
ALL_TOKEN_ARRAYS = {
    "input_ids": TokenArray(dtype=None, has_every_token=True),
    "topk_ids": TokenArray(dtype=None, per="K", compact="own"),
    "topk_logprobs": TokenArray(dtype=np.float16, per="K", is_of_top_k=True, compact="own"),
    "logsumexp": TokenArray(dtype=np.float32, compact="half"),
    "tail_logmass": TokenArray(dtype=np.float32, is_of_top_k=True, compact="half"),
    "label_logprob": TokenArray(dtype=np.float32, compact="half"),
    "topk_counts": TokenArray(dtype=np.uint8, per="K", extra="draws", compact="own"),
    "tail_logmass_T": TokenArray(dtype=np.float32, per="J", extra="temperatures", compact="half"),
    "loss_mask": TokenArray(dtype=np.uint8, has_every_token=True, extra="is_masked"),
    "target_pos": TokenArray(dtype=np.uint64, extra="has_target_pos"),
}
TOKEN_ARRAYS = tuple(name for name, array in ALL_TOKEN_ARRAYS.items() if array.extra is None)
OPTIONAL_TOKEN_ARRAYS = tuple(name for name, array in ALL_TOKEN_ARRAYS.items() if array.extra is not None)
EVERY_TOKEN = tuple(name for name, array in ALL_TOKEN_ARRAYS.items() if array.has_every_token)
_OF_TOP_K = tuple(name for name, array in ALL_TOKEN_ARRAYS.items() if array.is_of_top_k)
DOCUMENT_ARRAYS = ("document_row", "document_offset", "document_length")
# Draws that are this improbable, e^−30, are taken for those of other tokens.
_DOUBT_NATS = 30.0
# Relative rounding of a float16, and a log-prob below which a token is never drawn.
_FLOAT16, _MOST_LABEL_NATS = 2.0**-10, 100.0
# Only for documents packed into blocks.
BLOCK_ARRAYS = ("block_length",)


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype that stores a token id: uint16 where all ids fit, else uint32.

    >>> id_dtype(65_536), id_dtype(65_537)
    (dtype('uint16'), dtype('uint32'))
    """
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


@dataclass(frozen=True, kw_only=True)
class Extras:
    """The optional arrays of the token axis that a job makes.

    Parameters
    ----------
    draws
        Number of draws of each position, at most 255. 0: the targets are the most probable tokens.
    temperatures
        J temperatures other than 1 whose tail is stored, ascending.
    is_masked
        Whether a mask says which positions a student learns from.
    has_target_pos
        Whether only chosen positions have targets.
    """

    draws: int = 0
    temperatures: tuple[float, ...] = ()
    is_masked: bool = False
    has_target_pos: bool = False

    @cached_property
    def token_arrays(self) -> tuple[str, ...]:
        """Names of all arrays of the token axis, in canonical order.

        >>> Extras(temperatures=(2.0,)).token_arrays[-2:]
        ('label_logprob', 'tail_logmass_T')
        """
        return tuple(
            name
            for name, array in ALL_TOKEN_ARRAYS.items()
            if (array.extra is None or getattr(self, array.extra)) and not (self.draws and array.is_of_top_k)
        )


NO_EXTRAS = Extras()


def schema(top_k: int, vocab_size: int, extras: Extras = NO_EXTRAS) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Return name → (dtype, shape of one entry) of every logical array, in canonical order.

    >>> schema(64, 50_257)["topk_ids"]
    (dtype('uint16'), (64,))
    """
    ids = id_dtype(vocab_size)
    shapes = {"position": (), "K": (top_k,), "J": (len(extras.temperatures),)}
    tokens = {name: (np.dtype(array.dtype or ids), shapes[array.per]) for name, array in ALL_TOKEN_ARRAYS.items()}
    return tokens | {
        "document_row": (np.dtype(np.uint64), ()),
        "document_offset": (np.dtype(np.uint32), ()),
        "document_length": (np.dtype(np.uint32), ()),
        "block_length": (np.dtype(np.uint32), ()),
    }


def bytes_per_token(top_k: int, vocab_size: int, extras: Extras = NO_EXTRAS, target_share: float = 1.0) -> float:
    """Return the bytes per token of the token arrays, in memory and in plain files. Each document adds 24 bytes.

    >>> bytes_per_token(64, 49_152), bytes_per_token(64, 49_152, Extras(has_target_pos=True), target_share=0.25)
    (270.0, 71.0)
    """
    entries = schema(top_k, vocab_size, extras)
    sizes = {n: entries[n][0].itemsize * int(np.prod(entries[n][1], dtype=int)) for n in extras.token_arrays}
    return sum(size * (1.0 if name in EVERY_TOKEN else target_share) for name, size in sizes.items())


def kept_mass_by_k(topk_logprobs: Array) -> dict[str, float]:
    """Return k → mean probability of the k most probable entries, for powers of two and K.

    >>> kept_mass_by_k(np.log(np.array([[0.5, 0.25, 0.125]])))
    {'1': 0.5, '2': 0.75, '3': 0.875}
    """
    if not len(topk_logprobs):
        return {}
    cumulative_K = np.exp(topk_logprobs.astype(np.float32)).mean(0, dtype=np.float64).cumsum()
    top_k = topk_logprobs.shape[1]
    ks = sorted({2**i for i in range(top_k.bit_length()) if 2**i <= top_k} | {top_k})
    return {str(k): round(float(cumulative_K[k - 1]), 5) for k in ks}


def as_distribution(tokens: Mapping[str, Array]) -> dict[str, Array]:
    """Return logical arrays in which draws are replaced by their shares, as log-probs, and a tail without mass.

    >>> found = as_distribution({"topk_counts": np.array([[3, 1, 0]], np.uint8)})
    >>> np.exp(found["topk_logprobs"]).tolist(), found["tail_logmass"].tolist()
    ([[0.75, 0.25, 0.0]], [-inf])
    """
    if "topk_counts" not in tokens:
        return dict(tokens)
    counts_MK = tokens["topk_counts"]
    draws_M1 = np.maximum(counts_MK.sum(1, keepdims=True, dtype=np.float32), 1)
    with np.errstate(divide="ignore"):
        logprobs_MK = np.log(counts_MK / draws_M1)
    others = {name: array for name, array in tokens.items() if name != "topk_counts"}
    return {
        **others,
        "topk_logprobs": logprobs_MK,
        "tail_logmass": np.full(len(counts_MK), -np.inf, np.float32),
    }


def label_doubts(shares: Array, label_logprobs: Array, draws: int) -> tuple[float, float] | None:
    """Return what the draws at the next tokens should sum to and what they do, if they cannot be of these tokens.

    The difference of a sum of independent draws from its expectation is bounded by Bernstein's inequality.

    Parameters
    ----------
    shares
        [M] share of the draws of each position that are its next token.
    label_logprobs
        [M] log-prob of the next token.
    draws
        Number of draws of each position.

    Returns
    -------
    tuple or None
        None unless the difference is as improbable as e^−30.

    Examples
    --------
    >>> label_doubts(np.full(100, 0.5), np.log(np.full(100, 0.5)), 50), label_doubts(np.zeros(9), np.zeros(9), 50)
    (None, (9.0, 0.0))
    """
    logp = np.clip(label_logprobs.astype(np.float64), -_MOST_LABEL_NATS, 0.0)
    p = np.exp(logp)
    expected, found = float(p.sum()), float(shares.sum())
    variance = (p * (1 - p)).sum() / draws
    rounding = (p * -logp).sum() * _FLOAT16
    allowed = np.sqrt(2 * _DOUBT_NATS * variance) + 2 / 3 * _DOUBT_NATS / draws + rounding
    return (expected, found) if abs(found - expected) > allowed else None


@dataclass(frozen=True, kw_only=True)
class Records:
    """Targets of consecutive documents, or of text windows or block segments.

    Parameters
    ----------
    input_ids
        [N], token ids.
    topk_ids, topk_logprobs
        [M, K], the K most probable next tokens, most probable first, ties by lower id. Log-probs are in nats at
        temperature 1, normalised over the whole valid vocabulary. For draws, the ids are the distinct tokens drawn,
        those with the largest counts first, ties by lower id, and there are no log-probs.
    topk_counts
        [M, K] uint8, how often each of the ids was drawn. An entry with the count 0 is absent, and its id is 0. None
        unless the targets are draws.
    logsumexp
        [M] float32, of the raw logits: raw logit = log-prob + logsumexp.
    tail_logmass
        [M] float32, log of the probability outside the K entries. −inf if K is the whole vocabulary. None for draws.
    label_logprob
        [M] float32, log-prob of the true next token, including the first of a following window or block. NaN if there
        is none.
    tail_logmass_T
        [M, J] float32, log of the probability outside the K entries at each further temperature. None if J is 0.
    loss_mask
        [N] uint8, 1 at positions whose next token a student learns, else 0. None: it learns from all.
    target_pos
        [M] uint64, the tokens whose positions have targets, rising. None: all of them, M = N.
    document_row, document_offset, document_length
        [D], dataset row, position of the first token in the row, number of tokens.
    block_length
        [B], tokens of each packed block. None if documents were not packed.

    Raises
    ------
    ValueError
        If the shapes disagree, there are log-probs beside counts, or `target_pos` does not rise below N.
    """

    input_ids: Array
    topk_ids: Array
    logsumexp: Array
    label_logprob: Array
    document_row: Array
    document_offset: Array
    document_length: Array
    topk_logprobs: Array | None = None
    tail_logmass: Array | None = None
    topk_counts: Array | None = None
    tail_logmass_T: Array | None = None
    loss_mask: Array | None = None
    target_pos: Array | None = None
    block_length: Array | None = None

    def __post_init__(self) -> None:
        tokens, documents = len(self.input_ids), len(self.document_row)
        targets = tokens if self.target_pos is None else len(self.target_pos)
        for name, array in self.tokens().items():
            expected = tokens if name in EVERY_TOKEN else targets
            if len(array) != expected:
                raise ValueError(f"{name}: expected {expected} entries, got {len(array)}")
        if self.target_pos is not None and not is_rising(self.target_pos, tokens):
            raise ValueError(f"target_pos: expected rising positions below {tokens}, got {self.target_pos[:8]}")
        for name in DOCUMENT_ARRAYS:
            if len(getattr(self, name)) != documents:
                raise ValueError(f"{name}: expected {documents} entries, got {len(getattr(self, name))}")
        if int(self.document_length.sum(dtype=np.uint64)) != tokens:
            raise ValueError(f"document_length: expected a sum of {tokens}, got {self.document_length.sum()}")
        if self.block_length is not None and int(self.block_length.sum(dtype=np.uint64)) != tokens:
            raise ValueError(f"block_length: expected a sum of {tokens}, got {self.block_length.sum()}")
        wanted = ("topk_counts",) if self.topk_counts is not None else _OF_TOP_K
        present = tuple(name for name in ("topk_counts", *_OF_TOP_K) if getattr(self, name) is not None)
        if present != wanted:
            raise ValueError(f"expected either {' and '.join(_OF_TOP_K)} or topk_counts, got {present}")
        entries = getattr(self, wanted[0])
        if self.topk_ids.shape != entries.shape:
            raise ValueError(f"{wanted[0]}: expected {self.topk_ids.shape}, got {entries.shape}")

    @property
    def n_tokens(self) -> int:
        """Number of tokens, N."""
        return len(self.input_ids)

    @property
    def n_targets(self) -> int:
        """Number of positions with targets, M."""
        return len(self.topk_ids)

    @property
    def n_documents(self) -> int:
        """Number of documents, D, including empty ones."""
        return len(self.document_row)

    @property
    def top_k(self) -> int:
        """Number of kept entries per position, K."""
        return int(self.topk_ids.shape[1])

    def arrays(self) -> Iterator[tuple[str, Array]]:
        """Yield every array under its logical name, in canonical order."""
        for name in (*ALL_TOKEN_ARRAYS, *DOCUMENT_ARRAYS, *BLOCK_ARRAYS):
            if getattr(self, name) is not None:
                yield name, getattr(self, name)

    def tokens(self) -> dict[str, Array]:
        """Return the arrays of the token axis and the target axis by name."""
        return {name: getattr(self, name) for name in ALL_TOKEN_ARRAYS if getattr(self, name) is not None}

    @property
    def logprobs(self) -> Array:
        """Log-probs of the entries, for draws the logs of their shares: [M, K]."""
        return as_distribution(self.tokens())["topk_logprobs"]

    @property
    def present_ids(self) -> Array:
        """Ids of all entries that are there, one after the other."""
        return self.topk_ids.reshape(-1) if self.topk_counts is None else self.topk_ids[self.topk_counts > 0]

    def at(self, target_pos: Array) -> Records:
        """Return the same records with targets at fewer positions: [M], rising, of those that have some."""
        places = self.targets_of(target_pos)
        kept = {name: array[places] for name, array in self.tokens().items() if name not in EVERY_TOKEN}
        return replace(self, **{**kept, "target_pos": target_pos.astype(np.uint64)})

    def targets_of(self, tokens: Array) -> Array:
        """Return the places on the target axis that belong to places on the token axis, such as document bounds."""
        return tokens if self.target_pos is None else np.searchsorted(self.target_pos, tokens.astype(np.uint64))


def is_rising(target_pos: Array, n_tokens: int) -> bool:
    """Whether positions rise strictly and are below a number of tokens.

    >>> is_rising(np.array([0, 2], np.uint64), 3), is_rising(np.array([2, 2], np.uint64), 3)
    (True, False)
    """
    return not len(target_pos) or bool((target_pos[1:] > target_pos[:-1]).all() and target_pos[-1] < n_tokens)


def digest_of(runs: Iterable[Records]) -> str:
    """Return the content digest of targets: the sum of the SHA-256 of all documents, as 64 hexadecimal digits.

    Equal sums mean the same targets for the same tokens. A document's hash covers its row, offset and length and the
    bytes of all its token arrays. Its target positions count from its first token. A packed block's hash covers its
    length and the place of its first token. The sum therefore does not depend on partition boundaries, host, time or
    order, and the sum of a whole is the sum of its parts (:func:`total_digest`). It detects damage and mistakes, but
    does not protect against someone who can choose the targets, because sums of hashes can be steered.
    """
    return total_digest(found for records in runs for found in _hashes(records))


def total_digest(digests: Iterable[str]) -> str:
    """Return the content digest of a whole from those of its parts.

    >>> int(total_digest([f"{1:064x}", f"{2:064x}"]), 16)
    3
    """
    return f"{sum(int(digest, 16) for digest in digests) % (1 << 256):064x}"


def _hashes(records: Records) -> Iterator[str]:
    """Yield the SHA-256 of each document and block."""
    tokens = [
        (name, np.ascontiguousarray(array, array.dtype.newbyteorder("<"))) for name, array in records.tokens().items()
    ]
    head = ";".join(f"{name} {array.dtype.str} {list(array.shape[1:])}" for name, array in tokens).encode()
    ends = np.cumsum(records.document_length, dtype=np.int64)
    starts = ends - records.document_length
    places = list(zip(records.document_row.tolist(), records.document_offset.tolist(), strict=True))
    bounds = zip(*(at.tolist() for at in (starts, ends, *map(records.targets_of, (starts, ends)))), strict=True)
    for place, (start, stop, first, last) in zip(places, bounds, strict=True):
        found = hashlib.sha256(head)
        found.update(f"document {place} {stop - start}".encode())
        for name, array in tokens:
            part = array[start:stop] if name in EVERY_TOKEN else array[first:last]
            if name == "target_pos":
                part = part - part.dtype.type(start)
            found.update(part.reshape(-1).view(np.uint8).data)
        yield found.hexdigest()
    if records.block_length is not None:
        block_starts = np.cumsum(records.block_length, dtype=np.int64) - records.block_length
        firsts = np.searchsorted(starts, block_starts, side="right") - 1
        for first, start, length in zip(firsts, block_starts, records.block_length, strict=True):
            row, offset = places[first]
            place = (row, offset + int(start - starts[first]))
            yield hashlib.sha256(f"block {place} {length}".encode()).hexdigest()


class Statistics(Record, extra="forbid"):
    """Additive statistics, summed over partitions. Unknown fields are refused, because they could not be summed."""

    documents: Count = Field(default=0, description="Documents. Windows and block segments count as documents.")
    tokens: Count = Field(default=0, description="Tokens.")
    targets: Count = Field(default=0, description="Positions with targets. If absent: as many as tokens.")
    blocks: Count = Field(default=0, description="Packed blocks, 0 if documents were not packed.")
    kept_mass: NumberOrInfinity = Field(
        default=0.0, description="Sum over targets of the probability inside the K entries. 0 for draws."
    )
    distinct: Count = Field(
        default=0, description="Sum over targets of the distinct ids drawn. 0 unless they are draws."
    )
    label_logprob: NumberOrInfinity = Field(
        default=0.0,
        description="Sum of the log-probs of the true next tokens, in nats. Infinite if one has probability 0.",
    )
    labels: Count = Field(default=0, description="Targets with a true next token.")
    learned: Count = Field(
        default=0, description="Positions whose next token a student learns, of masked data. 0 without a mask."
    )
    skipped_rows: Count = Field(default=0, description="Unusable rows that were skipped. They have no tokens.")
    double_bos_rows: Count = Field(
        default=0, description="Texts that begin with the tokenizer's BOS token, so that it occurs twice."
    )

    @model_validator(mode="before")
    @classmethod
    def _with_targets(cls, values: Any) -> Any:
        """Count the targets of a record without them, which has one for each token."""
        return {"targets": values["tokens"], **values} if isinstance(values, dict) and "tokens" in values else values

    @classmethod
    def of(cls, records: Records) -> Statistics:
        """Compute the sums of one partition in float64."""
        labelled = records.label_logprob[~np.isnan(records.label_logprob)]
        return cls(
            documents=records.n_documents,
            tokens=records.n_tokens,
            targets=records.n_targets,
            blocks=0 if records.block_length is None else len(records.block_length),
            kept_mass=(
                0.0 if records.tail_logmass is None else float(-np.expm1(records.tail_logmass.astype(np.float64)).sum())
            ),
            distinct=0 if records.topk_counts is None else int(np.count_nonzero(records.topk_counts)),
            label_logprob=float(labelled.astype(np.float64).sum()),
            labels=len(labelled),
            learned=0 if records.loss_mask is None else int(records.loss_mask.sum()),
        )

    def __add__(self, other: Statistics) -> Statistics:
        # Not validated, because sums of damaged counts may exceed the bounds of a record.
        return Statistics.model_construct(
            **{name: getattr(self, name) + getattr(other, name) for name in Statistics.model_fields}
        )

    @property
    def mean_kept_mass(self) -> float:
        """Mean probability of the K entries, NaN without targets."""
        return self.kept_mass / self.targets if self.targets else float("nan")

    @property
    def mean_distinct(self) -> float:
        """Mean number of distinct ids drawn per position, 0 unless the targets are draws."""
        return self.distinct / self.targets if self.targets else 0.0

    @property
    def entries(self) -> tuple[str, str]:
        """Label and value that describe the entries: their mean mass, or for draws the mean number of distinct ids.

        >>> Statistics(targets=2, distinct=21).entries, Statistics(targets=2, kept_mass=1.8).entries
        (('distinct ids', '10.5'), ('kept mass', '0.9000'))
        """
        if self.distinct:
            return "distinct ids", f"{self.mean_distinct:.1f}"
        return "kept mass", f"{self.mean_kept_mass:.4f}"

    @property
    def perplexity(self) -> float:
        """Teacher's perplexity on the true next tokens, exp(−mean log-prob), NaN without labels."""
        return float(np.exp(-self.label_logprob / self.labels)) if self.labels else float("nan")
