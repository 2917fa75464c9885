"""Train a student on a cache with a plain PyTorch loop, and evaluate it on documents that are held out.

    python scripts/distill.py distillation.teacher.cache_dir=output/quickstart student.steps=100

``config/student/default.yaml`` lists the settings. With ``student.compare_with_labels=true`` a student of the text
alone, with the same weights and batches, is trained for comparison. ``student.output_dir`` receives the student and its
tokenizer for ``from_pretrained``, ``curve.json`` with the losses, and ``curve.html`` with their chart if Bokeh is
installed.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, Subset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dask_logits import CachedLogitsDataset, ItemOrder, Objective, ResumableSampler, StudentWithLoss, collate
from dask_logits.config.compose import config_dir
from dask_logits.config.setting import Group, nearest
from dask_logits.data.tokens import local_tokenizer
from dask_logits.errors import MISFITS, ConfigError, DaskLogitsError, DatasetError, first_line

Count = Annotated[int, Field(ge=1)]
_TERMS = ("loss", "divergence", "cross_entropy")


class StudentSettings(Group):
    """``student``: the settings, whose defaults are in ``config/student/default.yaml``."""

    cache: str
    output_dir: str
    model_path: str | None
    model: dict[str, Any]
    max_tokens: Count | None
    held_out: Annotated[float, Field(gt=0, lt=1)]
    steps: Count
    batch_tokens: Count
    learning_rate: Annotated[float, Field(gt=0)]
    warmup_steps: Annotated[int, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0)]
    divergence: str
    tail: str
    beta: float
    temperature: float
    alpha: float
    compare_with_labels: bool
    eval_steps: Count
    seed: int
    device: Literal["auto", "cpu", "cuda"]

    @property
    def objective(self) -> Objective:
        """The loss."""
        names = ("divergence", "tail", "beta", "temperature", "alpha")
        return Objective(**{name: getattr(self, name) for name in names})


def read_settings(overrides: Sequence[str]) -> StudentSettings:
    """Compose and validate the settings.

    Raises
    ------
    ConfigError
        With all problems of the values, or the first one of the overrides.
    """
    known = [f"student.{name}" for name in StudentSettings.model_fields]
    keys = [override.partition("=")[0].lstrip("+~") for override in overrides]
    unknown = [key for key in keys if key.startswith("student.") and ".".join(key.split(".")[:2]) not in known]
    if unknown:
        raise ConfigError.from_problems(*[f"{key}: unknown setting{nearest(key, known)}" for key in unknown])
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            tree = OmegaConf.to_container(compose("distill", list(overrides)), resolve=True)
        return StudentSettings.model_validate(tree["student"])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError.from_problems(" ".join(str(error).split())) from error
    except ValidationError as error:
        problems = [
            f"student.{'.'.join(map(str, each['loc']))}: {each['msg'].replace('Input should', 'it should')}, "
            f"got {each['input']!r}"
            for each in error.errors()
        ]
        raise ConfigError.from_problems(*problems) from error


def split(dataset: CachedLogitsDataset, share: float) -> tuple[Subset[Any], Subset[Any]]:
    """Hold out the last items. Text windows of one document are neighbours, so at most one is on both sides."""
    n_held_out = max(1, round(share * len(dataset)))
    if n_held_out >= len(dataset):
        raise DatasetError(
            f"student.held_out: expected a share that leaves items to train on, got {share:g} of {len(dataset)} items; "
            "choose a smaller share, or a cache of two items or more"
        )
    n_train = len(dataset) - n_held_out
    return Subset(dataset, range(n_train)), Subset(dataset, range(n_train, len(dataset)))


def batches(items: Iterable[Any], batch_tokens: int) -> Iterator[dict[str, Any]]:
    """Collate successive items to batches of at most so many tokens, or of one item that is longer."""
    group: list[Any] = []
    for item in items:
        longest = max(len(each["input_ids"]) for each in (*group, item))
        if group and longest * (len(group) + 1) > batch_tokens:
            yield collate(group)
            group = []
        group.append(item)
    if group:
        yield collate(group)


def as_they_are(item: Any) -> Any:
    """Return an item, for a loader that does not batch."""
    return item


def tokenizer_of(settings: StudentSettings, dataset: CachedLogitsDataset) -> Any | None:
    """Return the tokenizer to save with the student. None if the cache has none, or this machine lacks the teacher's.

    Raises
    ------
    ConfigError
        If the student has another tokenizer than the teacher.
    """
    digest = dataset.attributes.get("tokenizer_map_digest")
    if not digest:
        return None
    if settings.model_path is None:
        return local_tokenizer(str(dataset.attributes.get("teacher_path")), str(digest))
    try:
        CachedLogitsDataset(settings.cache, student_tokenizer=settings.model_path)
    except DaskLogitsError as error:
        raise ConfigError(f"student.model_path: {str(error).removeprefix('student_tokenizer: ')}") from error
    return AutoTokenizer.from_pretrained(settings.model_path)


def new_student(settings: StudentSettings, dataset: CachedLogitsDataset) -> Any:
    """Load the student, or create it with random weights.

    Raises
    ------
    ConfigError
        If transformers cannot make it, or it has fewer logits than the cache's vocabulary.
    """
    name = "model" if settings.model_path is None else "model_path"
    try:
        if settings.model_path is None:
            config = AutoConfig.for_model(**{**settings.model, "vocab_size": dataset.vocab_size})
            return AutoModelForCausalLM.from_config(config)
        student = AutoModelForCausalLM.from_pretrained(settings.model_path, dtype=torch.float32)
    except (OSError, *MISFITS) as error:
        raise ConfigError(
            f"student.{name}: expected a causal language model of transformers, got {getattr(settings, name)!r}: "
            f"{first_line(error)}"
        ) from error
    width = student.config.get_text_config().vocab_size
    if width < dataset.vocab_size:
        raise ConfigError(
            f"student.model_path: expected at least {dataset.vocab_size} logits, the vocabulary of the cache, got "
            f"{width}; choose a student with the teacher's tokenizer"
        )
    return student


def take_special_tokens(model: Any, tokenizer: Any) -> None:
    """Write the tokenizer's special tokens into a model's configurations, so that generation ends at the right one."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for config in (model.config, model.generation_config):
            setattr(config, name, getattr(tokenizer, name))


