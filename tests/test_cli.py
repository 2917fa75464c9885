"""The commands as a user types them, in processes of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import warm
from builders import tree

from dask_logits.cache.reader import CacheReader
from dask_logits.config.root import settings

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "cache" / "golden" / "v1.0-plain.h5"


def run(*arguments: str, module: tuple[str, ...] = ("-m", "dask_logits"), cwd=None) -> subprocess.CompletedProcess:
    return warm.run([sys.executable, *module, *arguments], cwd=cwd)


def test_generate_and_status(joined, tmp_path) -> None:
    done = run("generate", *joined, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rows          40 of 40" in done.stdout
    assert re.search(r"perplexity    \d+\.\d\d", done.stdout)
    assert f"cache         {tmp_path / 'run' / 'teacher_logits.h5'}" in done.stdout
    assert "\nnext          dask-logits show " in done.stdout
    assert re.search(r"4/4 partitions · 40 documents · [\d,]+ tokens · [\d,]+ tokens/s · all scored · kept mass 0\.\d+",
                     done.stderr)  # fmt: skip
    assert len(re.findall(r"INFO partition 00000\d: \d+ documents, \d+ tokens, \d+ tokens/s", done.stderr)) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"], "Hydra leaves nothing in the working directory"
    said = json.loads(run("status", str(tmp_path / "run"), "--json").stdout)
    assert (said["state"], said["documents"]) == ("complete", 40)
    again = run("generate", *joined, cwd=tmp_path)
    assert again.stdout == done.stdout
    assert "is complete: nothing to do" in again.stderr


def test_whoever_reads_the_answer_may_stop_early() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "dask_logits", "show", str(GOLDEN)], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_script_is_the_same_command(joined, tmp_path) -> None:
    script = (str(ROOT / "scripts" / "generate_teacher_logits.py"),)
    done = run(*joined, module=script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert CacheReader(tmp_path / "run" / "teacher_logits.h5").n_documents == 40


def test_plan_says_what_it_takes_and_writes_nothing(overrides, tmp_path) -> None:
    before = tree(tmp_path)
    done = run("plan", *overrides, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for line in ("rows          40", "partitions    4 of 12 rows", "speed  ", "time  ", "peak disk",
                 "peak memory", "free here"):  # fmt: skip
        assert line in done.stdout
    assert "planning: " in done.stderr
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "distillation.dataset.nam=x"), "did you mean 'distillation.dataset.name'?"),
        (("generate", "distillation.teacher.generation.top_k=zero"), "expected int ≥ 1, got 'zero'"),
        (("generate", "teacher_logits.top_k=3"), "use distillation.teacher.generation.top_k=3"),
        (("generate", "cluster=lokal"), "cluster: expected one of auto, local_cpu, local_cuda, scheduler"),
        (("generate", "--top_k=16"), "have no dashes: write distillation.teacher.generation.top_k=16"),
        (("plan", "--distillation.dataset.name", "c4"), "have no dashes: write distillation.dataset.name=VALUE"),
        (("plan", "distillation.job.retries=~a"), "=~a: expected SETTING=VALUE, got a value that Hydra's"),
        (("generate", "--cfg", "job", "distillation.teacher.top=1"), "unknown setting"),
        (("status", "no/such/run"), "expected a run folder with run.json, got none"),
        (("status", "~nobody-here/run"), "expected a path, got one whose home folder is not known"),
        (("generat",), "No such command 'generat'. Did you mean 'generate'?"),
        (("generate", "--multirn"), "No such option '--multirn'. Did you mean '--multirun'?"),
        (("generate", "--top-k=8"), "Usage: dask-logits generate [OPTIONS] [SETTING=VALUE]..."),
        (("generate", "--top-k=8"), "write distillation.teacher.generation.top_k=8"),
        (("plan", "--hlp"), "No such option '--hlp'. Did you mean '--help'?"),
        (("status", "run", "--jsom"), "No such option '--jsom'. Did you mean '--json'?"),
        (("status",), "Missing argument 'RUN'"),
        (("merge",), "expected --input-dir or parts, got neither"),
    ],
)
def test_refusals_exit_2_with_a_message_and_no_trace(arguments, message, tmp_path) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_path_that_the_system_refuses_is_a_message(tmp_path) -> None:
    done = run("verify", "x" * 300, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("dask-logits: expected files that can be read and written, got [Errno 36] File name")
    assert "Traceback" not in done.stderr


def test_a_scheduler_that_is_not_there_is_refused_with_2(overrides, tmp_path) -> None:
    nowhere = ["distillation.cluster.scheduler=tcp://127.0.0.1:1", "distillation.cluster.wait_seconds=1"]
    done = run("generate", *overrides, *nowhere, cwd=tmp_path)
    assert done.returncode == 2
    assert "expected a scheduler at" in done.stderr


def test_help_lists_the_commands_and_the_settings() -> None:
    usage = run("--help")
    assert usage.returncode == 0
    for command in ("generate", "plan", "status"):
        assert f"\n  {command} " in usage.stdout
    for command in ("generate", "plan"):
        shown = run(command, "--help").stdout
        assert shown.startswith(f"Usage: dask-logits {command} [OPTIONS] [SETTING=VALUE]...\n")
        for setting in settings():
            assert f"  {setting.path}=" in shown
            assert setting.doc.split()[0] in shown
        assert max(map(len, shown.splitlines())) <= 100


def test_every_command_explains_itself_and_the_package_its_version() -> None:
    for command in ("status", "retry", "merge", "verify", "show", "convert"):
        shown = run(command, "--help")
        assert (shown.returncode, shown.stderr) == (0, "")
        assert shown.stdout.startswith(f"Usage: dask-logits {command} ")
    assert run("--version").stdout == f"dask-logits {version('dask-logits')}\n"


def test_without_arguments_the_required_settings_are_shown_with_an_example() -> None:
    done = run("generate")
    assert done.returncode == 2
    assert "2 problems in the configuration" in done.stderr
    assert "for example distillation.teacher.model_path=" in done.stderr
    assert "for example distillation.dataset.name=" in done.stderr


def test_cfg_prints_the_composed_configuration() -> None:
    done = run("generate", "--cfg", "job", "cluster=local_cpu", "distillation.dataset.name=c4")
    assert done.returncode == 0
    assert "kind: local_cpu" in done.stdout
    assert "name: c4" in done.stdout


def test_multirun_gives_each_job_its_folder(joined, tmp_path) -> None:
    done = run("generate", "--multirun", *joined, "distillation.teacher.generation.top_k=2,3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for number, k in enumerate((2, 3)):
        assert CacheReader(tmp_path / "run" / str(number) / "teacher_logits.h5").top_k == k
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_multirun_refusals_exit_2_too(joined, tmp_path) -> None:
    done = run("generate", "--multirun", *joined, "distillation.teacher.generation.top_k=2,0", cwd=tmp_path)
    assert done.returncode == 2
    assert "expected int ≥ 1, got 0" in done.stderr


@pytest.mark.parametrize(
    ("shell", "words", "expected"),
    [
        ("bash", "ge", ["plain,generate"]),
        ("bash", "generate --mu", ["plain,--multirun"]),
        ("bash", "plan distillation.job.ret", [f"plain,distillation.job.retries={value}" for value in ("", "2")]),
        # bash splits words at the equals sign.
        ("bash", "generate distillation.teacher.dtype = fl", ["plain,float32", "plain,float16"]),
        ("bash", "retry run cluster = l", ["plain,local_cpu", "plain,local_cuda"]),
        ("zsh", "generate distillation.job.keep_partitions=t", ["plain", "distillation.job.keep_partitions=true"]),
    ],
)
def test_the_shell_completes_commands_options_and_settings(shell, words, expected) -> None:
    environment = {
        **os.environ,
        "_DASK_LOGITS_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": f"dask-logits {words}",
        "COMP_CWORD": str(len(words.split())),
    }
    done = warm.run([sys.executable, "-m", "dask_logits"], env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[: len(expected)] == expected
