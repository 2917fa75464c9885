"""Dense float64 losses over the whole vocabulary, differentiated by autograd, and a student to try losses on."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from dask_logits import Head, Objective, SparseTargets
from dask_logits.train.heads import Adapter

N, D, V, K = 7, 6, 50, 5
# A label that is kept, several that are not, one position without.
LABELS = torch.tensor([3, 7, -100, 0, 49, 12, 31])
MASK = torch.tensor([True, True, True, False, True, True, True])

# Counts of the kept tokens among 20 draws.
COUNTS = torch.tensor([10, 5, 3, 2, 0], dtype=torch.float64)
DIVERGENCES = [
    (divergence, tail)
    for divergence in ("forward_kl", "reverse_kl", "jsd", "total_variation")
    for tail in ("ghost", "residual", "renormalised")
    if divergence != "reverse_kl" or tail == "ghost"
]
OBJECTIVES = {
    "jsd-residual": Objective(divergence="jsd", tail="residual", beta=0.2, alpha=0.6),
    "warm": Objective(temperature=2.0, alpha=0.4),
}


def objective(divergence: str, tail: str, **options: float) -> Objective:
    """Make an objective without its warning."""
    if tail != "renormalised":
        return Objective(divergence=divergence, tail=tail, **options)
    with pytest.warns(UserWarning, match=r"biased target\. .* \(arXiv 2503\.16870\)"):
        return Objective(divergence=divergence, tail=tail, **options)


def every_objective() -> Iterator[Objective]:
    for alpha in (0.0, 0.3, 1.0):
        for divergence, tail in DIVERGENCES:
            for temperature in (1.0, 2.0):
                yield objective(divergence, tail, temperature=temperature, alpha=alpha, beta=0.3)
        yield Objective(tail="sampled", alpha=alpha)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def dense_divergence(p: Tensor, q: Tensor, objective: Objective) -> Tensor:
    """Return the divergence of two distributions in the last axis."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        there = a > 0
        safe = torch.where(there, a, 1.0)
        return torch.where(there, a * (safe.log() - torch.where(there, b, 1.0).log()), 0.0).sum(-1)

    if objective.divergence == "forward_kl":
        return kl(p, q)
    if objective.divergence == "reverse_kl":
        return kl(q, p)
    if objective.divergence == "jsd":
        m = objective.beta * p + (1 - objective.beta) * q
        return objective.beta * kl(p, m) + (1 - objective.beta) * kl(q, m)
    return (p - q).abs().sum(-1) / 2


def dense_rows(student: Tensor, teacher: Tensor, labels: Tensor, k: int, objective: Objective) -> Tensor:
    """Return the loss of each row, with every token a cell of its own but those of the ghost."""
    T = objective.temperature
    p, q = (teacher / T).softmax(-1), (student / T).softmax(-1)
    kept = teacher.topk(k).indices
    is_kept = torch.zeros_like(p, dtype=torch.bool).scatter(-1, kept, True)
    inside = torch.where(is_kept, p, 0.0)
    outside = torch.where(is_kept, 0.0, p).sum(-1, keepdim=True)

    def with_ghost(whole: Tensor) -> Tensor:
        ghost = torch.where(is_kept, 0.0, whole).sum(-1, keepdim=True)
        return torch.cat([whole.gather(-1, kept), ghost], -1)

    divergence = dense_divergence(with_ghost(p), with_ghost(q), objective)
    if objective.tail == "residual":
        given = inside.scatter_add(-1, labels.clamp(min=0)[..., None], outside)
        divergence = torch.where(labels >= 0, dense_divergence(given, q, objective), divergence)
    elif objective.tail == "renormalised":
        divergence = dense_divergence(inside / inside.sum(-1, keepdim=True), q, objective)
    elif objective.tail == "sampled":
        divergence = -(COUNTS / 20 * q.log().gather(-1, kept)).sum(-1)
    hard = torch.nn.functional.cross_entropy(student, labels, ignore_index=-100, reduction="none")
    return (1 - objective.alpha) * hard + objective.alpha * T**2 * divergence


def sparse_targets(
    teacher: Tensor, labels: Tensor, k: int, mask: Tensor | None = None, temperatures: tuple[float, ...] = (2.0,)
) -> SparseTargets:
    """Return what a cache of k entries knows of a teacher's logits, unrounded."""
    logp = teacher.log_softmax(-1)
    top = logp.topk(k)
    return SparseTargets(
        input_ids=torch.zeros_like(labels),
        topk_ids=top.indices,
        topk_logprobs=top.values,
        tail_logmass=logp.scatter(-1, top.indices, -torch.inf).logsumexp(-1),
        logsumexp=teacher.logsumexp(-1),
        label_ids=labels,
        label_logprob=torch.where(labels >= 0, logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0], torch.nan),
        mask=torch.ones_like(labels, dtype=torch.bool) if mask is None else mask,
        vocab_size=teacher.shape[-1],
        temperatures=temperatures,
        tail_logmass_NJ=torch.stack(
            [(teacher / T).log_softmax(-1).scatter(-1, top.indices, -torch.inf).logsumexp(-1) for T in temperatures], -1
        ),
    )


def as_draws(targets: SparseTargets) -> SparseTargets:
    """Return the kept tokens as draws."""
    return dataclasses.replace(
        targets,
        topk_logprobs=(COUNTS / 20).log().expand_as(targets.topk_ids),
        tail_logmass=torch.full_like(targets.tail_logmass, -torch.inf),
        temperatures=(),
        tail_logmass_NJ=None,
        draws=20,
    )


class Student(nn.Module):
    """Embedding, a layer and a head with everything on it, in float64."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)

        def parameter(*shape: int, grad: bool = True) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=draw, dtype=torch.float64), requires_grad=grad)

        self.embedding = parameter(V, D)
        self.layer = parameter(D, D)
        self.weight = self.embedding if kind == "tied" else parameter(V, D, grad=kind not in ("frozen", "lora"))
        self.bias = parameter(V) if kind in ("bias", "all") else None
        self.down, self.up = (parameter(2, D), parameter(V, 2)) if kind in ("lora", "all") else (None, None)
        self.scale = 0.3 if kind in ("scale", "all") else 1.0
        self.softcap = 2.0 if kind in ("softcap", "all") else None

    def hidden(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.embedding[ids] @ self.layer)

    def head(self) -> Head:
        adapters = () if self.up is None else (Adapter(down=lambda x: x @ self.down.t(), up=self.up, scaling=1.5),)
        return Head(weight=self.weight, bias=self.bias, scale=self.scale, softcap=self.softcap, adapters=adapters)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.hidden(ids)
        raw = hidden @ self.weight.t()
        if self.up is not None:
            raw = raw + 1.5 * (hidden @ self.down.t() @ self.up.t())
        if self.bias is not None:
            raw = raw + self.bias
        raw = self.scale * raw
        return raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)


def batch(rows: int = N, seed: int = 0) -> tuple[Tensor, Tensor, SparseTargets]:
    """Return tokens, the teacher's logits, and targets with a masked position."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (rows,), generator=draw)
    teacher = torch.randn(rows, V, generator=draw, dtype=torch.float64) * 3
    labels, mask = LABELS.repeat(-(-rows // N))[:rows], MASK.repeat(-(-rows // N))[:rows]
    return ids, teacher, sparse_targets(teacher, labels, K, mask)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
