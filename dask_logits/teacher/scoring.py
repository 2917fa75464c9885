"""Compute targets from items: batches through the trunk, valid positions through the head in row chunks, then top-k.

The logits of a whole batch never exist. Beside the weights, memory holds one batch within the budget and one row chunk
of ``head_rows`` × V logits in a reused buffer. Results leave the device in their stored dtypes, through a ring.

A batch that does not fit into the device's memory is halved, recursively. The places of the cuts are fixed, so that the
receipt describes the computation exactly.

Dimension letters: B sequences, T tokens, N kept tokens and M of them with targets (of a batch or of the partition),
R positions of a chunk, C ids of a row, D hidden width, V vocabulary, K kept entries, J temperatures, S draws.
"""

from __future__ import annotations

import functools
import gc
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dask_logits.data.items import Item
from dask_logits.errors import CapacityError, TeacherError, first_line, is_poisoned
from dask_logits.records import EVERY_TOKEN, Array, Extras, Records, schema
from dask_logits.run.timings import plural
from dask_logits.teacher.batching import plan_batches
from dask_logits.teacher.draws import count_draws, draw_keys, uniforms
from dask_logits.teacher.memory import is_out_of_memory, must_fit
from dask_logits.teacher.meter import Stopwatch
from dask_logits.teacher.model import ScoringPath, Teacher
from dask_logits.teacher.positions import Positions, highest_entropy, scored_positions
from dask_logits.teacher.stages import Ahead
from dask_logits.teacher.topk import TopK, compiled_if, padded_width, topk_with_tail
from dask_logits.teacher.torch_internals import with_complete_code
from dask_logits.teacher.transfer import OutputRing, to_device

# Code is compiled for sequences of at least two tokens.
_SHORTEST = 2
_ENTROPY = "entropy"
# Rows whose candidates' weights exist at one time if refinement is not compiled.
_REFINED_ROWS = 32


