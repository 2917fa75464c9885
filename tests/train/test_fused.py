"""Losses from hidden states against dense ones in float64, and in the ways of training loops."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap

import pytest
import torch
import warm
from dense_losses import (
    LABELS,
    MASK,
    OBJECTIVES,
    D,
    K,
    N,
    Student,
    V,
    as_draws,
    batch,
    default_dtype,
    dense_rows,
    every_objective,
    gradients,
    sparse_targets,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dask_logits import ConfigError, Head, Objective, SparseTargets, distillation_loss, fused_distillation_loss


@pytest.mark.parametrize("recompute", [False, True], ids=["in-forward", "recompute"])
@pytest.mark.parametrize("kind", ["plain", "bias", "scale", "softcap", "tied", "frozen", "lora", "all"])
def test_every_head_equals_the_dense_loss(kind, recompute) -> None:
    ids, teacher, targets = batch()
    for objective in every_objective():
        one, two = Student(kind), Student(kind)
        given = as_draws(targets) if objective.tail == "sampled" else targets
        found = fused_distillation_loss(
            one.hidden(ids), one.head(), given, objective, recompute=recompute, chunk_rows=3
        )
        found.loss.backward()
        expected = dense_rows(two(ids), teacher, LABELS, K, objective)[MASK].mean()
        expected.backward()
        values, wanted = ({"loss": loss, **gradients(of)} for loss, of in ((found.loss, one), (expected, two)))
        assert values.keys() == wanted.keys()
        for name, value in values.items():
            assert torch.allclose(value, wanted[name], atol=1e-12, rtol=0), (name, objective)
        assert (found.n_tokens, found.n_labels) == (6, 5)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_default_dtype_changes_nothing(recompute) -> None:
    ids, _, targets = batch()
    for objective in every_objective():
        outcomes = []
        given = as_draws(targets) if objective.tail == "sampled" else targets
        for dtype in (torch.float32, torch.bfloat16):
            student = Student("all").float()
            with default_dtype(dtype):
                found = fused_distillation_loss(
                    student.hidden(ids), student.head(), given, objective, recompute=recompute
                )
                found.loss.backward()
            outcomes.append({"loss": found.loss, **gradients(student)})
        assert all(torch.equal(value, outcomes[1][name]) for name, value in outcomes[0].items()), objective


def test_values_per_token_equal_those_of_the_logits() -> None:
    ids, _, targets = batch()
    one, two = Student("all"), Student("all")
    weights = torch.arange(N).double()
    found = fused_distillation_loss(one.hidden(ids), one.head(), targets, OBJECTIVES["warm"], per_token=True)
    expected = distillation_loss(two(ids), targets, OBJECTIVES["warm"], per_token=True)
    (found.loss * weights).sum().backward()
    (expected.loss * weights).sum().backward()
    for field in dataclasses.fields(found):
        torch.testing.assert_close(getattr(found, field.name), getattr(expected, field.name), atol=1e-12, rtol=0)
    for name, grad in gradients(one).items():
        torch.testing.assert_close(grad, gradients(two)[name], atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_chunk_size_changes_nothing_but_rounding(dtype) -> None:
    ids, _, targets = batch(40)
    outcomes = []
    for chunk_rows in (1, 7, 33, None):
        student = Student("all").to(dtype)
        fused_distillation_loss(student.hidden(ids), student.head(), targets, chunk_rows=chunk_rows).loss.backward()
        outcomes.append(gradients(student))
    for other in outcomes[1:]:
        for name, grad in outcomes[0].items():
            torch.testing.assert_close(grad, other[name], atol=8 * torch.finfo(dtype).eps, rtol=1e-5)


def test_a_head_that_leaves_1e_12_outside_the_kept_ids_gets_the_right_gradient() -> None:
    _, teacher, targets = batch(1)
    outside = torch.ones(1, V, dtype=torch.bool).scatter(-1, teacher.topk(K).indices, False)
    wanted = torch.where(outside, -31.5, teacher * 0)
    one, two = wanted.clone().requires_grad_(), wanted.clone().requires_grad_()
    fused_distillation_loss(one, Head(weight=torch.eye(V, dtype=torch.float64)), targets).loss.backward()
    dense_rows(two, teacher, LABELS[:1], K, Objective()).mean().backward()
    torch.testing.assert_close(one.grad, two.grad, atol=1e-12, rtol=0)
    assert one.grad[outside].abs().min() > 1e-4


def test_nothing_as_large_as_all_logits_is_stored() -> None:
    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dim() > 1 and out.shape[-1] == V:
                self.rows = max(self.rows, out.untyped_storage().nbytes() // (V * out.element_size()))
            return out

    ids, _, targets = batch(64)
    for options in ({}, {"recompute": True}, {"per_token": True}):
        student = Student("all")
        hidden, head = student.hidden(ids), student.head()
        with Largest() as largest:
            fused_distillation_loss(hidden, head, targets, chunk_rows=8, **options).loss.sum().backward()
        assert largest.rows == 8


def test_gradients_are_not_computed_where_none_is_wanted() -> None:
    ids, _, targets = batch()
    student = Student("all")
    with torch.no_grad():
        silent = fused_distillation_loss(student.hidden(ids), student.head(), targets)
    assert not silent.loss.requires_grad
    student.requires_grad_(False)
    assert fused_distillation_loss(student.hidden(ids), student.head(), targets).loss == silent.loss


def test_gradients_have_no_derivatives() -> None:
    ids, _, targets = batch()
    student = Student()
    hidden = student.hidden(ids)
    loss = fused_distillation_loss(hidden, student.head(), targets, recompute=True).loss
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()


def test_a_second_backward_needs_recompute() -> None:
    ids, _, targets = batch()
    for recompute in (False, True):
        student = Student()
        loss = fused_distillation_loss(student.hidden(ids), student.head(), targets, recompute=recompute).loss
        loss.backward(retain_graph=True)
        once = student.weight.grad.clone()
        if not recompute:
            with pytest.raises(ConfigError, match=r"backward: expected one call, .* pass recompute=True"):
                loss.backward()
        else:
            loss.backward()
            torch.testing.assert_close(student.weight.grad, 2 * once)


def test_accumulated_batches_equal_one_batch() -> None:
    ids, teacher, targets = batch()
    whole, parts = Student("all"), Student("all")
    objective = OBJECTIVES["jsd-residual"]
    fused_distillation_loss(whole.hidden(ids), whole.head(), targets, objective).loss.backward()
    for rows in (slice(0, 3), slice(3, 4), slice(4, N)):  # the second has no targets
        part = sparse_targets(teacher[rows], LABELS[rows], K, MASK[rows])
        fused_distillation_loss(parts.hidden(ids[rows]), parts.head(), part, objective, normaliser=6).loss.backward()
    for name, grad in gradients(parts).items():
        torch.testing.assert_close(grad, gradients(whole)[name], atol=1e-14, rtol=0)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_batch_without_targets_and_an_empty_one_give_zero(recompute) -> None:
    ids, teacher, _ = batch()
    for rows in (N, 0):
        student = Student("all")
        nothing = sparse_targets(teacher[:rows], LABELS[:rows], K, torch.zeros(rows, dtype=torch.bool))
        found = fused_distillation_loss(student.hidden(ids[:rows]), student.head(), nothing, recompute=recompute)
        found.loss.backward()
        assert (found.loss.item(), found.n_tokens) == (0.0, 0)
        assert all((grad == 0).all() for grad in gradients(student).values())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["plain", "all"])
def test_autocast_computes_products_in_bfloat16_and_sums_in_float32(kind, recompute) -> None:
    ids, _, targets = batch(40)
    exact, cast = Student(kind), Student(kind).float()
    objective = OBJECTIVES["jsd-residual"]
    fused_distillation_loss(exact.hidden(ids), exact.head(), targets, objective).loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        found = fused_distillation_loss(cast.hidden(ids), cast.head(), targets, objective, recompute=recompute)
    found.loss.backward()
    assert found.loss.dtype == torch.float32
    for name, grad in gradients(cast).items():
        wanted = gradients(exact)[name]
        assert grad.dtype == torch.float32
        assert (grad - wanted).norm() < 0.03 * wanted.norm(), name


def test_bfloat16_weights_get_bfloat16_gradients() -> None:
    ids, _, targets = batch(40)
    exact, half = Student("all"), Student("all").bfloat16()
    fused_distillation_loss(exact.hidden(ids), exact.head(), targets).loss.backward()
    fused_distillation_loss(half.hidden(ids), half.head(), targets).loss.backward()
    for name, grad in gradients(half).items():
        wanted = gradients(exact)[name]
        assert grad.dtype == torch.bfloat16
        assert (grad - wanted).norm() < 0.05 * wanted.norm(), name


@pytest.mark.parametrize("recompute", [False, True])
def test_sums_over_many_rows_do_not_overflow_float16(recompute) -> None:
    n, generator = 16_384, torch.Generator().manual_seed(0)
    hidden = (torch.randn(n, 8, generator=generator) + 20).half().requires_grad_()
    weight = (torch.randn(16, 8, generator=generator) * 0.02).half().requires_grad_()
    logits = torch.randn(n, 16, generator=generator)
    logits[:, 3] += 5
    top, zeros = logits.log_softmax(-1).topk(4), torch.zeros(n)
    targets = SparseTargets(
        input_ids=zeros.long(), topk_ids=top.indices, topk_logprobs=top.values, logsumexp=zeros, label_logprob=zeros,
        tail_logmass=torch.log1p(-top.values.exp().sum(1)), label_ids=zeros.long(), mask=zeros == 0, vocab_size=16,
    )  # fmt: skip
    fused_distillation_loss(hidden, Head(weight=weight), targets, recompute=recompute).loss.backward()
    assert weight.grad.dtype == torch.float16
    exact = weight.detach().float().requires_grad_()
    fused_distillation_loss(hidden.detach().float(), Head(weight=exact), targets).loss.backward()
    torch.testing.assert_close(weight.grad.float(), exact.grad, rtol=0.01, atol=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_gpu_gives_the_same_gradients(dtype, recompute) -> None:
    ids, _, targets = batch(40)
    exact, other = Student("all"), Student("all").to("cuda", dtype)
    fused_distillation_loss(exact.hidden(ids), exact.head(), targets).loss.backward()
    hidden, head = other.hidden(ids.cuda()), other.head()
    fused_distillation_loss(hidden, head, targets.to("cuda"), recompute=recompute, chunk_rows=9).loss.backward()
    for name, grad in gradients(other).items():
        wanted = gradients(exact)[name]
        assert (grad.cpu() - wanted).norm() < 50 * torch.finfo(dtype).eps * wanted.norm(), name


def test_it_works_with_gradient_checkpointing_around_trunk_and_loss() -> None:
    ids, _, targets = batch()
    plain, saving, around = Student("tied"), Student("tied"), Student("tied")
    fused_distillation_loss(plain.hidden(ids), plain.head(), targets).loss.backward()
    hidden = checkpoint(saving.hidden, ids, use_reentrant=False)
    fused_distillation_loss(hidden, saving.head(), targets).loss.backward()

    def whole(ids: Tensor) -> Tensor:
        return fused_distillation_loss(around.hidden(ids), around.head(), targets).loss

    checkpoint(whole, ids, use_reentrant=False).backward()
    for student in (saving, around):
        for name, grad in gradients(student).items():
            torch.testing.assert_close(grad, gradients(plain)[name], atol=1e-14, rtol=0)


# Dynamo of torch 2.13 hides this warning of its own, but not where warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_it_works_inside_compiled_code() -> None:
    ids, _, targets = batch()
    plain, compiled = Student("all").float(), Student("all").float()

    def step(student: Student, ids: Tensor) -> Tensor:
        fused = fused_distillation_loss(student.hidden(ids), student.head(), targets, OBJECTIVES["warm"])
        return fused.loss + distillation_loss(student(ids), targets).loss

    step(plain, ids).backward()
    torch._dynamo.reset()
    torch.compile(step)(compiled, ids).backward()
    for name, grad in gradients(compiled).items():
        torch.testing.assert_close(grad, gradients(plain)[name], atol=1e-5, rtol=1e-4)


_RANK = """
    import sys
    import torch
    from torch import distributed, nn
    from torch.nn.parallel import DistributedDataParallel
    from dense_losses import K, LABELS, MASK, N, OBJECTIVES, Student, batch, gradients, sparse_targets
    from dask_logits import fused_distillation_loss

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = Student("all")

        def forward(self, ids, targets):
            hidden = self.student.hidden(ids)
            return fused_distillation_loss(hidden, self.student.head(), targets, OBJECTIVES["warm"], normaliser=6 / 2)

    rank = int(sys.argv[1])
    distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/store", rank=rank, world_size=2)
    model = DistributedDataParallel(Whole(), static_graph=sys.argv[3] == "True")
    ids, teacher, _ = batch()
    rows = (slice(0, 5), slice(5, N))[rank]
    targets = sparse_targets(teacher[rows], LABELS[rows], K, MASK[rows])
    found = model(ids[rows], targets)
    found.loss.backward()
    torch.save((found.loss.detach(), gradients(model.module.student)), f"{sys.argv[2]}/{rank}.pt")
    distributed.destroy_process_group()
