"""A job on a real scheduler and real workers whose processes are killed at random, until it is done.

    python tests/chaos/chaos.py --runs 50 --partitions 200 [OVERRIDE …]

Workers (under nannies), nannies, the driver and the scheduler are separate processes; each is killed with SIGKILL now
and then and started again, while writing fails or is cut short (``faults.py``). Every run must end with the content
digest of an undisturbed one, having computed not much more than each partition once. One line of JSON per run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))
from builders import save_tokenizer, sentences, tiny_model, write_json_lines  # noqa: E402

PAUSE_SECONDS = (0.5, 4.0)
TARGETS = {"worker": 4, "nanny": 2, "driver": 2, "scheduler": 1}
MOST_SECONDS = 600


def make_job(folder: Path, partitions: int) -> list[str]:
    """Make a tiny teacher and a corpus; return the overrides of a job of so many partitions of two rows."""
    tiny_model("llama").save_pretrained(folder / "teacher")
    save_tokenizer(folder / "teacher")
    corpus = write_json_lines(folder / "corpus.jsonl", sentences(2 * partitions))
    return [
        f"distillation.teacher.model_path={folder / 'teacher'}",
        "distillation.teacher.generation.top_k=8",
        "distillation.teacher.generation.torch_threads=1",
        "distillation.dataset.name=json",
        f"distillation.dataset.data_files={corpus}",
        "distillation.dataset.max_length=16",
        "distillation.partition.rows=2",
        "distillation.cluster.dashboard_address=null",
        "distillation.job.stall_seconds=60",
    ]


def undisturbed(folder: Path, job: list[str]) -> str:
    """Return the content digest of the job, run in peace."""
    done = subprocess.run(
        [sys.executable, "-m", "dask_logits", "generate", *job, f"distillation.teacher.cache_dir={folder / 'calm'}",
         "cluster=local_cpu", "distillation.teacher.generation.num_workers=1", "distillation.job.stall_seconds=600"],
        capture_output=True, text=True, env=_environment(folder, 0), timeout=MOST_SECONDS,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr)
    return _status(folder / "calm")["content_digest"]


@dataclass
class Chaos:
    """One disturbed run.

    Parameters
    ----------
    folder
        Of the job; what the run writes lies in ``folder/SEED``.
    job
        Overrides.
    seed
        What the disturbances are drawn from.
    kills
        How many processes are killed, at most.
    """

    folder: Path
    job: list[str]
    seed: int
    kills: int
    killed: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.own = self.folder / str(self.seed)
        self.own.mkdir()
        self._file = self.own / "scheduler.json"
        self._environment = _environment(self.own, self.seed)
        self._draw = random.Random(self.seed)
        self._scheduler = self._driver = None
        self._nannies: list[subprocess.Popen[bytes]] = []

    def run(self) -> dict[str, object]:
        """Run the job to its end; return what happened."""
        started, drivers, exits = time.monotonic(), 1, []
        try:
            self._start_cluster()
            self._driver = self._start_driver()
            at = time.monotonic() + self._pause()
            while True:
                if time.monotonic() - started > MOST_SECONDS:
                    raise RuntimeError(f"seed {self.seed}: not done after {MOST_SECONDS} s: {exits}")
                if (code := self._driver.poll()) is not None:
                    exits.append(code)
                    if code == 0:
                        break
                    drivers += 1
                    self._driver = self._start_driver()
                if time.monotonic() > at and self.killed.total() < self.kills:
                    self._kill()
                    at = time.monotonic() + self._pause()
                self._repair()
                time.sleep(0.05)
        finally:
            self._stop()
        lines = Counter(" ".join(line.split()[:2]) for line in (self.own / "log").read_text().splitlines())
        attempts = sum(count for line, count in lines.items() if line.startswith("attempt"))
        return {
            "seed": self.seed,
            "digest": _status(self.own / "run")["content_digest"],
            "seconds": round(time.monotonic() - started, 1),
            "killed": dict(self.killed),
            "drivers": drivers,
            "attempts": attempts,
            "faults": {line.split()[1]: count for line, count in lines.items() if line.startswith("fault")},
        }

    def bound(self, partitions: int) -> int:
        """Return how many attempts are the most: each kill loses what four threads hold, each fault one."""
        lines = (self.own / "log").read_text().splitlines()
        return partitions + 8 * self.killed.total() + sum(line.startswith("fault") for line in lines)

    def _pause(self) -> float:
        return self._draw.uniform(*PAUSE_SECONDS)

    def _start(self, *command: str, log: str) -> subprocess.Popen[bytes]:
        with (self.own / log).open("ab") as out:
            return subprocess.Popen([sys.executable, "-m", *command], env=self._environment, stdout=out, stderr=out)

    def _start_cluster(self) -> None:
        self._file.unlink(missing_ok=True)
        self._scheduler = self._start(
            "dask", "scheduler", "--scheduler-file", str(self._file), "--host", "127.0.0.1", "--port", "0",
            "--no-dashboard", log="scheduler.log",
        )  # fmt: skip
        self._nannies += [self._start_worker() for _ in range(2 - len(self._nannies))]

    def _start_worker(self) -> subprocess.Popen[bytes]:
        return self._start(
            "dask", "worker", "--scheduler-file", str(self._file), "--nthreads", "2", "--memory-limit", "0",
            "--host", "127.0.0.1", "--no-dashboard", "--local-directory", str(self.own),
            "--preload", str(Path(__file__).with_name("faults.py")), log="workers.log",
        )  # fmt: skip

    def _start_driver(self) -> subprocess.Popen[bytes]:
        return self._start(
            "dask_logits", "generate", *self.job, f"distillation.teacher.cache_dir={self.own / 'run'}",
            f"distillation.cluster.scheduler_file={self._file}", "distillation.cluster.wait_seconds=60",
            log="driver.log",
        )  # fmt: skip

    def _kill(self) -> None:
        """Kill a process that is there."""
        (target,) = self._draw.choices(list(TARGETS), list(TARGETS.values()))
        nanny = self._draw.choice(self._nannies)
        process: psutil.Process | subprocess.Popen[bytes] | None = {
            "nanny": nanny, "driver": self._driver, "scheduler": self._scheduler,
        }.get(target)  # fmt: skip
        try:
            if process is None:
                children = psutil.Process(nanny.pid).children()
                process = next(child for child in children if "spawn_main" in " ".join(child.cmdline()))
            process.kill()
            self.killed[target] += 1
        except (psutil.Error, StopIteration):
            # It is being started.
            return

    def _repair(self) -> None:
        """Start again what was killed, but for the driver."""
        if self._scheduler.poll() is not None:
            for nanny in self._nannies:
                _end(nanny)
            self._nannies = []
            self._start_cluster()
        for nanny in [nanny for nanny in self._nannies if nanny.poll() is not None]:
            self._nannies.remove(nanny)
            self._nannies.append(self._start_worker())

    def _stop(self) -> None:
        for process in (self._driver, *self._nannies, self._scheduler):
            if process is not None:
                _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.Error:
        children = []
    process.kill()
    process.wait()
    for child in children:
        try:
            child.kill()
        except psutil.Error:
            continue


def _environment(folder: Path, seed: int) -> dict[str, str]:
    root = str(TESTS.parent)
    mine = {"CHAOS_LOG": str(folder / "log"), "CHAOS_SEED": str(seed), "HF_HUB_OFFLINE": "1", "PYTHONPATH": root}
    return {
        **os.environ,
        **mine,
        "HF_HOME": str(folder / "hf"),
        "DASK_DISTRIBUTED__SCHEDULER__WORKER_SATURATION": "1.0",
    }


def _status(run: Path) -> dict[str, str]:
    command = [sys.executable, "-m", "dask_logits", "status", str(run), "--json"]
    found: dict[str, str] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return found


def main() -> int:
    """Run so many seeds and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--partitions", type=int, default=200)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", help="more settings of the job, of which the last counts")
    arguments = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = [*make_job(folder, arguments.partitions), *arguments.overrides]
        expected = undisturbed(folder, job)
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.runs):
            chaos = Chaos(folder, job, seed, arguments.kills)
            found = chaos.run()
            found |= {"equal": found["digest"] == expected, "bound": chaos.bound(arguments.partitions)}
            bad += not found["equal"] or int(str(found["attempts"])) > int(str(found["bound"]))
            line = json.dumps(found)
            print(line, flush=True)
            if arguments.out:
                with arguments.out.open("a") as out:
                    out.write(line + "\n")
    print(f"{arguments.runs - bad} of {arguments.runs} runs ended as they should")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
