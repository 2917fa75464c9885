from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import pickle
import shutil
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import warm
from builders import compact, content, items, packed_records, plain, records, write_cache

from dask_logits.cache import reader as module
from dask_logits.cache.chunks import ChunkIndex
from dask_logits.cache.pieces import cache_pieces
from dask_logits.cache.profile import as_kept
from dask_logits.cache.reader import CacheReader
from dask_logits.cache.writer import CacheWriter
from dask_logits.errors import CacheError


@pytest.fixture
def path(tmp_path):
    write_cache(tmp_path / "c.h5", records((4, 0, 2, 7)), note={"a": 1})
    return tmp_path / "c.h5"


@pytest.fixture
def dense(tmp_path):
    write_cache(tmp_path / "d.h5", records((4, 0, 2, 7, 90), k=5), profile=compact(5))
    return tmp_path / "d.h5"


LARGE_CHUNKS = compact(1, precision=10, chunk_tokens=4096)


@pytest.mark.parametrize(
    ("lengths", "profile"),
    [
        *itertools.product([(4, 0, 2, 7), (0, 0), (1,)], [plain(1), compact(1), LARGE_CHUNKS]),
        *itertools.product([(400_000, 3)], [plain(1), LARGE_CHUNKS]),
        ((40_000, 3), compact(1)),
    ],
)
def test_documents_read_back_as_they_were_written(lengths, profile, tmp_path) -> None:
    made = as_kept(records(lengths, k=1), profile)
    assert write_cache(tmp_path / "c.h5", records(lengths, k=1), profile=profile) == content(made)
    reader = CacheReader(tmp_path / "c.h5")
    reader.verify_checksums()
    start = 0
    for index, (document, length) in enumerate(zip(items(reader), lengths, strict=True)):
        assert document["row"] == index
        for name in ("input_ids", "topk_ids", "topk_logprobs", "logsumexp", "tail_logmass", "label_logprob"):
            np.testing.assert_array_equal(document[name], getattr(made, name)[start : start + length])
        start += length


def test_any_hdf5_reader_opens_it(path) -> None:
    with h5py.File(path) as file:
        assert file.attrs["complete"]
        assert file.attrs["format_version"] == b"1.0"
        assert file["topk_ids"].chunks is None
        assert file["topk_ids"].shape == (13, 2)
    assert CacheReader(path).attributes["note"] == {"a": 1}


@pytest.mark.parametrize("profile", [plain(3, 300), compact(3, 300)])
def test_every_array_begins_where_its_values_can_be_mapped(profile, tmp_path) -> None:
    made = dataclasses.replace(records((4, 0, 2, 7), k=3, vocab_size=300), block_length=np.array([13], np.uint32))
    write_cache(tmp_path / "c.h5", made, vocab_size=300, profile=profile, token_crcs=np.arange(7, dtype=np.uint8))
    offsets = {}

    def note(name: str, item: h5py.Dataset | h5py.Group) -> None:
        if isinstance(item, h5py.Dataset) and item.chunks is None:
            offsets[name] = item.id.get_offset()

    with h5py.File(tmp_path / "c.h5") as file:
        file.visititems(note)
    assert {"input_ids", "block_start", "token_crcs", "crc32/logsumexp"} <= offsets.keys()
    assert not {name: offset for name, offset in offsets.items() if offset % 8}


def test_texts_lie_in_no_heap(tmp_path) -> None:
    # An attribute of more than 64 KiB, and letters of several bytes.
    note = {"é": "ü" * 100_000, "empty": ""}
    write_cache(tmp_path / "c.h5", records((4,)), note=note, teacher="", source="wörter/模型")
    said = CacheReader(tmp_path / "c.h5").attributes
    assert (said["note"], said["teacher"], said["source"]) == (note, "", "wörter/模型")
    assert b"GCOL" not in (tmp_path / "c.h5").read_bytes()


def test_a_large_vocabulary_takes_wide_ids(tmp_path) -> None:
    write_cache(tmp_path / "c.h5", records((3,), vocab_size=70_000), vocab_size=70_000)
    assert CacheReader(tmp_path / "c.h5").arrays["topk_ids"].dtype == np.uint32


