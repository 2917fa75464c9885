"""What the groups of settings have in common, and the whole tree of them seen as a list.

A setting has one of three kinds:

* ``what`` is computed: part of the run's identity. Another value in the same run folder is refused.
* ``numerics``: affects the last bits of the result. Resolved once by the calibration and frozen for the run.
* ``how`` it is run: may change on resume.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Kind = Literal["what", "numerics", "how"]


def declare(default: Any, kind: Kind) -> Any:
    """Declare a setting with its default and kind. Its description is the docstring below it."""
    return Field(default, json_schema_extra={"kind": kind})


class Group(BaseModel):
    """A group of settings. Values are never converted: ``"64"`` is no number and ``1`` is no truth value."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One leaf of the configuration tree, as listed in the documentation."""

    path: str
    type: str
    default: Any
    kind: Kind
    doc: str
    purpose: str
    """The purpose of its group."""

    @property
    def default_text(self) -> str:
        """The default as it is written on the command line."""
        return self.default if isinstance(self.default, str) else json.dumps(self.default)

    @property
    def is_free(self) -> bool:
        """Whether it may change when a run is resumed. The number of static workers belongs to the run."""
        return self.kind == "how" and not self.path.endswith(".total_workers")

    @property
    def choices(self) -> Collection[str]:
        """The values that can be listed, as they are written on the command line."""
        words = ["false", "true"] if self.type == "bool" else self.type.split(" or ")
        listed = [word.strip("'") for word in words if re.fullmatch(r"'\w+'|\d+|null|false|true", word)]
        return dict.fromkeys([*listed, self.default_text])


def settings_of(group: type[Group], prefix: str = "distillation") -> Iterator[Setting]:
    """List every setting below a group, in the order of the tree."""
    hints = typing.get_type_hints(group, include_extras=True)
    for name, field in group.model_fields.items():
        path = f"{prefix}.{name}"
        if isinstance(field.default, Group):
            yield from settings_of(type(field.default), path)
        else:
            extra: Any = field.json_schema_extra
            purpose = (group.__doc__ or "").partition(": ")[2].rstrip(".")
            doc = " ".join((field.description or "").split())
            yield Setting(path, _describe(hints[name]), field.default, extra["kind"], doc, purpose)


def _describe(hint: Any) -> str:
    """Name a type in words of the configuration.

    >>> _describe(Literal["auto"] | int | None)
    "'auto' or int or null"
    """
    origin, arms = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return str(arms[1].title)
    if arms:
        return " or ".join(repr(arm) if origin is Literal else _describe(arm) for arm in arms)
    return "null" if hint is type(None) else str(hint.__name__)


def flat(tree: Mapping[str, Any], prefix: str = "distillation") -> dict[str, Any]:
    """Map the dotted path of each leaf of a tree to its value.

    >>> flat({"job": {"retries": 1, "keep_partitions": True}})
    {'distillation.job.retries': 1, 'distillation.job.keep_partitions': True}
    """
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}.{name}"
        leaves |= flat(value, path) if isinstance(value, Mapping) else {path: value}
    return leaves


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return ``", did you mean 'x'?"`` for the known spelling at least ``cutoff`` (0 to 1) close, else an empty string.

    >>> nearest("topk", ["top_k", "device"])
    ", did you mean 'top_k'?"
    """
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f", did you mean {match[0]!r}?" if match else ""
