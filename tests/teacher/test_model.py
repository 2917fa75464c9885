from __future__ import annotations

import dataclasses
import shutil
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from builders import VOCAB_SIZE, tiny_model

from dask_logits.config.groups import TeacherConfig
from dask_logits.errors import CapacityError, TeacherError
from dask_logits.job.retry_policy import classify
from dask_logits.teacher import checkpoint
from dask_logits.teacher.checkpoint import TeacherSpec, choose_kernels, inspect_teacher, load_teacher, resolve_dtype
from dask_logits.teacher.cuda import kernels
from dask_logits.teacher.model import ScoringPath, Teacher
from dask_logits.teacher.selfcheck import check


def spec(path, **changes) -> TeacherSpec:
    identity = inspect_teacher(TeacherConfig(model_path=str(path))).identity if path.exists() else "x"
    values = {
        "path": str(path),
        "revision": None,
        "identity": identity,
        "dtype": "float32",
        "device": "cpu",
        "torch_threads": 1,
        "trust_remote_code": False,
    }
    return TeacherSpec(**{**values, **changes})


def test_inspection_counts_without_loading(llama) -> None:
    facts = inspect_teacher(TeacherConfig(model_path=str(llama)))
    model = tiny_model("llama")
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert (facts.hidden_width, facts.head_width, facts.layers) == (32, 112, 2)
    assert (facts.max_positions, facts.checkpoint_dtype, facts.revision) == (256, "float32", None)


