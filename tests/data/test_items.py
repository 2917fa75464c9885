"""Every kept token belongs to exactly one item, with the context and the next token it has in its document."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import VOCAB_SIZE, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from plain_forward import plain_targets, settings

from dask_logits.data.items import Item, ItemSettings, make_items
from dask_logits.teacher.model import Teacher
from dask_logits.teacher.scoring import score_items

SEPARATOR = 99
lengths = st.lists(st.integers(0, 25), min_size=1, max_size=8)


def documents(sizes) -> list[np.ndarray]:
    return [(np.arange(size, dtype=np.int32) + 7 * i) % 90 for i, size in enumerate(sizes)]


def kept(items: list[Item]) -> list[tuple[int, int, int]]:
    """(row, place in the row, token) of every kept token."""
    found = []
    for item in items:
        places = [(s.row, s.offset + i) for s in item.spans for i in range(s.length)]
        assert len(places) == item.n_kept
        found += [(*place, int(token)) for place, token in zip(places, item.tokens[item.context :], strict=True)]
    return found


@given(lengths, st.integers(1, 9), st.data())
def test_windows_keep_every_token_once_with_its_context(sizes, width: int, data) -> None:
    stride = data.draw(st.integers(1, width))
    texts = documents(sizes)
    items = make_items(
        texts, ItemSettings(max_length=width, long_documents="window", window_stride=stride), first_row=5
    )
    assert kept(items) == [(5 + i, t, int(token)) for i, text in enumerate(texts) for t, token in enumerate(text)]
    for item in items:
        (segment,) = item.spans
        text = texts[segment.row - 5]
        start = segment.offset - item.context
        assert len(item.tokens) <= width
        np.testing.assert_array_equal(item.tokens, text[start : segment.offset + segment.length])
        end = segment.offset + segment.length
        assert item.next_token == (int(text[end]) if end < len(text) else -1)
        assert item.context == (width - stride if segment.offset else 0)


@given(lengths, st.integers(1, 9))
def test_blocks_are_full_but_the_last_and_hold_every_token_and_separator_once(sizes, width: int) -> None:
    texts = documents(sizes)
    items = make_items(texts, ItemSettings(max_length=width, packing="concat", separator_id=SEPARATOR), first_row=5)
    expected = [
        (5 + i, t, int(token))
        for i, text in enumerate(texts)
        if len(text)
        for t, token in enumerate([*text, SEPARATOR])
    ]
    assert kept(items) == expected
    assert [len(item.tokens) for item in items[:-1]] == [width] * (len(items) - 1)
    stream = [token for _, _, token in expected]
    for b, item in enumerate(items):
        assert item.tokens.tolist() == stream[b * width : (b + 1) * width]
        assert item.next_token == (stream[(b + 1) * width] if (b + 1) * width < len(stream) else -1)
    assert sorted({s.row for item in items for s in item.spans}) == [5 + i for i in range(len(texts))]


def test_a_document_that_ends_itself_gets_no_second_separator() -> None:
    items = make_items(
        [np.array([1, SEPARATOR]), np.array([2])], ItemSettings(max_length=9, packing="concat", separator_id=SEPARATOR)
    )
    assert [item.tokens.tolist() for item in items] == [[1, SEPARATOR, 2, SEPARATOR]]


@pytest.mark.parametrize(
    "way",
    [
        {"long_documents": "window", "window_stride": 4},
        {"long_documents": "window"},
        {"packing": "concat", "separator_id": SEPARATOR},
    ],
    ids=["overlapping", "side by side", "packed"],
)
def test_targets_are_the_plain_forwards_on_each_item(way) -> None:
    model = tiny_model("llama")
    items = make_items(documents([3, 0, 30, 11, 1]), ItemSettings(max_length=10, **way), first_row=2)
    with torch.inference_mode():
        records = score_items(Teacher(model, VOCAB_SIZE), items, settings(), packed="packing" in way).records
    start = 0
    for item in items:
        if not len(item.tokens):
            continue
        extended = item.tokens if item.next_token < 0 else np.append(item.tokens, item.next_token)
        plain = plain_targets(model, item.tokens.astype(np.int32), VOCAB_SIZE, 8)
        found = slice(start, start + item.n_kept)
        np.testing.assert_array_equal(records.input_ids[found], item.tokens[item.context :])
        np.testing.assert_allclose(records.logsumexp[found], plain["logsumexp"][item.context :], atol=1e-4)
        np.testing.assert_allclose(records.tail_logmass[found], plain["tail"][item.context :], atol=1e-4)
        labels = plain_targets(model, extended.astype(np.int32), VOCAB_SIZE, 8)["label"][: len(item.tokens)]
        np.testing.assert_allclose(records.label_logprob[found], labels[item.context :], atol=1e-4)
        start += item.n_kept
    assert start == records.n_tokens
    assert (records.block_length is not None) == ("packing" in way)
    unlabelled = np.isnan(records.label_logprob).sum()
    assert unlabelled == (1 if "packing" in way else 4)
