"""Files that are whole and on the disk, or absent, on file systems that do not answer as they should."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dask_logits.errors import CacheError, CapacityError
from dask_logits.files.atomic import create_json, is_there, names_in, read_json, replace_json, room, unreadable


def test_the_first_writer_wins(tmp_path) -> None:
    path = tmp_path / "receipt.json"
    assert create_json(path, {"attempt": "a"})
    assert not create_json(path, {"attempt": "b"})
    assert read_json(path) == {"attempt": "a"}


def test_json_may_name_a_path_that_is_not_utf_8_and_has_bounded_depth(tmp_path) -> None:
    value = {"path": os.fsdecode(b"w\xff/teacher.h5"), "text": "\U0001f600"}
    replace_json(tmp_path / "odd.json", value)
    create_json(tmp_path / "new.json", value)
    assert read_json(tmp_path / "odd.json") == read_json(tmp_path / "new.json") == value
    for text in ('"w"', r'"\udcff"'):
        (tmp_path / "deep.json").write_text('{"a": ' + "[" * 300 + text + "]" * 300 + "}")
        with pytest.raises(CacheError, match=r"expected a JSON object, got .*recursion"):
            read_json(tmp_path / "deep.json")


def test_what_cannot_be_read_is_neither_gone_nor_damaged(tmp_path) -> None:
    loop = tmp_path / "loop.json"
    loop.symlink_to(loop)
    for look in (is_there, read_json):
        with pytest.raises(CacheError, match="see that it can be read") as caught:
            look(loop)
        assert unreadable(caught.value)
    with pytest.raises(CacheError, match="expected to list it"):
        names_in(loop)
    (tmp_path / "moved").symlink_to(tmp_path / "not-mounted")
    with pytest.raises(CacheError, match=r"expected what it is a link to, got nothing at .*not-mounted"):
        is_there(tmp_path / "moved")
    assert names_in(tmp_path / "none") == []
    (tmp_path / "cut.json").write_text("{")
    with pytest.raises(CacheError, match="restore the file") as caught:
        read_json(tmp_path / "cut.json")
    assert not unreadable(caught.value)
    assert (is_there(tmp_path / "cut.json"), is_there(tmp_path / "cut.json" / "below")) == (True, False)


def test_a_link_whose_answer_was_lost_is_ours(tmp_path, monkeypatch) -> None:
    link = os.link

    def linked_twice(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))

    monkeypatch.setattr(os, "link", linked_twice)
    assert create_json(tmp_path / "receipt.json", {"attempt": "a"})
    assert read_json(tmp_path / "receipt.json") == {"attempt": "a"}
    assert [path.name for path in tmp_path.iterdir()] == ["receipt.json"]


def test_a_disk_that_does_not_say_whether_the_job_had_begun_is_one_message(tmp_path) -> None:
    def stale() -> bool:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with (
        pytest.raises(CapacityError, match="disks that can be read and written") as caught,
        room(tmp_path, begun=stale),
    ):
        stale()
    assert caught.value.ran
