"""Score a dataset with a teacher once, as a Dask batch job, and train students from the file.

Importing this package is light: torch, Dask and the rest are loaded when a name that needs them is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dask_logits.api import generate_teacher_logits as generate_teacher_logits
    from dask_logits.config.compose import load_config as load_config
    from dask_logits.config.root import Config as Config
    from dask_logits.data.load import prepare_dataset as prepare_dataset
    from dask_logits.errors import CacheError as CacheError
    from dask_logits.errors import CapacityError as CapacityError
    from dask_logits.errors import ClusterError as ClusterError
    from dask_logits.errors import ConfigError as ConfigError
    from dask_logits.errors import DaskLogitsError as DaskLogitsError
    from dask_logits.errors import DatasetError as DatasetError
    from dask_logits.errors import PartitionsFailedError as PartitionsFailedError
    from dask_logits.errors import RunConflictError as RunConflictError
    from dask_logits.errors import TeacherError as TeacherError
    from dask_logits.job.monitor import Monitor as Monitor
    from dask_logits.job.recompute import verify as verify
    from dask_logits.job.run import generate as generate
    from dask_logits.job.run import retry as retry
    from dask_logits.observe.report import write_report as write_report
    from dask_logits.observe.status import read_status as read_status
    from dask_logits.ops.convert import convert as convert
    from dask_logits.ops.merge import merge as merge
    from dask_logits.train.batches import collate as collate
    from dask_logits.train.batches import collate_flat as collate_flat
    from dask_logits.train.dataset import CachedLogitsDataset as CachedLogitsDataset
    from dask_logits.train.ensemble import EnsembleDataset as EnsembleDataset
    from dask_logits.train.heads import Head as Head
    from dask_logits.train.losses import DistillationLoss as DistillationLoss
    from dask_logits.train.losses import distillation_loss as distillation_loss
    from dask_logits.train.losses import fused_distillation_loss as fused_distillation_loss
    from dask_logits.train.mixture import MixedDataset as MixedDataset
    from dask_logits.train.objective import Objective as Objective
    from dask_logits.train.order import ItemOrder as ItemOrder
    from dask_logits.train.sampler import ResumableSampler as ResumableSampler
    from dask_logits.train.student import StudentWithLoss as StudentWithLoss
    from dask_logits.train.student import student_head as student_head
    from dask_logits.train.targets import SparseTargets as SparseTargets
    from dask_logits.train.trainer import DistillationConfig as DistillationConfig
    from dask_logits.train.trainer import DistillationTrainer as DistillationTrainer

__version__ = "0.1.0"
# Public name → its module, for use at run time. Type checkers read the imports above.
_HOMES = {
    "CacheError": "errors",
    "CachedLogitsDataset": "train.dataset",
    "CapacityError": "errors",
    "ClusterError": "errors",
    "Config": "config.root",
    "ConfigError": "errors",
    "DaskLogitsError": "errors",
    "DatasetError": "errors",
    "DistillationConfig": "train.trainer",
    "DistillationLoss": "train.losses",
    "DistillationTrainer": "train.trainer",
    "EnsembleDataset": "train.ensemble",
    "Head": "train.heads",
    "ItemOrder": "train.order",
    "MixedDataset": "train.mixture",
    "Monitor": "job.monitor",
    "Objective": "train.objective",
    "PartitionsFailedError": "errors",
    "ResumableSampler": "train.sampler",
    "RunConflictError": "errors",
    "SparseTargets": "train.targets",
    "StudentWithLoss": "train.student",
    "TeacherError": "errors",
    "collate": "train.batches",
    "collate_flat": "train.batches",
    "convert": "ops.convert",
    "distillation_loss": "train.losses",
    "fused_distillation_loss": "train.losses",
    "generate": "job.run",
    "generate_teacher_logits": "api",
    "load_config": "config.compose",
    "merge": "ops.merge",
    "prepare_dataset": "data.load",
    "read_status": "observe.status",
    "retry": "job.run",
    "student_head": "train.student",
    "verify": "job.recompute",
    "write_report": "observe.report",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dask_logits' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dask_logits.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
