"""Targets are the teacher's: compared with its own forward, document by document, without padding."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from builders import FAMILIES, HEAD_WIDTH, VOCAB_SIZE, tiny_model
from plain_forward import K, assert_targets_match, plain_targets, settings
from torch.utils._python_dispatch import TorchDispatchMode

from dask_logits.data.items import plain_items
from dask_logits.errors import CapacityError, TeacherError
from dask_logits.teacher.model import HEADS, ScoringPath, Teacher
from dask_logits.teacher.scoring import score_items
from dask_logits.teacher.selfcheck import check, try_compiled
from dask_logits.teacher.topk import padded_width, topk_with_tail

LENGTHS = [1, 40, 0, 7, 33, 33, 2, 19]


def documents(vocab_size: int = VOCAB_SIZE) -> list[np.ndarray]:
    draw = np.random.default_rng(3)
    return [draw.integers(vocab_size, size=n).astype(np.int32) for n in LENGTHS]


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_equal_the_plain_forward(family: str) -> None:
    model = tiny_model(family)
    teacher = Teacher(model, VOCAB_SIZE)
    path = check(teacher, exact=True).path
    records = score_items(teacher, plain_items(documents()), settings(path=path)).records
    teacher.take(ScoringPath())
    start = compared = 0
    for document in documents():
        stop = start + len(document)
        if len(document):
            found = {name: array[start:stop] for name, array in records.arrays() if len(array) == records.n_tokens}
            np.testing.assert_array_equal(found["input_ids"], document)
            compared += assert_targets_match(found, plain_targets(model, document, VOCAB_SIZE, K))
        start = stop
    assert start == records.n_tokens
    assert compared > 0.9 * start


def test_switching_the_path_is_no_part_of_the_time_of_a_partition(monkeypatch) -> None:
    teacher = Teacher(tiny_model("llama"), VOCAB_SIZE)
    path = check(teacher, exact=True).path
    take = teacher.take
    monkeypatch.setattr(teacher, "take", lambda path: time.sleep(3) or take(path))
    assert score_items(teacher, plain_items(documents()), settings(path=path)).seconds["score"] < 3


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@torch.inference_mode()
def test_logprobs_before_rounding_are_within_a_ten_thousandth_nat(family: str) -> None:
    model = tiny_model(family)
    teacher = Teacher(model, VOCAB_SIZE)
    path = check(teacher, exact=True).path
    tokens_BT = torch.from_numpy(np.stack([np.pad(d, (0, 40 - len(d))) for d in documents()]).astype(np.int64))
    hidden_BTD = teacher.hidden_states(tokens_BT)
    for document, hidden_TD in zip(documents(), hidden_BTD, strict=True):
        if len(document):
            buffer = torch.full((len(document), padded_width(VOCAB_SIZE)), -torch.inf)
            teacher.logits(hidden_TD[: len(document)], buffer[:, :VOCAB_SIZE])
            top = topk_with_tail(buffer, K, path=path)
            plain = plain_targets(model, document, VOCAB_SIZE, K)
            found = (top.logits_RK - top.logsumexp_R[:, None]).numpy()
            np.testing.assert_allclose(found, plain["logp"][:, :K], atol=1e-4, rtol=0)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("changes", [{"batch_tokens": 1}, {"batch_size": 1}, {"head_rows": 1000}, {"head_rows": 1}])
def test_neither_head_path_nor_batches_change_the_targets(head: str, changes: dict) -> None:
    teacher = Teacher(tiny_model("llama"), VOCAB_SIZE)
    base = score_items(teacher, plain_items(documents()), settings()).records
    other = score_items(teacher, plain_items(documents()), settings(path=ScoringPath(head=head), **changes)).records
    for name, array in base.arrays():
        np.testing.assert_allclose(
            array.astype(float), getattr(other, name).astype(float), atol=2e-2 if name == "topk_logprobs" else 2e-4
        )


@pytest.mark.parametrize(
    ("family", "head", "scale", "softcap"),
    [("llama", "linear", 1.0, None), ("gpt2", "linear", 1.0, None), ("phi", "linear", 1.0, None),
     ("gemma2", "linear", 1.0, 5.0), ("granite", "linear", 1 / 3, None), ("cohere", "linear", 0.25, None),
     ("falcon_h1", "linear", 0.5, None), ("nanochat", "linear", 1.0, 15.0), ("minicpm3", "replay", 1.0, None)],
)  # fmt: skip
def test_what_a_family_does_after_its_head_is_found(
    family: str, head: str, scale: float, softcap: float | None
) -> None:
    choice = check(Teacher(tiny_model(family), VOCAB_SIZE), exact=True)
    path, errors = choice.path, choice.errors
    assert (path.head, path.scale, path.softcap) == (head, pytest.approx(scale), softcap)
    assert errors[head] < 1e-6


def test_padded_columns_take_no_part() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[VOCAB_SIZE:] = model.get_output_embeddings().weight[:1] * 50
    records = score_items(Teacher(model, VOCAB_SIZE), plain_items(documents()), settings()).records
    assert records.topk_ids.max() < VOCAB_SIZE < HEAD_WIDTH
    assert_targets_match(
        {name: array[:1] for name, array in records.arrays() if len(array) == records.n_tokens},
        plain_targets(model, documents()[0], VOCAB_SIZE, K),
    )


def successor_teacher(vocab_size: int = 32):
    """A teacher that predicts token + 1 (mod V) with near certainty."""
    model = tiny_model(
        "llama", hidden_size=vocab_size, num_hidden_layers=1, num_attention_heads=1, tie_word_embeddings=False
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        eye = torch.eye(vocab_size)
        model.get_input_embeddings().weight[:vocab_size] = eye
        model.get_output_embeddings().weight[:vocab_size] = eye.roll(1, 0) * 20
    return model


def test_the_shift_is_right() -> None:
    document = np.array([4, 5, 6, 9, 31, 0], np.int32)
    wanted = settings(vocab_size=32, top_k=2)
    records = score_items(Teacher(successor_teacher(), 32), plain_items([document]), wanted).records
    np.testing.assert_array_equal(records.topk_ids[:, 0], (document + 1) % 32)
    followed = np.array([True, True, False, False, True])
    assert (records.label_logprob[:-1][followed] > -0.01).all()
    assert (records.label_logprob[:-1][~followed] < -50).all()
    assert np.isnan(records.label_logprob[-1])


def test_logits_that_are_not_finite_name_the_row() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[100] = torch.nan
    texts = [np.array([1, 2, 3]), np.array([], int), np.array([4, 100]), np.array([5])]
    with pytest.raises(TeacherError, match="dataset row 12: expected finite logits") as caught:
        score_items(Teacher(model, VOCAB_SIZE), plain_items(texts, 10), settings())
    assert caught.value.row == 12


class _Largest(TorchDispatchMode):
    """Notes the largest tensor with a vocabulary-wide last axis."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() > 1 and out.shape[-1] >= VOCAB_SIZE and out.is_floating_point():
            self.rows = max(self.rows, out.numel() // out.shape[-1])
        return out


@pytest.mark.parametrize("head", ["linear", "replay"])
def test_no_more_than_a_chunk_of_logits_exists(head: str) -> None:
    teacher = Teacher(tiny_model("llama"), VOCAB_SIZE)
    with _Largest() as largest:
        score_items(
            teacher, plain_items(documents()), settings(path=ScoringPath(head=head), batch_tokens=1000, head_rows=32)
        )
    assert largest.rows == 32 < sum(LENGTHS)


def test_same_documents_give_same_bytes_whatever_stands_beside_them_in_the_dataset() -> None:
    teacher = Teacher(tiny_model("gpt2"), VOCAB_SIZE)
    once, again = (score_items(teacher, plain_items(documents()), settings()).records for _ in range(2))
    for name, array in once.arrays():
        assert array.tobytes() == getattr(again, name).tobytes(), name


def rounded_teacher(family: str) -> Teacher:
    return Teacher(tiny_model(family).bfloat16(), VOCAB_SIZE)


def targets_by_float32_head(teacher: Teacher, document: np.ndarray, path: ScoringPath) -> torch.Tensor:
    """Log-probs of a float32 head on the teacher's own hidden states."""
    with torch.inference_mode():
        hidden_TD = teacher.hidden_states(torch.from_numpy(document[None].astype(np.int64)))[0].float()
        logits_TV = hidden_TD @ teacher.head.weight[:VOCAB_SIZE].float().t()
        if getattr(teacher.head, "bias", None) is not None:
            logits_TV += teacher.head.bias[:VOCAB_SIZE].float()
        return path.finish(logits_TV).log_softmax(-1)


@pytest.mark.parametrize(
    ("family", "compiled"),
    [
        *((family, False) for family in ("llama", "phi", "gemma2", "granite")),
        ("llama", True),
        # Each is compiled for a minute.
        *(pytest.param(family, True, marks=pytest.mark.slow) for family in ("phi", "gemma2", "granite")),
    ],
)
def test_exact_logits_of_a_rounded_teacher_are_those_of_a_float32_head(family: str, compiled: bool) -> None:
    teacher = rounded_teacher(family)
    path = check(teacher, exact=True).path
    assert path.exact
    if compiled:
        try_compiled(teacher)
        path = teacher.path
    document = documents()[1]
    records = score_items(teacher, plain_items([document]), settings(path=path)).records
    exact_TV = targets_by_float32_head(teacher, document, path)
    values, ids = exact_TV.topk(K)
    assert (np.sort(records.topk_ids, 1) == np.sort(ids.numpy(), 1)).all(1).mean() > 0.999
    np.testing.assert_allclose(records.topk_logprobs, values.numpy(), atol=2e-2)
    np.testing.assert_allclose(records.label_logprob[:-1], exact_TV[torch.arange(39), document[1:]], atol=1e-2)
    kept = np.exp(values.double().numpy()).sum(1)
    np.testing.assert_allclose(np.exp(records.tail_logmass), 1 - kept, atol=5e-3)


def test_model_logits_are_rounded_as_the_model_rounds_them() -> None:
    teacher = rounded_teacher("llama")
    path = check(teacher, exact=False).path
    assert not path.exact
    document = documents()[1]
    teacher.take(ScoringPath())
    plain = plain_targets(teacher.model, document, VOCAB_SIZE, K)
    path = ScoringPath(head="linear")
    records = score_items(teacher, plain_items([document]), settings(path=path, batch_size=1, head_rows=40)).records
    np.testing.assert_array_equal(records.topk_ids, plain["ids"][:, :K])
    np.testing.assert_allclose(records.topk_logprobs, plain["logp"][:, :K], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "qwen3_moe", "gpt2"))]
)
def test_compiled_targets_equal_the_plain_forward(family: str) -> None:
    model = tiny_model(family)
    teacher = Teacher(model, VOCAB_SIZE)
    check(teacher, exact=True)
    assert try_compiled(teacher) < 1e-4
    path = teacher.path
    assert path.compiled
    texts = [*documents(), np.array([5], np.int32)]
    records = score_items(teacher, plain_items(texts), settings(path=path)).records
    teacher.take(ScoringPath())
    start = 0
    for document in texts:
        if len(document):
            found = {name: array[start : start + len(document)] for name, array in records.arrays()}
            assert_targets_match(found, plain_targets(model, document, VOCAB_SIZE, K))
            start += len(document)


