from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from dask_logits.errors import CacheError, RunConflictError
from dask_logits.files.atomic import create_json, read_json
from dask_logits.run.folder import RunFolder, compare


def test_the_first_of_many_writers_wins(tmp_path) -> None:
    path = tmp_path / "a" / "b.json"
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: create_json(path, {"writer": i, "filler": "x" * 10_000}), range(40)))
    assert won.count(True) == 1
    assert read_json(path)["writer"] == won.index(True)
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]


def test_missing_is_none_and_broken_is_refused(tmp_path) -> None:
    assert read_json(tmp_path / "no.json") is None
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(CacheError, match="expected a JSON object"):
        read_json(tmp_path / "half.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(CacheError, match="got list"):
        read_json(tmp_path / "list.json")


def test_a_newer_manifest_is_refused(tmp_path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"format": "dask_logits.run", "version": 5}))
    with pytest.raises(CacheError, match=r"expected dask_logits\.run version 4, got 'dask_logits\.run' version 5"):
        RunFolder(tmp_path).manifest()


def test_differences_are_listed_by_name(tmp_path) -> None:
    with pytest.raises(RunConflictError) as caught:
        compare(tmp_path, {"a.b": 1, "c": 2, "d": None}, {"a.b": 3, "c": 2, "e": 4})
    assert caught.value.differences == {"a.b": (1, 3), "e": (None, 4)}
    assert "  a.b: the run has 1, now 3\n" in str(caught.value)


def test_receipts_are_fanned_out_by_thousands(tmp_path) -> None:
    assert RunFolder(tmp_path).receipt_path(1_234_567) == tmp_path / "receipts" / "1234" / "1234567.json"
    assert RunFolder(tmp_path).receipt_path(42) == tmp_path / "receipts" / "000" / "000042.json"
