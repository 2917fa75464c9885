"""Targets at further temperatures, from the logits to the loss."""

from __future__ import annotations

import dataclasses

import h5py
import numpy as np
import pytest
import torch
from builders import (
    TEMPERATURES,
    compact,
    content,
    extras_of,
    packed_records,
    plain,
    records,
    run,
    write_cache,
)
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from dask_logits import CachedLogitsDataset, CacheError, ConfigError, Objective, convert, distillation_loss, verify
from dask_logits.cache.profile import as_kept
from dask_logits.cache.reader import CacheReader
from dask_logits.config.root import Config
from dask_logits.ops.show import card
from dask_logits.teacher.model import ScoringPath
from dask_logits.teacher.topk import padded_width, topk_with_tail

LENGTHS = (4, 0, 2, 7, 1, 3)
made = records(LENGTHS, k=3, temperatures=True)
profiles = pytest.mark.parametrize("profile", [plain(3, extras=extras_of(made)), compact(3, extras=extras_of(made))])


def tails(logp: torch.Tensor, ids: torch.Tensor, temperatures=TEMPERATURES) -> torch.Tensor:
    """Return the log of the mass outside some ids, at some temperatures."""
    return torch.stack(
        [(logp / T).log_softmax(-1).scatter(-1, ids, -torch.inf).logsumexp(-1) for T in temperatures], -1
    )


@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("path", [ScoringPath(), ScoringPath(compiled=True), ScoringPath(scale=2.0, softcap=5.0)])
def test_tails_are_those_of_the_scaled_logits(path: ScoringPath, refined: bool) -> None:
    torch.manual_seed(0)
    raw = torch.randn(40, 700) * 4
    logits = torch.full((40, padded_width(700)), -torch.inf, dtype=torch.bfloat16 if refined else torch.float32)
    logits[:, :700] = raw
    exact = path.finish(raw)
    top = topk_with_tail(
        logits, 20, vocab_size=700, path=path, temperatures=(0.5, 1.0, 3.0),
        refine=(lambda ids: exact.gather(1, ids)) if refined else None,
    )  # fmt: skip
    wanted = tails(exact.double(), top.ids_RK, (0.5, 1.0, 3.0))
    torch.testing.assert_close(top.tail_logmass_RJ.double(), wanted, rtol=0, atol=0.02 if refined else 1e-4)
    torch.testing.assert_close(top.tail_logmass_RJ[:, 1], top.tail_logmass_R, rtol=0, atol=1e-4)


def test_the_tail_at_a_temperature_does_not_cancel() -> None:
    logits = torch.full((1, 128), -40.0)
    logits[0, 5] = 20.0
    top = topk_with_tail(logits, 1, temperatures=(0.9,))
    assert top.tail_logmass_RJ.item() == pytest.approx(np.log(127) - 60 / 0.9, abs=1e-4)
    whole = topk_with_tail(torch.randn(3, 64), 64, temperatures=(2.0,))
    assert (whole.tail_logmass_RJ == -torch.inf).all()


@profiles
def test_a_cache_keeps_them(tmp_path, profile) -> None:
    write_cache(tmp_path / "teacher_logits.h5", made, profile=profile)
    reader = CacheReader(tmp_path / "teacher_logits.h5")
    assert reader.profile.extras.temperatures == TEMPERATURES
    kept = as_kept(made, profile)
    np.testing.assert_array_equal(reader.tokens(0, made.n_tokens)["tail_logmass_T"], kept.tail_logmass_T)
    assert verify(tmp_path / "teacher_logits.h5").ok
    assert card(tmp_path / "teacher_logits.h5")["temperatures"] == [1.0, *TEMPERATURES]
    changed = made.tail_logmass_T.copy()
    changed[5, 1] += 0.5
    assert content(made) != content(dataclasses.replace(made, tail_logmass_T=changed))
    assert content(made) != content(dataclasses.replace(made, tail_logmass_T=None))


@profiles
def test_a_conversion_keeps_them(tmp_path, profile) -> None:
    write_cache(tmp_path / "a.h5", made, profile=profile)
    there = convert(tmp_path / "a.h5", tmp_path / "b.h5", profile="compact" if profile.name == "plain" else "plain")
    found = CacheReader(there).tokens(0, made.n_tokens)["tail_logmass_T"]
    np.testing.assert_allclose(found, made.tail_logmass_T, rtol=1e-3)


def test_readers_that_do_not_know_them_refuse_the_file(tmp_path) -> None:
    path = tmp_path / "teacher_logits.h5"
    write_cache(path, made)
    with h5py.File(path) as file:
        assert file["tail_logmass_T"].attrs["critical"]


@pytest.mark.parametrize("values", [[2.0, 0.5], [0.5, 0.5], [0.5, 1.0], [-1.0, 2.0], [np.nan, 2.0], [0.5, np.inf]])
def test_damaged_temperatures_are_named(tmp_path, values) -> None:
    path = tmp_path / "teacher_logits.h5"
    write_cache(path, made)
    with h5py.File(path, "r+") as file:
        file["temperatures"][:] = values
    with pytest.raises(CacheError, match="expected 1 to 16 rising temperatures"):
        CacheReader(path)
    with h5py.File(path, "r+") as file:
        del file["temperatures"]
    with pytest.raises(CacheError, match="expected temperatures, got none"):
        CacheReader(path)


