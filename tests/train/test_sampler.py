from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from orders import SHUFFLES, orders
from torch.utils.data import BatchSampler, DataLoader, Dataset

from dask_logits.errors import ConfigError
from dask_logits.train.order import ItemOrder
from dask_logits.train.sampler import ResumableSampler

# torchdata 0.11 calls what torch 2.13 deprecates.
torchdata_011 = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")


class Numbers(Dataset[torch.Tensor]):
    """Item i is the number i; at module level, so that workers can unpickle it."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


def ranks(order: ItemOrder, count: int, **kwargs) -> list[ResumableSampler]:
    return [ResumableSampler(order, num_replicas=count, rank=rank, **kwargs) for rank in range(count)]


def merged(lists: list[list[int]]) -> list[int]:
    """Return what all ranks yield, in the order of positions."""
    return [item for turn in zip(*lists, strict=True) for item in turn]


def drawn(sampler: ResumableSampler, count: int) -> list[int]:
    iterator = iter(sampler)
    return [next(iterator) for _ in range(count)]


@settings(max_examples=60)
@given(orders, st.integers(1, 9), st.booleans())
def test_the_ranks_cover_the_order_exactly(order: ItemOrder, count: int, drop_last: bool) -> None:
    items = order.items(0, order.n_items).tolist()
    samplers = ranks(order, count, drop_last=drop_last)
    found = merged([list(sampler) for sampler in samplers])
    whole = len(items) // count * count
    if drop_last:
        assert found == items[:whole]
    else:
        filled = len(found) - len(items)
        assert 0 <= filled < count
        assert found == (items * (count + 1))[: len(found)]
    assert {len(sampler) * count for sampler in samplers} == {len(found)}


@settings(max_examples=60)
@given(orders, st.integers(1, 6), st.integers(1, 6), st.integers(0, 3), st.data())
def test_other_ranks_resume_with_exactly_the_rest(
    order: ItemOrder, before: int, after: int, epoch: int, data: st.DataObject
) -> None:
    turns = data.draw(st.integers(0, max(order.n_items // before, 1) - 1 if order.n_items >= before else 0))
    first = ranks(order, before)
    for sampler in first:
        sampler.set_epoch(epoch)
    done = merged([drawn(sampler, turns) for sampler in first])
    states = [sampler.state_dict() for sampler in first]
    assert all(state == states[0] for state in states)
    second = ranks(order, after)
    for sampler in second:
        sampler.load_state_dict(json.loads(json.dumps(states[0])))
    rest = merged([list(sampler) for sampler in second])
    left = order.n_items - turns * before
    assert (done + rest)[: order.n_items] == order.items(0, order.n_items, epoch=epoch).tolist()
    assert len(rest) == -(-left // after) * after
    assert {sampler.epoch for sampler in second} == {epoch + 1}


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("drop_last", [False, True])
def test_tiny_datasets(n: int, shuffle: str, drop_last: bool) -> None:
    order = ItemOrder(n, shuffle=shuffle)
    assert sorted(order.items(0, n)) == list(range(n))
    both = ranks(order, 2, drop_last=drop_last)
    found = merged([list(sampler) for sampler in both])
    assert sorted(found) == {0: [], 1: [] if drop_last else [0, 0], 2: [0, 1]}[n]
    assert [(s.epoch, s.state_dict()["epoch"], s.state_dict()["position"]) for s in both] == [(1, 1, 0)] * 2


def test_more_ranks_than_items_wrap_more_than_once() -> None:
    assert merged([list(sampler) for sampler in ranks(ItemOrder(2, shuffle="none"), 5)]) == [0, 1, 0, 1, 0]


def test_an_epoch_that_is_done_is_the_next_one_at_its_start() -> None:
    order = ItemOrder(10)
    sampler = ResumableSampler(order)
    iterator = iter(sampler)
    for _ in range(10):
        next(iterator)
    # All is handed out, but the loop has not been told yet.
    assert (sampler.state_dict()["epoch"], sampler.state_dict()["position"]) == (1, 0)
    assert sampler.state_dict(consumed=9)["position"] == 9
    with pytest.raises(StopIteration):
        next(iterator)
    assert sampler.epoch == 1
    assert sampler.state_dict(consumed=9)["position"] == 9
    assert (sampler.state_dict(consumed=12)["epoch"], sampler.state_dict(consumed=12)["position"]) == (1, 0)
    assert list(sampler) == order.items(0, 10, epoch=1).tolist()


def test_positions_that_fill_no_turn_are_left_out_and_the_state_is_past_them() -> None:
    samplers = ranks(ItemOrder(11), 4, drop_last=True)
    assert [len(list(sampler)) for sampler in samplers] == [2] * 4
    assert samplers[0].state_dict()["epoch"] == 1
    samplers[0].load_state_dict({**samplers[0].state_dict(), "epoch": 5, "position": 9})
    assert samplers[0].epoch == 6


def test_epochs_follow_each_other_with_and_without_set_epoch() -> None:
    order = ItemOrder(7)
    epochs = [order.items(0, 7, epoch=epoch).tolist() for epoch in range(3)]
    alone, told = ResumableSampler(order), ResumableSampler(order)
    for epoch in range(3):
        assert list(alone) == epochs[epoch]
        told.set_epoch(epoch)
        assert list(told) == epochs[epoch]
    told.set_epoch(2)
    assert list(told) == epochs[2]
    told.set_epoch(0)
    assert list(told) == epochs[0]


def test_set_epoch_of_the_resumed_epoch_keeps_the_position() -> None:
    order = ItemOrder(7)
    sampler = ResumableSampler(order)
    sampler.load_state_dict({**sampler.state_dict(), "epoch": 4, "position": 5})
    sampler.set_epoch(4)
    assert list(sampler) == order.items(5, 7, epoch=4).tolist()
    sampler.set_epoch(4)
    assert list(sampler) == order.items(0, 7, epoch=4).tolist()


def test_a_loop_that_was_left_begins_again_where_it_began() -> None:
    sampler = ResumableSampler(ItemOrder(7))
    sampler.load_state_dict({**sampler.state_dict(), "position": 2})
    assert drawn(sampler, 3) == drawn(sampler, 3) == sampler.order.items(2, 5).tolist()
    assert sampler.state_dict()["position"] == 5
    assert sampler.state_dict(consumed=1)["position"] == 3


@pytest.mark.parametrize("consumed", [-1, 4])
def test_more_than_was_handed_out_was_not_consumed(consumed: int) -> None:
    sampler = ResumableSampler(ItemOrder(9))
    drawn(sampler, 3)
    with pytest.raises(ConfigError, match=rf"consumed: expected 0 to 3.*got {consumed}; count"):
        sampler.state_dict(consumed=consumed)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", 2),
        ("n_items", 8),
        ("seed", 4),
        ("shuffle", "full"),
        ("block_items", 65),
        ("window_blocks", 33),
        ("digest", "sha256:b"),
        ("digest", None),
        ("epoch", -1),
        ("position", 10),
        ("position", -1),
        ("position", 1.5),
    ],
)
def test_a_state_of_something_else_is_refused_and_changes_nothing(name: str, value) -> None:
    sampler = ResumableSampler(ItemOrder(9, 3), digest="sha256:a")
    drawn(sampler, 4)
    before = sampler.state_dict()
    with pytest.raises(ConfigError, match=rf"sampler state, {name}: expected .*, got {value!r}; "):
        sampler.load_state_dict({**before, name: value})
    with pytest.raises(ConfigError, match=rf"sampler state, {name}: expected .*, got None; "):
        sampler.load_state_dict({key: before[key] for key in before if key != name})
    assert sampler.state_dict() == before
    sampler.load_state_dict(before)
    assert sampler.state_dict() == before


def test_the_state_is_pinned() -> None:
    sampler = ResumableSampler(ItemOrder(9, 3), num_replicas=2, rank=1, digest="sha256:a")
    drawn(sampler, 2)
    assert sampler.state_dict() == {
        "version": 1,
        "seed": 3,
        "epoch": 0,
        "position": 4,
        "shuffle": "block",
        "block_items": 64,
        "window_blocks": 32,
        "n_items": 9,
        "digest": "sha256:a",
    }


@pytest.mark.parametrize(("count", "rank"), [(2, 2), (2, -1), (0, 0), (None, 1)])
def test_a_rank_that_is_none_of_them_is_refused(count: int | None, rank: int) -> None:
    with pytest.raises(ConfigError, match="rank: expected one of"):
        ResumableSampler(ItemOrder(3), num_replicas=count, rank=rank)


def test_ranks_come_from_torch_distributed() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=3)
    try:
        sampler, told = ResumableSampler(ItemOrder(7, shuffle="none")), ranks(ItemOrder(7), 1)[0]
    finally:
        torch.distributed.destroy_process_group()
    assert list(sampler) == [1, 4, 0]
    assert (told.num_replicas, told.rank) == (1, 0)


def test_a_long_epoch_is_read_piece_by_piece() -> None:
    order = ItemOrder(20_001)
    assert merged([list(sampler) for sampler in ranks(order, 2, drop_last=True)]) == order.items(0, 20_000).tolist()


# The loaders


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_loader_resumes_from_what_was_consumed(workers: int) -> None:
    order = ItemOrder(50, block_items=4, window_blocks=3)
    whole = order.items(0, 50, epoch=0).tolist()
    sampler = ResumableSampler(order)
    loader = DataLoader(Numbers(50), batch_size=4, sampler=sampler, num_workers=workers)
    seen, state = [], {}
    for batch in loader:
        seen += batch.tolist()
        if len(seen) == 20:
            state = sampler.state_dict(consumed=len(seen))
            break
    assert seen == whole[:20]
    if workers:
        assert sampler.state_dict()["position"] > 20
    resumed = ResumableSampler(order)
    resumed.load_state_dict(state)
    loader = DataLoader(Numbers(50), batch_size=4, sampler=resumed, num_workers=workers)
    assert [item for batch in loader for item in batch.tolist()] == whole[20:]
    assert [item for batch in loader for item in batch.tolist()] == order.items(0, 50, epoch=1).tolist()


@torchdata_011
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("batches", "every"), [(0, 1), (3, 1), (4, 3), (6, 1), (7, 1), (None, 1)])
def test_a_stateful_loader_resumes_with_exactly_the_remaining_batches(
    workers: int, batches: int | None, every: int
) -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")

    def loader_of_new_sampler():
        return torchdata.StatefulDataLoader(
            Numbers(28),
            batch_size=4,
            sampler=ResumableSampler(ItemOrder(28, block_items=2, window_blocks=3)),
            num_workers=workers,
            snapshot_every_n_steps=every,
        )

    expected = [
        ItemOrder(28, block_items=2, window_blocks=3).items(0, 28, epoch=epoch).reshape(7, 4).tolist()
        for epoch in range(3)
    ]
    loader = loader_of_new_sampler()
    assert [batch.tolist() for batch in loader] == expected[0]
    if batches is None:
        state, seen, left = loader.state_dict(), expected[1], expected[1:]
    else:
        iterator = iter(loader)
        seen = [next(iterator).tolist() for _ in range(batches)]
        state, left = loader.state_dict(), [expected[1][batches:], expected[2]]
    assert seen == expected[1][: len(seen)]
    resumed = loader_of_new_sampler()
    resumed.load_state_dict(state)
    assert [batch.tolist() for batch in resumed] == left[0]
    assert [batch.tolist() for batch in resumed] == left[1]


@torchdata_011
def test_stateful_loaders_of_other_ranks_resume_with_exactly_the_rest() -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    order = ItemOrder(27, block_items=2, window_blocks=3)
    whole = order.items(0, 27).tolist()

    def loaders(count: int):
        return [
            torchdata.StatefulDataLoader(Numbers(27), batch_size=3, sampler=sampler) for sampler in ranks(order, count)
        ]

    def items(batches) -> list[int]:
        return [item for batch in batches for item in batch.tolist()]

    first = loaders(2)
    assert merged([items(itertools.islice(loader, 3)) for loader in first]) == whole[:18]
    second = loaders(3)
    for loader in second:
        loader.load_state_dict(first[0].state_dict())
    assert merged([items(loader) for loader in second]) == whole[18:]
    # 27 items go round 2 ranks with one read twice; the epoch is over for all that.
    list(first[0])
    first[0].load_state_dict(first[0].state_dict())
    assert items(first[0]) == order.items(0, 27, epoch=1).tolist()[::2]


@torchdata_011
def test_a_stateful_loader_refuses_the_state_of_another_order() -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    loader, other = (
        torchdata.StatefulDataLoader(Numbers(9), batch_size=2, sampler=ResumableSampler(ItemOrder(9, seed)))
        for seed in (0, 1)
    )
    next(iter(loader))
    other.load_state_dict(loader.state_dict())
    with pytest.raises(ConfigError, match="sampler state, seed: expected 1, got 0"):
        iter(other)


def test_accelerate_resumes_in_the_right_epoch() -> None:
    accelerate = pytest.importorskip("accelerate")
    order = ItemOrder(22, block_items=2, window_blocks=3)
    epochs = [order.items(0, 22, epoch=epoch).tolist() for epoch in range(3)]

    def prepared() -> tuple[ResumableSampler, DataLoader]:
        sampler = ResumableSampler(order, num_replicas=1, rank=0)
        loader = DataLoader(Numbers(22), batch_size=4, sampler=sampler)
        return sampler, accelerate.Accelerator(cpu=True).prepare(loader)

    sampler, loader = prepared()
    assert [item for batch in loader for item in batch.tolist()] == epochs[0]
    seen, state = [], {}
    for batch in loader:
        seen += batch.tolist()
        if len(seen) == 8:
            state = sampler.state_dict(consumed=8)
            # One batch was read ahead.
            assert sampler.state_dict()["position"] == 12
            break
    assert seen == epochs[1][:8]
    sampler, loader = prepared()
    sampler.load_state_dict(state)
    found = []
    for epoch in range(sampler.epoch, 3):
        loader.set_epoch(epoch)
        found.append([item for batch in loader for item in batch.tolist()])
    assert found == [epochs[1][8:], epochs[2]]


@pytest.mark.parametrize("processes", [2, 3])
def test_accelerates_shards_cover_the_rest(processes: int) -> None:
    shard = pytest.importorskip("accelerate.data_loader").BatchSamplerShard
    order = ItemOrder(48, block_items=2, window_blocks=3)
    whole = order.items(0, 48, epoch=2).tolist()

    def sharded(sampler: ResumableSampler, process: int):
        return shard(BatchSampler(sampler, 4, drop_last=False), processes, process)

    first = [ResumableSampler(order, num_replicas=1, rank=0) for _ in range(processes)]
    done, states = [], []
    for process, sampler in enumerate(first):
        sampler.set_epoch(2)
        batches = iter(sharded(sampler, process))
        done.append([next(batches) for _ in range(2)])
        states.append(sampler.state_dict(consumed=2 * 4 * processes))
    assert all(state == states[0] for state in states)
    rest = []
    for process in range(processes):
        sampler = ResumableSampler(order, num_replicas=1, rank=0)
        sampler.load_state_dict(states[0])
        rest.append(list(sharded(sampler, process)))
    assert [i for turn in zip(*done, strict=True) for batch in turn for i in batch] == whole[: 8 * processes]
    assert [i for turn in zip(*rest, strict=True) for batch in turn for i in batch] == whole[8 * processes :]


def test_a_skip_over_accelerates_shards_lands_in_the_epoch_that_the_sampler_was_told() -> None:
    data_loader = pytest.importorskip("accelerate.data_loader")
    pytest.importorskip("accelerate").PartialState(cpu=True)
    order = ItemOrder(24, block_items=2, window_blocks=3)
    rest = []
    for process in range(2):
        sampler = ResumableSampler(order, num_replicas=1, rank=0)
        loader = DataLoader(Numbers(24), batch_size=2, sampler=sampler)
        loader = data_loader.prepare_data_loader(loader, num_processes=2, process_index=process)
        loader = data_loader.skip_first_batches(loader, 2)
        sampler.set_epoch(1)
        loader.set_epoch(1)
        rest.append([batch.tolist() for batch in loader])
    found = [item for turn in zip(*rest, strict=True) for batch in turn for item in batch]
    assert found == order.items(8, 24, epoch=1).tolist()


def test_trainer_resumes_from_a_checkpoint(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    n, seen = 12, []

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, number: torch.Tensor) -> dict[str, torch.Tensor]:
            seen.append(number.tolist())
            return {"loss": (self.weight * number).mean()}

    class OrderedTrainer(transformers.Trainer):
        def _get_train_sampler(self, train_dataset=None):
            order = ItemOrder(len(self.train_dataset), seed=self.args.seed)
            return ResumableSampler(order, num_replicas=1, rank=0)

    def train(resume: str | None = None) -> list[list[int]]:
        seen.clear()
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            remove_unused_columns=False,
            per_device_train_batch_size=2,
            num_train_epochs=2,
            save_strategy="steps",
            save_steps=8,
            seed=5,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = OrderedTrainer(
            model=Model(),
            args=args,
            train_dataset=Numbers(n),
            data_collator=lambda items: {"number": torch.stack(items)},
        )
        trainer.train(resume_from_checkpoint=resume)
        return list(seen)

    order = ItemOrder(n, seed=5)
    expected = [batch for epoch in range(2) for batch in order.items(0, n, epoch=epoch).reshape(-1, 2).tolist()]
    assert train() == expected
    assert train(str(tmp_path / "checkpoint-8")) == expected[8:]
