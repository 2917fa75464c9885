"""Every command and every example of the longer documents, run in a folder like a checkout after the quickstart.

docs/DISTILLATION.md has a test of its own, tests/test_distillation_page.py.

A document stands as its reader would type it. What differs here: the teacher and the data are tiny, jobs that name no
cluster join the one that the document itself starts, GPUs and Slurm are pretended, names of a hub are only composed.
"""

from __future__ import annotations

import ast
import contextlib
import gzip
import json
import logging
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import HEAD_WIDTH, cache_dir, finish, save_tokenizer, sentences, tiny_model, wait_for, write_json_lines

import dask_logits
from dask_logits import CachedLogitsDataset, load_config, read_status
from dask_logits.cache.reader import CacheReader
from dask_logits.cli import main
from dask_logits.config.root import settings

ROOT = Path(__file__).parents[1]
ADVANCED = ROOT / "docs" / "TEACHER_LOGITS_ADVANCED.md"
DISTILLATION = ROOT / "docs" / "DISTILLATION.md"
IMPROVEMENTS = ROOT / "IMPROVEMENTS_TEACHER_LOGITS.md"
DOCUMENTS = (ADVANCED, DISTILLATION, IMPROVEMENTS)
# Pages of the documentation site only.
PAGES = [
    *(ROOT / "docs" / f"{name}.md" for name in ("index", "tutorial", "explanation", "troubleshooting")),
    *sorted((ROOT / "docs" / "guides").glob("*.md")),
    *sorted((ROOT / "docs" / "reference").glob("*.md")),
]
FENCE = re.compile(r"^```(.*?)\n(.*?)^```$", re.S | re.M)
GENERATION = "distillation.teacher.generation"
JOIN = "distillation.cluster.scheduler_file=scheduler.json"
# On a hub, which tests/test_hub.py stands in for.
HUB = {"HuggingFaceFW/fineweb", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-0.6B"}
# A test hook of dask-cuda, not an API.
PRETENDED = {"DASK_CUDA_TEST_DISABLE_DEVICE_SPECIFIC": "1", "CUDA_VISIBLE_DEVICES": "0"}
BIN = Path(sys.executable).parent

SBATCH = """#!/usr/bin/env bash
# As Slurm does: a copy of the script is run, with its environment.
export SLURM_JOB_ID=7 SLURM_JOB_NUM_NODES=1 SLURM_SUBMIT_DIR=$PWD SLURM_CPUS_PER_TASK=2
while [[ $1 == --* ]]; do
  case $1 in --gpus-per-node=*) export SLURM_GPUS_ON_NODE=${1#*=} ;; esac
  shift
done
cp "$1" "$FAKES/slurm_script"
exec bash "$FAKES/slurm_script" "${@:2}"
"""
SRUN = """#!/usr/bin/env bash
echo "$@" >"$FAKES/srun-arguments"
# As Slurm does: the tasks of the allocation outrank --ntasks-per-node.
tasks=${SLURM_NTASKS:-1}
while [[ $1 == --* ]]; do
  case $1 in --ntasks=*) tasks=${1#*=} ;; esac
  shift
done
case ${FAKE_WORKERS:-real} in
  real) for ((i = 1; i < tasks; i++)); do "$@" & done; exec "$@" ;;
  idle) exec sleep 600 ;;
  lost) exit 1 ;;
esac
"""
# A driver with one GPU.
NVML = """
class NVMLError(Exception): ...
NVMLError_LibraryNotFound = NVMLError_DriverNotLoaded = type("NVMLError_DriverNotLoaded", (NVMLError,), {})
NVMLError_Unknown = type("NVMLError_Unknown", (NVMLError,), {})
NVMLError_NotSupported = type("NVMLError_NotSupported", (NVMLError,), {})
def nvmlInit(): ...
def nvmlDeviceGetCount(): return 1
def nvmlDeviceGetHandleByIndex(index):
    if index != 0:
        raise NVMLError("Invalid Argument")
    return index
"""


def commands(text: str) -> list[list[str]]:
    """Split a block into its commands."""
    lines = (shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines())
    return [words for words in lines if words]


def blocks(document: Path, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(document.read_text()) if found == language]


def all_commands(document: Path) -> list[list[str]]:
    return [words for block in blocks(document, "bash") for words in commands(block)]


def quickstart() -> list[str]:
    """The overrides of the quickstart."""
    (call,) = re.findall(
        r"dask-logits generate \\\n((?:  distillation.* \\\n)+)", (ROOT / "scripts/quickstart.sh").read_text()
    )
    return commands(call + "\n")[0]


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    """A folder like a checkout in which the quickstart has run, with the cluster that the document starts."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("scripts", "config", "notebooks", "docs"):
        (folder / name).symlink_to(ROOT / name)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    started: list[subprocess.Popen] = []
    try:
        for words in all_commands(ADVANCED):
            if words[0] == "export":
                environment |= dict([words[1].split("=", 1)])
            elif "dask" in words[:2]:
                started.append(start(words, folder, environment))
                wait_for((folder / "scheduler.json").exists, started[0])
        # The last one shows how to add the page to its dashboard.
        servers = [words[words.index("dask") + 1] for words in all_commands(ADVANCED) if "dask" in words[:2]]
        assert servers == ["scheduler", "worker", "worker", "worker", "scheduler"]
        fill(folder)
        with inside(folder):
            main(["generate", *quickstart(), JOIN])
            yield folder
        assert [process.poll() for process in started] == [None] * len(started)
    finally:
        # Workers that lose their scheduler take longer to end.
        for servers in (started[1:], started[:1]):
            for process in servers:
                process.terminate()
            for process in servers:
                process.wait(30)


def start(words: list[str], folder: Path, environment: dict[str, str]) -> subprocess.Popen:
    """Start a server of Dask on loopback, without the GPU that a command names."""
    words = [word for word in words[words.index("dask") + 1 :] if word != "&"]
    more = {
        "scheduler": ["--port", "0", "--dashboard-address", "127.0.0.1:0"],
        "worker": ["--no-dashboard", "--local-directory", str(folder)],
    }[words[0]]
    with (folder / f"{words[0]}.log").open("a") as log:
        return subprocess.Popen(
            [BIN / "dask", *words, "--host", "127.0.0.1", *more],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
        )


def fill(folder: Path) -> None:
    """Write a teacher and data under the names that the documents use."""
    from transformers import AutoTokenizer

    teacher = folder / "output" / "models" / "SmolLM2-135M-Instruct"
    tiny_model("llama", max_position_embeddings=2048).save_pretrained(teacher)
    save_tokenizer(teacher, HEAD_WIDTH)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.eos_token = "w0"
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer.save_pretrained(teacher)
    (folder / "output" / "corpus").mkdir()
    write_json_lines(folder / "output" / "corpus" / "python-reference.jsonl", sentences(40, longest=600))
    (folder / "data").mkdir()
    for i in range(3):
        pq.write_table(
            pa.table({"text": sentences(30, seed=i)}), folder / "data" / f"{i:05}.parquet", row_group_size=12
        )
        lines = write_json_lines(folder / "data" / "lines", sentences(20, seed=9 + i))
        (folder / "data" / f"{i:05}.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
        lines.unlink()
    fakes = folder / "fakes"
    fakes.mkdir()
    for name, script in (("sbatch", SBATCH), ("srun", SRUN)):
        (fakes / name).write_text(script)
        (fakes / name).chmod(0o755)


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder, and leave the process as it was."""
    package = logging.getLogger("dask_logits")
    kept = (package.handlers, package.level, package.propagate)
    handler = signal.getsignal(signal.SIGTERM)
    hidden = pytest.MonkeyPatch()
    hidden.setenv("CUDA_VISIBLE_DEVICES", "")
    try:
        with contextlib.chdir(folder):
            yield
    finally:
        hidden.undo()
        signal.signal(signal.SIGTERM, handler)
        package.handlers, package.level, package.propagate = kept


def shell(words: list[str], folder: Path, status: int = 0, **environment: str) -> str:
    """Run a program in a process group of its own, of which nothing may be left; return what it wrote to stderr."""
    fakes = folder / "fakes"
    path = f"{fakes}:{BIN}:{os.environ['PATH']}"
    process = subprocess.Popen(
        words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PATH": path, "FAKES": str(fakes), "DASK_INTERFACE": "lo", **environment},
    )  # fmt: skip
    try:
        errors = finish(process)
        assert process.returncode == status, errors
        assert gone(process.pid), f"{words[0]} left processes behind"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return errors


def gone(group: int) -> bool:
    """Whether a process group has ended, which may take its last members a moment."""
    for _ in range(3000):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def run_command(words: list[str], folder: Path) -> None:
    """Run a command of a document; one that no rule knows fails."""
    match words:
        case ["export" | "dask", *_] | [_, "dask", *_]:
            # The fixture has done it.
            assert words in all_commands(ADVANCED)
        case ["scripts/quickstart.sh"]:
            # The fixture has done what it leaves.
            assert Path("output/quickstart/teacher_logits.h5").exists()
        case ["dask-logits", "plan", "--measure", *overrides]:
            # A scheduler's workers cannot be measured.
            if load_config(overrides).teacher.model_path not in HUB:
                main(words[1:])
        case ["dask-logits", "generate" | "plan", *overrides]:
            run_job(words[1], overrides)
        case ["dask-logits", "status" | "report" | "explore" | "verify" | "merge" | "show" | "convert", *_]:
            main(words[1:])
        case ["python", "scripts/distill.py", *overrides] if any(
            f"student.model_path={name}" in overrides for name in HUB
        ):
            assert runpy.run_path(words[1])["read_settings"](overrides).model_path in HUB
        case ["python", script, *arguments]:
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(sys, "argv", [script, *arguments])
                runpy.run_path(script, run_name="__main__")
        case ["scripts/generate_teacher_logits_parallel.sh" | "sbatch", *_]:
            shell([*words, f"{GENERATION}.device=cpu"], folder, **PRETENDED)
        case _:
            pytest.fail(f"no rule runs {shlex.join(words)}")


def run_job(command: str, overrides: list[str]) -> None:
    config = load_config(overrides)
    if {config.dataset.name, config.teacher.model_path} & HUB:
        return
    generation = config.teacher.generation
    more = [JOIN]
    if generation.devices or generation.worker_id is not None or config.cluster.scheduler_file:
        more = ["distillation.cluster.dashboard_address=null"]
    with pytest.MonkeyPatch.context() as patched:
        if generation.devices:
            patched.setenv("CUDA_VISIBLE_DEVICES", generation.devices)
            patched.setenv("DASK_CUDA_TEST_DISABLE_DEVICE_SPECIFIC", "1")
            more += ["cluster=local_cuda", f"{GENERATION}.device=cpu"]
        main([command, *overrides, *more])


def run_document(document: Path, folder: Path) -> dict:
    """Run what a document shows, in order; return the names that its examples leave.

    A block of text is output. A name in braces is a directive of the documentation site.
    """
    names: dict = {"__name__": "__main__"}
    for language, body in FENCE.findall(document.read_text()):
        if language == "bash":
            for words in commands(body):
                run_command(words, folder)
        elif language != "text" and not language.startswith("{"):
            assert language == "python", f"{document.name}: a block of {language!r}, which nothing runs"
            body = re.sub(r"load_config\(\s*\[", f'load_config(["{JOIN}", ', body)
            exec(compile(body, document.name, "exec"), names)
    return names


def digest(path: str) -> str:
    return CacheReader(Path(path) / "teacher_logits.h5").attributes["content_digest"]


@pytest.mark.parametrize("document", [*DOCUMENTS, *PAGES], ids=lambda path: path.stem)
def test_every_job_of_the_documents_composes(document) -> None:
    jobs = [
        [word for word in words[2:] if not word.startswith("--")]
        for words in all_commands(document)
        if words[:2] in (["dask-logits", "generate"], ["dask-logits", "plan"])
    ]
    jobs += [words[words.index("--") + 1 :] for words in all_commands(document) if "--" in words]
    for overrides in jobs:
        assert load_config(overrides).teacher.model_path


@pytest.mark.slow
def test_every_command_and_every_example_of_the_documents_runs(checkout) -> None:
    # One test, because the documents share the cluster and the caches that the first of them makes.
    check_advanced(run_document(ADVANCED, checkout))
    assert len(run_document(IMPROVEMENTS, checkout)["dataset"]) == 90


def check_advanced(names: dict) -> None:
    for words in all_commands(ADVANCED):
        if words[:2] == ["dask-logits", "generate"]:
            config = load_config(words[2:])
            if config.dataset.name not in HUB and config.teacher.generation.worker_id is None:
                assert read_status(config.teacher.cache_dir).state == "complete", words
    assert read_status("output/parquet").statistics.documents == 90
    one_job = {digest(f"output/{name}") for name in ("gpus", "machines", "slurm", "shared", "parts")}
    assert len(one_job) == 1
    assert len(CachedLogitsDataset("output/parts/teacher_logits.index.json")) == 40
    assert digest("output/generator") != digest("output/lines")
    assert read_status("output/windows").statistics.documents > 40
    assert names["last"].state == "complete"
    assert names["positions"] > 1000
    assert names["equal"] > 0.99 * names["positions"]
    assert max(names["differences"]) < 0.05
    assert sorted(path.name for path in Path("output/slurm-7").iterdir()) == ["scheduler.log", "workers.log"]


def test_a_command_that_no_rule_knows_fails() -> None:
    with pytest.raises(pytest.fail.Exception, match="no rule runs rm -r output"):
        run_command(["rm", "-r", "output"], ROOT)


def slurm_job(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a batch script."""
    return {"SLURM_JOB_ID": "8", "SLURM_JOB_NUM_NODES": "1", "SLURM_SUBMIT_DIR": str(folder), **more}


@pytest.mark.parametrize(
    ("workers", "more", "status", "message"),
    [
        ("idle", ["distillation.dataset.nam=x"], 2, "did you mean 'distillation.dataset.name'?"),
        ("lost", [], 1, "all workers have ended; see "),
    ],
)
def test_the_slurm_recipe_says_how_it_ended_and_leaves_nothing(
    workers, more, status, message, overrides, tmp_path
) -> None:
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    (fakes / "srun").write_text(SRUN)
    (fakes / "srun").chmod(0o755)
    script = [str(ROOT / "scripts" / "slurm_teacher_logits.sh"), *overrides, *more]
    slurm = slurm_job(
        tmp_path, SLURM_JOB_NUM_NODES="2", SLURM_CPUS_PER_TASK="3", WORKERS_PER_NODE="3", FAKE_WORKERS=workers
    )
    assert message in shell(script, tmp_path, status, **slurm)
    arguments = (fakes / "srun-arguments").read_text()
    assert " -m dask worker --nworkers 3 --nthreads 2 --scheduler-file " in arguments
    assert arguments.startswith("--nodes=2 --ntasks=2 --ntasks-per-node=1 ")
    assert " --cpus-per-task=3 " in arguments
    logs = tmp_path / "output" / "slurm-8"
    assert sorted(path.name for path in logs.iterdir()) == ["scheduler.log", "workers.log"]


@pytest.mark.parametrize("hidden", ["NoDevFiles", pytest.param("-1", marks=pytest.mark.slow)])
def test_the_slurm_recipe_scores_on_cpus_of_a_node_whose_gpus_are_hidden(hidden, overrides, tmp_path) -> None:
    fakes, modules = tmp_path / "fakes", tmp_path / "modules"
    for folder, name, text in ((fakes, "srun", SRUN), (modules, "pynvml.py", NVML)):
        folder.mkdir()
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    script = [str(ROOT / "scripts" / "slurm_teacher_logits.sh"), *overrides]
    slurm = slurm_job(tmp_path, PYTHON=sys.executable)
    path = os.pathsep.join([str(modules), str(ROOT), os.environ.get("PYTHONPATH", "")])
    shell(script, tmp_path, CUDA_VISIBLE_DEVICES=hidden, PYTHONPATH=path, **slurm)
    assert read_status(cache_dir(overrides)).state == "complete"


NONE_WITH_TWO = "gpus_per_worker: expected workers with 2 GPUs each, got none:"


@pytest.mark.parametrize(
    ("size", "visible", "on_node", "groups", "real", "message"),
    [
        (2, "3,1,0,2,7", "5", ["0,2", "3,1"], False, "cluster: expected a worker within 1 s, got none;"),
        (2, "5", "1", [], False, "all workers have ended; see "),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (2, "3,1,0,2,7", "5", ["0,2", "3,1"], True, NONE_WITH_TWO),
                (2, "", "4", ["0,1", "2,3"], True, NONE_WITH_TWO),
                (1, "GPU-e3,GPU-e0", "2", ["GPU-e0", "GPU-e3"], True, "device: expected workers with a GPU, got none:"),
            )
        ),
    ],
)
def test_the_slurm_recipe_starts_a_worker_for_each_group_of_gpus(
    size, visible, on_node, groups, real, message, overrides, tmp_path
) -> None:
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    # Workers that are not real only sleep.
    work = "" if real else "exec sleep 600"
    note = (
        'case "$*" in "-m dask worker"*)'
        f' echo "$CUDA_VISIBLE_DEVICES $CUDA_DEVICE_ORDER $*" >>"$FAKES/workers"; {work};; esac'
    )
    for name, script in (("srun", SRUN), ("python", f'#!/bin/sh\n{note}\nexec "{sys.executable}" "$@"\n')):
        (fakes / name).write_text(script)
        (fakes / name).chmod(0o755)
    script = [str(ROOT / "scripts" / "slurm_teacher_logits.sh"), *overrides]
    script += [f"{GENERATION}.gpus_per_worker=2"] if size == 2 else [f"{GENERATION}.device=cuda"]
    script += [] if real else ["distillation.cluster.wait_seconds=1"]
    slurm = slurm_job(
        tmp_path, SLURM_GPUS_ON_NODE=on_node, SLURM_NTASKS="2", SLURM_NTASKS_PER_NODE="2", SLURM_CPUS_PER_TASK="3"
    )
    # The workers see no GPUs, because there are none.
    status = 2 if groups else 1
    errors = shell(script, tmp_path, status, CUDA_VISIBLE_DEVICES=visible, PYTHON=str(fakes / "python"), **slurm)
    assert message in errors
    assert " --cpus-per-task=6 " in (fakes / "srun-arguments").read_text()
    if not groups:
        log = (tmp_path / "output" / "slurm-8" / "workers.log").read_text()
        assert re.fullmatch(r"expected 2 GPUs or more on \S+, got 1\n", log)
        return
    started = sorted((fakes / "workers").read_text().splitlines())
    assert [line.split()[0] for line in started] == groups
    for line in started:
        assert " PCI_BUS_ID -m dask worker --nworkers 1 --nthreads 3 --scheduler-file " in line
        assert " --memory-limit 0 --death-timeout 300 --interface lo" in line


@pytest.mark.parametrize("warning", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_the_slurm_recipe_stops_in_order_when_slurm_warns(warning, overrides, tmp_path) -> None:
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    (fakes / "srun").write_text(SRUN)
    (fakes / "srun").chmod(0o755)
    script = [str(ROOT / "scripts" / "slurm_teacher_logits.sh"), *overrides]
    slurm = slurm_job(tmp_path, FAKE_WORKERS="idle", DASK_INTERFACE="lo")
    # A command in PATH is taken as it is, and this one is no Python.
    assert "the scheduler ended early" in shell(script, tmp_path, 1, PYTHON="false", **slurm)
    path = f"{fakes}:{BIN}:{os.environ['PATH']}"
    process = subprocess.Popen(
        script, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, **slurm, "PATH": path, "FAKES": str(fakes)},
    )  # fmt: skip
    try:
        assert process.stderr is not None
        assert any("INFO joining tcp://" in line for line in process.stderr)
        process.send_signal(warning)
        errors = finish(process)
        assert process.returncode == 130, errors
        assert "dask-logits: stopped; run the same command again to go on" in errors
        assert gone(process.pid), "the script left processes behind"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_the_slurm_preset_joins_the_scheduler_that_the_environment_names(monkeypatch) -> None:
    needed = ["distillation.teacher.model_path=t", "distillation.dataset.name=d", "cluster=slurm"]
    monkeypatch.delenv("DASK_LOGITS_SCHEDULER_FILE", raising=False)
    with pytest.raises(dask_logits.ConfigError, match="expected an address or a scheduler_file, got neither"):
        load_config(needed)
    monkeypatch.setenv("DASK_LOGITS_SCHEDULER_FILE", "/a folder/s=1,2.json")
    cluster = load_config(needed).cluster
    assert (cluster.kind, cluster.scheduler_file) == ("scheduler", "/a folder/s=1,2.json")


@pytest.mark.parametrize("document", [*DOCUMENTS, *PAGES], ids=lambda path: path.stem)
def test_settings_files_and_links_that_are_named_exist(document: Path) -> None:
    text = document.read_text()
    known = {setting.path for setting in settings()}
    groups = {path.rsplit(".", n)[0] for path in known for n in (1, 2, 3)}
    for name in re.findall(r"distillation(?:\.[a-z_]+)+", text):
        assert name in known | groups, name
    for name in re.findall(
        r"\b(?:scripts|docs|benchmarks|notebooks|tests|config)/[\w./-]+\.(?:sh|py|md|ipynb|yaml)", text
    ):
        assert (ROOT / name).exists(), name
    for name, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
        target = (document.parent / name) if name else document
        assert target.exists(), name
        headings = re.findall(r"^#+ (.*)$", FENCE.sub("", target.read_text()), re.M) if anchor else []
        slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, f"{name}#{anchor}"
    for name in re.findall(r"\b(cluster=\w+)\b", text):
        assert (ROOT / "config" / "cluster" / f"{name.partition('=')[2]}.yaml").exists(), name
    for variable in re.findall(r"\b(?:DASK_LOGITS|WORKERS_PER|DASK_INTERFACE)[A-Z_]*", text):
        assert variable in (ROOT / "scripts" / "slurm_teacher_logits.sh").read_text(), variable


def sayings() -> str:
    """Every text of the package, with … for what is filled in."""
    found = []
    for path in (ROOT / "dask_logits").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return " ".join(" ".join(found).replace("'…'", "…").split())


@pytest.mark.parametrize(
    ("title", "at_least"),
    [("## Messages of a job", 20), ("## Messages when you train", 10)],
    ids=["job", "training"],
)
def test_messages_in_the_troubleshooting_tables_are_real(title, at_least) -> None:
    section = (ROOT / "docs" / "troubleshooting.md").read_text().partition(title)[2].partition("\n## ")[0]
    messages = re.findall(r"^\| `(.*?)` \|", section, re.M)
    assert len(messages) > at_least
    said = sayings()
    for message in messages:
        assert message.removesuffix("…").strip() in said, message


def test_sizes_in_the_advanced_document_are_those_of_the_format() -> None:
    from dask_logits.records import bytes_per_token
    from dask_logits.worker.calibrate import auto_budgets

    text = ADVANCED.read_text()
    rows = [tuple(map(int, row)) for row in re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \|$", text, re.M)]
    assert [(k, bytes_per_token(k, 65_536), bytes_per_token(k, 65_537)) for k in (16, 32, 64, 128)] == rows
    budgets = [auto_budgets(device, "auto", "auto") for device in ("cpu", "cuda")]
    for setting, cpu, cuda in zip(("batch_tokens", "head_rows"), *budgets, strict=True):
        assert f"`{GENERATION}.{setting}` | {cpu:,} on CPU, {cuda:,} on GPU |" in text


def test_figures_of_the_before_and_after_document_were_measured() -> None:
    section = IMPROVEMENTS.read_text().partition("## Speed and memory")[2].partition("\n## ")[0]
    found = json.loads((ROOT / "benchmarks/results/2026-11-23-cpu-capture-fused.json").read_text())
    rows = [line.strip("| ").split(" | ")[1:] for line in section.splitlines() if line.startswith("| ")][1:4]
    sides = ("loop", "ours")
    assert rows == [
        [f"{found['tokens_per_second'][side]:,.0f}" for side in sides],
        [f"{found['mfu'][side]:.2f}" for side in sides],
        [f"{found['peak_rss_bytes'][side] / 2**30:.2f} GiB" for side in sides],
    ]
    ratios = found["ratios"]["loop"]
    assert f"{found['ratio']['loop']:.2f} ({min(ratios):.2f}–{max(ratios):.2f} in three rounds)" in section
