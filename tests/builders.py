"""Small real things that tests are made of: models, tokenizers, texts, records, caches."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import warm

from dask_logits.cache.profile import Compact, Plain, Profile, as_kept
from dask_logits.cache.reader import CacheReader
from dask_logits.cache.writer import CacheWriter
from dask_logits.records import NO_EXTRAS, Array, Extras, Records, digest_of, schema

ROOT = Path(__file__).parents[1]
SMOLLM2 = ROOT / "output" / "models" / "SmolLM2-135M-Instruct"
WORDS = [
    "red",
    "green",
    "blue",
    "cat",
    "dog",
    "sun",
    "moon",
    "tree",
    "sea",
    "hill",
    "runs",
    "sings",
    "sleeps",
    "a",
    "the",
]
HEAD_WIDTH = 112
VOCAB_SIZE = 104


def save_tokenizer(folder: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """Save a tokenizer of words with `vocab_size` ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = WORDS + [f"w{i}" for i in range(vocab_size - len(WORDS) - 1)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(folder)


_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
_BASE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 256}  # fmt: skip
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
# Family → what its configuration needs beside the base, to be small and to show what is special about it.
FAMILIES = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "codegen": {**_GPT, "rotary_dim": 4},
    "cohere": {**_BASE, "logit_scale": 0.25},
    "cohere2": {**_BASE, "sliding_window": 8, "num_key_value_heads": 2},
    "deepseek_v3": {**_BASE, **_MOE, **_MLA, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
                    "n_shared_experts": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    "falcon": _BASE,
    "falcon_h1": {**_BASE, **_GROUPED, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
                  "mamba_n_groups": 1, "mamba_expand": 2, "lm_head_multiplier": 0.5},
    "gemma": {**_BASE, "head_dim": 8, "num_key_value_heads": 1},
    "gemma2": {**_BASE, **_GROUPED, "sliding_window": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {**_BASE, **_GROUPED, "sliding_window": 8},
    "glm4": {**_BASE, **_GROUPED},
    "gpt2": _GPT,
    "gpt_neox": _BASE,
    "gpt_oss": {**_BASE, **_GROUPED, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": {**_GPT, "rotary_dim": 4},
    "granite": {**_BASE, "logits_scaling": 3.0},
    "lfm2": {**_BASE, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
    "llama": _BASE,
    "mamba": {**_BASE, "state_size": 4},
    "mamba2": {**_BASE, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "expand": 2},
    "minicpm3": {**_BASE, **_MLA, "num_key_value_heads": 4},
    "mistral": {**_BASE, "num_key_value_heads": 2, "sliding_window": 8},
    "mixtral": {**_BASE, "num_key_value_heads": 2, "num_local_experts": 4},
    "nanochat": {**_BASE, "num_key_value_heads": 2},
    "olmo2": _BASE,
    "opt": {**_BASE, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "phi": _BASE,
    "phi3": _BASE,
    "qwen2": {**_BASE, "num_key_value_heads": 2},
    "qwen3": {**_BASE, **_GROUPED},
    "qwen3_moe": {**_BASE, **_GROUPED, **_MOE, "num_experts": 4},
    "qwen3_next": {**_BASE, **_GROUPED, **_MOE, "num_experts": 4, "shared_expert_intermediate_size": 32,
                   "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
                   "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {**_BASE, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 8, "head_dim": 8},
    "smollm3": {**_BASE, "num_key_value_heads": 2},
    "starcoder2": {**_BASE, "num_key_value_heads": 2},
}  # fmt: skip


def tiny_model(family: str, **overrides):
    """Build a random causal model with a head wider than the tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {"vocab_size": HEAD_WIDTH, **_TOKENS, **FAMILIES[family], **overrides}
    config = AutoConfig.for_model(family, **values)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # The default spread leaves random logits nearly flat; a sharp head makes mistakes visible.
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return model


def sentences(count: int, seed: int = 1, longest: int = 30) -> list[str]:
    """Return documents of very uneven length."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.choice([1, 2, 5, 9, longest]))) for _ in range(count)]


def write_json_lines(path: Path, rows: list) -> Path:
    """Write rows as JSON lines; plain strings become a ``text`` column."""
    rows = [{"text": row} if isinstance(row, str) or row is None else row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def records(
    lengths=(3, 0, 2),
    k: int = 2,
    vocab_size: int = 50,
    seed: int = 0,
    first_row: int = 0,
    temperatures: bool = False,
    masked: bool = False,
) -> Records:
    """Return random but well-formed records."""
    draw = np.random.default_rng(seed)
    n = int(sum(lengths))
    logits = draw.normal(size=(n, vocab_size)).astype(np.float64) * 2
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    lse = np.log(np.exp(logits).sum(1))
    logp = np.take_along_axis(logits, order, 1) - lse[:, None]
    input_ids = draw.integers(vocab_size, size=n)
    labels = np.append(input_ids[1:], 0)[:n]
    label_logprob = (logits[np.arange(n), labels] - lse).astype(np.float32)
    ends = np.cumsum(lengths)
    label_logprob[[end - 1 for end, length in zip(ends, lengths, strict=True) if length]] = np.nan
    types = schema(k, vocab_size)
    tails = []
    for T in TEMPERATURES:
        p = np.exp(logits / T)
        tails.append(np.log1p(-np.take_along_axis(p, order, 1).sum(1) / p.sum(1)))
    return Records(
        input_ids=input_ids.astype(types["input_ids"][0]),
        topk_ids=order.astype(types["topk_ids"][0]),
        topk_logprobs=logp.astype(np.float16),
        logsumexp=lse.astype(np.float32),
        tail_logmass=np.log1p(-np.exp(logp).sum(1)).astype(np.float32),
        label_logprob=label_logprob,
        tail_logmass_T=np.stack(tails, 1).astype(np.float32) if temperatures else None,
        loss_mask=draw.integers(2, size=n).astype(np.uint8) if masked else None,
        document_row=np.arange(first_row, first_row + len(lengths), dtype=np.uint64),
        document_offset=np.zeros(len(lengths), np.uint32),
        document_length=np.array(lengths, np.uint32),
    )


def drawn_records(made: Records, draws: int = 7, vocab_size: int = 50, seed: int = 0) -> Records:
    """Return records whose targets are draws, some from few tokens and some from many."""
    random_ids = np.random.default_rng(seed)
    ids_MK, counts_MK = (np.zeros((made.n_targets, draws), schema(1, vocab_size)[name][0])
                         for name in ("topk_ids", "topk_counts"))  # fmt: skip
    for row in range(made.n_targets):
        width = random_ids.choice([1, 3, vocab_size])
        values, counts = np.unique(random_ids.choice(vocab_size, width)[random_ids.integers(width, size=draws)],
                                   return_counts=True)  # fmt: skip
        order = np.lexsort((values, -counts))
        ids_MK[row, : len(values)], counts_MK[row, : len(values)] = values[order], counts[order]
    return dataclasses.replace(
        made, topk_ids=ids_MK, topk_counts=counts_MK, topk_logprobs=None, tail_logmass=None, tail_logmass_T=None
    )


# Of records(temperatures=True).
TEMPERATURES = (0.5, 2.0)


def extras_of(made: Records) -> Extras:
    """Return the optional arrays that records have."""
    temperatures = () if made.tail_logmass_T is None else TEMPERATURES
    return Extras(
        draws=0 if made.topk_counts is None else int(made.topk_counts[:1].sum()),
        temperatures=temperatures,
        is_masked=made.loss_mask is not None,
        has_target_pos=made.target_pos is not None,
    )


def packed_records() -> Records:
    """Return four documents of 4, 0, 2 and 7 tokens, packed into blocks of 6."""
    made = records((4, 0, 2, 7), k=3, seed=5)
    return dataclasses.replace(
        made,
        document_row=np.array([0, 1, 2, 3, 3], np.uint64),
        document_offset=np.array([0, 0, 0, 0, 6], np.uint32),
        document_length=np.array([4, 0, 2, 6, 1], np.uint32),
        block_length=np.array([6, 6, 1], np.uint32),
    )


def plain(top_k: int = 2, vocab_size: int = 50, extras: Extras = NO_EXTRAS) -> Plain:
    return Plain(top_k=top_k, vocab_size=vocab_size, extras=extras)


def compact(
    top_k: int = 2,
    vocab_size: int = 50,
    precision: int = 8,
    seed: int = 0,
    chunk_tokens: int = 4,
    extras: Extras = NO_EXTRAS,
) -> Compact:
    """Return a compact profile with a shuffled id table and small chunks."""
    return Compact(
        top_k=top_k,
        vocab_size=vocab_size,
        precision=precision,
        id_table=np.random.default_rng(seed).permutation(vocab_size).astype(np.uint32),
        chunk_tokens=chunk_tokens,
        extras=extras,
    )


def content(*made: Records) -> str:
    return digest_of(made)


def write_cache(path, made: Records, vocab_size: int = 50, profile: Profile | None = None, **attributes) -> str:
    """Write a cache of one piece; return its content digest."""
    profile = profile or Plain(top_k=made.top_k, vocab_size=vocab_size, extras=extras_of(made))
    arrays = dict(made.arrays())
    digest = content(as_kept(made, profile))
    with CacheWriter(
        path,
        profile=profile,
        n_tokens=made.n_tokens,
        n_targets=made.n_targets,
        n_documents=made.n_documents,
        n_blocks=None if made.block_length is None else len(made.block_length),
    ) as writer:
        writer.append_tokens({name: arrays.pop(name) for name in made.tokens()})
        writer.align()
        for name, array in arrays.items():
            writer.append(name, array)
            if name.endswith("_length"):
                lengths = array.astype(np.uint64)
                writer.append(name.replace("_length", "_start"), np.cumsum(lengths) - lengths)
        writer.finish({**attributes, "content_digest": digest})
    return digest


_DASK = [sys.executable, "-m", "dask"]
_QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
_LOCAL = ["--host", "127.0.0.1", "--no-dashboard"]


class SuiteWorker:
    """A scheduler in this process with one worker process. It is started anew if the worker was lost.

    A scheduler gives a worker up after minutes without a word, which hours of tests in its process can cause.
    """

    def __init__(self) -> None:
        self._cluster = None

    def address(self) -> str:
        """Return the address of the scheduler, whose worker has just answered."""
        from distributed import LocalCluster

        if self._cluster is None or not self._answers():
            self.close()
            self._cluster = LocalCluster(
                n_workers=1, threads_per_worker=1, memory_limit=None, dashboard_address="127.0.0.1:0", host="127.0.0.1"
            )
        return self._cluster.scheduler_address

    def close(self) -> None:
        """Stop both."""
        if self._cluster is not None:
            self._cluster.close(timeout=30)

    def _answers(self) -> bool:
        from distributed import Client

        try:
            with Client(self._cluster.scheduler_address, set_as_default=False) as client:
                return bool(client.run(int))
        except (OSError, TimeoutError):
            return False


@contextlib.contextmanager
def dask_processes(folder: Path, *options: str) -> Iterator[tuple[Path, warm.Popen]]:
    """Start ``dask scheduler`` and one ``dask worker`` with options; yield the scheduler file and the scheduler."""
    file = folder / "scheduler.json"
    scheduler = warm.Popen([*_DASK, "scheduler", "--scheduler-file", str(file), *_LOCAL, "--port", "0"], **_QUIET)
    worker = start_worker(file, *options)
    try:
        wait_for(file.exists, scheduler)
        yield file, scheduler
    finally:
        for process in (worker, scheduler):
            process.terminate()
        for process in (worker, scheduler):
            finish(process)


def start_worker(scheduler_file: Path, *options: str, cuda: bool = False) -> warm.Popen | subprocess.Popen:
    """Start a ``dask worker``, or a ``dask cuda worker`` that pretends to have a GPU."""
    common = ["--scheduler-file", str(scheduler_file), "--nthreads", "1", "--memory-limit", "0", "--local-directory",
              str(scheduler_file.parent), *options]  # fmt: skip
    if not cuda:
        return warm.Popen([*_DASK, "worker", *common, *_LOCAL], **_QUIET)
    pretended = {**os.environ, "DASK_CUDA_TEST_DISABLE_DEVICE_SPECIFIC": "1", "CUDA_VISIBLE_DEVICES": "0"}
    command = [*_DASK, "cuda", "worker", *common, "--host", "127.0.0.1", "--device-memory-limit", "0"]
    return subprocess.Popen([*command, "--dashboard-address", "127.0.0.1:0"], env=pretended, **_QUIET)


def wait_for(condition, process: warm.Popen | subprocess.Popen, seconds: float = 300):
    """Wait until a condition holds and return it; fail if the process ends or the time does."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"the process ended early with {process.returncode}: {process.communicate()}")
        if found := condition():
            return found
        time.sleep(0.01)
    # What is left open would fail another test.
    process.kill()
    raise AssertionError(f"waited in vain: {process.communicate()}")


def finish(process: warm.Popen | subprocess.Popen, seconds: float = 300) -> str:
    """Wait until a process ends and return its log; kill it after that time."""
    try:
        return process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"still running after {seconds:g} s: {process.communicate()}") from None


def small_job(teacher: Path, corpus: Path, folder: Path) -> list[str]:
    """Return the overrides of a job of four partitions."""
    return [
        f"distillation.teacher.model_path={teacher}",
        f"distillation.teacher.cache_dir={folder}",
        "distillation.teacher.generation.top_k=8",
        "distillation.teacher.generation.torch_threads=1",
        "distillation.dataset.name=json",
        f"distillation.dataset.data_files={corpus}",
        "distillation.dataset.max_length=16",
        "distillation.partition.rows=12",
        "distillation.cluster.dashboard_address=null",
        # On a loaded machine a worker takes minutes to start.
        "distillation.cluster.wait_seconds=300",
    ]


def cache_dir(overrides: list[str]) -> Path:
    """Return the run folder that overrides name."""
    return Path(next(o for o in overrides if "cache_dir" in o).partition("=")[2])


def run(overrides: list[str], *more: str, dataset=None) -> Path:
    """Run a job; return its cache."""
    from dask_logits import generate, load_config

    return generate(load_config([*overrides, *more], dataset_given=dataset is not None), dataset)


def share_a_gpu(monkeypatch) -> None:
    """Let the workers of a scheduler compute on one GPU. Otherwise all but one of them get no work."""
    monkeypatch.setattr("dask_logits.job.gpus.misplaced", lambda workers, gpus_per_worker: {})


def items(reader: CacheReader) -> Iterator[dict[str, Array]]:
    """Yield every item of a cache in order."""
    return (reader.item(index) for index in range(reader.n_items))


def digest(cache: Path) -> str:
    """Return the content digest that a cache names."""
    return CacheReader(cache).attributes["content_digest"]


def nan_teacher(path: Path, word: str) -> Path:
    """A teacher whose logits are NaN from a certain word on."""
    import torch
    from transformers import AutoTokenizer

    save_tokenizer(path)
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[AutoTokenizer.from_pretrained(path).get_vocab()[word]] = torch.nan
    model.save_pretrained(path)
    return path