def test_every_flipped_bit_of_every_array_is_found(path) -> None:
    reader = CacheReader(path)
    with h5py.File(path) as file:
        spans = {name: (file[name].id.get_offset(), file[name].nbytes) for name in reader.arrays}
    whole = path.read_bytes()
    draw = np.random.default_rng(1)
    for name, (offset, size) in spans.items():
        for _ in range(10):
            damaged = bytearray(whole)
            bit = int(draw.integers(size * 8))
            damaged[offset + bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(CacheError, match=f"expected CRC-32 .* for {name}"):
                CacheReader(path).verify_checksums()
    path.write_bytes(whole)
    CacheReader(path).verify_checksums()


def test_a_writer_may_choose_the_bytes_of_a_checksum(path) -> None:
    with h5py.File(path, "a") as file:
        for name in list(file["crc32"]):
            data = file[name][()].tobytes()
            del file["crc32"][name]
            file["crc32"][name] = np.array([zlib.crc32(data[at : at + 5]) for at in range(0, len(data), 5)], np.uint32)
        file.attrs["crc32_block_bytes"] = 5
    CacheReader(path).verify_checksums()


def test_a_disk_that_fails_under_the_map_is_a_message(path, monkeypatch) -> None:
    reader = CacheReader(path)

    def failing(handle: int, count: int, at: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(CacheError, match=r"expected to read .*, got .*Input/output error; check the disk"):
        reader.verify_checksums()


def test_a_file_that_another_replaced_is_checked_as_it_was_opened(path, tmp_path) -> None:
    reader = CacheReader(path)
    write_cache(tmp_path / "other.h5", records((9, 9)))
    (tmp_path / "other.h5").replace(path)
    reader.verify_checksums()
    path.unlink()
    reader.verify_checksums()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(path, share) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CacheError, match=r"truncated or damaged|got an empty file"):
        CacheReader(path)


def test_a_missing_file_is_refused(tmp_path) -> None:
    with pytest.raises(CacheError, match="expected a cache, got nothing"):
        CacheReader(tmp_path / "none.h5")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("complete", None, "expected a complete cache, got one whose writing was cut off"),
        ("format", None, "expected a dask_logits cache, got format None"),
        ("format", "megatron", "expected a dask_logits cache, got format 'megatron'"),
        ("format_version", "2.0", r"expected format version 1\.x, profile 'plain' or 'compact', got 2\.0"),
        ("profile", "wavelet", "install a newer dask_logits"),
        ("profile", "compact", "expected precision, got none; expected chunk_tokens, got none"),
        ("top_k", None, "expected top_k, got none; the file is damaged"),
        ("target_shift", 0, "expected target_shift 1, got 0: these are other targets; install a newer dask_logits"),
        ("temperature", 2.0, "expected temperature 1, got 2.0: these are other targets; install a newer dask_logits"),
        ("crc32_block_bytes", 0, "expected crc32_block_bytes to be greater than 0, got 0"),
    ],
)
def test_incomplete_foreign_and_newer_files_are_refused(path, name, value, message) -> None:
    with h5py.File(path, "a") as file:
        if value is None:
            del file.attrs[name]
        else:
            file.attrs[name] = np.bytes_(value) if isinstance(value, str) else value
    with pytest.raises(CacheError, match=message):
        CacheReader(path)


def test_a_newer_minor_version_is_read_unless_it_holds_something_critical(path) -> None:
    with h5py.File(path, "a") as file:
        file.attrs["format_version"] = np.bytes_("1.7")
        file["extra"] = [1, 2]
    assert CacheReader(path).n_documents == 4
    with h5py.File(path, "a") as file:
        file["extra"].attrs["critical"] = True
    with pytest.raises(CacheError, match="critical array 'extra'"):
        CacheReader(path)


def test_an_array_of_another_shape_is_refused(path) -> None:
    with h5py.File(path, "a") as file:
        del file["logsumexp"]
        file["logsumexp"] = np.zeros(3, np.float32)
    with pytest.raises(CacheError, match="expected logsumexp with"):
        CacheReader(path)


def test_a_repacked_file_is_refused_with_the_way_to_read_it(path, tmp_path) -> None:
    with h5py.File(path) as old, h5py.File(tmp_path / "packed.h5", "w") as new:
        for key, value in old.attrs.items():
            new.attrs[key] = value
        old.copy("crc32", new)
        for name, item in old.items():
            if isinstance(item, h5py.Dataset):
                new.create_dataset(name, data=item[:], chunks=True, compression="gzip")
    with pytest.raises(CacheError, match=r"expected \w+ contiguous.*: the file was repacked .*read this one with h5py"):
        CacheReader(tmp_path / "packed.h5")


