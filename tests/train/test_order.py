from __future__ import annotations

import hashlib
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orders import SHUFFLES, orders

from dask_logits.errors import ConfigError
from dask_logits.train.order import ItemOrder
from dask_logits.train.sampler import ResumableSampler

# (shuffle, n_items, seed, epoch, first position): the items at six positions.
GOLDEN = {
    ("block", 1000, 0, 0, 0): [995, 581, 624, 197, 596, 652],
    ("block", 100003, 7, 3, 99997): [33272, 87657, 47507, 67418, 56982, 8894],
    ("block", 10**9, -1, 1, 123456789): [679308463, 438630946, 563796482, 679308447, 797166571, 719576661],
    ("full", 1000, 0, 0, 0): [451, 441, 889, 637, 955, 362],
    ("full", 10**9, 2**64, 12, 999999994): [396349915, 255323571, 720755998, 73953891, 752364135, 930056663],
}


@settings(max_examples=150)
@given(orders, st.integers(0, 2**40))
def test_every_epoch_holds_every_item_once(order: ItemOrder, epoch: int) -> None:
    items = order.items(0, order.n_items, epoch=epoch)
    assert items.dtype == np.int64
    assert sorted(items.tolist()) == list(range(order.n_items))


@settings(max_examples=60)
@given(orders, st.integers(0, 5), st.data())
def test_a_slice_is_its_positions_one_by_one(order: ItemOrder, epoch: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, order.n_items))
    stop = data.draw(st.integers(first, min(order.n_items, first + 30)))
    single = [int(order.items(p, p + 1, epoch=epoch)[0]) for p in range(first, stop)]
    assert order.items(first, stop, epoch=epoch).tolist() == single
    assert order.at(range(stop - 1, first - 1, -1), epoch=epoch).tolist() == single[::-1]


@pytest.mark.parametrize(("shuffle", "n", "seed", "epoch", "first"), list(GOLDEN))
def test_the_order_never_changes(shuffle: str, n: int, seed: int, epoch: int, first: int) -> None:
    order = ItemOrder(n, seed, shuffle=shuffle)
    assert order.items(first, first + 6, epoch=epoch).tolist() == GOLDEN[shuffle, n, seed, epoch, first]


def item_in_plain_integers(n: int, seed: int, epoch: int, position: int) -> int:
    """Compute one item of a full shuffle without numpy."""
    said = f"dask_logits item order 1: seed {seed}, epoch {epoch}, items".encode()
    digest = hashlib.blake2b(said, digest_size=48).digest()
    keys = [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 48, 8)]
    side = math.isqrt(n - 1) + 1
    while True:
        left, right = divmod(position, side)
        for key in keys:
            z = (right + key) % 2**64
            z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
            z ^= z >> 31
            left, right = right, (left + ((z >> 32) * side >> 32)) % side
        position = left * side + right
        if position < n:
            return position


