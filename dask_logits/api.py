"""The one-call entry point, with the parameter names commonly used by scripts of this kind."""

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
    messages_column: str | None = None,
    mask_column: str | None = None,
    targets: str = "topk",
    draws: int | None = None,
    seed: int | None = None,
    temperatures: Sequence[float] = (),
    positions: str = "all",
    position_share: float | None = None,
) -> Path:
    """Score a dataset with a teacher and return the path of the cache.

    For every other setting, use :func:`dask_logits.load_config` and :func:`dask_logits.generate`. The function can be
    called from a script, a notebook or an interactive session. Worker processes do not import the calling module.

    Parameters
    ----------
    teacher_model_path
        Folder or hub name of a causal language model.
    dataset
        One of: an opened dataset with a ``text`` or ``input_ids`` column, its name, a list of texts or dicts, or a
        stream of rows (an ``IterableDataset``, an iterator or a generator).
    cache_dir
        The run folder.
    top_k
        Entries kept per position.
    batch_size
        Maximum number of documents per batch. None: only the token budget limits a batch.
    device
        ``auto``, ``cpu`` or ``cuda``.
    force_regenerate
        Recompute the run in this folder.
    num_workers
        Dask workers. None: one per GPU, or one per 2 cores on CPU.
    devices
        GPUs to use. None: all visible ones.
    worker_id, total_workers
        Index of this static worker, and the number of static workers that share the job. Each is started separately.
        Once all are done, :func:`dask_logits.merge` builds the cache.
    streaming, streaming_chunk_size
        Read the dataset as a stream, in partitions of ``streaming_chunk_size`` documents. A stream object is always
        read as a stream.
    max_samples
        Number of rows to use, from the first. None: all. A stream needs a number, or ``"all"``.
    max_length
        Maximum tokens of a document. None: 2,048, or the teacher's positions if fewer.
    text_column
        Column with the documents, or a field of a struct such as ``doc.text``. None: ``text``, or ``input_ids`` if
        there is no ``text``.
    messages_column
        Column of chats, of which a student learns the assistant's turns.
    mask_column
        Column beside ``input_ids`` that says which tokens a student learns.
    targets
        ``topk``, or ``sample``: tokens drawn from the teacher's distribution. ``top_k`` keeps its default then.
    draws, seed
        Draws per position with ``sample``, and their seed. None: 50, and 0.
    temperatures
        Further temperatures for training students, such as ``[2]``.
    positions
        Which positions get targets: ``all``, ``labels`` (those whose next token a student learns) or ``entropy`` (those
        with the highest entropy of the teacher's distribution).
    position_share
        Share of the positions with ``entropy``. None: 0.2.

    Returns
    -------
    Path
        ``<cache_dir>/teacher_logits.h5``, or the run folder for a static worker.

    Raises
    ------
    DaskLogitsError
        If an input must be changed first, or some partitions failed.
    """
    from dask_logits.config.root import Config
    from dask_logits.job.run import generate

    generation: dict[str, Any] = {
        "targets": targets,
        "top_k": top_k,
        "draws": draws,
        "seed": seed,
        "temperatures": list(temperatures),
        "positions": positions,
        "position_share": position_share,
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
            "messages_column": messages_column,
            "mask_column": mask_column,
        },
    }
    config = Config.from_mapping(tree, dataset_given=not named)
    return generate(config, None if isinstance(dataset, str) else dataset)
