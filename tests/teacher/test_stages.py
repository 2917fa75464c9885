"""A pipeline gives the bits of the model's own forward, in order, keeps all stages busy, and raises what they raise."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import threading
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import VOCAB_SIZE, content, tiny_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dask_logits.data.items import Item, plain_items
from dask_logits.teacher import scoring, stages
from dask_logits.teacher.model import Teacher
from dask_logits.teacher.placement import hooks_of
from dask_logits.teacher.scoring import ScoringSettings, score_items, start_scoring
from dask_logits.teacher.selfcheck import check
from dask_logits.teacher.stages import Ahead, Pipeline, Stage, split_layers, staged

CPU = torch.device("cpu")
DOCUMENTS = [np.random.default_rng(n).integers(1, 100, size=n) for n in (30, 3, 17, 9, 24, 1, 12, 28, 5)]


def split(teacher: Teacher, n: int) -> list[Stage]:
    """Pretend that the layers are on n devices."""
    cuts = np.array_split(np.arange(len(teacher.layers())), n)
    return [Stage(device=CPU, layers=tuple(teacher.layers()[i] for i in cut)) for cut in cuts]


def pipelined(teacher: Teacher, n: int) -> Pipeline:
    made = staged(teacher.trunk, split(teacher, n), CPU)
    assert made is not None
    teacher.pipeline = made
    return made


def settings(teacher: Teacher) -> ScoringSettings:
    return ScoringSettings(
        top_k=8, vocab_size=VOCAB_SIZE, batch_tokens=40, batch_size=None, head_rows=16, path=teacher.path
    )


# Families with rotary tables, learned positions, windows, biases, two kinds of layers, and embeddings that are scaled.
@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "opt", "mistral", "bloom", "gemma2", "gemma3_text", "mixtral", "qwen3_next", "gpt_oss"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stages_give_the_same_content_as_one_device(family: str, dtype: torch.dtype) -> None:
    layers = {"gpt2": "n_layer", "bloom": "n_layer"}.get(family, "num_hidden_layers")
    kinds = {"layer_types": ["linear_attention", "full_attention"] * 2} if family == "qwen3_next" else {}
    teacher = Teacher(tiny_model(family, **{layers: 4}, **kinds).to(dtype), VOCAB_SIZE)
    check(teacher, exact=False)
    alone = score_items(teacher, plain_items(DOCUMENTS), settings(teacher)).records
    pipelined(teacher, 3)
    try:
        for _ in range(2):
            assert content(score_items(teacher, plain_items(DOCUMENTS), settings(teacher)).records) == content(alone)
    finally:
        teacher.close()
    assert teacher.pipeline is None


def test_tokens_are_sent_to_the_first_stage(monkeypatch) -> None:
    teacher = Teacher(tiny_model("llama", num_hidden_layers=4), VOCAB_SIZE)
    check(teacher, exact=False)
    expected = content(score_items(teacher, plain_items(DOCUMENTS), settings(teacher)).records)
    made, sent = pipelined(teacher, 2), []
    monkeypatch.setattr(Pipeline, "input_device", torch.device("cuda:7"))

    def to_device(array, device):
        sent.append((array.ndim, device.type))
        return torch.from_numpy(array)

    monkeypatch.setattr(scoring, "to_device", to_device)
    assert content(score_items(teacher, plain_items(DOCUMENTS), settings(teacher)).records) == expected
    assert {device for ndim, device in sent if ndim == 2} == {"cuda"}
    assert {device for ndim, device in sent if ndim == 1} == {"cpu"}
    made.close()


def test_placement_hooks_do_not_disturb() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = tiny_model("llama", num_hidden_layers=4)
    plain = Teacher(tiny_model("llama", num_hidden_layers=4), VOCAB_SIZE)
    trunk = model.model
    for module in (trunk, trunk.embed_tokens, *trunk.layers, trunk.norm, trunk.rotary_emb, model.lm_head):
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=module is trunk))
    hooked = Teacher(model, VOCAB_SIZE)
    made = pipelined(hooked, 2)
    tokens_BT = torch.arange(96).view(2, 48)
    with torch.inference_mode():
        assert torch.equal(made.submit(tokens_BT).result(), plain.hidden_states(tokens_BT))
        # The hooks of the fallback are still there.
        assert len(hooks_of(trunk)) == 8
        assert torch.equal(hooked.hidden_states(tokens_BT), plain.hidden_states(tokens_BT))
    made.close()


def test_a_pipeline_shares_the_weights() -> None:
    teacher = Teacher(tiny_model("llama", num_hidden_layers=4), VOCAB_SIZE)
    made = pipelined(teacher, 2)
    own = {parameter.data_ptr() for parameter in teacher.trunk.parameters()}
    assert {parameter.data_ptr() for trunk in (made._first, made._last) for parameter in trunk.parameters()} <= own
    before = threading.active_count()
    made.close()
    assert threading.active_count() == before - 2


def test_layers_are_grouped_by_their_device() -> None:
    layers = [nn.Linear(1, 1, device=device) for device in ("cpu", "cpu", "meta")]
    assert [(stage.device.type, len(stage.layers)) for stage in split_layers(layers)] == [("cpu", 2), ("meta", 1)]


def test_one_device_needs_no_pipeline() -> None:
    teacher = Teacher(tiny_model("llama"), VOCAB_SIZE)
    teacher.stage()
    assert teacher.pipeline is None


class _Odd(nn.Module):
    """A trunk whose second layer is given what the first one has computed, beside the hidden states."""

    def __init__(self, *, skips: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Adds() for _ in range(2))
        self.embed = nn.Embedding(64, 4)
        self.skips = skips

    def forward(self, input_ids, **_):
        from transformers.modeling_outputs import BaseModelOutput

        hidden = self.embed(input_ids)
        first = self.layers[0](hidden, extra=torch.zeros_like(hidden))
        return BaseModelOutput(last_hidden_state=first if self.skips else self.layers[1](first, extra=first * 2))


class _Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, hidden, extra):
        return hidden * 3 + extra * self.weight


@pytest.mark.parametrize(
    ("skips", "reason"), [(False, "hidden states differ"), (True, "a trunk that calls each of its layers")]
)
def test_a_model_that_is_not_understood_is_not_staged(skips: bool, reason: str, caplog) -> None:
    trunk = _Odd(skips=skips)
    before = threading.active_count()
    assert staged(trunk, [Stage(device=CPU, layers=(layer,)) for layer in trunk.layers], CPU) is None
    assert "run on one device after the other" in caplog.text
    assert reason in caplog.text
    assert threading.active_count() == before


def slowed(teacher: Teacher, seconds: float) -> list[list[tuple[float, float]]]:
    """Make every layer take a fixed time; return when each was busy."""
    busy: list[list[tuple[float, float]]] = []
    for layer in teacher.layers():
        spans: list[tuple[float, float]] = []
        busy.append(spans)

        def forward(hidden, *args, spans=spans, **kwargs):
            begun = time.perf_counter()
            time.sleep(seconds)
            spans.append((begun, time.perf_counter()))
            return hidden

        layer.forward = forward
    return busy


def test_all_stages_are_busy() -> None:
    teacher = Teacher(tiny_model("llama", num_hidden_layers=4), VOCAB_SIZE)
    made = pipelined(teacher, 4)
    busy = slowed(teacher, 0.1)
    n_batches = 60
    ahead = Ahead(made, lambda n: torch.full((1, 4), n))
    begun = time.perf_counter()
    for n in range(n_batches):
        ahead.take(range(n, n_batches))
    seconds = time.perf_counter() - begun
    made.close()
    shares = [sum(end - start for start, end in spans) / seconds for spans in busy]
    # The pipeline fills and drains: 60 of 63 steps, or 0.95. One stage after the other would be 0.25. Other work on the
    # machine takes time between the steps.
    assert min(shares) > 0.75, shares


def score_as_a_worker(teacher: Teacher, partitions: list[list[Item]], wanted: ScoringSettings) -> list[str]:
    """Score partitions in three threads, of which one at a time gives batches to the device; return their content."""
    lock = threading.Lock()

    def score(items: list[Item]) -> str:
        with lock:
            finish = scorer.submit(start_scoring, teacher, items, wanted).result()
        return content(finish().records)

    with ThreadPoolExecutor(1) as scorer, ThreadPoolExecutor(3) as threads:
        return list(threads.map(score, partitions))


def test_stages_stay_busy_from_one_partition_to_the_next() -> None:
    teacher = Teacher(tiny_model("llama", num_hidden_layers=4), VOCAB_SIZE)
    check(teacher, exact=False)
    made = pipelined(teacher, 4)
    busy = slowed(teacher, 0.1)
    # Four batches of two documents each.
    partitions = [plain_items([np.full(20, n + 1)] * 8) for n in range(10)]
    begun = time.perf_counter()
    score_as_a_worker(teacher, partitions, settings(teacher))
    seconds = time.perf_counter() - begun
    made.close()
    assert [len(spans) for spans in busy] == [40] * 4
    shares = [sum(end - start for start, end in spans) / seconds for spans in busy]
    # 40 of 43 steps, or 0.93. One partition after the other would take 70: 0.57.
    assert min(shares) > 0.75, shares


def test_partitions_that_share_a_pipeline_have_the_content_of_one_device() -> None:
    teacher = Teacher(tiny_model("llama", num_hidden_layers=4), VOCAB_SIZE)
    check(teacher, exact=False)
    partitions = [plain_items(DOCUMENTS[n:] + DOCUMENTS[:n]) for n in range(6)]
    expected = [content(score_items(teacher, items, settings(teacher)).records) for items in partitions]
    made = pipelined(teacher, 3)
    last, own = teacher.layers()[3], teacher.layers()[3].forward
    assert score_as_a_worker(teacher, partitions, settings(teacher)) == expected

    def limited(hidden, *args, **kwargs):
        if hidden.shape[0] * hidden.shape[1] > 35:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(hidden, *args, **kwargs)

    last.forward = limited
    halved = score_as_a_worker(teacher, partitions, settings(teacher))
    made.close()
    teacher.pipeline = None
    assert halved == [content(score_items(teacher, items, settings(teacher)).records) for items in partitions]


def test_a_pipeline_that_was_closed_takes_no_batch() -> None:
    made = pipelined(Teacher(tiny_model("llama", num_hidden_layers=4), VOCAB_SIZE), 2)
    made.close()
    with pytest.raises(RuntimeError, match="whose teacher was dropped"):
        made.submit(torch.ones(1, 4, dtype=torch.int64))


def test_results_are_in_order_and_parts_of_a_batch_are_computed_by_themselves() -> None:
    teacher = Teacher(tiny_model("llama", num_hidden_layers=4), VOCAB_SIZE)
    made = pipelined(teacher, 2)
    tokens = {key: torch.tensor([[key, key + 1]]) for key in range(20)}
    ahead = Ahead(made, tokens.__getitem__)
    keys = list(range(0, 20, 2))
    with torch.inference_mode():
        for key in (0, 2, 5, 7, 6, 8):
            if key == 5:
                # Batch 4 is replaced by 5 and 7.
                keys[:1] = [5, 7]
                ahead.keep(keys)
            assert torch.equal(ahead.take(keys), teacher.trunk(tokens[key]).last_hidden_state)
            assert keys.pop(0) == key
    ahead.keep(())
    made.close()


def test_an_error_of_a_stage_is_raised_as_it_is_and_the_next_batches_are_right() -> None:
    teacher = Teacher(tiny_model("llama", num_hidden_layers=4), VOCAB_SIZE)
    check(teacher, exact=False)
    expected = content(score_items(teacher, plain_items(DOCUMENTS), settings(teacher)).records)
    made = pipelined(teacher, 2)
    error = ValueError("a layer is broken")
    third, own = teacher.layers()[2], teacher.layers()[2].forward
    calls = []

    def fail(*args, **kwargs):
        calls.append(1)
        raise error

    third.forward = fail
    with pytest.raises(ValueError, match="a layer is broken") as caught:
        score_items(teacher, plain_items(DOCUMENTS), settings(teacher))
    assert caught.value is error
    third.forward = own
    assert content(score_items(teacher, plain_items(DOCUMENTS), settings(teacher)).records) == expected
    # What was in flight has ended, and the rest was never begun.
    assert len(calls) <= made.depth
    made.close()


def test_a_batch_that_does_not_fit_is_halved_at_the_same_places() -> None:
    teacher = Teacher(tiny_model("llama", num_hidden_layers=4), VOCAB_SIZE)
    check(teacher, exact=False)
    last, own = teacher.layers()[3], teacher.layers()[3].forward

    def limited(hidden, *args, **kwargs):
        if hidden.shape[0] * hidden.shape[1] > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(hidden, *args, **kwargs)

    last.forward = limited
    large = dataclasses.replace(settings(teacher), batch_tokens=120)
    alone = score_items(teacher, plain_items(DOCUMENTS), large)
    assert alone.splits
    last.forward = own
    made = pipelined(teacher, 3)
    last.forward = limited
    found = score_items(teacher, plain_items(DOCUMENTS), large)
    made.close()
    assert (found.splits, content(found.records)) == (alone.splits, content(alone.records))


class _Submissions:
    """Stands in for a pipeline: notes what is submitted."""

    depth = 3

    def __init__(self) -> None:
        self.futures: dict[str, Future[str]] = {}

    def submit(self, key: str) -> Future[str]:
        assert key not in self.futures
        self.futures[key] = Future()
        if key != "c":
            self.futures[key].set_result(key)
        return self.futures[key]


def test_after_a_batch_that_does_not_fit_the_pipeline_is_full_again() -> None:
    noted = _Submissions()
    ahead = Ahead(noted, lambda key: key)
    assert ahead.take("abcdefgh") == "a"
    ahead.take("bcdefgh")
    assert list(noted.futures) == ["a", "b", "c", "d"]
    # b does not fit, c is as large, and d is smaller.
    parts = ["b1", "b2", "c1", "c2", *"defgh"]
    ahead.keep(parts)
    assert noted.futures["c"].cancelled()
    for n, key in enumerate(parts):
        assert ahead.take(parts[n:]) == key
        assert ahead.n_begun == min(noted.depth - 1, len(parts) - n - 1), key
    # Each part was computed once, d before the halves.
    assert list(noted.futures) == ["a", "b", "c", "d", "b1", "b2", "c1", "c2", "e", "f", "g", "h"]


def test_after_a_failure_in_the_middle_no_part_is_computed_twice() -> None:
    teacher = Teacher(tiny_model("llama", num_hidden_layers=4), VOCAB_SIZE)
    check(teacher, exact=False)
    documents = plain_items([np.full(20, n) for n in range(1, 33)])
    wanted = dataclasses.replace(settings(teacher), batch_tokens=80)
    last = teacher.layers()[3]
    own = last.forward

    def limit() -> None:
        """Let two whole batches pass, as if memory became short then."""
        n_whole = 0

        def forward(hidden, *args, **kwargs):
            nonlocal n_whole
            n_whole += len(hidden) == 4
            if len(hidden) == 4 and n_whole > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return own(hidden, *args, **kwargs)

        last.forward = forward

    limit()
    alone = score_items(teacher, documents, wanted)
    assert alone.splits == {n: [2, 2] for n in range(2, 8)}
    last.forward = own
    made = pipelined(teacher, 2)
    submitted: list[list[int]] = []
    submit = made.submit
    made.submit = lambda ids_BT: submitted.append(ids_BT[:, 0].tolist()) or submit(ids_BT)
    limit()
    found = score_items(teacher, documents, wanted)
    made.close()
    assert (found.splits, content(found.records)) == (alone.splits, content(alone.records))
    assert found.padded_tokens == 32 * 20
    # Three batches are in flight when the third one fails.
    whole = [list(range(n, n + 4)) for n in range(1, 21, 4)]
    assert submitted == [*whole, *([n, n + 1] for n in range(9, 33, 2))]


def test_nothing_of_a_failed_batch_is_held() -> None:
    teacher = Teacher(tiny_model("llama", num_hidden_layers=4), VOCAB_SIZE)
    made = pipelined(teacher, 2)
    held: list[weakref.ref[torch.Tensor]] = []

    def fail(hidden, *args, **kwargs):
        scores = torch.zeros(8)
        held.extend(weakref.ref(tensor) for tensor in (scores, hidden))
        try:
            raise ValueError("the first kernel")
        except ValueError as error:
            raise torch.OutOfMemoryError("CUDA out of memory") from error

    for layer in (teacher.layers()[2], teacher.layers()[0]):
        own, layer.forward = layer.forward, fail
        ahead = Ahead(made, lambda n: torch.full((2, 20), n))
        gc.disable()
        try:
            with pytest.raises(torch.OutOfMemoryError):
                ahead.take(range(1, 9))
            wait(ahead._flying.values())
            # Those in flight have failed, too.
            assert len(held) == made.depth * 2
            assert [tensor() for tensor in held] == [None] * len(held)
        finally:
            gc.enable()
        ahead.keep(())
        layer.forward = own
        held.clear()
    made.close()


def test_the_tensors_of_a_batch_that_is_dropped_are_freed() -> None:
    teacher = Teacher(tiny_model("llama", num_hidden_layers=4), VOCAB_SIZE)
    made = pipelined(teacher, 2)
    ahead = Ahead(made, lambda n: torch.full((2, 20), n))
    ahead.take(range(1, 9))
    wait(ahead._flying.values())
    held = [weakref.ref(future.result()) for future in ahead._flying.values()]
    assert len(held) == 2
    ahead.keep([4, 5])
    # The thread of the last stage lets go of a batch after its result is there.
    patience = time.monotonic() + 60
    while any(tensor() is not None for tensor in held):
        assert time.monotonic() < patience
        time.sleep(0.01)
    made.close()


def test_stages_skip_a_batch_that_was_cancelled_in_an_earlier_one() -> None:
    teacher = Teacher(tiny_model("llama", num_hidden_layers=4), VOCAB_SIZE)
    made = pipelined(teacher, 2)
    first, third = teacher.layers()[0], teacher.layers()[2]
    first_own, third_own = first.forward, third.forward
    begun, cancelled = threading.Event(), threading.Event()
    n_third = []

    def waits(*args, **kwargs):
        begun.set()
        assert cancelled.wait(60)
        return first_own(*args, **kwargs)

    first.forward = waits
    third.forward = lambda *args, **kwargs: n_third.append(1) or third_own(*args, **kwargs)
    dropped = made.submit(torch.ones(1, 4, dtype=torch.int64))
    assert begun.wait(60)
    assert dropped.cancel()
    cancelled.set()
    tokens_BT = torch.arange(1, 5)[None]
    with torch.inference_mode():
        found_BTD = made.submit(tokens_BT).result()
        assert n_third == [1]
        assert torch.equal(found_BTD, teacher.trunk(tokens_BT).last_hidden_state)
    made.close()


def test_tensors_that_layers_share_are_sent_once() -> None:
    table = torch.ones(2)
    sent = stages._sent([(table, {"mask": table, "none": None}), (table + 1,)], torch.device("meta"))
    assert sent[0][0] is sent[0][1]["mask"]
    assert sent[0][0].device.type == sent[1][0].device.type == "meta"
    assert sent[0][1]["none"] is None


class _Streams:
    """Stands in for ``torch.cuda``: notes what is sent to which stream."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current: dict[str, str] = {}

    def Stream(self, device):  # noqa: N802 - as in torch
        return self._stream(f"copy stream of {device}")

    def current_stream(self, device):
        return self._stream(self.current.get(str(device), f"stream of {device}"))

    def Event(self):  # noqa: N802 - as in torch
        return SimpleNamespace(record=lambda stream: self.log.append(f"event behind {stream.name}"))

    @contextlib.contextmanager
    def stream(self, stream):
        device = stream.name.rpartition(" ")[2]
        before, self.current = self.current, {**self.current, device: stream.name}
        yield
        self.current = before

    def _stream(self, name):
        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: self.log.append(f"{name} waits for {other.name}"),
            wait_event=lambda event: self.log.append(f"{name} waits for the event"),
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a build of torch with CUDA treats fake tensors otherwise")
def test_gpus_hand_over_on_streams_that_only_copy(monkeypatch) -> None:
    streams = _Streams()
    monkeypatch.setattr(stages, "cuda", streams)
    stages._copy_stream.cache_clear()
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: streams.log.append(f"{tensor.device} in {stream.name}")
    )
    send = stages._sent
    monkeypatch.setattr(
        stages, "_sent", lambda values, device: streams.log.append(f"send in {streams.current}") or send(values, device)
    )
    with FakeTensorMode():
        one, two = torch.device("cuda:0"), torch.device("cuda:1")
        batch = stages._Batch(torch.zeros(1, 4), None, torch.zeros(1, 4, 8, device=one))
        stages._await(batch, one)
        stages._hand_over(batch, one)
        assert streams.log == []
        stages._hand_over(batch, two)
        assert batch.hidden_BTD.device == two
        stages._await(batch, two)
    copies = {str(device): f"copy stream of {device}" for device in (one, two)}
    assert streams.log == [
        f"{copies['cuda:0']} waits for stream of cuda:0",
        # The memory is not reused before the copy has been made.
        f"cuda:0 in {copies['cuda:0']}",
        f"send in {copies}",
        f"event behind {copies['cuda:1']}",
        "stream of cuda:1 waits for the event",
        "cuda:1 in stream of cuda:1",
    ]
    stages._copy_stream.cache_clear()