class Loop:
    """The student, its optimizer and its losses so far."""

    def __init__(self, settings: StudentSettings, dataset: CachedLogitsDataset, name: str = "training") -> None:
        self.name = name
        torch.manual_seed(settings.seed)
        if settings.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("student.device: expected 'auto' or 'cpu', because no GPU is visible, got 'cuda'")
        is_cuda = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
        self.settings = settings
        self.device = torch.device("cuda" if is_cuda else "cpu")
        self.model = new_student(settings, dataset).to(self.device)
        self.student = StudentWithLoss(self.model, settings.objective)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=settings.learning_rate)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)
        self.curve: dict[str, list[dict[str, float]]] = {"train": [], "held_out": []}

    def rate(self, step: int) -> float:
        """Return the share of the learning rate at a step, from 0."""
        warmup, steps = self.settings.warmup_steps, self.settings.steps
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    def loss(self, batch: dict[str, Any]) -> Any:
        """Compute the loss of a batch."""
        ids, mask, targets = (batch[name].to(self.device) for name in ("input_ids", "attention_mask", "targets"))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.student(ids, targets, mask)

    def step(self, batch: dict[str, Any]) -> dict[str, float]:
        """Train on a batch. Return what is reported of it."""
        started = time.perf_counter()
        self.student.train()
        result = self.loss(batch)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        values = {name: getattr(result, name).item() for name in _TERMS}
        return {**values, "tokens_per_second": result.n_tokens / (time.perf_counter() - started)}

    @torch.no_grad()
    def evaluate(self, held_out: Subset[Any]) -> dict[str, float]:
        """Return the mean losses over all scored positions of the held-out items."""
        self.student.eval()
        sums, n_tokens = dict.fromkeys(_TERMS, 0.0), 0
        for batch in batches((held_out[i] for i in range(len(held_out))), self.settings.batch_tokens):
            result = self.loss(batch)
            n_tokens += result.n_tokens
            for name in _TERMS:
                sums[name] += getattr(result, name).item() * result.n_tokens
        return {name: value / max(1, n_tokens) for name, value in sums.items()}

    def run(self, train: Subset[Any], held_out: Subset[Any]) -> None:
        """Train for all steps. Evaluate before, between and after."""
        settings = self.settings
        sampler = ResumableSampler(ItemOrder(len(train), seed=settings.seed), num_replicas=1, rank=0)
        loader = DataLoader(train, batch_size=None, sampler=sampler, collate_fn=as_they_are)
        # A loop over the loader is an epoch, and the next one continues the batch.
        endless = batches(chain.from_iterable(repeat(loader)), settings.batch_tokens)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(self.name, total=settings.steps)
            for step in range(settings.steps + 1):
                if step % settings.eval_steps == 0 or step == settings.steps:
                    self.curve["held_out"].append({"step": step, **self.evaluate(held_out)})
                if step < settings.steps:
                    values = self.step(next(endless))
                    self.curve["train"].append({"step": step + 1, **values})
                    text = f"{self.name}: loss {values['loss']:.3f}, {values['tokens_per_second']:,.0f} tokens/s"
                    progress.update(task, advance=1, description=text)


