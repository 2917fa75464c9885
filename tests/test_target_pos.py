"""Targets at chosen positions, from the records to the loss."""

from __future__ import annotations

import contextlib
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
    Head,
    MixedDataset,
    Objective,
    RunConflictError,
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
from dask_logits.cache.partition import PartitionReader, write_partition
from dask_logits.cache.pieces import cache_pieces, consolidate
from dask_logits.cache.profile import as_kept
from dask_logits.cache.reader import CacheReader
from dask_logits.config.root import Config
from dask_logits.data.items import plain_items
from dask_logits.job.capacity import plan_lines
from dask_logits.job.measured_plan import measure_plan, measured_lines
from dask_logits.job.prepare import prepare
from dask_logits.job.recompute import _check_ranks
from dask_logits.observe.explore import Explorer
from dask_logits.ops.check import Check
from dask_logits.ops.show import card
from dask_logits.records import EVERY_TOKEN, Extras, Records, Statistics, schema
from dask_logits.teacher import topk
from dask_logits.teacher.model import ScoringPath
from dask_logits.teacher.positions import highest_entropy, scored_positions
from dask_logits.teacher.scoring import Scored
from dask_logits.teacher.topk import padded_width, topk_with_tail
from dask_logits.train.batches import CachedItem

LENGTHS = (4, 0, 2, 7, 1, 3)
CHOSEN = [1, 3, 5, 6, 8, 9, 12, 13]


def every(seed: int = 0) -> Records:
    """Return records with targets at all positions, and a mask that is 0 at the ends of documents."""
    found = records(LENGTHS, k=3, seed=seed, first_row=len(LENGTHS) * seed, temperatures=True, masked=True)
    return dataclasses.replace(found, loss_mask=found.loss_mask * ~np.isnan(found.label_logprob))


everything = every()
made = everything.at(np.array(CHOSEN))
profiles = pytest.mark.parametrize("profile", [plain(3, extras=extras_of(made)), compact(3, extras=extras_of(made))])


def same(found: dict[str, np.ndarray], wanted: Records) -> None:
    """Compare token arrays byte by byte."""
    assert found.keys() == wanted.tokens().keys()
    for name, array in wanted.tokens().items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def document(made: Records, index: int) -> Records:
    """Return one document of records."""
    stop = int(made.document_length[: index + 1].sum())
    start = stop - int(made.document_length[index])
    inside = (made.target_pos >= start) & (made.target_pos < stop)
    tokens = {
        name: array[start:stop] if name in EVERY_TOKEN else array[inside] for name, array in made.tokens().items()
    }
    tokens["target_pos"] = tokens["target_pos"] - np.uint64(start)
    columns = {
        name: getattr(made, name)[index : index + 1] for name in ("document_row", "document_offset", "document_length")
    }
    return Records(**tokens, **columns)


def test_records_hold_targets_at_some_positions() -> None:
    assert (made.n_tokens, made.n_targets) == (17, 8)
    np.testing.assert_array_equal(made.topk_ids, everything.topk_ids[CHOSEN])
    np.testing.assert_array_equal(made.at(np.array([3, 9])).logsumexp, everything.logsumexp[[3, 9]])
    np.testing.assert_array_equal(made.input_ids, everything.input_ids)
    for wrong in ([1, 3, 3, 6, 8, 9, 12, 13], [1, 3, 5, 6, 8, 9, 12, 17]):
        with pytest.raises(ValueError, match="target_pos: expected rising positions below 17"):
            dataclasses.replace(made, target_pos=np.array(wrong, np.uint64))
    with pytest.raises(ValueError, match="logsumexp: expected 8 entries, got 17"):
        dataclasses.replace(made, logsumexp=everything.logsumexp)


def test_the_digest_counts_positions_from_the_document() -> None:
    parts = [document(made, index) for index in range(len(LENGTHS))]
    assert content(*parts) == content(made)
    assert content(made) != content(everything)
    moved = dataclasses.replace(made, target_pos=made.target_pos + np.array([1, *[0] * 7], np.uint64))
    assert content(moved) != content(made)
    assert content(everything.at(np.arange(17))) != content(everything)


