from __future__ import annotations

import numpy as np
import pytest
from builders import compact, content, items, packed_records, plain, records, tree, write_cache

from dask_logits import CacheError, ConfigError, DaskLogitsError, RunConflictError, convert, verify
from dask_logits.cache import chunks
from dask_logits.cache.pieces import cache_pieces
from dask_logits.cache.profile import as_kept
from dask_logits.cache.reader import CacheReader
from dask_logits.files.lock import lease
from dask_logits.run.folder import CONSOLIDATION_LOCK


def whole(path) -> str:
    """Return the content digest, computed from what is read."""
    found = [records for piece in cache_pieces(CacheReader(path)) for records in piece.runs()]
    return content(*found)


@pytest.mark.parametrize("made", [records((4, 0, 2, 7), k=3), packed_records(), records((0,), k=3)])
@pytest.mark.parametrize("precision", [8, 10, 12])
def test_compact_becomes_plain_without_a_loss(tmp_path, made, precision) -> None:
    digest = write_cache(tmp_path / "a.h5", made, profile=compact(3, precision=precision), run_id="r", n_rows=4)
    found = CacheReader(convert(tmp_path / "a.h5", tmp_path / "b.h5", profile="plain"))
    assert found.attributes["content_digest"] == digest == whole(tmp_path / "b.h5")
    assert (found.attributes["profile"], found.attributes["run_id"], found.attributes["n_rows"]) == ("plain", "r", 4)
    assert "precision" not in found.attributes
    before = list(items(CacheReader(tmp_path / "a.h5")))
    for one, other in zip(before, items(found), strict=True):
        assert all(np.array_equal(one[name], other[name], equal_nan=True) for name in ("topk_logprobs", "segments"))


def test_plain_becomes_compact_as_a_job_would_have_stored_it(tmp_path) -> None:
    made = records((4, 0, 2, 7), k=3)
    write_cache(tmp_path / "a.h5", made)
    path = convert(tmp_path / "a.h5", tmp_path / "new" / "b.h5", profile="compact", precision=10)
    reader = CacheReader(path)
    kept = as_kept(made, reader.profile)
    assert reader.attributes["precision"] == 10
    assert reader.attributes["content_digest"] == content(kept) == whole(path)
    first, *_ = items(reader)
    np.testing.assert_array_equal(first["topk_logprobs"], kept.topk_logprobs[:4])
    # The most frequent of the kept ids come first.
    counts = np.bincount(made.topk_ids.reshape(-1).astype(int), minlength=50)
    assert (np.diff(counts[reader.profile.id_table]) <= 0).all()


@pytest.mark.parametrize("profile", [None, compact(3)])
def test_a_source_that_cannot_be_read_leaves_nothing_behind(tmp_path, profile, monkeypatch) -> None:
    def fail(*arguments: object) -> bytes:
        raise OSError(5, "Input/output error")

    write_cache(tmp_path / "a.h5", records((4, 0, 2, 7), k=3), **({} if profile is None else {"profile": profile}))
    monkeypatch.setattr(chunks.os, "pread", fail)
    if profile is None:
        monkeypatch.setattr(CacheReader, "tokens", fail)
    with pytest.raises(DaskLogitsError, match=r"got \[Errno 5\] Input/output error; .*check the disk"):
        convert(tmp_path / "a.h5", tmp_path / "new" / "b.h5", profile="plain")
    assert not list((tmp_path / "new").glob("*.h5"))


def test_a_precision_may_change(tmp_path) -> None:
    write_cache(tmp_path / "a.h5", records((9,), k=3), profile=compact(3, precision=12))
    path = convert(tmp_path / "a.h5", tmp_path / "b.h5", profile="compact", precision=8)
    assert CacheReader(path).profile.precision == 8
    np.testing.assert_array_equal(CacheReader(path).profile.id_table, compact(3).id_table)


def test_what_was_rounded_once_is_no_damage_later(tmp_path) -> None:
    made, rounding = records((40, 25, 30), k=6), compact(6, precision=8)
    write_cache(tmp_path / "8.h5", made, profile=rounding)
    source = tmp_path / "8.h5"
    for number, (profile, precision) in enumerate([("plain", 8), ("compact", 12), ("plain", 8)]):
        source = convert(source, tmp_path / f"{number}.h5", profile=profile, precision=precision)
        assert CacheReader(source).header.source_precision == 8
        assert verify(source).ok, verify(source)
    write_cache(tmp_path / "plain.h5", made)
    never = convert(tmp_path / "plain.h5", tmp_path / "12.h5", profile="compact", precision=12)
    assert CacheReader(never).header.source_precision is None
    # The same values as targets that were never rounded.
    write_cache(tmp_path / "claimed.h5", as_kept(made, rounding))
    assert not verify(tmp_path / "claimed.h5").ok


