"""What a student is trained on: divergence, tail, temperature, mix, and the teacher's side of them.

Every choice ends in the same form: probabilities on *cells*. A cell is one kept token, and the last cell, the tail, is
all other tokens. These three tails differ in the teacher's probabilities only:

* ``ghost``: the tail cell has the teacher's tail mass.
* ``residual``: the true next token gets the tail mass, and the tail cell has none. A position without a next token
  keeps its ghost.
* ``renormalised``: the kept entries are scaled to one, and the tail cell has none.

Draws from the teacher have no tail: the cells are the distinct tokens drawn, with their shares (``sampled``).

Dimension letters: N positions, K kept entries, J temperatures.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields, replace
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from dask_logits.errors import ConfigError, DatasetError
from dask_logits.train.targets import IGNORED_LABEL, SparseTargets

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "total_variation"]
Tail = Literal["auto", "ghost", "residual", "renormalised", "sampled"]

# Log of the smallest positive float32: the least tail mass of the reverse KL, which is infinite at a mass of 0.
LEAST_LOGMASS = -149 * math.log(2)


@dataclass(frozen=True, kw_only=True)
class Objective:
    r"""The loss of a student: ``(1 − alpha) · cross-entropy + alpha · temperature² · divergence``.

    Parameters
    ----------
    divergence
        ``forward_kl``, KL(teacher ‖ student). ``reverse_kl``, KL(student ‖ teacher). ``jsd``, the generalised
        Jensen-Shannon divergence ``beta · KL(p ‖ m) + (1 − beta) · KL(q ‖ m)`` with ``m = beta · p + (1 − beta) · q``,
        p the teacher and q the student (arXiv 2306.13649). ``total_variation``, half the sum of the absolute values of
        ``p − q``.
    tail
        What becomes of the teacher's mass outside the kept entries. ``auto``: ``ghost``, or ``sampled`` for targets
        that are draws, which have no other. ``ghost``: one cell, compared with the student's
        mass outside the kept entries. ``residual``: the true next token gets it. ``renormalised``: the kept entries are
        scaled to one (biased; it warns). ``sampled``: the cross-entropy of the student with the draws,
        ``−Σ (count / n) log q``, an unbiased estimate of that with the teacher's whole distribution
        (arXiv 2503.16870). No entropy is subtracted, because that of the draws is a biased estimate.
    beta
        Weight of the teacher in ``jsd``, between 0 and 1. Other divergences ignore it.
    temperature
        Divides the raw logits of teacher and student in the divergence. The cross-entropy is always at temperature 1.
        Temperatures other than 1 need targets with their tail, except with ``renormalised``.
    alpha
        Share of the divergence, from 0 to 1.

    Raises
    ------
    ConfigError
        If a value is out of bounds, or the reverse KL is combined with a tail of no mass, where it is infinite. If
        ``sampled`` is combined with another divergence, or with a temperature other than 1.

    Examples
    --------
    >>> Objective(divergence="jsd", alpha=0.7).beta
    0.5
    """

    divergence: Divergence = "forward_kl"
    tail: Tail = "auto"
    beta: float = 0.5
    temperature: float = 1.0
    alpha: float = 1.0

    def __post_init__(self) -> None:
        problems = [
            f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}"
            for name, allowed in (("divergence", get_args(Divergence)), ("tail", get_args(Tail)))
            if getattr(self, name) not in allowed
        ]
        if not 0 < self.beta < 1:
            problems.append(f"beta: expected a number between 0 and 1, got {self.beta!r}")
        if not 0 < self.temperature < math.inf:
            problems.append(f"temperature: expected a positive number, got {self.temperature!r}")
        if not 0 <= self.alpha <= 1:
            problems.append(f"alpha: expected a number from 0 to 1, got {self.alpha!r}")
        if self.divergence == "reverse_kl" and self.tail in ("residual", "renormalised"):
            problems.append(
                f"tail: expected 'ghost' with the reverse KL, got {self.tail!r}, which leaves the teacher no mass in "
                "the tail, so that the reverse KL is infinite"
            )
        if self.tail == "sampled":
            problems += self._problems_of_draws()
        if problems:
            raise ConfigError("\n".join(problems), problems)
        if self.tail == "renormalised":
            warnings.warn(
                "Objective: renormalised entries are a biased target. At K = 50 they closed 5 % of the gap between "
                "cross-entropy and full distillation, a ghost token 59 %, the residual 83 %; at K = 12 they were worse "
                "than no distillation (arXiv 2503.16870). Use tail='ghost' or tail='residual'.",
                stacklevel=3,
            )

    def _problems_of_draws(self) -> list[str]:
        """Return the reasons why targets that are draws cannot have this objective."""
        problems = []
        if self.divergence != "forward_kl":
            problems.append(
                f"divergence: expected 'forward_kl' for draws, got {self.divergence!r}, which needs the teacher's "
                "probabilities, not only tokens drawn from them; train on a cache made with targets=topk"
            )
        if self.temperature != 1:
            problems.append(
                f"temperature: expected 1 for draws, got {self.temperature:g}: they were drawn at temperature 1; "
                "train on a cache made with targets=topk"
            )
        return problems

    def of(self, targets: SparseTargets) -> Objective:
        """Return the objective with the tail that targets have.

        Parameters
        ----------
        targets
            The targets of a loss, or a dataset of them.

        Raises
        ------
        ConfigError
            If they are draws and the objective is not for draws, or the reverse.
        """
        if not targets.draws:
            if self.tail == "sampled":
                raise ConfigError(
                    "tail: expected 'auto', 'ghost', 'residual' or 'renormalised' for targets that are the most "
                    "probable tokens, got 'sampled'; make a cache with distillation.teacher.generation.targets=sample"
                )
            return replace(self, tail="ghost") if self.tail == "auto" else self
        problems = self._problems_of_draws()
        if self.tail not in ("auto", "sampled"):
            problems.append(f"tail: expected 'auto' or 'sampled' for draws, which have no tail, got {self.tail!r}")
        if problems:
            raise ConfigError("\n".join(problems), problems)
        return replace(self, tail="sampled")


@dataclass(frozen=True, kw_only=True, eq=False)
class TeacherCells:
    """The teacher's probabilities on the cells of the scored positions.

    Parameters
    ----------
    ids_NK
        Token of each cell. An absent cell repeats the token of the row's most probable one.
    logp_NK
        Log-probs, −∞ for an absent cell. Behind the kept entries there may be one more, the next token.
    logtail_N
        Log of the mass of the tail cell.
    labels_N
        Next token, −100 where there is none, or where the student has no logit for it.
    n_entries
        Cells that are kept entries.
    """

    ids_NK: Tensor
    logp_NK: Tensor
    logtail_N: Tensor
    labels_N: Tensor
    n_entries: int

    def split(self, rows: int) -> list[Self]:
        """Cut into chunks of at most this many rows."""
        names = [field.name for field in fields(self) if field.name != "n_entries"]
        columns = [torch.split(getattr(self, name), rows) for name in names]
        return [replace(self, **dict(zip(names, parts, strict=True))) for parts in zip(*columns, strict=True)]


def teacher_cells(
    targets: SparseTargets, objective: Objective, rows_N: Tensor, width: int, dtype: torch.dtype
) -> TeacherCells:
    """Compute the teacher's side of an objective.

    Parameters
    ----------
    targets
        Targets of the batch.
    objective
        Divergence, tail, temperature and mix.
    rows_N
        Scored positions of the flattened batch.
    width
        Logits of the student. Kept ids beyond them count in the tail, draws beyond them nowhere.
    dtype
        Of the log-probs.

    Returns
    -------
    TeacherCells

    Raises
    ------
    ConfigError
        If the targets do not have the tail of the objective's temperature.
    DatasetError
        If a kept id is outside the teacher's vocabulary.
    """
    ids_NK = targets.topk_ids.flatten(0, -2)[rows_N].long()
    entries, divisor = _entries(targets, objective.temperature)
    logp_NK = entries.flatten(0, -2)[rows_N].to(dtype) / divisor
    _check_ids(torch.where(logp_NK > -torch.inf, ids_NK, 0), targets.vocab_size)
    if objective.tail == "renormalised":
        logtail_N = torch.zeros_like(logp_NK[:, 0])
    elif objective.tail == "sampled":
        # Counts are integers, so the rounding of their logs is undone.
        logp_NK = ((logp_NK.exp() * targets.draws).round() / targets.draws).log()
        logtail_N = torch.full_like(logp_NK[:, 0], -torch.inf)
    else:
        logtail_N = _tail(targets, objective.temperature).flatten()[rows_N].to(dtype)
        logp_NK, logtail_N = normalise_targets(logp_NK, logtail_N)

    beyond_NK = ids_NK >= width
    if objective.tail != "sampled":
        logtail_N = torch.logaddexp(logtail_N, logp_NK.masked_fill(~beyond_NK, -torch.inf).logsumexp(-1))
    logp_NK = logp_NK.masked_fill(beyond_NK, -torch.inf)
    labels_N = targets.label_ids.flatten()[rows_N]
    labels_N = labels_N.masked_fill(labels_N >= width, IGNORED_LABEL)
    n_entries = ids_NK.shape[-1]
    if objective.tail == "residual":
        ids_NK, logp_NK, logtail_N = _residual(ids_NK, logp_NK, logtail_N, labels_N)
    elif objective.tail == "renormalised":
        sum_N = logp_NK.logsumexp(-1)
        logp_NK = logp_NK - torch.where(sum_N == -torch.inf, 0.0, sum_N)[:, None]
        logtail_N = torch.zeros_like(sum_N).masked_fill(sum_N > -torch.inf, -torch.inf)
    elif objective.divergence == "reverse_kl":
        logtail_N = logtail_N.clamp(min=LEAST_LOGMASS)

    is_present_NK = logp_NK > -torch.inf
    anchor_N1 = ids_NK.gather(1, logp_NK.argmax(-1, keepdim=True))
    anchor_N1 = torch.where(is_present_NK.any(-1, keepdim=True), anchor_N1, 0)
    return TeacherCells(
        ids_NK=torch.where(is_present_NK, ids_NK, anchor_N1),
        logp_NK=logp_NK,
        logtail_N=logtail_N,
        labels_N=labels_N,
        n_entries=n_entries,
    )


def column_of(temperature: float, temperatures: tuple[float, ...]) -> int:
    """Return the column of a temperature other than 1.

    Raises
    ------
    ConfigError
        If the targets have no tail at this temperature.
    """
    if temperature not in temperatures:
        has = ", ".join(f"{value:g}" for value in sorted((1.0, *temperatures)))
        raise ConfigError(
            f"temperature: expected one that the cache has a tail for ({has}), got {temperature:g}; make a cache with "
            f"distillation.teacher.generation.temperatures=[{temperature:g}]"
        )
    return temperatures.index(temperature)


def normalise_targets(logp_NK: Tensor, logtail_N: Tensor) -> tuple[Tensor, Tensor]:
    """Scale the kept entries so that they and the tail sum to one.

    Parameters
    ----------
    logp_NK, logtail_N
        Log-probs as stored (rounded), or these divided by a temperature, and the tail's log-mass at that temperature.
        Rows without kept entries are unchanged.

    Returns
    -------
    logp_NK, logtail_N
    """
    kept_N = torch.log(-torch.expm1(logtail_N.clamp(max=-1e-7)))
    sum_N = logp_NK.logsumexp(-1)
    return logp_NK + torch.where(sum_N == -torch.inf, 0.0, kept_N - sum_N)[..., None], logtail_N


def tails_with_dropped(
    tail_logmass_NJ: Tensor, temperatures: tuple[float, ...], topk_logprobs_NK: Tensor, is_dropped_NK: Tensor
) -> Tensor:
    """Add the mass of entries that are dropped to the tails at further temperatures.

    Parameters
    ----------
    tail_logmass_NJ, temperatures
        The tails, and the temperature of each.
    topk_logprobs_NK
        Log-probs of all kept entries, at temperature 1.
    is_dropped_NK
        Whether an entry is dropped.

    Returns
    -------
    Tensor
        [N, J].
    """
    tails = []
    for j, temperature in enumerate(temperatures):
        logp_NK, logtail_N = normalise_targets(topk_logprobs_NK.float() / temperature, tail_logmass_NJ[..., j])
        dropped_N = logp_NK.masked_fill(~is_dropped_NK, -torch.inf).logsumexp(-1)
        tails.append(torch.logaddexp(logtail_N, dropped_N))
    return torch.stack(tails, -1) if tails else tail_logmass_NJ


def _check_ids(ids_NK: Tensor, vocab_size: int) -> None:
    if not ids_NK.numel():
        return
    least, most = torch.stack(ids_NK.aminmax()).tolist()
    if least < 0 or most >= vocab_size:
        raise DatasetError(
            f"targets.topk_ids: expected ids from 0 to {vocab_size - 1}, got {least} to {most}; "
            "run `dask-logits verify` on the cache"
        )


def _entries(targets: SparseTargets, temperature: float) -> tuple[Tensor, float]:
    """Return log-probs of the kept entries, and what divides them at a temperature."""
    if targets.topk_logprobs_NKJ is None or temperature == 1:
        return targets.topk_logprobs, temperature
    return targets.topk_logprobs_NKJ[..., column_of(temperature, targets.temperatures)], 1.0


def _tail(targets: SparseTargets, temperature: float) -> Tensor:
    """Return the tail's log-mass at a temperature."""
    if temperature == 1:
        return targets.tail_logmass
    column = column_of(temperature, targets.temperatures)
    assert targets.tail_logmass_NJ is not None
    return targets.tail_logmass_NJ[..., column]


def _residual(ids_NK: Tensor, logp_NK: Tensor, logtail_N: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give the tail's mass to the next token, as one more entry unless it is a kept one."""
    has_label_N = labels_N >= 0
    is_label_NK = (ids_NK == labels_N[:, None]) & (logp_NK > -torch.inf)
    logp_NK = torch.where(is_label_NK, torch.logaddexp(logp_NK, logtail_N[:, None]), logp_NK)
    extra_N = torch.where(has_label_N & ~is_label_NK.any(-1), logtail_N, -torch.inf)
    return (
        torch.cat([ids_NK, labels_N.clamp(min=0)[:, None]], 1),
        torch.cat([logp_NK, extra_N[:, None]], 1),
        logtail_N.masked_fill(has_label_N, -torch.inf),
    )
