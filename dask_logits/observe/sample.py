"""A bounded, evenly spread sample of a run's documents, and what the teacher thinks of them.

At most 2,000 documents and about 400,000 tokens are read, whatever the size of the cache: about a second. Without a
cache, the beginnings of up to 8 committed partitions are read.

Dimension letters: N tokens, K kept entries, D documents.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dask_logits.cache.find import CacheFiles
from dask_logits.cache.partition import PartitionReader
from dask_logits.cache.profile import load_profile
from dask_logits.data.tokens import local_tokenizer
from dask_logits.records import EVERY_TOKEN, Array, as_distribution, kept_mass_by_k
from dask_logits.run.folder import RunFolder

logger = logging.getLogger(__name__)

_MOST_DOCUMENTS = 2_000
_MOST_TOKENS = 400_000
# A longer document is read up to here.
_MOST_TOKENS_EACH = 16_384
_MOST_LENGTHS = 2_000_000
_MOST_PARTITIONS = 8
_OPENING_TOKENS = 48


@dataclass(frozen=True, kw_only=True)
class Document:
    """What the teacher thinks of one document, text window or packed block.

    Parameters
    ----------
    row, offset
        Dataset row of its first token, and that token's position in the row.
    number
        Its number in the cache, from 0. None in a partition.
    n_tokens
        Its length.
    opening_ids
        Its first token ids.
    entropies
        [N] entropy of the kept distribution of each position, in nats.
    kept
        [N] probability of the K entries, for draws the number of distinct ids.
    surprises
        [N] −log-prob of the true next token in nats, NaN where there is none.
    mass_by_k
        k → mean probability of its k best tokens. Empty for draws.
    """

    row: int
    offset: int
    number: int | None
    n_tokens: int
    opening_ids: tuple[int, ...]
    entropies: Array
    kept: Array
    surprises: Array
    mass_by_k: dict[str, float]

    @property
    def entropy(self) -> float:
        """Mean entropy over its positions, in nats."""
        return float(self.entropies.mean())

    @property
    def surprise(self) -> float:
        """Mean surprise in nats, NaN without labels."""
        labelled = self.surprises[~np.isnan(self.surprises)]
        return float(labelled.mean()) if len(labelled) else float("nan")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Some documents of a cache or run.

    Parameters
    ----------
    documents
        Those with at least one target.
    lengths
        [D] tokens of documents, of all of them unless there are more than 2 million.
    n_documents
        Number of documents from which the sample was taken.
    tokenizer
        The teacher's tokenizer, None if it is not on this machine.
    """

    documents: tuple[Document, ...]
    lengths: Array
    n_documents: int
    tokenizer: Any = None

    def joined(self, name: str) -> Array:
        """Return ``entropies``, ``kept`` or ``surprises`` of all sampled positions, without NaN."""
        values: Array = np.concatenate([np.empty(0, np.float32), *(getattr(each, name) for each in self.documents)])
        return values[~np.isnan(values)]

    @property
    def mass_by_k(self) -> dict[int, float]:
        """k → mean probability of the k best tokens over the sampled positions."""
        weights = [len(each.entropies) for each in self.documents]
        ks = self.documents[0].mass_by_k if self.documents else {}
        columns = {k: [each.mass_by_k[k] for each in self.documents] for k in ks}
        return {int(k): float(np.average(masses, weights=weights)) for k, masses in columns.items()}

    def text(self, ids: Iterable[int]) -> str:
        """Return the text of token ids, or the ids themselves without a tokenizer."""
        return decoded(self.tokenizer, ids)


def decoded(tokenizer: Any, ids: Iterable[int]) -> str:
    """Return the text of token ids, or the ids themselves if the tokenizer is None."""
    known = [int(i) for i in ids]
    return " ".join(map(str, known)) if tokenizer is None else str(tokenizer.decode(known))


def entropy(topk_logprobs: Array) -> Array:
    """Return the entropy of the kept probabilities, renormalised to a sum of 1.

    Parameters
    ----------
    topk_logprobs
        [N, K] in nats.

    Returns
    -------
    ndarray
        [N] float32, in nats: −Σ q log q (Shannon, 1948).

    Examples
    --------
    >>> [round(value, 3) for value in entropy(np.log([[0.25, 0.25], [0.5, 1e-30]])).tolist()]
    [0.693, 0.0]
    """
    logp_NK = topk_logprobs.astype(np.float32)
    p_NK = np.exp(logp_NK)
    total_N = p_NK.sum(1)
    # A log-prob of −inf belongs to a probability of 0, whose term is 0.
    terms_N = (p_NK * np.where(p_NK > 0, logp_NK, 0.0)).sum(1)
    entropy_N: Array = np.maximum(0.0, np.log(total_N) - terms_N / total_N).astype(np.float32)
    return entropy_N