def test_a_layer_that_cannot_be_compiled_leaves_the_teacher_on_its_path(monkeypatch) -> None:
    teacher = Teacher(tiny_model("llama"), VOCAB_SIZE)
    before = check(teacher, exact=True).path

    def broken(*_, **__):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(teacher.layers()[0].__class__, "compile", broken)
    with pytest.raises(RuntimeError, match="no compiler here"):
        try_compiled(teacher)
    assert teacher.path == before
    assert score_items(teacher, plain_items(documents()), settings(path=before)).records.n_tokens == sum(LENGTHS)


class _SmallMemory(Teacher):
    """A teacher that runs out of memory beyond so many tokens of a batch."""

    most = 0
    sizes: list

    def hidden_states(self, input_ids_BT):
        if input_ids_BT.numel() > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.sizes.append(len(input_ids_BT))
        return super().hidden_states(input_ids_BT)


def test_a_batch_that_does_not_fit_is_halved_and_the_receipt_can_say_where() -> None:
    whole = Teacher(tiny_model("llama"), VOCAB_SIZE)
    small = _SmallMemory(tiny_model("llama"), VOCAB_SIZE)
    small.most, small.sizes = 50, []
    draw = np.random.default_rng(3)
    items = plain_items([draw.integers(VOCAB_SIZE, size=20).astype(np.int32) for _ in range(10)])
    wanted = settings(batch_tokens=160)
    base, split = score_items(whole, items, wanted), score_items(small, items, wanted)
    assert base.splits == {}
    # 8 × 20 tokens do not fit, nor do 4; from then on 4 are not tried again. The last 2 fit.
    assert split.splits == {0: [2, 2, 2, 2]}
    assert small.sizes == [2, 2, 2, 2, 2]
    for name, array in base.records.arrays():
        found = getattr(split.records, name)
        np.testing.assert_allclose(array.astype(float), found.astype(float), atol=1e-2, err_msg=name)
    again = score_items(small, items, wanted)
    for name, array in split.records.arrays():
        assert array.tobytes() == getattr(again.records, name).tobytes(), name


def test_one_document_that_does_not_fit_names_its_row_and_the_cure() -> None:
    small = _SmallMemory(tiny_model("llama"), VOCAB_SIZE)
    small.most, small.sizes = 30, []
    with pytest.raises(CapacityError, match=r"dataset row 11: expected 40 tokens to fit .* lower .*max_length"):
        score_items(small, plain_items(documents(), 10), settings())


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    class Broken(Teacher):
        def hidden_states(self, input_ids_BT):
            raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        score_items(Broken(tiny_model("llama"), VOCAB_SIZE), plain_items(documents()), settings())
