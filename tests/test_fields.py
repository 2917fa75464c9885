from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from dask_logits.errors import CacheError
from dask_logits.fields import Count, Digest, FileName, Finite, Flag, InnerPath, NumberOrInfinity, Record

PATH = Path("a.json")
HUGE = 10**400


class Example(Record):
    rows: Count = 0
    seconds: Finite = 0.0
    total: NumberOrInfinity = 0.0
    ok: Flag = False
    name: FileName = "a"
    places: dict[InnerPath, tuple[Count, Count]] = Field(default_factory=dict)
    digest: Digest | None = None
    text: str = ""


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("rows", [0, 3, 2**48 - 1]), ("seconds", [0, -1, 0.5, 1e299]), ("ok", [True, False]),
        ("total", [1, float("inf"), float("-inf")]), ("digest", ["0" * 64, None]),
        ("name", ["a", "a.b-c_9", "...", "a" * 200]), ("places", [{}, {"a": (1, 2)}, {"a/b.c/0": (0, 0)}]),
    ],
)  # fmt: skip
def test_good_values_are_kept_with_their_types(field: str, values: list) -> None:
    for value in values:
        written = Example.parse(PATH, {field: value}).to_json()[field]
        assert written == ({name: list(pair) for name, pair in value.items()} if field == "places" else value)
        assert field == "places" or type(written) is type(value)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("rows", [-1, 2**48, HUGE, 1.0, True, "1", None, [], float("nan")]),
        ("seconds", [float("nan"), float("inf"), 1e300, HUGE, True, "1", None, [1], {}]),
        ("total", [float("nan"), HUGE, True, "1", None, []]),
        ("ok", [1, 0, "true", None]),
        ("name", ["", ".", "..", "a/b", "/a", "a\0", "a\n", "é", "a" * 201, None, 3, ["x"]]),
        ("places", [{"../a": [1, 2]}, {"/a": [1, 2]}, {"a//b": [1, 2]}, {"a/..": [1, 2]}, {"a": [1]}, {"a": 1}, [], 1]),
        ("digest", ["", "0" * 63, "g" * 64, "A" * 64, "0" * 64 + "\n", 7]),
        ("text", [3, None, [], {}]),
    ],
)  # fmt: skip
def test_other_values_are_refused_with_the_file_and_the_field(field: str, values: list) -> None:
    for value in values:
        with pytest.raises(CacheError, match=rf"^a\.json: expected {field}.*; the file is damaged: restore or delete"):
            Example.parse(PATH, {field: value})


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(CacheError) as caught:
        Example.parse(PATH, {"rows": -1, "name": "..", "text": {}, "places": {"a": [1, "x"]}})
    assert caught.value.message == (
        "a.json: expected rows to be greater than or equal to 0, got -1; expected name to be a plain file name, got "
        "'..'; expected places.a.1 to be an integer, got 'x'; expected text to be text, got a dict; the file is "
        "damaged: restore or delete it"
    )
    with pytest.raises(
        CacheError, match=r"a\.json: expected places\.p0\.0 .*; and 12 more; the file is damaged"
    ) as caught:
        Example.parse(PATH, {"places": {f"p{i}": [-1, 1] for i in range(20)}})
    assert len(caught.value.message) < 2_000


def test_only_given_fields_are_written_and_unknown_ones_are_ignored() -> None:
    assert Example.parse(PATH, {"text": "x", "of_a_later_release": 1}).to_json() == {"text": "x"}
