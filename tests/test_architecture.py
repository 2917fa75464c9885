"""Layers point down, heavy libraries have homes, and importing the package is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dask_logits"

# A module may import only modules of a lower number.
LAYERS = {
    "errors": 0,
    "stderr": 0,
    "config": 1,
    "records": 1,
    "tokenmap": 1,
    "store.durable": 2,
    "store.lease": 3,
    "compose": 2,
    "job.plan": 2,
    "capture.batching": 2,
    "capture.environment": 2,
    "capture.items": 2,
    "capture.values": 2,
    "capture.parquet": 3,
    "capture.text_files": 4,
    "capture.arrow_cache": 5,
    "capture.attention": 2,
    "capture.fused": 2,
    "capture.kernels": 2,
    "capture.transfer": 3,
    "capture.topk": 4,
    "store.profile": 3,
    "store.layout": 3,
    "store.heaps": 2,
    "store.sink": 2,
    "store.hdf5": 4,
    "store.planes": 3,
    "store.partition": 4,
    "store.cache": 5,
    "job.manifest": 7,
    "job.planlog": 8,
    "job.committed": 9,
    "job.parts": 10,
    "job.assemble": 11,
    "job.merge": 12,
    "job.convert": 8,
    "job.ahead": 10,
    "capture.teacher": 3,
    "capture.placement": 3,
    "capture.weights": 2,
    "capture.adapters": 3,
    "capture.architecture": 2,
    "capture.locate": 4,
    "capture.matching": 5,
    "capture.checkpoint": 6,
    "capture.oracle": 4,
    "capture.probe": 4,
    "capture.selfcheck": 5,
    "capture.meter": 4,
    "capture.tokens": 3,
    "capture.load": 6,
    "capture.rows": 9,
    "capture.corpus": 10,
    "capture.parquet_stream": 10,
    "capture.row_stream": 10,
    "capture.stream": 11,
    "job.processes": 4,
    "job.cluster": 10,
    "job.roster": 9,
    "job.single": 10,
    "capture.scoring": 5,
    "store.consolidate": 6,
    "store.writer": 4,
    "store.find": 6,
    "train.dataset": 7,
    "train.sampler": 5,
    "train.targets": 4,
    "train.batches": 5,
    "train.losses": 5,
    "train.order": 4,
    "train.decode": 5,
    "observe.card": 7,
    "observe.drivers": 8,
    "observe.status": 10,
    "observe.progress": 4,
    "observe.monitor": 11,
    "capture.task": 10,
    "capture.calibrate": 11,
    "job.prepare": 12,
    "job.calls": 4,
    "job.window": 11,
    "job.watch": 4,
    "job.failures": 8,
    "job.bisect": 12,
    "job.reporter": 13,
    "job.forecast": 13,
    "job.launch": 2,
    "job.score": 14,
    "job.checks": 11,
    "job.verify": 15,
    "job.run": 15,
    "api": 16,
    "usage": 2,
    "cli": 16,
    "parallel": 17,
    "__main__": 17,
}
HOMES = {
    "torch": {"capture.attention", "capture.fused", "capture.kernels", "capture.transfer", "capture.topk",
              "capture.teacher", "capture.architecture", "capture.matching", "capture.checkpoint",
              "capture.placement", "capture.oracle", "capture.probe", "capture.selfcheck", "capture.meter",
              "capture.environment", "capture.scoring", "capture.calibrate", "job.cluster", "job.forecast",
              "train.batches", "train.dataset", "train.decode", "train.losses", "train.sampler", "train.targets"},
    "transformers": {"capture.architecture", "capture.attention", "capture.checkpoint", "capture.locate",
                     "capture.matching", "capture.teacher", "capture.tokens", "train.dataset"},
    "peft": {"capture.adapters"},
    "accelerate": {"capture.placement"},
    "triton": {"capture.kernels"},
    "datasets": {"capture.load", "capture.rows", "capture.corpus", "capture.stream", "api"},
    "pyarrow": {"capture.arrow_cache", "capture.corpus", "capture.load", "capture.parquet", "capture.rows",
                "capture.text_files", "capture.values"},
    "fsspec": {"capture.parquet"},
    "h5py": {"store.cache", "store.hdf5", "store.writer"},
    "hdf5plugin": {"store.cache"},
    "numcodecs": {"store.partition", "store.planes"},
    "zarr": {"store.partition"},
    "dask": {"config", "job.bisect", "job.calls", "job.cluster", "job.single", "job.window"},
    "distributed": {"job.bisect", "job.calls", "job.cluster", "job.processes", "job.single", "job.window",
                    "observe.monitor"},
    "IPython": {"observe.monitor"},
    "dask_cuda": {"job.cluster"},
    "pynvml": {"job.cluster"},
    "hydra": {"compose"},
    "omegaconf": {"compose"},
}  # fmt: skip


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
    return names


def test_every_module_has_a_layer() -> None:
    assert set(modules()) == set(LAYERS)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_point_down(name: str) -> None:
    for imported in imports(modules()[name]):
        target = imported.removeprefix("dask_logits.")
        if imported.startswith("dask_logits.") and target in LAYERS:
            assert LAYERS[target] < LAYERS[name], f"{name} imports {target}"


@pytest.mark.parametrize("library", HOMES)
def test_heavy_libraries_stay_at_home(library: str) -> None:
    users = {name for name, module in modules().items() if library in {i.split(".")[0] for i in imports(module)}}
    assert users <= HOMES[library]


def test_training_side_knows_no_job() -> None:
    for name in (name for name in LAYERS if name.startswith("train.")):
        ours = {i for i in imports(modules()[name]) if i.startswith("dask_logits.")}
        assert all(i.split(".")[1] in ("store", "records", "errors", "tokenmap", "train") for i in ours)


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, dask_logits, dask_logits.cli; dask_logits.ConfigError; "
        "print([m for m in ('torch', 'dask', 'distributed', 'transformers', 'h5py', 'zarr', 'hydra', 'numpy') "
        "if m in sys.modules])"
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


def test_readme_lists_every_module() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [name for name in LAYERS if name != "__main__" and f"{name.split('.')[-1]}.py" not in readme] == []


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
