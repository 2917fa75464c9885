from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from builders import compact, records, write_cache

from dask_logits import CacheError
from dask_logits.cli import main
from dask_logits.ops.show import card, card_lines


@pytest.fixture
def path(tmp_path):
    made = records((4, 0, 2, 7), k=3)
    said = {"teacher_path": "org/teacher", "what": {"dataset.name": "wikitext", "dataset.max_samples": None}}
    write_cache(tmp_path / "teacher_logits.h5", made, profile=compact(3), **said)
    return tmp_path / "teacher_logits.h5"


def test_a_card_says_what_the_cache_is(path) -> None:
    found = card(path.parent)
    assert (found["documents"], found["tokens"], found["top_k"], found["vocab_size"]) == (4, 13, 3, 50)
    assert (found["profile"], found["precision"], found["teacher"]) == ("compact", 8, "org/teacher")
    assert found["dataset"] == {"name": "wikitext"}
    assert found["bytes"] == path.stat().st_size
    mass = found["kept_mass_by_k"]
    assert list(mass) == ["1", "2", "3"]
    assert 0 < mass["1"] < mass["2"] < mass["3"] < 1
    assert json.loads(json.dumps(found)) == found
    lines = card_lines(found)
    assert any(line.split() == ["tokens", "13"] for line in lines)
    assert not any(line.startswith("perplexity") for line in lines)


def test_the_command_prints_it(path, capsys) -> None:
    main(["show", str(path), "--json"])
    assert json.loads(capsys.readouterr().out)["content_digest"] == card(path)["content_digest"]
    main(["convert", str(path), str(path.with_name("plain.h5")), "--profile", "plain"])
    main(["show", str(path.with_name("plain.h5"))])
    assert "profile           plain" in capsys.readouterr().out


def test_what_is_no_cache_has_no_card(tmp_path) -> None:
    with pytest.raises(CacheError, match="got nothing"):
        card(tmp_path / "none.h5")


def test_an_empty_cache_has_one(tmp_path) -> None:
    write_cache(tmp_path / "c.h5", records((0, 0)))
    assert card(tmp_path / "c.h5")["kept_mass_by_k"] == {}


def test_a_card_names_the_dataset_and_what_its_counts_are(tmp_path) -> None:
    named = {"name": "json", "config_name": None, "split": "train", "data_files": ["a.jsonl", "b.jsonl"]}
    what = {"dataset.max_length": 64, "dataset.packing": "none"}
    made = {"what": what, "dataset": named, "n_rows": 4}
    write_cache(tmp_path / "documents.h5", records((4, 0, 2, 7)), **made)
    lines = card_lines(card(tmp_path / "documents.h5"))
    assert "dataset           json (a.jsonl, b.jsonl), split train" in lines
    assert "read with         max_length 64, packing none" in lines
    assert ("dataset rows      4" in lines, "documents         4" in lines) == (True, True)
    write_cache(tmp_path / "windows.h5", records((4, 4)), what={"dataset.long_documents": "window"}, n_rows=1)
    assert "windows           2" in card_lines(card(tmp_path / "windows.h5"))


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("mine.jsonl", b'{"text": "a"}\n', r"a text file \(\.jsonl\)"),
        ("mine.parquet", b"PAR1\x00\x15\xff", r"a file of another kind \(\.parquet\)"),
        ("empty.h5", b"", "an empty file"),
    ],
)
def test_a_file_of_another_kind_is_named_and_nobody_is_told_to_delete_it(tmp_path, name, data, kind) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CacheError, match=rf"{name}: expected a cache \(an HDF5 file\), got {kind}") as caught:
        card(tmp_path / name)
    assert "delete" not in str(caught.value)


def test_a_file_without_permission_is_named(path) -> None:
    # Root reads every file, and others cannot enter the folders of root's tests.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        closed = Path(shutil.copy(path, folder))
        closed.chmod(0)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65_534)
        try:
            with pytest.raises(CacheError, match="permission is denied") as caught:
                card(closed)
        finally:
            if is_root:
                os.seteuid(0)
    assert "delete" not in str(caught.value)


def test_a_file_that_another_process_writes_is_named(path) -> None:
    code = f"import h5py\nf = h5py.File({str(path)!r}, 'w', libver='latest')\nf['x'] = 1\nf.flush()\nprint(flush=True)"
    writer = subprocess.Popen([sys.executable, "-c", f"{code}\ninput()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()
    try:
        with pytest.raises(CacheError, match="another process has locked it") as caught:
            card(path)
    finally:
        writer.communicate(b"\n")
    assert "delete" not in str(caught.value)
