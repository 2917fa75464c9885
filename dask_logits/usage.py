"""Texts of the command line: usage, and every setting with its default and description."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from dask_logits.config import Config, Group, Setting, settings

USAGE = """\
dask-logits COMMAND …

  plan [SETTING …]        say what `generate` would take: rows, tokens, time,
                          disk, memory; nothing is written
  generate [SETTING …]    score a dataset with a teacher into a run folder;
                          the same command resumes it
  status RUN [--json]     say what a run does or has done, from its files
  retry RUN [--bisect] [SETTING …]
                          score just the partitions that failed; --bisect
                          names the rows that make them fail
  merge [PART …] [--input-dir DIR] [--num-workers N] [--output FILE] [--index]
        [--max-file-size SIZE] [--takeover]
                          make one cache of the results of static workers
  verify RUN|CACHE [--recompute N] [--json]
                          check every checksum and every row; score N rows
                          again and compare
  show CACHE [--json]     say what a cache holds: teacher, dataset, sizes,
                          kept mass by k
  convert CACHE TARGET --profile plain|compact [--precision 8|10|12]
        [--takeover]      write a cache again in another profile

A SETTING is distillation.PATH=VALUE, or a preset such as cluster=local_cpu.
`dask-logits COMMAND --help` explains a command, `dask-logits generate --help`
lists every setting, `dask-logits --version` prints the version.
"""

_GENERATE = """\
dask-logits generate SETTING …

Score a dataset with a teacher into a run folder. The same command resumes a
run that was stopped. Two settings are required, teacher.model_path and
dataset.name:

  dask-logits generate \\
    distillation.teacher.model_path=Qwen/Qwen3-8B \\
    distillation.dataset.name=Salesforce/wikitext \\
    distillation.dataset.config_name=wikitext-103-raw-v1 \\
    distillation.teacher.cache_dir=output/wikitext

  --cfg job      print the composed settings and stop
  --multirun     run one job for each of several values: SETTING=A,B
  --hydra-help   list the other options, which are Hydra's

Presets: cluster=local_cpu, cluster=local_cuda, cluster=scheduler,
cluster=slurm.
"""

_PLAN = """\
dask-logits plan SETTING …

Say what `dask-logits generate` with the same settings would take: rows, tokens,
partitions, time, disk and memory, beside what is free. Nothing is written.
"""

HELP = {"generate": _GENERATE, "plan": _PLAN}
# Hydra options that `generate` passes on.
HYDRA_OPTIONS = (
    "--help", "--hydra-help", "--cfg", "--resolve", "--package", "--run", "--multirun", "--shell-completion", "--info",
    "--config-path", "--config-name", "--config-dir", "--experimental-rerun", "-h", "-c", "-p", "-r", "-m", "-sc", "-i",
    "-cp", "-cn", "-cd",
)  # fmt: skip


def settings_help(width: int = 100) -> str:
    """Return every setting in groups: path, default and description.

    >>> "  distillation.teacher.generation.top_k=64\\n      Number of entries kept" in settings_help()
    True
    """
    blocks = []
    groups = dict(_groups(Config, "distillation"))
    for group, purpose in groups.items():
        mine = [setting for setting in settings() if setting.path.rpartition(".")[0] == group]
        if mine:
            lines = [line for setting in mine for line in _setting_lines(setting, width)]
            blocks.append("\n".join([*textwrap.wrap(f"{group}: {purpose}", width), *lines]))
    intro = (
        "Settings, with their defaults. A run may be resumed with other values of those\nthat are marked (free).\n\n"
    )
    return intro + "\n\n".join(blocks) + "\n"


def _groups(group: type[Group], path: str) -> Iterator[tuple[str, str]]:
    """Yield the path and purpose of every group of settings."""
    yield path, (group.__doc__ or "").partition(": ")[2]
    for name, field in group.model_fields.items():
        if isinstance(field.default, Group):
            yield from _groups(type(field.default), f"{path}.{name}")


def _setting_lines(setting: Setting, width: int) -> list[str]:
    free = " (free)" if setting.kind == "how" else ""
    meaning = textwrap.wrap(setting.doc + free, width - 6, break_long_words=False, break_on_hyphens=False)
    return [f"  {setting.path}={setting.default_text}", *(f"      {line}" for line in meaning)]
