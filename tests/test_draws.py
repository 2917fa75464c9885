"""Targets that are draws from the teacher's distribution, from the records to the loss."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from builders import (
    compact,
    content,
    digest,
    drawn_records,
    extras_of,
    packed_records,
    plain,
    records,
    run,
    write_cache,
    write_json_lines,
)
from hypothesis import given
from hypothesis import strategies as st

from dask_logits import (
    CachedLogitsDataset,
    CacheError,
    ConfigError,
    DatasetError,
    EnsembleDataset,
    Head,
    MixedDataset,
    Objective,
    RunConflictError,
    SparseTargets,
    collate,
    collate_flat,
    convert,
    distillation_loss,
    fused_distillation_loss,
    generate,
    load_config,
    merge,
    read_status,
    verify,
)
from dask_logits.cache.packed import pack, unpack
from dask_logits.cache.partition import PartitionReader, write_partition
from dask_logits.cache.pieces import cache_pieces, consolidate
from dask_logits.cache.profile import as_kept
from dask_logits.cache.reader import CacheReader
from dask_logits.config.root import Config
from dask_logits.job.measured_plan import measure_plan, measured_figures, measured_lines
from dask_logits.job.prepare import prepare
from dask_logits.job.recompute import _Document, _Fit, _Moved
from dask_logits.observe.explore import Explorer
from dask_logits.ops.show import card
from dask_logits.records import Extras, Records, Statistics, label_doubts

LENGTHS = (4, 0, 2, 7, 1, 3)
DRAWS = 7

_dense = records(LENGTHS, masked=True)
every = drawn_records(dataclasses.replace(_dense, loss_mask=_dense.loss_mask * ~np.isnan(_dense.label_logprob)))
some = every.at(np.array([1, 3, 5, 6, 8, 9, 12, 13]))
MADE = {"all": every, "some": some}
both = pytest.mark.parametrize("made", MADE.values(), ids=MADE)
profiles = pytest.mark.parametrize("kind", [plain, compact])


def same(found: dict[str, np.ndarray], wanted: Records) -> None:
    """Compare token arrays byte by byte."""
    assert found.keys() == wanted.tokens().keys()
    for name, array in wanted.tokens().items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def planes(counts: list[list[int]]) -> dict[str, np.ndarray]:
    counts_NK = np.array(counts, np.uint8)
    return {"topk_counts": counts_NK, "other": np.where(counts_NK > 0, counts_NK + 100, 0).astype(np.uint8)}


def test_packed_chunks_hold_one_position_after_the_other() -> None:
    found = pack(planes([[3, 1, 0], [4, 0, 0], [2, 1, 1], [4, 0, 0], [1, 3, 0]]), 3)
    assert found["topk_counts"].tolist() == [[3, 1, 4], [2, 1, 1], [0, 0, 0], [4, 1, 3], [0, 0, 0]]
    assert found["other"].tolist() == [[103, 101, 104], [102, 101, 101], [0, 0, 0], [104, 101, 103], [0, 0, 0]]


# Processors that others use take arbitrary time.
@given(st.lists(st.integers(1, 6), max_size=40), st.integers(1, 9), st.integers(0, 2**32))
def test_unpacking_inverts_packing(widths, chunk, seed) -> None:
    draw = np.random.default_rng(seed)
    counts = np.zeros((len(widths), 6), np.uint8)
    for row, width in enumerate(widths):
        counts[row, :width] = 1
        counts[row] += np.bincount(draw.integers(width, size=9 - width), minlength=6).astype(np.uint8)
    made = planes(counts.tolist()) if widths else planes(np.zeros((0, 6)))
    found = unpack(pack(made, chunk), chunk, 9)
    for name in made:
        np.testing.assert_array_equal(found[name], made[name])


@pytest.mark.parametrize(
    "counts", [[[1, 2, 2], [1, 3, 0]], [[5, 4, 0], [0, 0, 0]], [[4, 0, 4], [0, 0, 0]], [[4, 4, 4], [0, 0, 0]],
               [[1, 1, 1], [1, 0, 0]]]
)  # fmt: skip
def test_counts_that_are_not_those_of_positions_are_refused(counts) -> None:
    with pytest.raises(ValueError, match="counts that do not sum to 4 at each position"):
        unpack(planes(counts), 2, 4)


def test_records_have_either_log_probs_or_counts() -> None:
    assert Statistics.of(every).mean_distinct == pytest.approx(np.count_nonzero(every.topk_counts, axis=1).mean())
    assert Statistics.of(every).kept_mass == 0
    assert Statistics.of(records(LENGTHS)).distinct == 0
    np.testing.assert_allclose(np.exp(every.logprobs), every.topk_counts / DRAWS, rtol=1e-6)
    with pytest.raises(ValueError, match=r"expected either topk_logprobs and tail_logmass or topk_counts, got \('top"):
        dataclasses.replace(every, topk_logprobs=every.logprobs)
    with pytest.raises(ValueError, match=r"got \(\)"):
        dataclasses.replace(every, topk_counts=None)
    with pytest.raises(ValueError, match=r"topk_counts: expected \(17, 7\), got \(17, 6\)"):
        dataclasses.replace(every, topk_counts=every.topk_counts[:, 1:])
    other = every.topk_counts.copy()
    other[0, 0] -= 1
    assert content(dataclasses.replace(every, topk_counts=other)) != content(every)


@both
@profiles
def test_a_cache_keeps_draws(tmp_path, kind, made) -> None:
    profile, path = kind(DRAWS, extras=extras_of(made)), tmp_path / "teacher_logits.h5"
    write_cache(path, made, profile=profile)
    reader = CacheReader(path)
    kept = as_kept(made, profile)
    np.testing.assert_array_equal(kept.topk_ids, made.topk_ids)
    np.testing.assert_array_equal(kept.topk_counts, made.topk_counts)
    same(reader.tokens(0, made.n_tokens), kept)
    # Any range of positions, also from the middle of a chunk.
    for start, stop in ((1, 2), (3, 9), (5, 5), (16, 17)):
        first, last = kept.targets_of(np.array([start, stop]))
        np.testing.assert_array_equal(reader.tokens(start, stop)["topk_ids"], kept.topk_ids[first:last])
    assert content(*reader.runs((0, 6), (0, 0))) == reader.header.content_digest
    with h5py.File(path) as file:
        assert file["topk_counts"].attrs["critical"]
        assert file.attrs["draws"] == DRAWS
        assert file.attrs["order"] == b"count descending, ties by lower id"


@both
@profiles
def test_partitions_and_caches_of_several_pieces_keep_draws(tmp_path, kind, made) -> None:
    profile = kind(DRAWS, extras=extras_of(made))
    parts = [dataclasses.replace(made, document_row=made.document_row + np.uint64(6 * i)) for i in range(3)]
    for i, part in enumerate(parts):
        write_partition(tmp_path / f"{i}.zarr", part, profile)
        same(PartitionReader(tmp_path / f"{i}.zarr", profile).records().tokens(), as_kept(part, profile))
        write_cache(tmp_path / f"{i}.h5", part, profile=profile)
    pieces = [piece for i in range(3) for piece in cache_pieces(CacheReader(tmp_path / f"{i}.h5"))]
    for to in (plain(DRAWS, extras=extras_of(made)), compact(DRAWS, seed=4, chunk_tokens=8, extras=extras_of(made))):
        target = tmp_path / f"{to.name}.h5"
        found = consolidate(target, lambda: pieces, profile=to, packed=False, attributes={}, n_rows=18)
        assert found == content(*(as_kept(as_kept(part, profile), to) for part in parts))
        assert content(*(each for piece in cache_pieces(CacheReader(target)) for each in piece.runs())) == found


@profiles
def test_packed_blocks_keep_draws(tmp_path, kind) -> None:
    made = drawn_records(packed_records())
    write_cache(tmp_path / "cache.h5", made, profile=kind(DRAWS, extras=Extras(draws=DRAWS)))
    reader = CacheReader(tmp_path / "cache.h5")
    np.testing.assert_array_equal(reader.item(1)["topk_counts"], made.topk_counts[6:12])
    assert content(*reader.runs((0, 5), (0, 3))) == reader.header.content_digest


@pytest.mark.parametrize(("value", "got"), [(None, "none"), (6, "6"), (256, "256")])
def test_a_header_with_other_draws_is_refused(tmp_path, value, got) -> None:
    path = tmp_path / "teacher_logits.h5"
    write_cache(path, every)
    with h5py.File(path, "r+") as file:
        del file.attrs["draws"]
        if value is not None:
            file.attrs["draws"] = value
    with pytest.raises(CacheError, match=f"draws.*got {got}"):
        CacheReader(path)


def test_verify_finds_wrong_draws(tmp_path) -> None:
    def found(**changes: np.ndarray) -> list[str]:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.h5"
        write_cache(path, dataclasses.replace(every, **changes), profile=plain(DRAWS, extras=extras_of(every)))
        return [check.name for check in verify(path).checks if check.n_problems]

    def changed(name: str, row: int, values: list[int]) -> np.ndarray:
        array = getattr(every, name).copy()
        array[row, : len(values)] = values
        return array

    row = int(np.flatnonzero(np.count_nonzero(every.topk_counts, axis=1) > 2)[0])
    ids, counts = (getattr(every, name)[row] for name in ("topk_ids", "topk_counts"))
    sound = found()
    assert sound in ([], ["labels drawn as often as they are probable"])
    valid, counted = "token ids valid, kept ids distinct", "draws counted, most frequent first"
    assert set(found(topk_ids=changed("topk_ids", row, [ids[1]]))) - set(sound) == {valid}
    assert set(found(topk_ids=changed("topk_ids", row, [50]))) - set(sound) == {valid}
    assert set(found(topk_counts=changed("topk_counts", row, [counts[0] + 1]))) - set(sound) == {counted}
    assert set(found(topk_counts=changed("topk_counts", row, [1, counts[0] + counts[1] - 1]))) - set(sound) == (
        {counted} if counts[0] + counts[1] > 2 else set()
    )


def test_next_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    draw = np.random.default_rng(0)
    p = draw.random(400) ** 3
    for _ in range(200):
        assert label_doubts(draw.binomial(50, p) / 50, np.log(p), 50) is None
    shifted = draw.binomial(50, np.roll(p, 1)) / 50
    # The sum does not depend on the order, so that of other tokens is found, not that of others of equal probability.
    assert label_doubts(shifted, np.log(p), 50) is None
    assert label_doubts(np.zeros(400), np.log(p), 50) == (pytest.approx(p.sum()), 0.0)
    assert label_doubts(draw.binomial(50, 0.99 * p) / 50, np.log(p), 50) is None
    assert label_doubts(draw.binomial(50, 0.5 * p) / 50, np.log(p), 50) is not None


# The teacher's log-probs [N, V] and the student's logits of the losses.
N, V = 12, 40


def targets_of(counts_NV: torch.Tensor, draws: int, **options: object) -> SparseTargets:
    """Return draws as targets, with absent entries behind them."""
    n = len(counts_NV)
    counts_NK, ids_NK = counts_NV.sort(1, descending=True)
    nothing = torch.zeros(n)
    values = {
        "input_ids": torch.zeros(n, dtype=torch.int64),
        "topk_ids": torch.where(counts_NK > 0, ids_NK, 0),
        "topk_logprobs": (counts_NK / draws).float().log(),
        "tail_logmass": nothing - torch.inf,
        "logsumexp": nothing,
        "label_ids": torch.arange(n) % V,
        "label_logprob": nothing - 1,
        "mask": torch.ones(n, dtype=torch.bool),
        "vocab_size": V,
        "draws": draws,
    }
    return SparseTargets(**{**values, **options})


def some_draws(draws: int, seed: int, n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a teacher's distributions and counts of draws from them: [N, V] float64 each."""
    generator = torch.Generator().manual_seed(7)
    p_NV = (2 * torch.randn(n, V, generator=generator, dtype=torch.float64)).softmax(-1)
    counts = np.random.default_rng(seed).multinomial(draws, (p_NV / p_NV.sum(1, keepdim=True)).numpy())
    return p_NV, torch.from_numpy(counts).double()


