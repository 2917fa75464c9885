"""``DistillationTrainer``: the Hugging Face Trainer on a cache.

The loss is part of the wrapped forward (:class:`dask_logits.StudentWithLoss`), so that DistributedDataParallel sees one
forward and the logits of a whole batch never exist. Sums are divided by the scored positions of the whole step, over
all accumulated batches and processes, so neither changes the gradient. Items are read in the order of
:class:`dask_logits.ItemOrder`, and each checkpoint records the cache and the position.

Dimension letters: B items of a batch.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from dask_logits.errors import ConfigError
from dask_logits.files.atomic import replace_json
from dask_logits.train.batches import collate
from dask_logits.train.checkpoint import STATE_NAME, DistillationState, TrainedOn, cache_of
from dask_logits.train.losses import DistillationLoss, distillation_loss
from dask_logits.train.objective import Divergence, Objective, Tail, column_of
from dask_logits.train.order import ItemOrder
from dask_logits.train.sampler import ResumableSampler
from dask_logits.train.student import StudentWithLoss
from dask_logits.vocabulary import check_tokenizer

_TERMS = ("divergence", "cross_entropy")


@dataclass
class DistillationConfig(TrainingArguments):  # type: ignore[misc]
    """Arguments of a :class:`DistillationTrainer`: all of ``transformers.TrainingArguments``, and an objective.

    Parameters
    ----------
    divergence, tail, beta, temperature, alpha
        As for :class:`dask_logits.Objective`.
    shuffle
        As for :class:`dask_logits.ItemOrder`, with the seed ``data_seed``, or else ``seed``.
    remove_unused_columns
        False. The items of a cache keep their columns in any case.
    greater_is_better
        None: False if `metric_for_best_model` is a loss, a divergence or a cross-entropy, otherwise True.
    """

    divergence: Divergence = field(default="forward_kl", metadata={"help": "Divergence from the teacher."})
    tail: Tail = field(default="auto", metadata={"help": "What becomes of the mass outside the kept entries."})
    beta: float = field(default=0.5, metadata={"help": "Weight of the teacher in the divergence jsd."})
    temperature: float = field(default=1.0, metadata={"help": "Divides the logits of both sides in the divergence."})
    alpha: float = field(default=1.0, metadata={"help": "Share of the divergence. The rest is cross-entropy."})
    shuffle: Literal["block", "full", "none"] = field(default="block", metadata={"help": "Order of the items."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Items keep their columns in any case."})
    greater_is_better: bool | None = field(default=None, metadata={"help": "Whether the best model has the most."})

    def __post_init__(self) -> None:
        # TrainingArguments knows only that a smaller loss is better.
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(_TERMS):
            self.greater_is_better = False
        super().__post_init__()

    @property
    def objective(self) -> Objective:
        """The loss that the arguments describe.

        Raises
        ------
        ConfigError
            As for :class:`dask_logits.Objective`.
        """
        return Objective(**{each.name: getattr(self, each.name) for each in fields(Objective)})


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """Train a student on a cache with the Hugging Face Trainer.

    Each log has ``loss``, its terms ``divergence`` and ``cross_entropy`` in nats per scored position, and
    ``tokens_per_second``, the scored positions of all processes since the last log, without the time of evaluations.
    ``evaluate`` reports the same terms, each a mean over all scored positions of the dataset.

    Parameters
    ----------
    model
        A causal language model, also one wrapped by peft. None with `model_init`.
    args
        None: the defaults.
    train_dataset
        A :class:`dask_logits.CachedLogitsDataset`, a :class:`dask_logits.MixedDataset`, a
        :class:`dask_logits.EnsembleDataset`, or a torch ``Subset`` of one.
    eval_dataset
        The same, or a dict of them.
    data_collator
        None: :func:`dask_logits.collate`. Another one must return its keys ``input_ids``, ``attention_mask`` and
        ``targets``.
    processing_class
        As for ``transformers.Trainer``. A tokenizer, or that of a processor, is compared with the teacher's.
    model_init, callbacks, optimizers, optimizer_cls_and_kwargs
        As for ``transformers.Trainer``.

    Raises
    ------
    CacheError
        If the tokenizer maps ids to other tokens than the teacher's.
    ConfigError
        If a dataset is not over a cache, the model has fewer logits than the cache's vocabulary, or an argument of
        ``TrainingArguments`` does not go with distillation. All such arguments are named. If a dataset has no targets
        for the objective.

    Notes
    -----
    With FSDP and DeepSpeed, which divide the head's weight among the processes, the loss takes full logits.
    """

    def __init__(
        self,
        model: Any = None,
        args: DistillationConfig | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        data_collator: Any = None,
        processing_class: Any = None,
        model_init: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Any], dict[str, Any]] | None = None,
    ) -> None:
        args = DistillationConfig() if args is None else args
        _check_arguments(args)
        evaluated = eval_dataset if isinstance(eval_dataset, Mapping) else {"eval_dataset": eval_dataset}
        named = {"train_dataset": train_dataset, **evaluated}
        caches = [cache_of(name, dataset) for name, dataset in named.items() if dataset is not None]
        # Not `objective`, in which Trainer.hyperparameter_search keeps the value of a trial.
        self._objective = args.objective
        self._student: StudentWithLoss | None = None
        self._sampler: ResumableSampler | None = None
        self._trained, self._evaluated = _Sums(), _Sums()
        super().__init__(
            model=model,
            args=args,
            data_collator=collate if data_collator is None else data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        # Trainer then takes the loss as it is, already divided for accumulation.
        self.model_accepts_loss_kwargs = True
        self.add_callback(_Epochs(self))
        for cache in caches:
            _check_objective(self._objective, cache)
            _check_vocabulary(self.model, cache.student_vocab_size or cache.vocab_size)
            _check_tokenizer(processing_class, cache)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train, or resume.

        Parameters
        ----------
        resume_from_checkpoint, trial, ignore_keys_for_eval
            As for ``transformers.Trainer.train``.

        Raises
        ------
        CacheError
            If the checkpoint was trained on another cache, or has no ``distillation_state.json``.
        ConfigError
            If the dataset was opened with other options, or the order or the size of a step differs.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        if isinstance(resume_from_checkpoint, str | Path):
            self._check_checkpoint(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        *args: Any,
        **options: Any,
    ) -> Any:
        """Search as ``transformers.Trainer`` does.

        Parameters
        ----------
        hp_space, args, options
            As for ``transformers.Trainer.hyperparameter_search``.
        compute_objective
            None: the loss of the evaluation, without its two terms. Losses of different objectives do not compare, so
            pass another function if trials change the objective.
        """
        return super().hyperparameter_search(hp_space, compute_objective or _evaluation_loss, *args, **options)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """Read the batches of a step, and count their scored positions on all processes."""
        batches = list(islice(epoch_iterator, num_batches))
        counts = (batch["targets"].mask.sum().to(device) for batch in batches)
        count = sum(counts, start=torch.zeros((), dtype=torch.int64, device=device))
        count = self.accelerator.reduce(count, "sum")
        self._trained.steps += 1
        self._trained.n_tokens = self._trained.n_tokens + count
        return batches, count

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss of a batch.

        Parameters
        ----------
        model
            The student, wrapped by Trainer or not.
        inputs
            The batch.
        return_outputs
            Whether to return the :class:`dask_logits.DistillationLoss`, too.
        num_items_in_batch
            Scored positions of the step on all processes. None: those of the batch.
        """
        normaliser = None
        if num_items_in_batch is not None:
            # The processes average their gradients.
            normaliser = torch.as_tensor(num_items_in_batch).double().clamp(min=1) / self.accelerator.num_processes
        result = self._loss(model, inputs, normaliser=normaliser)
        if num_items_in_batch is not None:
            self._trained.add(torch.stack([getattr(result, name).detach() for name in _TERMS]))
        return (result.loss, result) if return_outputs else result.loss

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """Compute the loss of a batch without gradients. There are no logits to return."""
        # The hook of transformers 5.23 that Trainer's own prediction_step calls. There is no public one.
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.accelerator.autocast():
            each = self._loss(model, inputs, per_token=True)
        values_B3 = torch.stack([getattr(each, name).sum(-1) for name in ("loss", *_TERMS)], -1)
        count_B = inputs["targets"].mask.sum(-1)
        # Without the items that accelerate repeats to fill the last batch.
        values_B3, all_count_B = self.accelerator.gather_for_metrics((values_B3, count_B))
        self._evaluated.add(values_B3.cpu().double().sum(0))
        self._evaluated.n_tokens = self._evaluated.n_tokens + all_count_B.sum()
        return each.loss.sum() / count_B.sum().clamp(min=1), None, None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return a loader of all items, also with ``dataloader_drop_last``."""
        with self._keeping_last():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return a loader of all items, also with ``dataloader_drop_last``."""
        with self._keeping_last():
            return super().get_test_dataloader(test_dataset)

    @contextlib.contextmanager
    def _keeping_last(self) -> Iterator[None]:
        before, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = before

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Evaluate, with every scored position of the dataset counting once."""
        self._evaluated = _Sums()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        count = max(1, int(self._evaluated.n_tokens))
        for name, value in zip(("loss", *_TERMS), self._evaluated.values.tolist(), strict=True):
            output.metrics[f"{metric_key_prefix}_{name}"] = value / count
        self._trained.started += time.perf_counter() - self._evaluated.started
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with both terms and the tokens per second if these are values of training steps."""
        if "loss" in logs and self._trained.steps:
            values = self.accelerator.reduce(self._trained.values, "mean") / self._trained.steps
            logs |= dict(zip(_TERMS, values.tolist(), strict=True))
            seconds = time.perf_counter() - self._trained.started
            logs["tokens_per_second"] = int(self._trained.n_tokens) / seconds
            self._trained = _Sums()
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and beside it ``distillation_state.json``."""
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if self.args.should_save and self.train_dataset is not None:
            folder.mkdir(parents=True, exist_ok=True)
            epoch, position = self._progress(self.state.global_step)
            state = DistillationState(
                version=1,
                dataset=TrainedOn.of(self.train_dataset),
                sampler={**self._new_sampler().state_dict(), "epoch": epoch, "position": position},
            )
            replace_json(folder / STATE_NAME, state.to_json())
        super().save_model(output_dir, _internal_call)

    def _loss(self, model: Any, inputs: Mapping[str, Any], **options: Any) -> DistillationLoss:
        if "position_ids" in inputs:
            raise ConfigError(
                "data_collator: expected batches of padded items, got position_ids, as from collate_flat, which the "
                "trainer does not pass to the student; use dask_logits.collate"
            )
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        targets = inputs["targets"].to(ids.device)
        inner = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if isinstance(inner, StudentWithLoss):
            result: DistillationLoss = model(ids, targets, mask, **options)
            return result
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return distillation_loss(logits, targets, self._objective, input_ids=ids, **options)

    # A private hook of transformers 5.23, which has no public place for a module around the model. model_wrapped is
    # that module, and model stays the model that is saved.
    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        if training:
            # A trial of hyperparameter_search has changed the arguments.
            self._objective = self.args.objective
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._wrap_model(model, training, dataloader)
        inner = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if isinstance(inner, StudentWithLoss):
            inner.objective = self._objective
            return model
        if self._student is None or self._student.model is not inner:
            with self.accelerator.autocast():
                self._student = StudentWithLoss(inner, self._objective)
        self._student.objective = self._objective
        return self.accelerator.prepare_model(self._student) if training else self._student

    # A private hook of transformers 5.23, too. The public get_train_dataloader would need a copy of its body.
    def _get_train_sampler(self, train_dataset: Any = None) -> ResumableSampler:
        self._sampler = self._new_sampler()
        return self._sampler

    def _new_sampler(self) -> ResumableSampler:
        """Return a sampler for all processes, because accelerate divides the batches among them."""
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        order = ItemOrder(len(self.train_dataset), seed=seed, shuffle=args.shuffle)
        digest = cache_of("train_dataset", self.train_dataset).content_digest
        return ResumableSampler(order, num_replicas=1, rank=0, digest=digest)

    def _progress(self, step: int) -> tuple[int, int]:
        """Return the epoch after a step, and the items of the epoch that all processes were trained on."""
        step_items = self.get_total_train_batch_size(self.args)
        batch_items = step_items // self.args.gradient_accumulation_steps
        n_items = len(self.train_dataset)
        batches = n_items // batch_items if self.args.dataloader_drop_last else -(-n_items // batch_items)
        epoch, done = divmod(step, max(1, -(-batches // self.args.gradient_accumulation_steps)))
        return epoch, done * step_items

    def _check_checkpoint(self, folder: Path) -> None:
        """Refuse a checkpoint of another dataset or order, and one whose position Trainer would not find."""
        if self.train_dataset is None:
            raise ConfigError("train_dataset: expected the CachedLogitsDataset of the checkpoint, got None")
        state = DistillationState.read(folder)
        state.check(folder, TrainedOn.of(self.train_dataset))
        self._new_sampler().load_state_dict(state.sampler)
        then = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        step = then.global_step
        if self.args.auto_find_batch_size and then.train_batch_size is not None:
            # As Trainer does when it resumes.
            self._train_batch_size = then.train_batch_size
        saved, now = (state.sampler["epoch"], state.sampler["position"]), self._progress(step)
        if saved != now:
            raise ConfigError(
                f"{folder}: expected steps of the size it was trained with, after {step} of which item {saved[1]} of "
                f"epoch {saved[0]} is next, got steps of {self.get_total_train_batch_size(self.args)} items, with item "
                f"{now[1]} of epoch {now[0]} next; resume with the same product of per_device_train_batch_size, "
                "gradient_accumulation_steps and processes, and the same dataloader_drop_last"
            )


class _Sums:
    """Sums since a point in time."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.steps = 0
        self.n_tokens: Tensor | int = 0
        self.values = torch.zeros(())

    def add(self, values: Tensor) -> None:
        self.values = self.values.to(values) + values


