"""Kill a process at the steps of what it does to a folder: ``fault_points.py publish|consolidate FOLDER STRIDE``.

A step is every opening for writing, rename, link, removal and making of a folder below FOLDER (audit events), every
flush, and every write of the cache. A process is forked for each step, on a copy of the folder, and killed there with
SIGKILL; one line of JSON says where. Before, a process that is not killed counts the steps. With a stride of n, every
n-th step is taken and each of the last ones, which commit.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from builders import compact, records

from dask_logits.cache.profile import save_id_table
from dask_logits.cache.writer import CacheWriter
from dask_logits.data.tokens import Documents
from dask_logits.files import atomic
from dask_logits.files.atomic import create_json
from dask_logits.run.consolidate import consolidate_run
from dask_logits.run.folder import RunFolder
from dask_logits.run.plan import Partition
from dask_logits.run.plan_log import PlanLog
from dask_logits.run.records import FORMAT, VERSION
from dask_logits.teacher.meter import Cost
from dask_logits.teacher.scoring import Scored
from dask_logits.worker import task as task_module
from dask_logits.worker.task import PartitionTask, process_partition

ROWS, K, VOCAB_SIZE, PARTITIONS = 5, 3, 50, 3
WHAT = {
    "teacher.generation.top_k": K,
    "dataset.vocab_size": VOCAB_SIZE,
    "dataset.packing": "none",
}
# Steps at the end, taken with any stride.
_LAST = 24
NUMERICS = {
    "dtype": "float32", "device": "cpu", "torch_threads": 1, "path": {}, "batch_tokens": 64, "head_rows": 16,
}  # fmt: skip
_EVENTS = {"os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}


def make_run(folder: Path, partitions: int = PARTITIONS) -> RunFolder:
    """Make a run folder whose partitions are planned and not computed."""
    run = RunFolder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    how = {
        "job": {"keep_partitions": False},
        "cache": {"max_file_size": None},
        "teacher": {"model_path": "t"},
        "dataset": {},
    }
    said = {"fingerprint": "f", "what": WHAT, "numerics": {}, "total_workers": 1, "how": how, "teacher": {}}
    tokenizer = {"tokenizer_map_digest": None, "tokenizer_ids": 0}
    create_json(run.manifest_path, {"format": FORMAT, "version": VERSION, "run_id": "r", **said, **tokenizer})
    table = save_id_table(run.tables_path, compact(K, VOCAB_SIZE).id_table)
    storage = {"profile": "compact", "precision": 8, "id_table": table}
    create_json(run.calibration_path, {"numerics": NUMERICS, "storage": storage})
    log = PlanLog(run)
    log.append(((partitions, ROWS),), {})
    log.close("exhausted")
    return run


# What stands in for the dataset and the teacher in the module of the task: name → its stand-in.
STUBS: dict[str, Callable[..., object]] = {
    "read_rows": lambda files, column: [],
    "read_documents": lambda rows, spec, first_row: Documents(tokens=[], skipped={}, n_double_bos=0),
    "make_items": lambda documents, settings, first_row, masks: [],
    "environment": lambda device: {},
    "load_teacher": lambda spec, vocab_size, on_life: SimpleNamespace(device="cpu"),
    "encoder_for": lambda profile, device: None,
    "start_scoring": lambda *_, **__: lambda: None,
}


def publish(folder: Path, index: int = 0) -> None:
    """Compute and commit a partition, with a teacher that is pretended."""
    run = RunFolder(folder)
    made = records((4, 0, 2, 7, 3), k=K, vocab_size=VOCAB_SIZE, seed=index, first_row=index * ROWS)
    scored = Scored(records=made, seconds={}, splits={}, padded_tokens=0)
    vars(task_module).update({**STUBS, "start_scoring": lambda *_, **__: lambda: scored})
    task = PartitionTask(
        run=str(folder),
        run_id="r",
        partition=Partition(index=index, first_row=index * ROWS, n_rows=ROWS),
        files=(),
        column="text",
        tokenizer=None,
        items=SimpleNamespace(packing="none"),
        teacher=SimpleNamespace(device="cpu"),
        scoring=SimpleNamespace(vocab_size=VOCAB_SIZE),
        profile=run.profile(),
        cost=Cost(),
    )
    process_partition(task)


def consolidate(folder: Path) -> None:
    """Write the cache of a run whose partitions are committed."""
    consolidate_run(RunFolder(folder))


ACTS: dict[str, Callable[[Path], None]] = {"publish": publish, "consolidate": consolidate}


def die_at(step: int, folder: Path) -> list[int]:
    """Have this process killed at a step; return the count of steps, which grows."""
    count_of = [0]

    def count(what: str) -> None:
        count_of[0] += 1
        if count_of[0] == step:
            os.write(1, (json.dumps({"step": step, "at": what}) + "\n").encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, given: tuple[object, ...]) -> None:
        opened = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (opened or event in _EVENTS) and str(given[0]).startswith(str(folder)):
            count(f"{event} {Path(str(given[0])).name}")

    def counted(function: Callable[..., object], name: str) -> Callable[..., object]:
        def call(*given: object, **more: object) -> object:
            count(name)
            return function(*given, **more)

        return call

    atomic.os = SimpleNamespace(**{**vars(os), "fsync": counted(os.fsync, "fsync")})
    for name in ("append", "append_chunks", "finish"):
        setattr(CacheWriter, name, counted(getattr(CacheWriter, name), name))
    sys.addaudithook(hook)
    return count_of


def main(act: str, base: Path, stride: int) -> None:
    """Run the act once for each chosen step, each time on a copy ``base.STEP`` of the folder."""
    n_steps = _forked(act, base, 0)
    for step in range(1, n_steps + 1):
        if step % stride == 0 or step > n_steps - _LAST:
            _forked(act, base, step)


def _forked(act: str, base: Path, step: int) -> int:
    """Run the act in a process that is killed at a step, or at none. Return the number of steps."""
    folder = base.with_name(f"{base.name}.{step}")
    shutil.copytree(base, folder)
    theirs, ours = os.pipe()
    child = os.fork()
    if child == 0:
        count_of = die_at(step, folder)
        ACTS[act](folder)
        os.write(ours, str(count_of[0]).encode())
        os._exit(0)
    os.close(ours)
    _, status = os.waitpid(child, 0)
    with os.fdopen(theirs) as said:
        count = said.read()
    assert os.WIFSIGNALED(status) if step else os.WEXITSTATUS(status) == 0
    return int(count or 0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