@pytest.mark.parametrize("draws", [1, 50, 255])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_losses_of_draws_are_the_dense_cross_entropy(draws: int, alpha: float) -> None:
    _, counts_NV = some_draws(draws, seed=draws)
    targets = targets_of(counts_NV, draws)
    torch.manual_seed(0)
    hidden = torch.randn(N, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, 6, dtype=torch.float64, requires_grad=True)
    log_q = (hidden @ weight.T).log_softmax(-1)
    divergence = -(counts_NV / draws * log_q).sum() / N
    cross_entropy = -log_q[torch.arange(N), targets.label_ids].sum() / N
    wanted = alpha * divergence + (1 - alpha) * cross_entropy
    gradients = torch.autograd.grad(wanted, (hidden, weight))
    for tail in ("auto", "sampled"):
        objective = Objective(tail=tail, alpha=alpha)
        for found in (
            distillation_loss(hidden @ weight.T, targets, objective, chunk_rows=5),
            fused_distillation_loss(hidden, Head(weight=weight), targets, objective),
        ):
            torch.testing.assert_close(found.loss, wanted, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found.divergence, divergence, rtol=1e-12, atol=1e-12)
            for gradient, expected in zip(torch.autograd.grad(found.loss, (hidden, weight)), gradients, strict=True):
                torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    per_token = distillation_loss((hidden @ weight.T).detach(), targets, objective, per_token=True)
    torch.testing.assert_close(per_token.divergence, -(counts_NV / draws * log_q.detach()).sum(1), rtol=1e-12, atol=0)


