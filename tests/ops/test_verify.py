"""A good cache is good; every kind of damage, made on purpose, is named."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from builders import cache_dir, compact, extras_of, packed_records, plain, records, tree, write_cache

from dask_logits import CacheError, ConfigError, RunConflictError, generate, load_config, retry, verify
from dask_logits.cache.pieces import cache_pieces
from dask_logits.cache.reader import CacheReader
from dask_logits.cli import main
from dask_logits.records import Records, Statistics, total_digest
from dask_logits.run.consolidate import consolidate_run
from dask_logits.run.folder import RunFolder
from dask_logits.run.parts import JOB_ATTRIBUTES

IDS, ORDER = "token ids valid, kept ids distinct", "log-probs descending, at most 0"
MASS, LABELS = "kept and tail mass sum to 1", "labels' log-probs fit the kept ones"
FINITE, DOCUMENTS = "nothing NaN or infinite", "documents, each row once and whole"
CHECKSUMS, DIGESTS = "files whole, with right checksums", "content digests, computed again"


def wrong(path, **settings) -> dict[str, list[str]]:
    """Return check → problems, of the checks that found some."""
    return {check.name: check.problems for check in verify(path, **settings).checks if check.n_problems}


def truthful(made: Records) -> Records:
    """Return records whose labels' log-probs are those of the next tokens."""
    labels = made.label_logprob.copy()
    for i in range(made.n_tokens - 1):
        at = np.flatnonzero(made.topk_ids[i] == made.input_ids[i + 1])
        labels[i] = made.topk_logprobs[i, at[0]] if len(at) else made.topk_logprobs[i, -1] - 1
    return dataclasses.replace(made, label_logprob=labels)


def changed(made: Records, name: str, place, value) -> Records:
    array = getattr(made, name).copy()
    array[place] = value
    return dataclasses.replace(made, **{name: array})


@pytest.mark.parametrize("profile", [plain(3), *(compact(3, precision=bits) for bits in (8, 10, 12))])
@pytest.mark.parametrize("made", [records((4, 0, 2, 7), k=3), packed_records(), records((0,), k=3), records((), k=3)])
def test_good_caches_are_good(tmp_path, made, profile) -> None:
    rows = len(np.unique(made.document_row))
    write_cache(tmp_path / "c.h5", truthful(made), profile=profile, n_rows=rows)
    report = verify(tmp_path / "c.h5")
    assert report.ok, report.lines()
    looked_at = {check.name: check.looked_at for check in report.checks}
    assert looked_at.get(MASS, 0) == looked_at.get(IDS, 0) == made.n_tokens
    assert looked_at.get(DOCUMENTS, 0) == made.n_documents


def test_a_cache_that_keeps_everything_is_good(tmp_path) -> None:
    with np.errstate(divide="ignore", invalid="ignore"):
        made = truthful(records((4, 3), k=50))
    write_cache(tmp_path / "c.h5", changed(made, "tail_logmass", slice(None), -np.inf), n_rows=2)
    assert verify(tmp_path / "c.h5").ok


@pytest.mark.parametrize(
    ("name", "place", "value", "check", "message"),
    [
        ("topk_ids", (5, 1), 50, IDS, "row 2, token 1: expected distinct ids below 50"),
        ("topk_ids", (5, slice(0, 2)), 7, IDS, "row 2, token 1: expected distinct ids below 50"),
        ("input_ids", 3, 60, IDS, "row 0, token 3: expected distinct ids below 50"),
        ("topk_logprobs", (2, 2), 0.0, ORDER, "row 0, token 2: expected log-probs that descend"),
        ("topk_logprobs", (2, 0), 0.5, ORDER, "row 0, token 2: expected log-probs that descend from at most 0"),
        ("topk_logprobs", (6, 0), -0.01, MASS, "row 3, token 0: expected a mass of 1, got 1."),
        ("tail_logmass", 1, -9.0, MASS, "row 0, token 1: expected a mass of 1, got 0."),
        ("tail_logmass", 1, np.nan, FINITE, "row 0, token 1: expected numbers"),
        ("logsumexp", 1, np.inf, FINITE, "row 0, token 1: expected numbers"),
        ("label_logprob", 0, -20.0, LABELS, None),
        ("label_logprob", 0, 0.5, FINITE, "row 0, token 0: expected numbers, and no log-prob above 0"),
        ("label_logprob", 2, np.nan, FINITE, "row 0, token 2: expected the log-prob of the next token, got none"),
        ("document_row", 1, 5, CHECKSUMS, None),
        ("document_row", 3, 4, DOCUMENTS, "row 3: expected its document, got none"),
        ("document_row", 1, 0, DOCUMENTS, "row 0: expected a document from token"),
        ("document_offset", 2, 3, DOCUMENTS, "row 2: expected a document from token 0, got 3"),
    ],
)
def test_what_must_hold_of_every_row_is_checked(tmp_path, name, place, value, check, message) -> None:
    made = truthful(records((4, 0, 2, 7), k=3))
    if name == "label_logprob":
        # The next token of the first position is the most probable one.
        made = changed(made, "input_ids", 1, made.topk_ids[0, 0])
        made = changed(made, "label_logprob", 0, made.topk_logprobs[0, 0])
    write_cache(tmp_path / "c.h5", changed(made, name, place, value), n_rows=4)
    found = wrong(tmp_path / "c.h5")
    assert check in found
    assert message is None or any(problem.startswith(message) for problem in found[check]), found
    write_cache(tmp_path / "good.h5", made, n_rows=4)
    assert verify(tmp_path / "good.h5").ok


