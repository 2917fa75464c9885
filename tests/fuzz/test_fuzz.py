"""Files that were damaged at random give an error, or good records, in bounded time and memory."""

from __future__ import annotations

import pytest
from damage import damage
from guided import corpus, damage_with
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st


def test_what_is_not_damaged_is_read_and_a_reader_that_fails_is_noticed(look, made) -> None:
    assert [look(folder) for folder in made] == [""] * len(made)
    # A path with a NUL in it is beyond what the command line can give.
    assert "ValueError: embedded null byte" in look(f"{made[0]}\0")


def test_what_the_guided_fuzzer_kept_is_survived(look, made, fresh) -> None:
    kept = corpus()
    assert len(kept) > 30
    for data in kept:
        folder = fresh()
        damage_with(data, folder, made)
        assert look(folder) == "", data.hex()


@pytest.mark.parametrize("examples", [40, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_damage_is_survived(look, made, fresh, examples) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=examples < 1000,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        folder = fresh()
        damage(made, folder, lambda bound: data.draw(st.integers(0, bound - 1)))
        assert look(folder) == ""

    attempt()
