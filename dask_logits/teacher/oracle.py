"""Reference forward pass of a model on random documents, and the tolerance for deviations from it.

Two orders of the same sums differ by rounding, and the effect on log-probs depends on the model: 4e-7 nats for a tiny
Llama in float32, 1e-5 for a Mamba, 0.002 to 0.1 in bfloat16. Therefore the yardstick is measured: the same forward with
the input of every layer and of the head, and the logits, moved by up to one unit in the last place.

Dimension letters: B sequences, T tokens, R rows, D hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dask_logits.errors import TeacherError
from dask_logits.teacher.model import FLOATS, ScoringPath, Teacher

# Tolerated error of a path, as a multiple of the model's own rounding.
FACTOR = 4.0
_ROWS = 64


@dataclass
class Oracle:
    """A model's own forward on random documents, and its own rounding error.

    Tokens are random, so that obvious predictions do not hide mistakes.

    Parameters
    ----------
    teacher
        The model.
    tokens_BT
        Documents, padded on the right with other random tokens.
    lengths
        Lengths of the documents.
    """

    teacher: Teacher
    tokens_BT: Tensor
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        T = self.tokens_BT.shape[1]
        self.lengths = tuple(min(length, T) for length in self.lengths)
        places = [b * T + t for b, length in enumerate(self.lengths) for t in range(length)]
        step = -(-len(places) // _ROWS)
        # The last positions of the longest document reach furthest.
        self.rows_R = torch.tensor(sorted({*places[::step], self.lengths[0] - 1}), device=self.teacher.device)
        plain_RV = self.logprobs()
        # Some checkpoints hold NaN for ids that never occur. A document with such an id is refused during scoring.
        usable_R = plain_RV.isfinite().all(-1)
        if not usable_R.any():
            raise TeacherError(
                "teacher: expected finite logits on random tokens, got NaN or infinity everywhere; "
                "set distillation.teacher.dtype=float32, or use another checkpoint"
            )
        self.rows_R, self.plain_RV = self.rows_R[usable_R], plain_RV[usable_R]
        with _nudged(self.teacher):
            self.noise = rms(_jittered(self._logits()).float().log_softmax(-1) - self.plain_RV)

    @property
    def limit(self) -> float:
        """Largest error accepted as rounding."""
        return FACTOR * self.noise

    def error(self, path: ScoringPath) -> float:
        """Return a path's RMS difference in log-probs (nats). The model's path is unchanged afterwards."""
        with on_path(self.teacher, path):
            return rms(self.logprobs() - self.plain_RV)

    def logprobs(self) -> Tensor:
        """Return the log-probs of the compared positions on the model's current path, [R, V]."""
        return self._logits().float().log_softmax(-1)

    def hidden_states(self) -> Tensor:
        """Return the trunk's output at the compared positions, [R, D]."""
        return self.teacher.hidden_states(self.tokens_BT).flatten(0, 1)[self.rows_R]

    def _logits(self) -> Tensor:
        if self.teacher.path.head == "forward":
            return self.teacher.logits_forward(self.tokens_BT).flatten(0, 1)[self.rows_R]
        return head_logits(self.teacher, self.hidden_states())

    def padding_error(self) -> float:
        """Return the effect of right padding on the plain forward: each document alone against the padded batch."""
        T = self.tokens_BT.shape[1]
        differences = []
        for b, length in enumerate(self.lengths):
            chosen_R = self.rows_R // T == b
            places_R = self.rows_R[chosen_R] % T
            alone_RV = self.teacher.logits_forward(self.tokens_BT[b : b + 1, :length])[0, places_R].float()
            differences.append(alone_RV.log_softmax(-1) - self.plain_RV[chosen_R])
        return rms(torch.cat(differences))


@contextlib.contextmanager
def on_path(teacher: Teacher, path: ScoringPath) -> Iterator[None]:
    """Switch a teacher to a path, and back at the end."""
    before = teacher.path
    try:
        teacher.take(path)
        yield
    finally:
        teacher.take(before)


@contextlib.contextmanager
def _nudged(teacher: Teacher) -> Iterator[None]:
    """Move the input of every layer and of the head by up to one unit in the last place."""

    def nudge(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (_jittered(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": _jittered(kwargs["hidden_states"])}

    modules = [*teacher.layers(), teacher.head]
    handles = [module.register_forward_pre_hook(nudge, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _jittered(values: Tensor) -> Tensor:
    generator = torch.Generator(values.device).manual_seed(20_260_104)
    noise = torch.rand(values.shape, generator=generator, device=values.device) * 2 - 1
    # In double precision, because 1 plus a float32 epsilon would itself be rounded.
    return (values.double() * (1 + noise.double() * torch.finfo(values.dtype).eps)).to(values.dtype)


def head_logits(teacher: Teacher, hidden_RD: Tensor) -> Tensor:
    """Return the logits of hidden states by a teacher's current head path, [R, V]."""
    logits_RV = torch.empty(len(hidden_RD), teacher.vocab_size, dtype=teacher.logits_dtype, device=teacher.device)
    teacher.logits(hidden_RD, logits_RV)
    return teacher.path.finish(logits_RV) if teacher.path.head == "linear" else logits_RV


def random_tokens(teacher: Teacher, width: int) -> Tensor:
    """Return two rows of random tokens, shorter if the model has fewer positions."""
    config = teacher.model.config.get_text_config()
    generator = torch.Generator().manual_seed(20_260_101)
    width = min(width, getattr(config, "max_position_embeddings", None) or width)
    ids_V = _finite_ids(teacher)
    return ids_V[torch.randint(len(ids_V), (2, width), generator=generator)].to(teacher.device)


def _finite_ids(teacher: Teacher) -> Tensor:
    """Return the ids with finite embeddings, [V]. NaN would reach every position of its document."""
    ids_V = torch.arange(teacher.vocab_size)
    weight_VD = getattr(teacher.model.get_input_embeddings(), "weight", None)
    if not isinstance(weight_VD, Tensor) or weight_VD.dtype not in FLOATS or len(weight_VD) < len(ids_V):
        return ids_V
    usable_V = weight_VD[: len(ids_V)].isfinite().all(-1).cpu()
    return ids_V[usable_V] if usable_V.any() else ids_V


def rms(difference: Tensor) -> float:
    """Return the root mean square."""
    return float(difference.double().square().mean().sqrt())
