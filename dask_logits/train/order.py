"""``ItemOrder`` and ``ResumableSampler``: in which order a student sees the items, and how its training resumes.

The order is a function of (settings, epoch, position) and of nothing else: no permutation is stored, so a billion items
start at once, any rank reads any stretch, and a few hundred bytes of state resume a run exactly, also on another number
of ranks. Items that lie near each other share compressed chunks, so by default blocks of 64 items are shuffled over the
dataset and items over a window of 32 blocks: a reader is at work in 32 regions, a batch is of many. It costs about
0.1 µs per position on one core; a full shuffle a third of that, but it opens a chunk for nearly every item.

Keep one sampler per loader. What it yields follows the positions; what was trained on is known to who trains:

- ``torch.utils.data.DataLoader`` reads ahead with workers, so save ``sampler.state_dict(consumed=...)``, with the items
  this rank has trained on since the loop over the loader began.
- ``torchdata``'s ``StatefulDataLoader``: save and load the loader's own state, which holds the sampler's as it was at
  the batch last delivered. The sampler sees a loaded state when the loop begins, not before.
- ``accelerate`` shards the batches itself: give the sampler ``num_replicas=1, rank=0``, count `consumed` over all
  processes (steps × batch × processes), and call ``loader.set_epoch(epoch)`` on the prepared loader before each loop,
  first with ``sampler.epoch``: it counts epochs from 0 and would set the sampler back.
- ``transformers.Trainer`` is accelerate inside; it skips to where it was by itself, without reading an item, if its
  sampler is the same. Override, in a subclass::

      def _get_train_sampler(self, train_dataset=None):
          order = ItemOrder(len(self.train_dataset), seed=self.args.seed)
          return ResumableSampler(order, num_replicas=1, rank=0)

  On several processes it does not tell the sampler in which epoch it resumes (transformers 5.23, accelerate 1.15): call
  ``sampler.set_epoch(int(state.epoch or 0))`` in a callback's ``on_train_begin``.

Dimension letters: C positions asked for.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch.distributed
from torch.utils.data import Sampler

from dask_logits.errors import ConfigError

STATE_VERSION = 1
SHUFFLES = ("block", "full", "none")

# A side of the Feistel network's square, 2³⁰ at most, times a 32-bit draw then fits into 64 bits.
_MAX_ITEMS = 2**60
# Four are a pseudo-random permutation of a large domain (Luby & Rackoff). Of fewer than 20 items, 20,000 permutations
# with four are measurably not uniform (chi-square of places and of pairs); with six, those of 10 items are.
_ROUNDS = 6
_READ_AHEAD = 4096

_U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class ItemOrder:
    """The order of the items in every epoch: each item once, the same on every machine.

    Every permutation is a keyed Feistel network on a square of side ⌈√size⌉, walked until it falls inside the size
    (Black & Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002; Luby & Rackoff, SIAM J. Comput. 17(2),
    1988). The round function is the finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014); its keys are BLAKE2b of
    seed, epoch and purpose.

    Parameters
    ----------
    n_items
        Length of the dataset, at most 2⁶⁰.
    seed
        Any integer. Another seed is another order.
    shuffle
        ``block``: blocks over the dataset, items over a window of blocks. ``full``: items over the dataset. ``none``:
        dataset order, in every epoch.
    block_items
        Consecutive items in a block. Items `i` with the same ``i // block_items`` are one block; the last may be short,
        and comes at another place in each epoch.
    window_blocks
        Permuted blocks in a window, which touches one block more where the short one shifts it. The last window takes
        the rest, up to twice as many; a dataset of fewer than two windows is shuffled as a whole.

    Raises
    ------
    ConfigError
        If a setting is of the wrong type or out of bounds; all such are named.

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
            if not (_is_integer(value) and least <= value <= _MAX_ITEMS)
        ]
        if not _is_integer(self.seed):
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
        """Shuffle within each window: the place in the sequence of permuted blocks."""
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
        """Permute the whole blocks and give the short one a slot among them."""
        whole, rest = divmod(self.n_items, self.block_items)
        short_slot = int(self._keys(epoch, "short block")[0]) % (whole + 1) if rest else whole
        # As if the short block were whole, every slot has block_items places.
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
        return _round_keys(self.seed, epoch, purpose)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _round_keys(seed: int, epoch: int, purpose: str) -> _U64:
    said = f"dask_logits item order 1: seed {seed}, epoch {epoch}, {purpose}".encode()
    return np.frombuffer(hashlib.blake2b(said, digest_size=8 * _ROUNDS).digest(), "<u8").astype(np.uint64)


