from __future__ import annotations

import itertools

import numpy as np
import pytest
import zarr
from builders import compact, packed_records, plain, records

from dask_logits.cache.chunks import compress
from dask_logits.cache.partition import BLOCK_TOKENS, PartitionReader, write_partition
from dask_logits.cache.profile import as_kept
from dask_logits.errors import CacheError

PROFILES = [plain(), compact(), compact(chunk_tokens=2), compact(precision=12)]


@pytest.mark.parametrize(
    ("lengths", "profile"),
    [
        *itertools.product([(3, 0, 2), (0,), (1,)], PROFILES),
        # Thousands of chunks would take seconds.
        *itertools.product(
            [(BLOCK_TOKENS,), (BLOCK_TOKENS + 1, 5)],
            [plain(), compact(chunk_tokens=64), compact(precision=12, chunk_tokens=64)],
        ),
    ],
)
def test_a_partition_reads_back_as_it_was_written(lengths, profile, tmp_path) -> None:
    made = records(lengths)
    files = write_partition(tmp_path / "p.zarr", made, profile)
    reader = PartitionReader(tmp_path / "p.zarr", profile)
    reader.check(files)
    assert reader.n_tokens == sum(lengths)
    for name, array in reader.records().arrays():
        expected = getattr(as_kept(made, profile), name)
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)


def test_packed_blocks_are_kept(tmp_path) -> None:
    made = packed_records()
    write_partition(tmp_path / "p.zarr", made, plain(3))
    found = PartitionReader(tmp_path / "p.zarr", plain(3)).records()
    np.testing.assert_array_equal(found.block_length, made.block_length)


def test_chunks_are_those_of_the_planes(tmp_path) -> None:
    profile, made = compact(), records((3, 0, 7))
    write_partition(tmp_path / "p.zarr", made, profile)
    arrays = dict(made.arrays())
    stored = profile.encode(arrays)
    padded = np.concatenate([stored["topk_gaps_b0"], np.zeros((2, 2), np.uint8)])
    found = PartitionReader(tmp_path / "p.zarr", profile).chunks("topk_gaps_b0")
    assert found == [compress(padded[first : first + 4]) for first in (0, 4, 8)]


@pytest.mark.parametrize("profile", [plain(), compact(), compact(precision=12, chunk_tokens=64)])
def test_every_file_is_what_zarr_writes(profile, tmp_path) -> None:
    write_partition(tmp_path / "p.zarr", records((BLOCK_TOKENS if profile.name == "plain" else 300, 7)), profile)
    group = zarr.open_group(str(tmp_path / "p.zarr"), mode="r")
    names = list(group.array_keys())
    assert {*profile.arrays, "document_length"} <= set(names)
    for name in names:
        # Otherwise chunks of zeros would be left out.
        copy = zarr.create_array(
            str(tmp_path / "copy.zarr" / name),
            shape=group[name].shape,
            dtype=group[name].dtype,
            chunks=group[name].chunks,
            shards=group[name].shards,
            compressors=group[name].compressors or None,
            config={"write_empty_chunks": True},
        )
        copy[:] = group[name][:]
        files = sorted(file.relative_to(copy.store.root) for file in copy.store.root.rglob("*") if file.is_file())
        assert files == sorted(
            file.relative_to(tmp_path / "p.zarr" / name)
            for file in (tmp_path / "p.zarr" / name).rglob("*") if file.is_file()
        )  # fmt: skip
        for file in files:
            assert (tmp_path / "p.zarr" / name / file).read_bytes() == (copy.store.root / file).read_bytes()


def test_an_attempt_is_never_written_over(tmp_path) -> None:
    write_partition(tmp_path / "p.zarr", records(), plain())
    with pytest.raises(zarr.errors.ContainsGroupError):
        write_partition(tmp_path / "p.zarr", records(), plain())


def test_a_large_array_is_one_shard(tmp_path) -> None:
    files = write_partition(tmp_path / "p.zarr", records((BLOCK_TOKENS * 2 + 7,)), plain())
    assert [name for name in files if name.startswith("topk_ids/c/")] == ["topk_ids/c/0/0"]


@pytest.mark.parametrize("profile", PROFILES)
def test_a_missing_file_is_found_although_zarr_reads_zeros(profile, tmp_path) -> None:
    files = write_partition(tmp_path / "p.zarr", records(), profile)
    # Offsets are all zeros here, which Zarr by default does not store.
    (tmp_path / "p.zarr" / "document_offset" / "c" / "0").unlink()
    with pytest.raises(CacheError, match=r"document_offset/c/0: expected .* got nothing"):
        PartitionReader(tmp_path / "p.zarr", profile).check(files)


@pytest.mark.parametrize("profile", [plain(5), compact(5)])
def test_every_flipped_bit_is_found(profile, tmp_path) -> None:
    files = write_partition(tmp_path / "p.zarr", records((9, 4), k=5), profile)
    reader = PartitionReader(tmp_path / "p.zarr", profile)
    draw = np.random.default_rng(0)
    assert len(files) == 1 + 2 * (len(profile.arrays) + 3)
    for name in files:
        path = tmp_path / "p.zarr" / name
        whole = path.read_bytes()
        for _ in range(5):
            damaged = bytearray(whole)
            bit = int(draw.integers(len(whole) * 8))
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(CacheError, match="the data are damaged"):
                reader.check(files)
        path.write_bytes(whole)
    reader.check(files)


def test_what_is_not_such_a_partition_is_refused(tmp_path) -> None:
    with pytest.raises(CacheError, match="expected a partition, got nothing"):
        PartitionReader(tmp_path / "missing.zarr", plain())
    zarr.create_group(str(tmp_path / "foreign.zarr"))
    with pytest.raises(CacheError, match=r"expected dask_logits\.partition version 2"):
        PartitionReader(tmp_path / "foreign.zarr", plain())
    write_partition(tmp_path / "p.zarr", records(), plain())
    with pytest.raises(CacheError, match=r"version 2, compact, got .*plain"):
        PartitionReader(tmp_path / "p.zarr", compact())


@pytest.mark.parametrize("profile", [plain(5), compact(5, precision=10, chunk_tokens=64)])
def test_zarr_reads_the_same(profile, tmp_path) -> None:
    write_partition(tmp_path / "p.zarr", records((9, BLOCK_TOKENS), k=5), profile)
    reader, group = PartitionReader(tmp_path / "p.zarr", profile), zarr.open_group(str(tmp_path / "p.zarr"), mode="r")
    assert set(group.array_keys()) == {*profile.arrays, "document_row", "document_offset", "document_length"}
    for name, array in group.arrays():
        np.testing.assert_array_equal(np.concatenate(list(reader.blocks(name))), array[:])


@pytest.mark.parametrize("damage", ["metadata", "shard", "short", "chunk"])
def test_what_cannot_be_read_is_named(damage, tmp_path) -> None:
    write_partition(tmp_path / "p.zarr", records(), plain())
    shard = tmp_path / "p.zarr" / "logsumexp" / "c" / "0"
    if damage == "metadata":
        (tmp_path / "p.zarr" / "logsumexp" / "zarr.json").write_text("{}")
    elif damage == "shard":
        shard.unlink()
    elif damage == "short":
        shard.write_bytes(b"x")
    else:
        shard.write_bytes(b"xx" + shard.read_bytes()[2:])
    with pytest.raises(CacheError, match="expected to read logsumexp, got"):
        list(PartitionReader(tmp_path / "p.zarr", plain()).blocks("logsumexp"))
