"""Layers point down, heavy libraries have homes, and importing the package is light."""

from __future__ import annotations

import ast
import functools
import graphlib
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dask_logits"

# Folders and single modules, lowest first: each may import those of earlier lines and of its own folder.
LAYERS = [
    {"errors", "stderr"},
    {"fields"},
    {"config", "records", "vocabulary"},
    {"files"},
    {"cache"},
    {"run", "train"},
    {"data"},
    {"teacher"},
    {"worker"},
    {"ops", "observe"},
    {"job"},
    {"api"},
    {"cli"},
    {"parallel", "__main__"},
]
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
# The folders or modules that may import a library.
HOMES = {
    "torch": {"teacher", "worker", "train", "job.gpus", "job.forecast"},
    "transformers": {
        "teacher",
        "data.chat",
        "data.tokens",
        "data.transformers_internals",
        "train.dataset",
        "train.trainer",
    },
    "peft": {"teacher.adapters"},
    "accelerate": {"teacher.placement"},
    "triton": {"teacher.cuda"},
    "datasets": {"data", "api"},
    "pyarrow": {"data"},
    "fsspec": {"data.parquet_files"},
    "h5py": {"cache"},
    "google_crc32c": {"cache.partition"},
    "numcodecs": {"cache"},
    "zarr": {"cache.partition"},
    "zstandard": {"cache"},
    "dask": {"config.checks", "job"},
    "distributed": {"job"},
    "IPython": {"job.monitor"},
    "dask_cuda": {"job.cluster"},
    "pynvml": {"job.cluster", "job.gpus"},
    "click": {"cli", "parallel"},
    "hydra": {"config.compose"},
    "omegaconf": {"config.compose"},
}


# Modules that may use private names of other libraries, where there is no public way. They name the version.
PRIVATE_HOMES = {
    "data.transformers_internals",
    "files.lock",
    "teacher.torch_internals",
    "teacher.transformers_internals",
    "train.torch_internals",
    "train.trainer",
}
# Documented in the standard library.
_PUBLIC = {"os._exit", "sys._current_frames"}


@functools.cache
def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith("__init__"):
            found[name] = ast.parse(path.read_text())
    return found