def test_the_mean_over_draws_is_the_loss_of_the_whole_distribution() -> None:
    draws, seeds = 12, 400
    p_NV, _ = some_draws(draws, 0)
    torch.manual_seed(1)
    logits = torch.randn(N, V, dtype=torch.float64, requires_grad=True)
    log_q = logits.detach().log_softmax(-1)
    wanted, wanted_gradient = -(p_NV * log_q).sum() / N, (log_q.exp() - p_NV) / N
    losses, gradients = [], []
    for seed in range(seeds):
        loss = distillation_loss(logits, targets_of(some_draws(draws, seed)[1], draws)).loss
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, logits)[0])
    # Var(−Σ (c/n) log q) = Var_p(log q) / n, and that of a share is p (1 − p) / n.
    mean_N1 = (p_NV * log_q).sum(1, keepdim=True)
    deviation = ((p_NV * (log_q - mean_N1) ** 2).sum() / draws / seeds).sqrt() / N
    assert abs(np.mean(losses) - wanted) < 5 * deviation
    assert deviation < 0.01
    off = torch.stack(gradients).mean(0) - wanted_gradient
    bounds = (p_NV * (1 - p_NV) / draws / seeds).sqrt() / N
    assert bool((off.abs() <= 6 * bounds + 1 / N / draws / seeds).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tail": "ghost"}, "tail: expected 'auto' or 'sampled' for draws, which have no tail, got 'ghost'"),
        ({"tail": "residual"}, "tail: expected 'auto' or 'sampled' for draws"),
        ({"divergence": "reverse_kl"}, "divergence: expected 'forward_kl' for draws, got 'reverse_kl', which needs"),
        ({"divergence": "jsd"}, "divergence: expected 'forward_kl' for draws"),
        ({"divergence": "total_variation"}, "divergence: expected 'forward_kl' for draws"),
        ({"temperature": 2.0}, "temperature: expected 1 for draws, got 2: they were drawn at temperature 1"),
    ],
)
def test_other_objectives_are_refused_for_draws(options, message) -> None:
    targets = targets_of(some_draws(50, 0)[1], 50)
    with pytest.raises(ConfigError, match=message):
        distillation_loss(torch.zeros(N, V), targets, Objective(**options))
    with pytest.raises(ConfigError, match=message):
        fused_distillation_loss(torch.zeros(N, 2), Head(weight=torch.zeros(V, 2)), targets, Objective(**options))
    if "tail" not in options:
        with pytest.raises(ConfigError, match=message):
            Objective(tail="sampled", **options)


