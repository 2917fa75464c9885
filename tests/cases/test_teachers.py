"""The teacher that is scored is the one that was meant: refused, or done right, before a cluster starts."""

from __future__ import annotations

import json
import logging
import shutil
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import teacher_inputs
import torch
from builders import VOCAB_SIZE, run, tiny_model, tree
from plain_forward import K, plain_targets
from popular import BY_TYPE, save_family
from safetensors.torch import save_file

from dask_logits.config.groups import TeacherConfig
from dask_logits.errors import TeacherError
from dask_logits.job.recompute import verify
from dask_logits.teacher.checkpoint import TeacherSpec, inspect_teacher, load_teacher
from dask_logits.teacher.selfcheck import check
from dask_logits.train.dataset import CachedLogitsDataset

TOKENS = torch.arange(2, 42).view(2, 20)


def inspect(path: Path | str, **settings):
    return inspect_teacher(TeacherConfig(model_path=str(path), **settings))


def load(path: Path, dtype: str = "float32"):
    """Load a teacher as a worker does."""
    spec = TeacherSpec(
        path=str(path), revision=None, identity=inspect(path).identity, dtype=dtype, device="cpu", torch_threads=1,
        trust_remote_code=False,
    )  # fmt: skip
    return load_teacher(spec, VOCAB_SIZE)


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits.float()


@pytest.mark.parametrize("case", teacher_inputs.REFUSED, ids=lambda case: case.__name__)
def test_refused_before_a_cluster_starts(case, tmp_path) -> None:
    path = case(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(
        TeacherError, match=r"(?s)^distillation\.teacher\.model_path: .*" + teacher_inputs.REFUSED[case]
    ):
        inspect(path)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("family", ["t5", "mbart", "pegasus", "whisper"])
def test_encoder_decoders_are_refused(family: str, tmp_path) -> None:
    path = teacher_inputs.encoder_decoder(tmp_path, family)
    with pytest.raises(TeacherError, match="expected a decoder-only language model, got the encoder-decoder"):
        inspect(path)


def test_a_decoder_that_was_cut_from_an_encoder_decoder_is_a_teacher(tmp_path) -> None:
    from transformers import BartConfig, BartForCausalLM

    config = BartConfig(
        vocab_size=112, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64, pad_token_id=0
    )
    model = BartForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load(tmp_path).model), logits(model), rtol=0, atol=0)


# --- quantized weights ---
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_teacher_in_fp8_is_dequantized_on_a_cpu(dtype: str, tmp_path) -> None:
    path = teacher_inputs.fp8_with_scales(tmp_path / "fp8")
    teacher = load(path, dtype)
    assert {parameter.dtype for parameter in teacher.model.parameters()} == {getattr(torch, dtype)}
    # Scales and three bits of the mantissa: one eighth of a percent of the variance.
    plain = tiny_model("llama")
    for name, weight in plain.named_parameters():
        dequantized = dict(teacher.model.named_parameters())[name].float()
        torch.testing.assert_close(dequantized, weight.data, rtol=0.07, atol=1e-3)
    assert check(teacher, exact=True).path.head == "linear"


@pytest.mark.parametrize("method", teacher_inputs.QUANTIZED)
def test_a_quantization_without_its_package_names_it(method: str, tmp_path) -> None:
    package = teacher_inputs.QUANTIZED[method][1]
    if any(find_spec(name.replace("-", "_")) for name in package.split("|")):
        pytest.skip(f"{package} is installed")
    message = rf"is quantized by '{method}', which needs a package that is missing: .*({package}).*; install it, or use"
    with pytest.raises(TeacherError, match=message):
        inspect(teacher_inputs.quantized(tmp_path / "quantized", method))