def imports(module: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            if node.module == "dask_logits":
                names |= {f"dask_logits.{alias.name}" for alias in node.names}
            elif node.module.startswith("dask_logits."):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer(name: str) -> str:
    return name.split(".")[0]


def test_every_folder_has_a_layer() -> None:
    assert {layer(name) for name in modules()} == set(LEVELS)


@pytest.mark.parametrize("name", modules())
def test_layers_point_down(name: str) -> None:
    for imported in imports(modules()[name]):
        target = layer(imported.removeprefix("dask_logits."))
        if imported.startswith("dask_logits.") and target in LEVELS and target != layer(name):
            assert LEVELS[target] < LEVELS[layer(name)], f"{name} imports {imported}"


def test_no_modules_import_each_other() -> None:
    graph = {
        name: {i.removeprefix("dask_logits.") for i in imports(module)} & set(modules())
        for name, module in modules().items()
    }
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(order) == set(graph)


@pytest.mark.parametrize("library", HOMES)
def test_heavy_libraries_stay_at_home(library: str) -> None:
    users = {name for name, module in modules().items() if library in {i.split(".")[0] for i in imports(module)}}
    strangers = {user for user in users if not any(f"{user}.".startswith(f"{home}.") for home in HOMES[library])}
    assert users - strangers
    assert strangers == set()


def own_names(module: ast.Module) -> set[str]:
    """Return the functions, classes, fields and attributes that a module defines."""
    nodes = list(ast.walk(module))
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    names |= {ast.unparse(node.target) for node in nodes if isinstance(node, ast.AnnAssign)}
    names |= {target.id for node in nodes if isinstance(node, ast.Assign) for target in node.targets
              if isinstance(target, ast.Name)}  # fmt: skip
    return names | {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }


def private_names(module: ast.Module, inherited: frozenset[str] = frozenset()) -> set[str]:
    """Return the private names of other libraries that a module uses. Others of our modules define the inherited."""
    used, own = set(), own_names(module)
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            base = ast.unparse(node.value)
            ours = {"self": own | inherited, "super()": inherited}.get(base, own)
            if node.attr not in ours:
                used.add((ast.unparse(node), node.attr))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            if isinstance(node.args[1], ast.Constant):
                used.add((ast.unparse(node), str(node.args[1].value)))
        elif isinstance(node, ast.ImportFrom | ast.Import):
            home = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names = [f"{home}{alias.name}" for alias in node.names]
            if not home.startswith(("dask_logits.", "__future__.")):
                used |= {(name, part) for name in names for part in name.split(".")}
    return {text for text, name in used if name.startswith("_") and not name.startswith("__")} - _PUBLIC


def test_private_names_of_other_libraries_stay_at_home() -> None:
    n_homes = Counter(name for module in modules().values() for name in own_names(module))
    users = {}
    for key, module in modules().items():
        inherited = n_homes - Counter(own_names(module))
        if names := private_names(module, frozenset(inherited)):
            users[key] = names
    assert {name: names for name, names in users.items() if name not in PRIVATE_HOMES} == {}
    assert set(users) == PRIVATE_HOMES
    for name in users:
        text = (PACKAGE / f"{name.replace('.', '/')}.py").read_text()
        assert re.search(r"(torch|transformers|filelock) \d+\.\d+", text), f"{name} names no version"


def test_private_names_are_found() -> None:
    text = """
import torch._dynamo
from filelock._identity import owner_is_stale
class A(B):
    _field: int = 0
    def _hook(self):
        self._own, self._field = 1, self._own
        return super()._hook(), model._parameters, hasattr(model, "_hf_hook"), self._theirs, os._exit, self.__class__
"""
    assert private_names(ast.parse(text)) == {
        "torch._dynamo",
        "filelock._identity.owner_is_stale",
        "super()._hook",
        "model._parameters",
        "hasattr(model, '_hf_hook')",
        "self._theirs",
    }


def test_training_side_knows_no_job() -> None:
    for name in (name for name in modules() if layer(name) == "train"):
        ours = {i for i in imports(modules()[name]) if i.startswith("dask_logits.")}
        assert all(
            i.split(".")[1] in ("cache", "errors", "fields", "files", "records", "train", "vocabulary") for i in ours
        )


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, dask_logits, dask_logits.cli; dask_logits.ConfigError; "
        "print([m for m in ('torch', 'dask', 'distributed', 'transformers', 'h5py', 'zarr', 'hydra', 'numpy', "
        "'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_pinned_and_resolve() -> None:
    import dask_logits

    assert dask_logits.__all__ == sorted(dask_logits.__all__)
    assert set(dask_logits.__all__) == set(dask_logits._HOMES)
    for name in dask_logits.__all__:
        assert getattr(dask_logits, name).__module__ == f"dask_logits.{dask_logits._HOMES[name]}"
    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        _ = dask_logits.generat


def test_the_architecture_page_lists_every_module() -> None:
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text().partition("## Files")[2]
    assert [name for name in modules() if name != "__main__" and f"{name.split('.')[-1]}.py" not in page] == []
    listed = {name.removesuffix(".py") for name in re.findall(r"[\w]+\.py", page)}
    assert listed <= {name.split(".")[-1] for name in modules()}


def test_where_does_it_go_names_files_and_symbols_that_exist() -> None:
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text().partition("## Where does it go?")[2].partition("\n## ")[0]
    rows = [line for line in page.splitlines() if line.startswith("| a ") or line.startswith("| an ")]
    assert len(rows) >= 7
    for row in rows:
        files, symbols = [], []
        for word in re.findall(r"`([\w./]+)`", row):
            path = next((p for p in (PACKAGE / word, ROOT / word) if p.exists()), None)
            assert path or ("/" not in word and not word.endswith(".py")), f"no {word} in: {row}"
            (files if path else symbols).append(path or word)
        text = "".join(path.read_text() for path in files if path.is_file())
        assert [name for name in symbols if not re.search(rf"\b{name.split('.')[-1]}\b", text)] == [], row


_NEW_COLUMN = """
import dataclasses
import numpy as np
from builders import compact, plain, records, write_cache
from pathlib import Path
from dask_logits.cache.profile import as_kept
from dask_logits.cache.reader import CacheReader
from dask_logits.records import Extras

made = dataclasses.replace(records((5, 0, 4)), weight=np.arange(9, dtype=np.float32) / 3)
for profile in (plain(extras=Extras(has_weight=True)), compact(extras=Extras(has_weight=True))):
    write_cache(Path(profile.name), made, profile=profile)
    reader = CacheReader(Path(profile.name))
    reader.verify_checksums()
    assert reader.profile.extras == Extras(has_weight=True)
    kept = as_kept(made, profile).weight[5:]
    assert reader.item(2)["weight"].tolist() == kept.tolist() != [0] * 4
"""


def test_a_new_column_of_the_format_is_declared_in_records_alone(tmp_path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "dask_logits", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "dask_logits" / "records.py"
    source = path.read_text()
    for line in (
        '    "weight": TokenArray(dtype=np.float32, extra="has_weight", compact="half"),',
        "    has_weight: bool = False",
        "    weight: Array | None = None",
    ):
        before = line.replace("has_weight", "has_target_pos").replace("weight", "target_pos").partition("(")[0]
        source, n_places = re.subn(rf"^{re.escape(before)}.*\n", rf"\g<0>{line}\n", source, flags=re.M)
        assert n_places == 1
    path.write_text(source)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "tests")])}
    subprocess.run([sys.executable, "-c", _NEW_COLUMN], check=True, cwd=tmp_path, env=environment)


def test_environment_names_what_pyproject_requires() -> None:
    import tomllib

    import yaml

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    conda = [entry for entry in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
             if isinstance(entry, str)]  # fmt: skip
    extras = project["optional-dependencies"]
    gpu = ["accelerate>=1.10", "dask-cuda>=26.4"]
    wanted = project["dependencies"] + extras["dashboard"] + gpu
    renamed = {"torch": "pytorch-gpu"}
    for requirement in wanted:
        name, _, bound = requirement.partition(">=")
        assert f"{renamed.get(name, name)}>={bound}" in conda
    assert extras["cuda13"] == [entry.replace("dask-cuda", "dask-cuda[cu13]") for entry in gpu]
    assert "cuda-version>=13.0" in conda


def test_constraints_pin_every_direct_dependency() -> None:
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [
        *project["dependencies"],
        *(entry for extra in project["optional-dependencies"].values() for entry in extra),
    ]
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {Requirement(entry).name for entry in named} <= pinned