def test_a_cache_is_not_converted_onto_itself_nor_if_it_is_damaged(tmp_path) -> None:
    path = tmp_path / "a.h5"
    write_cache(path, records((9,), k=3), profile=compact(3))
    before = path.read_bytes()
    with pytest.raises(CacheError, match="expected another file than the source"):
        convert(path, path, profile="plain")
    assert path.read_bytes() == before
    reader = CacheReader(path)
    at = int(reader._planes.indices["topk_gaps_b0"].offset[0]) + 5
    path.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
    with pytest.raises(CacheError, match="the file is damaged"):
        convert(path, tmp_path / "b.h5", profile="plain")
    assert [file.name for file in tmp_path.glob("*.h5")] == ["a.h5"]
    assert not list(tmp_path.glob("*.tmp"))


def test_plain_profiles_are_all_alike(tmp_path) -> None:
    digest = write_cache(tmp_path / "a.h5", records((4, 2), k=3), profile=plain(3))
    convert(tmp_path / "a.h5", tmp_path / "b.h5", profile="plain")
    assert CacheReader(tmp_path / "b.h5").attributes["content_digest"] == digest


def test_only_a_cache_of_the_same_run_is_written_over(tmp_path) -> None:
    ours = {"fingerprint": "f", "run_id": "r"}
    write_cache(tmp_path / "a.h5", records((4, 2), k=3), **ours)
    write_cache(tmp_path / "other.h5", records((4, 2), k=3), fingerprint="f", run_id="s")
    write_cache(tmp_path / "nobodys.h5", records((4, 2), k=3))
    (tmp_path / "corpus.jsonl").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.h5").symlink_to(tmp_path / "nowhere.h5")
    before = tree(tmp_path)
    for name in ("other.h5", "nobodys.h5", "corpus.jsonl", "folder", "link.h5"):
        with pytest.raises(RunConflictError, match="expected no file, or an older cache of the same run"):
            convert(tmp_path / "a.h5", tmp_path / name, profile="plain")
        with pytest.raises(RunConflictError, match="expected no file, or an older cache of the same run"):
            convert(tmp_path / "nobodys.h5", tmp_path / "other.h5", profile="plain")
    assert tree(tmp_path) == before
    for precision in (8, 12):
        convert(tmp_path / "a.h5", tmp_path / "b.h5", profile="compact", precision=precision)
        assert CacheReader(tmp_path / "b.h5").attributes["precision"] == precision


def test_two_processes_do_not_write_in_one_folder(tmp_path) -> None:
    write_cache(tmp_path / "a.h5", records((4, 2), k=3), profile=compact(3))
    with (
        lease(tmp_path / CONSOLIDATION_LOCK),
        pytest.raises(RunConflictError, match="expected to be the only driver of its consolidate step"),
    ):
        convert(tmp_path / "a.h5", tmp_path / "b.h5", profile="plain")
    assert not (tmp_path / "b.h5").exists()


def test_parts_that_are_not_one_whole_job_are_not_made_one_cache(tmp_path) -> None:
    same = {"fingerprint": "f", "plan_digest": "p", "n_rows": 3, "partial": True}
    for name, row, more in (("a", 0, same), ("b", 2, same), ("c", 1, {**same, "fingerprint": "g"})):
        write_cache(tmp_path / f"{name}.h5", records((4,), k=3, first_row=row), **more)
    with pytest.raises(CacheError, match="expected a part of the same job"):
        convert(tmp_path, tmp_path / "whole.h5", profile="plain")
    (tmp_path / "c.h5").unlink()
    with pytest.raises(CacheError, match="expected the parts of all 3 rows of the job, got 2 rows in 2 parts"):
        convert(tmp_path, tmp_path / "whole.h5", profile="plain")
    assert not (tmp_path / "whole.h5").exists()


@pytest.mark.parametrize(("setting", "value"), [("profile", "Compact"), ("precision", 9)])
def test_a_profile_there_is_not_is_refused(tmp_path, setting, value) -> None:
    write_cache(tmp_path / "a.h5", records((4, 2), k=3))
    with pytest.raises(ConfigError, match=f"{setting}: expected"):
        convert(tmp_path / "a.h5", tmp_path / "b.h5", **{"profile": "compact", setting: value})
