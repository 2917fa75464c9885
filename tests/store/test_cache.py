from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from builders import packed_records, records, write_cache

from dask_logits.errors import CacheError
from dask_logits.records import ContentDigest
from dask_logits.store.cache import CacheReader, CacheWriter, items


@pytest.fixture
def path(tmp_path):
    write_cache(tmp_path / "c.h5", records((4, 0, 2, 7)), note={"a": 1})
    return tmp_path / "c.h5"


@pytest.mark.parametrize("lengths", [(4, 0, 2, 7), (0, 0), (1,), (400_000, 3)])
def test_documents_read_back_as_they_were_written(lengths, tmp_path) -> None:
    made = records(lengths, k=1)
    digest = write_cache(tmp_path / "c.h5", made)
    expected = ContentDigest()
    expected.update_records(made)
    assert digest == expected.hexdigest()
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
        assert file.attrs["format_version"] == "1.1"
        assert file["topk_ids"].chunks is None
        assert file["topk_ids"].shape == (13, 2)
    assert CacheReader(path).attributes["note"] == {"a": 1}


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


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(path, share) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CacheError, match="truncated or foreign"):
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
        ("format_version", "2.0", r"expected format version 1\.x, profile 'plain', got 2\.0"),
        ("profile", "compact", "install a newer dask_logits"),
        ("top_k", None, "expected top_k, got none; the file is damaged"),
    ],
)
def test_incomplete_foreign_and_newer_files_are_refused(path, name, value, message) -> None:
    with h5py.File(path, "a") as file:
        if value is None:
            del file.attrs[name]
        else:
            file.attrs[name] = value
    with pytest.raises(CacheError, match=message):
        CacheReader(path)


def test_a_newer_minor_version_is_read_unless_it_holds_something_critical(path) -> None:
    with h5py.File(path, "a") as file:
        file.attrs["format_version"] = "1.7"
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


def test_a_repacked_file_with_chunks_reads_the_same(path, tmp_path) -> None:
    with h5py.File(path) as old, h5py.File(tmp_path / "packed.h5", "w") as new:
        for key, value in old.attrs.items():
            new.attrs[key] = value
        old.copy("crc32", new)
        for name, item in old.items():
            if isinstance(item, h5py.Dataset):
                new.create_dataset(name, data=item[:], chunks=True, compression="gzip")
    plain, packed = CacheReader(path), CacheReader(tmp_path / "packed.h5")
    packed.verify_checksums()
    for one, other in zip(items(plain), items(packed), strict=True):
        assert {k: v.tobytes() for k, v in one.items()} == {k: v.tobytes() for k, v in other.items()}


def test_a_writer_that_fails_leaves_nothing(tmp_path) -> None:
    with (
        pytest.raises(CacheError, match="expected 5 entries of input_ids, got 0"),
        CacheWriter(tmp_path / "c.h5", n_tokens=5, n_documents=1, top_k=2, vocab_size=9) as writer,
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
    golden = {
        "v1.0-plain.h5": "2ab4923fa7105fee3dcdfcb7389f4d087ed433ebf45ac381e8b0b38a1fadd2fe",
        "v1.1-packed.h5": "e391d52a9155286199b885c6ed48b5dc43c5e134fe1133431635930f70ae2dd1",
    }
    lengths = {"v1.0-plain.h5": [4, 0, 2, 7], "v1.1-packed.h5": [6, 6, 1]}
    folder = Path(__file__).parent / "golden"
    assert {path.name for path in folder.iterdir()} == set(golden)
    for name, digest in golden.items():
        reader = CacheReader(folder / name)
        reader.verify_checksums()
        found = ContentDigest()
        for array in reader.arrays:
            if array != "document_start":
                found.update(array, np.asarray(reader.arrays[array]))
        assert found.hexdigest() == digest == reader.attributes["content_digest"]
        assert [len(item["input_ids"]) for item in items(reader)] == lengths[name]


def test_blocks_list_their_segments(tmp_path) -> None:
    made = packed_records()
    write_cache(tmp_path / "c.h5", made)
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
