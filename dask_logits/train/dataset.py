"""``CachedLogitsDataset``: the cache as a map-style dataset.

An item of T tokens consists of arrays of T rows, or of M rows if only M of its positions have targets. No array has
width V. Each process opens the file on first use, so the dataset can be forked, pickled and spawned. Excluded items (by
default those without tokens) are determined when the dataset is opened, so that its length, the order of the items and
a resumable sampler agree.

Dimension letters: T tokens, M positions with targets, S segments of an item, K kept entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dask_logits.cache.find import check_one_job, check_whole, find_caches
from dask_logits.cache.profile import Compact
from dask_logits.cache.reader import CacheReader
from dask_logits.errors import CacheError, ConfigError, DatasetError, first_line
from dask_logits.files.atomic import expanded
from dask_logits.records import as_distribution, total_digest
from dask_logits.train.batches import CachedItem, collate
from dask_logits.train.decode import Decoder
from dask_logits.train.objective import tails_with_dropped
from dask_logits.train.order import is_integer
from dask_logits.vocabulary import HasVocabulary, check_tokenizer

# Other arrays keep the file's dtype. torch has no arithmetic on unsigned 16 and 32 bit integers.
_DTYPES = {"input_ids": np.int64, "topk_ids": np.int32, "loss_mask": np.bool_, "target_pos": np.int64}
_FLOAT32 = ("logsumexp", "tail_logmass", "label_logprob", "tail_logmass_T")
# Entries whose token ids are read together.
_SCAN_ENTRIES = 1 << 22
# Tokens of the first item that are compared with their targets on opening.
_CHECKED_TOKENS = 4_096


class CachedLogitsDataset(Dataset[CachedItem]):
    """Items of one cache, or of several parts of a job as one, with the teacher's targets.

    Item `i` is the `i`-th document in dataset order (or text window or packed block, depending on the job), excluding
    documents without tokens. It has ``input_ids`` [T] int64, ``topk_ids`` [T, K] int32, ``topk_logprobs`` [T, K]
    float16, and ``logsumexp``, ``tail_logmass``, ``label_logprob`` [T] float32. A cache with J further
    temperatures also has ``tail_logmass_T`` [T, J] float32, and one of masked data ``loss_mask`` [T] bool, True where a
    student learns the next token. ``row`` is the item's (first) dataset row, and ``segments``
    [S, 3] int64 has the (row, offset, length) of each stretch of one row's tokens. The targets at position t are the
    teacher's distribution over the token at t + 1.

    The targets of a cache made with ``targets=sample`` are draws. ``topk_ids`` are the distinct tokens drawn, and
    ``topk_logprobs``, then float32, the logs of their shares, −∞ for an absent entry. K is the most of a position of
    the item, and ``tail_logmass`` is −∞.

    A cache with targets at chosen positions also has ``target_pos`` [M] int64, the item's positions with targets,
    rising. All arrays but ``input_ids`` and ``loss_mask`` then have M rows. Options that cut tokens cut both.

    Parameters
    ----------
    path
        ``teacher_logits.h5``, its run folder, an index written by ``dask-logits merge --index``, a folder of caches, or
        a list of these.
    top_k
        Entries to keep per position. The mass of the others is added to the tail. None: all. Draws are kept as a
        whole.
    window
        Tokens of a window over the stream of all documents in order. Items are then windows, the last one shorter.
        None: documents (text windows, packed blocks) as the job made them.
    max_tokens
        Tokens to keep from the start of each document (window, block). Their targets are exact, because the teacher did
        not see later tokens. None: all.
    keep_empty
        Keep documents without tokens, as items of length 0. Many students cannot run a batch of them.
    decode
        ``worker``: items hold ids and log-probs. ``device``: items hold a compact cache's codes, a third of the bytes,
        and :meth:`decoder` decodes a batch of them on the student's device.
    student_tokenizer
        The student's tokenizer, or its folder or hub name. A tokenizer that maps ids to other tokens than the teacher's
        is refused.
    student_vocab_size
        The number of the student's logits. Kept ids beyond it become absent: their log-prob is −∞, their mass is added
        to the tail, and ``n_beyond`` counts them. An item with a token beyond it is refused when it is read. None: all
        of the teacher's vocabulary.
    skip_unrepresentable
        Exclude the items with a token beyond `student_vocab_size` instead of refusing them. Opening the dataset then
        reads all token ids.

    Raises
    ------
    CacheError
        If a file is missing, truncated, incomplete, not a cache, or of a newer format. If several files are not parts
        of one job, or hold the same row twice. If the targets of the first item contradict its tokens, or the tokenizer
        is not the teacher's.
    ConfigError
        If `top_k` is not between 1 and the cache's, or another setting has an unlisted value. If `top_k` or
        ``decode="device"`` is given for a cache of draws.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        *,
        top_k: int | None = None,
        window: int | None = None,
        max_tokens: int | None = None,
        keep_empty: bool = False,
        decode: Literal["worker", "device"] = "worker",
        student_tokenizer: HasVocabulary | str | Path | None = None,
        student_vocab_size: int | None = None,
        skip_unrepresentable: bool = False,
    ) -> None:
        given = [path] if isinstance(path, str | Path) else list(path)
        if not given:
            raise ConfigError("path: expected a cache, or several, got an empty list")
        if decode not in ("worker", "device"):
            raise ConfigError(f"decode: expected 'worker' or 'device', got {decode!r}")
        self.paths = tuple(file for one in given for file in find_caches(expanded(one)))
        self.decode = decode
        self.window = window
        self.max_tokens = max_tokens
        self.student_vocab_size = student_vocab_size
        self._readers: list[CacheReader] | None = None
        readers = self._opened()
        first = readers[0]
        check_one_job(readers)
        check_whole(readers)
        self._starts = np.append(0, np.cumsum([reader.n_items for reader in readers]))
        self._order = _order(readers)
        self.top_k = first.top_k if top_k is None else top_k
        self.vocab_size = first.vocab_size
        self.draws = first.profile.extras.draws
        self.temperatures = first.profile.extras.temperatures
        self.is_masked = first.profile.extras.is_masked
        self.has_target_pos = first.profile.extras.has_target_pos
        if self.draws and top_k is not None:
            raise ConfigError(
                f"top_k: expected None for a cache of draws, got {top_k!r}: the draws of a position belong together"
            )
        if self.draws and decode == "device":
            raise ConfigError(
                "decode: expected 'worker' for a cache of draws, got 'device': draws are packed in the file"
            )
        if not isinstance(self.top_k, int) or not 1 <= self.top_k <= first.top_k:
            raise ConfigError(f"top_k: expected 1 to {first.top_k}, which the cache holds, got {top_k!r}")
        for name, value in (("window", window), ("max_tokens", max_tokens), ("student_vocab_size", student_vocab_size)):
            if value is not None and not (is_integer(value) and value > 0):
                raise ConfigError(f"{name}: expected a positive integer or None, got {value!r}")
        if skip_unrepresentable and student_vocab_size is None:
            raise ConfigError("skip_unrepresentable: expected student_vocab_size, too, got None")
        if decode == "device" and not all(isinstance(reader.profile, Compact) for reader in readers):
            raise ConfigError("decode: expected 'worker' for a plain cache, which has no codes, got 'device'")
        if decode == "device" and student_vocab_size is not None:
            raise ConfigError("student_vocab_size: expected None with decode='device', which reads no ids, got both")
        if decode == "device" and not all(first.profile.equals(reader.profile) for reader in readers[1:]):
            raise ConfigError("decode: expected 'worker' for parts with different id tables, got 'device'; merge them")
        if student_tokenizer is not None:
            tokenizer = _loaded(student_tokenizer)
            check_tokenizer(first.attributes, first.said().get("token_crcs"), tokenizer, str(first.path))
        self._n_empty, self._n_unrepresentable = 0, 0
        self._left_out = self._find_left_out(keep_empty, skip_unrepresentable)
        # Number of kept items before each excluded one. Later items shift by one.
        self._kept_before = self._left_out - np.arange(len(self._left_out))
        self._ends = np.cumsum(self._item_lengths()) if window is not None else np.zeros(0, np.int64)
        self._check_first_item()

    def __repr__(self) -> str:
        file = str(self.paths[0]) if len(self.paths) == 1 else f"{self.paths[0]} and {len(self.paths) - 1} more"
        size = f"of a vocabulary of {self.vocab_size:,}"
        left_out = [(self._n_empty, "empty"), (self._n_unrepresentable, "with tokens that the student lacks")]
        lines = {
            "path": file,
            "teacher": self.attributes.get("teacher_path") or "unknown",
            "items": f"{len(self):,}" + "".join(f", {n:,} {kind} left out" for n, kind in left_out if n),
            "tokens": f"{self.n_tokens:,}",
            **({"draws": f"{self.draws} {size}"} if self.draws else {"top_k": f"{self.top_k} {size}"}),
            "profile": self.attributes["profile"],
        }
        if self.has_target_pos:
            lines["targets"] = f"at {sum(reader.n_targets for reader in self._opened()):,} positions of the cache"
        if self.temperatures:
            lines["temperatures"] = ", ".join(f"{value:g}" for value in sorted((1.0, *self.temperatures)))
        for name in ("window", "max_tokens", "student_vocab_size"):
            if getattr(self, name) is not None:
                lines[name] = f"{getattr(self, name):,}"
        return "CachedLogitsDataset(" + "".join(f"\n    {name}: {value}" for name, value in lines.items()) + "\n)"

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the (first) cache, among them teacher, settings, statistics and content digest."""
        return self._opened()[0].attributes

    @property
    def content_digest(self) -> str:
        """Content digest of all files."""
        return total_digest(str(reader.attributes["content_digest"]) for reader in self._opened())

    @property
    def tables_digest(self) -> str:
        """Digest of the tables that decode the items' codes, empty if the items are decoded."""
        profile = self._opened()[0].profile
        return profile.tables_digest if self.decode == "device" and isinstance(profile, Compact) else ""

    @property
    def n_tokens(self) -> int:
        """Number of tokens of all items."""
        return int(self._item_lengths().sum())

    def places(self) -> npt.NDArray[np.int64]:
        """Return the dataset row, offset and length of each document (text window, packed block): [items, 3].

        A packed block has those of its first token, and its own length. A `window` is not considered.
        """
        places_I2 = np.concatenate([np.stack(reader.item_places(), 1) for reader in self._opened()])
        places_I2 = np.delete(places_I2 if self._order is None else places_I2[self._order], self._left_out, 0)
        return np.column_stack([places_I2, self._item_lengths()])

    def decoder(self) -> Decoder:
        """Return the module that decodes a batch of codes (``decode="device"``).

        Raises
        ------
        ConfigError
            If the cache is plain.
        """
        profile = self._opened()[0].profile
        if not isinstance(profile, Compact):
            raise ConfigError("decode: expected a compact cache, got a plain one, which has nothing to decode")
        return Decoder(profile, self.top_k)

    def __len__(self) -> int:
        if self.window is not None:
            return -(-int(self._ends[-1] if len(self._ends) else 0) // self.window)
        return int(self._starts[-1]) - len(self._left_out)

    def __getitem__(self, index: int) -> CachedItem:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index}: expected an index below {len(self)}")
        if self.window is not None:
            return self._tensors(self._window(index % len(self), self.window))
        reader, start, stop, segments_S3 = self._span(index % len(self), self.max_tokens)
        return self._tensors({**self._tokens(reader, start, stop), "segments": segments_S3})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": None}

    def _opened(self) -> list[CacheReader]:
        if self._readers is None:
            self._readers = [CacheReader(file) for file in self.paths]
        return self._readers

    def _span(self, index: int, most: int | None) -> tuple[CacheReader, int, int, npt.NDArray[np.int64]]:
        """Return the file of an item, its first entries [start, stop) in the file, and their segments [S, 3]."""
        place = index + int(np.searchsorted(self._kept_before, index, side="right"))
        place = place if self._order is None else int(self._order[place])
        part = int(np.searchsorted(self._starts, place, side="right")) - 1
        reader = self._opened()[part]
        start, stop, documents = reader.place(place - int(self._starts[part]))
        segments_S3: npt.NDArray[np.int64] = reader.segments(documents)["segments"]
        if most is not None and stop - start > most:
            stop = start + most
            segments_S3 = _cut_segments(segments_S3, 0, most)
        return reader, start, stop, segments_S3

    def _tokens(self, reader: CacheReader, start: int, stop: int) -> dict[str, npt.NDArray[Any]]:
        stored = reader.stored(start, stop)
        return stored if self.decode == "device" else reader.profile.decode(stored, _half)

    def _item_lengths(self) -> npt.NDArray[np.int64]:
        """Return the tokens of each item: [items]."""
        lengths = np.concatenate([reader.item_lengths() for reader in self._opened()])
        lengths = np.delete(lengths if self._order is None else lengths[self._order], self._left_out)
        return lengths if self.max_tokens is None else np.minimum(lengths, self.max_tokens)

    def _find_left_out(self, keep_empty: bool, skip_unrepresentable: bool) -> npt.NDArray[np.int64]:
        """Return the items to exclude, as indices in dataset order."""
        empty = np.concatenate([reader.item_lengths() == 0 for reader in self._opened()])
        unrepresentable = np.zeros_like(empty)
        if skip_unrepresentable and self.student_vocab_size is not None:
            unrepresentable = np.concatenate([self._has_beyond(reader) for reader in self._opened()])
        self._n_empty = 0 if keep_empty else int(empty.sum())
        self._n_unrepresentable = int(unrepresentable.sum())
        left_out = unrepresentable if keep_empty else unrepresentable | empty
        return np.flatnonzero(left_out if self._order is None else left_out[self._order])

    def _has_beyond(self, reader: CacheReader) -> npt.NDArray[np.bool_]:
        """Return a mask of the items with a token beyond the student's logits: [items]."""
        starts, lengths = reader.item_starts(), reader.item_lengths()
        used = lengths if self.max_tokens is None else np.minimum(lengths, self.max_tokens)
        has_beyond = np.zeros(len(starts), bool)
        for first in range(0, reader.n_entries, _SCAN_ENTRIES):
            ids_N = np.asarray(reader.arrays["input_ids"][first : first + _SCAN_ENTRIES])
            at = first + np.flatnonzero(ids_N >= self.student_vocab_size)
            item = np.searchsorted(starts, at, side="right") - 1
            # Entries between items, or after the last token, are ignored.
            inside = (item >= 0) & (at < (starts + used)[item])
            has_beyond[item[inside]] = True
        return has_beyond

    def _check_first_item(self) -> None:
        """Refuse a cache whose first targets contradict its tokens. ``dask-logits verify`` checks all of it."""
        if not int(self._starts[-1]) - len(self._left_out):
            return
        reader, start, stop, segments_S3 = self._span(0, min(self.max_tokens or _CHECKED_TOKENS, _CHECKED_TOKENS))
        arrays = {**reader.profile.decode(reader.stored(start, stop)), "segments": segments_S3}
        item = {name: _tensor(name, array) for name, array in _with_shares(arrays).items()}
        first = CachedItem(
            tensors={**item, "row": torch.tensor(0)},
            vocab_size=self.vocab_size,
            temperatures=self.temperatures,
            draws=self.draws,
        )
        batch = collate([first])
        try:
            batch["targets"].check_alignment(batch["input_ids"])
        except DatasetError as error:
            raise CacheError.at(reader.path, f"{error}") from error

    def _window(self, index: int, width: int) -> dict[str, npt.NDArray[Any]]:
        """Return one window of the stream: the tail of an item, whole items, and the head of another."""
        first, stop = index * width, min((index + 1) * width, int(self._ends[-1]))
        ranges: list[tuple[CacheReader, int, int]] = []
        segments: list[npt.NDArray[np.int64]] = []
        item = int(np.searchsorted(self._ends, first, side="right"))
        at = first
        while at < stop:
            reader, begin, end, segments_S3 = self._span(item, self.max_tokens)
            skip = at - (int(self._ends[item]) - (end - begin))
            take = min(end - begin - skip, stop - at)
            if ranges and ranges[-1][0] is reader and ranges[-1][2] == begin + skip:
                # Adjacent items are read, and their chunks decompressed, once.
                ranges[-1] = (reader, ranges[-1][1], begin + skip + take)
            else:
                ranges.append((reader, begin + skip, begin + skip + take))
            segments.append(_cut_segments(segments_S3, skip, take))
            at += take
            item += 1
        parts = [self._tokens(*entries) for entries in ranges]
        for part in parts[:-1]:
            _forget_last_label(part)
        n_before = 0
        for part in parts:
            if "target_pos" in part:
                part["target_pos"] = part["target_pos"] + np.uint64(n_before)
            n_before += len(part["input_ids"])
        found = parts[0]
        if len(parts) > 1:
            found = {name: np.concatenate([part[name] for part in parts]) for name in found}
        return {**found, "segments": np.concatenate(segments)}

    def _tensors(self, found: dict[str, npt.NDArray[Any]]) -> CachedItem:
        item = {name: _tensor(name, array) for name, array in _with_shares(found).items()}
        item["row"] = torch.tensor(int(found["segments"][0, 0]))
        if self.decode == "worker" and self.student_vocab_size is not None:
            item = self._within(item, self.student_vocab_size)
        if self.decode == "worker" and not self.draws and self.top_k < item["topk_ids"].shape[1]:
            item = _cut(item, self.top_k, self.temperatures)
        return CachedItem(
            tensors=item,
            vocab_size=min(self.vocab_size, self.student_vocab_size or self.vocab_size),
            temperatures=self.temperatures,
            draws=self.draws,
            tables_digest=self.tables_digest,
        )

    def _within(self, item: dict[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
        """Move entries beyond the student's logits to the end, and add their mass to the tail."""
        if len(item["input_ids"]) and int(item["input_ids"].max()) >= vocab_size:
            raise DatasetError(
                f"student_vocab_size: expected input ids below {vocab_size}, got {int(item['input_ids'].max())} in "
                f"dataset row {int(item['row'])}; leave such documents out with skip_unrepresentable=True, or give the "
                "student embeddings for the teacher's vocabulary",
                row=int(item["row"]),
            )
        beyond_TK = item["topk_ids"] >= vocab_size
        item["n_beyond"] = beyond_TK.sum()
        if item["n_beyond"]:
            order_TK = beyond_TK.to(torch.uint8).argsort(dim=-1, stable=True)
            lost_T = torch.where(beyond_TK, item["topk_logprobs"].float(), -torch.inf).logsumexp(-1)
            item["tail_logmass"] = torch.logaddexp(item["tail_logmass"], lost_T)
            if self.temperatures:
                item["tail_logmass_T"] = tails_with_dropped(
                    item["tail_logmass_T"], self.temperatures, item["topk_logprobs"], beyond_TK
                )
            item["topk_ids"] = item["topk_ids"].masked_fill(beyond_TK, 0).gather(-1, order_TK)
            item["topk_logprobs"] = item["topk_logprobs"].masked_fill(beyond_TK, -torch.inf).gather(-1, order_TK)
        return item


def _with_shares(arrays: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Replace the counts of draws by the logs of their shares, as many as the widest position has."""
    if "topk_counts" not in arrays:
        return arrays
    width = max(1, int(np.count_nonzero(arrays["topk_counts"], axis=1).max(initial=0)))
    cut = {name: arrays[name][:, :width] for name in ("topk_ids", "topk_counts")}
    return as_distribution({**arrays, **cut})


def _forget_last_label(part: dict[str, npt.NDArray[Any]]) -> None:
    """Remove the label of the last token, behind which other tokens follow than those that the teacher read."""
    last = len(part["input_ids"]) - 1
    is_last = part["target_pos"] == last if "target_pos" in part else np.arange(last + 1) == last
    part["label_logprob"] = np.where(is_last, np.nan, part["label_logprob"]).astype(part["label_logprob"].dtype)


def _half(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Round to float16 with vector instructions, which numpy does not use."""
    rounded: npt.NDArray[Any] = torch.from_numpy(array).half().numpy()
    return rounded


def _loaded(tokenizer: HasVocabulary | str | Path) -> HasVocabulary:
    """Return a tokenizer, loading it if its folder or hub name is given."""
    if not isinstance(tokenizer, str | Path):
        if not hasattr(tokenizer, "get_vocab"):
            raise ConfigError(
                f"student_tokenizer: expected a tokenizer, or its folder or hub name, got {type(tokenizer).__name__}"
            )
        return tokenizer
    folder = expanded(tokenizer)
    is_local = isinstance(tokenizer, Path) or tokenizer.startswith((".", "/", "~")) or tokenizer.count("/") > 1
    if is_local and not folder.is_dir():
        raise ConfigError(
            f"student_tokenizer: expected a folder with a tokenizer, got {tokenizer!r}, which does not exist"
        )
    from transformers import AutoTokenizer

    try:
        loaded: HasVocabulary = AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else str(tokenizer))
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise ConfigError(
            f"student_tokenizer: expected a tokenizer, its folder or its hub name, got {str(tokenizer)!r}: "
            f"{first_line(error)}"
        ) from error
    return loaded


def _tensor(name: str, array: npt.NDArray[Any]) -> Tensor:
    """Copy an array, because torch writes to its inputs. Log-masses of a code become float32."""
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
    """Return the items of several caches in dataset order. None if they already are in order."""
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


def _cut(item: dict[str, Tensor], top_k: int, temperatures: tuple[float, ...]) -> dict[str, Tensor]:
    """Drop the entries after the first `top_k`, and add their mass to the tail."""
    if temperatures:
        is_dropped_K = torch.arange(item["topk_ids"].shape[1]) >= top_k
        tails = tails_with_dropped(item["tail_logmass_T"], temperatures, item["topk_logprobs"], is_dropped_K)
        item = {**item, "tail_logmass_T": tails}
    dropped_T = item["topk_logprobs"][:, top_k:].float().logsumexp(-1)
    return {
        **item,
        "topk_ids": item["topk_ids"][:, :top_k].contiguous(),
        "topk_logprobs": item["topk_logprobs"][:, :top_k].contiguous(),
        "tail_logmass": torch.logaddexp(item["tail_logmass"], dropped_T),
    }
