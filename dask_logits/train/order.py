"""``ItemOrder``: the order in which a student sees the items.

The order is a function of (settings, epoch, position) alone. No permutation is stored, so a billion items start
immediately, and any rank reads any range. Neighbouring items share compressed chunks, so by default blocks of 64 items
are shuffled over the dataset, and items over a window of 32 blocks: a reader uses 32 regions, and a batch mixes many.
This costs about 0.1 µs per position on one core. A full shuffle costs a third, but opens a chunk for nearly every item.

Dimension letters: C requested positions.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dask_logits.errors import ConfigError

SHUFFLES = ("block", "full", "none")

# A side of the Feistel network's square, 2³⁰ at most, so that its product with a 32-bit draw fits into 64 bits.
_MAX_ITEMS = 2**60
# Four are a pseudo-random permutation of a large domain (Luby & Rackoff). For fewer than 20 items, 20,000 permutations
# with four are measurably not uniform (chi-square of places and of pairs). With six, those of 10 items are.
_ROUNDS = 6

_U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class ItemOrder:
    """The order of the items in every epoch: each item once, the same on every machine.

    Every permutation is a keyed Feistel network on a square of side ⌈√size⌉, iterated until the result is below the
    size (Black & Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002; Luby & Rackoff, SIAM J. Comput. 17(2),
    1988). The round function is the finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014). Its keys are BLAKE2b
    of seed, epoch and purpose.

    Parameters
    ----------
    n_items
        Length of the dataset, at most 2⁶⁰.
    seed
        Any integer. Different seeds give different orders.
    shuffle
        ``block``: blocks over the dataset, items over a window of blocks. ``full``: items over the dataset. ``none``:
        dataset order, in every epoch.
    block_items
        Consecutive items in a block. Items `i` with the same ``i // block_items`` are one block. The last block may be
        short, and its place differs in each epoch.
    window_blocks
        Permuted blocks in a window, which touches one block more if the short one shifts it. The last window includes
        the remainder, up to twice as many. A dataset of fewer than two windows is shuffled as a whole.

    Raises
    ------
    ConfigError
        If settings are of the wrong type or out of bounds. All of them are named.

    Examples
    --------
    >>> order = ItemOrder(10, seed=1, block_items=2, window_blocks=2)
    >>> order.items(0, 10).tolist()
    [3, 2, 4, 5, 6, 8, 0, 9, 7, 1]
    >>> order.items(4, 8, epoch=1).tolist()
    [8, 6, 0, 1]
    """

    n_items: int
    seed: int = 0
    _: KW_ONLY
    shuffle: Literal["block", "full", "none"] = "block"
    block_items: int = 64
    window_blocks: int = 32

    def __post_init__(self) -> None:
        problems = [
            f"{name}: expected an integer of {least} to 2**60, got {value!r}"
            for name, least, value in (
                ("n_items", 0, self.n_items),
                ("block_items", 1, self.block_items),
                ("window_blocks", 1, self.window_blocks),
            )
            if not (is_integer(value) and least <= value <= _MAX_ITEMS)
        ]
        if not is_integer(self.seed):
            problems.append(f"seed: expected an integer, got {self.seed!r}")
        if self.shuffle not in SHUFFLES:
            problems.append(f"shuffle: expected one of {', '.join(SHUFFLES)}, got {self.shuffle!r}")
        if problems:
            raise ConfigError("\n".join(problems), problems)

    def items(self, first: int, stop: int, *, epoch: int = 0) -> npt.NDArray[np.int64]:
        """Return the items at the positions from `first` to before `stop`.

        Parameters
        ----------
        first, stop
            Positions in the epoch, 0 ≤ first ≤ stop ≤ n_items.
        epoch
            Epoch, from 0.

        Returns
        -------
        array [C] int64
            Item indices, in time and memory proportional to C.

        Raises
        ------
        IndexError
            If the positions or the epoch are out of bounds.
        """
        if not 0 <= first <= stop <= self.n_items:
            raise IndexError(f"positions {first} to {stop}: expected 0 <= first <= stop <= {self.n_items}")
        return self.at(np.arange(first, stop, dtype=np.int64), epoch=epoch)

    def at(self, positions_C: npt.ArrayLike, *, epoch: int = 0) -> npt.NDArray[np.int64]:
        """Return the items at any positions.

        Parameters
        ----------
        positions_C
            Positions in the epoch, integers [C] from 0 to n_items - 1, in any order.
        epoch
            Epoch, from 0.

        Returns
        -------
        array [C] int64
            Item indices.

        Raises
        ------
        IndexError
            If a position or the epoch is out of bounds.
        """
        given_C = np.atleast_1d(np.asarray(positions_C, dtype=np.int64))
        if epoch < 0:
            raise IndexError(f"epoch {epoch}: expected 0 or more")
        if given_C.size and not 0 <= given_C.min() <= given_C.max() < self.n_items:
            raise IndexError(f"positions: expected 0 to {self.n_items - 1}, got {given_C.min()} to {given_C.max()}")
        if self.shuffle == "none":
            return given_C.copy()
        position_C = given_C.astype(np.uint64)
        if self.shuffle == "full":
            return _permuted(position_C, self.n_items, self._keys(epoch, "items")).astype(np.int64)
        return self._item_of(self._place_of(position_C, epoch), epoch).astype(np.int64)

    def _place_of(self, position_C: _U64, epoch: int) -> _U64:
        """Shuffle within each window. Return the place in the sequence of permuted blocks."""
        keys = self._keys(epoch, "items")
        window_items = min(self.block_items * self.window_blocks, max(self.n_items, 1))
        last = max(self.n_items // window_items, 1) - 1
        last_start = last * window_items
        window_C = np.minimum(position_C // window_items, last)
        place_C = np.empty_like(position_C)
        for chosen_C, size in ((window_C < last, window_items), (window_C == last, self.n_items - last_start)):
            start_C = window_C[chosen_C] * window_items
            inside_C = _permuted(position_C[chosen_C] - start_C, size, keys, window_C[chosen_C])
            place_C[chosen_C] = start_C + inside_C
        return place_C

    def _item_of(self, place_C: _U64, epoch: int) -> _U64:
        """Permute the whole blocks, and assign a slot among them to the short one."""
        whole, rest = divmod(self.n_items, self.block_items)
        short_slot = int(self._keys(epoch, "short block")[0]) % (whole + 1) if rest else whole
        # Treat the short block as whole, so that every slot has block_items places.
        behind_C = place_C >= short_slot * self.block_items + rest
        place_C = place_C + behind_C * np.uint64(self.block_items - rest)
        slot_C = place_C // np.uint64(self.block_items)
        inside_C = place_C - slot_C * np.uint64(self.block_items)
        block_C = np.full_like(slot_C, whole)
        in_whole_C = slot_C != short_slot
        index_C = slot_C[in_whole_C] - (slot_C[in_whole_C] > short_slot)
        block_C[in_whole_C] = _permuted(index_C, whole, self._keys(epoch, "blocks"))
        return block_C * np.uint64(self.block_items) + inside_C

    def _keys(self, epoch: int, purpose: str) -> _U64:
        said = f"dask_logits item order 1: seed {self.seed}, epoch {epoch}, {purpose}".encode()
        return np.frombuffer(hashlib.blake2b(said, digest_size=8 * _ROUNDS).digest(), "<u8").astype(np.uint64)


def is_integer(value: object) -> bool:
    """Whether a value is an integer and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def _permuted(index_C: _U64, size: int, keys: _U64, tweak_C: _U64 | None = None) -> _U64:
    """Permute the integers below `size`. Each tweak gives a different permutation."""
    side = math.isqrt(max(size, 1) - 1) + 1
    mixed_C = np.zeros_like(index_C) if tweak_C is None else _mixed(tweak_C + keys[0])
    out_C = _feistel(index_C, side, keys, mixed_C)
    outside = np.flatnonzero(out_C >= size)
    while outside.size:
        out_C[outside] = _feistel(out_C[outside], side, keys, mixed_C[outside])
        outside = outside[out_C[outside] >= size]
    return out_C


def _feistel(index_C: _U64, side: int, keys: _U64, tweak_C: _U64) -> _U64:
    left_C = index_C // np.uint64(side)
    right_C = index_C - left_C * np.uint64(side)
    for key in keys:
        # The upper half of the draw, scaled to 0 .. side - 1.
        sum_C = left_C + ((_mixed(right_C + tweak_C + key) >> np.uint64(32)) * np.uint64(side) >> np.uint64(32))
        left_C, right_C = right_C, sum_C - (sum_C >= side) * np.uint64(side)
    return left_C * np.uint64(side) + right_C


def _mixed(value_C: _U64) -> _U64:
    value_C = (value_C ^ (value_C >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value_C = (value_C ^ (value_C >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value_C ^ (value_C >> np.uint64(31))
