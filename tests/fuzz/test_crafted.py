"""Files that somebody made to do harm are refused: nothing outside is read, and nothing is believed that cannot be."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from builders import compact, records, write_cache
from damage import NESTED, reseal

from dask_logits import read_status
from dask_logits.cache.chunks import compress
from dask_logits.errors import CacheError, DaskLogitsError
from dask_logits.ops.check import check_files

PLANE = "topk_gaps_b0"


@pytest.fixture
def refused(look):
    """Check that a cache or a run is refused with a message that fits, by bounded readers, too."""

    def check(path: Path, message: str) -> None:
        assert look(path if path.is_dir() else path.parent) == ""
        try:
            said = " ".join(problem for found in check_files(path).checks for problem in found.problems)
        except DaskLogitsError as error:
            said = error.message
        assert re.search(message, said), said

    return check


@pytest.fixture
def cache(tmp_path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    write_cache(folder / "c.h5", records((40, 7), k=2), profile=compact(2))
    return folder / "c.h5"


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A finished run in several files."""
    return Path(shutil.copytree(made[-2], tmp_path / "run"))


@pytest.fixture
def scored(made, tmp_path) -> Path:
    """A run whose partitions are not consolidated."""
    return Path(shutil.copytree(made[-1], tmp_path / "run"))


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def first_receipt(run: Path) -> Path:
    return run / "receipts" / "000" / "000000.json"


def attempt(run: Path) -> Path:
    return run / "partitions" / json.loads(first_receipt(run).read_text())["attempt"]


@pytest.mark.parametrize("chunks", [True, (1 << 28,)])
@pytest.mark.parametrize("name", ["input_ids", "document_row", "id_table", "crc32/input_ids"])
def test_a_shape_that_the_file_cannot_hold(cache, refused, name, chunks) -> None:
    with h5py.File(cache, "r+") as file:
        dtype = file[name].dtype
        del file[name]
        file.create_dataset(name, (1 << 40,), dtype, chunks=chunks, compression="gzip")
        for attribute in {"input_ids": ["n_tokens", "n_entries"], "document_row": ["n_documents"]}.get(name, []):
            file.attrs[attribute] = 1 << 40
    refused(cache, r"expected [\w/]+ (with|contiguous) ")


@pytest.mark.parametrize("how", ["external", "soft", "cycle", "group", "virtual", "raw"])
@pytest.mark.parametrize("name", ["input_ids", "document_length", "gap_table"])
def test_an_array_that_lies_elsewhere(cache, refused, name, how, tmp_path) -> None:
    outside = tmp_path / "outside.h5"
    shutil.copy(cache, outside)
    with h5py.File(cache, "r+") as file:
        array = file[name][...]
        del file[name]
        if how == "external":
            file[name] = h5py.ExternalLink("../outside.h5", name)
        elif how == "soft":
            file["elsewhere"] = array
            file[name] = h5py.SoftLink("/elsewhere")
        elif how == "cycle":
            file[name] = h5py.SoftLink(f"/{name}")
        elif how == "group":
            file[name] = file["/"]
        elif how == "virtual":
            layout = h5py.VirtualLayout(array.shape, array.dtype)
            layout[:] = h5py.VirtualSource("../outside.h5", name, array.shape)
            file.create_virtual_dataset(name, layout)
        else:
            raw = tmp_path / "outside.raw"
            raw.write_bytes(array.tobytes())
            file.create_dataset(name, array.shape, array.dtype, external=[(str(raw), 0, h5py.h5f.UNLIMITED)])
        # Who follows it finds what was there, so only a refusal tells.
    refused(cache, rf"expected .*{name}")


@pytest.mark.parametrize("frame", [compress(np.zeros(1 << 28, np.uint8)), bytes.fromhex("28b52ffde0") + b"\xff" * 40])
def test_a_chunk_that_unpacks_to_far_more_than_it_should(cache, refused, frame) -> None:
    with h5py.File(cache, "r+") as file:
        end = cache.stat().st_size
        for part, value in (("offset", end), ("size", len(frame))):
            array = file[f"chunks/{PLANE}/{part}"][...]
            array[1] = value
            file[f"chunks/{PLANE}/{part}"][...] = array
    with cache.open("r+b") as file:
        file.seek(end)
        file.write(frame)
    with h5py.File(cache, "r+") as file:
        file[PLANE].id.write_direct_chunk((4, 0), frame + b"\0\0\0\0")
    reseal(cache.parent)
    refused(cache, "the file is damaged")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("document_start", 2**64 - 1), ("document_start", 2**63), ("document_length", 2**32 - 1),
        ("document_row", 2**64 - 1), (f"chunks/{PLANE}/offset", 2**64 - 8), (f"chunks/{PLANE}/offset", 2**63 - 1),
        (f"chunks/{PLANE}/size", 2**32 - 1), (f"chunks/{PLANE}/size", 0),
    ],
)  # fmt: skip
def test_places_outside_the_file(cache, refused, name, value) -> None:
    with h5py.File(cache, "r+") as file:
        array = file[name][...]
        array[1] = value
        file[name][...] = array
    reseal(cache.parent)
    refused(cache, "expected ")


@pytest.mark.parametrize("name", ["statistics", "what", "calibration"])
def test_attributes_that_are_too_deep_or_of_another_kind(cache, refused, name) -> None:
    for value in ("[" * 60_000, json.dumps({"a": NESTED}), "[1]", "7"):
        with h5py.File(cache, "r+") as file:
            file.attrs[name] = np.bytes_(value)
        refused(cache, f"expected {name} to be a JSON object")


