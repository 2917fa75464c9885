"""Private parts of torch and transformers do what this package uses them for."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from builders import tiny_model

from dask_logits.teacher.torch_internals import (
    grow_segments,
    load_cpp,
    remove_incomplete_code,
    strict_compiler,
    uncompile,
)
from dask_logits.teacher.transformers_internals import (
    attention_of,
    kept_in_float32,
    one_sequence_per_row,
    repeat_grouped_heads,
    unsplittable,
)


class _Double(torch.nn.Module):
    def forward(self, x_N: torch.Tensor) -> torch.Tensor:
        return 2 * x_N


def test_a_compiled_module_is_made_eager_again() -> None:
    module, seen = _Double(), []
    module.compile(backend=lambda graph, inputs: seen.append(1) or graph.forward)
    module(torch.ones(1))
    uncompile(module)
    module(torch.ones(3))
    assert seen == [1]


def test_the_compiler_raises_at_its_limit() -> None:
    torch.compiler.reset()
    function = torch.compile(lambda x, n: x * n, backend="eager", dynamic=False)
    with strict_compiler(2), pytest.raises(Exception, match="recompile_limit"):
        _ = [function(torch.ones(2), n) for n in range(9)]
    torch.compiler.reset()


def test_the_compiler_times_no_orders_of_sums_where_it_may_not() -> None:
    seen = []

    def compiler(graph, inputs):
        seen.append(torch._inductor.config.deterministic)
        return graph.forward

    for may_time in (True, False):
        torch.compiler.reset()
        with strict_compiler(2, may_time=may_time):
            torch.compile(lambda x: x.sum(), backend=compiler)(torch.ones(2))
    assert seen == [False, True]
    assert not torch._inductor.config.deterministic
    torch.compiler.reset()


def test_segments_grow_unless_the_user_has_chosen(monkeypatch) -> None:
    set_to = []
    real = torch._C._accelerator_setAllocatorSettings
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", lambda text: set_to.append(text) or real(text))
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        with monkeypatch.context() as patched:
            patched.setenv(name, "max_split_size_mb:64")
            grow_segments()
    assert set_to == []
    before = torch._C._accelerator_getAllocatorSettings()
    grow_segments()
    assert torch._C._accelerator_getAllocatorSettings() == "expandable_segments:True"
    real(before or "expandable_segments:False")


def test_segments_do_not_grow_under_wsl(monkeypatch) -> None:
    set_to = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", set_to.append)
    monkeypatch.setattr("platform.release", lambda: "6.6.87.2-microsoft-standard-WSL2")
    grow_segments()
    assert set_to == []


def test_grouped_heads_are_repeated_before_attention(monkeypatch) -> None:
    from transformers.integrations import sdpa_attention

    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", sdpa_attention.use_gqa_in_sdpa)
    model, shapes = tiny_model("qwen3"), []
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    own = torch.nn.functional.scaled_dot_product_attention

    def seen(query, key, value, *given, **named):
        shapes.append((query.shape[1], key.shape[1]))
        return own(query, key, value, *given, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    before = model(torch.ones(1, 5, dtype=torch.int64)).logits
    assert any(heads != key_heads for heads, key_heads in shapes)
    shapes.clear()
    repeat_grouped_heads()
    # As transformers 5.10 calls it.
    assert sdpa_attention.use_gqa_in_sdpa(None, None) is False
    after = model(torch.ones(1, 5, dtype=torch.int64)).logits
    assert shapes
    assert all(heads == key_heads for heads, key_heads in shapes)
    torch.testing.assert_close(after, before)


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_a_file_of_c_is_compiled_and_loaded(tmp_path) -> None:
    source = tmp_path / "double.cpp"
    source.write_text('extern "C" int twice(int x) { return 2 * x; }')
    assert load_cpp(source, ()).twice(21) == 42


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_code_that_a_killed_process_left_incomplete_is_compiled_again(tmp_path, monkeypatch) -> None:
    (tmp_path / "twice.cpp").write_text('extern "C" int twice(int x) { return 2 * x; }')
    compiled = """
import pathlib, sys, torch
from dask_logits.teacher.torch_internals import load_cpp, with_complete_code
print(pathlib.Path(load_cpp(pathlib.Path(sys.argv[1]), ())._name).exists())
double, calls = torch.compile(lambda x: x + x, dynamic=True), []
def call():
    calls.append(1)
    return double(torch.ones(2, 3))
print(with_complete_code(call).sum().item(), len(calls) - 1)
"""
    cache = tmp_path / "cache"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))

    def run() -> list[str]:
        command = [sys.executable, "-c", compiled, str(tmp_path / "twice.cpp")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert run() == ["True", "12.0", "0"]
    libraries = [
        path for path in cache.rglob("*.so") if path.name.endswith(".main.so") or b"twice" in path.read_bytes()
    ]
    assert len(libraries) == 2
    for path in libraries:
        path.write_bytes(b"")
    assert run() == ["True", "12.0", "1"]
    assert all(path.stat().st_size for path in libraries)


def test_other_errors_of_the_compiler_remove_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    other = tmp_path / "other.so"
    other.touch()
    for error in (ImportError(f"{other}: file too short"), OSError("no room"), RuntimeError(f"{other}: odd")):
        assert not remove_incomplete_code(error)
    assert other.exists()


def test_a_model_names_its_attention_and_what_must_stay_whole() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    assert attention_of(model.config) == "eager"
    assert unsplittable(model) == ["LlamaDecoderLayer"]
    assert unsplittable(torch.nn.Linear(1, 1)) == []


def test_rows_of_one_sequence_are_not_examined() -> None:
    from transformers.masking_utils import create_causal_mask

    def mask(config) -> torch.Tensor | None:
        states_BTD, positions_BT = torch.zeros(1, 4, 8), torch.tensor([[0, 1, 0, 1]])
        return create_causal_mask(
            config, states_BTD, attention_mask=None, past_key_values=None, position_ids=positions_BT
        )

    config = tiny_model("llama").config
    assert mask(config) is not None
    with one_sequence_per_row():
        assert mask(config) is None
    assert mask(config) is not None
    # Two threads, of which the first to enter is the first to leave.
    first, second = one_sequence_per_row(), one_sequence_per_row()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert mask(config) is None
    second.__exit__(None, None, None)
    assert mask(config) is not None


def test_families_name_what_they_keep_in_float32() -> None:
    model = tiny_model("deepseek_v3")
    kept = kept_in_float32(model, is_half=False)
    assert kept
    assert any(part in name for part in kept for name, _ in [*model.named_parameters(), *model.named_buffers()])
    assert kept <= kept_in_float32(model, is_half=True)
    assert kept_in_float32(torch.nn.Linear(1, 1), is_half=True) == set()