@pytest.mark.parametrize("bits", [None, 8])
def test_tails_of_temperatures_in_another_order_are_named(tmp_path, bits) -> None:
    made = truthful(records((4, 0, 2, 7), k=3, temperatures=True))
    profile = None if bits is None else compact(3, precision=bits, extras=extras_of(made))
    write_cache(tmp_path / "good.h5", made, profile=profile, n_rows=4)
    assert verify(tmp_path / "good.h5").ok
    swapped = dataclasses.replace(made, tail_logmass_T=made.tail_logmass_T[:, ::-1].copy())
    write_cache(tmp_path / "c.h5", swapped, profile=profile, n_rows=4)
    message = "row 0, token 0: expected a tail mass that grows with the temperature"
    assert wrong(tmp_path / "c.h5")[MASS][0] == message


def test_missing_rows_gaps_in_windows_and_wrong_digests_are_named(tmp_path) -> None:
    made = truthful(records((4, 2, 3), k=3))
    write_cache(tmp_path / "short.h5", made, n_rows=5)
    assert wrong(tmp_path / "short.h5") == {
        DOCUMENTS: [f"row {row}: expected its document, got none" for row in (3, 4)]
    }
    write_cache(
        tmp_path / "huge.h5", dataclasses.replace(made, document_row=np.array([1, 2, 9], np.uint64)), n_rows=2**47
    )
    assert wrong(tmp_path / "huge.h5") == {
        DOCUMENTS: [f"row {row}: expected its document, got none" for row in (0, 3, 4, 5, 6)]
    }
    windows = dataclasses.replace(
        made, document_row=np.zeros(3, np.uint64), document_offset=np.array([0, 4, 7], np.uint32)
    )
    write_cache(tmp_path / "gap.h5", windows, n_rows=1)
    assert wrong(tmp_path / "gap.h5") == {DOCUMENTS: ["row 0: expected a document from token 6, got 7"]}
    whole = dataclasses.replace(windows, document_offset=np.array([0, 4, 6], np.uint32))
    write_cache(tmp_path / "whole.h5", whole, n_rows=1)
    assert verify(tmp_path / "whole.h5").ok


@pytest.mark.parametrize("profile", [plain(3), compact(3)])
def test_a_flipped_bit_is_found_and_the_exit_status_says_so(tmp_path, profile, capsys) -> None:
    path = tmp_path / "c.h5"
    made = truthful(records((40, 7), k=3))
    write_cache(path, made, profile=profile, n_rows=2)
    data = bytearray(path.read_bytes())
    data[data.index(made.input_ids.tobytes()) + 3] ^= 4
    path.write_bytes(bytes(data))
    assert list(wrong(path)) == [CHECKSUMS]
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as caught:
            main(["verify", str(path), *more])
        assert caught.value.code == 1
    out = capsys.readouterr().out
    assert "1 WRONG" in out
    assert json.loads(out[out.index("{") :])["ok"] is False
    with pytest.raises(SystemExit) as caught:
        main(["verify", str(tmp_path / "nothing")])
    assert caught.value.code == 2
    (tmp_path / "empty").mkdir()
    for name in ("nothing", "empty"):
        with pytest.raises(CacheError, match=r"; check the path|to serve as one, got none"):
            verify(tmp_path / name)
    assert list(wrong(tmp_path)) == [CHECKSUMS]


@pytest.fixture
def kept(here):
    """A finished run that keeps its partitions."""
    generate(load_config([*here, "distillation.job.keep_partitions=true"]))
    return cache_dir(here)


def test_a_run_is_checked_with_its_receipts_and_partitions(kept, capsys) -> None:
    before = tree(kept)
    report = verify(kept)
    assert report.ok
    assert report.unfinished is None
    assert tree(kept) == before
    main(["verify", str(kept)])
    assert capsys.readouterr().out.splitlines()[-1] == "everything that is there is good"
    column = next((kept / "partitions").glob("*/label_logprob/c/0"))
    written = column.read_bytes()
    column.write_bytes(bytes([written[0] ^ 1]) + written[1:])
    assert list(wrong(kept)) == [CHECKSUMS]
    column.write_bytes(written)
    (kept / "teacher_logits.h5").unlink()
    assert verify(kept).unfinished == "the cache is not written"
    receipt = kept / "receipts" / "000" / "000002.json"
    said = json.loads(receipt.read_text())
    shard = kept / "partitions" / said["attempt"] / "input_ids" / "c" / "0"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    assert list(wrong(kept)) == [CHECKSUMS]
    shard.write_bytes(data)
    receipt.write_text(json.dumps({**said, "content_digest": "0" * 64}))
    assert list(wrong(kept)) == [DIGESTS]
    receipt.write_text(json.dumps({**said, "run_id": "another"}))
    assert list(wrong(kept)) == ["receipts that fit run and plan"]
    receipt.unlink()
    report = verify(kept)
    assert report.ok
    assert report.unfinished == "1 of 4 partitions not committed"