def draw(curve: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Write a chart of the losses as one HTML file."""
    from bokeh.embed import file_html
    from bokeh.plotting import figure
    from bokeh.resources import INLINE

    chart = figure(x_axis_label="step", y_axis_label="nats per scored position", width=900, height=450)
    for name, color in (("divergence", "#1f77b4"), ("cross_entropy", "#ff7f0e")):
        label = name.replace("_", "-")
        for part, dash in (("train", "dotted"), ("held_out", "solid")):
            points = [(entry["step"], entry[name]) for entry in curve[part]]
            chart.line(
                *map(list, zip(*points, strict=True)),
                color=color,
                line_dash=dash,
                legend_label=f"{label}, {part.replace('_', ' ')}",
            )
    path.write_text(file_html(chart, INLINE, "Distillation"))


def new_folder(path: str) -> Path:
    """Create the output folder before the training, so that a student is not lost after it.

    Raises
    ------
    ConfigError
        If nothing can be written there.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"student.output_dir: expected a folder that can be written, got {path!r}: {first_line(error)}"
        ) from error
    return folder


def main(overrides: Sequence[str]) -> None:
    """Train a student with these settings."""
    settings = read_settings(overrides)
    dataset = CachedLogitsDataset(settings.cache, max_tokens=settings.max_tokens)
    print(dataset)
    train, held_out = split(dataset, settings.held_out)
    tokenizer = tokenizer_of(settings, dataset)
    loop = Loop(settings, dataset)
    folder = new_folder(settings.output_dir)
    loop.run(train, held_out)
    alone = None
    if settings.compare_with_labels:
        alone = Loop(settings.model_copy(update={"alpha": 0.0}), dataset, "training on labels alone")
        alone.run(train, held_out)

    if tokenizer is not None:
        if settings.model_path is None:
            take_special_tokens(loop.model, tokenizer)
        tokenizer.save_pretrained(folder)
    loop.model.save_pretrained(folder)
    report = {"settings": settings.model_dump(), "content_digest": dataset.content_digest, **loop.curve}
    if alone is not None:
        report["labels_alone"] = alone.curve
    (folder / "curve.json").write_text(json.dumps(report, indent=1))
    if importlib.util.find_spec("bokeh"):
        draw(loop.curve, folder / "curve.html")
    compare(loop, alone, len(held_out))
    print(f"student and curve: {folder}")


def compare(loop: Loop, alone: Loop | None, n_held_out: int) -> None:
    """Print the losses on held-out items before and after the training."""
    steps = f"after {loop.settings.steps} steps"
    rows = {"before": loop.curve["held_out"][0], steps: loop.curve["held_out"][-1]}
    if alone is not None:
        rows[f"{steps} on labels alone"] = alone.curve["held_out"][-1]
    print(f"on {n_held_out} held-out items, in nats per token:")
    for name, each in rows.items():
        figures = f"{each['divergence']:.3f} from the teacher, {each['cross_entropy']:.3f} from the text"
        print(f"  {name + ':':{max(map(len, rows)) + 1}} {figures}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DaskLogitsError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error