@pytest.mark.parametrize("n", [1, 2, 3, 50, 10**6 + 1, 2**60])
def test_numpy_computes_what_plain_integers_do(n: int) -> None:
    positions = sorted({0, n // 3, n // 2, n - 1})
    expected = [item_in_plain_integers(n, -4, 9, position) for position in positions]
    assert ItemOrder(n, -4, shuffle="full").at(positions, epoch=9).tolist() == expected


def test_dataset_order_is_the_dataset_order_in_every_epoch() -> None:
    order = ItemOrder(9, shuffle="none")
    assert order.items(2, 9, epoch=3).tolist() == [2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("shuffle", ["block", "full"])
def test_epochs_and_seeds_differ(shuffle: str) -> None:
    n = 5000
    seen = [ItemOrder(n, seed, shuffle=shuffle).items(0, n, epoch=e) for seed, e in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for i, one in enumerate(seen):
        for other in seen[:i]:
            # Two independent permutations agree at one place on average.
            assert (one == other).sum() < 20


def test_a_full_shuffle_is_unlike_the_dataset_order() -> None:
    n = 20_000
    items = ItemOrder(n, shuffle="full").items(0, n)
    # 1 / √n is one standard deviation.
    assert abs(np.corrcoef(np.arange(n), items)[0, 1]) < 4 / np.sqrt(n)
    assert abs(np.corrcoef(items[:-1], items[1:])[0, 1]) < 4 / np.sqrt(n)


def test_small_permutations_are_uniform() -> None:
    n, trials = 10, 2000
    places = np.stack([ItemOrder(n, seed, shuffle="full").items(0, n) for seed in range(trials)])
    counts = np.stack([np.bincount(column, minlength=n) for column in places.T])
    chi_square = ((counts - trials / n) ** 2 / (trials / n)).sum()
    freedom = (n - 1) ** 2
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def test_blocks_mix_within_batches_and_stay_near_within_windows() -> None:
    order = ItemOrder(64 * 320 + 17)
    blocks = order.items(0, order.n_items) // order.block_items
    windows = np.split(blocks, range(2048, order.n_items - 2048, 2048))
    touched = [len(np.unique(window)) for window in windows]
    # Behind the short block a window begins and ends within one.
    assert set(touched) <= {32, 33}
    batches = [len(np.unique(batch)) for batch in np.split(blocks, range(64, len(blocks), 64))[:-1]]
    # 64 draws from 32 blocks hit 27.8 on average.
    assert min(batches) > 18
    assert 27 < np.mean(batches) < 28.5
    # Windows are of blocks from everywhere: their means lie close to the middle.
    assert max(abs(window.mean() - 160) for window in windows) < 5 * 320 / np.sqrt(12 * 32)


def test_windows_are_shuffled_differently() -> None:
    inside = ItemOrder(64 * 64, window_blocks=16, block_items=4).items(0, 4096) % 4
    assert len({tuple(window) for window in inside.reshape(-1, 64).tolist()}) == 64


def test_it_is_not_always_the_same_items_that_come_last() -> None:
    order = ItemOrder(4 * 10 + 3, block_items=4, window_blocks=2)
    last = np.concatenate([order.items(37, 43, epoch=epoch) for epoch in range(100)])
    assert set(last.tolist()) == set(range(43))
    assert np.bincount(last).max() < 40


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_a_billion_items_start_at_once(shuffle: str) -> None:
    began = time.perf_counter()
    order = ItemOrder(10**9, shuffle=shuffle)
    items = order.items(10**9 - 1000, 10**9, epoch=7)
    sampler = ResumableSampler(order)
    sampler.load_state_dict({**sampler.state_dict(), "position": 10**9 - 3})
    left = list(sampler)
    assert time.perf_counter() - began < 0.1
    assert len(set(items.tolist())) == 1000
    assert 0 <= items.min() <= items.max() < 10**9
    assert left == order.items(10**9 - 3, 10**9).tolist()


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"n_items": -1}, "n_items: expected an integer of 0 to"),
        ({"n_items": 2**60 + 1}, "n_items: expected an integer of 0 to"),
        ({"n_items": 3.0}, "n_items: expected an integer of 0 to"),
        ({"block_items": 0}, "block_items: expected an integer of 1 to"),
        ({"window_blocks": 0}, "window_blocks: expected an integer of 1 to"),
        ({"seed": "x"}, "seed: expected an integer, got 'x'"),
        ({"shuffle": "all"}, "shuffle: expected one of block, full, none, got 'all'"),
    ],
)
def test_bad_orders_are_refused(kwargs, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        ItemOrder(**{"n_items": 3, **kwargs})


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match="n_items") as caught:
        ItemOrder(-1, shuffle="all", block_items=0)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("call", [(0, 4), (-1, 2), (2, 1)])
def test_positions_outside_are_refused(call: tuple[int, int]) -> None:
    with pytest.raises(IndexError, match="expected 0 <= first <= stop <= 3"):
        ItemOrder(3).items(*call)
    with pytest.raises(IndexError, match="expected 0 to 2, got 1 to 3"):
        ItemOrder(3).at([1, 3])
    with pytest.raises(IndexError, match="epoch -1"):
        ItemOrder(3).items(0, 1, epoch=-1)
