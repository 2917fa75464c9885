from __future__ import annotations

import json

import pytest
from builders import compact, records, write_cache

from dask_logits import CacheError
from dask_logits.cli import main
from dask_logits.observe.card import card, card_lines


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
