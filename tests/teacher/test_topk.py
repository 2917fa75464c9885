import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_logits.teacher.model import ScoringPath
from dask_logits.teacher.topk import block_statistics, padded_width, topk_with_tail

values = st.sampled_from([-np.inf, -3.0, -0.0, 0.0, 0.5, 0.5, 2.0, 7.25, -1e30, 1e30])


def padded(logits: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.full((len(logits), padded_width(logits.shape[1])), -torch.inf, dtype=dtype)
    out[:, : logits.shape[1]] = torch.from_numpy(logits).to(dtype)
    return out


def oracle(logits: np.ndarray, k: int) -> np.ndarray:
    """Ids by larger logit, then lower id: numpy's stable sort."""
    return np.argsort(-logits, axis=1, kind="stable")[:, :k]


@settings(max_examples=150)
@given(st.data(), st.integers(1, 300), st.integers(1, 4))
def test_selection_equals_a_stable_sort(data, vocab_size: int, rows: int) -> None:
    k = data.draw(st.integers(1, vocab_size))
    flat = data.draw(st.lists(values, min_size=rows * vocab_size, max_size=rows * vocab_size))
    logits = np.array(flat, np.float32).reshape(rows, vocab_size)
    top = topk_with_tail(padded(logits), k)
    np.testing.assert_array_equal(top.ids_RK.numpy(), oracle(logits, k))
    np.testing.assert_array_equal(top.logits_RK.numpy(), np.take_along_axis(logits, top.ids_RK.numpy(), 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocab_size", "k"), [(64, 64), (100, 7), (5000, 64), (50_257, 64), (4096, 300)])
def test_selection_of_random_logits(dtype: torch.dtype, vocab_size: int, k: int) -> None:
    torch.manual_seed(vocab_size)
    # Half precision ties often at this size.
    logits = (torch.randn(17, vocab_size) * 3).to(dtype).float().numpy()
    top = topk_with_tail(padded(logits, dtype), k)
    np.testing.assert_array_equal(top.ids_RK.numpy(), oracle(logits, k))


def test_sums_equal_float64() -> None:
    torch.manual_seed(0)
    logits = torch.randn(40, 700, dtype=torch.float64) * 4
    top = topk_with_tail(padded(logits.float().numpy()), 20)
    exact = logits.float().double()
    logp = exact.log_softmax(-1)
    rest = logp.scatter(1, top.ids_RK, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(top.logsumexp_R.double(), exact.logsumexp(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(top.tail_logmass_R.double(), rest, atol=1e-5, rtol=0)


def test_the_tail_does_not_cancel() -> None:
    logits = np.full((1, 128), -40.0, np.float32)
    logits[0, 5] = 20.0
    top = topk_with_tail(padded(logits), 1)
    # 127 · e⁻⁶⁰: a float32 1 − Σp would be exactly 0.
    assert top.tail_logmass_R.item() == pytest.approx(np.log(127) - 60, abs=1e-4)


def test_the_whole_vocabulary_leaves_no_tail() -> None:
    top = topk_with_tail(padded(np.random.default_rng(0).normal(size=(3, 70)).astype(np.float32)), 70)
    assert (top.tail_logmass_R == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", [-100.0, -1e4, -1e30])
def test_very_low_logits_beside_blocks_of_minus_infinity_are_summed(level: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    exact = torch.full((3, 2048), -torch.inf, dtype=torch.float64)
    exact[:, :512] = (level + torch.randn(3, 512)).to(dtype)
    refine = (lambda ids: exact.gather(1, ids).float()) if dtype == torch.bfloat16 else None
    top = topk_with_tail(exact.to(dtype), 8, refine=refine)
    torch.testing.assert_close(top.logsumexp_R.double(), exact.logsumexp(-1), rtol=1e-5, atol=1e-4)
    tail = exact.log_softmax(-1).scatter(1, top.ids_RK, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(top.tail_logmass_R.double(), tail, rtol=0, atol=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_finite_show_in_logsumexp(bad: float) -> None:
    logits = np.zeros((3, 130), np.float32)
    logits[1, 77] = bad
    top = topk_with_tail(padded(logits), 4)
    assert torch.isfinite(top.logsumexp_R).tolist() == [True, False, True]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("vocab_size", "k"), [(100, 7), (5000, 64), (300, 290), (50_257, 64), (70_000, 20)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_refined_targets_are_those_of_the_float32_logits(dtype, vocab_size: int, k: int, compiled: bool) -> None:
    torch.manual_seed(vocab_size)
    exact = torch.randn(13, vocab_size) * 3
    labels = torch.randint(vocab_size, (13,))
    labels[4] = -1
    top = topk_with_tail(
        padded(exact.numpy(), dtype), k, labels_R=labels, vocab_size=vocab_size, path=ScoringPath(compiled=compiled),
        refine=lambda ids: exact.gather(1, ids),
    )  # fmt: skip
    np.testing.assert_array_equal(top.ids_RK.numpy(), oracle(exact.numpy(), k))
    torch.testing.assert_close(top.logits_RK, exact.gather(1, top.ids_RK), atol=0, rtol=0)
    torch.testing.assert_close(top.logsumexp_R, exact.logsumexp(-1), atol=2e-3, rtol=0)
    rest = exact.log_softmax(-1).scatter(1, top.ids_RK, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(top.tail_logmass_R, rest, atol=5e-3, rtol=0)
    known = labels >= 0
    torch.testing.assert_close(top.label_logits_R[known], exact.gather(1, labels.clamp(min=0)[:, None])[known, 0])


@pytest.mark.parametrize(
    "path", [ScoringPath(scale=0.5), ScoringPath(softcap=3.0), ScoringPath(scale=2.0, softcap=5.0)]
)
def test_factor_and_soft_cap_are_applied_to_all_but_the_padding(path: ScoringPath) -> None:
    torch.manual_seed(0)
    raw = torch.randn(9, 150) * 4
    finished = path.finish(raw)
    top = topk_with_tail(padded(raw.numpy()), 10, path=path)
    np.testing.assert_array_equal(top.ids_RK.numpy(), oracle(finished.numpy(), 10))
    torch.testing.assert_close(top.logsumexp_R, finished.logsumexp(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("compiled", [False, True])
def test_block_statistics_of_blocks_that_hold_nothing(compiled: bool) -> None:
    logits = torch.full((2, 192), -torch.inf)
    logits[0, 70] = 3.0
    logits[1, 5] = torch.nan
    maxima, sums, bases = block_statistics(logits, ScoringPath(compiled=compiled))
    assert maxima[0].tolist() == [-torch.inf, 3.0, -torch.inf]
    assert (sums[0].tolist(), bases[0].tolist()) == ([0.0, 1.0, 0.0], [3.0])
    assert torch.isnan(maxima[1, 0] + sums[1, 0])
    nothing = block_statistics(torch.full((1, 192), -torch.inf), ScoringPath(compiled=compiled))
    assert [part[0].tolist() for part in nothing] == [[-torch.inf] * 3, [0.0] * 3, [0.0]]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("blocks", [1, 7, 16, 17, 48, 34])
def test_block_statistics_for_any_number_of_blocks(blocks: int, compiled: bool) -> None:
    logits = torch.randn(3, blocks * 64, generator=torch.Generator().manual_seed(blocks)) * 6
    maxima, sums, bases = block_statistics(logits, ScoringPath(compiled=compiled))
    assert torch.equal(maxima, logits.view(3, -1, 64).amax(-1))
    whole = (sums.view(*bases.shape, -1).sum(-1).log() + bases).logsumexp(-1)
    torch.testing.assert_close(whole, logits.logsumexp(-1))
    each = sums.view(*bases.shape, -1).log() + bases[..., None]
    torch.testing.assert_close(each.view(3, -1), logits.view(3, -1, 64).logsumexp(-1))


def test_the_triton_kernel_equals_the_torch_version() -> None:
    """In a process of its own: Triton decides at import whether it interprets."""
    code = """
import torch
from dask_logits.teacher.cuda import kernels
from dask_logits.teacher.model import ScoringPath
from dask_logits.teacher.topk import block_statistics
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    # Beside a block of -inf, a base of 0 would lose rows of very low logits.
    for width, level in ((64, 0), (640, 0), (4096 + 128, 0), (640, -1000)):
        for path in (ScoringPath(), ScoringPath(scale=0.5, softcap=4.0)):
            logits = (torch.randn(3, width) * 6 + level).to(dtype)
            logits[1, -30:] = -torch.inf
            logits[2, :64] = -torch.inf
            found = kernels.block_statistics(logits, path.scale, path.softcap)
            wanted = block_statistics(logits, path)
            torch.testing.assert_close(found[0], wanted[0], atol=1e-5, rtol=1e-5)
            exact = path.finish(logits.float()).view(3, -1, 64).logsumexp(-1)
            for maxima, sums, bases in (found, wanted):
                totals = sums.view(*bases.shape, -1).log() + bases[..., None]
                torch.testing.assert_close(totals.view(3, -1), exact, atol=1e-5, rtol=1e-5)
    logits[0, 7] = torch.nan
    maxima, sums, _ = kernels.block_statistics(logits)
    assert torch.isnan(maxima[0, 0] + sums[0, 0]) and torch.isfinite(sums[0, 1:]).all()
print("equal")
"""
    assert interpreted(code) == "equal"


def test_the_selection_kernel_equals_a_stable_sort() -> None:
    code = """
import torch
from dask_logits.teacher.cuda import kernels
generator = torch.Generator().manual_seed(1)
for width in (1, 2, 63, 768, 1000):
    values = torch.randint(-3, 4, (6, width), generator=generator).float() / 2
    values[1] = torch.randn(width, generator=generator) * 1e3
    values[2, ::2] = -torch.inf
    values[3] = -torch.inf
    values[4] = torch.where(torch.arange(width) % 2 == 0, 0.0, -0.0)
    values[5, width // 2] = torch.inf
    for count in {1, min(2, width), width // 2 + 1, width}:
        wanted = values.sort(stable=True, dim=1, descending=True).indices[:, :count].sort(1).values
        assert torch.equal(kernels.largest(values, count), wanted), (width, count)
print("equal")
"""
    assert interpreted(code) == "equal"


def test_targets_by_kernels_equal_those_by_torch() -> None:
    code = """
import torch
from dask_logits.teacher.cuda import kernels
from dask_logits.teacher import topk
from dask_logits.teacher.model import ScoringPath
generator = torch.Generator().manual_seed(2)
for width, valid, k in ((640, 640, 8), (1024, 1000, 64), (128, 100, 100), (4096, 4096, 1)):
    for path in (ScoringPath(), ScoringPath(scale=0.5, softcap=4.0)):
        logits = (torch.randn(5, width, generator=generator) * 4).bfloat16().float()
        logits[1] = logits[1].round()
        logits[:, valid:] = -torch.inf
        assert topk.kernels_agree(logits, k, path), (width, k)
by_torch = kernels.block_statistics
kernels.block_statistics = lambda *given: (by_torch(*given)[0], by_torch(*given)[1] * 1.01, by_torch(*given)[2])
assert not topk.kernels_agree(logits, 1, ScoringPath())
print("equal")
"""
    assert interpreted(code) == "equal"


def interpreted(code: str) -> str:
    """Run code under Triton's interpreter; return what it prints, or its errors."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    return done.stdout.strip() or done.stderr
