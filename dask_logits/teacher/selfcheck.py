"""The self-check: compare a teacher's fast paths with its own forward, and choose the fastest that agrees.

There is no table of families. Operations after a family's head (factors, soft caps) are tried with the numbers in its
configuration. If none fits, the family's own code is replayed. The model's own forward decides.

*Tolerance*: a multiple of the effect of the model's own rounding, not an absolute figure. The yardstick is the same
forward with the input of every layer moved by one unit in the last place (:mod:`dask_logits.teacher.oracle`). Over 122
families, float32 and bfloat16, good paths were off by at most 1.2 times the yardstick, and the model's own bfloat16
forward differed by 0.3 to 1.5 times from its float32 one. The limit is therefore 4 times. A scale of 1.01 in attention,
a lost window, sink, soft cap or position bias were off by 30 to 10⁶ times the yardstick.

*Model*: if the weights allow it, first a :mod:`dask_logits.teacher.probe` with the first layers in float32 and short
windows. There a document of 150 tokens exceeds every window, chunk and ``index_topk``, and errors hidden by rounding in
bfloat16 become visible. Then the teacher itself, in its own dtype and with all layers. Hidden states are also
multiplied by 8 and 64, to reveal a soft cap that random tokens never reach.

Dimension letters: B sequences, T tokens, R rows, D hidden width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dask_logits.errors import MISFITS, TeacherError, first_line
from dask_logits.teacher.cpu import fused
from dask_logits.teacher.cuda import kernels
from dask_logits.teacher.model import HEADS, Attention, Head, ScoringPath, Teacher
from dask_logits.teacher.oracle import Oracle, head_logits, on_path, random_tokens, rms
from dask_logits.teacher.probe import SHORT, make_probe, reaches, set_reach
from dask_logits.teacher.transformers_internals import attention_of

logger = logging.getLogger(__name__)

# Documents of the probe: several blocks of attention and many windows. Each is padded on the right.
_WIDTH, _LENGTHS = 150, (100, 40)
# Documents of the teacher itself: two blocks.
_OWN_WIDTH, _OWN_LENGTHS = 70, (66, 17)
# Longest document if a window cannot be shortened.
_LONGEST = 2_200
# Factors on hidden states. The largest drives logits of usual size far into a soft cap.
_LOUDNESS = (1.0, 8.0, 64.0)
# Relative RMS difference of raw logits between two orders of the same sums, in units of the dtype's epsilon.
_RAW_EPSILONS, _RAW_EPSILONS_HALF = 100.0, 0.75


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The result of a self-check.

    Parameters
    ----------
    path
        The fastest path that agrees, not compiled.
    errors
        Path → RMS difference in log-probs (nats), infinite if a path does not apply. ``padding`` is that of right
        padding without a mask, ``rounding`` the yardstick on the teacher.
    refusals
        Path → reason why it was rejected.
    """

    path: ScoringPath
    errors: dict[str, float]
    refusals: dict[str, str]


@torch.inference_mode()
def check(teacher: Teacher, *, exact: bool, may_compile: bool = True) -> Choice:
    """Find the fastest path that reproduces the model's plain forward, and switch the teacher to it.

    Parameters
    ----------
    teacher
        A loaded teacher.
    exact
        Whether float32 logits are required if the teacher's dtype is narrower.
    may_compile
        Whether attention that must be compiled may be used.

    Raises
    ------
    TeacherError
        If right padding changes the teacher's output (it is not causal), or its logits are not finite.
    """
    teacher.take(ScoringPath())
    own = Oracle(teacher, random_tokens(teacher, _OWN_WIDTH), _OWN_LENGTHS)
    choice = Choice(path=ScoringPath(), errors={"rounding": own.noise}, refusals={})
    probe, reach_untested = _probe_oracle(teacher, choice)
    _require_causal(probe, choice)
    path = _choose_head(probe, choice)
    kind = fast_attention(teacher, may_compile=may_compile)
    if kind is not None:
        path = _choose_attention(probe, path, kind, reach_untested, choice)
    path = dataclasses.replace(path, exact=exact and path.head == "linear" and teacher.dtype != torch.float32)
    path = _confirm(own, path, choice)
    teacher.take(path)
    logger.debug("path %s, RMS differences in nats from the plain forward: %s", path, choice.errors)
    for way, reason in choice.refusals.items():
        logger.info("%s is not used: %s", way, reason)
    return dataclasses.replace(choice, path=path)