def test_statistics_count_targets() -> None:
    found = Statistics.of(made)
    assert (found.tokens, found.targets, found.learned) == (17, 8, int(made.loss_mask.sum()))
    assert found.mean_kept_mass == pytest.approx(1 - np.exp(made.tail_logmass.astype(float)).mean(), abs=1e-6)
    assert Statistics.model_validate({"tokens": 5, "kept_mass": 2.5}).mean_kept_mass == 0.5
    assert (found + Statistics.of(everything)).targets == 8 + 17


@profiles
def test_a_cache_keeps_them(tmp_path, profile) -> None:
    path = tmp_path / "teacher_logits.h5"
    write_cache(path, made, profile=profile)
    reader = CacheReader(path)
    assert (reader.n_tokens, reader.n_targets) == (17, 8)
    assert (reader.n_entries, reader.n_target_entries) == ((17, 8) if profile.name == "plain" else (18, 8))
    kept = as_kept(made, profile)
    same(reader.tokens(0, made.n_tokens), kept)
    for index in range(len(LENGTHS)):
        item = reader.item(index)
        same({name: item[name] for name in kept.tokens()}, document(kept, index))
    assert verify(path).ok
    with h5py.File(path) as file:
        assert file["target_pos"].attrs["critical"]
        start, length = file["document_start"][3], file["document_length"][3]
        first, last = np.searchsorted(file["target_pos"][:], np.array([start, start + length], np.uint64))
        np.testing.assert_array_equal(file["target_pos"][first:last], [6, 8, 9, 12])


