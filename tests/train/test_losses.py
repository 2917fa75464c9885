"""Losses of logits against dense ones in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from dense_losses import DIVERGENCES, LABELS, dense_rows, objective, sparse_targets
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dask_logits import ConfigError, DatasetError, Objective, SparseTargets, distillation_loss
from dask_logits.train.objective import LEAST_LOGMASS, normalise_targets
from dask_logits.train.targets import CodedTargets


def entries(teacher_logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    logp = teacher_logits.log_softmax(-1)
    top = logp.topk(k)
    rest = logp.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
    return top.indices, top.values, rest


def sparse(ids: Tensor, logp: Tensor, tail: Tensor, mask: Tensor | None = None, vocab_size: int = 50) -> SparseTargets:
    """Wrap entries as the targets of a batch without labels."""
    shape = ids.shape[:-1]
    return SparseTargets(
        input_ids=torch.zeros(shape, dtype=torch.int64),
        topk_ids=ids,
        topk_logprobs=logp,
        tail_logmass=tail,
        logsumexp=torch.zeros(shape),
        label_ids=torch.full(shape, -100),
        label_logprob=torch.full(shape, torch.nan),
        mask=torch.ones(shape, dtype=torch.bool) if mask is None else mask,
        vocab_size=vocab_size,
    )


def targets(teacher_logits: Tensor, k: int, mask: Tensor | None = None) -> SparseTargets:
    return sparse(*entries(teacher_logits, k), mask)


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


@settings(max_examples=40)
@given(st.integers(1, 50), st.floats(0.1, 12.0), st.integers(0, 100), st.integers(1, 9))
def test_value_and_gradient_equal_the_dense_loss(k: int, spread: float, seed: int, chunk_rows: int) -> None:
    teacher, student = pair(spread=spread, seed=seed)
    ids, logp, tail = entries(teacher, k)
    one = student.float().requires_grad_()
    two = student.float().double().requires_grad_()
    loss = distillation_loss(one, sparse(ids, logp, tail), chunk_rows=chunk_rows).loss
    expected = dense(two, ids, logp, tail)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one.grad.double(), two.grad, atol=1e-5, rtol=1e-3)


@settings(max_examples=40)
@given(st.integers(1, 49), st.integers(0, 100))
def test_rounded_targets_are_scaled_to_a_distribution_so_that_the_loss_is_never_negative(k: int, seed: int) -> None:
    teacher, student = pair(seed=seed)
    ids, logp, tail = entries(teacher, k)
    rounded, tail = logp.half(), tail.float().double()
    # Near the teacher, where rounding would outweigh the divergence.
    close = teacher + 1e-3 * student
    found = distillation_loss(close, sparse(ids, rounded, tail)).loss
    p = rounded.double().exp()
    scaled = p / p.sum(-1, keepdim=True) * -tail.expm1()[..., None]
    torch.testing.assert_close(found, dense(close, ids, scaled.log(), tail), atol=1e-12, rtol=0)
    assert found > 0


def test_it_is_zero_with_zero_gradient_at_the_teacher() -> None:
    teacher, _ = pair()
    student = teacher.float().requires_grad_()
    loss = distillation_loss(student, targets(teacher, 8)).loss
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert student.grad.abs().max() < 1e-6


def test_the_gradient_does_not_vanish_for_a_sharp_student() -> None:
    teacher = torch.zeros(1, 50, dtype=torch.float64)
    student = torch.zeros(1, 50)
    student[0, 0] = 60.0
    student.requires_grad_()
    ids, logp, tail = entries(teacher, 1)
    distillation_loss(student, sparse(torch.zeros_like(ids), logp, tail)).loss.backward()
    assert student.grad[0, 0] == pytest.approx(0.98, abs=1e-3)
    assert student.grad[0, 1:].sum() == pytest.approx(-0.98, abs=1e-3)


def test_masked_positions_do_not_count() -> None:
    teacher, student = pair(rows=6)
    ids, logp, tail = entries(teacher, 5)
    mask = torch.tensor([True, False, True, True, False, False])
    whole = student.float().reshape(2, 3, 50).requires_grad_()
    logp = logp.clone()
    logp[1] = torch.nan
    batch = sparse(ids.reshape(2, 3, 5), logp.reshape(2, 3, 5), tail.reshape(2, 3), mask.reshape(2, 3))
    loss = distillation_loss(whole, batch, chunk_rows=2).loss
    loss.backward()
    expected = distillation_loss(student.float()[mask], sparse(ids[mask], logp[mask], tail[mask])).loss
    torch.testing.assert_close(loss, expected)
    assert (whole.grad.reshape(6, 50)[~mask] == 0).all()
    assert torch.isfinite(whole.grad).all()


def test_a_batch_without_targets_gives_zero() -> None:
    teacher, student = pair()
    logits = student.float().requires_grad_()
    loss = distillation_loss(logits, targets(teacher, 3, torch.zeros(7, dtype=torch.bool))).loss
    loss.backward()
    assert loss.item() == 0.0
    assert (logits.grad == 0).all()
    nothing = torch.zeros(0, 50, requires_grad=True)
    empty = distillation_loss(nothing, sparse(torch.zeros(0, 3).long(), torch.zeros(0, 3), torch.zeros(0)))
    empty.loss.backward()
    assert (empty.loss.item(), empty.n_tokens, empty.n_labels) == (0.0, 0, 0)


def test_logits_beyond_the_teachers_vocabulary_count_in_the_tail() -> None:
    teacher, student = pair()
    wide = torch.nn.functional.pad(student.float(), (0, 6), value=1.0)
    ids, logp, tail = entries(teacher, 4)
    torch.testing.assert_close(
        distillation_loss(wide, sparse(ids, logp, tail)).loss.double(),
        dense(wide, ids, logp, tail),
        atol=1e-4,
        rtol=1e-4,
    )


def test_half_precision_logits_get_half_precision_gradients() -> None:
    teacher, student = pair()
    logits = student.bfloat16().requires_grad_()
    distillation_loss(logits, targets(teacher, 8)).loss.backward()
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
        distillation_loss(logits, given_targets, chunk_rows=4).loss.backward()
    assert widest.rows == 4


def test_normalised_targets_sum_to_one() -> None:
    teacher, _ = pair()
    _, logp, tail = entries(teacher, 8)
    rounded, tail = normalise_targets(logp.half().float(), tail.float())
    torch.testing.assert_close(rounded.exp().sum(-1) + tail.exp(), torch.ones(7))


def batch_of(rows: int = 2, tokens: int = 5, k: int = 8) -> tuple[Tensor, SparseTargets]:
    teacher, student = pair(rows=rows * tokens)
    ids, logp, tail = entries(teacher, k)
    shape = (rows, tokens)
    return student.float().reshape(*shape, 50), sparse(
        ids.reshape(*shape, k), logp.reshape(*shape, k), tail.reshape(shape)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits: logits[:, :-1], r"one position short, as if they were shifted for a label loss. Pass them un"),
        (lambda logits: logits[:, 1:], r"one position short"),
        (lambda logits: logits.flatten(0, 1), r"got \(10, 50\); pass them as the model gives them, without flattening"),
        (lambda logits: logits[:1], r"expected the shape \(2, 5, 'V'\), .* got \(1, 5, 50\); pass the logits and the"),
        (lambda logits: logits[..., 0], r"expected the shape \(2, 5, 'V'\), .* got \(2, 5\)"),
        (lambda logits: logits.argmax(-1), r"expected floating-point numbers \[..., V\], got torch.int64 of the shape"),
        (lambda logits: logits.to("meta"), r"logits are on meta, but the targets are on cpu. .*\.to\('meta'\)"),
        (lambda logits: {"logits": logits}, r"logits: expected a tensor, got dict; take .logits of"),
    ],
    ids=["shifted", "shifted-left", "flat", "part", "no-vocabulary", "ids", "device", "output"],
)
def test_logits_that_cannot_belong_to_the_targets_are_refused(change, message: str) -> None:
    logits, batch = batch_of()
    with pytest.raises(ConfigError, match=message):
        distillation_loss(change(logits), batch)


def test_what_is_no_decoded_target_is_refused() -> None:
    logits, batch = batch_of()
    with pytest.raises(ConfigError, match=r"decode='device'. Decode them first: decoder = dataset.decoder\(\)"):
        distillation_loss(logits, CodedTargets(codes={}, rest=batch, tables_digest=""))
    with pytest.raises(ConfigError, match=r"expected the SparseTargets of the batch, batch\['targets'\], got dict"):
        distillation_loss(logits, {"targets": batch})
    wrong = dataclasses.replace(batch, topk_ids=batch.topk_ids + 50)
    with pytest.raises(DatasetError, match=r"topk_ids: expected ids from 0 to 49, got 5\d to \d+; run `dask-logits ve"):
        distillation_loss(logits, wrong)


def test_the_loss_compares_the_students_tokens_with_the_teachers() -> None:
    logits, batch = batch_of()
    batch = dataclasses.replace(batch, input_ids=torch.arange(10).reshape(2, 5))
    expected = distillation_loss(logits, batch).loss
    assert distillation_loss(logits, batch, input_ids=torch.arange(10).reshape(2, 5)).loss == expected
    with pytest.raises(DatasetError, match="reads other tokens than the teacher"):
        distillation_loss(logits, batch, input_ids=torch.arange(10).reshape(2, 5).roll(1, -1))


@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(5, 50), st.integers(0, 100), st.integers(1, 9))
def test_entries_that_are_not_there_count_in_the_tail(k: int, width: int, seed: int, chunk_rows: int) -> None:
    # As CachedLogitsDataset(student_vocab_size=) gives them: id 0, −∞, behind the others.
    teacher, wide = pair(seed=seed)
    ids, logp, _ = entries(teacher, k)
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
    loss = distillation_loss(one, sparse(cut_ids, cut_logp, tail, vocab_size=width), chunk_rows=chunk_rows).loss
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one.grad.double(), two.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("divergence", "tail"), DIVERGENCES)
def test_every_objective_equals_the_dense_one(divergence, tail, temperature, alpha) -> None:
    teacher, student = pair()
    labels = LABELS.clone()
    labels[0] = teacher[0].argmax()
    one, two = student.clone().requires_grad_(), student.clone().requires_grad_()
    wanted = objective(divergence, tail, temperature=temperature, alpha=alpha, beta=0.3)
    found = distillation_loss(one, sparse_targets(teacher, labels, 5), wanted, chunk_rows=3)
    expected = dense_rows(two, teacher, labels, 5, wanted).mean()
    found.loss.backward()
    expected.backward()
    torch.testing.assert_close(found.loss, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(one.grad, two.grad, atol=1e-12, rtol=0)
    both = (1 - alpha) * found.cross_entropy + alpha * temperature**2 * found.divergence
    torch.testing.assert_close(both, found.loss.detach(), atol=1e-12, rtol=0)
    assert (found.n_tokens, found.n_labels) == (7, 6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "total_variation"])
def test_every_divergence_is_zero_at_the_teacher_and_positive_elsewhere(divergence, temperature) -> None:
    teacher, student = pair()
    wanted = Objective(divergence=divergence, temperature=temperature)
    equal = teacher.clone().requires_grad_()
    at_teacher = distillation_loss(equal, sparse_targets(teacher, LABELS, 5), wanted)
    at_teacher.loss.backward()
    assert 0 <= at_teacher.loss.item() < 1e-14
    if divergence != "total_variation":  # which has no derivative there
        assert equal.grad.abs().max() < 1e-14
    assert distillation_loss(student, sparse_targets(teacher, LABELS, 5), wanted).loss.item() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("divergence", "tail"), DIVERGENCES)
def test_the_gradient_is_right_where_the_student_leaves_1e_12_outside_the_kept_ids(divergence, tail, dtype) -> None:
    teacher, student = pair(rows=1)
    kept = teacher.topk(5).indices
    sharp = student.scatter(-1, kept, student.gather(-1, kept) - student.gather(-1, kept).logsumexp(-1))
    outside = torch.ones_like(sharp, dtype=torch.bool).scatter(-1, kept, False)
    sharp[outside] += torch.tensor(1e-12).double().log() - sharp[outside].logsumexp(-1)
    wanted = objective(divergence, tail)
    one, two = sharp.to(dtype).requires_grad_(), sharp.to(dtype).double().requires_grad_()
    labels = torch.tensor([int(outside[0].nonzero()[0])])
    distillation_loss(one, sparse_targets(teacher, labels, 5), wanted).loss.backward()
    dense_rows(two, teacher, labels, 5, wanted).mean().backward()
    bound = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(one.grad.double(), two.grad, atol=bound, rtol=bound)
    assert (one.grad != 0).all()


def test_values_per_token_have_gradients_of_their_own() -> None:
    teacher, student = pair()
    mask = torch.tensor([True, True, False, True, True, True, True])
    wanted = Objective(tail="residual", alpha=0.4)
    one, two = student.clone().requires_grad_(), student.clone().requires_grad_()
    found = distillation_loss(one, sparse_targets(teacher, LABELS, 5, mask), wanted, per_token=True)
    weights = torch.arange(7).double()
    rows = torch.where(mask, dense_rows(two, teacher, LABELS, 5, wanted), 0.0)
    (found.loss * weights).sum().backward()
    (rows * weights).sum().backward()
    torch.testing.assert_close(found.loss, rows, atol=1e-12, rtol=0)
    torch.testing.assert_close(one.grad, two.grad, atol=1e-12, rtol=0)
    q = student.softmax(-1)
    kept = q.gather(-1, teacher.topk(5).indices).sum(-1)
    torch.testing.assert_close(found.kept_mass, torch.where(mask, kept, 0.0), atol=1e-12, rtol=0)
    torch.testing.assert_close(found.entropy, torch.where(mask, -(q * q.log()).sum(-1), 0.0), atol=1e-12, rtol=0)
    hard = torch.nn.functional.cross_entropy(student, LABELS, reduction="none")
    torch.testing.assert_close(found.cross_entropy, hard, atol=1e-12, rtol=0)


def test_details_are_at_temperature_one() -> None:
    teacher, student = pair()
    targets = sparse_targets(teacher, LABELS, 5)
    warm, cold = (distillation_loss(student, targets, Objective(temperature=T), per_token=True) for T in (2.0, 1.0))
    torch.testing.assert_close(warm.kept_mass, cold.kept_mass)
    torch.testing.assert_close(warm.entropy, cold.entropy)
    torch.testing.assert_close(warm.cross_entropy, cold.cross_entropy)


def test_the_normaliser_makes_accumulated_batches_equal_one_batch() -> None:
    teacher, student = pair()
    mask = torch.tensor([True, True, False, True, True, True, False])
    whole = student.clone().requires_grad_()
    distillation_loss(whole, sparse_targets(teacher, LABELS, 5, mask), Objective(alpha=0.5)).loss.backward()
    parts = student.clone().requires_grad_()
    for rows in (slice(0, 2), slice(2, 7)):
        targets = sparse_targets(teacher[rows], LABELS[rows], 5, mask[rows])
        distillation_loss(parts[rows], targets, Objective(alpha=0.5), normaliser=torch.tensor(5)).loss.backward()
    torch.testing.assert_close(parts.grad, whole.grad, atol=1e-14, rtol=0)


@pytest.mark.parametrize("tail", ["ghost", "residual", "renormalised"])
def test_ids_without_a_logit_count_in_the_tail(tail) -> None:
    teacher, student = pair()
    teacher[0, 40:] += 20  # all kept ids are beyond the student
    labels = LABELS.masked_fill(LABELS >= 40, -100)
    width = 40
    one, two = student[:, :width].clone().requires_grad_(), student[:, :width].clone().requires_grad_()
    with pytest.warns(UserWarning, match=r"has 40 logits, but .* of 50\..*student_vocab_size=40\)"):
        found = distillation_loss(one, sparse_targets(teacher, LABELS, 5), objective("forward_kl", tail))
    p, q = teacher.softmax(-1), two.softmax(-1)
    expected = torch.zeros((), dtype=torch.float64)
    for row in range(7):
        ids = [i for i in teacher[row].topk(5).indices.tolist() if i < width]
        p_cells, q_cells = [p[row, i] for i in ids], [q[row, i] for i in ids]
        rest = 1 - torch.stack([torch.zeros((), dtype=torch.float64), *p_cells]).sum()
        if tail == "renormalised":
            p_cells = [value / sum(p_cells) for value in p_cells]
        elif tail == "residual" and labels[row] >= 0:
            label = int(labels[row])
            if label in ids:
                p_cells[ids.index(label)] += rest
            else:
                p_cells, q_cells = [*p_cells, rest], [*q_cells, q[row, label]]
        else:
            p_cells, q_cells = (
                [*p_cells, rest],
                [*q_cells, 1 - torch.stack([torch.zeros((), dtype=torch.float64), *q_cells]).sum()],
            )
        expected = expected + sum(a * (a.log() - b.log()) for a, b in zip(p_cells, q_cells, strict=True) if a > 1e-12)
    found.loss.backward()
    (expected / 7).backward()
    torch.testing.assert_close(found.loss, expected.detach() / 7, atol=1e-12, rtol=0)
    torch.testing.assert_close(one.grad, two.grad, atol=1e-12, rtol=0)
    assert found.n_labels == int((labels >= 0).sum())


def test_the_reverse_kl_floors_a_tail_of_no_mass() -> None:
    teacher, student = pair()
    student = torch.nn.functional.pad(student, (0, 1)).requires_grad_()
    whole = sparse_targets(teacher, LABELS, 50)
    assert (whole.tail_logmass == -torch.inf).all()
    found = distillation_loss(student, whole, Objective(divergence="reverse_kl"))
    found.loss.backward()
    p = torch.cat([teacher.log_softmax(-1), torch.full((7, 1), LEAST_LOGMASS, dtype=torch.float64)], -1)
    logq = student.detach().log_softmax(-1)
    torch.testing.assert_close(found.loss.detach(), (logq.exp() * (logq - p)).sum(-1).mean(), atol=1e-12, rtol=0)
    assert student.grad.isfinite().all()
    narrow = distillation_loss(student[:, :50].detach(), whole, Objective(divergence="reverse_kl"))
    assert 0 < narrow.loss < found.loss


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl"}, r"divergence: expected one of forward_kl, reverse_kl, jsd, total_variation, got 'kl'"),
        (
            {"tail": "none", "alpha": 2},
            r"tail: expected one of auto, ghost, .*'none'\nalpha: expected a number from 0 to 1",
        ),
        ({"beta": 0.0}, r"beta: expected a number between 0 and 1, got 0\.0"),
        ({"temperature": -1.0}, r"temperature: expected a positive number, got -1\.0"),
        (
            {"divergence": "reverse_kl", "tail": "residual"},
            r"tail: expected 'ghost' with the reverse KL, got 'residual'",
        ),
    ],
)
def test_an_objective_without_meaning_is_refused(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Objective(**options)


def test_a_temperature_that_the_cache_lacks_is_refused() -> None:
    teacher, student = pair()
    with pytest.raises(
        ConfigError, match=r"temperature: expected one that the cache has a tail for \(1, 2\), got 1\.5"
    ):
        distillation_loss(student, sparse_targets(teacher, LABELS, 5), Objective(temperature=1.5))
    with pytest.raises(ConfigError, match=r"a tail for \(1\), got 2"):
        distillation_loss(student, targets(teacher, 5), Objective(temperature=2.0))
    with pytest.raises(ConfigError, match=r"tail_logmass_NJ: expected one column for each of \(2\.0,\), got none"):
        dataclasses.replace(targets(teacher, 5), temperatures=(2.0,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normaliser": 0}, r"normaliser: expected a positive number of scored tokens, got 0"),
        ({"normaliser": 3, "per_token": True}, r"normaliser: expected None with per_token=True"),
        ({"chunk_rows": 0}, r"chunk_rows: expected at least 1, got 0"),
    ],
)
def test_arguments_without_meaning_are_refused(options, message) -> None:
    teacher, student = pair()
    with pytest.raises(ConfigError, match=message):
        distillation_loss(student, targets(teacher, 5), **options)
