"""``ResumableSampler``: iteration over the items of a dataset, with exact resumption.

A few hundred bytes of state resume a run exactly, even with another number of ranks.

Use one sampler per loader. The sampler knows the positions it yielded. Only the training code knows the items consumed:

- ``torch.utils.data.DataLoader`` reads ahead with workers. Save ``sampler.state_dict(consumed=...)`` with the number of
  items this rank has trained on since the loop over the loader began.
- ``torchdata``'s ``StatefulDataLoader``: save and load the loader's own state, which contains the sampler's state at
  the last delivered batch. The sampler sees a loaded state when the loop begins, not before.
- ``accelerate`` shards the batches itself. Use ``num_replicas=1, rank=0``, count `consumed` over all processes
  (steps × batch × processes), and call ``loader.set_epoch(epoch)`` on the prepared loader before each loop, first with
  ``sampler.epoch``. It counts epochs from 0 and would otherwise reset the sampler.
- ``transformers.Trainer``: :class:`dask_logits.DistillationTrainer` has this sampler. Any other Trainer with the same
  sampler also skips to its old position without reading an item. Override, in a subclass::

      def _get_train_sampler(self, train_dataset=None):
          order = ItemOrder(len(self.train_dataset), seed=self.args.seed)
          return ResumableSampler(order, num_replicas=1, rank=0)

  With several processes it does not tell the sampler the resumed epoch (transformers 5.23, accelerate 1.15). Call
  ``sampler.set_epoch(int(state.epoch or 0))`` in a callback's ``on_epoch_begin``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch.distributed
from torch.utils.data import Sampler

from dask_logits.errors import ConfigError
from dask_logits.train.order import ItemOrder, is_integer

STATE_VERSION = 1
_READ_AHEAD = 4096


class ResumableSampler(Sampler[int]):
    """Yields this rank's items of an order, from the current training position.

    Rank r of R takes every R-th position from the r-th unread one on. A state counts positions over all ranks, so it
    is the same on each, and any number of ranks can resume from it.

    Parameters
    ----------
    order
        Order of the items of the dataset.
    num_replicas, rank
        Number of ranks, and the index of this one. None: torch.distributed's if initialized, else 1 and 0. If another
        library shards the batches (accelerate, Trainer), use 1 and 0.
    drop_last
        Treatment of the last positions of an epoch that do not fill all ranks. False: the epoch's first positions are
        repeated, as in torch's DistributedSampler. True: the last positions are dropped.
    digest
        Identity of the dataset, such as the cache's content digest. It is stored in the state and compared.

    Raises
    ------
    ConfigError
        If `rank` is not one of `num_replicas`.

    Notes
    -----
    A completed loop over the sampler makes the next loop read the next epoch, as does :meth:`set_epoch`. A loop that
    was left early restarts where it began, unless :meth:`load_state_dict` sets another position.

    A loader with its own ``drop_last`` drops up to a batch less one item per rank. A state saved then is before the
    epoch's end, and the loop that resumes it may have no batch.

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
        """Current epoch. It advances as soon as a loop has ended."""
        return self._epoch + (self._iteration is not None and self._iteration.ended)

    def set_epoch(self, epoch: int) -> None:
        """Start `epoch` from its beginning. If it is the current one, continue where it began or was resumed."""
        if epoch != self._epoch or self.epoch != self._epoch:
            self._go_to(epoch, 0)

    def __len__(self) -> int:
        """Number of items that this rank yields in a whole epoch, even if the epoch is resumed in its middle."""
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
        """Return the training position.

        Parameters
        ----------
        consumed
            Items each rank has trained on since the loop over the sampler or loader began. The last batch may count as
            a full one. None: the number of yielded items, which is exact unless a loader reads ahead. With a plain
            DataLoader with workers, or inside accelerate, that number is ahead of training, and items would be lost.

        Returns
        -------
        dict
            JSON types: ``version``, the settings of the order, ``digest``, ``epoch``, and ``position``, the items of
            the epoch consumed by all ranks. After a complete epoch: the next one at position 0.

        Raises
        ------
        ConfigError
            If more items were consumed than yielded.
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
        """Resume from `state`, with any number of ranks. The next loop begins there.

        Parameters
        ----------
        state
            From :meth:`state_dict`, of any rank.

        Raises
        ------
        ConfigError
            If it belongs to another dataset or order, or is invalid. All differences are named, and nothing changes.
        """
        self._check(state)
        self._go_to(int(state["epoch"]), int(state["position"]))

    def _go_to(self, epoch: int, position: int) -> None:
        self._epoch, self._position = self._normal(epoch, position, 0)
        self._iteration = None

    def _normal(self, epoch: int, start: int, consumed: int) -> tuple[int, int]:
        """Return the epoch and position after `consumed` items per rank. An exhausted epoch is complete."""
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
            if not (is_integer(state.get(name)) and 0 <= state[name] <= most)
        ]
        if problems:
            raise ConfigError("\n".join(problems), problems)


def _process_group() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0


class _Iteration(Iterator[int]):
    """One loop over a sampler, with a state that torchdata saves at every batch."""

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
        # Past the end, the epoch's first positions are repeated.
        items: list[int] = sampler.order.at(positions % max(sampler.order.n_items, 1), epoch=self.epoch).tolist()
        return items

    def state_dict(self) -> dict[str, Any]:
        position = self.start + self.yielded * self._sampler.num_replicas
        return self._sampler._state(self.epoch, min(position, self._sampler.order.n_items))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        # A complete epoch is kept here, so that the current loop ends. The sampler moves on to the next one.
        self._sampler._check(state)
        self._begin(int(state["epoch"]), int(state["position"]))
        self._sampler._epoch, self._sampler._position = self.epoch, self.start