def test_draws_of_tokens_that_the_student_lacks_are_left_out() -> None:
    _, counts_NV = some_draws(50, 3)
    logits = torch.randn(N, 30, dtype=torch.float64, requires_grad=True)
    with pytest.warns(UserWarning, match="draws of them are left out"):
        found = distillation_loss(logits, targets_of(counts_NV, 50)).loss
    wanted = -(counts_NV[:, :30] / 50 * logits.log_softmax(-1)).sum() / N
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (found, wanted)))


# Dynamo of torch 2.13 hides this warning of its own, but not where warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_losses_of_draws_work_inside_compiled_code() -> None:
    targets = targets_of(some_draws(50, 0)[1], 50)
    torch.manual_seed(0)
    head, hidden = Head(weight=torch.randn(V, 8)), torch.randn(N, 8, requires_grad=True)

    def step(hidden: torch.Tensor) -> torch.Tensor:
        loss = distillation_loss(hidden @ head.weight.T, targets).loss
        return loss + fused_distillation_loss(hidden, head, targets).loss

    torch._dynamo.reset()
    losses = [step(hidden), torch.compile(step, backend="eager")(hidden)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, hidden)[0] for loss in losses))


def test_sampled_is_refused_for_the_most_probable_tokens() -> None:
    targets = dataclasses.replace(targets_of(some_draws(50, 0)[1], 50), draws=0)
    with pytest.raises(ConfigError, match=r"got 'sampled'; make a cache with .*targets=sample"):
        distillation_loss(torch.zeros(N, V), targets, Objective(tail="sampled"))


