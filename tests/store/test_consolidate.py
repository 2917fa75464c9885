from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from builders import records

from dask_logits.errors import CacheError
from dask_logits.records import ContentDigest, Records, Statistics
from dask_logits.store.cache import CacheReader
from dask_logits.store.consolidate import PartitionPiece, consolidate
from dask_logits.store.partition import write_partition

PARTS = [(3, 0, 2), (0,), (5, 1)]


def commit(folder, made: Records, index: int) -> dict:
    attempt = f"{index:06d}.x.zarr"
    write_partition(folder / attempt, made)
    digest = ContentDigest()
    digest.update_records(made)
    return {
        "attempt": attempt,
        "first_row": int(made.document_row[0]),
        "n_rows": made.n_documents,
        "digests": digest.array_digests(),
        "statistics": dataclasses.asdict(Statistics.of(made)),
    }


@pytest.fixture
def parts(tmp_path):
    made, row = [], 0
    for i, lengths in enumerate(PARTS):
        made.append(records(lengths, seed=i, first_row=row))
        row += len(lengths)
    return made, [commit(tmp_path / "partitions", part, i) for i, part in enumerate(made)]


def run(tmp_path, receipts) -> str:
    return consolidate(
        tmp_path / "c.h5",
        lambda: [PartitionPiece(path=tmp_path / "partitions" / r["attempt"], receipt=r) for r in receipts],
        n_rows=6,
        top_k=2,
        vocab_size=50,
        packed=False,
        attributes={"run_id": "r"},
    )


def test_the_cache_is_the_partitions_one_after_the_other(tmp_path, parts) -> None:
    made, receipts = parts
    expected = ContentDigest()
    for part in made:
        expected.update_records(part)
    assert run(tmp_path, receipts) == expected.hexdigest()
    reader = CacheReader(tmp_path / "c.h5")
    np.testing.assert_array_equal(reader.arrays["document_row"], range(6))
    np.testing.assert_array_equal(reader.document_start, [0, 3, 3, 5, 5, 10])
    np.testing.assert_array_equal(reader.arrays["topk_ids"], np.concatenate([part.topk_ids for part in made]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.h5", "partitions"]


def test_doing_it_again_gives_the_same_bytes(tmp_path, parts) -> None:
    run(tmp_path, parts[1])
    once = CacheReader(tmp_path / "c.h5").attributes["content_digest"]
    (tmp_path / ".c.h5.99.tmp").write_bytes(b"left by a crash")
    assert run(tmp_path, parts[1]) == once
    assert not (tmp_path / ".c.h5.99.tmp").exists()


@pytest.mark.parametrize("damage", ["digest", "missing", "gap", "short"])
def test_a_damaged_partition_leaves_the_older_cache_as_it_was(tmp_path, parts, damage) -> None:
    (tmp_path / "c.h5").write_bytes(b"older")
    receipts = parts[1]
    if damage == "digest":
        receipts[2]["digests"]["tail_logmass"] = "0" * 64
    elif damage == "missing":
        receipts[1]["attempt"] = "000001.gone.zarr"
    else:
        del receipts[1 if damage == "gap" else 2]
    with pytest.raises(CacheError, match="expected"):
        run(tmp_path, receipts)
    assert (tmp_path / "c.h5").read_bytes() == b"older"
    assert not list(tmp_path.glob(".c.h5*"))
