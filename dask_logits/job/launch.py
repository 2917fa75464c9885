"""Refuse a job that was started several times by a launcher of parallel programs.

``torchrun``, ``accelerate launch``, ``mpirun`` and ``srun`` start one process for each GPU. This job is started once
and creates its own workers. Several equal drivers would only compete for the lock of the run folder.
"""

from __future__ import annotations

from collections.abc import Mapping

from dask_logits.config.groups import GenerationConfig
from dask_logits.errors import ClusterError

# Launcher → its variables for the index of a process and their number. A Slurm batch script also has SLURM_NTASKS, so
# only the variable that srun sets for its step counts.
_LAUNCHERS = {
    "torchrun or accelerate launch": ("RANK", "WORLD_SIZE"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
}
_PREFIX = "distillation.teacher.generation"


def check_launcher(generation: GenerationConfig, environment: Mapping[str, str]) -> None:
    """Refuse to run as one of several processes of a launcher, unless this is a static worker.

    Parameters
    ----------
    generation
        Settings. A static worker has its share of the partitions.
    environment
        Environment variables of this process.

    Raises
    ------
    ClusterError
        With the command to use.
    """
    if generation.worker_id is not None:
        return
    for launcher, (index_name, total_name) in _LAUNCHERS.items():
        index, total = environment.get(index_name, ""), environment.get(total_name, "")
        if index.isdecimal() and total.isdecimal() and int(total) > 1:
            raise ClusterError(
                f"generate: expected to be started once, got process {index} of {total} ({index_name}={index}, "
                f"{total_name}={total}); the job starts a worker for each GPU by itself: run `dask-logits generate …` "
                f"without {launcher}. To let each process take a share, set {_PREFIX}.worker_id={index} and "
                f"{_PREFIX}.total_workers={total}. To start the job from one process only, remove {total_name} from "
                "its environment"
            )