"""


@pytest.mark.parametrize("static_graph", [False, True])
def test_two_processes_equal_one(static_graph, tmp_path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(_RANK))
    paths = f"import sys; sys.path[:0] = {sys.path!r}\n"
    script.write_text(paths + script.read_text())
    ranks = [
        warm.Popen([sys.executable, str(script), str(rank), str(tmp_path), str(static_graph)], stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    ids, _, targets = batch()
    whole = Student("all")
    expected = fused_distillation_loss(whole.hidden(ids), whole.head(), targets, OBJECTIVES["warm"])
    expected.loss.backward()
    (first, one), (second, two) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    torch.testing.assert_close((first + second) / 2, expected.loss.detach(), atol=1e-13, rtol=0)
    for name, grad in gradients(whole).items():
        torch.testing.assert_close(one[name], grad, atol=1e-13, rtol=0)
        torch.testing.assert_close(two[name], grad, atol=1e-13, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda hidden, head: (hidden[:-1], head), r"hidden: .*one position short, as if they were shifted"),
        (lambda hidden, head: (hidden[:, :-1], head), r"hidden: expected the width of the head's inputs, 6, got 5"),
        (lambda hidden, head: (hidden.long(), head), r"hidden: expected floating-point numbers \[..., D\], got"),
        (lambda hidden, head: (hidden, nn.Linear(D, V)), r"head: expected a Head, got Linear; use student_head"),
    ],
    ids=["shifted", "width", "integers", "module"],
)
def test_hidden_states_that_cannot_belong_to_the_targets_are_refused(change, message) -> None:
    ids, _, targets = batch()
    student = Student()
    with pytest.raises(ConfigError, match=message):
        fused_distillation_loss(*change(student.hidden(ids), student.head()), targets)