def measured(arrays: Mapping[str, Array], *, row: int, offset: int, n_tokens: int, number: int | None) -> Document:
    """Return what the teacher thinks of a document, from the logical arrays of its tokens."""
    of_entries, counts = as_distribution(arrays), arrays.get("topk_counts")
    return Document(
        row=row,
        offset=offset,
        number=number,
        n_tokens=n_tokens,
        opening_ids=tuple(arrays["input_ids"][:_OPENING_TOKENS].tolist()),
        entropies=entropy(of_entries["topk_logprobs"]),
        kept=(
            -np.expm1(of_entries["tail_logmass"].astype(np.float32))
            if counts is None
            else np.count_nonzero(counts, axis=1).astype(np.float32)
        ),
        surprises=-arrays["label_logprob"].astype(np.float32),
        mass_by_k=kept_mass_by_k(of_entries["topk_logprobs"]) if counts is None else {},
    )


def spread(n_items: int, count: int) -> list[int]:
    """Return at most `count` of `n_items` numbers, evenly spread.

    >>> spread(5, 9), spread(100, 3)
    ([0, 1, 2, 3, 4], [0, 49, 99])
    """
    return np.linspace(0, n_items - 1, min(n_items, count)).astype(np.int64).tolist() if n_items else []


def sample_cache(cache: CacheFiles, tokenizer: Any | None) -> Sample:
    """Sample the items of a cache: documents, text windows, or packed blocks."""
    n_items = cache.firsts[-1]
    count = min(_MOST_DOCUMENTS, max(1, _MOST_TOKENS * n_items // max(1, cache.n_tokens)))
    documents, left = [], _MOST_TOKENS
    for number in spread(n_items, count):
        reader, index = cache.find(number)
        start, stop, segments = reader.place(index)
        arrays = reader.tokens(start, min(stop, start + _MOST_TOKENS_EACH))
        row, offset, _ = reader.segments(segments)["segments"][0].tolist()
        document = measured(arrays, row=row, offset=offset, n_tokens=stop - start, number=number)
        left -= len(document.entropies)
        if len(document.entropies):
            documents.append(document)
        if left <= 0:
            break
    step = max(1, -(-n_items // _MOST_LENGTHS))
    # Of the memory map, because a copy of all would take memory in proportion to the cache.
    stored = (reader.arrays["block_length" if reader.is_packed else "document_length"] for reader in cache.readers)
    lengths = np.concatenate([np.empty(0, np.int64), *(each[::step].astype(np.int64) for each in stored)])
    return Sample(documents=tuple(documents), lengths=lengths, n_documents=n_items, tokenizer=tokenizer)


def tokenizer_of(cache: CacheFiles) -> Any | None:
    """Return the tokenizer of a cache's teacher if it is on this machine, else None."""
    said = cache.readers[0].attributes
    path, digest = said.get("tokenizer_path") or said.get("teacher_path"), said.get("tokenizer_map_digest")
    return local_tokenizer(str(path), str(digest)) if path and digest else None


def sample_partitions(run: RunFolder, indices: Sequence[int], tokenizer: Any | None) -> Sample:
    """Sample the first documents of some committed partitions, given by index."""
    indices = [indices[i] for i in spread(len(indices), _MOST_PARTITIONS)]
    chosen = [receipt for receipt in map(run.receipt, indices) if receipt is not None]
    profile = load_profile(run.profile()) if chosen else None
    documents: list[Document] = []
    lengths: list[Array] = [np.empty(0, np.int64)]
    for receipt in chosen:
        assert profile is not None
        reader = PartitionReader(run.partitions_path / receipt.attempt, profile)
        columns = {name: np.concatenate([*reader.blocks(name)]) for name in ("document_row", "document_offset",
                                                                             "document_length")}  # fmt: skip
        lengths.append(columns["document_length"].astype(np.int64))
        documents += _first_documents(reader, columns, _MOST_TOKENS // len(chosen), _MOST_DOCUMENTS // len(chosen))
    found = np.concatenate(lengths)
    return Sample(documents=tuple(documents), lengths=found, n_documents=len(found), tokenizer=tokenizer)


def _first_documents(
    reader: PartitionReader, columns: Mapping[str, Array], most_tokens: int, most_documents: int
) -> Iterator[Document]:
    """Yield the documents that lie in the first blocks of a partition."""
    blocks: list[dict[str, Array]] = []
    for block in reader.tokens():
        blocks.append(block)
        if sum(len(each["input_ids"]) for each in blocks) >= most_tokens:
            break
    if not blocks:
        return
    arrays = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    target_pos = arrays.get("target_pos", np.arange(len(arrays["topk_ids"])))
    ends = np.cumsum(columns["document_length"], dtype=np.int64)
    whole = np.flatnonzero((ends <= len(arrays["input_ids"])) & (columns["document_length"] > 0))
    for i in whole[:most_documents].tolist():
        length = int(columns["document_length"][i])
        start = int(ends[i]) - length
        tokens = np.array([start, start + min(length, _MOST_TOKENS_EACH)], target_pos.dtype)
        targets = np.searchsorted(target_pos, tokens)
        part = {
            name: values[slice(*(tokens if name in EVERY_TOKEN else targets).tolist())]
            for name, values in arrays.items()
        }
        if not len(part["topk_ids"]):
            continue
        row, offset = int(columns["document_row"][i]), int(columns["document_offset"][i])
        yield measured(part, row=row, offset=offset, n_tokens=length, number=None)
