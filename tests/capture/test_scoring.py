"""Targets are the teacher's: compared with its own forward, document by document, without padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import HEAD_WIDTH, VOCAB_SIZE, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from dask_logits.capture.items import plain_items
from dask_logits.capture.scoring import ScoringSettings, score_items
from dask_logits.capture.teacher import HEADS, Teacher, choose_head
from dask_logits.capture.topk import padded_width, topk_with_tail
from dask_logits.errors import TeacherError

K = 8
LENGTHS = [1, 40, 0, 7, 33, 33, 2, 19]


def documents(vocab_size: int = VOCAB_SIZE) -> list[np.ndarray]:
    draw = np.random.default_rng(3)
    return [draw.integers(vocab_size, size=n).astype(np.int32) for n in LENGTHS]


def settings(**changes) -> ScoringSettings:
    values = {
        "top_k": K, "vocab_size": VOCAB_SIZE, "batch_tokens": 90, "batch_size": None, "head_rows": 16, "head": "linear",
    }  # fmt: skip
    return ScoringSettings(**{**values, **changes})


def plain_targets(model, document: np.ndarray, vocab_size: int, k: int) -> dict[str, np.ndarray]:
    """The teacher's plain forward on one document, in float64 after the logits."""
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(document[None].astype(np.int64))).logits[0, :, :vocab_size].double()
    logp = logits.log_softmax(-1)
    ids = np.argsort(-logits.numpy(), axis=1, kind="stable")
    logp_sorted = np.take_along_axis(logp.numpy(), ids, 1)
    label = np.full(len(document), np.nan)
    label[:-1] = logp.numpy()[np.arange(len(document) - 1), document[1:]]
    return {
        "ids": ids,
        "logp": logp_sorted,
        "logsumexp": logits.logsumexp(-1).numpy(),
        "tail": np.log(np.exp(logp_sorted[:, k:]).sum(1)),
        "label": label,
    }


def assert_targets_match(found: dict[str, np.ndarray], plain: dict[str, np.ndarray], atol: float = 1e-4) -> int:
    """Compare stored targets with the plain forward: the tolerance of float32 plus the rounding to float16.

    Ids are compared as sets where the k-th and the next entry are further apart than the tolerance, and in order where
    all are; returns in how many rows the sets were compared.
    """
    k = found["topk_ids"].shape[1]
    logp = plain["logp"][:, :k]
    assert (np.abs(found["topk_logprobs"] - logp) <= atol + np.abs(logp) * 2.0**-11).all()
    np.testing.assert_allclose(found["logsumexp"], plain["logsumexp"], atol=atol)
    np.testing.assert_allclose(found["tail_logmass"], plain["tail"], atol=atol)
    np.testing.assert_allclose(found["label_logprob"], plain["label"], atol=atol)
    gaps = np.abs(np.diff(plain["logp"][:, : k + 1], axis=1))
    ids, expected = found["topk_ids"], plain["ids"][:, :k]
    clear = gaps[:, -1] > atol
    np.testing.assert_array_equal(np.sort(ids[clear], 1), np.sort(expected[clear], 1))
    ordered = (gaps > atol).all(1)
    np.testing.assert_array_equal(ids[ordered], expected[ordered])
    return int(clear.sum())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite", "phi"])
def test_targets_equal_the_plain_forward(family: str) -> None:
    model = tiny_model(family)
    teacher = Teacher(model, VOCAB_SIZE)
    with torch.inference_mode():
        head, _ = choose_head(teacher)
    records = score_items(teacher, plain_items(documents()), settings(head=head))
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


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@torch.inference_mode()
def test_logprobs_before_rounding_are_within_a_ten_thousandth_nat(family: str) -> None:
    model = tiny_model(family)
    teacher = Teacher(model, VOCAB_SIZE)
    head, _ = choose_head(teacher)
    tokens_BT = torch.from_numpy(np.stack([np.pad(d, (0, 40 - len(d))) for d in documents()]).astype(np.int64))
    hidden_BTD = teacher.hidden_states(tokens_BT)
    for document, hidden_TD in zip(documents(), hidden_BTD, strict=True):
        if len(document):
            buffer = torch.full((len(document), padded_width(VOCAB_SIZE)), -torch.inf)
            write = teacher.logits_linear if head == "linear" else teacher.logits_replay
            write(hidden_TD[: len(document)], buffer[:, :VOCAB_SIZE])
            top = topk_with_tail(buffer, K)
            plain = plain_targets(model, document, VOCAB_SIZE, K)
            found = (top.logits_RK - top.logsumexp_R[:, None]).numpy()
            np.testing.assert_allclose(found, plain["logp"][:, :K], atol=1e-4, rtol=0)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("changes", [{"batch_tokens": 1}, {"batch_size": 1}, {"head_rows": 1000}, {"head_rows": 1}])
def test_neither_head_path_nor_batches_change_the_targets(head: str, changes: dict) -> None:
    teacher = Teacher(tiny_model("llama"), VOCAB_SIZE)
    base = score_items(teacher, plain_items(documents()), settings())
    other = score_items(teacher, plain_items(documents()), settings(head=head, **changes))
    for name, array in base.arrays():
        np.testing.assert_allclose(
            array.astype(float), getattr(other, name).astype(float), atol=2e-2 if name == "topk_logprobs" else 2e-4
        )


@pytest.mark.parametrize(
    ("family", "expected"), [("llama", "linear"), ("gpt2", "linear"), ("phi", "linear"), ("gemma2", "replay"),
                             ("granite", "replay")]
)  # fmt: skip
def test_a_head_that_does_more_than_a_product_is_replayed(family: str, expected: str) -> None:
    with torch.inference_mode():
        head, errors = choose_head(Teacher(tiny_model(family), VOCAB_SIZE))
    assert head == expected
    if expected == "replay":
        assert errors["linear"] > 1e-2


def test_padded_columns_take_no_part() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[VOCAB_SIZE:] = model.get_output_embeddings().weight[:1] * 50
    records = score_items(Teacher(model, VOCAB_SIZE), plain_items(documents()), settings())
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
    records = score_items(Teacher(successor_teacher(), 32), plain_items([document]), settings(vocab_size=32, top_k=2))
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
        score_items(teacher, plain_items(documents()), settings(head=head, batch_tokens=1000, head_rows=32))
    assert largest.rows == 32 < sum(LENGTHS)


def test_same_documents_give_same_bytes_whatever_stands_beside_them_in_the_dataset() -> None:
    teacher = Teacher(tiny_model("gpt2"), VOCAB_SIZE)
    once, again = (score_items(teacher, plain_items(documents()), settings()) for _ in range(2))
    for name, array in once.arrays():
        assert array.tobytes() == getattr(again, name).tobytes(), name
