"""Calibrate a run on one worker, check that workers fit it, and record what was found."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
import uuid

from dask_logits.cache.profile import save_array, save_id_table
from dask_logits.data.items import make_items
from dask_logits.data.tokens import sample_documents
from dask_logits.errors import ClusterError, RunConflictError
from dask_logits.files.atomic import create_json
from dask_logits.job.driver import scoring_settings, teacher_spec
from dask_logits.job.executor import Executor
from dask_logits.job.prepare import Job, check_folder
from dask_logits.job.progress import live_steps
from dask_logits.job.reporter import Reporter
from dask_logits.job.roster import leave_out_misfits
from dask_logits.records import Array
from dask_logits.run.records import FORMAT, VERSION, Calibration, Manifest, Storage
from dask_logits.run.timings import plural
from dask_logits.teacher.checkpoint import resolve_dtype
from dask_logits.worker.calibrate import TOKENS as CALIBRATION_TOKENS
from dask_logits.worker.calibrate import CalibrationTask, calibrate, first_documents
from dask_logits.worker.environment import has_bfloat16

logger = logging.getLogger(__name__)

# Divisor for a trial's time limit. All trials at their limits leave half of the calibration's total time.
_TRIALS_IN_STALL = 8


def run_calibration(job: Job, executor: Executor, reporter: Reporter) -> tuple[Calibration, Array | None]:
    """Determine the numerics on a worker, and the id table of the compact profile."""
    reporter.report("calibrating")
    task = calibration_task(job, executor)
    logger.info(
        "calibrating on %s; a long plan also tries larger batches and compiled layers",
        plural(len(task.documents), "sequence"),
    )
    with live_steps("calibrating") as show, contextlib.ExitStack() as meanwhile:
        shown: str | None = None

        def on_step(step: str) -> None:
            nonlocal shown
            if shown is None:
                # The worker that calibrates loads first.
                meanwhile.enter_context(executor.preload(task.teacher, task.scoring.vocab_size))
            if step != shown:
                shown = step
                show(step)
                reporter.report("calibrating", step=step)

        found: tuple[Calibration, Array | None] = executor.call(calibrate, task, on_step=on_step, on_turn=reporter.tick)
    return found


def calibration_task(job: Job, executor: Executor) -> CalibrationTask:
    """Read the first documents of a plan, for its calibration on one of the executor's workers."""
    generation = job.config.teacher.generation
    documents: list[Array] = []
    tokens = 0
    # Of one worker.
    plan_tokens = job.estimate.tokens and job.estimate.tokens // (job.share.total * executor.n_workers)
    for one in sample_documents(enumerate(job.source.head()), job.tokenizer_spec):
        documents += one.tokens
        tokens += sum(map(len, one.tokens))
        if tokens >= CALIBRATION_TOKENS:
            break
    else:
        # The stream has ended here, whatever its limit is.
        plan_tokens = tokens
    sequences = [item.tokens for item in make_items(documents, job.items)]
    return CalibrationTask(
        teacher=teacher_spec(
            job,
            dtype=_dtype(job, executor),
            device=executor.device,
            torch_threads=executor.torch_threads,
        ),
        documents=first_documents(sequences, CALIBRATION_TOKENS),
        plan_tokens=plan_tokens,
        scoring=dataclasses.replace(scoring_settings(job, executor.device), positions="all", position_share=1.0),
        batch_tokens_fixed=generation.batch_tokens != "auto",
        head_rows_fixed=generation.head_rows != "auto",
        logits=job.config.scoring.logits,
        compile=job.config.scoring.compile,
        compact=job.is_compact,
        target_share=job.estimate.target_share,
        most_trial_seconds=job.config.job.stall_seconds / _TRIALS_IN_STALL,
    )


def _log_calibration(calibration: Calibration) -> None:
    numerics = calibration.numerics
    path = numerics.path
    logger.info(
        "calibrated: %s on %s, %.0f tokens/s for each worker, MFU %s, batches of %d tokens",
        numerics.dtype,
        numerics.device,
        calibration.tokens_per_second,
        "unknown" if calibration.mfu is None else f"{calibration.mfu:.2f}",
        numerics.batch_tokens,
    )
    layers = "compiled" if path.compiled else "eager"
    logger.info("scoring path: %s layers, attention %s, head %s", layers, path.attention, path.head)
    if (reason := calibration.refused.get("kernels")) is not None:
        logger.warning("Triton's kernels are not used, so scoring is slower: %s", reason)
    if calibration.distinct_draws is not None:
        logger.info("distinct ids among the draws of a position: %.1f", calibration.distinct_draws)
        return
    masses = ", ".join(f"{k}: {mass:.3f}" for k, mass in (calibration.kept_mass_by_k or {}).items())
    logger.info("kept mass by k: %s", masses or "no tokens")