def test_texts_of_variable_length_are_not_read(cache, refused) -> None:
    # HDF5 2.0 loops for ever on some damaged heaps of them.
    with h5py.File(cache, "r+") as file:
        del file.attrs["format"]
        file.attrs["format"] = "dask_logits"
    refused(cache, "expected a dask_logits cache, got format None")


@pytest.mark.parametrize("name", ["../../outside", "/etc", "..", "a/b", "", "a\0", None, 3, ["x"]])
def test_a_receipt_that_names_another_folder(run, refused, name, tmp_path) -> None:
    shutil.copytree(attempt(run), tmp_path / "outside")
    change(first_receipt(run), attempt=name)
    refused(run, "expected attempt to be a plain file name")


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "a/../../../outside", "a//b", "a\0"])
def test_a_receipt_that_names_files_elsewhere(run, refused, name) -> None:
    files = json.loads(first_receipt(run).read_text())["files"]
    change(first_receipt(run), files={**files, name: [3, 4]})
    refused(run, r"expected files\..* to be a path below the folder")


@pytest.mark.parametrize("inner", ["", "zarr.json", "input_ids", "input_ids/c/0"])
def test_a_partition_that_is_a_link_out(scored, refused, inner, tmp_path) -> None:
    there = attempt(scored) / inner
    there.rename(tmp_path / "outside")
    there.symlink_to(tmp_path / "outside")
    refused(scored, "expected ")


@pytest.mark.parametrize(
    "changes",
    [{"shape": [1 << 50]}, {"shape": [-1]}, {"shape": [1 << 30, 1 << 30]}, {"shape": "x"}, {"data_type": "float64"},
     {"codecs": []}, {"codecs": [{"name": "sharding_indexed", "configuration": {"chunk_shape": [0]}}]},
     {"codecs": [{"name": "sharding_indexed", "configuration": {"chunk_shape": [1 << 62]}}]}],
)  # fmt: skip
def test_a_partition_whose_arrays_claim_what_they_are_not(scored, refused, changes) -> None:
    change(attempt(scored) / "input_ids" / "zarr.json", **changes)
    reseal(scored)
    refused(scored, "expected ")


def test_a_run_of_more_partitions_than_anybody_has(run, refused) -> None:
    entry = run / "plan" / "000" / "000000.json"
    for cuts in ([[1 << 40, 1]], [[1, 1]] * 3, [[-1, 3]], [[1 << 62, 1 << 62]], "x"):
        change(entry, cuts=cuts)
        refused(run, "expected ")


@pytest.mark.parametrize("name", ["run.json", "calibration.json", "receipts/000/000000.json", "plan/000/000000.json"])
@pytest.mark.parametrize("how", ["deep", "huge", "pipe", "cycle", "folder", "list", "nothing"])
def test_small_files_that_are_not(run, refused, name, how) -> None:
    path = run / name
    path.unlink()
    match how:
        case "deep":
            path.write_text('{"a":' * 100_000)
        case "huge":
            with path.open("wb") as file:
                file.truncate(1 << 40)
        case "pipe":
            os.mkfifo(path)
        case "cycle":
            path.symlink_to(path)
        case "folder":
            path.mkdir()
        case "list":
            path.write_text("[]")
        case _:
            path.write_text("")
    refused(run, "expected ")


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("status.json", "state", None), ("status.json", "at", "x"), ("status.json", "tokens_per_second", [1]),
        ("status.json", "seconds_left", {}), ("failures/000000.json", "reason", 3),
        ("failures/000000.json", "rows", None), ("failures/000000.json", "rows", ["x"]),
    ],
)  # fmt: skip
def test_signs_of_life_and_failures_of_another_kind(scored, look, name, field, value) -> None:
    (scored / "failures").mkdir(exist_ok=True)
    good = {"kind": "data", "reason": "odd", "rows": [1]}
    (scored / "failures" / "000000.json").write_text(json.dumps(good))
    (scored / "failures" / "0x.json").write_text("{}")
    first_receipt(scored).unlink()
    assert read_status(scored).failed == {0: "data: odd (dataset rows 1)"}
    change(scored / name, **{field: value})
    if name == "status.json":
        # It is for the eye only.
        assert read_status(scored).running == 0
    else:
        with pytest.raises(CacheError, match=rf"{name}: expected {field}(\.0)? to be "):
            read_status(scored)
    assert look(scored) == ""


@pytest.mark.parametrize("entry", ["/etc/passwd", "/dev/zero", "..", "../../../../etc/passwd", "", 3, None, "a\0"])
def test_an_index_that_names_other_files(run, refused, entry) -> None:
    index = run / "teacher_logits.index.json"
    first, *rest = json.loads(index.read_text())["caches"]
    change(index, caches=[{**first, "path": entry}, *rest])
    refused(index, "expected ")
    change(index, caches=[first] * 3)
    refused(index, "expected ")


@pytest.mark.parametrize("value", [None, "", "0" * 63, "z" * 64, 7])
def test_a_cache_without_its_content_digest(cache, refused, value) -> None:
    with h5py.File(cache, "r+") as file:
        del file.attrs["content_digest"]
        if value is not None:
            file.attrs["content_digest"] = np.bytes_(value) if isinstance(value, str) else value
    refused(cache, "expected content_digest(, got none| to be 64 hexadecimal digits)")
