"""Write the files that follow from the settings in ``dask_logits/config/groups.py``.

    python scripts/write_settings.py

Run it after a change of a setting. A test fails while these files differ: ``config/distillation/default.yaml``, which
Hydra composes, and the table of ``docs/SETTINGS.md``.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from dask_logits.config.root import Config, settings

ROOT = Path(__file__).parents[1]
YAML = ROOT / "config" / "distillation" / "default.yaml"
PAGE = ROOT / "docs" / "SETTINGS.md"
YAML_HEAD = """\
# Every setting with its default. docs/SETTINGS.md describes them.
# Generated from dask_logits/config/groups.py by scripts/write_settings.py.
"""
TABLE_HEAD = """\
| setting | type | default | kind | meaning |
|---|---|---|---|---|
"""


def defaults() -> str:
    """Return the YAML tree of all settings with their defaults."""
    return YAML_HEAD + yaml.safe_dump(Config().model_dump(), sort_keys=False)


def page() -> str:
    """Return the page of the settings: its text as it is, and a new table."""
    rows = [
        f"| `{each.path.removeprefix('distillation.')}` | {each.type} | `{each.default_text}` "
        f"| {each.kind} | {each.doc} |\n"
        for each in settings()
    ]
    return PAGE.read_text().partition(TABLE_HEAD)[0] + TABLE_HEAD + "".join(rows)


if __name__ == "__main__":
    YAML.write_text(defaults())
    PAGE.write_text(page())