@dataclass(frozen=True, kw_only=True)
class ScoringSettings:
    """Resolved numerics of a run. Equal settings on equal hardware give equal bytes.

    Parameters
    ----------
    top_k
        K. For draws, the most distinct ids that there can be.
    vocab_size
        Valid vocabulary.
    batch_tokens, batch_size
        Limits of a batch.
    head_rows
        Positions whose logits exist at one time.
    path
        Scoring path from tokens to logits.
    temperatures
        Temperatures other than 1 whose tail is stored, ascending.
    positions
        Positions with targets: ``all``, ``labels`` (those that a student learns), or ``entropy``.
    position_share
        With ``entropy``: share of the positions of each item to keep, those of the highest entropy.
    draws
        Number of draws of each position. 0: the targets are the most probable tokens.
    seed
        Seed of the draws.
    """

    top_k: int
    vocab_size: int
    batch_tokens: int
    batch_size: int | None
    head_rows: int
    path: ScoringPath
    temperatures: tuple[float, ...] = ()
    positions: Positions = "all"
    position_share: float = 1.0
    draws: int = 0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Targets, with timings and memory splits.

    Parameters
    ----------
    records
        The targets.
    entropy_M
        [M] float32, entropies in nats of their distributions if `positions` is ``entropy``. None otherwise.
    seconds
        Stage → seconds: ``trunk``, ``head``, ``tail`` (logsumexp, top-k), ``refine`` (kept logits in float32),
        ``transfer``, and ``score`` for the total.
    splits
        Batch → numbers of items in its parts, if it was split because it did not fit into memory.
    padded_tokens
        Tokens computed, padding included.
    encoded
        The targets' arrays that ``encode`` of :func:`start_scoring` has added, in the order of the records.
    """

    records: Records
    entropy_M: Array | None = None
    seconds: dict[str, float]
    splits: dict[int, list[int]]
    padded_tokens: int
    encoded: dict[str, Array] = field(default_factory=dict)


def score_items(
    teacher: Teacher,
    items: Sequence[Item],
    settings: ScoringSettings,
    *,
    packed: bool = False,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> Scored:
    """Score the items of a partition.

    Parameters
    ----------
    teacher, items, settings, packed, on_tokens
        As for :func:`start_scoring`.

    Raises
    ------
    TeacherError, CapacityError
        As by :func:`start_scoring`, and by the function that it returns.
    """
    return start_scoring(teacher, items, settings, packed=packed, on_tokens=on_tokens)()


@torch.inference_mode()
def start_scoring(
    teacher: Teacher,
    items: Sequence[Item],
    settings: ScoringSettings,
    *,
    packed: bool = False,
    on_tokens: Callable[[int], None] = lambda tokens: None,
    encode: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> Callable[[], Scored]:
    """Give all batches of a partition to the device. The last results may not have arrived yet.

    A pipeline has begun all batches then, and the last ones have yet to go through the head. So it stays full when the
    next partition is given to it.

    Parameters
    ----------
    teacher
        A loaded teacher. It is switched to the settings' path.
    items
        Items in dataset order. Empty ones are kept as documents without tokens.
    settings
        The run's numerics.
    packed
        Whether items are packed blocks, whose lengths are recorded.
    on_tokens
        Called after each batch with the tokens kept since the last call.
    encode
        Called with the targets of each chunk on the device. What it returns replaces some of them, or is added.

    Returns
    -------
    Callable
        Waits for the last results and returns the targets. It may be called once, in any thread, while the teacher
        already scores the next partition. It raises TeacherError, with the row, if logits hold NaN or +inf.

    Raises
    ------
    TeacherError
        If the path cannot be compiled on this machine.
    CapacityError
        If a single item does not fit into memory.
    """
    try:
        with must_fit("teacher", "stop other processes on this device, or use one with more memory"):
            teacher.take(settings.path)
    except RuntimeError as error:
        if isinstance(error, TeacherError) or is_poisoned(error):
            raise
        raise TeacherError(
            "teacher: expected a C++ compiler on this worker, as on the one where the run was calibrated, got "
            f"{first_line(error)}; install it on every worker, or set distillation.scoring.compile=never"
        ) from error
    # Switching to compiled layers runs them a few times, which is no part of a partition's work.
    started = time.perf_counter()
    run = _Run(teacher, items, settings, on_tokens, encode)
    with teacher.strict():
        run.score()
    return functools.partial(run.finish, packed=packed, started=started)


@dataclass
class _Run:
    """State of one partition in progress: batches to come, target places, reused chunk buffers, memory splits."""

    teacher: Teacher
    items: Sequence[Item]
    settings: ScoringSettings
    on_tokens: Callable[[int], None]
    encode: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    padded_tokens: int = 0
    # What `encode` adds.
    encoded: dict[str, Array] = field(default_factory=dict)
    # Batch → numbers of items in its parts so far.
    _parts: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    # Hidden states from a pipeline, if the teacher has one.
    _ahead: Ahead[tuple[int, ...]] | None = None

    def __post_init__(self) -> None:
        settings, device = self.settings, self.teacher.device
        self.lengths = np.array([len(item.tokens) for item in self.items], dtype=np.int64)
        batches = plan_batches(
            self.lengths.tolist(), batch_tokens=settings.batch_tokens, batch_size=settings.batch_size
        )
        # Batches, or parts of them, that are still to be scored.
        self.waiting = deque(batches)
        self._number_of = {item: number for number, batch in enumerate(batches) for item in batch}
        self.contexts = np.array([item.context for item in self.items], dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths - self.contexts)])
        masks = [item.loss_mask for item in self.items if item.loss_mask is not None]
        has_target_pos = settings.positions != "all"
        extras = Extras(
            draws=settings.draws,
            temperatures=settings.temperatures,
            is_masked=bool(masks),
            has_target_pos=has_target_pos,
        )
        entries = schema(settings.top_k, settings.vocab_size, extras)
        n_tokens = int(self.starts[-1])
        self.scored_M = scored_positions(self.items, settings.positions)
        # Place on the target axis of each token, −1 if it does not go through the head.
        self._target_N = np.full(n_tokens, -1, np.int64)
        self._target_N[self.scored_M] = np.arange(len(self.scored_M))
        self.out = {
            name: np.empty(
                (n_tokens if name in EVERY_TOKEN else len(self.scored_M), *entries[name][1]), entries[name][0]
            )
            for name in extras.token_arrays
        }
        if masks:
            self.out["loss_mask"] = np.concatenate(masks).astype(np.uint8)
        if has_target_pos:
            self.out["target_pos"] = self.scored_M.astype(np.uint64)
        if settings.positions == "entropy":
            self.out[_ENTROPY] = np.empty(len(self.scored_M), np.float32)
        spans = [(span.row, span.offset, span.length) for item in self.items for span in item.spans]
        # Row, offset and length of each document, or part of one.
        self.documents = np.array(spans, np.int64).reshape(-1, 3).T
        self._keys_M = _draw_keys(settings.seed, *self.documents)[self.scored_M] if settings.draws else None
        self.watch = Stopwatch(device)
        self.ring = OutputRing(device)
        width = padded_width(settings.vocab_size)
        dtype = self.teacher.logits_dtype
        n_bytes = settings.head_rows * width * dtype.itemsize
        with must_fit(
            f"distillation.teacher.generation.head_rows={settings.head_rows}",
            f"the logits of a chunk take {n_bytes / 2**30:.2f} GiB: lower it, or free memory of the device",
        ):
            self.logits_RV = torch.full((settings.head_rows, width), -torch.inf, dtype=dtype, device=device)
        pipeline = None if settings.path.head == "forward" else self.teacher.pipeline
        if pipeline is not None:
            self._ahead = Ahead(pipeline, lambda part: to_device(self._padded(part)[0], pipeline.input_device))

    def score(self, *, rest: bool = False) -> None:
        """Score batches until the device has begun all of them, or the rest, whose results a pipeline still owes."""
        try:
            while self.waiting and (rest or self._ahead is None or self._ahead.n_begun < len(self.waiting)):
                self.on_tokens(self.score_next())
        except BaseException:
            if self._ahead is not None:
                self._ahead.keep(())
            raise

    def _states(self, tokens_BT: Array) -> Tensor:
        """Return the hidden states of the next batch, or its logits if the model's own forward computes them."""
        if self._ahead is not None:
            return self._ahead.take(self.waiting)
        input_ids_BT = to_device(tokens_BT, self.teacher.device)
        is_whole = self.settings.path.head == "forward"
        return self.teacher.logits_forward(input_ids_BT) if is_whole else self.teacher.hidden_states(input_ids_BT)

    def score_next(self) -> int:
        """Score the next batch or part. Return the tokens kept, or 0 if it was halved because memory was short.

        Raises
        ------
        CapacityError
            If a single item does not fit into memory.
        """
        part = self.waiting[0]
        try:
            n_tokens = with_complete_code(functools.partial(self._score, part))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            self.waiting.popleft()
            self._parts[self._number_of[part[0]]].append(len(part))
            if not self.waiting:
                # The next partition takes the same memory. On CUDA it is used in the order of the stream.
                del self.logits_RV
            return n_tokens
        if len(part) == 1:
            item = self.items[part[0]]
            raise CapacityError(
                f"dataset row {item.spans[0].row}: expected {plural(len(item.tokens), 'token')} to fit into the memory "
                f"of the {self.teacher.device.type} device, got out of memory; lower distillation.dataset.max_length "
                "or distillation.teacher.generation.head_rows, or use a smaller teacher or dtype",
                row=item.spans[0].row,
            )
        self._halve(self._padded_size(part))
        gc.collect()
        if self.teacher.device.type == "cuda":
            torch.cuda.empty_cache()
        return 0

    def _halve(self, too_large: int) -> None:
        """Halve all that is still to be scored until it has fewer padded tokens than what did not fit."""
        unseen, self.waiting = self.waiting, deque()
        while unseen:
            part = unseen.popleft()
            if len(part) == 1 or self._padded_size(part) < too_large:
                self.waiting.append(part)
            else:
                half = -(-len(part) // 2)
                unseen.extendleft([part[half:], part[:half]])
        if self._ahead is not None:
            self._ahead.keep(self.waiting)

    def finish(self, *, packed: bool, started: float) -> Scored:
        """Wait for the last results and return the targets, as :func:`start_scoring` describes."""
        if self.waiting:
            if self.teacher.device.type == "cuda":
                # A per-thread setting.
                torch.cuda.set_device(self.teacher.device)
            with torch.inference_mode():
                self.score(rest=True)
        self.ring.drain()
        rows, offsets, lengths = self.documents
        bad = ~np.isfinite(self.out["logsumexp"])
        if bad.any():
            row = int(np.repeat(rows, lengths)[self.scored_M[bad][0]])
            raise TeacherError(
                f"dataset row {row}: expected finite logits, got NaN or infinity from the teacher; "
                "run it in float32 (distillation.teacher.dtype=float32) or remove the row",
                row=row,
            )
        entropy_M = self.out.pop(_ENTROPY, None)
        records = Records(
            **self.out,
            document_row=rows.astype(np.uint64),
            document_offset=offsets.astype(np.uint32),
            document_length=lengths.astype(np.uint32),
            block_length=self.lengths[self.lengths > 0].astype(np.uint32) if packed else None,
        )
        if entropy_M is not None:
            chosen_M = highest_entropy(self.items, self.scored_M, entropy_M, self.settings.position_share)
            targets_M = records.targets_of(chosen_M)
            entropy_M = entropy_M[targets_M]
            self.encoded = {name: array[targets_M] for name, array in self.encoded.items()}
            records = records.at(chosen_M)
        return Scored(
            records=records,
            entropy_M=entropy_M,
            seconds=self.watch.seconds() | {"score": round(time.perf_counter() - started, 4)},
            splits={number: sizes for number, sizes in self._parts.items() if len(sizes) > 1},
            padded_tokens=self.padded_tokens,
            encoded=self.encoded,
        )

    def _score(self, part: tuple[int, ...]) -> int:
        device = self.teacher.device
        tokens_BT, labels_BT = self._padded(part)
        chosen = list(part)
        place_T = np.arange(tokens_BT.shape[1])
        kept_BT = (place_T < self.lengths[chosen][:, None]) & (place_T >= self.contexts[chosen][:, None])
        where_N = np.concatenate([np.arange(self.starts[i], self.starts[i + 1]) for i in part])
        target_N = self._target_N[where_N]
        where_M = target_N[target_N >= 0]
        valid_M = to_device(np.flatnonzero(kept_BT)[target_N >= 0], device)
        labels_M = to_device(labels_BT[kept_BT][target_N >= 0], device)
        with self.watch.span("trunk"):
            rows_M = self._states(tokens_BT).flatten(0, 1)
        for first in range(0, len(where_M), self.settings.head_rows):
            chunk = slice(first, first + self.settings.head_rows)
            keys_R = None if self._keys_M is None else to_device(self._keys_M[where_M[chunk]], device)
            targets = self._targets(rows_M.index_select(0, valid_M[chunk]), labels_M[chunk], keys_R)
            with self.watch.span("transfer"):
                self.ring.put(targets, functools.partial(self._deliver, where_M[chunk]))
        self.out["input_ids"][where_N] = tokens_BT[kept_BT]
        self.padded_tokens += tokens_BT.size
        return len(where_N)

    def _targets(self, rows_R: Tensor, labels_R: Tensor, keys_R: Tensor | None) -> dict[str, Tensor]:
        """Return the targets of a chunk in their stored dtypes. Columns beyond the vocabulary remain −inf.

        Targets with keys are draws.
        """
        teacher, path = self.teacher, self.settings.path
        logits_RV = self.logits_RV[: len(rows_R)]
        valid_RV = logits_RV[:, : self.settings.vocab_size]
        with self.watch.span("head"):
            if path.head == "forward":
                valid_RV.copy_(rows_R)
            else:
                teacher.logits(rows_R, valid_RV)
        with self.watch.span("tail"):
            top = topk_with_tail(
                logits_RV,
                self.settings.top_k,
                labels_R=labels_R,
                vocab_size=self.settings.vocab_size,
                path=path,
                refine=functools.partial(self._refined, rows_R) if teacher.refines else None,
                temperatures=self.settings.temperatures,
                has_entropy=self.settings.positions == "entropy",
                uniform_RS=None if keys_R is None else uniforms(keys_R, self.settings.draws),
            )
            label_logprobs_R = torch.where(labels_R >= 0, top.label_logits_R - top.logsumexp_R, torch.nan)
            targets = {
                **self._entries(top),
                "logsumexp": top.logsumexp_R,
                "label_logprob": label_logprobs_R,
                **({"tail_logmass_T": top.tail_logmass_RJ} if self.settings.temperatures else {}),
                **({} if top.entropy_R is None else {_ENTROPY: top.entropy_R}),
            }
            return targets if self.encode is None else targets | self.encode(targets)

    def _entries(self, top: TopK) -> dict[str, Tensor]:
        """Return the kept entries of a chunk: the most probable tokens and their tail, or the draws."""
        if top.drawn_RS is not None:
            ids_RK, counts_RK = count_draws(top.drawn_RS, self.settings.top_k)
            return {"topk_ids": ids_RK.int(), "topk_counts": counts_RK}
        return {
            "topk_ids": top.ids_RK.int(),
            "topk_logprobs": (top.logits_RK - top.logsumexp_R[:, None]).half(),
            "tail_logmass": top.tail_logmass_R,
        }

    def _refined(self, rows_R: Tensor, ids_RC: Tensor) -> Tensor:
        with self.watch.span("refine"):
            return refined_logits(self.teacher, rows_R, ids_RC)

    def _deliver(self, where_M: Array, results: dict[str, Array]) -> None:
        for name, values in results.items():
            if name not in self.out and name not in self.encoded:
                self.encoded[name] = np.empty((len(self.scored_M), *values.shape[1:]), values.dtype)
            (self.out if name in self.out else self.encoded)[name][where_M] = values

    def _padded(self, part: tuple[int, ...]) -> tuple[Array, Array]:
        """Return the part's tokens, right-padded with id 0, and each position's next token (−1 if there is none)."""
        width = max(_SHORTEST, int(self.lengths[part[0]]))
        tokens_BT = np.zeros((len(part), width), np.int64)
        labels_BT = np.full((len(part), width), -1, np.int64)
        for b, item in enumerate(self.items[i] for i in part):
            length = len(item.tokens)
            tokens_BT[b, :length] = item.tokens
            labels_BT[b, : length - 1] = item.tokens[1:]
            labels_BT[b, length - 1] = item.next_token
        return tokens_BT, labels_BT

    def _padded_size(self, part: tuple[int, ...]) -> int:
        return len(part) * int(self.lengths[part[0]])


def _draw_keys(seed: int, rows: Array, offsets: Array, lengths: Array) -> Array:
    """Return the key of each kept token's draws: [N] int64."""
    before = np.cumsum(lengths) - lengths
    positions_N = np.arange(lengths.sum()) + np.repeat(offsets - before, lengths)
    return draw_keys(seed, np.repeat(rows, lengths), positions_N)


def refined_logits(teacher: Teacher, hidden_RD: Tensor, ids_RC: Tensor) -> Tensor:
    """Compute some logits of each row in float32 from the rounded hidden states and weights.

    Parameters
    ----------
    teacher
        The teacher, on a ``linear`` path.
    hidden_RD
        Hidden states.
    ids_RC
        int64, columns of the logits.

    Returns
    -------
    Tensor
        float32 [R, C].
    """
    weight_VD, bias_V = teacher.head.weight, getattr(teacher.head, "bias", None)
    if teacher.path.compiled:
        raw_RC = compiled_if(True, _products)(hidden_RD, weight_VD, ids_RC)
    else:
        parts = [slice(first, first + _REFINED_ROWS) for first in range(0, len(hidden_RD), _REFINED_ROWS)]
        raw_RC = torch.cat([_products(hidden_RD[part], weight_VD, ids_RC[part]) for part in parts])
    if bias_V is not None:
        raw_RC += bias_V[ids_RC].float()
    return teacher.path.finish(raw_RC)


def _products(hidden_RD: Tensor, weight_VD: Tensor, ids_RC: Tensor) -> Tensor:
    return (weight_VD[ids_RC].float() * hidden_RD[:, None].float()).sum(-1)
