"""Run static workers in parallel on this machine and merge their results: the command ``dask-logits-parallel``.

Each worker is a ``dask-logits generate`` process with its own GPUs and its share of the cores. It writes to its own log
file, so it does not depend on this process. New lines of all logs are printed here, prefixed with the worker's number.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click

from dask_logits.cli import Command, settings_argument

_POLL_SECONDS = 0.2
_GENERATION = "distillation.teacher.generation"


@dataclass(kw_only=True)
class _Worker:
    number: int
    process: subprocess.Popen[bytes]
    log: Path
    # How much of the log was printed.
    shown: int = 0

    def show(self) -> None:
        """Print the complete lines of the log that were not printed yet."""
        with self.log.open("rb") as file:
            file.seek(self.shown)
            lines = file.read().rpartition(b"\n")[0]
        for line in lines.decode(errors="replace").splitlines():
            _say(f"[worker {self.number}] {line}")
        self.shown += len(lines) + bool(lines)


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("count", metavar="N", type=click.IntRange(min=1))
@click.argument("devices", metavar="[DEVICES]", required=False)
@settings_argument
@click.option("--no-merge", is_flag=True, help="Do not merge the results.")
def main(count: int, devices: str | None, overrides: tuple[str, ...], no_merge: bool) -> None:
    """Score a dataset with N static workers that share one run folder, wait for them, and merge.

    \b
      dask-logits-parallel 4 0,1,2,3 distillation.dataset.name=Salesforce/wikitext …

    Workers take the GPUs DEVICES in turn, or all visible ones, each as many as gpus_per_worker says for
    each of its num_workers. They share the cores. After a failure, run the same command again: completed
    partitions are kept. The logs are in CACHE_DIR/logs/worker-I.log.

    Exit status: 0 done, 1 a worker or the merge failed, 2 wrong usage, 130 stopped.
    """
    if devices and "=" in devices:
        overrides, devices = (devices, *overrides), None
    sys.exit(_launch(count, devices, list(overrides), merge=not no_merge))


def _launch(count: int, devices: str | None, overrides: list[str], *, merge: bool) -> int:
    from dask_logits.config.compose import load_config
    from dask_logits.job.gpus import cores, gpu_groups
    from dask_logits.job.workers import local_device
    from dask_logits.run.folder import RunFolder

    if devices:
        overrides = [f"{_GENERATION}.devices='{devices}'", *overrides]
    config = load_config(overrides)
    generation = config.teacher.generation
    is_on_gpus = local_device(generation, config.cluster) == "cuda"
    groups = [",".join(group) for group in gpu_groups(generation)] if is_on_gpus else []
    n_dask_workers = generation.num_workers or 1
    folder = Path(config.teacher.cache_dir).expanduser()
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "dask_logits"]
    if generation.torch_threads == "auto":
        # Dask workers of a static worker share its cores. A run keeps its threads on a machine with other cores.
        threads: object = max(1, cores() // (count * n_dask_workers))
        manifest = None if generation.force_regenerate else RunFolder(folder).manifest()
        if manifest is not None:
            threads = manifest.numerics.get("teacher.generation.torch_threads", threads)
        overrides = [f"{_GENERATION}.torch_threads={threads}", *overrides]
    workers: list[_Worker] = []
    try:
        for number in range(count):
            places = range(number * n_dask_workers, (number + 1) * n_dask_workers)
            gpus = ",".join(groups[place % len(groups)] for place in places) if groups else ""
            environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpus} if gpus else {})
            log = logs / f"worker-{number}.log"
            share = [
                f"{_GENERATION}.worker_id={number}",
                f"{_GENERATION}.total_workers={count}",
                # A worker sees no other GPUs.
                f"{_GENERATION}.devices=null",
                "distillation.cluster.dashboard_address=null",
            ]
            with log.open("wb") as file:
                # In its own process group, so that Ctrl-C reaches a worker once, through this process.
                process = subprocess.Popen(
                    [*command, "generate", *overrides, *share],
                    stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, process_group=0,
                )  # fmt: skip
            workers.append(_Worker(number=number, process=process, log=log))
            where = f" on GPU {gpus}" if gpus else ""
            _say(f"worker {number}: process {process.pid}{where}, log {log}")
        failed = _wait(workers)
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.wait()
    if failed:
        _say("fix the cause and run the same command again: completed partitions are kept")
        return 1
    if merge:
        done = subprocess.run([*command, "merge", "--input-dir", str(folder), "--num-workers", str(count)], check=False)
        return min(done.returncode, 1)
    return 0


def _wait(workers: list[_Worker]) -> bool:
    """Show the logs until all workers have ended. Return whether one failed."""
    failed = False
    waiting = list(workers)
    while waiting:
        for worker in list(waiting):
            status = worker.process.poll()
            worker.show()
            if status is not None:
                waiting.remove(worker)
                # As shells report it: 128 plus the signal.
                status = 128 - status if status < 0 else status
                failed |= status != 0
                _say(f"worker {worker.number}: " + ("done" if status == 0 else f"failed with exit status {status}"))
        time.sleep(_POLL_SECONDS if waiting else 0)
    return failed


def _say(line: str) -> None:
    # The workers continue when the reader of this output has gone.
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(prog_name="dask-logits-parallel")
