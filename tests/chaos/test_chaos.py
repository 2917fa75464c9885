"""A job whose processes are killed at random ends as an undisturbed one."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos import Chaos, make_job, undisturbed

GENERATION = "distillation.teacher.generation"


def end_alike(folder: Path, *overrides: str, partitions: int, kills: int, seeds: range) -> None:
    job = [*make_job(folder, partitions), *overrides]
    expected = undisturbed(folder, job)
    for seed in seeds:
        chaos = Chaos(folder, job, seed, kills)
        found = chaos.run()
        assert found["digest"] == expected, found
        assert partitions <= found["attempts"] <= chaos.bound(partitions), found
        assert chaos.killed.total() > 0


@pytest.mark.slow
def test_a_job_survives_its_processes(tmp_path) -> None:
    end_alike(tmp_path, partitions=40, kills=3, seeds=range(1))


@pytest.mark.slow
def test_draws_are_the_same_after_kills(tmp_path) -> None:
    sampled = (f"{GENERATION}.targets=sample", f"{GENERATION}.top_k=64")
    end_alike(tmp_path, *sampled, "distillation.cache.profile=compact", partitions=40, kills=3, seeds=range(1))


@pytest.mark.slow
def test_a_longer_job_survives_them_again_and_again(tmp_path) -> None:
    end_alike(tmp_path, partitions=200, kills=12, seeds=range(100, 103))