@pytest.mark.parametrize(
    ("package", "case"),
    [
        ("compressed_tensors", teacher_inputs.channelwise_fp8),
        ("bitsandbytes", partial(teacher_inputs.bitsandbytes, bits=4)),
        ("bitsandbytes", partial(teacher_inputs.bitsandbytes, bits=8)),
    ],
    ids=["compressed-tensors", "bitsandbytes-4", "bitsandbytes-8"],
)
def test_a_quantized_teacher_from_generate_to_a_verified_cache(package: str, case, here, tmp_path) -> None:
    pytest.importorskip(package)
    from transformers import AutoModelForCausalLM

    path = case(tmp_path / "quantized")
    cache = run(
        here,
        f"distillation.teacher.model_path={path}",
        "distillation.teacher.dtype=float32",
        "distillation.cache.profile=plain",
    )
    report = verify(cache.parent, recompute=2)
    assert report.ok, report
    # The model as transformers loads it, and not the one before it was quantized.
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu").eval()
    plain = tiny_model("llama")
    dataset = CachedLogitsDataset(cache)
    for item in list(dataset)[:4]:
        tokens = np.asarray(item["input_ids"])
        targets = plain_targets(model, tokens, dataset.vocab_size, K)["logp"][:, :K]
        unquantized = plain_targets(plain, tokens, dataset.vocab_size, K)["logp"][:, :K]
        stored = np.asarray(item["topk_logprobs"])
        np.testing.assert_allclose(stored, targets, rtol=2.0**-11, atol=1e-4)
        assert 1e-4 < np.abs(stored - unquantized).max() < 0.5


@pytest.mark.skipif(find_spec("timm") is not None, reason="timm is installed")
def test_a_tower_without_its_package_names_it(tmp_path) -> None:
    with pytest.raises(TeacherError, match=r"needs a package that is missing: .* the timm library.*; install it"):
        inspect(teacher_inputs.tower_without_package(tmp_path))


# --- adapters ---
@pytest.mark.parametrize("case", [teacher_inputs.adapter_beside, teacher_inputs.adapter_only])
def test_an_adapter_is_merged_and_logged(case, tmp_path, caplog) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    path = case(tmp_path)
    caplog.set_level("INFO", "dask_logits")
    teacher = load(path)
    assert any("adapter LORA of" in record.message for record in caplog.records)
    assert not any("lora" in name for name, _ in teacher.model.named_parameters())
    base = tiny_model("llama")
    unadapted = logits(base)
    adapted = PeftModel.from_pretrained(LlamaForCausalLM(base.config), path)
    adapted.load_state_dict(
        {f"base_model.model.{name}".replace("q_proj.", "q_proj.base_layer.").replace("v_proj.", "v_proj.base_layer."): x
         for name, x in base.state_dict().items()},
        strict=False,
    )  # fmt: skip
    expected = logits(adapted.eval())
    torch.testing.assert_close(logits(teacher.model), expected, rtol=1e-5, atol=1e-5)
    assert (expected - unadapted).abs().max() > 0.1