def _permuted(index_C: _U64, size: int, keys: _U64, tweak_C: _U64 | None = None) -> _U64:
    """Permute the integers below `size`; another tweak is another permutation."""
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


class ResumableSampler(Sampler[int]):
    """This rank's items of an order, from the position where training stands.

    Rank r of R takes every R-th position from the r-th unread one on. A state counts positions over all ranks, so it
    is the same on each, and any number of ranks goes on from it.

    Parameters
    ----------
    order
        Order of the items of the dataset.
    num_replicas, rank
        Number of ranks, and which this is. None: torch.distributed's if that is initialised, else 1 and 0. Where
        another library shards the batches (accelerate, Trainer): 1 and 0.
    drop_last
        What happens to the positions at the end of an epoch that do not go round all ranks. False: the epoch's first
        positions are read again to fill up, as torch's DistributedSampler does. True: they are left out.
    digest
        What tells this dataset from others, such as the cache's content digest; stored in the state and compared.

    Raises
    ------
    ConfigError
        If `rank` is not one of `num_replicas`.

    Notes
    -----
    A loop over the sampler that went to its end makes the next one read the next epoch, as does :meth:`set_epoch`. One
    that was left early is begun again where it began, unless :meth:`load_state_dict` says where to go on.

    A loader with its own ``drop_last`` leaves out up to a batch less one item per rank. A state saved then is short of
    the epoch's end, and the loop that resumes it may have no batch.

    Examples
    --------
    >>> sampler = ResumableSampler(ItemOrder(5, shuffle="none"), num_replicas=2, rank=1)
    >>> list(sampler)
    [1, 3, 0]
    >>> resumed = ResumableSampler(ItemOrder(5, shuffle="none"), num_replicas=1, rank=0)
    >>> resumed.load_state_dict({**sampler.state_dict(), "epoch": 0, "position": 2})
    >>> list(resumed)
    [2, 3, 4]
    """

    def __init__(
        self,
        order: ItemOrder,
        *,
        num_replicas: int | None = None,
        rank: int | None = None,
        drop_last: bool = False,
        digest: str | None = None,
    ) -> None:
        ranks, this = _process_group()
        self.order = order
        self.num_replicas = ranks if num_replicas is None else num_replicas
        self.rank = this if rank is None else rank
        self.drop_last = drop_last
        self.digest = digest
        if not 0 <= self.rank < self.num_replicas:
            raise ConfigError(
                f"rank: expected one of {self.num_replicas} from 0, got {self.rank!r}; give both or neither"
            )
        self._epoch = 0
        self._position = 0
        self._iteration: _Iteration | None = None

    @property
    def epoch(self) -> int:
        """Epoch under way; the next one as soon as the loop was told that there are no more items."""
        return self._epoch + (self._iteration is not None and self._iteration.ended)

    def set_epoch(self, epoch: int) -> None:
        """Begin `epoch` at its start, unless it is the one under way: then go on where that began or was resumed."""
        if epoch != self._epoch or self.epoch != self._epoch:
            self._go_to(epoch, 0)

    def __len__(self) -> int:
        """Items this rank yields in a whole epoch, also where one is resumed in its middle."""
        return self._share(0)

    def _share(self, position: int) -> int:
        """Count the items that every rank yields from `position` to the end of the epoch."""
        left = max(self.order.n_items - position, 0)
        return left // self.num_replicas if self.drop_last else -(-left // self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        if self.epoch != self._epoch:
            self._go_to(self.epoch, 0)
        self._go_to(self._epoch, self._position)
        self._iteration = _Iteration(self, self._epoch, self._position)
        return self._iteration

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """Return where training stands.

        Parameters
        ----------
        consumed
            Items each rank has trained on since the loop over the sampler or loader began; the last batch may count as
            a full one. None: as many as the sampler handed out, which is exact unless a loader reads ahead: with a
            plain DataLoader with workers, or inside accelerate, it is ahead of training, and items would be lost.

        Returns
        -------
        dict
            JSON types: ``version``, the settings of the order, ``digest``, ``epoch`` and ``position``, the items all
            ranks have consumed of it. Of an epoch that is done: the next one at position 0.

        Raises
        ------
        ConfigError
            If more was consumed than handed out.
        """
        now = self._iteration
        handed_out, ended = (0, False) if now is None else (now.yielded, now.ended)
        if consumed is None:
            consumed = handed_out
        if consumed < 0 or (consumed > handed_out and not ended):
            raise ConfigError(
                f"consumed: expected 0 to {handed_out}, the items handed out since the loop began, got {consumed!r}; "
                "count the items of this rank, from 0 in every loop"
            )
        if ended and consumed >= handed_out:
            return self._state(self._epoch + 1, 0)
        return self._state(*self._normal(self._epoch, self._position, consumed))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, on any number of ranks; the next loop begins there.

        Parameters
        ----------
        state
            From :meth:`state_dict`, of any rank.

        Raises
        ------
        ConfigError
            If it is of another dataset or order, or no such state; all differences are named, and nothing changes.
        """
        self._check(state)
        self._go_to(int(state["epoch"]), int(state["position"]))

    def _go_to(self, epoch: int, position: int) -> None:
        self._epoch, self._position = self._normal(epoch, position, 0)
        self._iteration = None

    def _normal(self, epoch: int, start: int, consumed: int) -> tuple[int, int]:
        """Return the epoch and position after `consumed` items per rank; an epoch without any left is done."""
        done = consumed >= self._share(start) and (start > 0 or consumed > 0)
        return (epoch + 1, 0) if done else (epoch, start + consumed * self.num_replicas)

    def _state(self, epoch: int, position: int) -> dict[str, Any]:
        return {"version": STATE_VERSION, "epoch": epoch, "position": position, **self._facts()}

    def _facts(self) -> dict[str, Any]:
        return {**asdict(self.order), "digest": self.digest}

    def _check(self, state: Mapping[str, Any]) -> None:
        expected = {"version": STATE_VERSION, **self._facts()}
        problems = [
            f"sampler state, {name}: expected {value!r}, got {state.get(name)!r}; "
            "resume with the dataset and the order it was saved with, or start anew without it"
            for name, value in expected.items()
            if state.get(name) != value
        ]
        problems += [
            f"sampler state, {name}: expected 0 to {most}, got {state.get(name)!r}; use another checkpoint"
            for name, most in (("epoch", 2**60), ("position", self.order.n_items))
            if not (_is_integer(state.get(name)) and 0 <= state[name] <= most)
        ]
        if problems:
            raise ConfigError("\n".join(problems), problems)


def _process_group() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0


class _Iteration(Iterator[int]):
    """One loop over a sampler, with a state that torchdata takes at every batch."""

    def __init__(self, sampler: ResumableSampler, epoch: int, start: int) -> None:
        self._sampler = sampler
        self._begin(epoch, start)

    def _begin(self, epoch: int, start: int) -> None:
        self.epoch, self.start = epoch, start
        self.yielded = 0
        self.ended = False
        self._ahead: Iterator[int] = iter(())
        self._read = 0

    def __next__(self) -> int:
        item = next(self._ahead, None)
        if item is None:
            self._ahead = iter(self._next_items())
            item = next(self._ahead, None)
        if item is None:
            self.ended = True
            raise StopIteration
        self.yielded += 1
        return item

    def _next_items(self) -> list[int]:
        sampler = self._sampler
        stop = min(self._read + _READ_AHEAD, sampler._share(self.start))
        turns = np.arange(self._read, stop)
        self._read = stop
        positions = self.start + sampler.rank + turns * sampler.num_replicas
        # Past the end, the epoch's first positions fill up.
        items: list[int] = sampler.order.at(positions % max(sampler.order.n_items, 1), epoch=self.epoch).tolist()
        return items

    def state_dict(self) -> dict[str, Any]:
        position = self.start + self.yielded * self._sampler.num_replicas
        return self._sampler._state(self.epoch, min(position, self._sampler.order.n_items))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        # An epoch that is done stays so here, so that the loop under way ends; the sampler goes on with the next.
        self._sampler._check(state)
        self._begin(int(state["epoch"]), int(state["position"]))
        self._sampler._epoch, self._sampler._position = self.epoch, self.start
