import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_logits.capture.topk import padded_width, select_topk, topk_with_tail

values = st.sampled_from([-np.inf, -3.0, -0.0, 0.0, 0.5, 0.5, 2.0, 7.25, -1e30, 1e30])


def padded(logits: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.full((len(logits), padded_width(logits.shape[1])), -torch.inf, dtype=dtype)
    out[:, : logits.shape[1]] = torch.from_numpy(logits).to(dtype)
    return out


def oracle(logits: np.ndarray, k: int) -> np.ndarray:
    """Ids by larger logit, then lower id: numpy's stable sort."""
    return np.argsort(-logits, axis=1, kind="stable")[:, :k]


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 300), st.integers(1, 4))
def test_selection_equals_a_stable_sort(data, vocab_size: int, rows: int) -> None:
    k = data.draw(st.integers(1, vocab_size))
    flat = data.draw(st.lists(values, min_size=rows * vocab_size, max_size=rows * vocab_size))
    logits = np.array(flat, np.float32).reshape(rows, vocab_size)
    ids, kept = select_topk(padded(logits), k)
    np.testing.assert_array_equal(ids.numpy(), oracle(logits, k))
    np.testing.assert_array_equal(kept.numpy(), np.take_along_axis(logits, ids.numpy(), 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocab_size", "k"), [(64, 64), (100, 7), (5000, 64), (50_257, 64), (4096, 300)])
def test_selection_of_random_logits(dtype: torch.dtype, vocab_size: int, k: int) -> None:
    torch.manual_seed(vocab_size)
    # Half precision ties often at this size.
    logits = (torch.randn(17, vocab_size) * 3).to(dtype).float().numpy()
    ids, _ = select_topk(padded(logits, dtype), k)
    np.testing.assert_array_equal(ids.numpy(), oracle(logits, k))


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


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_finite_show_in_logsumexp(bad: float) -> None:
    logits = np.zeros((3, 130), np.float32)
    logits[1, 77] = bad
    top = topk_with_tail(padded(logits), 4)
    assert torch.isfinite(top.logsumexp_R).tolist() == [True, False, True]
