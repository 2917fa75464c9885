"""Look into a cache: what the teacher expected at each token of a document, in a page on this machine.

Documents are read when they are asked for. "Most surprising" means within a bounded sample, and a search reads a
bounded number of tokens per request and goes on from there, so that a cache of any size opens at once. The page is
served on loopback only, and requests under another host name are refused: a web site could have pointed it here (DNS
rebinding).

Dimension letters: N tokens, M positions with targets, K kept entries.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np

from dask_logits.cache.find import CacheFiles
from dask_logits.cache.reader import CacheReader
from dask_logits.errors import CacheError, ClusterError, ConfigError
from dask_logits.files.atomic import Json, expanded, replace_text, room
from dask_logits.observe.explore_page import POLICY, explore_page
from dask_logits.observe.sample import decoded, sample_cache, tokenizer_of
from dask_logits.records import Array, as_distribution

_HOST = "127.0.0.1"
# Tokens of a document that are sent at once.
_PART_TOKENS = 512
# Entries of each position that are sent. The mass of the others is summed.
_SENT_ENTRIES = 16
_MOST_SURPRISING = 30
_MOST_MATCHES = 30
# Tokens that one search request reads.
_SEARCH_TOKENS = 8 << 20
_SEARCH_BLOCK = 1 << 20
_UNDECODABLE = "\N{REPLACEMENT CHARACTER}"


class Explorer:
    """Answers what a page asks about a cache. Safe to use from several threads.

    Parameters
    ----------
    path
        A cache, an index over several, or a run folder.

    Raises
    ------
    CacheError
        If it is not a complete cache.
    """

    def __init__(self, path: str | Path) -> None:
        self.cache = CacheFiles.open(expanded(path))
        # None if it is not on this machine.
        self.tokenizer: Any | None = tokenizer_of(self.cache)
        # A tokenizer serves one thread at a time.
        self._lock = threading.Lock()
        self._text = functools.cache(self._decoded)

    def about(self) -> Json:
        """Return sizes and names."""
        first = self.cache.readers[0]
        return {
            "path": str(self.cache.path),
            "teacher": str(first.attributes.get("teacher_path") or "unknown teacher"),
            "items": self.cache.firsts[-1],
            "noun": "block" if first.is_packed else "document",
            "tokens": self.cache.n_tokens,
            "top_k": first.top_k,
            "draws": first.profile.extras.draws,
            "decoded": self.tokenizer is not None,
            "masked": first.profile.extras.is_masked,
        }

    def document(self, number: int, first: int = 0, n_tokens: int = _PART_TOKENS) -> Json:
        """Return some tokens of an item with what the teacher expected in their place.

        Parameters
        ----------
        number
            The item, counted from 0.
        first, n_tokens
            The first token, and how many.

        Returns
        -------
        dict
            ``ids`` and ``texts`` of the tokens. ``surprise`` of each in nats, None if unknown. ``best``, the most
            probable [id, text, probability] in its place, the probability of the ``others`` that are kept, and of the
            ``tail``. Of draws, the probabilities are the shares. A place without an expectation, such as the first, or
            one after a position without targets, has None for each. ``learned``, of masked data: whether a
            student learns the token.

        Raises
        ------
        ConfigError
            If there is no such item.
        CacheError
            If it is damaged.
        """
        n_items = self.cache.firsts[-1]
        if not 0 <= number < n_items:
            raise ConfigError(f"document: expected a number from 0 to {n_items - 1}, got {number}")
        reader, index = self.cache.find(number)
        start, stop, segments = reader.place(index)
        first = max(0, min(first, stop - start - 1))
        # The targets of a token are those of the position before it.
        before = min(first, 1)
        arrays = reader.tokens(start + first - before, min(stop, start + first + n_tokens))
        ids = arrays["input_ids"].tolist()
        surprise_N, best, others, tail = self._expected(arrays)
        missing = [None] * (1 - before) if ids else []
        learned = arrays["loss_mask"][:-1].astype(bool).tolist() if "loss_mask" in arrays else None
        found = reader.segments(segments)["segments"]
        return {
            "number": number,
            "row": int(found[0, 0]),
            "offset": int(found[0, 1]),
            "n_tokens": stop - start,
            "first": first,
            "ids": ids[before:],
            "texts": self._pieces(ids)[before:],
            "surprise": [*missing, *surprise_N],
            "learned": None if learned is None else [*missing, *learned],
            "best": [*missing, *best],
            "others": [*missing, *others],
            "tail": [*missing, *tail],
        }

    def _expected(self, arrays: dict[str, Array]) -> Iterator[list[Any]]:
        """Yield surprise, best entries, mass of the others and of the tail for all positions but the last."""
        n_positions = max(0, len(arrays["input_ids"]) - 1)
        target_pos = arrays.get("target_pos", np.arange(len(arrays["topk_ids"])))
        places = target_pos[target_pos < n_positions].tolist()
        is_drawn = "topk_counts" in arrays
        upto, shown = len(places), min(_SENT_ENTRIES, arrays["topk_ids"].shape[1])
        of_entries = as_distribution(arrays)
        p_MK = np.exp(of_entries["topk_logprobs"][:upto].astype(np.float64))
        surprise = [
            None if math.isnan(value) else round(value, 3) if math.isfinite(value) else 1e9
            for value in (-arrays["label_logprob"][:upto].astype(np.float64)).tolist()
        ]
        best = [
            [[i, self._text(i), round(p, 6)] for i, p in zip(ids, ps, strict=True) if p or not is_drawn]
            for ids, ps in zip(arrays["topk_ids"][:upto, :shown].tolist(), p_MK[:, :shown].tolist(), strict=True)
        ]
        others = p_MK[:, shown:].sum(1).round(6).tolist()
        tail = np.exp(of_entries["tail_logmass"][:upto].astype(np.float64)).round(6).tolist()
        for values in (surprise, best, others, tail):
            known = dict(zip(places, values, strict=True))
            yield [known.get(position) for position in range(n_positions)]

    def _decoded(self, token: int) -> str:
        """Return the text of a token by itself."""
        with self._lock:
            text = decoded(self.tokenizer, [token])
            if self.tokenizer is not None and _UNDECODABLE in text:
                text = str(self.tokenizer.convert_ids_to_tokens(token))
        return text

    def _pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the part of the text that each token adds, empty where a character needs further tokens."""
        if self.tokenizer is None:
            return [f"{token} " for token in ids]
        pieces, begin, read = [], 0, 0
        with self._lock:
            for i in range(len(ids)):
                # Decoded with the tokens before it, because some tokenizers drop a leading space.
                text = decoded(self.tokenizer, ids[begin : i + 1])
                if text.endswith(_UNDECODABLE) and i - read < 4:
                    pieces.append("")
                    continue
                pieces.append(text[len(decoded(self.tokenizer, ids[begin:read])) :])
                begin, read = read, i + 1
        return pieces

    @functools.cached_property
    def surprising(self) -> Json:
        """The documents of a bounded sample whose tokens surprise the teacher most."""
        sample = sample_cache(self.cache, self.tokenizer)
        known = (each for each in sample.documents if not math.isnan(each.surprise))
        ranked = sorted(known, key=lambda each: -each.surprise)
        with self._lock:
            found = [
                {"number": each.number, "row": each.row, "surprise": round(min(each.surprise, 1e9), 3),
                 "text": sample.text(each.opening_ids)}
                for each in ranked[:_MOST_SURPRISING]
            ]  # fmt: skip
        return {"found": found, "sampled": len(sample.documents), "items": sample.n_documents}

    def search(self, query: str, file: int = 0, entry: int = 0) -> Json:
        """Find a text or a token in the next tokens of the cache.

        Parameters
        ----------
        query
            A token id such as ``#42``, or a text. A text is found where it is made of the tokens that the tokenizer
            gives it, at the beginning of a line or after a space.
        file, entry
            Where to begin, as returned in ``next``.

        Returns
        -------
        dict
            ``found`` items with the position of the match, ``next`` as [file, entry] or None at the end, and
            ``read``, the number of tokens that were read.

        Raises
        ------
        ConfigError
            If the query is empty, or a text without a tokenizer, or if the place lies outside the cache.
        """
        if min(file, entry) < 0:
            raise ConfigError(
                f"search: expected a place in the cache, got {[file, entry]}; give the last answer's next"
            )
        patterns = self._patterns(query)
        found: list[Json] = []
        left = _SEARCH_TOKENS
        while file < len(self.cache.readers):
            reader = self.cache.readers[file]
            ids_N = reader.arrays["input_ids"]
            while entry < len(ids_N) and left > 0:
                stop = min(len(ids_N), entry + _SEARCH_BLOCK)
                for at, length in _matches(reader, entry, stop, patterns, _MOST_MATCHES - len(found)):
                    found.append(self._match(file, at, length))
                    if len(found) == _MOST_MATCHES:
                        return {"found": found, "next": [file, at + 1], "read": _SEARCH_TOKENS - left + at - entry + 1}
                left -= stop - entry
                entry = stop
            if entry < len(ids_N):
                return {"found": found, "next": [file, entry], "read": _SEARCH_TOKENS - left}
            file, entry = file + 1, 0
        return {"found": found, "next": None, "read": _SEARCH_TOKENS - left}

    def _patterns(self, query: str) -> list[list[int]]:
        if query.startswith("#") and query[1:].isascii() and query[1:].isdigit():
            return [[int(query[1:])]]
        if not query or self.tokenizer is None:
            expected = "a token id such as #42" if self.tokenizer is None else "a text, or a token id such as #42"
            raise ConfigError(f"search: expected {expected}, got {query!r}")
        with self._lock:
            tried = [self.tokenizer.encode(text, add_special_tokens=False) for text in (query, f" {query}")]
        return [ids for ids in tried if ids]

    def _match(self, file: int, at: int, length: int) -> Json:
        """Return the item of an entry."""
        reader = self.cache.readers[file]
        index = int(_items_at(reader, np.array([at]))[0])
        start, stop, _ = reader.place(index)
        near = reader.arrays["input_ids"][max(start, at - 6) : min(stop, at + length + 6)].tolist()
        with self._lock:
            text = decoded(self.tokenizer, near)
        return {"number": self.cache.firsts[file] + index, "position": at - start, "text": text}


