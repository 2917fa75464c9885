"""Sparse losses against dense ones in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dask_logits.train.losses import normalise_targets, sparse_forward_kl


def targets(teacher_logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    logp = teacher_logits.log_softmax(-1)
    top = logp.topk(k)
    rest = logp.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
    return top.indices, top.values, rest


def dense(student: Tensor, ids: Tensor, logp: Tensor, tail: Tensor) -> Tensor:
    """Build both coarse distributions, K entries and a ghost, and take their KL."""
    q = student.double().softmax(-1)
    kept = q.gather(-1, ids)
    ghost = q.scatter(-1, ids, 0.0).sum(-1, keepdim=True)
    q_coarse = torch.cat([kept, ghost], -1)
    p_coarse = torch.cat([logp.double(), tail.double()[..., None]], -1).exp()
    terms = torch.where(p_coarse > 0, p_coarse * (p_coarse.log() - q_coarse.log()), 0.0)
    return terms.sum(-1).mean()


def pair(rows: int = 7, vocab: int = 50, spread: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    teacher = torch.randn(rows, vocab, generator=draw, dtype=torch.float64) * spread
    student = torch.randn(rows, vocab, generator=draw, dtype=torch.float64) * spread
    return teacher, student


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 50), st.floats(0.1, 12.0), st.integers(0, 100), st.integers(1, 9))
def test_value_and_gradient_equal_the_dense_loss(k: int, spread: float, seed: int, chunk_rows: int) -> None:
    teacher, student = pair(spread=spread, seed=seed)
    ids, logp, tail = targets(teacher, k)
    one = student.float().requires_grad_()
    two = student.float().double().requires_grad_()
    loss = sparse_forward_kl(one, ids, logp, tail, chunk_rows=chunk_rows)
    expected = dense(two, ids, logp, tail)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one.grad.double(), two.grad, atol=1e-5, rtol=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 49), st.integers(0, 100))
def test_it_is_never_negative_even_for_rounded_targets(k: int, seed: int) -> None:
    teacher, student = pair(seed=seed)
    ids, logp, tail = targets(teacher, k)
    close = teacher + 1e-3 * student
    assert sparse_forward_kl(close.float(), ids, logp.half(), tail.float()).item() >= -1e-6


def test_it_is_zero_with_zero_gradient_at_the_teacher() -> None:
    teacher, _ = pair()
    student = teacher.float().requires_grad_()
    loss = sparse_forward_kl(student, *targets(teacher, 8))
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert student.grad.abs().max() < 1e-6


def test_the_gradient_does_not_vanish_for_a_sharp_student() -> None:
    teacher = torch.zeros(1, 50, dtype=torch.float64)
    student = torch.zeros(1, 50)
    student[0, 0] = 60.0
    student.requires_grad_()
    ids, logp, tail = targets(teacher, 1)
    sparse_forward_kl(student, torch.zeros_like(ids), logp, tail).backward()
    assert student.grad[0, 0] == pytest.approx(0.98, abs=1e-3)
    assert student.grad[0, 1:].sum() == pytest.approx(-0.98, abs=1e-3)


def test_masked_positions_do_not_count() -> None:
    teacher, student = pair(rows=6)
    ids, logp, tail = targets(teacher, 5)
    mask = torch.tensor([True, False, True, True, False, False])
    whole = student.float().reshape(2, 3, 50).requires_grad_()
    logp = logp.clone()
    logp[1] = torch.nan
    loss = sparse_forward_kl(
        whole, ids.reshape(2, 3, 5), logp.reshape(2, 3, 5), tail.reshape(2, 3), mask.reshape(2, 3), chunk_rows=2
    )
    loss.backward()
    expected = sparse_forward_kl(student.float()[mask], ids[mask], logp[mask], tail[mask])
    torch.testing.assert_close(loss, expected)
    assert (whole.grad.reshape(6, 50)[~mask] == 0).all()
    assert torch.isfinite(whole.grad).all()
    as_numbers = sparse_forward_kl(student.float(), ids, logp, tail, mask.long())
    torch.testing.assert_close(as_numbers, expected)


def test_no_counted_position_gives_zero() -> None:
    teacher, student = pair()
    loss = sparse_forward_kl(student.float(), *targets(teacher, 3), torch.zeros(7, dtype=torch.bool))
    assert loss.item() == 0.0


def test_half_precision_logits_get_half_precision_gradients() -> None:
    teacher, student = pair()
    logits = student.bfloat16().requires_grad_()
    sparse_forward_kl(logits, *targets(teacher, 8)).backward()
    assert logits.grad.dtype == torch.bfloat16


def test_only_a_chunk_is_copied_to_float32() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Widest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.float32 and out.dim() > 1 and out.shape[-1] == 50:
                self.rows = max(self.rows, out.numel() // 50)
            return out

    teacher, student = pair(rows=64)
    logits = student.bfloat16().requires_grad_()
    given_targets = targets(teacher, 8)
    with Widest() as widest:
        sparse_forward_kl(logits, *given_targets, chunk_rows=4).backward()
    assert widest.rows == 4


def test_normalised_targets_sum_to_one() -> None:
    teacher, _ = pair()
    _, logp, tail = targets(teacher, 8)
    rounded, tail = normalise_targets(logp.half().float(), tail.float())
    torch.testing.assert_close(rounded.exp().sum(-1) + tail.exp(), torch.ones(7))


def test_shapes_and_ids_that_do_not_fit_are_refused() -> None:
    teacher, student = pair()
    ids, logp, tail = targets(teacher, 8)
    with pytest.raises(ValueError, match="expected targets for logits of"):
        sparse_forward_kl(student[:3], ids, logp, tail)
    with pytest.raises(ValueError, match=r"target_mask: expected \(7,\), got \(3,\)"):
        sparse_forward_kl(student, ids, logp, tail, torch.ones(3))
    with pytest.raises(ValueError, match="expected ids below the student's 10 logits"):
        sparse_forward_kl(student[:, :10], ids, logp, tail)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(5, 50), st.integers(0, 100), st.integers(1, 9))
def test_entries_that_are_not_there_count_in_the_tail(k: int, width: int, seed: int, chunk_rows: int) -> None:
    # As CachedLogitsDataset(student_vocab_size=) gives them: id 0, −∞, behind the others.
    teacher, wide = pair(seed=seed)
    ids, logp, _ = targets(teacher, k)
    there = ids < width
    kept = torch.zeros_like(teacher[:, :width], dtype=torch.bool)
    expected = torch.zeros((), dtype=torch.float64)
    one = wide[:, :width].float().requires_grad_()
    two = wide[:, :width].float().double().requires_grad_()
    for row in range(len(ids)):
        mine = ids[row][there[row]]
        kept[row, mine] = True
        q, p = two[row].softmax(-1), logp[row][there[row]].exp()
        q_all = torch.cat([q[mine], q[~kept[row]].sum()[None]])
        p_all = torch.cat([p, 1 - p.sum()[None]])
        expected = expected + torch.where(p_all > 1e-12, p_all * (p_all.log() - q_all.log()), 0.0).sum() / len(ids)
    order = (~there).to(torch.uint8).argsort(dim=-1, stable=True)
    cut_ids = ids.masked_fill(~there, 0).gather(-1, order)
    cut_logp = logp.masked_fill(~there, -torch.inf).gather(-1, order)
    tail = torch.log1p(-cut_logp.exp().sum(-1))
    loss = sparse_forward_kl(one, cut_ids, cut_logp, tail, chunk_rows=chunk_rows)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one.grad.double(), two.grad, atol=1e-5, rtol=1e-3)
