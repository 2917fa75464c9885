"""Draws from the teacher's distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dask_logits.teacher.draws import count_draws, draw_keys, uniforms
from dask_logits.teacher.model import ScoringPath
from dask_logits.teacher.topk import padded_width, topk_with_tail

VOCAB_SIZE = 700
_WORD = (1 << 64) - 1


def split_mix(word: int) -> int:
    """The finaliser of SplitMix64, in Python's integers."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def test_uniform_numbers_are_those_of_split_mix() -> None:
    step = 0x9E3779B97F4A7C15
    seed, row, position = 11, 2**40 + 5, 123
    key = split_mix((seed + step) & _WORD)
    for part in (row, position):
        key = split_mix(((key + step) & _WORD) ^ part)
    wanted = [(split_mix((key + number * step) & _WORD) >> 12) / 2**52 for number in (1, 2, 3)]
    found = uniforms(torch.from_numpy(draw_keys(seed, np.array([row]), np.array([position]))), 3)
    assert found.tolist() == [wanted]
    # The first output of Vigna's SplitMix64 with the seed 0.
    assert split_mix(step) == 0xE220A8397B1DCDAF


def test_uniform_numbers_are_uniform_and_independent_of_their_place() -> None:
    rows, positions = np.repeat(np.arange(40), 50), np.tile(np.arange(50), 40)
    found = uniforms(torch.from_numpy(draw_keys(3, rows, positions)), 20)
    assert found.min() >= 0
    assert found.max() < 1
    counts = torch.histc(found, 50, 0, 1)
    # Chi-squared of 49 degrees of freedom: 110 is exceeded once in 10^6.
    assert float(((counts - 800) ** 2 / 800).sum()) < 110
    flat = found.flatten() - 0.5
    for lag in (1, 20, 1000):
        assert abs(float((flat[lag:] * flat[:-lag]).mean())) < 5 / 12 / len(flat) ** 0.5
    one = uniforms(torch.from_numpy(draw_keys(3, rows[7:8], positions[7:8])), 20)
    assert torch.equal(one[0], found[7])
    assert not torch.equal(uniforms(torch.from_numpy(draw_keys(4, rows[7:8], positions[7:8])), 20), one)


def test_seeds_have_no_keys_in_common() -> None:
    rows, first = np.arange(1024), np.zeros(1024, np.int64)
    keys = [draw_keys(seed, rows, first) for seed in range(9)]
    assert len(np.unique(np.concatenate(keys))) == 9 * 1024


def logits(rows: int, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(0)
    made = torch.full((rows, padded_width(VOCAB_SIZE)), -torch.inf, dtype=dtype)
    made[:, :VOCAB_SIZE] = torch.randn(rows, VOCAB_SIZE) * 2
    return made


def drawn(made: torch.Tensor, uniform_RS: torch.Tensor, k: int, path: ScoringPath, refined: bool) -> torch.Tensor:
    exact = path.finish(made.float())
    return topk_with_tail(
        made.clone(), k, vocab_size=VOCAB_SIZE, path=path, uniform_RS=uniform_RS,
        refine=(lambda ids: exact.gather(1, ids)) if refined else None,
    ).drawn_RS  # fmt: skip


PATHS = [ScoringPath(), ScoringPath(compiled=True), ScoringPath(scale=2.0, softcap=5.0)]


@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("path", PATHS, ids=["plain", "compiled", "softcap"])
@pytest.mark.parametrize("k", [1, 20])
def test_draws_invert_the_distribution_function(path: ScoringPath, refined: bool, k: int) -> None:
    made = logits(6, torch.bfloat16 if refined else torch.float32)
    # In the order of the draws: the exact entries by id, then all other ids.
    p = path.finish(made.float())[:, :VOCAB_SIZE].double().softmax(-1)
    best = topk_with_tail(made, min(k + 32, VOCAB_SIZE) if refined else k, vocab_size=VOCAB_SIZE, path=path).ids_RK
    for row in range(len(made)):
        first = best[row].sort().values
        others = torch.tensor([i for i in range(VOCAB_SIZE) if i not in set(first.tolist())])
        order = torch.cat([first, others])
        ends = p[row, order].cumsum(0)
        middles = (ends - p[row, order] / 2)[None]
        found = drawn(made[row : row + 1], middles, k, path, refined)
        assert torch.equal(found[0], order)


@pytest.mark.parametrize("refined", [False, True])
def test_shares_of_the_draws_are_the_probabilities(refined: bool) -> None:
    made = logits(3, torch.bfloat16 if refined else torch.float32)
    draws, places = 255, np.arange(400)
    counts = torch.zeros(3, VOCAB_SIZE, dtype=torch.float64)
    for position in places:
        keys = torch.from_numpy(draw_keys(0, np.arange(3), np.full(3, position)))
        found = drawn(made, uniforms(keys, draws), 50, ScoringPath(), refined)
        counts.scatter_add_(1, found, torch.ones_like(found, dtype=torch.float64))
    p = made[:, :VOCAB_SIZE].double().softmax(-1)
    total = draws * len(places)
    # The normal approximation of a multinomial's terms: 2,100 values, 6 standard deviations and a count.
    assert bool(((counts - total * p).abs() <= 6 * (total * p * (1 - p)).sqrt() + 1).all())


def test_ids_without_probability_are_never_drawn() -> None:
    made = logits(4, torch.float32)
    made[0, 1:] = -torch.inf
    made[1, ::2] = -torch.inf
    made[2, :690] = -torch.inf
    edges = torch.tensor([0.0, 2.0**-52, 0.5, 1 - 2.0**-52], dtype=torch.float64).expand(4, 4).contiguous()
    for uniform_RS in (edges, uniforms(torch.arange(4), 200)):
        for k in (1, 3, 10):
            found = drawn(made, uniform_RS, k, ScoringPath(), False)
            assert bool(made.gather(1, found).isfinite().all())
            assert found[0].unique().tolist() == [0]


def test_draws_are_counted() -> None:
    torch.manual_seed(1)
    ids = torch.randint(0, 30, (50, 40))
    found_ids, counts = count_draws(ids, 30)
    assert counts.dtype == torch.uint8
    for row in range(50):
        values, wanted = np.unique(ids[row].numpy(), return_counts=True)
        order = np.lexsort((values, -wanted))
        n = len(order)
        assert found_ids[row].tolist() == [*values[order].tolist(), *[0] * (30 - n)]
        assert counts[row].tolist() == [*wanted[order].tolist(), *[0] * (30 - n)]
    assert count_draws(torch.full((1, 255), 7), 255)[1][0, :2].tolist() == [255, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same() -> None:
    keys, made = torch.from_numpy(draw_keys(0, np.arange(40), np.arange(40))), logits(40, torch.float32)
    there = uniforms(keys.cuda(), 50)
    assert torch.equal(there.cpu(), uniforms(keys, 50))
    here = drawn(made, uniforms(keys, 50), 50, ScoringPath(), False)
    # Sums in another order move a draw only if it is that near to an edge.
    assert float((drawn(made.cuda(), there, 50, ScoringPath(), False).cpu() == here).float().mean()) > 0.999
