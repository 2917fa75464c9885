from __future__ import annotations

import numpy as np
import pytest
import zarr
from builders import records

from dask_logits.errors import CacheError
from dask_logits.records import ContentDigest
from dask_logits.store.partition import BLOCK_TOKENS, PartitionReader, write_partition


def digests(made) -> dict[str, str]:
    digest = ContentDigest()
    digest.update_records(made)
    return digest.array_digests()


@pytest.mark.parametrize("lengths", [(3, 0, 2), (0,), (1,), (BLOCK_TOKENS,), (BLOCK_TOKENS + 1, 5)])
def test_a_partition_reads_back_as_it_was_written(lengths, tmp_path) -> None:
    made = records(lengths)
    write_partition(tmp_path / "p.zarr", made)
    reader = PartitionReader(tmp_path / "p.zarr")
    for name, array in reader.records().arrays():
        assert array.dtype == getattr(made, name).dtype
        np.testing.assert_array_equal(array, getattr(made, name))
    reader.check(digests(made))


def test_an_attempt_is_never_written_over(tmp_path) -> None:
    write_partition(tmp_path / "p.zarr", records())
    with pytest.raises(zarr.errors.ContainsGroupError):
        write_partition(tmp_path / "p.zarr", records())


def test_a_large_array_is_one_shard(tmp_path) -> None:
    write_partition(tmp_path / "p.zarr", records((BLOCK_TOKENS * 2 + 7,)))
    assert len(list((tmp_path / "p.zarr" / "topk_ids" / "c").rglob("*/*"))) <= 2


def test_a_missing_chunk_is_found_although_zarr_reads_zeros(tmp_path) -> None:
    made = records()
    write_partition(tmp_path / "p.zarr", made)
    for chunk in (tmp_path / "p.zarr" / "logsumexp" / "c").rglob("*"):
        if chunk.is_file():
            chunk.unlink()
    reader = PartitionReader(tmp_path / "p.zarr")
    with pytest.raises(CacheError, match="expected logsumexp with SHA-256"):
        reader.check(digests(made))


def test_every_flipped_bit_is_found(tmp_path) -> None:
    made = records((9, 4), k=5)
    write_partition(tmp_path / "p.zarr", made)
    draw = np.random.default_rng(0)
    chunks = [path for path in (tmp_path / "p.zarr").rglob("*") if path.is_file() and path.name != "zarr.json"]
    # All but the offsets, which are zeros here: Zarr does not store chunks of its fill value.
    assert len(chunks) == 8
    for path in chunks:
        whole = path.read_bytes()
        for _ in range(5):
            damaged = bytearray(whole)
            bit = int(draw.integers(len(whole) * 8))
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(CacheError, match="expected"):
                PartitionReader(tmp_path / "p.zarr").check(digests(made))
        path.write_bytes(whole)
    PartitionReader(tmp_path / "p.zarr").check(digests(made))


def test_what_is_not_a_partition_is_refused(tmp_path) -> None:
    with pytest.raises(CacheError, match="expected a partition, got nothing"):
        PartitionReader(tmp_path / "missing.zarr")
    zarr.create_group(str(tmp_path / "foreign.zarr"))
    with pytest.raises(CacheError, match=r"expected dask_logits\.partition version 1"):
        PartitionReader(tmp_path / "foreign.zarr")