def _dtype(job: Job, executor: Executor) -> str:
    setting, stored = job.config.teacher.dtype, job.teacher.checkpoint_dtype
    there = executor.environments.values()
    has_units = executor.device != "cuda" or all(map(has_bfloat16, there))
    dtype = resolve_dtype(setting, stored, executor.device, has_bfloat16=has_units)
    if not has_units and (setting, stored) == ("auto", "bfloat16"):
        logger.warning(
            "the GPUs have no bfloat16 units: the teacher runs in float32; distillation.teacher.dtype=float16 is "
            "faster and takes half the memory, if its values stay in range"
        )
    return dtype


def check_environment(job: Job, calibration: Calibration | None, executor: Executor) -> None:
    """Exclude workers with another environment than the run's, and refuse if none remains, or on another device.

    Raises
    ------
    RunConflictError
        If the workers have another device than the calibration's, or all have another environment.
    ClusterError
        If no worker has this release of the package.
    """
    frozen = calibration.numerics.device if calibration else executor.device
    if frozen != executor.device:
        raise RunConflictError(
            f"{job.run.path}: this run was calibrated on {frozen!r}, the workers now are {executor.device!r}, and the "
            "bits would differ; resume it there, or choose another distillation.teacher.cache_dir",
            {"device": (frozen, executor.device)},
        )
    if job.config.cluster.allow_mixed_workers or not executor.environments:
        return
    expected = calibration.environment if calibration else None
    if calibration is not None and expected is None:
        return
    if leave_out_misfits(executor.roster, executor.environments, expected):
        return
    if expected is None:
        raise ClusterError(
            "distillation.cluster: expected workers with this release of dask_logits, got none:\n"
            f"{executor.roster.listed()}\ninstall the same release on this machine and on all workers"
        )
    raise RunConflictError(
        f"{job.run.path}: this run was calibrated in another environment, and its targets would differ in their last "
        f"bits or more:\n{executor.roster.listed()}\n"
        "use workers with the environment of the run, or set distillation.cluster.allow_mixed_workers=true, which "
        "records the environment of each partition, or start over with "
        "distillation.teacher.generation.force_regenerate=true",
    )


def record(job: Job, calibration: Calibration, table: Array | None) -> Calibration:
    """Write the manifest, the id table and the numerics, unless they exist. Return the valid numerics."""
    manifest = Manifest(
        format=FORMAT,
        version=VERSION,
        run_id=uuid.uuid4().hex,
        created=time.time(),
        fingerprint=job.fingerprint,
        what=job.what,
        numerics=job.numerics,
        total_workers=job.share.total,
        commit=job.source.commit,
        files=job.source.file_states,
        how=job.config.model_dump(),
        teacher=dataclasses.asdict(job.teacher),
        tokenizer_map_digest=job.tokenizer.map_digest if job.tokenizer else None,
        tokenizer_ids=job.tokenizer.vocab_size if job.tokenizer else 0,
        template_date=job.tokenizer_spec.template_date,
    )
    created = create_json(job.run.manifest_path, manifest.to_json())
    if not created:
        # Another static worker may have been first since the last check of the folder.
        check_folder(job)
    if job.tokenizer:
        save_array(job.run.token_crcs_path, job.tokenizer.crcs)
    storage = Storage(
        profile="plain" if table is None else "compact",
        precision=job.config.cache.precision,
        id_table=None if table is None else save_id_table(job.run.tables_path, table),
    )
    mixed = job.config.cluster.allow_mixed_workers
    calibration = calibration.model_copy(update={"storage": storage, "mixed_workers": mixed})
    if create_json(job.run.calibration_path, calibration.to_json()):
        _log_calibration(calibration)
    logger.info("%s run in %s", "new" if created else "resumed", job.run.path)
    return job.run.calibration() or calibration