def test_identity_is_the_content_of_the_files(llama, tmp_path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(llama, copy)
    here, there = (inspect_teacher(TeacherConfig(model_path=str(path))).identity for path in (llama, copy))
    assert here == there
    weights = next(copy.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert inspect_teacher(TeacherConfig(model_path=str(copy))).identity != here


@pytest.mark.parametrize("path", ["/no/such/folder", "./missing", "a/b/c", "no-such-model-anywhere"])
def test_a_missing_model_is_refused(path: str) -> None:
    with pytest.raises(TeacherError, match=r"distillation\.teacher\.model_path: expected a .*got '") as caught:
        inspect_teacher(TeacherConfig(model_path=path))
    assert path in str(caught.value)


def test_a_worker_without_the_teacher_says_what_to_check(tmp_path) -> None:
    with pytest.raises(TeacherError, match="which does not exist; correct"):
        load_teacher(spec(tmp_path / "gone"), VOCAB_SIZE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_folder_that_is_away_for_a_moment_is_an_error_of_its_disk(llama, tmp_path) -> None:
    seen = spec(llama)
    with pytest.raises(FileNotFoundError, match="the teacher's folder is not here") as caught:
        load_teacher(dataclasses.replace(seen, path=str(tmp_path / "gone")), VOCAB_SIZE)
    assert classify(caught.value) == "transient"


def test_a_missing_device_names_the_setting(llama) -> None:
    with pytest.raises(TeacherError, match=r"generation\.device=cpu"):
        load_teacher(spec(llama, device="cuda"), VOCAB_SIZE)


def test_a_worker_that_cannot_compile_kernels_says_what_it_lacks(llama, monkeypatch) -> None:
    teacher = load_teacher(spec(llama), VOCAB_SIZE)
    # The model stays on the CPU.
    monkeypatch.setattr(teacher, "device", torch.device("cuda"))
    errors = [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ]
    tried = []

    def run_once(device: torch.device) -> None:
        tried.append(device.type)
        if errors:
            raise errors[0]

    monkeypatch.setattr(kernels, "available", lambda: True)
    monkeypatch.setattr(kernels, "run_once", run_once)
    path = ScoringPath(kernels=True)
    with pytest.raises(TeacherError, match=r"got Failed to find C compiler.*apt install gcc python3-dev"):
        teacher.take(path)
    for error, kind in ((errors[1], RuntimeError), (errors[2], torch.OutOfMemoryError)):
        errors[:] = [error]
        with pytest.raises(kind) as caught:
            teacher.take(path)
        assert caught.value is error
    errors.clear()
    teacher.take(path)
    teacher.take(path)
    assert tried == ["cuda"] * 4
    assert teacher.path == path


def test_weights_that_do_not_fit_the_gpu_are_refused_with_the_arithmetic(llama, monkeypatch) -> None:
    free, total = 1 << 10, 80 << 30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, total))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80"])
    with pytest.raises(TeacherError, match=r"expected a GPU that torch .* was built for \(sm_80\), got NVIDIA X"):
        load_teacher(spec(llama, device="cuda"), VOCAB_SIZE)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90"])
    with pytest.raises(
        CapacityError, match=r"values, most of 4 bytes\), got 0\.00 of 80\.00 GiB; use a smaller"
    ) as caught:
        load_teacher(spec(llama, device="cuda"), VOCAB_SIZE)
    assert caught.value.free_bytes == free
    assert caught.value.needed_bytes >= 4 * inspect_teacher(TeacherConfig(model_path=str(llama))).parameters


def test_a_teacher_the_driver_did_not_see_is_refused(llama) -> None:
    with pytest.raises(TeacherError, match="expected the teacher sha256:0… that the driver saw, got sha256:"):
        load_teacher(spec(llama, identity="sha256:0"), VOCAB_SIZE)


def test_a_process_holds_as_many_teachers_as_fit(llama, teacher_folder, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "_LOADED", {})
    first = load_teacher(spec(llama), VOCAB_SIZE)
    other = load_teacher(spec(teacher_folder("gpt2")), VOCAB_SIZE)
    # Two runs that take turns on a worker load nothing again.
    assert load_teacher(spec(llama), VOCAB_SIZE) is first
    assert load_teacher(spec(teacher_folder("gpt2")), VOCAB_SIZE) is other
    gone = weakref.ref(first)
    del first
    monkeypatch.setattr(checkpoint, "_MOST_TEACHERS", 2)
    load_teacher(spec(llama, torch_threads=2), VOCAB_SIZE)
    assert gone() is None
    assert load_teacher(spec(teacher_folder("gpt2")), VOCAB_SIZE) is other
    memory = SimpleNamespace(available=1)
    monkeypatch.setattr(checkpoint.psutil, "virtual_memory", lambda: memory)
    load_teacher(spec(llama), VOCAB_SIZE)
    assert len(checkpoint._LOADED) == 1


def test_a_checkpoint_that_lacks_weights_is_refused(llama, tmp_path) -> None:
    from transformers import AutoModel

    AutoModel.from_pretrained(llama).save_pretrained(tmp_path / "trunk")
    with pytest.raises(TeacherError, match=r"expected all weights .* got none for lm_head\.weight \(1 in all\)"):
        inspect_teacher(TeacherConfig(model_path=str(tmp_path / "trunk")))


def test_a_truncated_checkpoint_is_refused(llama, tmp_path) -> None:
    shutil.copytree(llama, tmp_path / "cut")
    weights = next((tmp_path / "cut").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(TeacherError, match=r"expected a complete safetensors file in .*; download the file again"):
        inspect_teacher(TeacherConfig(model_path=str(tmp_path / "cut")))


def test_rotary_embeddings_that_depend_on_the_batch_bound_the_length(tmp_path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    factors = [1.0] * 4
    config = AutoConfig.for_model(
        "phi3", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=128, original_max_position_embeddings=32, pad_token_id=0,
        rope_parameters={"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "rope_theta": 1e4,
                         "original_max_position_embeddings": 32},
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert inspect_teacher(TeacherConfig(model_path=str(tmp_path))).max_positions == 32


def test_a_model_that_sees_the_future_is_refused() -> None:
    from transformers import BertConfig, BertLMHeadModel

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = BertLMHeadModel(BertConfig(vocab_size=VOCAB_SIZE, is_decoder=False, **small)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0)
    with pytest.raises(TeacherError, match="expected a causal model"):
        check(Teacher(model, VOCAB_SIZE), exact=True)


def test_a_teacher_of_nan_is_refused_at_once() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(TeacherError, match="got NaN or infinity everywhere"):
        check(Teacher(model, VOCAB_SIZE), exact=True)


@pytest.mark.parametrize(
    ("setting", "checkpoint", "device", "expected"),
    [
        ("float32", "bfloat16", "cpu", "float32"),
        ("bfloat16", "float32", "cpu", "bfloat16"),
        ("auto", "float32", "cpu", "float32"),
        ("auto", "bfloat16", "cuda", "bfloat16"),
        ("auto", "float16", "cuda", "float16"),
        ("auto", "float64", "cuda", "float32"),
    ],
)
def test_dtype_resolution(setting: str, checkpoint: str, device: str, expected: str) -> None:
    assert resolve_dtype(setting, checkpoint, device) == expected


@pytest.mark.parametrize(
    ("setting", "checkpoint", "expected"),
    [("auto", "bfloat16", "float32"), ("auto", "float16", "float16"), ("float16", "bfloat16", "float16")],
)
def test_dtype_on_a_gpu_without_bfloat16_units(setting: str, checkpoint: str, expected: str) -> None:
    assert resolve_dtype(setting, checkpoint, "cuda", has_bfloat16=False) == expected


def test_half_precision_on_a_cpu_without_the_units_becomes_float32(monkeypatch) -> None:
    monkeypatch.setattr("dask_logits.teacher.checkpoint._cpu_has_bfloat16", lambda: False)
    assert resolve_dtype("auto", "bfloat16", "cpu") == "float32"
    monkeypatch.setattr("dask_logits.teacher.checkpoint._cpu_has_bfloat16", lambda: True)
    assert resolve_dtype("auto", "bfloat16", "cpu") == "bfloat16"


def test_two_partitions_replay_the_head_at_one_time(monkeypatch) -> None:
    teacher = Teacher(tiny_model("minicpm3"), VOCAB_SIZE)
    teacher.take(ScoringPath(head="replay"))
    hidden_NRD = torch.randn(2, 3, teacher.head.weight.shape[1])

    def logits(number: int) -> torch.Tensor:
        out_RV = torch.empty(3, VOCAB_SIZE)
        with torch.inference_mode():
            teacher.logits(hidden_NRD[number], out_RV)
        return out_RV

    expected = [logits(number) for number in range(2)]
    own, entered = type(teacher.model).forward, []

    def slow(model, *given, **named):
        # The other thread has time to replace the trunk, too.
        entered.append(1)
        time.sleep(0.2)
        return own(model, *given, **named)

    monkeypatch.setattr(type(teacher.model), "forward", slow)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(logits, range(2)))
    assert len(entered) == 2
    for logits_RV, expected_RV in zip(found, expected, strict=True):
        assert torch.equal(logits_RV, expected_RV)


@pytest.mark.parametrize(
    ("dtype", "capability", "are_repeated"),
    [("bfloat16", (9, 0), False), ("float32", (9, 0), True), ("float16", (7, 5), True), ("float16", (8, 0), False)],
)
def test_kernels_are_chosen_by_dtype_and_capability(dtype, capability, are_repeated, monkeypatch) -> None:
    from transformers.integrations import sdpa_attention

    use_gqa = sdpa_attention.use_gqa_in_sdpa
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", use_gqa)
    precision, allows_tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    has_cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.set_float32_matmul_precision("medium")
    try:
        choose_kernels(dtype, capability)
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert (sdpa_attention.use_gqa_in_sdpa is not use_gqa) == are_repeated
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = allows_tf32
        torch.backends.cuda.enable_cudnn_sdp(has_cudnn)
