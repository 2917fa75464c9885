from __future__ import annotations

import dataclasses
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from builders import compact, content, items, packed_records, plain, records

from dask_logits.cache import pieces as module
from dask_logits.cache.partition import write_partition
from dask_logits.cache.pieces import PartitionPiece, cache_pieces, consolidate
from dask_logits.cache.profile import as_kept
from dask_logits.cache.reader import CacheReader
from dask_logits.errors import CacheError
from dask_logits.records import Records, Statistics

PARTS = [(3, 0, 2), (0,), (5, 1)]
PROFILES = {"plain": plain(), "compact": compact(), "recoded": compact(seed=1), "fine": compact(precision=12)}


def commit(folder, made: Records, index: int, profile) -> PartitionPiece:
    attempt = folder / f"{index:06d}.x.zarr"
    files = write_partition(attempt, made, profile)
    kept = as_kept(made, profile)
    receipt = SimpleNamespace(
        first_row=int(made.document_row[0]),
        n_rows=made.n_documents,
        files=files,
        content_digest=content(kept),
        statistics=Statistics.of(kept),
    )
    return PartitionPiece(path=attempt, receipt=receipt, profile=profile)


def changed(receipt: SimpleNamespace, **fields) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(receipt), **fields})


def partitions() -> list[Records]:
    made, row = [], 0
    for i, lengths in enumerate(PARTS):
        made.append(records(lengths, seed=i, first_row=row))
        row += len(lengths)
    return made


def committed(folder, profile) -> list[PartitionPiece]:
    return [commit(folder, made, i, profile) for i, made in enumerate(partitions())]


def run(path, pieces, profile=PROFILES["plain"], **settings) -> str:
    settings = {"n_rows": 6, "packed": False, "attributes": {"run_id": "r"}, **settings}
    return consolidate(path, lambda: pieces, profile=profile, **settings)


def check(path, expected: list[Records]) -> None:
    """Compare a cache with the records it should hold, document by document."""
    reader = CacheReader(path)
    reader.verify_checksums()
    found = list(items(reader))
    assert [int(item["row"]) for item in found] == list(range(len(found)))
    for name in ("input_ids", "topk_ids", "topk_logprobs", "logsumexp", "tail_logmass", "label_logprob"):
        here = np.concatenate([item[name] for item in found])
        np.testing.assert_array_equal(here, np.concatenate([getattr(made, name) for made in expected]))
    assert [len(item["input_ids"]) for item in found] == [
        length for made in expected for length in made.document_length
    ]