@torch.inference_mode()
def try_compiled(teacher: Teacher, longest: int = _WIDTH) -> float:
    """Compile a teacher's path, with fused attention if that agrees, and compare it with the uncompiled path.

    Parameters
    ----------
    teacher
        A teacher after :func:`check`.
    longest
        Tokens of the longest document of the data. Longer windows are not tested.

    Returns
    -------
    float
        RMS difference in log-probs (nats). The teacher uses the compiled path.

    Raises
    ------
    RuntimeError
        If it cannot be compiled, or the difference exceeds rounding. The teacher's path is unchanged.
    """
    crossed = [window for window in reaches(teacher).values() if window < min(longest, _LONGEST)]
    if crossed:
        # Layers are recompiled when a mask appears, beyond a window.
        tokens_BT = random_tokens(teacher, max(crossed) + 3 * SHORT)[:1]
        oracle = Oracle(teacher, tokens_BT, (tokens_BT.shape[1],))
    else:
        oracle = Oracle(teacher, random_tokens(teacher, _WIDTH), _LENGTHS)
    compiled = dataclasses.replace(teacher.path, compiled=True)
    if teacher.path.attention == "blocks" and teacher.dtype == torch.bfloat16 and fused.available():
        try:
            return _take_compiled(oracle, dataclasses.replace(compiled, attention="fused"))
        except RuntimeError as error:
            logger.info("fused attention does not apply: %s", error)
    return _take_compiled(oracle, compiled)


def _take_compiled(oracle: Oracle, path: ScoringPath) -> float:
    eager = oracle.teacher.path
    oracle.teacher.take(path)
    error = rms(oracle.logprobs() - oracle.plain_RV)
    if not error <= oracle.limit:
        oracle.teacher.take(eager)
        raise RuntimeError(f"compiled layers differ by {error:.2g} nats RMS, the limit is {oracle.limit:.2g}")
    return error


def _probe_oracle(teacher: Teacher, choice: Choice) -> tuple[Oracle, str | None]:
    """Return the oracle for comparing paths, and the windows that its documents do not exceed, if any."""
    for whole in (False, True):
        try:
            probe = make_probe(teacher, whole=whole)
            return _shortened(probe)
        except (*MISFITS, TeacherError) as error:
            logger.info("no float32 copy of %s: %s", "the teacher" if whole else "its first layers", first_line(error))
            reason = first_line(error)
    choice.refusals["float32"] = reason
    return _at_length(teacher, reaches(teacher))


def _shortened(probe: Teacher) -> tuple[Oracle, str | None]:
    """Shorten each window of a probe. A window without effect may be stored elsewhere and is restored."""
    tokens_BT = random_tokens(probe, _WIDTH)
    oracle = Oracle(probe, tokens_BT, _LENGTHS)
    untested = {}
    for name, value in reaches(probe).items():
        set_reach(probe, name, value, SHORT)
        try:
            shorter = Oracle(probe, tokens_BT, _LENGTHS)
            works = rms(shorter.plain_RV - oracle.plain_RV) > oracle.limit
        except (*MISFITS, TeacherError) as error:
            logger.info("%s cannot be shortened to %d: %s", name, SHORT, first_line(error))
            works = False
        if works:
            oracle = shorter
        else:
            set_reach(probe, name, SHORT, value)
            untested[name] = value
    return (oracle, None) if not untested else _at_length(probe, untested)


def _at_length(teacher: Teacher, windows: dict[str, int]) -> tuple[Oracle, str | None]:
    """Return documents that exceed unshortened windows, up to an affordable length."""
    longest = max(windows.values(), default=0)
    width = max(_WIDTH, min(_LONGEST, longest + 3 * SHORT))
    tokens_BT = random_tokens(teacher, width)
    oracle = Oracle(teacher, tokens_BT, (tokens_BT.shape[1] - SHORT, _LENGTHS[-1]))
    # No document exceeds a window as long as the model's positions.
    positions = getattr(teacher.model.config.get_text_config(), "max_position_embeddings", None) or float("inf")
    beyond = [f"{name}={value}" for name, value in windows.items() if oracle.lengths[0] <= value < positions]
    reason = f"documents of {oracle.lengths[0]} tokens do not reach beyond {', '.join(beyond)}"
    return oracle, reason if beyond else None


