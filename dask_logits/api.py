"""The one-call entry point, with the parameter names that scripts of this kind have long used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


def generate_teacher_logits(
    teacher_model_path: str,
    dataset: Dataset | IterableDataset | Iterator[Any] | Sequence[str | Mapping[str, Any]] | str,
    cache_dir: str | Path = "output/teacher_logits",
    top_k: int = 64,
    batch_size: int | None = None,
    device: str = "auto",
    force_regenerate: bool = False,
    num_workers: int | None = None,
    devices: str | list[int] | None = None,
    worker_id: int | None = None,
    total_workers: int | None = None,
    streaming: bool = False,
    streaming_chunk_size: int = 1000,
    max_samples: int | str | None = None,
    max_length: int | None = None,
    text_column: str | None = None,
) -> Path:
    """Score a dataset with a teacher and return the path of the cache.

    For every other setting use :func:`dask_logits.load_config` and :func:`dask_logits.generate`. It can be called from
    a script, a notebook or an interactive session; worker processes do not import the calling module.

    Parameters
    ----------
    teacher_model_path
        Folder or hub name of a causal language model.
    dataset
        An opened dataset with a ``text`` or ``input_ids`` column, or the name of one; a list of texts or of dicts; or
        a stream of rows: an ``IterableDataset``, an iterator or a generator.
    cache_dir
        The run folder.
    top_k
        Entries kept per position.
    batch_size
        Bound on documents per batch; None: only the token budget bounds it.
    device
        ``auto``, ``cpu`` or ``cuda``.
    force_regenerate
        Compute a run that is in this folder anew.
    num_workers
        Dask workers; None: one per GPU, or one per 2 cores on CPU.
    devices
        GPUs to use; None: all that are visible.
    worker_id, total_workers
        This process is one of so many static workers that share the job, each started on its own; once all are done,
        :func:`dask_logits.merge` makes their cache.
    streaming, streaming_chunk_size
        Read the dataset as a stream, in partitions of so many documents. A stream that is given as an object is always
        read as one.
    max_samples
        Rows used, from the first; None: all. A stream needs a number, or ``"all"``.
    max_length
        Most tokens of a document; None: 2,048, or the teacher's positions if these are fewer.
    text_column
        Column with the documents, or a field of a struct such as ``doc.text``; None: ``text``, or ``input_ids`` where
        only that is there.

    Returns
    -------
    Path
        ``<cache_dir>/teacher_logits.h5``; of a static worker the run folder.

    Raises
    ------
    DaskLogitsError
        If something has to change first, or some partitions failed.
    """
    from dask_logits.config import Config
    from dask_logits.job.run import generate

    generation: dict[str, Any] = {
        "top_k": top_k,
        "batch_size": batch_size,
        "device": device,
        "force_regenerate": force_regenerate,
        "num_workers": num_workers,
        "devices": devices,
        "worker_id": worker_id,
        "total_workers": total_workers,
    }
    named = {"name": dataset} if isinstance(dataset, str) else {}
    tree = {
        "teacher": {"model_path": teacher_model_path, "cache_dir": str(cache_dir), "generation": generation},
        "dataset": {
            **named,
            "streaming": streaming,
            "streaming_chunk_size": streaming_chunk_size,
            "max_samples": max_samples,
            "max_length": "auto" if max_length is None else max_length,
            "text_column": text_column,
        },
    }
    config = Config.from_mapping(tree, dataset_given=not named)
    return generate(config, None if isinstance(dataset, str) else dataset)
