"""``SparseTargets``: the teacher's targets for one batch.

One object holds the targets and the mask of valid positions, so that a loss cannot be called without the mask. It
cannot be sliced, because targets and logits of the same position belong together and slicing could shift one of them.
Provable facts about a batch are checked: student and teacher read the same tokens, and the log-prob of each next token
agrees with its kept entry, or for draws with their frequency.

Dimension letters: N positions (any leading dimensions, [B, T] for a padded batch), K kept entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from dask_logits.errors import ConfigError, DatasetError
from dask_logits.records import label_doubts

IGNORED_LABEL = -100

# Tolerance between a label's log-prob and its kept entry: entries are rounded to float16, and those of a compact cache
# to a step that grows with the distance from the most probable one (0.7 % of it at the coarsest precision, 8 bits).
_LEAST_ERROR = 0.02
_SHARE_OF_GAP = 0.02


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tensors:
    """Tensors of a batch that move between devices together."""

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Self:
        """Return the same targets on another device."""
        return self._changed(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Return the same targets in page-locked memory. A ``DataLoader`` with ``pin_memory=True`` calls this."""
        return self._changed(lambda tensor: tensor.pin_memory())

    def __getitem__(self, index: object) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} cannot be sliced: the targets at a position belong to the student's logits at the "
            "same position, and nothing is shifted. To train on the first tokens of each document only, open the cache "
            "with CachedLogitsDataset(..., max_tokens=...)."
        )

    # Without it, __getitem__ would make the object look like a sequence.
    __iter__ = None

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = change(value)
            elif isinstance(value, dict):
                changed[field.name] = {name: change(tensor) for name, tensor in value.items()}
            elif isinstance(value, _Tensors):
                changed[field.name] = value._changed(change)
        return replace(self, **changed)


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseTargets(_Tensors):
    """The teacher's distributions for a batch: kept entries, tail, labels and mask.

    The targets at position t are the teacher's distribution of the token at t + 1, like a causal model's logits at t.

    Parameters
    ----------
    input_ids
        [N] int64, the tokens read by the teacher.
    topk_ids, topk_logprobs
        [N, K] int64 and float32, the kept entries, most probable first. An entry with log-prob −∞ is absent, and its id
        is ignored. In a position without absent entries no other token is more probable than the kept ones. Of draws:
        the distinct tokens drawn, and the logs of their shares.
    tail_logmass
        [N] float32, log of the teacher's mass outside the kept entries. Of draws: of the share of the draws that the
        student has no logit for, −∞ without any.
    logsumexp
        [N] float32, of the teacher's raw logits.
    label_ids
        [N] int64, the document's token at t + 1, −100 at the end of the document or the batch.
    label_logprob
        [N] float32, the teacher's log-prob of the document's next token, NaN at the end of the document.
    mask
        [N] bool, True at positions that a student learns from, False at padding, at masked positions and at positions
        without targets, whose other values have no meaning.
    vocab_size
        Width of the teacher's vocabulary, or of the student's if the cache was opened with a smaller one. All ids are
        below it.
    temperatures
        J temperatures other than 1 with a tail.
    tail_logmass_NJ
        [N, J] float32, log of the teacher's mass outside the kept entries at each of the temperatures. None if J is 0.
    topk_logprobs_NKJ
        [N, K, J] float32, the log-probs of the kept entries at each of the temperatures, for a mixture of teachers.
        None for one teacher, whose log-probs at temperature 1 determine them.

    draws
        Number of draws of each position, 0 if the entries are the most probable tokens.

    Raises
    ------
    ConfigError
        If the shapes disagree.
    """

    input_ids: Tensor
    topk_ids: Tensor
    topk_logprobs: Tensor
    tail_logmass: Tensor
    logsumexp: Tensor
    label_ids: Tensor
    label_logprob: Tensor
    mask: Tensor
    vocab_size: int
    temperatures: tuple[float, ...] = ()
    tail_logmass_NJ: Tensor | None = None
    topk_logprobs_NKJ: Tensor | None = None
    draws: int = 0

    def __post_init__(self) -> None:
        width = {
            "topk_ids": self.topk_ids.shape[-1:],
            "topk_logprobs": self.topk_ids.shape[-1:],
            "tail_logmass_NJ": (len(self.temperatures),),
            "topk_logprobs_NKJ": (*self.topk_ids.shape[-1:], len(self.temperatures)),
        }
        problems = []
        for field in fields(self):
            value = getattr(self, field.name)
            expected = (*self.shape, *width.get(field.name, ()))
            if isinstance(value, Tensor) and tuple(value.shape) != expected:
                problems.append(f"{field.name}: expected the shape {expected}, got {tuple(value.shape)}")
        if self.temperatures and self.tail_logmass_NJ is None:
            problems.append(f"tail_logmass_NJ: expected one column for each of {self.temperatures}, got none")
        if problems:
            raise ConfigError("\n".join(problems), problems)

    @property
    def shape(self) -> torch.Size:
        """Shape of the positions, [B, T] for a padded batch."""
        return self.mask.shape

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.mask.device

    def check_alignment(self, input_ids: Tensor) -> None:
        """Refuse a batch if the student and the teacher read different tokens.

        Parameters
        ----------
        input_ids
            [N], the tokens read by the student.

        Raises
        ------
        DatasetError
            If they differ from the teacher's at a position with targets, or if the teacher's log-prob of the next
            token contradicts its kept entries.
        """
        if input_ids.shape != self.shape:
            raise DatasetError(
                f"The student's input_ids have the shape {tuple(input_ids.shape)}, but the targets have the shape "
                f"{tuple(self.shape)}. Give the student batch['input_ids'] of the same batch, unchanged."
            )
        differs_N = (input_ids.to(self.device) != self.input_ids) & self.mask
        if differs_N.any():
            place = tuple(int(axis[0]) for axis in differs_N.nonzero(as_tuple=True))
            raise DatasetError(
                f"The student reads other tokens than the teacher at {int(differs_N.sum())} of {int(self.mask.sum())} "
                f"positions, first at {place}: the cache has token {int(self.input_ids[place])}, the student "
                f"{int(input_ids[place])}.{self._shift(input_ids)} Give the student batch['input_ids'] of the same "
                "batch, unchanged."
            )
        self._check_labels()

    def _shift(self, input_ids: Tensor) -> str:
        """Describe a shift that explains the difference."""
        own_N, mask_N, other_N = self.input_ids, self.mask, input_ids.to(self.device)
        for earlier_N, later_N, where in ((own_N, other_N, "right"), (other_N, own_N, "left")):
            both_N = mask_N[..., 1:] & mask_N[..., :-1]
            if both_N.any() and not ((later_N[..., 1:] != earlier_N[..., :-1]) & both_N).any():
                return f" They are the cached tokens, shifted to the {where} by one position."
        return ""

    def _check_labels(self) -> None:
        """Refuse targets whose label log-probs contradict the kept entries, because they belong to other tokens."""
        if self.draws:
            self._check_drawn_labels()
            return
        present_NK = self.topk_logprobs > -torch.inf
        is_label_NK = (self.topk_ids == self.label_ids[..., None]) & present_NK
        least_N = torch.where(present_NK, self.topk_logprobs, torch.inf).amin(-1)
        kept_N = torch.where(is_label_NK, self.topk_logprobs, -torch.inf).amax(-1)
        is_kept_N = is_label_NK.any(-1)
        is_bounded_N = is_kept_N | present_NK.all(-1)
        known_N = self.mask & (self.label_ids >= 0) & ~self.label_logprob.isnan() & is_bounded_N
        bound_N = torch.where(is_kept_N, kept_N, least_N)
        top_N = torch.where(present_NK, self.topk_logprobs, -torch.inf).amax(-1)
        off_N = self.label_logprob - bound_N
        allowed_N = _LEAST_ERROR + _SHARE_OF_GAP * (top_N - bound_N + 1)
        wrong_N = known_N & ((off_N > allowed_N) | (is_kept_N & (off_N < -allowed_N)))
        if wrong_N.any():
            place = tuple(int(axis[0]) for axis in wrong_N.nonzero(as_tuple=True))
            raise DatasetError(
                f"The targets do not belong to these tokens: at {place} the teacher's log-prob of the next token "
                f"{int(self.label_ids[place])} is {float(self.label_logprob[place]):.3f}, but its kept entries say "
                f"{'' if is_kept_N[place] else 'at most '}{float(bound_N[place]):.3f} "
                f"({int(wrong_N.sum())} of {int(known_N.sum())} positions disagree). Run `dask-logits verify` on the "
                "cache; if it finds nothing, the targets were shifted after they were read."
            )

    def _check_drawn_labels(self) -> None:
        """Refuse draws among which the next tokens are too rare or too frequent for their probabilities."""
        known_N = self.mask & (self.label_ids >= 0) & ~self.label_logprob.isnan()
        is_label_NK = self.topk_ids == self.label_ids[..., None]
        shares_N = torch.where(is_label_NK, self.topk_logprobs.exp(), 0.0).sum(-1)

        def doubts(counted_N: Tensor) -> tuple[float, float] | None:
            shares, logprobs = (each[counted_N].float().cpu().numpy() for each in (shares_N, self.label_logprob))
            return label_doubts(shares, logprobs, self.draws)

        # The draws of copies of a document are not independent.
        if doubts(known_N) is None or (found := doubts(known_N & ~self._is_copy())) is None:
            return
        raise DatasetError(
            f"The targets do not belong to these tokens: at {int(known_N.sum())} positions the shares of the draws "
            f"that are the next token should sum to {found[0]:.1f} by the teacher's probabilities, but sum to "
            f"{found[1]:.1f}. Run `dask-logits verify` on the cache; if it finds nothing, the targets were "
            "shifted after they were read."
        )

    def _is_copy(self) -> Tensor:
        """Whether the sequence of a position is there before in the batch, with the same draws: [N]."""
        if self.mask.ndim < 2:
            return torch.zeros_like(self.mask)
        parts = (self.input_ids[..., None], self.topk_ids, self.topk_logprobs)
        sequences = torch.cat([part.double() for part in parts], -1).flatten(1)
        kind_B: Tensor = torch.unique(sequences, dim=0, return_inverse=True)[1]
        is_copy_B = (kind_B[:, None] == kind_B).tril(-1).any(1)
        return is_copy_B.view(-1, *[1] * (self.mask.ndim - 1)).expand_as(self.mask)


@dataclass(frozen=True, kw_only=True, eq=False)
class CodedTargets(_Tensors):
    """Encoded targets of a compact cache. :meth:`CachedLogitsDataset.decoder` converts them to SparseTargets.

    Parameters
    ----------
    codes
        Stored name → tensor: the byte planes [N, K] and ``top1_logprob`` [N].
    rest
        All other targets, without kept entries.
    tables_digest
        Digest of the tables that decode the codes.
    """

    codes: dict[str, Tensor]
    rest: SparseTargets
    tables_digest: str
