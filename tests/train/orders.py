"""Item orders of every kind, for the tests of the order and of the sampler."""

from __future__ import annotations

from hypothesis import strategies as st

from dask_logits.train.order import ItemOrder

SHUFFLES = ("block", "full", "none")

orders = st.builds(
    ItemOrder,
    st.integers(0, 400),
    st.integers(-(2**70), 2**70),
    shuffle=st.sampled_from(SHUFFLES),
    block_items=st.integers(1, 40),
    window_blocks=st.integers(1, 12),
)