@pytest.mark.parametrize("precision", [8, 12])
def test_hdf5_reads_the_same_bytes(precision, tmp_path) -> None:
    """A second opinion: every stored array through HDF5 and its plugin for zstd."""
    import hdf5plugin  # noqa: F401

    made = records((4, 0, 2, 7, 90), k=5, vocab_size=70_000)
    write_cache(tmp_path / "c.h5", made, vocab_size=70_000, profile=compact(5, vocab_size=70_000, precision=precision))
    reader = CacheReader(tmp_path / "c.h5")
    stored = reader.stored(0, reader.n_entries)
    assert stored.keys() == reader.profile.arrays.keys()
    with h5py.File(tmp_path / "c.h5") as file:
        for name, array in {**reader.arrays, **stored}.items():
            np.testing.assert_array_equal(file[name][...], array)


def test_a_writer_that_fails_leaves_nothing(tmp_path) -> None:
    with (
        pytest.raises(CacheError, match="expected 5 entries of input_ids, got 0"),
        CacheWriter(tmp_path / "c.h5", profile=plain(), n_tokens=5, n_documents=1) as writer,
    ):
        writer.finish({})
    assert not (tmp_path / "c.h5").exists()


def test_read_only_files_are_read(path) -> None:
    path.chmod(0o444)
    assert CacheReader(path).item(0)["input_ids"].shape == (4,)
    copy = path.with_name("copy.h5")
    shutil.copy(path, copy)
    assert pickle.loads(pickle.dumps(CacheReader(copy).attributes)) == CacheReader(path).attributes


def test_every_format_version_stays_readable() -> None:
    """Golden files, and the content digest of what they hold."""
    golden = {
        "v1.0-compact.h5": "b18f626e075a4981203a2f6e88ae053fbc33b7a3a050c4b333d5c4d5af7e9f97",
        "v1.0-compact-packed.h5": "45dbd2753a575d06e0ac7ac628524c2a52edf935c88474b49c1a51b1663e7067",
        "v1.0-plain.h5": "a0eb26a4e893691d04b6f0d4b3306b56a6d3b12ce3bc50d3bfa1c69d10945ccc",
        "v1.0-sampled-compact.h5": "801bc09632254eb7f58439e88ef234e7ab6d2d173d1300515c093b0aaf4d56f5",
    }
    folder = Path(__file__).parent / "golden"
    assert {path.name for path in folder.iterdir()} == set(golden)
    for name, digest in golden.items():
        reader = CacheReader(folder / name)
        reader.verify_checksums()
        (piece,) = cache_pieces(reader)
        assert (name, piece.content_digest()) == (name, digest)
        assert [len(item["input_ids"]) for item in items(reader)] == ([6, 6, 1] if "packed" in name else [4, 0, 2, 7])
        assert digest == reader.attributes["content_digest"]