def test_a_run_whose_cache_is_written_meanwhile_is_good(kept, monkeypatch) -> None:
    (kept / "teacher_logits.h5").unlink()
    receipt = RunFolder.receipt

    def consolidated_first(run, index):
        monkeypatch.undo()
        consolidate_run(run, keep_partitions=False)
        return receipt(run, index)

    monkeypatch.setattr(RunFolder, "receipt", consolidated_first)
    report = verify(kept)
    assert report.ok, report.lines()
    assert report.unfinished is None


def test_rows_to_recompute_are_counted(kept) -> None:
    with pytest.raises(ConfigError, match="recompute: expected a number of rows from 0, got -1"):
        verify(kept, recompute=-1)


@pytest.mark.parametrize(
    "way",
    [
        [],
        ["distillation.dataset.packing=concat", "distillation.dataset.separator_id=1"],
        ["distillation.dataset.long_documents=window", "distillation.dataset.window_stride=4"],
        ["distillation.cache.max_file_size=1KB", "distillation.cache.profile=compact"],
    ],
)
def test_rows_are_scored_again_and_compared(here, way, monkeypatch) -> None:
    generate(load_config([*here, "distillation.dataset.max_length=8", *way]))
    run = cache_dir(here)
    # On storage that can only be read.
    monkeypatch.setattr(os, "access", lambda path, mode: not Path(path).is_relative_to(run))
    report = verify(run, recompute=6, seed=3)
    assert report.ok, report.lines()
    figures = report.recomputed
    assert figures["rows_scored_again"] == 6
    assert figures["positions"] > 0
    assert figures["cached_against_live_same_top_1"] == 1
    assert figures["cached_against_live_max"] <= (0.3 if "compact" in str(way) else 0.0)
    assert figures.get("live_against_live_max", 0) < 1e-2
    assert 0 < figures["nats_lost_by_keeping_k"] < 1
    assert report.lines()[-1] == "everything that is there is good"
    # A cache whose checksums are right and whose targets are not the teacher's.
    if not way:
        path = run / "teacher_logits.h5"
        reader = CacheReader(path)
        (made,) = (found for piece in cache_pieces(reader) for found in piece.runs())
        forged = dataclasses.replace(made, logsumexp=made.logsumexp + np.float32(0.5))
        said = {name: reader.attributes[name] for name in JOB_ATTRIBUTES}
        statistics = Statistics.of(forged).model_dump()
        write_cache(run / "forged.h5", forged, vocab_size=reader.vocab_size, **said, statistics=statistics)
        (run / "forged.h5").replace(path)
        assert list(wrong(run)) == [DIGESTS]


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_a_run_that_has_grown_is_scored_again_and_retried_as_it_is_now(here, streaming) -> None:
    way = [*here, f"distillation.dataset.streaming={streaming}"]
    for limit in ("20", "30", "all"):
        generate(load_config([*way, f"distillation.dataset.max_samples={limit}"]))
        run = cache_dir(here)
        before = tree(run)
        report = verify(run, recompute=4, seed=1)
        assert report.ok, report.lines()
        assert report.recomputed["rows_scored_again"] == 4
        # Nothing failed, so nothing is done; other settings would be refused.
        retry(run, overrides=[part for part in here if part.startswith("distillation.cluster")])
        assert tree(run) == before


def test_only_a_complete_run_can_be_recomputed(here, tmp_path) -> None:
    cache = generate(load_config(here))
    shutil.copy(cache, tmp_path / "c.h5")
    with pytest.raises(RunConflictError, match="expected a complete run to recompute rows of, got none"):
        verify(tmp_path / "c.h5", recompute=1)
    assert verify(tmp_path / "c.h5").ok


def test_an_index_that_lost_files_is_wrong(here) -> None:
    index = generate(load_config([*here, "distillation.cache.max_file_size=1KB"]))
    said = json.loads(index.read_text())
    for kept in range(1, 4):
        caches = said["caches"][:kept]
        whole = total_digest(entry["content_digest"] for entry in caches)
        index.write_text(json.dumps({**said, "caches": caches, "content_digest": whole}))
        assert list(wrong(index)) == ["documents, each row once and whole"]
    for caches, whole in (([], said["content_digest"]), (said["caches"][:1], said["content_digest"])):
        index.write_text(json.dumps({**said, "caches": caches, "content_digest": whole}))
        with pytest.raises(CacheError, match="merge again"):
            verify(index)


def test_a_grown_run_is_recomputed_once_it_is_complete(here, monkeypatch) -> None:
    generate(load_config([*here, "distillation.dataset.max_samples=20"]))
    with monkeypatch.context() as patched:
        patched.setattr("dask_logits.job.run.consolidate_run", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(load_config(here))
    with pytest.raises(RunConflictError, match="expected a complete run to recompute rows of"):
        verify(cache_dir(here), recompute=20)
