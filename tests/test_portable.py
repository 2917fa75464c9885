"""The CPU path and the loader use nothing that macOS lacks. This is simulated; macOS itself is untested."""

from __future__ import annotations

import os
import sys

import warm
from builders import ROOT

# The worker is a thread of the process that lacks these names.
SCRIPT = """
import ctypes, os, sys
# The libraries that the package uses run on macOS by themselves.
import dask, datasets, distributed, h5py, psutil, torch, transformers, zarr

# The package is imported without these names.
for name in [name for name in sys.modules if name.split(".")[0] == "dask_logits"]:
    del sys.modules[name]

for name in ("sched_getaffinity", "sched_setaffinity", "preadv", "pwritev", "posix_fadvise", "posix_fallocate",
             "memfd_create", "copy_file_range", "splice", "O_DIRECT"):
    if hasattr(os, name):
        delattr(os, name)
sys.platform = "darwin"

class Library:
    def __init__(self, *arguments, **named):
        pass

ctypes.CDLL = Library

import pathlib
exists = pathlib.Path.exists
pathlib.Path.exists = lambda path, **named: not str(path).startswith(("/proc", "/sys")) and exists(path, **named)
open_descriptor = os.open

def opened(path, *arguments, **named):
    if str(path).startswith(("/proc", "/sys")):
        raise FileNotFoundError(path)
    return open_descriptor(path, *arguments, **named)

os.open = opened

from dask_logits import CachedLogitsDataset
from dask_logits.worker.task import process_partition, peak_rss_bytes
from dask_logits.teacher.checkpoint import set_memory
from dask_logits.cli import main
from dask_logits.job.gpus import cores
from dask_logits.job.capacity import free_memory_bytes

teacher, corpus, run = sys.argv[1:]
set_memory()
assert cores() >= 1 and peak_rss_bytes() > 0 and free_memory_bytes() > 0
cluster = distributed.LocalCluster(
    n_workers=1, threads_per_worker=1, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address=None
)
address = cluster.scheduler_address
main(["generate", f"distillation.teacher.model_path={teacher}", f"distillation.teacher.cache_dir={run}",
      "distillation.teacher.generation.top_k=8", "distillation.dataset.name=json",
      f"distillation.dataset.data_files={corpus}", "distillation.dataset.max_length=64",
      "distillation.dataset.max_samples=4", f"distillation.cluster.scheduler={address}"])
cluster.close()
dataset = CachedLogitsDataset(run)
print(len(dataset), len(dataset[0]["input_ids"]) > 0)
"""


def test_a_job_and_the_loader_run_without_what_only_linux_has(llama, corpus, tmp_path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(llama), str(corpus), str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = warm.run(command, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "4 True"
