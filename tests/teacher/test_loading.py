"""Weights go straight to their device, few processes load at a time, and a slow load is not taken for a hang."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import teacher_inputs
import torch
from builders import VOCAB_SIZE

from dask_logits.config.groups import TeacherConfig
from dask_logits.teacher import checkpoint, loading
from dask_logits.teacher.architecture import read_architecture
from dask_logits.teacher.checkpoint import TeacherSpec, inspect_teacher, load_teacher
from dask_logits.teacher.locate import locate_teacher
from dask_logits.teacher.placement import weight_bytes, working_bytes
from dask_logits.teacher.weights import StoredTensor


def spec(path, **changes) -> TeacherSpec:
    facts = inspect_teacher(TeacherConfig(model_path=str(path)))
    values = {"path": str(path), "revision": None, "identity": facts.identity, "sample": facts.sample,
              "stamp": facts.stamp, "dtype": "float32", "device": "cpu", "torch_threads": 1,
              "trust_remote_code": False}  # fmt: skip
    return TeacherSpec(**{**values, **changes})


@pytest.fixture(autouse=True)
def _nothing_loaded(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(checkpoint, "_LOADED", {})
    monkeypatch.setattr(loading.tempfile, "gettempdir", lambda: str(tmp_path))


def test_every_parameter_that_arrives_is_a_sign_of_life(llama, monkeypatch) -> None:
    monkeypatch.setattr(loading, "_BEAT_SECONDS", 0.0)
    signs = []
    teacher = load_teacher(spec(llama), VOCAB_SIZE, lambda: signs.append(1))
    assert len(signs) == len(list(teacher.model.parameters()))
    # A loaded teacher needs none.
    load_teacher(spec(llama), VOCAB_SIZE, lambda: pytest.fail("loaded again"))


def test_signs_of_life_are_few(llama) -> None:
    signs = []
    load_teacher(spec(llama), VOCAB_SIZE, lambda: signs.append(1))
    assert 1 <= len(signs) <= 3


def test_a_third_process_waits_and_is_alive(llama, monkeypatch) -> None:
    monkeypatch.setattr(loading, "_BEAT_SECONDS", 0.0)
    with loading.loading(lambda: None), loading.loading(lambda: None):
        waits = threading.Event()
        done = threading.Thread(target=load_teacher, args=(spec(llama), VOCAB_SIZE, waits.set))
        done.start()
        assert waits.wait(30)
        assert not checkpoint._LOADED
    done.join(60)
    assert checkpoint._LOADED


def test_who_waits_for_loads_that_hang_is_not_alive(llama, monkeypatch) -> None:
    monkeypatch.setattr(loading, "_BEAT_SECONDS", 0.0)
    signs = []
    with loading.loading(lambda: None), loading.loading(lambda: None):
        done = threading.Thread(target=load_teacher, args=(spec(llama), VOCAB_SIZE, lambda: signs.append(1)))
        done.start()
        done.join(2)
        assert done.is_alive()
        assert len(signs) == 1
    done.join(60)
    assert checkpoint._LOADED


def device_map(path, **changes):
    location = locate_teacher(str(path), allow_pickle=False)
    architecture = read_architecture(location.base, None, trust_remote_code=False)
    return checkpoint._device_map(spec(path, **changes), location, architecture)


def test_weights_are_sent_straight_to_the_gpu(llama, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 30))
    assert device_map(llama) is None
    assert device_map(llama, device="cuda") == {"": 0}
    # An adapter is merged in main memory, and without accelerate transformers knows no devices.
    adapted = teacher_inputs.adapter_beside(tmp_path / "adapted")
    assert device_map(adapted, device="cuda") is None
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: None)
    assert device_map(llama, device="cuda") is None


def test_the_room_for_the_weights_is_that_of_their_dtype(llama, monkeypatch) -> None:
    parameters = inspect_teacher(TeacherConfig(model_path=str(llama))).parameters
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * parameters, 1 << 30))
    assert device_map(llama, device="cuda", dtype="bfloat16") == {"": 0}
    with pytest.raises(checkpoint.CapacityError, match=r"expected 0\.00 GiB of free GPU memory for the weights"):
        device_map(llama, device="cuda")


def test_a_quantized_teacher_is_placed_by_name(tmp_path) -> None:
    path = teacher_inputs.change_config(
        teacher_inputs.teacher(tmp_path / "fp8"), quantization_config={"quant_method": "fp8"}
    )
    assert device_map(path) == {"": "cpu"}
    assert device_map(path, device="cuda") == {"": 0}


def test_a_quantized_teacher_that_fits_only_as_it_is_stored_is_spread_by_its_stored_size(tmp_path, monkeypatch) -> None:
    path = teacher_inputs.change_config(
        teacher_inputs.teacher(tmp_path / "fp8"), quantization_config={"quant_method": "fp8"}
    )
    architecture = read_architecture(str(path), None, trust_remote_code=False)
    parameters = weight_bytes(architecture.model) // 4
    one = {name: StoredTensor(dtype="F8_E4M3", shape=tuple(parameter.shape))
           for name, parameter in architecture.model.named_parameters()}  # fmt: skip
    monkeypatch.setattr(checkpoint, "free_gpu_bytes", lambda n: dict.fromkeys(range(n), int(1.8 * parameters)))
    location = dataclasses.replace(locate_teacher(str(path), allow_pickle=False), tensors=one)
    wanted = spec(path, device="cuda", n_gpus=2)
    assert set(checkpoint._device_map(wanted, location, architecture).values()) == {0, 1}
    with pytest.raises(checkpoint.CapacityError, match=r"room for a layer on each GPU"):
        checkpoint._device_map(wanted, dataclasses.replace(location, tensors={}), architecture)


def test_each_gpu_keeps_room_for_a_batch(llama, monkeypatch, caplog) -> None:
    model = read_architecture(str(llama), None, trust_remote_code=False).model
    working = working_bytes(model, torch.float32)
    # Eight and three widths of activations for 16,384 tokens, and 4,096 rows of logits of two partitions.
    assert working == 16_384 * (8 * 32 + 3 * 64) * 4 + 2 * 4_096 * 112 * 4
    monkeypatch.setattr(checkpoint, "free_gpu_bytes", lambda n: dict.fromkeys(range(n), working + (1 << 20)))
    assert set(device_map(llama, device="cuda", n_gpus=2).values()) == {0, 1}
    assert "room for the weights" not in caplog.text
    monkeypatch.setattr(checkpoint, "free_gpu_bytes", lambda n: dict.fromkeys(range(n), 1 << 20))
    assert set(device_map(llama, device="cuda", n_gpus=2).values()) == {0, 1}
    assert "room for the weights, but not for 0.0 GiB more each" in caplog.text
    monkeypatch.setattr(checkpoint, "free_gpu_bytes", lambda n: dict.fromkeys(range(n), 1 << 10))
    with pytest.raises(checkpoint.CapacityError, match="room for a layer on each GPU"):
        device_map(llama, device="cuda", n_gpus=2)


def test_a_teacher_on_several_gpus_becomes_a_pipeline(llama, monkeypatch) -> None:
    staged = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in (("get_device_name", "X"), ("get_device_capability", (9, 0)), ("get_arch_list", ["sm_90"])):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(checkpoint, "_device_map", lambda *_: {"": "cpu"})
    monkeypatch.setattr(checkpoint.Teacher, "stage", lambda teacher: staged.append(teacher))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    teacher = load_teacher(spec(llama, device="cuda", n_gpus=2), VOCAB_SIZE)
    assert staged == [teacher]
