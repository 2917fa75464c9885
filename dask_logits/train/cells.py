r"""A chunk of the student's logits against the teacher's cells: values and gradients in closed form.

With T the temperature, S the kept ids and z the logits, ``l_rest`` is the logsumexp of z/T outside S, and ``l`` that of
all of z/T. The student's cells are ``log q_k = z_k/T − l`` and ``log q_tail = l_rest − l``. The tail is a sum over the
other tokens, never 1 − Σq, which cancels when the student is sharp, along with its gradient.

With ``u_i = q_i ∂L/∂q_i`` and ``d_i = u_i − q_i Σu``, the gradient to a kept logit is ``d_k / T``. The other logits
share ``d_tail / T`` in proportion to their probability. Per divergence:

===================  ==========================  =======================
forward KL           Σ p log(p/q)                u = −p
draws                −Σ p log q                  u = −p
reverse KL           Σ q log(q/p)                u = q log(q/p)
JSD(β)               m = βp + (1−β)q             u = (1−β) q log(q/m)
total variation      ½ Σ \|p − q\|                 u = ½ q sign(q − p)
===================  ==========================  =======================

Dimension letters: R rows of a chunk, V vocabulary, K cells without the tail, C = K + 1 cells.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dask_logits.train.objective import Objective, TeacherCells


def measure(
    logits_RV: Tensor, teacher: TeacherCells, objective: Objective, *, weights_R: Tensor | None, has_details: bool
) -> tuple[list[Tensor], Tensor | None]:
    """Compute the terms of the rows of a chunk, and the gradient of their weighted sum.

    Parameters
    ----------
    logits_RV
        Float32 or float64. They are overwritten.
    teacher, objective
        Of these rows.
    weights_R
        Weight of each row's loss in the gradient. None: no gradient.
    has_details
        Whether to compute the further terms.

    Returns
    -------
    terms_R
        In nats: the divergence on the cells, at the objective's temperature, and the cross-entropy with the next token,
        at temperature 1, 0 where there is none. On request also the student's mass on the kept entries and the entropy
        of its distribution, at temperature 1.
    grad_RV
        Gradient to the logits, in the memory of `logits_RV` or as large.
    """
    T = objective.temperature
    ids_RK, is_present_RK = teacher.ids_NK, teacher.logp_NK > -torch.inf
    label_R1, has_label_R = teacher.labels_N.clamp(min=0)[:, None], teacher.labels_N >= 0
    own_RK = logits_RV.gather(1, ids_RK)
    label_logit_R = logits_RV.gather(1, label_R1)[:, 0]
    if has_details:
        q_RV = logits_RV.softmax(-1)
        entropy_R = torch.special.entr(q_RV, out=q_RV).sum(-1)
        del q_RV
    if T == 1:
        tempered_RV = logits_RV
    else:
        lse_R = logits_RV.logsumexp(-1)
        tempered_RV = logits_RV / T

    kept_RK = own_RK.masked_fill(~is_present_RK, -torch.inf) / T
    # Absent cells repeat the id of a present one. In a row without entries they must not hide the token of that id.
    hidden_RK = own_RK.div_(T).masked_fill_(is_present_RK.any(-1, keepdim=True), -torch.inf)
    rest_RV = tempered_RV.scatter_(1, ids_RK, hidden_RK)
    maximum_R = rest_RV.amax(-1)
    is_empty_R = maximum_R == -torch.inf
    rest_RV.sub_(maximum_R.masked_fill(is_empty_R, 0.0)[:, None]).exp_()
    sum_R = rest_RV.sum(-1)
    lse_rest_R = sum_R.log() + maximum_R
    total_R = torch.logaddexp(lse_rest_R, kept_RK.logsumexp(-1))
    if T == 1:
        lse_R = total_R
    logq_RC = torch.cat([kept_RK, lse_rest_R[:, None]], 1) - total_R[:, None]
    logp_RC = torch.cat([teacher.logp_NK, teacher.logtail_N[:, None]], 1)
    divergence_R, u_RC = _divergence(logp_RC, logq_RC, objective)
    terms_R = [divergence_R, torch.where(has_label_R, lse_R - label_logit_R, 0.0)]
    if has_details:
        entries_RK = (kept_RK * T)[:, : teacher.n_entries]
        terms_R += [(entries_RK.logsumexp(-1) - lse_R).exp(), entropy_R]
    if weights_R is None:
        return terms_R, None

    q_RC = logq_RC.exp()
    # T² of the loss over T of the chain rule.
    d_RC = (u_RC - q_RC * u_RC.sum(-1, keepdim=True)) * (weights_R * (objective.alpha * T))[:, None]
    label_weight_R = torch.where(has_label_R, weights_R * (1 - objective.alpha), 0.0)
    if T == 1:
        d_RC += q_RC * label_weight_R[:, None]
    grad_RV = rest_RV.mul_((d_RC[:, -1] / sum_R.masked_fill(is_empty_R, 1.0))[:, None])
    grad_RV.scatter_add_(1, ids_RK, d_RC[:, :-1])
    if objective.alpha < 1:
        if T != 1:
            grad_RV += logits_RV.sub_(lse_R[:, None]).exp_().mul_(label_weight_R[:, None])
        grad_RV.scatter_add_(1, label_R1, -label_weight_R[:, None])
    return terms_R, grad_RV


def _divergence(logp_RC: Tensor, logq_RC: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Return the divergence of each row and u, see the module's docstring. A term of probability 0 is 0."""
    p_RC, q_RC = logp_RC.exp(), logq_RC.exp()
    has_p_RC, has_q_RC = logp_RC > -torch.inf, q_RC > 0
    if objective.divergence == "forward_kl":
        # No entropy is subtracted from the cross-entropy with draws.
        entropy_RC = 0.0 if objective.tail == "sampled" else logp_RC
        terms_RC, u_RC = torch.where(has_p_RC, p_RC * (entropy_RC - logq_RC), 0.0), -p_RC
    elif objective.divergence == "reverse_kl":
        terms_RC = u_RC = torch.where(has_q_RC, q_RC * (logq_RC - logp_RC), 0.0)
    elif objective.divergence == "jsd":
        beta = objective.beta
        logm_RC = torch.logaddexp(logp_RC + math.log(beta), logq_RC + math.log1p(-beta))
        u_RC = torch.where(has_q_RC, (1 - beta) * q_RC * (logq_RC - logm_RC), 0.0)
        terms_RC = torch.where(has_p_RC, beta * p_RC * (logp_RC - logm_RC), 0.0) + u_RC
    else:
        terms_RC, u_RC = 0.5 * (p_RC - q_RC).abs(), 0.5 * q_RC * torch.sign(q_RC - p_RC)
    # Of two distributions none is negative; rounding can make it so.
    return terms_RC.sum(-1).clamp(min=0), u_RC