def test_shifted_draws_are_refused() -> None:
    p_NV, counts_NV = some_draws(50, 5, n=300)
    label_ids = p_NV.argmax(1)
    options = {"label_ids": label_ids, "label_logprob": p_NV[torch.arange(300), label_ids].log().float()}
    sound = targets_of(counts_NV, 50, **options)
    sound.check_alignment(sound.input_ids)
    shifted = targets_of(counts_NV.roll(1, 0), 50, **options)
    with pytest.raises(DatasetError, match=r"at 300 positions the shares of the draws that are the next token should"):
        shifted.check_alignment(shifted.input_ids)


def test_copies_of_a_document_count_once() -> None:
    # By chance, the draws of this document have the next token more often than its probability says.
    counts_NV = torch.zeros(4, V, dtype=torch.float64)
    counts_NV[:, 3], counts_NV[:, 5] = 32, 18
    label = {"label_ids": torch.full((4,), 3), "label_logprob": torch.full((4,), 0.5).log()}
    one = targets_of(counts_NV, 50, **label)
    copies = one._changed(lambda tensor: tensor.expand(64, *tensor.shape))
    copies.check_alignment(copies.input_ids)
    others = dataclasses.replace(copies, input_ids=torch.arange(256).view(64, 4))
    with pytest.raises(DatasetError, match=r"at 256 positions .* should sum to 128.0 .* but sum to 163.8"):
        others.check_alignment(others.input_ids)


WAYS = {
    "documents": [],
    "windows": ["distillation.dataset.long_documents=window", "distillation.dataset.window_stride=5"],
    "packed": ["distillation.dataset.packing=concat", "distillation.dataset.separator_id=0"],
}
GENERATION = "distillation.teacher.generation"
PLAIN, COMPACT = ("distillation.cache.profile=plain", "distillation.cache.profile=compact")
LABELS = f"{GENERATION}.positions=labels"


@pytest.fixture(scope="module")
def job(llama, tmp_path_factory):
    """Return a function that runs a job that samples, once for the same overrides."""
    folder = tmp_path_factory.mktemp("jobs")
    draw = np.random.default_rng(3)
    rows = []
    for length in (9, 1, 30, 5, 17, 0, 12, 2, 25, 8, 3):
        ids = draw.integers(1, 100, size=length)
        learned = draw.random(length) < (0.0 if length == 12 else 0.4)
        rows.append({"input_ids": ids.tolist(), "labels": np.where(learned, ids, -100).tolist()})
    file = write_json_lines(folder / "rows.jsonl", rows)
    done: dict[tuple[str, ...], Path] = {}

    def call(*overrides: str) -> Path:
        if overrides not in done:
            done[overrides] = run(call.base(folder / f"run-{len(done)}"), *overrides)
        return done[overrides]

    def base(cache_dir: Path) -> list[str]:
        return [
            f"distillation.teacher.model_path={llama}",
            f"distillation.teacher.cache_dir={cache_dir}",
            f"{GENERATION}.targets=sample",
            f"{GENERATION}.draws=20",
            f"{GENERATION}.torch_threads=1",
            "distillation.dataset.name=json",
            f"distillation.dataset.data_files={file}",
            "distillation.dataset.mask_column=labels",
            "distillation.dataset.max_length=10",
            "distillation.partition.rows=4",
            "cluster=serial",
        ]

    call.base = base
    return call


def items_of(path: Path) -> list[dict[str, np.ndarray]]:
    reader = CacheReader(path)
    return [reader.item(index) for index in range(reader.n_items)]