def test_every_flipped_bit_of_a_compact_cache_is_found(dense) -> None:
    """In arrays, tables, chunks, their trailers and the index."""
    profile = CacheReader(dense).profile
    chunks, spans = {}, {}
    with h5py.File(dense) as file:
        for name in CacheReader(dense).arrays:
            spans[name] = (file[name].id.get_offset(), file[name].nbytes)
        for name in (name for name, stored in profile.arrays.items() if stored.chunked):
            chunks[name] = [(int(info.byte_offset), int(info.size)) for info in chunk_places(file[name])]
    assert set(chunks) == {"topk_gaps_b0"}
    assert {"id_table", "gap_table", "chunks/topk_gaps_b0/offset", "topk_ids_b0", "top1_logprob"} <= set(spans)
    whole = dense.read_bytes()
    draw = np.random.default_rng(1)

    def damage(offset: int, size: int) -> None:
        damaged = bytearray(whole)
        bit = int(draw.integers(size * 8))
        damaged[offset + bit // 8] ^= 1 << bit % 8
        dense.write_bytes(damaged)

    for offset, size in spans.values():
        for _ in range(5):
            damage(offset, size)
            with pytest.raises(CacheError, match="expected"):
                CacheReader(dense).verify_checksums()
    for name, places in chunks.items():
        for offset, size in places:
            damage(offset, size - 4)
            with pytest.raises(CacheError, match=f"for {name}, chunk"):
                CacheReader(dense).verify_checksums()
            with pytest.raises(CacheError, match=f"for {name}, chunk"):
                list(items(CacheReader(dense)))
            damage(offset + size - 4, 4)
            CacheReader(dense).verify_checksums(trailers=False)
            with pytest.raises(CacheError, match=rf"Fletcher-32 \w+ behind {name}, chunk"):
                CacheReader(dense).verify_checksums()
    dense.write_bytes(whole)
    CacheReader(dense).verify_checksums()


def test_an_empty_chunk_is_refused(dense) -> None:
    planes = CacheReader(dense)._planes
    name, index = next(iter(planes.indices.items()))
    empty = ChunkIndex(index.offset, np.zeros_like(index.size), np.zeros_like(index.crc32))
    planes.indices = {**planes.indices, name: empty}
    with pytest.raises(CacheError, match=f"expected chunk 0 of {name} in a file of"):
        planes.check(0, 1, trailers=True)


def chunk_places(dataset: h5py.Dataset) -> list:
    found: list = []
    dataset.id.chunk_iter(found.append)
    return found


def test_the_planes_of_a_chunk_lie_side_by_side(tmp_path) -> None:
    profile = compact(5, vocab_size=70_000, precision=12)
    write_cache(tmp_path / "c.h5", records((50,), k=5, vocab_size=70_000), vocab_size=70_000, profile=profile)
    with h5py.File(tmp_path / "c.h5") as file:
        names = [name for name, stored in profile.arrays.items() if stored.chunked]
        assert len(names) == 4
        places = sorted(
            (info.chunk_offset[0], info.byte_offset, info.size) for name in names for info in chunk_places(file[name])
        )
    assert len(places) == 4 * 13
    # But for the alignment, and HDF5's own structures between some.
    assert sum(end[1] - begin[1] - begin[2] >= 8 for begin, end in itertools.pairwise(places)) <= len(names)


def test_a_repacked_compact_file_is_refused_by_its_index(dense, tmp_path) -> None:
    import hdf5plugin

    with h5py.File(dense) as old, h5py.File(tmp_path / "packed.h5", "w") as new:
        for key, value in old.attrs.items():
            new.attrs[key] = value
        for name, item in old.items():
            if name == "topk_gaps_b0":
                new.create_dataset(name, data=item[:], chunks=(8, 5), compression=hdf5plugin.Zstd())
            else:
                old.copy(name, new)
    with pytest.raises(CacheError, match="the file was repacked; restore the original"):
        CacheReader(tmp_path / "packed.h5")


@pytest.mark.parametrize("name", ["chunks/topk_gaps_b0/size", "id_table", "topk_gaps_b0", "crc32/top1_logprob"])
def test_a_compact_cache_that_lacks_an_array_is_refused(dense, name: str) -> None:
    with h5py.File(dense, "a") as file:
        del file[name]
    with pytest.raises(CacheError, match=name.split("/")[0]):
        CacheReader(dense)


def test_blocks_without_their_lengths_are_refused(tmp_path) -> None:
    shutil.copy(Path(__file__).parent / "golden" / "v1.0-compact-packed.h5", tmp_path / "c.h5")
    with h5py.File(tmp_path / "c.h5", "a") as file:
        del file["block_length"]
    with pytest.raises(CacheError, match="expected block_length, got none"):
        CacheReader(tmp_path / "c.h5")


@pytest.mark.parametrize(
    ("name", "value"), [("precision", 9), ("chunk_tokens", 0), ("chunk_tokens", 8), ("n_entries", 7), ("top_k", 4)]
)
def test_attributes_that_disagree_with_the_arrays_are_refused(dense, name: str, value: int) -> None:
    with h5py.File(dense, "a") as file:
        file.attrs[name] = value
    with pytest.raises(CacheError, match="the file is damaged"):
        CacheReader(dense)


def test_threads_and_forks_share_a_reader(dense) -> None:
    reader = CacheReader(dense)
    expected = [item["topk_logprobs"].tobytes() for item in items(reader)]

    def read(_: int) -> bool:
        return [item["topk_logprobs"].tobytes() for item in items(reader)] == expected

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(64)))
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            os._exit(0 if all(read(0) for _ in range(20)) else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4


def test_opening_does_not_read_the_arrays(tmp_path) -> None:
    """A sparse stand-in for 10⁹ tokens: all of it holes but the header and the ends of the index."""
    path = tmp_path / "large.h5"
    n_documents = 1_000_000
    profile = compact(64, 49_152, chunk_tokens=512)
    made = records((512,), k=64, vocab_size=49_152)
    write_cache(path, made, vocab_size=49_152, profile=profile)
    grow(path, n_tokens=512 * 2_000_000, n_documents=n_documents)
    # Processor time, which other work on the machine changes less.
    started = time.process_time()
    reader = CacheReader(path)
    assert time.process_time() - started < 1
    assert (reader.n_tokens, reader.n_items) == (1_024_000_000, n_documents)
    np.testing.assert_array_equal(reader.item(0)["topk_ids"], made.topk_ids)


def grow(path: Path, n_tokens: int, n_documents: int) -> None:
    """Make the arrays of a cache of one chunk longer, without writing what is new."""
    names = [name for name in CacheReader(path).arrays if not name.endswith("_table")]
    with h5py.File(path, "a", libver=("v110", "v110")) as file:
        n_chunks = n_tokens // file.attrs["chunk_tokens"]
        for name, old in [(name, file[name]) for name in names]:
            length = n_chunks if name.startswith("chunks/") else n_documents if "document" in name else n_tokens
            first = old[:1] if "document" in name or name.startswith("chunks/") else old[:512]
            del file[name]
            properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            properties.set_layout(h5py.h5d.CONTIGUOUS)
            kind, shape = h5py.h5t.py_create(first.dtype), (length, *first.shape[1:])
            links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
            links.set_create_intermediate_group(True)
            space = h5py.h5s.create_simple(shape)
            made = h5py.Dataset(h5py.h5d.create(file.id, None, kind, space, properties))
            h5py.h5o.link(made.id, file.id, name.encode(), lcpl=links)
            made[: len(first)] = first
            if name.startswith("chunks/"):
                made[-1] = first[0]
        for name in ("topk_ids_b1", "topk_gaps_b0"):
            old = file[name]
            data = old.id.read_direct_chunk((0, 0))[1]
            del file[name]
            properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            properties.set_chunk((512, 64))
            properties.set_filter(32_015, h5py.h5z.FLAG_OPTIONAL, (1,))
            properties.set_fletcher32()
            space = h5py.h5s.create_simple((n_tokens, 64))
            h5py.h5d.create(file.id, name.encode(), h5py.h5t.STD_U8LE, space, properties)
            for chunk in (0, n_chunks - 1):
                file[name].id.write_direct_chunk((chunk * 512, 0), data)
            places = sorted((info.chunk_offset[0], info.byte_offset) for info in chunk_places(file[name]))
            file[f"chunks/{name}/offset"][0] = places[0][1]
            file[f"chunks/{name}/offset"][-1] = places[1][1]
        file.attrs.update({"n_tokens": n_tokens, "n_entries": n_tokens, "n_documents": n_documents})


@pytest.mark.parametrize("profile", [plain(3), compact(3)])
def test_blocks_list_their_segments(profile, tmp_path) -> None:
    made = packed_records()
    write_cache(tmp_path / "c.h5", made, profile=profile)
    reader = CacheReader(tmp_path / "c.h5")
    found = list(items(reader))
    assert (reader.n_items, reader.n_documents, reader.is_packed) == (3, 5, True)
    assert np.concatenate([item["input_ids"] for item in found]).tolist() == made.input_ids.tolist()
    assert [item["segments"].tolist() for item in found] == [
        [[0, 0, 4], [1, 0, 0], [2, 0, 2]],
        [[3, 0, 6]],
        [[3, 6, 1]],
    ]
    rows, offsets = reader.item_places()
    assert (rows.tolist(), offsets.tolist()) == ([0, 3, 3], [0, 0, 6])


@pytest.mark.parametrize("profile", [plain(3), compact(3)])
def test_a_block_begins_with_the_document_of_its_first_token(profile, tmp_path) -> None:
    # An empty row may end a partition or begin one. Only the padding between partitions would tell.
    made = dataclasses.replace(
        records((4, 0, 2, 0, 7), k=3),
        document_row=np.arange(5, dtype=np.uint64),
        block_length=np.array([6, 7], np.uint32),
    )
    write_cache(tmp_path / "c.h5", made, profile=profile)
    reader = CacheReader(tmp_path / "c.h5")
    reader.verify_checksums()
    found = list(items(reader))
    assert [item["segments"].tolist() for item in found] == [[[0, 0, 4], [1, 0, 0], [2, 0, 2]], [[4, 0, 7]]]
    assert [int(item["row"]) for item in found] == reader.item_places()[0].tolist() == [0, 4]


@pytest.mark.parametrize("lengths", [(6, 0, 7), (0, 6, 7), (5, 8)])
def test_blocks_without_tokens_or_that_cut_a_segment_are_found(lengths, tmp_path) -> None:
    made = dataclasses.replace(packed_records(), block_length=np.array(lengths, np.uint32))
    write_cache(tmp_path / "c.h5", made)
    with pytest.raises(CacheError, match="expected blocks of the 13 tokens of their segments"):
        CacheReader(tmp_path / "c.h5").verify_checksums()
    with pytest.raises(CacheError, match="expected segments of block"):
        list(items(CacheReader(tmp_path / "c.h5")))


def test_text_windows_in_another_order_are_found(tmp_path) -> None:
    made = dataclasses.replace(
        records((4, 2, 3, 3), k=3),
        document_row=np.array([0, 1, 1, 2], np.uint64),
        document_offset=np.array([0, 3, 0, 0], np.uint32),
    )
    write_cache(tmp_path / "c.h5", made)
    with pytest.raises(CacheError, match="expected document_offset to rise in a row"):
        CacheReader(tmp_path / "c.h5").verify_checksums()


def test_an_interrupt_is_not_hidden_by_a_file_that_cannot_be_closed(tmp_path, monkeypatch) -> None:
    path = tmp_path / "c.h5"
    writer = CacheWriter(path, profile=plain(), n_tokens=3, n_documents=1)
    close = writer._file.close

    def half() -> None:
        close()
        raise RuntimeError("Can't decrement id ref count")

    monkeypatch.setattr(writer._file, "close", half)
    with pytest.raises(KeyboardInterrupt), writer:
        raise KeyboardInterrupt
    assert not path.exists()


INTERRUPTS = """
import os, sys
from pathlib import Path
from builders import compact, records, write_cache
from dask_logits.cache import sink

class Interrupted:
    n = at = 0

    def __getattr__(self, name):
        call = getattr(os, name)
        return self.counted(call) if name in ("pwrite", "ftruncate") else call

    def counted(self, call):
        def counted(*given):
            self.n += 1
            if self.n == self.at:
                raise ERROR
            return call(*given)
        return counted

sink.os = system = Interrupted()
made, path = records((4, 0, 2, 7, 90), k=5), Path(sys.argv[1])
write_cache(path, made, profile=compact(5))
path.unlink()
calls = system.n
for system.at in range(1, calls + 1):
    system.n = 0
    try:
        write_cache(path, made, profile=compact(5))
    except (KeyboardInterrupt, OSError) as error:
        assert type(error) is type(ERROR), system.at
    else:
        raise AssertionError(system.at)
    assert not path.exists(), system.at
print(calls)
"""


@pytest.mark.parametrize("error", ["KeyboardInterrupt()", "OSError(28, 'No space left on device')"])
def test_an_interrupt_or_error_at_any_write_of_a_cache_arrives_and_leaves_no_file(tmp_path, error) -> None:
    # HDF5 can crash when its process ends.
    done = warm.run([sys.executable, "-c", INTERRUPTS.replace("ERROR", error), str(tmp_path / "c.h5")])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


@pytest.mark.parametrize("lengths", [(4, 0, 2, 7), (9,)])
@pytest.mark.parametrize("profile", [plain(), compact()])
def test_a_cache_that_is_replaced_while_it_is_opened_is_read_as_one_file(
    tmp_path, monkeypatch, profile, lengths
) -> None:
    path, successor = tmp_path / "c.h5", tmp_path / "next.h5"
    expected = write_cache(path, records((4, 0, 2, 7), seed=1), profile=profile)
    write_cache(successor, records(lengths, seed=2), profile=profile)
    read = module.root_attributes

    def replaced_meanwhile(file: h5py.File) -> dict[str, object]:
        successor.replace(path)
        return read(file)

    monkeypatch.setattr(module, "root_attributes", replaced_meanwhile)
    reader = CacheReader(path)
    assert reader.header.content_digest == expected
    assert reader.item_lengths().tolist() == [4, 0, 2, 7]
    reader.verify_checksums()