class _Epochs(TrainerCallback):  # type: ignore[misc]
    """Tells the sampler the epoch, which accelerate 1.15 does not do where it skips batches on several processes."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._trainer._trained = _Sums()

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._trainer._sampler is not None:
            self._trainer._sampler.set_epoch(int(state.epoch or 0))


def _check_arguments(args: DistillationConfig) -> None:
    if not isinstance(args, DistillationConfig):
        raise ConfigError(f"args: expected a DistillationConfig, got {type(args).__name__}")
    problems = [
        f"{name}: expected {expected!r}, got {getattr(args, name)!r}; {cure}"
        for name, expected, cure in (
            ("label_smoothing_factor", 0.0, "the teacher's distribution is the target"),
            ("train_sampling_strategy", "random", "shuffle=... chooses the order"),
            ("ignore_data_skip", False, "no item is read to skip it"),
        )
        if getattr(args, name, expected) != expected
    ]
    for name in ("split_batches", "dispatch_batches"):
        if getattr(args.accelerator_config, name, None):
            problems.append(f"accelerator_config: expected {name}=False, got True; each process reads its own batches")
    if args.n_gpu > 1:
        problems.append(
            f"n_gpu: expected one GPU per process, got {args.n_gpu}; start the script with torchrun or accelerate "
            "launch, or show it one GPU with CUDA_VISIBLE_DEVICES"
        )
    if problems:
        raise ConfigError("\n".join(problems), problems)


def _check_objective(objective: Objective, cache: Any) -> None:
    """Refuse an objective that a cache has no targets for, before the first evaluation does."""
    objective = objective.of(cache)
    if objective.temperature != 1 and objective.tail != "renormalised":
        column_of(objective.temperature, cache.temperatures)


def _check_tokenizer(processing_class: Any, cache: Any) -> None:
    """Refuse a tokenizer, also that of a processor, which maps ids to other tokens than the teacher's, if known."""
    has_ids = hasattr(processing_class, "get_vocab")
    tokenizer: Any = processing_class if has_ids else getattr(processing_class, "tokenizer", None)
    for source in getattr(cache, "sources", {"": cache}).values():
        if hasattr(tokenizer, "get_vocab") and source.attributes.get("tokenizer_map_digest"):
            check_tokenizer(source.attributes, None, tokenizer, str(source.paths[0]), "processing_class")


def _evaluation_loss(metrics: Mapping[str, float]) -> float:
    """Return the loss of an evaluation, summed over its datasets."""
    return sum(value for name, value in metrics.items() if name.endswith("_loss"))


def _check_vocabulary(model: Any, vocab_size: int) -> None:
    """Refuse a student that lacks logits for ids of the cache."""
    if not hasattr(model, "config"):
        raise ConfigError(
            f"model: expected a causal language model of transformers, got {type(model).__name__}; pass the model "
            "itself, which the trainer wraps with its loss"
        )
    width = model.config.get_text_config().vocab_size
    if width < vocab_size:
        raise ConfigError(
            f"model: expected at least {vocab_size} logits, the vocabulary of the cache, got {width}; if the student "
            "has the teacher's tokenizer, open the cache with "
            f"CachedLogitsDataset(..., student_vocab_size={width}, skip_unrepresentable=True)"
        )