@pytest.mark.parametrize("way", WAYS)
def test_partitions_resumption_and_workers_draw_the_same(job, tmp_path, way) -> None:
    few = [*WAYS[way], COMPACT]
    one = job(*few)
    shared = [*job.base(tmp_path / "shared"), *few, f"{GENERATION}.total_workers=2"]
    for worker in (0, 1):
        generate(load_config([*shared, f"{GENERATION}.worker_id={worker}"]))
    merged = merge([tmp_path / "shared"])
    found = {digest(merged)}
    # Packed blocks begin anew in every partition.
    if way != "packed":
        resumed = [*job.base(tmp_path / "resumed"), *few]
        run(resumed, "distillation.dataset.max_samples=6")
        other = [*job.base(tmp_path / "other"), *few, "distillation.partition.rows=3"]
        stream = [
            f"distillation.dataset.{name}" for name in ("streaming=true", "streaming_chunk_size=4", "max_samples=all")
        ]
        streamed = [*job.base(tmp_path / "streamed"), *few, *stream]
        found |= {digest(run(resumed)), digest(run(other)), digest(run(streamed))}
    assert found == {digest(one)}
    assert verify(one.parent, recompute=11).ok
    plain_one = convert(merged, tmp_path / "plain.h5", profile="plain")
    assert digest(convert(plain_one, tmp_path / "compact.h5", profile="compact")) == digest(plain_one) == digest(one)