@profiles
@pytest.mark.parametrize("chosen", [CHOSEN, [], [0, 16], list(range(17)), [13]])
def test_partitions_and_caches_of_several_pieces_keep_them(tmp_path, profile, chosen) -> None:
    parts = [every(seed).at(np.array(chosen, np.int64)) for seed in range(3)]
    caches = []
    for seed, part in enumerate(parts):
        folder = tmp_path / f"{seed}.zarr"
        write_partition(folder, part, profile)
        same(PartitionReader(folder, profile).records().tokens(), as_kept(part, profile))
        caches.append(tmp_path / f"{seed}.h5")
        write_cache(caches[-1], part, profile=profile)
    pieces = [piece for path in caches for piece in cache_pieces(CacheReader(path))]
    other = plain(3, extras=extras_of(made)) if profile.name == "compact" else compact(3, extras=extras_of(made))
    for to in (profile, other):
        target = tmp_path / f"{to.name}.h5"
        found = consolidate(target, lambda: pieces, profile=to, packed=False, attributes={}, n_rows=18)
        assert found == content(*(as_kept(as_kept(part, profile), to) for part in parts))
        reader = CacheReader(target)
        # Pieces are cut again where the writer joined them, and read back.
        again = [records for piece in cache_pieces(reader) for records in piece.runs()]
        assert content(*again) == found
        assert sum(one.n_targets for one in again) == reader.n_targets == 3 * len(chosen)
        for index in (0, 3, 5, 9, 17):
            at = index % 6
            part = as_kept(as_kept(parts[index // 6], profile), to)
            item = reader.item(index)
            same({name: item[name] for name in part.tokens()}, document(part, at))
        # Plain log-probs that a compact cache has rounded do not sum to 1 within the rounding of float16.
        assert verify(target).ok or (profile.name, to.name) == ("compact", "plain")


@profiles
def test_a_conversion_there_and_back_keeps_the_digest(tmp_path, profile) -> None:
    write_cache(tmp_path / "a.h5", made, profile=profile)
    other = "compact" if profile.name == "plain" else "plain"
    convert(tmp_path / "a.h5", tmp_path / "b.h5", profile=other, precision=8)
    convert(tmp_path / "b.h5", tmp_path / "c.h5", profile=profile.name, precision=8)
    convert(tmp_path / "c.h5", tmp_path / "d.h5", profile=other, precision=8)
    digests = [CacheReader(tmp_path / f"{name}.h5").header.content_digest for name in "abcd"]
    # Only the first step into the compact profile rounds.
    assert len(set(digests[1:])) == 1
    assert (digests[0] == digests[1]) == (profile.name == "compact")


@profiles
def test_packed_blocks_keep_them(tmp_path, profile) -> None:
    made = packed_records().at(np.array([0, 4, 5, 6, 12]))
    profile = dataclasses.replace(profile, extras=Extras(has_target_pos=True))
    write_cache(tmp_path / "teacher_logits.h5", made, profile=profile)
    reader = CacheReader(tmp_path / "teacher_logits.h5")
    assert [reader.item(index)["target_pos"].tolist() for index in range(3)] == [[0, 4, 5], [0], [0]]
    assert content(*reader.runs((0, 5), (0, 3))) == reader.header.content_digest
    assert verify(tmp_path / "teacher_logits.h5").ok


@profiles
@pytest.mark.parametrize(
    ("places", "value"), [([2], 3), ([0], 5), ([7], 17), ([7], 2**63), ([0, 1], 0), (range(8), 2**64 - 1)]
)
def test_damaged_positions_are_refused(tmp_path, profile, places, value) -> None:
    path = tmp_path / "teacher_logits.h5"
    write_cache(path, made, profile=profile)
    with h5py.File(path, "r+") as file:
        file["target_pos"][list(places)] = value
    reader = CacheReader(path)
    with pytest.raises(CacheError, match="expected CRC-32"):
        reader.verify_checksums()
    with pytest.raises(CacheError, match=r"expected 8 rising target_pos inside documents"):
        reader._check_places()
    for index in range(reader.n_items):
        # A document is read safely, or refused.
        with contextlib.suppress(CacheError):
            item = reader.item(index)
            assert (item["target_pos"] < len(item["input_ids"])).all()


@pytest.mark.parametrize("name", ["n_targets", "n_target_entries"])
@pytest.mark.parametrize("value", [None, 7, 9])
def test_a_header_with_other_sizes_is_refused(tmp_path, name, value) -> None:
    path = tmp_path / "teacher_logits.h5"
    write_cache(path, made)
    with h5py.File(path, "r+") as file:
        del file.attrs[name]
        if value is not None:
            file.attrs[name] = value
    with pytest.raises(CacheError, match=r"n_targets|n_target_entries|n_entries|target_pos|topk_ids"):
        CacheReader(path).verify_checksums()


def test_the_name_and_type_are_those_of_the_format() -> None:
    assert schema(3, 50)["target_pos"] == (np.dtype(np.uint64), ())


@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("path", [ScoringPath(), ScoringPath(compiled=True), ScoringPath(scale=2.0, softcap=5.0)])
def test_entropies_are_those_of_the_whole_distribution(path: ScoringPath, refined: bool) -> None:
    torch.manual_seed(0)
    raw = torch.randn(40, 700) * 4
    logits = torch.full((40, padded_width(700)), -torch.inf, dtype=torch.bfloat16 if refined else torch.float32)
    logits[:, :700] = raw
    logits[3, 5:] = -torch.inf
    exact = path.finish(logits[:, :700].float() if not refined else raw)
    top = topk_with_tail(
        logits, 20, vocab_size=700, path=path, has_entropy=True,
        refine=(lambda ids: exact.gather(1, ids)) if refined else None,
    )  # fmt: skip
    rows = [row for row in range(40) if row != 3]
    wanted = torch.distributions.Categorical(logits=exact[rows].double()).entropy()
    torch.testing.assert_close(top.entropy_R[rows].double(), wanted, rtol=0, atol=0.01 if refined else 1e-5)
    assert bool(top.entropy_R.isfinite().all())
    assert topk_with_tail(logits, 20, vocab_size=700, path=path).entropy_R is None


@pytest.mark.parametrize("rows", [1, 16, 64])
def test_entropies_and_tails_do_not_depend_on_the_rows_at_one_time(rows, monkeypatch) -> None:
    logits = torch.randn(40, 704, generator=torch.Generator().manual_seed(0)) * 4
    wanted = topk_with_tail(logits.clone(), 20, has_entropy=True, temperatures=(2.0,))
    asked = []
    monkeypatch.setattr(topk, "tile_rows", lambda width, device: asked.append((width, device)) or rows)
    found = topk_with_tail(logits, 20, has_entropy=True, temperatures=(2.0,))
    assert asked == [(704, "cpu"), (704, "cpu")]
    assert torch.equal(found.entropy_R, wanted.entropy_R)
    assert torch.equal(found.tail_logmass_RJ, wanted.tail_logmass_RJ)


@given(
    st.lists(st.lists(st.integers(0, 4), max_size=12), max_size=5),
    st.floats(0.01, 1.0),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_each_item_keeps_its_positions_of_the_highest_entropy(entropies, share, is_masked, seed) -> None:
    draw = np.random.default_rng(seed)
    items = plain_items([np.zeros(len(one), np.int64) for one in entropies])
    masks = [draw.integers(2, size=len(one)).astype(bool) for one in entropies]
    if is_masked:
        items = [dataclasses.replace(item, loss_mask=mask) for item, mask in zip(items, masks, strict=True)]
    scored = scored_positions(items, "entropy")
    flat = np.array([value for one in entropies for value in one], np.float32)
    wanted, start = [], 0
    for one, mask in zip(entropies, masks, strict=True):
        places = [at for at in range(len(one)) if mask[at] or not is_masked]
        ranked = sorted(places, key=lambda at: (-one[at], at))
        wanted += [start + at for at in sorted(ranked[: max(1, int(share * len(places) + 0.5))])]
        start += len(one)
    assert highest_entropy(items, scored, flat[scored], share).tolist() == wanted


WAYS = {
    "documents": [],
    "windows": ["distillation.dataset.long_documents=window", "distillation.dataset.window_stride=5"],
    "packed": ["distillation.dataset.packing=concat", "distillation.dataset.separator_id=0"],
}
GENERATION = "distillation.teacher.generation"
LABELS = [f"{GENERATION}.positions=labels"]
ENTROPY = [f"{GENERATION}.positions=entropy", f"{GENERATION}.position_share=0.3"]


@pytest.fixture(scope="module")
def masked_rows() -> list[dict[str, list[int]]]:
    draw = np.random.default_rng(3)
    rows = []
    for length in (9, 1, 30, 5, 17, 0, 12, 2, 25, 8, 3):
        ids = draw.integers(1, 100, size=length)
        learned = draw.random(length) < (0.0 if length == 12 else 0.4)
        rows.append({"input_ids": ids.tolist(), "labels": np.where(learned, ids, -100).tolist()})
    return rows


@pytest.fixture(scope="module")
def job(llama, masked_rows, tmp_path_factory):
    """Return a function that runs a job on masked token ids, once for the same overrides."""
    folder = tmp_path_factory.mktemp("jobs")
    file = write_json_lines(folder / "rows.jsonl", masked_rows)
    done: dict[tuple[str, ...], Path] = {}

    def call(*overrides: str) -> Path:
        if overrides not in done:
            done[overrides] = run(base(folder / f"run-{len(done)}", llama, file), *overrides)
        return done[overrides]

    call.base = lambda path: base(path, llama, file)
    return call


def base(cache_dir: Path, llama: Path, file: Path) -> list[str]:
    return [
        f"distillation.teacher.model_path={llama}",
        f"distillation.teacher.cache_dir={cache_dir}",
        f"{GENERATION}.top_k=8",
        f"{GENERATION}.torch_threads=1",
        f"{GENERATION}.temperatures=[2]",
        "distillation.dataset.name=json",
        f"distillation.dataset.data_files={file}",
        "distillation.dataset.mask_column=labels",
        "distillation.dataset.max_length=10",
        "distillation.partition.rows=4",
        "cluster=serial",
    ]


def items_of(path: Path) -> list[dict[str, np.ndarray]]:
    reader = CacheReader(path)
    return [reader.item(index) for index in range(reader.n_items)]


@pytest.mark.parametrize("positions", [LABELS, ENTROPY], ids=["labels", "entropy"])
@pytest.mark.parametrize("profile", ["plain", "compact"])
@pytest.mark.parametrize("way", WAYS)
def test_a_job_stores_the_rows_of_a_job_at_all_positions(job, way, profile, positions) -> None:
    storage = f"distillation.cache.profile={profile}"
    whole = items_of(job(*WAYS[way], storage))
    path = job(*WAYS[way], storage, *positions)
    full = items_of(job(*WAYS[way], "distillation.cache.profile=plain", f"{GENERATION}.top_k=104"))
    for all_of_it, some, dense in zip(whole, items_of(path), full, strict=True):
        at = some["target_pos"].astype(np.int64)
        for name in all_of_it:
            wanted = all_of_it[name] if name in (*EVERY_TOKEN, "segments", "row") else all_of_it[name][at]
            assert some[name].tobytes() == wanted.tobytes(), name
        learned = np.flatnonzero(some["loss_mask"])
        if positions is LABELS:
            assert at.tolist() == learned.tolist()
            continue
        assert len(at) == (max(1, int(0.3 * len(learned) + 0.5)) if len(learned) else 0)
        assert set(at) <= set(learned)
        logp = dense["topk_logprobs"].astype(np.float64)
        entropy = -(np.exp(logp) * logp).sum(1)
        left = np.setdiff1d(learned, at)
        # Stored log-probs of the whole distribution are rounded to float16.
        assert entropy[at].min(initial=np.inf) >= entropy[left].max(initial=0) - 5e-3
    assert verify(path.parent).ok
    statistics = CacheReader(path).header.statistics
    assert statistics.targets == sum(len(item["target_pos"]) for item in items_of(path))
    assert statistics.tokens == sum(len(item["input_ids"]) for item in items_of(path))


def test_without_a_mask_all_positions_compete(here) -> None:
    path = run(here, *ENTROPY)
    for item in items_of(path):
        assert len(item["target_pos"]) == (
            max(1, int(0.3 * len(item["input_ids"]) + 0.5)) if item["input_ids"].size else 0
        )
        assert "loss_mask" not in item


@pytest.mark.parametrize(
    ("way", "positions"),
    [
        pytest.param("documents", LABELS, id="documents-labels"),
        pytest.param("windows", ENTROPY, id="windows-entropy"),
        pytest.param("documents", ENTROPY, id="documents-entropy", marks=pytest.mark.slow),
        pytest.param("windows", LABELS, id="windows-labels", marks=pytest.mark.slow),
    ],
)
def test_partitions_resumption_and_workers_do_not_matter(job, tmp_path, way, positions) -> None:
    one = job(*WAYS[way], "distillation.cache.profile=compact", *positions)
    few = [*WAYS[way], "distillation.cache.profile=compact", *positions]
    other = run(job.base(tmp_path / "other"), *few, "distillation.partition.rows=3")
    resumed = [*job.base(tmp_path / "resumed"), *few]
    run(resumed, "distillation.dataset.max_samples=6")
    shared = [*job.base(tmp_path / "shared"), *few, f"{GENERATION}.total_workers=2"]
    for worker in (0, 1):
        generate(load_config([*shared, f"{GENERATION}.worker_id={worker}"]))
    merged = merge([tmp_path / "shared"])
    assert {digest(other), digest(run(resumed)), digest(merged)} == {digest(one)}
    plain_one = convert(merged, tmp_path / "plain.h5", profile="plain")
    again = convert(plain_one, tmp_path / "compact.h5", profile="compact")
    assert digest(plain_one) == digest(again) == digest(one)


@pytest.mark.parametrize("positions", [LABELS, ENTROPY], ids=["labels", "entropy"])
@pytest.mark.parametrize("way", WAYS)
def test_verify_scores_the_stored_positions_again(job, way, positions) -> None:
    path = job(*WAYS[way], "distillation.cache.profile=compact", *positions)
    report = verify(path.parent, recompute=11)
    assert report.ok
    held = sum(len(item["target_pos"]) for item in items_of(path))
    assert report.recomputed["positions"] == held
    assert report.recomputed["cached_against_live_max"] < 0.1
    names = [check.name for check in report.checks]
    assert ("positions of the highest entropy have targets" in names) == (positions is ENTROPY)


def test_verify_finds_positions_of_low_entropy() -> None:
    # Of the document of row 3, which has the tokens 6 to 12, these four compete.
    competing = everything.at(np.array([1, 6, 8, 9, 12]))
    entropy = np.array([9.0, 1.0, 2.0, 2.005, 0.5], np.float32)
    scored = Scored(records=competing, entropy_M=entropy, seconds={}, splits={}, padded_tokens=17)
    for stored, problems in {
        (3,): [],
        (2,): [],
        (0, 3): ["row 3: expected entropies of at least 2 nats at stored positions, got 1"],
        (2, 3): [],
        (0, 2, 3, 6): [],
        (): [],
    }.items():
        check = Check("ranks")
        _check_ranks(check, scored, 3, np.array(stored), 0.01)
        assert (check.looked_at, check.problems) == (4, problems)


@pytest.mark.parametrize("positions", [LABELS, ENTROPY], ids=["labels", "entropy"])
def test_all_pages_show_them(job, positions) -> None:
    path = job("distillation.cache.profile=compact", *positions)
    held = sum(len(item["target_pos"]) for item in items_of(path))
    assert card(path)["targets"] == held
    assert f"targets       {held}" in read_status(path.parent).lines()
    assert json.loads(read_status(path.parent).to_json())["targets"] == held
    page = (path.parent / "report.html").read_text()
    assert "The targets cannot be read" not in page
    explorer = Explorer(path)
    for number, item in enumerate(items_of(path)):
        shown = explorer.document(number)
        expected = [at > 0 and at - 1 in item["target_pos"] for at in range(len(item["input_ids"]))]
        assert [best is not None for best in shown["best"]] == expected
        assert len(shown["surprise"]) == len(shown["tail"]) == len(item["input_ids"])
    assert explorer.surprising["sampled"] == sum(len(item["target_pos"]) > 0 for item in items_of(path))


@pytest.mark.parametrize("positions", [LABELS, ENTROPY], ids=["labels", "entropy"])
def test_the_estimate_counts_targets(job, tmp_path, positions) -> None:
    whole, some = (prepare(load_config([*job.base(tmp_path / "run"), *more])) for more in ([], positions))
    assert some.estimate.cache_bytes < 0.6 * whole.estimate.cache_bytes
    assert any(line.startswith("targets       at ") for line in plan_lines(some))
    assert not any(line.startswith("targets") for line in plan_lines(whole))
    share = some.estimate.target_share
    assert share == pytest.approx(0.35, abs=0.15) if positions is LABELS else 0.05 < share < 0.2


@pytest.mark.parametrize("profile", ["plain", "compact"])
def test_a_measured_plan_shows_sizes_by_share(job, tmp_path, profile) -> None:
    planned = prepare(load_config([*job.base(tmp_path / "run"), f"distillation.cache.profile={profile}", *ENTROPY]))
    found = measure_plan(planned)
    by_share = {one.size: one for one in found.by_share}
    assert {0.1, 0.2, 0.5, 1.0} <= by_share.keys()
    sizes = [one.bytes_per_token for one in found.by_share]
    assert sizes == sorted(sizes)
    chosen = next(one for one in found.by_k if one.size == 8)
    for name in ("kept", "lost_nats", "bytes_per_token"):
        assert getattr(by_share[1.0], name) == getattr(chosen, name), name
    # Where the teacher is unsure, k entries keep less.
    assert by_share[0.1].kept < by_share[0.5].kept < by_share[1.0].kept
    # A flat tail costs little, so what is lost may fall or rise.
    assert len({one.lost_nats for one in found.by_share if one.lost_nats > 0}) == len(by_share)
    lines = measured_lines(planned, found)
    assert any(line.startswith("   share   kept mass   lost (nats)   bytes/token   cache   (of pos") for line in lines)
    assert sum("← planned" in line for line in lines) == 1


def trained(path: Path, **options) -> list[CachedItem]:
    return list(CachedLogitsDataset(path, **options))


@pytest.mark.parametrize("profile", ["plain", "compact"])
def test_a_dataset_puts_targets_in_their_places(job, profile) -> None:
    storage = f"distillation.cache.profile={profile}"
    whole, some = CachedLogitsDataset(job(storage)), CachedLogitsDataset(job(storage, *ENTROPY))
    assert some.has_target_pos
    assert not whole.has_target_pos
    assert "targets: at" in repr(some)
    wanted, found = collate(list(whole))["targets"], collate(list(some))["targets"]
    for b, item in enumerate(some):
        assert item["target_pos"].dtype == torch.int64
        assert len(item["topk_ids"]) == len(item["label_logprob"]) == len(item["target_pos"])
        assert found.mask[b].nonzero().flatten().tolist() == item["target_pos"].tolist()
    mask = found.mask
    for name in ("input_ids", "topk_ids", "topk_logprobs", "tail_logmass", "logsumexp", "label_ids", "label_logprob",
                 "tail_logmass_NJ"):  # fmt: skip
        assert torch.equal(getattr(found, name)[mask].nan_to_num(), getattr(wanted, name)[mask].nan_to_num()), name
    assert torch.equal(collate(list(some))["labels"], collate(list(whole))["labels"])
    flat = collate_flat(list(some))
    assert torch.equal(flat["targets"].topk_ids[flat["targets"].mask], found.topk_ids[mask])
    found.check_alignment(collate(list(some))["input_ids"])


def test_options_cut_tokens_and_targets_together(job) -> None:
    path = job("distillation.cache.profile=compact", *ENTROPY)
    items = trained(path)
    for item, cut in zip(items, trained(path, max_tokens=6), strict=True):
        keep = item["target_pos"] < 6
        assert cut["target_pos"].tolist() == item["target_pos"][keep].tolist()
        assert torch.equal(cut["topk_ids"], item["topk_ids"][keep])
    starts = np.cumsum([0, *(len(item["input_ids"]) for item in items)])
    wanted = [int(start + at) for start, item in zip(starts, items, strict=False) for at in item["target_pos"]]
    windows = trained(path, window=7)
    found = [7 * number + int(at) for number, window in enumerate(windows) for at in window["target_pos"]]
    assert found == wanted
    assert torch.equal(torch.cat([window["topk_ids"] for window in windows]),
                       torch.cat([item["topk_ids"] for item in items]))  # fmt: skip
    coded = CachedLogitsDataset(path, decode="device", top_k=5)
    decoded = coded.decoder()(collate(list(coded))["targets"])
    here = collate(trained(path, top_k=5))["targets"]
    assert torch.equal(decoded.mask, here.mask)
    assert torch.equal(decoded.topk_ids[here.mask], here.topk_ids[here.mask])
    assert torch.equal(decoded.topk_logprobs[here.mask], here.topk_logprobs[here.mask])


def test_caches_with_and_without_them_mix(job) -> None:
    whole, some = CachedLogitsDataset(job()), CachedLogitsDataset(job(*ENTROPY))
    mixed = MixedDataset({"whole": whole, "some": some})
    items = [mixed[i] for i in range(len(mixed))]
    targets = collate(items)["targets"]
    wanted = [item.get("target_pos", item["loss_mask"].nonzero().flatten()).tolist() for item in items]
    assert [row.nonzero().flatten().tolist() for row in targets.mask] == wanted


@pytest.mark.parametrize("alpha", [1.0, 0.4])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_losses_are_those_of_the_positions_with_targets(job, alpha, temperature) -> None:
    whole = collate(list(CachedLogitsDataset(job(f"{GENERATION}.top_k=104", "distillation.cache.profile=plain"))))
    path = job(f"{GENERATION}.top_k=104", "distillation.cache.profile=plain", *ENTROPY)
    batch = collate(list(CachedLogitsDataset(path)))
    targets, mask = batch["targets"], batch["targets"].mask
    torch.manual_seed(0)
    head = torch.randn(104, 16, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(*mask.shape, 16, dtype=torch.float64, requires_grad=True)
    objective = Objective(alpha=alpha, temperature=temperature)
    # The dense reference, from the rows of a job at all positions.
    logits = (hidden @ head.T)[mask]
    ids, logp = whole["targets"].topk_ids[mask], whole["targets"].topk_logprobs[mask].double()
    p = torch.zeros_like(logits).scatter(1, ids, (logp / temperature).softmax(-1))
    q = (logits / temperature).log_softmax(-1)
    divergence = (torch.special.xlogy(p, p) - p * q).sum() / mask.sum()
    labels = targets.label_ids[mask]
    cross_entropy = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / mask.sum()
    wanted = (1 - alpha) * cross_entropy + alpha * temperature**2 * divergence
    gradients = torch.autograd.grad(wanted, (hidden, head))
    for found in (
        distillation_loss(hidden @ head.T, targets, objective),
        fused_distillation_loss(hidden, Head(weight=head), targets, objective),
    ):
        assert (found.n_tokens, found.n_labels) == (int(mask.sum()), int((labels >= 0).sum()))
        torch.testing.assert_close(found.loss, wanted, rtol=1e-4, atol=1e-4)
        for gradient, expected in zip(torch.autograd.grad(found.loss, (hidden, head)), gradients, strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("positions", [LABELS, ENTROPY], ids=["labels", "entropy"])
@pytest.mark.parametrize("way", WAYS)
def test_shards_keep_them(job, tmp_path, way, positions) -> None:
    few = [*WAYS[way], "distillation.cache.profile=compact", *positions]
    index = run(job.base(tmp_path / "shards"), *few, "distillation.cache.max_file_size=1")
    assert index.suffix == ".json"
    assert verify(index).ok
    dataset, whole = CachedLogitsDataset(index), CachedLogitsDataset(job(*few))
    assert [item["target_pos"].tolist() for item in dataset] == [item["target_pos"].tolist() for item in whole]


def test_other_positions_are_refused_in_the_same_folder(job, tmp_path) -> None:
    run(job.base(tmp_path / "run"), *LABELS)
    with pytest.raises(RunConflictError, match=r"teacher\.generation\.positions: the run has 'labels', now 'all'"):
        run(job.base(tmp_path / "run"))


@pytest.mark.parametrize(
    ("generation", "dataset", "message"),
    [
        ({"positions": "labels"}, {}, "positions: expected 'all' or 'entropy' without a mask, got 'labels'"),
        (
            {"positions": "labels"},
            {"messages_column": "m", "learn": "all"},
            "positions: expected 'all' or 'entropy' without a mask",
        ),
        ({"position_share": 0.5}, {}, "position_share: expected null with positions=all, got 0.5"),
        (
            {"position_share": 0.5, "positions": "labels"},
            {"mask_column": "m"},
            "position_share: expected null with positions=labels",
        ),
        ({"position_share": 0.0, "positions": "entropy"}, {}, "position_share: expected float > 0 and ≤ 1"),
        ({"position_share": 1.5, "positions": "entropy"}, {}, "position_share: expected float > 0 and ≤ 1"),
        ({"positions": "some"}, {}, "positions: expected 'all' or 'labels' or 'entropy', got 'some'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(generation, dataset, message) -> None:
    tree = {"teacher": {"model_path": "x", "generation": generation}, "dataset": dataset}
    with pytest.raises(ConfigError, match=message):
        Config.from_mapping(tree, dataset_given=True)