@pytest.mark.parametrize("value", [0.1, np.nan])
def test_verify_finds_a_mass_above_one(tmp_path, value: float) -> None:
    wrong = made.tail_logmass_T.copy()
    wrong[6, 1] = value
    write_cache(tmp_path / "teacher_logits.h5", dataclasses.replace(made, tail_logmass_T=wrong))
    problems = [problem for check in verify(tmp_path / "teacher_logits.h5").checks for problem in check.problems]
    assert problems == ["row 3, token 0: expected numbers, and no log-prob above 0"]


def reference(k: int, student_vocab: int | None = None) -> torch.Tensor:
    """Return the tails of k of the entries of `made`, by its own logits' definition."""
    logp, tail = torch.from_numpy(made.topk_logprobs).double(), torch.from_numpy(made.tail_logmass_T).double()
    kept = torch.arange(3) < k
    if student_vocab is not None:
        kept = kept & torch.from_numpy(made.topk_ids.astype(np.int64) < student_vocab)
    out = []
    for j, T in enumerate(TEMPERATURES):
        p = (logp / T).softmax(-1) * (1 - tail[:, j : j + 1].exp())
        out.append((tail[:, j].exp() + p.masked_fill(kept, 0.0).sum(-1)).log())
    return torch.stack(out, -1)


@pytest.mark.parametrize("options", [{"top_k": 2}, {"student_vocab_size": 30}, {"top_k": 1, "student_vocab_size": 30}])
def test_entries_that_are_dropped_go_to_the_tail_of_their_temperature(tmp_path, options) -> None:
    small = dataclasses.replace(
        made, input_ids=np.zeros_like(made.input_ids), label_logprob=made.label_logprob * np.nan
    )
    write_cache(tmp_path / "teacher_logits.h5", small)
    dataset = CachedLogitsDataset(tmp_path / "teacher_logits.h5", **options)
    found = torch.cat([item["tail_logmass_T"] for item in dataset])
    if set(options) == {"top_k", "student_vocab_size"}:
        # Absent entries come last, so that the first of those that are left is kept.
        present = torch.from_numpy(made.topk_ids.astype(np.int64)) < 30
        assert bool((found >= reference(3, 30).float() - 1e-3).all())
        assert bool((found[present.sum(1) <= 1] - reference(3, 30)[present.sum(1) <= 1]).abs().max() < 1e-3)
        return
    wanted = reference(options.get("top_k", 3), options.get("student_vocab_size"))
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("top_k", [None, 2])
def test_codes_decode_to_the_same_tails(tmp_path, top_k) -> None:
    path = tmp_path / "teacher_logits.h5"
    write_cache(path, made, profile=compact(3, extras=extras_of(made)))
    (here,) = DataLoader(CachedLogitsDataset(path, top_k=top_k), batch_size=9)
    coded = CachedLogitsDataset(path, top_k=top_k, decode="device")
    (there,) = DataLoader(coded, batch_size=9)
    torch.testing.assert_close(
        coded.decoder()(there["targets"]).tail_logmass_NJ, here["targets"].tail_logmass_NJ, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("profile", ["plain", "compact"])
def test_a_job_with_temperatures_trains_at_them_and_at_no_others(here, llama, profile) -> None:
    few = ["distillation.teacher.generation.temperatures=[2,1,0.5]", f"distillation.cache.profile={profile}"]
    path = run(here, *few)
    assert CacheReader(path).profile.extras.temperatures == (0.5, 2.0)
    dataset = CachedLogitsDataset(path)
    assert "temperatures: 0.5, 1, 2" in repr(dataset)
    (batch,) = DataLoader(dataset, batch_size=len(dataset))
    targets = batch["targets"]
    teacher = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        logits = teacher(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[..., :104]
    mask = targets.mask
    wanted = tails(logits[mask].double(), targets.topk_ids[mask])
    torch.testing.assert_close(targets.tail_logmass_NJ[mask].double(), wanted, rtol=2e-3, atol=2e-3)
    for temperature in (0.5, 2.0):
        same = distillation_loss(logits, targets, Objective(temperature=temperature))
        assert 0 <= same.divergence < 1e-4
    with pytest.raises(
        ConfigError, match=r"a tail for \(0\.5, 1, 2\), got 1\.5; make a cache with .*temperatures=\[1\.5"
    ):
        distillation_loss(logits, targets, Objective(temperature=1.5))


@pytest.mark.parametrize(("given", "kept"), [([2, 1, 2.0, 0.5], (0.5, 2.0)), (2, (2.0,)), ([], ()), ([1], ())])
def test_temperatures_are_sorted_and_one_is_always_there(given, kept) -> None:
    tree = {"teacher": {"model_path": "x", "generation": {"temperatures": given}}}
    assert Config.from_mapping(tree, dataset_given=True).teacher.generation.temperatures == kept


@pytest.mark.parametrize("given", [[0], [-1.0], ["2"], [True], [float("inf")], "2", [i / 10 for i in range(20, 40)]])
def test_other_temperatures_are_refused(given) -> None:
    tree = {"teacher": {"model_path": "x", "generation": {"temperatures": given}}}
    with pytest.raises(ConfigError, match=r"generation\.temperatures: expected list of float > 0"):
        Config.from_mapping(tree, dataset_given=True)


def test_packed_blocks_have_them_too(tmp_path) -> None:
    packed = packed_records()
    packed = dataclasses.replace(
        packed, tail_logmass_T=np.log(np.linspace(0.1, 0.9, 26, dtype=np.float32)).reshape(13, 2)
    )
    write_cache(tmp_path / "teacher_logits.h5", packed)
    items = list(CachedLogitsDataset(tmp_path / "teacher_logits.h5"))
    np.testing.assert_array_equal(torch.cat([item["tail_logmass_T"] for item in items]), packed.tail_logmass_T)