def test_batches_and_seeds(job, tmp_path) -> None:
    alone, seeded = (
        run(job.base(tmp_path / name), PLAIN, f"{GENERATION}.{setting}")
        for name, setting in (("alone", "batch_size=1"), ("seeded", "seed=1"))
    )
    whole = items_of(job(PLAIN))
    # Other batches move the last bits of the logits, which no draw of these few is near enough to.
    assert all((a["topk_counts"] == b["topk_counts"]).all() for a, b in zip(whole, items_of(alone), strict=True))
    assert any((a["topk_counts"] != b["topk_counts"]).any() for a, b in zip(whole, items_of(seeded), strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_positions_with_labels_have_the_same_draws(job, way) -> None:
    for all_of_it, labels in zip(items_of(job(*WAYS[way], COMPACT)), items_of(job(*WAYS[way], COMPACT, LABELS)),
                                 strict=True):  # fmt: skip
        at = labels["target_pos"].astype(np.int64)
        assert at.tolist() == np.flatnonzero(labels["loss_mask"]).tolist()
        for name in ("topk_ids", "topk_counts"):
            np.testing.assert_array_equal(labels[name], all_of_it[name][at])


def test_draws_of_a_job_are_those_of_the_teacher(job, tmp_path) -> None:
    dense = [override for override in job.base(tmp_path / "dense") if not override.startswith(f"{GENERATION}.draws")]
    full = items_of(run([o.replace("=sample", "=topk") for o in dense], PLAIN, f"{GENERATION}.top_k=104"))
    off, variance = 0.0, 0.0
    for item, whole in zip(items_of(job(PLAIN)), full, strict=True):
        assert (item["topk_counts"].sum(1, dtype=int) == 20).all()
        for row in range(len(item["input_ids"])):
            logp = np.zeros(104)
            logp[whole["topk_ids"][row]] = whole["topk_logprobs"][row]
            p = np.exp(logp) / np.exp(logp).sum()
            off += (item["topk_counts"][row] @ logp[item["topk_ids"][row]]) / 20 - p @ logp
            variance += (p @ logp**2 - (p @ logp) ** 2) / 20
        np.testing.assert_allclose(item["label_logprob"], whole["label_logprob"], atol=1e-5)
    assert abs(off) < 5 * variance**0.5


def test_recomputed_draws_are_compared() -> None:
    with np.errstate(divide="ignore", invalid="ignore"):
        whole = records((6,), k=50)
    p = np.exp(whole.logprobs.astype(np.float64))
    draw = np.random.default_rng(0)

    def document(shares: np.ndarray) -> _Document:
        counts = draw.multinomial(200, shares / shares.sum(1, keepdims=True)).astype(np.uint8)
        return _Document(positions=np.arange(6), arrays={"topk_ids": whole.topk_ids, "topk_counts": counts})

    for shares, is_ok in ((p, True), (np.ones_like(p), False), (p**2, False)):
        fit = _Fit()
        for _ in range(20):
            fit.add(document(shares), whole)
        assert fit.check().looked_at == 120
        assert (fit.check().n_problems == 0) == is_ok
    moved = _Moved()
    one, other = document(p), document(p)
    moved.add(one, one)
    assert moved.share == 0
    moved.add(one, other)
    counts = [each.arrays["topk_counts"].astype(int) for each in (one, other)]
    assert moved.share == pytest.approx(np.abs(counts[0] - counts[1]).sum() / 2 / (2 * 1200))


@pytest.mark.parametrize("profile", [PLAIN, COMPACT])
def test_all_pages_show_draws(job, profile) -> None:
    path = job(profile)
    shown, status = card(path), read_status(path.parent)
    distinct = np.mean([np.count_nonzero(row) for item in items_of(path) for row in item["topk_counts"]])
    assert (shown["draws"], shown["top_k"], shown["kept_mass"], shown["precision"]) == (20, None, None, None)
    assert shown["distinct"] == pytest.approx(distinct, abs=0.01)
    assert f"distinct ids  {distinct:.1f}" in status.lines()
    assert json.loads(status.to_json())["distinct_draws"] == pytest.approx(distinct, abs=0.001)
    assert json.loads(status.to_json())["kept_mass"] is None
    page = (path.parent / "report.html").read_text()
    assert "The targets cannot be read" not in page
    assert "Distinct ids" in page
    assert "Kept mass" not in page
    explorer, item = Explorer(path), items_of(path)[0]
    assert explorer.about()["draws"] == 20
    best = explorer.document(0)["best"][1]
    at = int(np.count_nonzero(item["topk_counts"][0]))
    assert [[i, share] for i, _, share in best] == [
        [int(i), pytest.approx(count / 20)]
        for i, count in zip(item["topk_ids"][0, : min(at, 16)], item["topk_counts"][0], strict=False)
    ]


def test_a_dataset_gives_shares(job) -> None:
    path = job(PLAIN, LABELS)
    dataset, compact_one = CachedLogitsDataset(path), CachedLogitsDataset(job(COMPACT, LABELS))
    assert "draws: 20 of a vocabulary of 104" in repr(dataset)
    batch = collate(list(dataset))
    targets = batch["targets"]
    assert targets.draws == 20
    kept = [item for item in items_of(path) if len(item["input_ids"])]
    width = max(np.count_nonzero(row) for item in kept for row in item["topk_counts"])
    assert targets.topk_ids.shape[-1] == width
    for b, item in enumerate(kept):
        at = torch.from_numpy(item["target_pos"].astype(np.int64))
        counts = torch.from_numpy(item["topk_counts"][:, :width].astype(np.float32))
        torch.testing.assert_close(targets.topk_logprobs[b, at].exp(), counts / 20)
        assert torch.equal(targets.topk_ids[b, at], torch.from_numpy(item["topk_ids"][:, :width].astype(np.int64)))
        assert bool((targets.tail_logmass[b, at] == -torch.inf).all())
    targets.check_alignment(batch["input_ids"])
    assert torch.equal(collate(list(compact_one))["targets"].topk_ids, targets.topk_ids)
    flat = collate_flat(list(dataset))["targets"]
    assert torch.equal(flat.topk_ids[flat.mask], targets.topk_ids[targets.mask])
    windows = [item for item in CachedLogitsDataset(path, window=7)]
    assert torch.equal(collate_flat(windows)["targets"].topk_ids[flat.mask], flat.topk_ids[flat.mask])
    cut = CachedLogitsDataset(path, max_tokens=6)
    for whole, one in zip(dataset, cut, strict=True):
        n = int((whole["target_pos"] < 6).sum())
        assert torch.equal(one["topk_logprobs"], whole["topk_logprobs"][:n, : one["topk_logprobs"].shape[1]])


def test_a_smaller_vocabulary_makes_draws_absent(job) -> None:
    dataset = CachedLogitsDataset(job(PLAIN), student_vocab_size=90, skip_unrepresentable=True)
    batch = collate(list(dataset))
    targets = batch["targets"]
    assert int(batch["n_beyond"].sum()) > 0
    present = targets.topk_logprobs.exp().sum(-1)[targets.mask]
    torch.testing.assert_close(present + targets.tail_logmass.exp()[targets.mask], torch.ones_like(present))
    logits = torch.randn(*targets.shape, 90, dtype=torch.float64)
    found = distillation_loss(logits, targets).divergence
    shares = torch.zeros_like(logits).scatter_add(-1, targets.topk_ids, targets.topk_logprobs.double().exp())
    wanted = -(shares * logits.log_softmax(-1)).sum(-1)[targets.mask].mean()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_options_without_meaning_for_draws_are_refused(job) -> None:
    with pytest.raises(ConfigError, match="top_k: expected None for a cache of draws, got 3"):
        CachedLogitsDataset(job(COMPACT), top_k=3)
    with pytest.raises(ConfigError, match="decode: expected 'worker' for a cache of draws, got 'device'"):
        CachedLogitsDataset(job(COMPACT), decode="device")


def test_caches_of_draws_mix_and_make_no_ensemble(job, tmp_path) -> None:
    one, other = CachedLogitsDataset(job(PLAIN)), CachedLogitsDataset(job(COMPACT))
    mixed = MixedDataset({"one": one, "other": other})
    targets = collate([mixed[i] for i in range(len(mixed))])["targets"]
    torch.testing.assert_close(targets.topk_logprobs.exp().sum(-1)[targets.mask], torch.ones(int(targets.mask.sum())))
    with pytest.raises(ConfigError, match="expected caches of the most probable tokens, got draws in 'one'"):
        EnsembleDataset({"one": one, "other": other})
    write_cache(tmp_path / "a.h5", records(LENGTHS, k=3))
    with pytest.raises(ConfigError, match="expected the same draws, got 0 in 'a' and 20 in 'b'"):
        MixedDataset({"a": CachedLogitsDataset(tmp_path / "a.h5"), "b": one})


@pytest.mark.parametrize("profile", [PLAIN, COMPACT])
def test_a_measured_plan_shows_what_draws_take(job, tmp_path, profile) -> None:
    planned = prepare(load_config([*job.base(tmp_path / "run"), profile]))
    found = measure_plan(planned)
    assert [one.size for one in found.by_draws] == [20, 25, 50, 100]
    for name in ("kept", "bytes_per_token"):
        values = [getattr(one, name) for one in found.by_draws]
        assert values == sorted(values)
    distinct = [np.count_nonzero(row) for item in items_of(job(PLAIN)) for row in item["topk_counts"]]
    # Other draws of the same distributions, a few of which have other contexts.
    assert found.by_draws[0].kept == pytest.approx(np.mean(distinct), abs=0.7)
    lines = measured_lines(planned, found)
    assert sum("← draws" in line for line in lines) == 1
    assert not any("← top_k" in line for line in lines)
    figures = measured_figures(planned, found)
    assert figures["by_draws"][0]["draws"] == 20
    assert {one["lost_nats"] for one in figures["by_draws"] + figures["by_share"]} == {0}
    assert {one["kept_mass"] for one in figures["by_share"]} == {None}


def test_other_draws_are_refused_in_the_same_folder(job) -> None:
    folder = job(COMPACT).parent
    with pytest.raises(RunConflictError, match=r"teacher\.generation\.seed: the run has 0, now 5"):
        run(job.base(folder), COMPACT, f"{GENERATION}.seed=5")
    with pytest.raises(RunConflictError) as refused:
        run([setting for setting in job.base(folder) if "targets=" not in setting and "draws=" not in setting], COMPACT)
    assert refused.value.differences == {"teacher.generation.targets": ("sample", "topk")}


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"draws": 20}, "draws: expected null with targets=topk, got 20. Set .*targets=sample"),
        ({"seed": 3}, "seed: expected null with targets=topk, got 3"),
        ({"targets": "sample", "draws": 0}, "draws: expected int from 1 to 255 or null, got 0"),
        ({"targets": "sample", "draws": 256}, "draws: expected int from 1 to 255 or null, got 256"),
        ({"targets": "sample", "seed": -1}, "seed: expected int ≥ 0 or null, got -1"),
        ({"targets": "sample", "top_k": 50}, "top_k: expected its default 64 with targets=sample, which has no use"),
        ({"targets": "sample", "temperatures": [2.0]}, "temperatures: expected none with targets=sample, whose"),
        ({"targets": "some"}, "targets: expected 'topk' or 'sample', got 'some'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(generation, message) -> None:
    tree = {"teacher": {"model_path": "x", "generation": generation}}
    with pytest.raises(ConfigError, match=message):
        Config.from_mapping(tree, dataset_given=True)
