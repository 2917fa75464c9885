"""Score a dataset with a teacher once, as a Dask batch job, and train students from the file.

Importing this package is light: torch, Dask and the rest are loaded when a name that needs them is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dask_logits.api import generate_teacher_logits
    from dask_logits.config import Config
    from dask_logits.data.load import prepare_dataset
    from dask_logits.errors import (
        CacheError,
        CapacityError,
        ClusterError,
        ConfigError,
        DaskLogitsError,
        DatasetError,
        PartitionsFailedError,
        RunConflictError,
        TeacherError,
    )
    from dask_logits.hydra_config import load_config
    from dask_logits.job.monitor import Monitor
    from dask_logits.job.recompute import verify
    from dask_logits.job.run import generate, retry
    from dask_logits.observe.report import write_report
    from dask_logits.observe.status import read_status
    from dask_logits.ops.convert import convert
    from dask_logits.ops.merge import merge
    from dask_logits.train.batches import collate, collate_flat
    from dask_logits.train.dataset import CachedLogitsDataset
    from dask_logits.train.ensemble import EnsembleDataset
    from dask_logits.train.heads import Head
    from dask_logits.train.losses import DistillationLoss, distillation_loss, fused_distillation_loss
    from dask_logits.train.mixture import MixedDataset
    from dask_logits.train.objective import Objective
    from dask_logits.train.order import ItemOrder
    from dask_logits.train.sampler import ResumableSampler
    from dask_logits.train.student import StudentWithLoss, student_head
    from dask_logits.train.targets import SparseTargets
    from dask_logits.train.trainer import DistillationConfig, DistillationTrainer

__version__ = "0.1.0"

_HOMES = {
    "CacheError": "errors",
    "CachedLogitsDataset": "train.dataset",
    "CapacityError": "errors",
    "ClusterError": "errors",
    "Config": "config",
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
    "load_config": "hydra_config",
    "merge": "ops.merge",
    "prepare_dataset": "data.load",
    "read_status": "observe.status",
    "retry": "job.run",
    "student_head": "train.student",
    "verify": "job.recompute",
    "write_report": "observe.report",
}

__all__ = [
    "CacheError",
    "CachedLogitsDataset",
    "CapacityError",
    "ClusterError",
    "Config",
    "ConfigError",
    "DaskLogitsError",
    "DatasetError",
    "DistillationConfig",
    "DistillationLoss",
    "DistillationTrainer",
    "EnsembleDataset",
    "Head",
    "ItemOrder",
    "MixedDataset",
    "Monitor",
    "Objective",
    "PartitionsFailedError",
    "ResumableSampler",
    "RunConflictError",
    "SparseTargets",
    "StudentWithLoss",
    "TeacherError",
    "collate",
    "collate_flat",
    "convert",
    "distillation_loss",
    "fused_distillation_loss",
    "generate",
    "generate_teacher_logits",
    "load_config",
    "merge",
    "prepare_dataset",
    "read_status",
    "retry",
    "student_head",
    "verify",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dask_logits' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dask_logits.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
