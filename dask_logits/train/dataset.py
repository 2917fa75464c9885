"""``CachedLogitsDataset``: the cache as a map-style dataset, and the functions that make batches of its items.

Ragged in, sparse out: an item of T tokens comes as arrays of T rows, a batch as padded [B, T] and [B, T, K]; nothing
of width V is ever made. The file is opened on first use in each process, so the dataset may be forked, pickled and
spawned freely.

Dimension letters: B items in a batch, T tokens, S segments of an item, K kept entries, N tokens of a flat batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dask_logits.errors import CacheError, ConfigError, DatasetError
from dask_logits.records import total_digest
from dask_logits.store.cache import ENGINES, CacheReader, Engine
from dask_logits.store.durable import expanded
from dask_logits.store.find import check_one_job, check_whole, find_caches
from dask_logits.store.profile import Compact
from dask_logits.tokenmap import HasVocabulary, check_tokenizer
from dask_logits.train.decode import Decoder

IGNORED_LABEL = -100

# In the file's dtype, except that torch has no arithmetic on unsigned 16 and 32 bit integers.
_DTYPES = {"input_ids": np.int64, "topk_ids": np.int32}
_CODES = ("topk_ids_b", "topk_gaps_b", "top1_logprob")
_FLOAT32 = ("logsumexp", "tail_logmass", "label_logprob")


class CachedLogitsDataset(Dataset[dict[str, Tensor]]):
    """Items of one cache, or of several parts of a job as one, with the teacher's targets.

    Item `i` is the `i`-th document in dataset order (a window of one, or a packed block, if the job made such):
    ``input_ids`` [T] int64, ``topk_ids`` [T, K] int32, ``topk_logprobs`` [T, K] float16, ``logsumexp``,
    ``tail_logmass``, ``label_logprob`` [T] float32; ``row``, its (first) dataset row; ``segments`` [S, 3] int64, the
    (row, offset, length) of each run of one row's tokens in it. The targets at position t are the teacher's
    distribution over the token at t + 1.

    Parameters
    ----------
    path
        ``teacher_logits.h5``, the run folder it lies in, an index that ``dask-logits merge --index`` wrote, a folder of
        caches, or a list of such.
    top_k
        Keep only so many entries per position; the rest of their mass goes to the tail. None: all.
    window
        Items are windows of so many tokens over the stream of all documents in order, the last one shorter; None:
        documents (windows, blocks) as the job made them.
    decode
        ``worker``: items hold ids and log-probs. ``device``: items hold a compact cache's codes, a third of the bytes,
        and :meth:`decoder` decodes a batch of them on the student's device.
    engine
        ``fast``: memory maps and positional reads without a lock; ``h5py``: everything through HDF5.
    student_tokenizer
        Refuse one that maps ids to other tokens than the teacher's.
    student_vocab_size
        Logits of the student. Kept ids beyond them lose their place: log-prob −∞, their mass to the tail, and
        ``n_beyond`` counts them. None: not compared.

    Raises
    ------
    CacheError
        If a file is missing, truncated, incomplete, not a cache, or of a newer format; if several are not parts of one
        job, or hold the same row twice; or if the tokenizer is not the teacher's.
    ConfigError
        If `top_k` is not between 1 and the cache's, or another setting is not one that is listed.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        *,
        top_k: int | None = None,
        window: int | None = None,
        decode: Literal["worker", "device"] = "worker",
        engine: Engine = "fast",
        student_tokenizer: HasVocabulary | None = None,
        student_vocab_size: int | None = None,
    ) -> None:
        given = [path] if isinstance(path, str | Path) else list(path)
        if not given:
            raise ConfigError("path: expected a cache, or several, got an empty list")
        _check_choice("engine", engine, ENGINES)
        _check_choice("decode", decode, ("worker", "device"))
        self.paths = tuple(file for one in given for file in find_caches(expanded(one)))
        self.engine: Engine = engine
        self.decode = decode
        self.window = window
        self.student_vocab_size = student_vocab_size
        self._readers: list[CacheReader] | None = None
        self._process = 0
        readers = self._opened()
        first = readers[0]
        check_one_job(readers)
        check_whole(readers)
        self._starts = np.append(0, np.cumsum([reader.n_items for reader in readers]))
        self._order = _order(readers)
        self.top_k = first.top_k if top_k is None else top_k
        self.vocab_size = first.vocab_size
        if not isinstance(self.top_k, int) or not 1 <= self.top_k <= first.top_k:
            raise ConfigError(f"top_k: expected 1 to {first.top_k}, which the cache holds, got {top_k!r}")
        for name, value in (("window", window), ("student_vocab_size", student_vocab_size)):
            if value is not None and not (isinstance(value, int) and value > 0):
                raise ConfigError(f"{name}: expected a positive integer or None, got {value!r}")
        if decode == "device" and not all(isinstance(reader.profile, Compact) for reader in readers):
            raise ConfigError("decode: expected 'worker' for a plain cache, which has no codes, got 'device'")
        if decode == "device" and student_vocab_size is not None:
            raise ConfigError("student_vocab_size: expected None with decode='device', which reads no ids, got both")
        if decode == "device" and not all(first.profile.equals(reader.profile) for reader in readers[1:]):
            raise ConfigError("decode: expected 'worker' for parts with different id tables, got 'device'; merge them")
        if student_tokenizer is not None:
            check_tokenizer(first.attributes, first.said().get("token_crcs"), student_tokenizer, str(first.path))
        self._ends = self._token_ends() if window is not None else np.zeros(0, np.int64)

    @property
    def attributes(self) -> dict[str, Any]:
        """What the (first) cache says of itself: teacher, settings, statistics, content digest."""
        return self._opened()[0].attributes

    @property
    def content_digest(self) -> str:
        """What tells the content of all files from any other's."""
        return total_digest(str(reader.attributes["content_digest"]) for reader in self._opened())

    @property
    def n_tokens(self) -> int:
        """Tokens of all items."""
        return sum(reader.n_tokens for reader in self._opened())

    def decoder(self) -> Decoder:
        """Return the module that decodes a batch of codes (``decode="device"``).

        Raises
        ------
        ConfigError
            For a plain cache.
        """
        profile = self._opened()[0].profile
        if not isinstance(profile, Compact):
            raise ConfigError("decode: expected a compact cache, got a plain one, which has nothing to decode")
        return Decoder(profile, self.top_k)

    def __len__(self) -> int:
        if self.window is not None:
            return -(-int(self._ends[-1] if len(self._ends) else 0) // self.window)
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index}: expected an index below {len(self)}")
        if self.window is not None:
            return self._tensors(self._window(index % len(self), self.window))
        reader, at = self._place(index % len(self))
        start, stop, documents = reader.place(at)
        return self._tensors({**self._tokens(reader, start, stop), **reader.segments(documents)})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": None}

    def _opened(self) -> list[CacheReader]:
        # Handles of HDF5 must not cross a fork.
        forked = self.engine == "h5py" and self._process != os.getpid()
        if self._readers is None or forked:
            self._readers = [CacheReader(file, self.engine) for file in self.paths]
            self._process = os.getpid()
        return self._readers

    def _place(self, index: int) -> tuple[CacheReader, int]:
        place = index if self._order is None else int(self._order[index])
        part = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self._opened()[part], place - int(self._starts[part])

    def _tokens(self, reader: CacheReader, start: int, stop: int) -> dict[str, npt.NDArray[Any]]:
        stored = reader.stored(start, stop)
        return stored if self.decode == "device" else reader.profile.decode(stored, _half)

    def _token_ends(self) -> npt.NDArray[np.int64]:
        """Return where each item ends in the stream of all tokens: [items]."""
        lengths = np.concatenate([reader.item_lengths() for reader in self._opened()])
        return np.cumsum(lengths if self._order is None else lengths[self._order], dtype=np.int64)

    def _window(self, index: int, width: int) -> dict[str, npt.NDArray[Any]]:
        """Return one window of the stream: the tail of an item, whole ones, and the head of another."""
        first, stop = index * width, min((index + 1) * width, int(self._ends[-1]))
        ranges: list[tuple[CacheReader, int, int]] = []
        segments: list[npt.NDArray[np.int64]] = []
        item = int(np.searchsorted(self._ends, first, side="right"))
        at = first
        while at < stop:
            reader, place = self._place(item)
            begin, end, documents = reader.place(place)
            skip = at - (int(self._ends[item]) - (end - begin))
            take = min(end - begin - skip, stop - at)
            if ranges and ranges[-1][0] is reader and ranges[-1][2] == begin + skip:
                # Items that lie side by side are read, and their chunks unpacked, once.
                ranges[-1] = (reader, ranges[-1][1], begin + skip + take)
            else:
                ranges.append((reader, begin + skip, begin + skip + take))
            segments.append(_cut_segments(reader.segments(documents)["segments"], skip, take))
            at += take
            item += 1
        parts = [self._tokens(*entries) for entries in ranges]
        found = parts[0]
        if len(parts) > 1:
            found = {name: np.concatenate([part[name] for part in parts]) for name in found}
        found["segments"] = np.concatenate(segments)
        return {**found, "row": found["segments"][0, 0]}

    def _tensors(self, found: dict[str, npt.NDArray[Any]]) -> dict[str, Tensor]:
        row = found.pop("row")
        item = {name: _tensor(name, array) for name, array in found.items()}
        item["row"] = torch.tensor(int(row))
        if self.decode == "worker" and self.student_vocab_size is not None:
            item = self._within(item, self.student_vocab_size)
        if self.decode == "worker" and self.top_k < item["topk_ids"].shape[1]:
            item = _cut(item, self.top_k)
        return item

    def _within(self, item: dict[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
        """Move entries that the student has no logit for into the tail, behind the others."""
        if len(item["input_ids"]) and int(item["input_ids"].max()) >= vocab_size:
            raise DatasetError(
                f"student_vocab_size: expected input ids below {vocab_size}, got {int(item['input_ids'].max())} in "
                f"dataset row {int(item['row'])}; leave that row out, or resize the student's embeddings",
                row=int(item["row"]),
            )
        beyond_TK = item["topk_ids"] >= vocab_size
        item["n_beyond"] = beyond_TK.sum()
        if item["n_beyond"]:
            order_TK = beyond_TK.to(torch.uint8).argsort(dim=-1, stable=True)
            lost_T = torch.where(beyond_TK, item["topk_logprobs"].float(), -torch.inf).logsumexp(-1)
            item["tail_logmass"] = torch.logaddexp(item["tail_logmass"], lost_T)
            item["topk_ids"] = item["topk_ids"].masked_fill(beyond_TK, 0).gather(-1, order_TK)
            item["topk_logprobs"] = item["topk_logprobs"].masked_fill(beyond_TK, -torch.inf).gather(-1, order_TK)
        return item


def _half(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Round to float16 with vector instructions, which numpy does without."""
    rounded: npt.NDArray[Any] = torch.from_numpy(array).half().numpy()
    return rounded


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}: expected {' or '.join(map(repr, choices))}, got {value!r}")


def _tensor(name: str, array: npt.NDArray[Any]) -> Tensor:
    """Copy an array, because torch writes to what it is given; log-masses of a code become float32."""
    dtype = np.float32 if name in _FLOAT32 else _DTYPES.get(name, array.dtype)
    return torch.from_numpy(np.array(array, dtype=dtype))


def _cut_segments(segments_S3: npt.NDArray[np.int64], skip: int, take: int) -> npt.NDArray[np.int64]:
    """Return the segments of some tokens of an item: [S, 3]."""
    ends_S = segments_S3[:, 2].cumsum()
    starts_S = ends_S - segments_S3[:, 2]
    first_S, last_S = np.maximum(starts_S, skip), np.minimum(ends_S, skip + take)
    kept_S = last_S > first_S
    rows_S, offsets_S = segments_S3[:, 0], segments_S3[:, 1] + first_S - starts_S
    cut_S3: npt.NDArray[np.int64] = np.stack([rows_S, offsets_S, last_S - first_S], 1)[kept_S]
    return cut_S3


def _order(readers: Sequence[CacheReader]) -> npt.NDArray[np.int64] | None:
    """Return the items of several caches in dataset order; None where they are in order as they are."""
    if len(readers) == 1:
        return None
    places = [reader.item_places() for reader in readers]
    rows, offsets = (np.concatenate([place[axis] for place in places]) for axis in (0, 1))
    order = np.lexsort((offsets, rows))
    twice = (np.diff(rows[order]) == 0) & (np.diff(offsets[order]) == 0)
    if twice.any():
        row = int(rows[order][int(np.flatnonzero(twice)[0])])
        raise CacheError(
            f"{readers[0].path}: expected every row in one cache only, got row {row} in two; leave one out"
        )
    return None if (order == np.arange(len(order))).all() else order


def _cut(item: dict[str, Tensor], top_k: int) -> dict[str, Tensor]:
    """Move the entries after the first `top_k` into the tail."""
    dropped_T = item["topk_logprobs"][:, top_k:].float().logsumexp(-1)
    return {
        **item,
        "topk_ids": item["topk_ids"][:, :top_k].contiguous(),
        "topk_logprobs": item["topk_logprobs"][:, :top_k].contiguous(),
        "tail_logmass": torch.logaddexp(item["tail_logmass"], dropped_T),
    }


def collate(items: Sequence[dict[str, Tensor]], *, pad_id: int = 0) -> dict[str, Tensor]:
    """Pad documents to a batch.

    Parameters
    ----------
    items
        From :class:`CachedLogitsDataset`.
    pad_id
        Token id of padding.

    Returns
    -------
    dict of Tensor
        ``input_ids``, ``attention_mask`` [B, T]; ``labels`` [B, T], the input ids with −100 at padding, as Hugging Face
        models want them (they shift inside); ``next_ids`` [B, T], the token after each position, −100 where there is
        none, for losses on logits that are not shifted; ``topk_ids`` [B, T, K] int64, ``topk_logprobs`` [B, T, K]
        float32, ``logsumexp``, ``tail_logmass``, ``label_logprob`` [B, T]; ``target_mask`` [B, T] bool, True where
        there are targets; ``row`` [B]; ``segments`` [B, S, 3], with rows −1 and lengths 0 where an item has fewer;
        ``n_beyond`` [B] with a `student_vocab_size`. Codes instead of ``topk_ids`` and ``topk_logprobs`` with
        ``decode="device"``.

    Examples
    --------
    >>> item = {"input_ids": torch.tensor([5, 6]), "topk_ids": torch.zeros(2, 1, dtype=torch.int32),
    ...         "topk_logprobs": torch.zeros(2, 1), "logsumexp": torch.zeros(2), "tail_logmass": torch.zeros(2),
    ...         "label_logprob": torch.zeros(2), "row": torch.tensor(0),
    ...         "segments": torch.tensor([[0, 0, 2]])}
    >>> collate([item])["next_ids"].tolist()
    [[6, -100]]
    """
    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    width = int(lengths.max()) if len(items) else 0
    mask_BT = torch.arange(width) < lengths[:, None]

    def padded(name: str, fill: float, dtype: torch.dtype) -> Tensor:
        first = items[0][name]
        out = torch.full((len(items), width, *first.shape[1:]), fill, dtype=dtype)
        for b, item in enumerate(items):
            out[b, : len(item[name])] = item[name]
        return out

    input_ids_BT = padded("input_ids", pad_id, torch.int64)
    next_BT = torch.full_like(input_ids_BT, IGNORED_LABEL)
    next_BT[:, :-1] = torch.where(mask_BT[:, 1:], input_ids_BT[:, 1:], IGNORED_LABEL)
    if "topk_ids" in items[0]:
        entries = {
            "topk_ids": padded("topk_ids", 0, torch.int64),
            "topk_logprobs": padded("topk_logprobs", 0.0, torch.float32),
        }
    else:
        codes = [name for name in items[0] if name.startswith(_CODES)]
        entries = {name: padded(name, 0, items[0][name].dtype) for name in codes}
    if "n_beyond" in items[0]:
        entries["n_beyond"] = torch.stack([item["n_beyond"] for item in items])
    return {
        "input_ids": input_ids_BT,
        "attention_mask": mask_BT.long(),
        "labels": torch.where(mask_BT, input_ids_BT, IGNORED_LABEL),
        "next_ids": next_BT,
        **entries,
        "logsumexp": padded("logsumexp", 0.0, torch.float32),
        "tail_logmass": padded("tail_logmass", 0.0, torch.float32),
        "label_logprob": padded("label_logprob", float("nan"), torch.float32),
        "target_mask": mask_BT,
        "row": torch.stack([item["row"] for item in items]),
        "segments": _padded_segments([item["segments"] for item in items]),
    }


def _padded_segments(segments: Sequence[Tensor]) -> Tensor:
    most = max((len(found) for found in segments), default=0)
    segments_BS3 = torch.tensor([-1, 0, 0]).repeat(len(segments), most, 1)
    for b, found in enumerate(segments):
        segments_BS3[b, : len(found)] = found
    return segments_BS3


def collate_flat(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join items to one row without padding, for attention that takes sequences of varying length.

    Parameters
    ----------
    items
        From :class:`CachedLogitsDataset`.

    Returns
    -------
    dict of Tensor
        As :func:`collate` gives, with B = 1 and T = N, the sum of the lengths, without ``attention_mask``; besides
        ``position_ids`` [1, N], which start anew with every item, and ``cu_seqlens`` [items + 1] int32, where each
        begins and the last ends. ``labels`` is −100 at the first token of an item, which the one before must not
        predict. ``row`` and ``segments`` are those of the items.

    Examples
    --------
    >>> def item(ids):
    ...     tokens = torch.tensor(ids)
    ...     zeros = torch.zeros(len(ids))
    ...     return {"input_ids": tokens, "topk_ids": tokens[:, None].int(), "topk_logprobs": zeros[:, None],
    ...             "logsumexp": zeros, "tail_logmass": zeros, "label_logprob": zeros, "row": torch.tensor(0),
    ...             "segments": torch.tensor([[0, 0, len(ids)]])}
    >>> batch = collate_flat([item([5, 6, 7]), item([8, 9])])
    >>> batch["position_ids"].tolist(), batch["cu_seqlens"].tolist(), batch["labels"].tolist()
    ([[0, 1, 2, 0, 1]], [0, 3, 5], [[-100, 6, 7, -100, 9]])
    """
    rows = [collate([item]) for item in items]
    joined = {
        name: torch.cat([row[name] for row in rows], 1)
        for name in rows[0]
        if name not in ("attention_mask", "row", "segments", "n_beyond")
    }
    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    ends = lengths.cumsum(0)
    firsts = (ends - lengths)[lengths > 0]
    joined["labels"][0, firsts] = IGNORED_LABEL
    starts_N = torch.repeat_interleave(ends - lengths, lengths)
    joined["position_ids"] = (torch.arange(len(starts_N)) - starts_N)[None]
    joined["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).int()
    joined["row"] = torch.stack([item["row"] for item in items])
    joined["segments"] = _padded_segments([item["segments"] for item in items])
    if "n_beyond" in rows[0]:
        joined["n_beyond"] = torch.cat([row["n_beyond"] for row in rows])
    return joined
