"""Wrong starts are refused with the right command: by a launcher of parallel programs, or on GPUs that are absent."""

from __future__ import annotations

import pytest
from builders import cache_dir

from dask_logits import ClusterError, generate, load_config
from dask_logits.config.groups import ClusterConfig, GenerationConfig
from dask_logits.job.launch import check_launcher
from dask_logits.job.workers import local_device


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, "without torchrun or accelerate launch"),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}, "without mpirun"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, "without srun"),
    ],
)
def test_one_of_several_processes_of_a_launcher_is_refused(environment, launcher) -> None:
    with pytest.raises(ClusterError, match=r"expected to be started once, got process 1 of 4") as caught:
        check_launcher(GenerationConfig(), environment)
    assert launcher in str(caught.value)
    assert "generation.worker_id=1 and distillation.teacher.generation.total_workers=4" in str(caught.value)
    check_launcher(GenerationConfig(worker_id=1, total_workers=4), environment)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},
        {"RANK": "x", "WORLD_SIZE": "y"},
    ],
    ids=["plain", "torchrun with one process", "batch script of Slurm", "variables of another program"],
)
def test_a_process_on_its_own_is_not_refused(environment) -> None:
    check_launcher(GenerationConfig(), environment)


def test_a_start_by_torchrun_leaves_nothing(overrides, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ClusterError, match="expected to be started once"):
        generate(load_config(overrides))
    assert not cache_dir(overrides).exists()


@pytest.mark.parametrize("asked", [{"devices": "0"}, {"device": "cuda"}])
def test_gpus_that_are_not_there_are_refused_instead_of_computing_on_the_cpu(asked, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ClusterError, match=r"expected (a )?visible GPUs? for .*, got none"):
        local_device(GenerationConfig(**asked), ClusterConfig())