def _items_at(reader: CacheReader, entries_M: Array) -> Array:
    """Return the last item that begins at or before each entry, -1 before the first: [M] int64."""
    starts = reader.arrays["block_start" if reader.is_packed else "document_start"]
    # In the array's dtype, because numpy would convert the whole array otherwise. Documents without tokens begin where
    # the next one does.
    items_M: Array = np.searchsorted(starts, entries_M.astype(starts.dtype), side="right") - 1
    return items_M


def _matches(
    reader: CacheReader, entry: int, stop: int, patterns: Sequence[Sequence[int]], most: int
) -> list[tuple[int, int]]:
    """Return the first entries from `entry` to `stop` at which a pattern begins that lies in one item, and its length.

    Where documents are short, most matches may reach into the next one, so they are dropped all at once.
    """
    ids_N, name = reader.arrays["input_ids"], "block" if reader.is_packed else "document"
    starts, lengths = reader.arrays[f"{name}_start"], reader.arrays[f"{name}_length"]
    if not len(starts):
        return []
    found: dict[int, int] = {}
    for pattern in patterns:
        block = np.asarray(ids_N[entry : stop + len(pattern) - 1])
        n = min(stop - entry, len(block) - len(pattern) + 1)
        if n > 0:
            hits = np.logical_and.reduce([block[i : i + n] == token for i, token in enumerate(pattern)])
            at_M = np.flatnonzero(hits) + entry
            items_M = _items_at(reader, at_M)
            ends_M = starts[items_M].astype(np.int64) + lengths[items_M].astype(np.int64)
            is_inside = (items_M >= 0) & (at_M + len(pattern) <= ends_M)
            found.update(dict.fromkeys(at_M[is_inside][:most].tolist(), len(pattern)))
    return sorted(found.items())[:most]


