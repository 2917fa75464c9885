"""The settings with which a run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dask_logits.errors import RunConflictError
from dask_logits.run.folder import RunFolder
from dask_logits.run.plan_log import PlanLog


def settings_of(run: RunFolder, log: PlanLog) -> dict[str, Any]:
    """Return the original settings of a run, updated to its current folder and rows.

    The permission to replace a run, given for a single start, is dropped.

    Raises
    ------
    RunConflictError
        If the folder contains no run.
    """
    manifest = run.manifest()
    if manifest is None:
        raise RunConflictError(f"{run.path}: expected a run folder with run.json, got none; check the path")
    changed: dict[str, Any] = {"teacher.cache_dir": str(run.path), "teacher.generation.force_regenerate": False}
    limit = manifest.setting("dataset.max_samples")
    if isinstance(limit, int) and limit < log.n_rows:
        # The run has grown since then.
        changed["dataset.max_samples"] = "all" if log.end == "exhausted" else log.n_rows
    settings = manifest.how
    for name, value in changed.items():
        settings = _with(settings, name, value)
    return settings


def check_named(run: RunFolder, dataset: Any, cure: str) -> None:
    """Refuse a run of a Python object without this object.

    Parameters
    ----------
    run
        The run folder.
    dataset
        The object, or None.
    cure
        What to do instead.

    Raises
    ------
    RunConflictError
        If the run names no dataset and there is no object.
    """
    manifest = run.manifest()
    if manifest is not None and dataset is None and not manifest.setting("dataset.name"):
        raise RunConflictError(f"{run.path}: expected a run that names its dataset, got one of a Python object; {cure}")


def _with(tree: Any, name: str, value: Any) -> dict[str, Any]:
    """Return a tree with another value of a setting, which has a dotted name."""
    key, _, inner = name.partition(".")
    tree = tree if isinstance(tree, Mapping) else {}
    return {**tree, key: _with(tree.get(key), inner, value) if inner else value}