@pytest.mark.parametrize("before", PROFILES)
@pytest.mark.parametrize("after", PROFILES)
def test_the_cache_is_the_partitions_one_after_the_other(tmp_path, before: str, after: str) -> None:
    old, new = PROFILES[before], PROFILES[after]
    pieces = committed(tmp_path / "partitions", old)
    expected = [as_kept(as_kept(made, old), new) if old is not new else as_kept(made, old) for made in partitions()]
    digest = run(tmp_path / "c.h5", pieces, new)
    check(tmp_path / "c.h5", expected)
    reader = CacheReader(tmp_path / "c.h5")
    assert digest == content(*expected) == reader.attributes["content_digest"]
    aligned = [0, 3, 3, 5, 5, 10] if after == "plain" else [0, 3, 3, 8, 8, 13]
    np.testing.assert_array_equal(reader.arrays["document_start"], aligned)
    assert (reader.n_tokens, reader.n_entries) == (11, 11 if after == "plain" else 16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.h5", "partitions"]


def test_chunks_of_equal_profiles_are_copied_as_they_are(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = committed(tmp_path / "partitions", PROFILES["compact"])

    def never(*_: object) -> bytes:
        raise AssertionError("a chunk was compressed anew")

    monkeypatch.setattr("dask_logits.cache.writer.compress", never)
    run(tmp_path / "c.h5", pieces, PROFILES["compact"])
    with pytest.raises(AssertionError):
        run(tmp_path / "d.h5", pieces, PROFILES["recoded"])


@pytest.mark.parametrize("before", ["plain", "compact"])
@pytest.mark.parametrize("after", PROFILES)
def test_caches_are_cut_into_pieces_and_joined(tmp_path, before: str, after: str) -> None:
    """Two caches that hold every other partition become one."""
    old, new = PROFILES[before], PROFILES[after]
    pieces = committed(tmp_path / "partitions", old)
    for name, own in (("even", pieces[::2]), ("odd", pieces[1::2])):
        run(tmp_path / f"{name}.h5", own, old, n_rows=None)
    cut = [piece for name in ("even", "odd") for piece in cache_pieces(CacheReader(tmp_path / f"{name}.h5"))]
    cut.sort(key=lambda piece: piece.first_row)
    assert [(piece.first_row, piece.n_rows) for piece in cut] == [(0, 3), (3, 1), (4, 2)]
    kept = [as_kept(made, old) for made in partitions()]
    expected = kept if old is new else [as_kept(made, new) for made in kept]
    assert run(tmp_path / "c.h5", cut, new) == content(*expected)
    check(tmp_path / "c.h5", expected)


@pytest.mark.parametrize("after", ["plain", "compact"])
def test_packed_blocks_follow_the_gaps_between_pieces(tmp_path, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = {"plain": plain(3), "compact": compact(3)}[after]
    first = packed_records()
    second = dataclasses.replace(first, document_row=first.document_row + 4)
    pieces = [commit(tmp_path / "partitions", made, i, profile) for i, made in enumerate((first, second))]
    pieces = [
        dataclasses.replace(piece, receipt=changed(piece.receipt, n_rows=4, first_row=4 * i))
        for i, piece in enumerate(pieces)
    ]
    digest = run(tmp_path / "c.h5", pieces, profile, n_rows=8, packed=True)
    reader = CacheReader(tmp_path / "c.h5")
    found = list(items(reader))
    kept = as_kept(first, profile)
    assert np.concatenate([item["input_ids"] for item in found]).tolist() == 2 * kept.input_ids.tolist()
    assert [item["segments"].tolist() for item in found[3:]] == [
        [[4, 0, 4], [5, 0, 0], [6, 0, 2]],
        [[7, 0, 6]],
        [[7, 6, 1]],
    ]
    # Whatever number of blocks is hashed at a time, and cut into pieces again.
    for tokens in (1, 7, 1 << 16):
        monkeypatch.setattr("dask_logits.cache.reader._DIGEST_TOKENS", tokens)
        assert run(tmp_path / "d.h5", list(cache_pieces(reader)), profile, n_rows=8, packed=True) == digest


def test_doing_it_again_gives_the_same_bytes(tmp_path) -> None:
    pieces = committed(tmp_path / "partitions", PROFILES["compact"])
    run(tmp_path / "c.h5", pieces, PROFILES["compact"])
    once = (tmp_path / "c.h5").read_bytes()
    (tmp_path / ".c.h5.99.tmp").write_bytes(b"left by a crash")
    run(tmp_path / "c.h5", pieces, PROFILES["compact"])
    assert (tmp_path / "c.h5").read_bytes() == once
    assert not (tmp_path / ".c.h5.99.tmp").exists()


def test_a_writer_whose_successor_has_begun_leaves_its_file_alone(tmp_path) -> None:
    pieces = committed(tmp_path / "partitions", PROFILES["plain"])
    has_successor, errors = threading.Event(), []

    def suspended() -> None:
        try:
            run(tmp_path / "c.h5", pieces, on_piece=lambda: has_successor.wait(60))
        except OSError as error:
            errors.append(error)

    first = threading.Thread(target=suspended)

    def ends_meanwhile() -> None:
        has_successor.set()
        first.join(60)

    first.start()
    while first.is_alive() and not list(tmp_path.glob(".c.h5.*")):
        time.sleep(0.01)
    run(tmp_path / "c.h5", pieces, on_piece=ends_meanwhile)
    assert len(errors) == 1
    check(tmp_path / "c.h5", partitions())
    assert not list(tmp_path.glob(".c.h5*"))


@pytest.mark.parametrize("profile", ["plain", "compact"])
@pytest.mark.parametrize("damage", ["crc", "missing", "gap", "short", "tokens"])
def test_a_damaged_partition_leaves_the_older_cache_as_it_was(tmp_path, profile: str, damage: str) -> None:
    (tmp_path / "c.h5").write_bytes(b"older")
    pieces = committed(tmp_path / "partitions", PROFILES[profile])
    receipt = pieces[2].receipt
    if damage == "crc":
        size, crc = receipt.files["tail_logmass/c/0"]
        receipt = changed(receipt, files={**receipt.files, "tail_logmass/c/0": (size, crc ^ 1)})
    elif damage == "tokens":
        receipt = changed(receipt, statistics=receipt.statistics.model_copy(update={"tokens": 7}))
    elif damage == "missing":
        pieces[1] = dataclasses.replace(pieces[1], path=tmp_path / "partitions" / "000001.gone.zarr")
    else:
        del pieces[1 if damage == "gap" else 2]
    if len(pieces) == 3:
        pieces[2] = dataclasses.replace(pieces[2], receipt=receipt)
    with pytest.raises(CacheError, match="expected"):
        run(tmp_path / "c.h5", pieces, PROFILES[profile])
    assert (tmp_path / "c.h5").read_bytes() == b"older"
    assert not list(tmp_path.glob(".c.h5*"))


def test_memory_does_not_grow_with_the_cache(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache is copied some chunks at a time, each no more than a fixed number."""
    made = records((4 * 1_000,), seed=9)
    piece = commit(tmp_path / "partitions", made, 0, PROFILES["compact"])
    run(tmp_path / "a.h5", [piece], PROFILES["compact"], n_rows=1)
    monkeypatch.setattr(module, "_CHUNKS", 16)
    (cut,) = cache_pieces(CacheReader(tmp_path / "a.h5"))
    assert max(len(frames["topk_gaps_b0"]) for frames in cut.frames()) == 16
    assert sum(len(frames["topk_gaps_b0"]) for frames in cut.frames()) == 1_000
