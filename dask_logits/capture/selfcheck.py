"""The self-check: a teacher's fast paths are compared with its own plain forward, and the fastest that agrees is taken.

No table of families: what a family does after its head (factors, soft caps, biases) is tried out with the numbers its
configuration names, and where none fits its own code is replayed. Tokens are random, so mistakes do not hide behind
a prediction that is obvious either way.

Dimension letters: B sequences, T tokens, R rows, D hidden width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from dask_logits.capture import fused
from dask_logits.capture.teacher import HEADS, Head, ScoringPath, Teacher
from dask_logits.errors import TeacherError

logger = logging.getLogger(__name__)

# Largest RMS difference in log-probs (nats) that rounding alone explains, between two orders of the same sums.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.15, "float16": 0.03}
_LENGTHS = (17, 9, 4)
# Long enough for several blocks of attention, the last one not whole.
_LONG = 150
_ROWS = 30


@torch.inference_mode()
def choose_path(
    teacher: Teacher, *, exact: bool, heads: tuple[Head, ...] = HEADS
) -> tuple[ScoringPath, dict[str, float]]:
    """Find the fastest path that reproduces the model's plain forward, and put the teacher on it.

    Parameters
    ----------
    teacher
        A loaded teacher.
    exact
        Logits in float32 are wanted where the teacher's dtype is narrower.
    heads
        Ways from hidden states to logits to try, in order.

    Returns
    -------
    path
        The first that agrees, not compiled.
    errors
        Way → RMS difference in log-probs (nats); ``padding`` → that of right padding without a mask.

    Raises
    ------
    TeacherError
        If right padding changes the teacher's output (it is not causal), its logits are not finite, or no way agrees.
    """
    teacher.take(ScoringPath())
    tolerance = TOLERANCE[_dtype_name(teacher)]
    generator = torch.Generator().manual_seed(20_260_101)
    tokens_BT = torch.randint(teacher.vocab_size, (len(_LENGTHS), _LENGTHS[0]), generator=generator)
    tokens_BT = tokens_BT.to(teacher.device)
    plain_BTV = teacher.logits_forward(tokens_BT).float().log_softmax(-1)
    # Some checkpoints hold NaN for ids that never occur; a document that has one is refused when it is scored.
    usable_BT = plain_BTV.isfinite().all(-1)
    if not usable_BT.any():
        raise TeacherError(
            "teacher: expected finite logits on random tokens, got NaN or infinity everywhere; "
            "set distillation.teacher.dtype=float32, or use another checkpoint"
        )
    errors = {"padding": _padding_error(teacher, tokens_BT, plain_BTV, usable_BT, generator)}
    if not errors["padding"] <= tolerance:
        raise TeacherError(
            f"teacher: expected a causal model, which right padding cannot change, got an RMS difference of "
            f"{errors['padding']:.2g} nats (tolerance {tolerance:.2g}); use a decoder-only teacher"
        )
    path = _choose_head(teacher, heads, tokens_BT, plain_BTV, usable_BT, tolerance / 10, errors)
    if teacher.device.type == "cpu":
        path = _choose_attention(teacher, path, generator, tolerance, errors)
    path = dataclasses.replace(path, exact=exact and path.head == "linear" and teacher.dtype != torch.float32)
    teacher.take(path)
    logger.info("path %s, RMS differences in nats from the plain forward: %s", path, errors)
    return path, errors


@torch.inference_mode()
def try_compiled(teacher: Teacher) -> float:
    """Compile the path a teacher is on, with fused attention if that agrees, and compare it with what it was.

    Returns
    -------
    float
        RMS difference in log-probs (nats); the teacher is on the compiled path.

    Raises
    ------
    RuntimeError
        If it cannot be compiled, or the difference is more than rounding; the teacher is on the path it was.
    """
    generator = torch.Generator().manual_seed(20_260_102)
    tokens_BT = _long_tokens(teacher, generator)
    eager = teacher.path
    plain_RV = _logprobs(teacher, tokens_BT)
    compiled = dataclasses.replace(eager, compiled=True)
    if eager.attention == "blocks" and teacher.dtype == torch.bfloat16 and fused.available():
        try:
            return _take_compiled(teacher, dataclasses.replace(compiled, attention="fused"), tokens_BT, plain_RV)
        except RuntimeError as error:
            logger.info("fused attention does not apply: %s", error)
    return _take_compiled(teacher, compiled, tokens_BT, plain_RV)


def _take_compiled(teacher: Teacher, path: ScoringPath, tokens_BT: Tensor, plain_RV: Tensor) -> float:
    eager = teacher.path
    teacher.take(path)
    error = _rms(_logprobs(teacher, tokens_BT) - plain_RV)
    if not error <= TOLERANCE[_dtype_name(teacher)]:
        teacher.take(eager)
        raise RuntimeError(f"compiled layers differ by {error:.2g} nats RMS")
    return error


def _padding_error(
    teacher: Teacher, tokens_BT: Tensor, plain_BTV: Tensor, usable_BT: Tensor, generator: torch.Generator
) -> float:
    """Score the same shapes with other padding: a causal model gives the same numbers left of it."""
    padding_BT = (torch.arange(_LENGTHS[0]) >= torch.tensor(_LENGTHS)[:, None]).to(teacher.device)
    other_BT = torch.randint(teacher.vocab_size, tokens_BT.shape, generator=generator).to(teacher.device)
    repadded_BTV = teacher.logits_forward(torch.where(padding_BT, other_BT, tokens_BT)).float().log_softmax(-1)
    compared_BT = usable_BT & ~padding_BT
    return _rms(repadded_BTV[compared_BT] - plain_BTV[compared_BT])


def _choose_head(
    teacher: Teacher,
    heads: tuple[Head, ...],
    tokens_BT: Tensor,
    plain_BTV: Tensor,
    usable_BT: Tensor,
    tolerance: float,
    errors: dict[str, float],
) -> ScoringPath:
    for path in (path for head in heads for path in _ways(teacher, head)):
        errors[path.head] = min(
            errors.get(path.head, float("inf")), _head_error(teacher, path, tokens_BT, plain_BTV, usable_BT)
        )
        if errors[path.head] <= tolerance:
            return path
    raise TeacherError(
        f"teacher: expected one of the head paths {', '.join(heads)} to reproduce the model's forward within "
        f"{tolerance:.2g} nats, got {errors}; run again with distillation.teacher.generation.force_regenerate=true"
    )


def _ways(teacher: Teacher, head: Head) -> Iterator[ScoringPath]:
    """Yield the ways of one kind: of ``linear`` every factor and soft cap that the configuration could mean."""
    if head != "linear":
        yield ScoringPath(head=head)
        return
    config = teacher.model.config.get_text_config()
    named = {
        name: float(value)
        for name, value in config.to_dict().items()
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        if "logit" in name or "lm_head" in name or "output_multiplier" in name
    }
    caps = [None, *(value for name, value in named.items() if "cap" in name)]
    factors = [value for name, value in named.items() if "cap" not in name]
    for scale in (1.0, *factors, *(1 / factor for factor in factors)):
        for cap in caps:
            yield ScoringPath(head="linear", scale=scale, softcap=cap)


def _head_error(teacher: Teacher, path: ScoringPath, tokens_BT: Tensor, plain_BTV: Tensor, usable_BT: Tensor) -> float:
    if path.head == "forward":
        return 0.0
    try:
        teacher.take(path)
        hidden_RD = teacher.hidden_states(tokens_BT).flatten(0, 1)
        logits_RV = torch.empty(len(hidden_RD), teacher.vocab_size, dtype=teacher.dtype, device=teacher.device)
        teacher.logits(hidden_RD, logits_RV)
    except (AttributeError, TypeError, RuntimeError) as error:
        logger.info("head path %s does not apply: %s", path.head, error)
        return float("inf")
    finally:
        teacher.take(ScoringPath())
    finished_RV = path.finish(logits_RV) if path.head == "linear" else logits_RV
    return _rms(finished_RV.float().log_softmax(-1)[usable_BT.flatten()] - plain_BTV[usable_BT])


def _choose_attention(
    teacher: Teacher, path: ScoringPath, generator: torch.Generator, tolerance: float, errors: dict[str, float]
) -> ScoringPath:
    tokens_BT = _long_tokens(teacher, generator)
    teacher.take(path)
    plain_RV = _logprobs(teacher, tokens_BT)
    blocks = dataclasses.replace(path, attention="blocks")
    try:
        teacher.take(blocks)
        errors["blocks"] = _rms(_logprobs(teacher, tokens_BT) - plain_RV)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        logger.info("block attention does not apply: %s", error)
        errors["blocks"] = float("inf")
    if errors["blocks"] <= tolerance:
        return blocks
    teacher.take(path)
    return path


def _long_tokens(teacher: Teacher, generator: torch.Generator) -> Tensor:
    config = teacher.model.config.get_text_config()
    length = min(_LONG, getattr(config, "max_position_embeddings", None) or _LONG)
    return torch.randint(teacher.vocab_size, (2, length), generator=generator).to(teacher.device)


def _logprobs(teacher: Teacher, tokens_BT: Tensor) -> Tensor:
    """Return the log-probs of some positions, those with NaN left at 0."""
    rows_R = torch.linspace(0, tokens_BT.numel() - 1, _ROWS).long().to(teacher.device)
    if teacher.path.head == "forward":
        logits_RV = teacher.logits_forward(tokens_BT).flatten(0, 1)[rows_R]
    else:
        hidden_RD = teacher.hidden_states(tokens_BT).flatten(0, 1)[rows_R]
        logits_RV = torch.empty(_ROWS, teacher.vocab_size, dtype=teacher.logits_dtype, device=teacher.device)
        teacher.logits(hidden_RD, logits_RV)
        if teacher.path.head == "linear":
            logits_RV = teacher.path.finish(logits_RV)
    return logits_RV.float().log_softmax(-1).nan_to_num(nan=0.0)


def _rms(difference: Tensor) -> float:
    return float(difference.double().square().mean().sqrt())


def _dtype_name(teacher: Teacher) -> str:
    return str(teacher.dtype).removeprefix("torch.")
