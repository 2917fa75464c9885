"""Generate the reference pages that follow from the code, and check that the reference is complete.

The pages of the commands and of the JSON files end with text that is made here when the site is built, so that no
committed copy can become wrong. The check warns, and ``scripts/docs.sh`` takes warnings for errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import dask_logits
from dask_logits import cli, parallel
from dask_logits.config.root import settings

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

COMMANDS, FILES, API, SETTINGS = "reference/commands", "reference/files", "reference/api", "SETTINGS"
SCHEMAS = Path(__file__).parent / "schemas"
# Listed at import, because autodoc (Sphinx 9.0) adds annotations of pydantic to the settings that it documents.
PATHS = tuple(each.path for each in settings())
# Columns of a help text.
WIDTH = 88
# The pages of the site that include a document of the root.
INCLUDED = {"README": "overview", "CHANGELOG": "changelog", "CONTRIBUTING": "contributing"}


def all_commands() -> dict[str, str]:
    """Return the name and the help of each command, without the settings, which have a page of their own."""
    context = click.Context(
        cli.commands, info_name="dask-logits", terminal_width=WIDTH, **_without_width(cli.commands.context_settings)
    )
    found = {"dask-logits": context.get_help()}
    for name, command in cli.commands.commands.items():
        found[f"dask-logits {name}"] = _help(command, name, context)
    found["dask-logits-parallel"] = _help(parallel.main, "dask-logits-parallel", None)
    return found


def _without_width(context_settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in context_settings.items() if name != "max_content_width"}


def _help(command: click.Command, name: str, parent: click.Context | None) -> str:
    context = click.Context(
        command, info_name=name, parent=parent, terminal_width=WIDTH, **_without_width(command.context_settings)
    )
    formatter = context.make_formatter()
    command.format_usage(context, formatter)
    command.format_help_text(context, formatter)
    command.format_options(context, formatter)
    return formatter.getvalue().rstrip()


def commands_text() -> str:
    """Return one section for each command, as Markdown."""
    return "".join(f"\n## {name}\n\n```text\n{text.rstrip()}\n```\n" for name, text in all_commands().items())


def files_text() -> str:
    """Return one section for each JSON file, as Markdown: its fields with their types."""
    return "".join(_file_text(path) for path in sorted(SCHEMAS.glob("*.json")))


def _file_text(path: Path) -> str:
    schema = json.loads(path.read_text())
    rows = [row for name, record in _records(schema) for row in _rows(name, record)]
    table = "| field | type | meaning |\n|---|---|---|\n" + "".join(rows)
    return f"\n## {path.stem}\n\n{_code(schema['description'])} [JSON schema](../schemas/{path.name})\n\n{table}"


def _records(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "", schema
    yield from ((f"{name}.", record) for name, record in schema.get("$defs", {}).items())


def _rows(prefix: str, record: dict[str, Any]) -> Iterator[str]:
    for name, entry in record.get("properties", {}).items():
        kind = _type(entry).replace("|", "\\|")
        yield f"| `{prefix}{name}` | {kind} | {_code(entry['description'])} |\n"


def _type(entry: dict[str, Any]) -> str:
    """Name the type of a field in words.

    >>> _type({"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "null"}]})
    'list of integer, or null'
    """
    if "anyOf" in entry:
        return ", or ".join(_type(each) for each in entry["anyOf"])
    if "$ref" in entry:
        return entry["$ref"].rpartition("/")[2]
    if "enum" in entry:
        return " or ".join(f"`{value}`" for value in entry["enum"])
    if entry.get("type") == "array":
        return f"list of {_type(entry['items'])}" if entry.get("items") else "list"
    if isinstance(entry.get("additionalProperties"), dict):
        return f"object of {_type(entry['additionalProperties'])}"
    return str(entry.get("type", "any"))


def _code(text: str) -> str:
    return " ".join(text.replace("``", "`").replace("|", "\\|").split())


def links_of_site(text: str, page: str) -> str:
    """Return a document with links that work on the site.

    A code host shows the documents of the root as they are. On the site, ``docs/`` is the root.

    >>> links_of_site("[a](docs/FORMAT.md#x) [b](CHANGELOG.md)", "overview")
    '[a](FORMAT.md#x) [b](changelog.md)'
    >>> links_of_site("[a](../../README.md#settings)", "guides/chats")
    '[a](../overview.md#settings)'
    """
    up = "../" * page.count("/")
    for name, target in INCLUDED.items():
        text = re.sub(rf"\]\((?:\.\./)*{name}\.md([)#])", rf"]({up}{target}.md\1", text)
    if page in INCLUDED.values() or page == "terminology":
        text = text.replace("](docs/", "](")
    return text.replace("](schemas/)", f"]({FILES}.md)")


def _source_read(app: Sphinx, page: str, source: list[str]) -> None:
    source[0] = links_of_site(source[0], page)
    if page == COMMANDS:
        source[0] += commands_text()
    if page == FILES:
        source[0] += files_text()


def _include_read(app: Sphinx, path: Path, page: str, source: list[str]) -> None:
    source[0] = links_of_site(source[0], page)


def breakable(body: str) -> str:
    """Let names in the tables of a page break after a dot, a slash or an underscore.

    >>> breakable('<table><span class="pre">job.retries</span></table>')
    '<table><span class="pre">job.<wbr>retries</span></table>'
    """

    def table(found: re.Match[str]) -> str:
        return re.sub(
            r'(?<=<span class="pre">)[^<]+', lambda name: re.sub(r"([./_])(?=\w)", r"\1<wbr>", name[0]), found[0]
        )

    return re.sub(r"<table.*?</table>", table, body, flags=re.S)


def _page_context(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    context["body"] = breakable(context.get("body", ""))


def _check(app: Sphinx, env: BuildEnvironment) -> None:
    from sphinx.util import logging

    for message in missing(env):
        logging.getLogger(__name__).warning("%s", message)


def missing(env: BuildEnvironment) -> list[str]:
    """Return what the reference lacks: public names, commands and settings."""
    described = env.domains.python_domain.objects
    sections = env.metadata[COMMANDS].get("myst_slugs", {})
    settings_page = env.get_doctree(SETTINGS).astext()
    return [
        *(f"{API}.md: {name} is missing" for name in dask_logits.__all__ if f"dask_logits.{name}" not in described),
        *(f"{COMMANDS}.md: {name} is missing" for name in all_commands() if name.replace(" ", "-") not in sections),
        *(
            f"{SETTINGS}.md: {path} is missing; run scripts/write_settings.py"
            for path in PATHS
            if path.removeprefix("distillation.") not in settings_page
        ),
    ]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register this extension."""
    app.connect("source-read", _source_read)
    app.connect("include-read", _include_read)
    app.connect("html-page-context", _page_context)
    app.connect("env-check-consistency", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
