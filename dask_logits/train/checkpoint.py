"""``distillation_state.json``: what a checkpoint was trained on, and how far.

Resuming on other targets would train on without an error. The file therefore holds the content digest of the cache, the
options of the dataset, and the position of the sampler.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field
from torch.utils.data import Subset

from dask_logits.errors import CacheError, ConfigError
from dask_logits.fields import Count, Digest, Record
from dask_logits.files.atomic import read_json
from dask_logits.train.dataset import CachedLogitsDataset
from dask_logits.train.ensemble import EnsembleDataset
from dask_logits.train.mixture import MixedDataset
from dask_logits.train.sources import OPTIONS

STATE_NAME = "distillation_state.json"
_CURE = "resume from another checkpoint"


class TrainedOn(Record):
    """A dataset over a cache, or over several."""

    content_digest: Digest = Field(description="Content digest of all files of the cache.")
    path: str = Field(description="The first file, or one of each source.")
    top_k: Count = Field(description="Entries per position.")
    window: Count | None = Field(description="Tokens of a window.")
    max_tokens: Count | None = Field(description="Tokens kept of each document.")
    student_vocab_size: Count | None = Field(description="Logits of the student, if the dataset was told.")
    subset: Digest | None = Field(description="SHA-256 of the indices of a torch Subset.")

    @classmethod
    def of(cls, dataset: Any) -> TrainedOn:
        """Describe a dataset over caches, or a torch ``Subset`` of one."""
        cache, indices = cache_of("train_dataset", dataset), hashlib.sha256()
        is_subset = isinstance(dataset, Subset)
        while isinstance(dataset, Subset):
            indices.update(np.asarray(dataset.indices, dtype="<i8").tobytes())
            dataset = dataset.dataset
        return cls(
            content_digest=cache.content_digest,
            path=", ".join(str(source.paths[0]) for source in getattr(cache, "sources", {"": cache}).values()),
            **{name: getattr(cache, name) for name in OPTIONS},
            subset=indices.hexdigest() if is_subset else None,
        )


class DistillationState(Record):
    """The file in a checkpoint."""

    version: Literal[1] = Field(description="Version of the file.")
    dataset: TrainedOn = Field(description="What was trained on.")
    sampler: dict[str, Any] = Field(description="State of the ResumableSampler.")

    @classmethod
    def read(cls, folder: Path) -> DistillationState:
        """Read the state of a checkpoint.

        Raises
        ------
        CacheError
            If there is none, or it is damaged.
        """
        path = folder / STATE_NAME
        values = read_json(path)
        if values is None:
            raise CacheError.at(
                path,
                "expected the state that DistillationTrainer writes into each checkpoint, got none; resume "
                "from one of its checkpoints, or start anew without resume_from_checkpoint",
            )
        return cls.parse(path, values, _CURE)

    def check(self, folder: Path, now: TrainedOn) -> None:
        """Refuse to resume on another dataset.

        Parameters
        ----------
        folder
            The checkpoint, for error messages.
        now
            The dataset to resume with.

        Raises
        ------
        CacheError
            If it is over another cache.
        ConfigError
            If it was opened with other options. All of them are named.
        """
        then = self.dataset
        if now.content_digest != then.content_digest:
            raise CacheError(
                f"{folder}: expected the cache that this checkpoint was trained on, with content digest "
                f"{then.content_digest}, got {now.content_digest} ({now.path}); resume with "
                f"that of {then.path!r}, or start anew without resume_from_checkpoint",
                now.path,
            )
        problems = [
            f"train_dataset, {name}: expected {getattr(then, name)!r}, with which {folder} was trained, got "
            f"{getattr(now, name)!r}; open the cache with the same options"
            for name in (*OPTIONS, "subset")
            if getattr(now, name) != getattr(then, name)
        ]
        if problems:
            raise ConfigError("\n".join(problems), problems)


def cache_of(name: str, dataset: Any) -> CachedLogitsDataset | EnsembleDataset | MixedDataset:
    """Return the dataset over caches, of which another one may be a torch ``Subset``.

    Raises
    ------
    ConfigError
        If it is another dataset, or its items are still encoded.
    """
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    if not isinstance(dataset, CachedLogitsDataset | EnsembleDataset | MixedDataset):
        raise ConfigError(
            f"{name}: expected a CachedLogitsDataset, MixedDataset or EnsembleDataset, or a torch Subset of one, got "
            f"{type(dataset).__name__}; open the teacher's cache with CachedLogitsDataset(path)"
        )
    if dataset.decode != "worker":
        raise ConfigError(f"{name}: expected a dataset with decode='worker', got {dataset.decode!r}")
    return dataset
