"""The pages of the documentation site. ``scripts/docs.sh`` builds them, and takes warnings for errors."""

from __future__ import annotations

import doctest
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import site_pages
import test_distillation_page
from click.testing import CliRunner
from test_documents import FENCE, PAGES, ROOT, run_document

import dask_logits
from dask_logits import parallel
from dask_logits.cli import commands
from dask_logits.config.root import settings

DOCS = ROOT / "docs"
after_quickstart = test_distillation_page.after_quickstart


def test_every_block_of_the_pages_runs(after_quickstart, capfd) -> None:
    names = {page.stem: run_document(page, after_quickstart) for page in PAGES}
    out = capfd.readouterr().out
    assert "True" in out.splitlines(), "the copied cache has the digest of the original"
    assert re.search(r"^[1-9]\d* of [1-9]\d* positions are learned$", out, re.M)
    assert re.search(r"^at temperature 2: \d+\.\d{3} nats per token$", out, re.M)
    assert names["lora"]["trainer"].state.global_step == 2
    assert re.search(r"^  after 40 steps on labels alone: \d+\.\d{3} from the teacher", out, re.M)


def test_every_page_is_one_of_the_site_or_included_in_one() -> None:
    listed = "\n".join(body for page in PAGES for kind, body in FENCE.findall(page.read_text()) if "toctree" in kind)
    for page in DOCS.rglob("*.md"):
        if page.name != "index.md" or page.parent != DOCS:
            name = str(page.relative_to(DOCS).with_suffix(""))
            assert re.search(
                rf"^(?:.*<)?{name.removeprefix('guides/') if page.stem != 'index' else name}>?$", listed, re.M
            ), name
    for document, page in site_pages.INCLUDED.items():
        assert f"{{include}} ../{document}.md" in (DOCS / f"{page}.md").read_text()


def test_the_command_reference_has_the_help_of_every_command() -> None:
    texts = site_pages.all_commands()
    assert texts.keys() == {
        "dask-logits",
        "dask-logits-parallel",
        *(f"dask-logits {name}" for name in commands.commands),
    }
    for name, text in texts.items():
        command = parallel.main if name == "dask-logits-parallel" else commands
        shown = CliRunner().invoke(
            command, [*name.split()[1:], "--help"], prog_name=name.split()[0], terminal_width=site_pages.WIDTH
        )
        assert shown.output.startswith(text)
        assert f"## {name}\n" in site_pages.commands_text()


def test_the_reference_of_json_files_has_every_field() -> None:
    text = site_pages.files_text()
    for path in (DOCS / "schemas").glob("*.json"):
        section = text.partition(f"## {path.stem}\n")[2].partition("\n## ")[0]
        schema = json.loads(path.read_text())
        fields = {
            *schema["properties"],
            *(f"{d}.{f}" for d, r in schema.get("$defs", {}).items() for f in r["properties"]),
        }
        assert set(re.findall(r"^\| `(.*?)` \| \S", section, re.M)) == fields


def test_the_api_page_has_every_public_name() -> None:
    page = (DOCS / "reference" / "api.md").read_text()
    listed = re.findall(r"^\.\. auto\w+:: (\w+)(?:\(.*\))?$", page, re.M)
    assert sorted(listed) == sorted(dask_logits.__all__)


def test_what_the_reference_lacks_is_named() -> None:
    empty = SimpleNamespace(
        domains=SimpleNamespace(python_domain=SimpleNamespace(objects={})),
        metadata={site_pages.COMMANDS: {}},
        get_doctree=lambda page: SimpleNamespace(astext=lambda: ""),
    )
    found = site_pages.missing(empty)
    assert len(found) == len(dask_logits.__all__) + len(site_pages.all_commands()) + len(list(settings()))
    assert "reference/api.md: generate is missing" in found
    assert "reference/commands.md: dask-logits status is missing" in found


def test_the_examples_of_the_generator_hold() -> None:
    assert doctest.testmod(site_pages).attempted > 3
    assert doctest.testmod(site_pages).failed == 0


@pytest.mark.parametrize("program", ["dask-logits", "dask-logits-parallel"])
def test_completion_is_set_up_as_the_page_says(program, tmp_path) -> None:
    page = (DOCS / "reference" / "commands.md").read_text()
    lines = re.findall(r"^\| \w+.* `([^`]*_COMPLETE=\w+_source dask-logits.*)` \|$", page, re.M)
    variable = f"_{program.replace('-', '_').upper()}_COMPLETE"
    assert variable in page
    module = {"dask-logits": "dask_logits.cli", "dask-logits-parallel": "dask_logits.parallel"}[program]
    stub = tmp_path / program
    stub.write_text(f"#!{sys.executable}\nfrom {module} import main\nmain()\n")
    stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    in_bash, in_zsh, in_fish = (
        line.replace("_DASK_LOGITS_COMPLETE", variable).replace(" dask-logits", f" {program}") for line in lines
    )
    function = variable.removesuffix("_COMPLETE").lower() + "_completion"
    words = {"dask-logits": "st", "dask-logits-parallel": "--no"}[program]
    bash = f'{in_bash}; COMP_WORDS=({program} {words}); COMP_CWORD=1; {function} {program}; echo "${{COMPREPLY[@]}}"'
    assert shell(bash, environment) == {"dask-logits": "status\n", "dask-logits-parallel": "--no-merge\n"}[program]
    # These shells may not be installed: what they would read.
    assert f"#compdef {program}" in shell(f"{variable}=zsh_source {program}", environment)
    assert f"complete --no-files --command {program}" in shell(f"{variable}=fish_source {program}", environment)
    assert f"{variable}=zsh_source {program}" in in_zsh
    assert in_fish.startswith(f"{variable}=fish_source {program}")


def shell(command: str, environment: dict[str, str]) -> str:
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, check=True)
    return done.stdout