def _require_causal(probe: Oracle, choice: Choice) -> None:
    choice.errors["padding"] = error = probe.padding_error()
    if not error <= probe.limit:
        raise TeacherError(
            f"teacher: expected a causal model, which right padding cannot change, got an RMS difference of "
            f"{error:.2g} nats (its own rounding: {probe.noise:.2g}); use a decoder-only teacher"
        )


def _choose_head(probe: Oracle, choice: Choice) -> ScoringPath:
    for head in HEADS[:-1]:
        refused: list[tuple[float, str]] = []
        for path in _ways(probe.teacher, head):
            error, reason = _compare_head(probe, path)
            if reason is None:
                choice.errors[head] = error
                return path
            refused.append((error, reason))
        choice.errors[head], choice.refusals[head] = min(refused)
    choice.errors["forward"] = 0.0
    return ScoringPath()


def _ways(teacher: Teacher, head: Head) -> Iterator[ScoringPath]:
    """Yield the paths of one kind, for ``linear`` with every factor and soft cap implied by the configuration."""
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


def _compare(oracle: Oracle, path: ScoringPath) -> tuple[float, str | None]:
    """Return a path's error, infinite if it does not apply, and why it is refused, None if it agrees."""
    try:
        error = oracle.error(path)
    except MISFITS as misfit:
        return float("inf"), first_line(misfit)
    if error <= oracle.limit:
        return error, None
    return error, f"off by {error:.2g} nats, the limit is {oracle.limit:.2g}"


def _compare_head(probe: Oracle, path: ScoringPath) -> tuple[float, str | None]:
    """Compare a head path. Its raw logits must also be those of the model's own code, for large hidden states, too."""
    error, reason = _compare(probe, path)
    if path.head == "replay" or reason is not None:
        return error, reason
    teacher, hidden_RD = probe.teacher, probe.hidden_states()
    epsilons = _RAW_EPSILONS if teacher.dtype == torch.float32 else _RAW_EPSILONS_HALF
    for loudness in _LOUDNESS:
        loud_RD = hidden_RD * loudness
        try:
            with on_path(teacher, ScoringPath(head="replay")):
                wanted_RV = head_logits(teacher, loud_RD).float()
        except MISFITS:
            # The family's code after the trunk cannot run alone. The forward has already been compared.
            break
        with on_path(teacher, path):
            found_RV = head_logits(teacher, loud_RD).float()
        if not rms(found_RV - wanted_RV) <= epsilons * torch.finfo(teacher.dtype).eps * rms(wanted_RV):
            return float("inf"), f"off for hidden states of {loudness:g} times their size"
    return error, None


def fast_attention(teacher: Teacher, *, may_compile: bool) -> Attention | None:
    """Return the attention to try before the model's own, None if there is none for its device."""
    if teacher.device.type == "cpu":
        return "blocks"
    # Other families use fused kernels of torch already.
    is_eager = attention_of(teacher.model.config.get_text_config()) == "eager"
    return "flex" if is_eager and may_compile and len(teacher.devices) == 1 and kernels.available() else None


def _choose_attention(
    probe: Oracle, path: ScoringPath, kind: Attention, untested: str | None, choice: Choice
) -> ScoringPath:
    fast = dataclasses.replace(path, attention=kind)
    choice.errors[kind], reason = _compare(probe, fast)
    if reason is None and untested is None:
        return fast
    choice.refusals[kind] = reason or str(untested)
    return path


def _confirm(own: Oracle, path: ScoringPath, choice: Choice) -> ScoringPath:
    """Compare the chosen path with the forward of the whole teacher in its own dtype. Drop disagreeing parts."""
    for way in (path, dataclasses.replace(path, attention="model"), ScoringPath(head="replay")):
        if way == ScoringPath():
            break
        error, reason = _compare(own, way)
        if reason is None:
            choice.errors["path"] = error
            return way
        given_up = way.head if way.attention == "model" else way.attention
        choice.refusals[given_up] = f"{reason}, for the whole teacher in {own.teacher.dtype}"
    choice.errors["path"] = 0.0
    return ScoringPath()