@pytest.mark.parametrize("case", [teacher_inputs.adapter_beside, teacher_inputs.adapter_only])
def test_the_driver_says_that_an_adapter_is_merged(case, tmp_path, caplog) -> None:
    path = case(tmp_path)
    caplog.set_level("INFO", "dask_logits")
    inspect(path)
    said = f"the LORA adapter in {path} is merged into the weights of {tmp_path}"
    assert [record.message.startswith(said) for record in caplog.records] == [True]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LORA", {"use_dora": True}),
        ("LORA", {"use_rslora": True, "modules_to_save": ["lm_head"]}),
        ("LOHA", {}),
        ("LOKR", {}),
        ("IA3", {"target_modules": ["k_proj", "v_proj"]}),
        ("OFT", {}),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_mergeable_kind_of_adapter_is_merged_exactly(kind: str, options: dict, tmp_path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = teacher_inputs.teacher(tmp_path / "base")
    teacher_inputs.save_adapter(base, tmp_path / "adapter", kind, **options)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(load(tmp_path / "adapter").model), logits(adapted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "kind", "options"),
    [
        ("llama", "LORA", {"target_modules": ["q_proj", "lm_head"]}),
        ("llama", "LORA", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("gpt2", "LORA", {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
        ("gemma2", "LORA", {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}),
        ("llama", "LOKR", {"target_modules": ["lm_head"]}),
        ("llama", "IA3", {"target_modules": ["lm_head", "k_proj"]}),
        ("llama", "LORA", {"modules_to_save": ["lm_head"]}),
        ("llama", "LORA", {"modules_to_save": ["embed_tokens"]}),
        ("llama", "LORA", {"trainable_token_indices": [3, 4]}),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_on_a_tied_head_or_embedding_changes_only_what_it_was_trained_on(
    family: str, kind: str, options: dict, tmp_path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = teacher_inputs.teacher(tmp_path / "base", family, tie_word_embeddings=True)
    teacher_inputs.save_adapter(base, tmp_path / "adapter", kind, **options)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(load(tmp_path / "adapter").model), logits(adapted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_merge_that_gives_other_logits_is_refused_and_rounding_is_not(dtype: str, tmp_path, monkeypatch) -> None:
    base = teacher_inputs.teacher(tmp_path / "base", tie_word_embeddings=True)
    teacher_inputs.save_adapter(base, tmp_path / "inner", target_modules=["q_proj", "down_proj"])
    teacher_inputs.save_adapter(base, tmp_path / "head", target_modules=["lm_head"])
    load(tmp_path / "inner", dtype)
    load(tmp_path / "head", dtype)
    monkeypatch.setattr("dask_logits.teacher.checkpoint._LOADED", {})
    monkeypatch.setattr("dask_logits.teacher.adapters._untie_changed_head", lambda model: None)
    with pytest.raises(
        TeacherError, match=r"the adapter in .*head cannot .* exactly: .* other logits .*; merge it with"
    ):
        load(tmp_path / "head", dtype)


def test_the_identity_covers_the_adapter_and_its_base(tmp_path) -> None:
    path = teacher_inputs.adapter_only(tmp_path)
    identities = [inspect(path).identity]
    for folder in (tmp_path / "base", path):
        weights = next(folder.glob("*.safetensors"))
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        identities.append(inspect(path).identity)
    assert len(set(identities)) == 3


def test_an_adapter_without_peft_is_refused_with_what_to_install(tmp_path, monkeypatch) -> None:
    path = teacher_inputs.adapter_beside(tmp_path)
    monkeypatch.setattr("dask_logits.teacher.adapters.find_spec", lambda name: None)
    with pytest.raises(TeacherError, match=r"peft is not installed; install it \(pip install -c .*'.\[adapters"):
        inspect(path)


def test_an_adapter_of_another_model_is_refused(tmp_path) -> None:
    path = teacher_inputs.adapter_only(tmp_path)
    stored = teacher_inputs.load_file(path / "adapter_model.safetensors")
    save_file(
        {name.replace("layers.1.", "layers.7."): x for name, x in stored.items()}, path / "adapter_model.safetensors"
    )
    with pytest.raises(TeacherError, match=r"does not fit its base model .*: 4 of its weights have no place"):
        load(path)


# --- names and dtypes ---
@pytest.mark.parametrize("case", [teacher_inputs.compiled_prefix, teacher_inputs.nested_prefixes])
def test_prefixes_of_a_training_framework_are_removed_and_logged(case, tmp_path, caplog) -> None:
    path = case(tmp_path)
    teacher = load(path)
    assert any("prefixes of a training framework are removed" in record.message for record in caplog.records)
    torch.testing.assert_close(logits(teacher.model), logits(tiny_model("llama")), rtol=0, atol=0)


def test_a_sharded_checkpoint_loads(tmp_path) -> None:
    model = load(teacher_inputs.sharded(tmp_path)).model
    torch.testing.assert_close(logits(model), logits(tiny_model("llama")), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_the_dtype_of_a_wrapper_is_that_of_its_text_part(name: str, tmp_path) -> None:
    save_family(tmp_path, BY_TYPE["qwen3_vl"], "bfloat16")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config.pop("dtype", None)
    for part in ("text_config", "vision_config"):
        config[part].pop("dtype", None)
    path.write_text(json.dumps({**config, "text_config": {**config["text_config"], name: "bfloat16"}}))
    assert inspect(tmp_path).checkpoint_dtype == "bfloat16"
    # Nothing names it: what the weights are stored in.
    path.write_text(json.dumps(config))
    assert inspect(tmp_path).checkpoint_dtype == "bfloat16"


def test_a_dtype_that_differs_from_the_stored_weights_is_logged(llama, tmp_path, caplog) -> None:
    shutil.copytree(llama, tmp_path / "t")
    teacher_inputs.change_config(tmp_path / "t", dtype="bfloat16")
    assert inspect(tmp_path / "t").checkpoint_dtype == "bfloat16"
    assert any("names dtype bfloat16 and the weights are stored in float32" in r.message for r in caplog.records)


# --- what a family declares ---
def test_heads_for_further_tokens_are_ignored(tmp_path) -> None:
    teacher_inputs.teacher(tmp_path, "deepseek_v3")
    teacher_inputs.change_config(tmp_path, num_nextn_predict_layers=1)
    extra = {"model.layers.2.eh_proj.weight": torch.ones(4, 4), "mtp.0.norm.weight": torch.ones(4)}
    teacher_inputs.change_weights(tmp_path, lambda weights: weights | extra)
    torch.testing.assert_close(logits(load(tmp_path).model), logits(tiny_model("deepseek_v3")), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]),
        ("gpt_neox", ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"]),
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
    ],
)
def test_masks_and_frequencies_of_old_checkpoints_are_ignored(family: str, names: list[str], tmp_path) -> None:
    teacher_inputs.teacher(tmp_path, family)
    teacher_inputs.change_weights(tmp_path, lambda weights: weights | {name: torch.ones(4) for name in names})
    assert inspect(tmp_path).layers == 2


# --- paths and the hub ---
@pytest.fixture
def in_the_hubs_cache(tmp_path, monkeypatch):
    """Return a function that puts a folder into the hub's cache, as a commit that its branch names then."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    # Each test has commits of the same names.
    monkeypatch.setattr("dask_logits.teacher.checkpoint._LOADED", {})

    def put(folder: Path, commit: str) -> str:
        kept = tmp_path / "hub" / "models--organisation--model"
        shutil.copytree(folder, kept / "snapshots" / commit)
        (kept / "refs").mkdir(exist_ok=True)
        (kept / "refs" / "main").write_text(commit)
        return "organisation/model"

    return put


def test_a_teacher_of_the_hub_is_known_by_its_commit_and_loaded_from_it(tmp_path, in_the_hubs_cache) -> None:
    name = in_the_hubs_cache(teacher_inputs.teacher(tmp_path / "first"), "a" * 40)
    facts = inspect(name)
    assert (facts.identity, facts.revision) == ("commit:" + "a" * 40, "a" * 40)
    # The branch moves on to other weights; a worker that loads later takes those that the driver saw.
    in_the_hubs_cache(teacher_inputs.teacher(tmp_path / "second", "gemma"), "b" * 40)
    assert inspect(name).identity == "commit:" + "b" * 40
    spec = TeacherSpec(
        path=name, revision=facts.revision, identity=facts.identity, dtype="float32", device="cpu", torch_threads=1,
        trust_remote_code=False,
    )  # fmt: skip
    torch.testing.assert_close(logits(load_teacher(spec, VOCAB_SIZE).model), logits(tiny_model("llama")))


@pytest.mark.parametrize("case", [teacher_inputs.fp8_without_scales, teacher_inputs.left_over_weights])
def test_weights_of_the_hub_that_are_another_teacher_are_refused_where_they_are_loaded(
    case, tmp_path, in_the_hubs_cache
) -> None:
    name = in_the_hubs_cache(case(tmp_path / "t"), "a" * 40)
    spec = TeacherSpec(
        path=name, revision="a" * 40, identity=inspect(name).identity, dtype="float32", device="cpu", torch_threads=1,
        trust_remote_code=False,
    )  # fmt: skip
    with pytest.raises(TeacherError, match=teacher_inputs.REFUSED[case]):
        load_teacher(spec, VOCAB_SIZE)


@pytest.mark.parametrize("case", [teacher_inputs.compiled_prefix, teacher_inputs.nested_prefixes])
def test_prefixes_are_removed_from_a_teacher_of_the_hub_too(case, tmp_path, in_the_hubs_cache) -> None:
    name = in_the_hubs_cache(case(tmp_path / "t"), "a" * 40)
    spec = TeacherSpec(
        path=name, revision="a" * 40, identity=inspect(name).identity, dtype="float32", device="cpu", torch_threads=1,
        trust_remote_code=False,
    )  # fmt: skip
    teacher = load_teacher(spec, VOCAB_SIZE)
    torch.testing.assert_close(logits(teacher.model), logits(tiny_model("llama")), rtol=0, atol=0)


@pytest.mark.parametrize("case", [teacher_inputs.adapter_beside, teacher_inputs.adapter_only])
def test_an_adapter_on_the_hub_is_refused_with_what_to_do(case, tmp_path, in_the_hubs_cache) -> None:
    name = in_the_hubs_cache(case(tmp_path / "t"), "a" * 40)
    with pytest.raises(TeacherError, match=r"'organisation/model' on the hub holds an adapter; download it \(hf downl"):
        inspect(name)


def test_the_base_of_an_adapter_is_the_commit_that_is_named(tmp_path, in_the_hubs_cache) -> None:
    path = teacher_inputs.adapter_only(tmp_path)
    expected = logits(load(path).model)
    teacher_inputs.change_adapter(path, base_model_name_or_path="organisation/model", revision="v1")
    in_the_hubs_cache(tmp_path / "base", "b" * 40)
    in_the_hubs_cache(teacher_inputs.teacher(tmp_path / "later", "gemma"), "a" * 40)
    (tmp_path / "hub" / "models--organisation--model" / "refs" / "v1").write_text("b" * 40)
    facts = inspect(path)
    assert facts.revision == "b" * 40
    spec = TeacherSpec(
        path=str(path), revision=facts.revision, identity=facts.identity, dtype="float32", device="cpu",
        torch_threads=1, trust_remote_code=False,
    )  # fmt: skip
    torch.testing.assert_close(logits(load_teacher(spec, VOCAB_SIZE).model), expected, rtol=0, atol=0)
    assert inspect(path, revision="main").revision == "a" * 40
    teacher_inputs.change_adapter(path, revision=None)
    assert inspect(path).revision == "a" * 40
    assert inspect(path, revision="v1").revision == "b" * 40


def test_adapters_that_are_only_named_in_config_json_change_nothing(tmp_path) -> None:
    teacher = load(teacher_inputs.adapters_inside(tmp_path, names=()))
    torch.testing.assert_close(logits(teacher.model), logits(tiny_model("llama")), rtol=0, atol=0)


def test_an_adapter_with_the_name_of_a_tower_is_not_left_out_with_it(tmp_path) -> None:
    save_family(tmp_path, BY_TYPE["llama4"])
    lora = "language_model.model.layers.0.self_attn.q_proj.lora_A.speech.weight"
    teacher_inputs.change_weights(tmp_path, lambda weights: {**weights, lora: torch.ones(4, 32)})
    with pytest.raises(TeacherError, match=r"holds adapters among its own weights, \S*q_proj\.lora_A\.speech\.weight"):
        inspect(tmp_path)


@pytest.mark.parametrize("path", ["./model", "~/no-such-model", "/no/model", "a/b/c", "tests/no-such-model"])
def test_a_path_that_looks_local_is_refused_at_once(path: str, monkeypatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr("dask_logits.teacher.checkpoint.hub_is_reachable", pytest.fail)
    with pytest.raises(TeacherError, match="which does not exist; correct the path or give a hub name"):
        inspect(path)


def test_a_file_is_refused(tmp_path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(TeacherError, match=r"got the file .*; give the folder that holds it and config\.json"):
        inspect(tmp_path / "model.safetensors")
    for path in (tmp_path / "absent.gguf", teacher_inputs.gguf_only(tmp_path) / "model-q4.gguf"):
        with pytest.raises(TeacherError, match=r"got the GGUF file .*; convert it once"):
            inspect(path)


def test_a_hub_that_does_not_answer_is_named_within_seconds(unreachable_hub, caplog) -> None:
    started = time.monotonic()
    with pytest.raises(TeacherError, match="the model hub does not answer and its cache has no such model"):
        inspect("organisation/no-such-model")
    assert time.monotonic() - started < 20
    assert [r.levelno for r in caplog.records if "does not answer (" in r.message] == [logging.WARNING]