class ExploreServer(ThreadingHTTPServer):
    """Serves the page of one cache on loopback. ``serve_forever`` runs it, and closing it ends it.

    Parameters
    ----------
    explorer
        The cache.
    port
        The port, 0 for any that is free.

    Raises
    ------
    ClusterError
        If the port is taken.
    """

    daemon_threads = True

    def __init__(self, explorer: Explorer, port: int = 0) -> None:
        self.explorer = explorer
        try:
            super().__init__((_HOST, port), _Handler)
        except OSError as error:
            raise ClusterError(f"--port: expected a free port, got {port} ({error}); leave it out") from error

    @property
    def address(self) -> str:
        """Address of the page."""
        return f"http://{_HOST}:{self.server_port}/"

    def answer(self, path: str, query: dict[str, str]) -> Json | str | None:
        """Return the page, JSON, or None if there is no such path."""
        if path == "/":
            return explore_page(self.explorer.about())
        if path == "/document":
            return self.explorer.document(int(query["number"]), int(query.get("first", "0")))
        if path == "/surprising":
            return self.explorer.surprising
        if path == "/search":
            return self.explorer.search(
                query.get("query", ""), int(query.get("file", "0")), int(query.get("entry", "0"))
            )
        return None


class _Handler(BaseHTTPRequestHandler):
    server: ExploreServer
    protocol_version = "HTTP/1.1"
    # A viewer that sends nothing must not keep a thread.
    timeout = 60

    def handle(self) -> None:
        # A viewer may leave at any time.
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        port = self.server.server_port
        if self.headers.get("Host") not in (f"{_HOST}:{port}", f"localhost:{port}"):
            return self._send(403, {"error": f"expected the address {self.server.address}"})
        parts = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        try:
            answer = self.server.answer(parts.path, query)
        except (ConfigError, CacheError) as error:
            return self._send(400, {"error": error.message})
        except (KeyError, ValueError) as error:
            return self._send(400, {"error": f"expected whole numbers, got {query}: {error}"})
        return self._send(404, {"error": "not found"}) if answer is None else self._send(200, answer)

    def _send(self, status: int, answer: Json | str) -> None:
        is_page = isinstance(answer, str)
        data = (answer if isinstance(answer, str) else json.dumps(answer)).encode("utf-8", "replace")
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8" if is_page else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: the terminal shows the address alone."""


def write_explorer(path: str | Path, output: str | Path, documents: Sequence[int]) -> Path:
    """Write some documents as one self-contained page.

    Parameters
    ----------
    path
        A cache, an index or a run folder.
    output
        The file to write.
    documents
        Numbers of documents (or packed blocks), counted from 0. The first 2,048 tokens of each are shown.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ConfigError
        If there is no such document, or none is given.
    CacheError
        If it is not a complete cache.
    CapacityError
        If the file cannot be written.
    """
    if not documents:
        raise ConfigError("documents: expected at least one number, got none; name them as in --documents 0,5,7")
    explorer, target = Explorer(path), expanded(output)
    shown = [explorer.document(number, n_tokens=4 * _PART_TOKENS) for number in documents]
    with room(target.parent):
        replace_text(target, explore_page(explorer.about(), shown).encode("utf-8", "replace").decode())
    return target
