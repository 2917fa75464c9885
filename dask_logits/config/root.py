"""The whole tree of settings, validated.

Hydra composes the YAML tree (:mod:`dask_logits.config.compose`). This module validates it without Hydra, so workers and
tests need only this module. All problems are reported at once, each with the dotted path of its setting.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from dask_logits.config.checks import cross_check
from dask_logits.config.groups import Tree
from dask_logits.config.setting import Setting, nearest, settings_of
from dask_logits.errors import ConfigError


class Config(Tree):
    """``distillation``: the whole tree."""

    @classmethod
    def from_mapping(cls, tree: Mapping[str, Any], *, dataset_given: bool = False) -> Config:
        """Validate a ``distillation`` tree of plain values.

        Parameters
        ----------
        tree
            Nested mappings. Missing settings take their defaults.
        dataset_given
            Whether a dataset object is passed separately, so that ``dataset.name`` may be missing.

        Raises
        ------
        ConfigError
            With all problems.

        Examples
        --------
        >>> tree = {"teacher": {"model_path": "my/teacher", "generation": {"top_k": 8}}}
        >>> Config.from_mapping(tree, dataset_given=True).teacher.generation.top_k
        8
        """
        wrong: dict[str, str] = {}
        try:
            config = cls.model_validate(tree)
        except ValidationError as error:
            wrong = dict(_problem(tree, each["loc"]) for each in error.errors())
            config = cls.model_validate(_without(tree, wrong))
        # A setting that is refused already has its default here.
        problems = [problem for problem in cross_check(config, dataset_given) if not problem.startswith(tuple(wrong))]
        if wrong or problems:
            raise ConfigError.from_problems(*wrong.values(), *problems)
        return config


def settings() -> Iterator[Setting]:
    """List every setting in the order of the tree.

    >>> next(iter(settings())).path
    'distillation.teacher.model_path'
    """
    yield from settings_of(Config)


def _problem(tree: Any, location: tuple[int | str, ...]) -> tuple[str, str]:
    """Return the path and the message of a value that pydantic refused."""
    types = {setting.path: setting.type for setting in settings()}
    path, value = "distillation", tree
    for name in location:
        group, path, value = path, f"{path}.{name}", value[name]
        if path in types:
            return path, f"{path}: expected {types[path]}, got {value!r}"
        names = dict.fromkeys(known.split(".")[path.count(".")] for known in types if known.startswith(f"{group}."))
        if name not in names:
            return path, f"{path}: unknown setting{nearest(str(name), names)}"
    return path, f"{path}: expected a group of settings, got {value!r}"


def _without(tree: Any, paths: Collection[str], path: str = "distillation") -> dict[str, Any]:
    """Copy a tree without some of its paths."""
    if path in paths:
        return {}
    return {
        name: _without(value, paths, f"{path}.{name}") if isinstance(value, Mapping) else value
        for name, value in tree.items()
        if f"{path}.{name}" not in paths
    }
