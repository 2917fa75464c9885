"""Chats and masks, from the row to the items."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import SMOLLM2, WORDS, save_tokenizer, write_json_lines
from tokenizers.processors import ByteLevel
from transformers import AutoTokenizer

from dask_logits import ConfigError, DatasetError, TeacherError
from dask_logits.config.groups import DatasetConfig
from dask_logits.config.root import Config
from dask_logits.data.arrow import open_corpus, slice_files
from dask_logits.data.chat import encode_chat, has_date, template_digest
from dask_logits.data.columns import Column, choose_column
from dask_logits.data.items import ItemSettings, make_items
from dask_logits.data.open import open_stream
from dask_logits.data.source import read_rows
from dask_logits.data.tokens import TokenizerSpec, _identify, read_documents
from dask_logits.data.values import BadRow, arrow_values, check_chat, row_value

# As SmolLM2 and Qwen 2.5 render chats.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen 3 does: thoughts are shown only after the last question, and then also empty ones in the last answer.
THINKING = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m.content if m.content is string else '' %}"
    "{% set role = 'user' if m.role == 'tool' else m.role %}{{ '<|im_start|>' + role + '\n' }}"
    "{% if m.role == 'assistant' %}"
    "{% set thoughts = m.reasoning_content if m.reasoning_content is string else '' %}"
    "{% if '</think>' in content %}{% set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thoughts) %}{{ '<think>\n' + thoughts + '\n</think>\n\n' }}"
    "{% endif %}{{ content }}"
    "{% for call in m.tool_calls %}{{ '<tool_call>' + call.function.name + '</tool_call>' }}{% endfor %}"
    "{% else %}{{ content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As DeepSeek R1 does: the prompt opens the thoughts, which no turn shows.
OPENED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>' + m.content.split('</think>')[-1] }}"
    "{{ '<|im_end|>' }}{% else %}{{ '<|endoftext|>' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|><think>\n' }}{% endif %}"
)
# As Qwen 3 Thinking does: the prompt opens the thoughts, which only the last answer shows.
BOTH = THINKING.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
# As Llama 3 does, which prints whatever the content is.
PRINTED = CHATML.replace("+ m['content'] +", "~ m['content'] | trim ~")
# As Llama 3.1 prints what a tool answers.
AS_JSON = CHATML.replace("+ m['content'] +", "+ (m['content'] if m['content'] is string else m['content'] | tojson) +")
# As Gemma 3 and templates of other models for images do.
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text | trim }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As early templates for images do, which read nothing but lists.
ONLY_PARTS = PARTS.replace("{% if m.content is string %}{{ m.content }}{% else %}", "").replace(
    "{% endfor %}{% endif %}", "{% endfor %}"
)
# A template that numbers the messages from the end, so that no beginning stays the same.
BACKWARDS = "{% for m in messages %}{{ loop.revindex ~ m['role'] ~ ': ' ~ m['content'] ~ '\n' }}{% endfor %}"
TWO_TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "red or green?"},
    {"role": "assistant", "content": "the red cat"},
    {"role": "user", "content": "and the sun?"},
    {"role": "assistant", "content": "sleeps"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SMOLLM2)


def learned(tokenizer, messages, template, tools=None) -> list[str]:
    """Return the texts of the runs of tokens that are learned."""
    tokenizer.chat_template = template
    found = encode_chat(tokenizer, check_chat(messages, tools), marks=True)
    assert not isinstance(found, BadRow), found
    ids, mask = found
    whole = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    assert tokenizer.decode(ids) == whole
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return [tokenizer.decode(ids[first:stop]) for first, stop in edges.reshape(-1, 2)]


def test_turns_are_found_without_markers(tokenizer) -> None:
    assert learned(tokenizer, TWO_TURNS, CHATML) == ["the red cat<|im_end|>\n", "sleeps<|im_end|>\n"]


def test_markers_are_used_where_a_template_has_them(tokenizer) -> None:
    assert learned(tokenizer, TWO_TURNS, MARKED) == ["the red cat<|im_end|>", "sleeps<|im_end|>"]


@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize("answer", ["nice 🦤", "🦤", "ok ", " ok", "go      on"])
def test_an_answer_is_learned_whichever_characters_its_tokens_claim(answer, trims) -> None:
    # A rare character has several tokens. A byte-level tokenizer may leave spaces to no token.
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=trims)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}, *TWO_TURNS[3:]]
    words_only = MARKED.replace("{{ m['content'] + '<|im_end|>' }}{% endgen", "{{ m['content'] }}{% endgen")
    assert learned(tokenizer, turns, words_only.replace("{{ '\n' }}", "{{ '<|im_end|>\n' }}")) == [answer, "sleeps"]
    assert learned(tokenizer, turns, CHATML) == [f"{answer}<|im_end|>\n", "sleeps<|im_end|>\n"]


def test_a_turn_that_ends_in_a_character_without_a_token_ends_there(tmp_path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content ~ '\n' }}{% endgeneration %}"
        "{% else %}{{ m.content ~ '\n' }}{% endif %}{% endfor %}"
    )
    turns = zip(["user", "assistant"] * 2, ["red cat", "green dog", "the sun", "sleeps"], strict=True)
    chat = check_chat([{"role": role, "content": content} for role, content in turns])
    ids, mask = encode_chat(tokenizer, chat, marks=True)
    assert tokenizer.decode(np.array(ids)[mask]) == "green dog sleeps"


def test_an_answer_whose_first_token_has_the_space_before_it_is_learned(tokenizer) -> None:
    spaced = (
        "{% for m in messages %}{{ m.role ~ ': ' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    assert learned(tokenizer, TWO_TURNS, spaced) == [" the red cat", " sleeps"]


def test_an_answer_that_is_rendered_otherwise_while_it_is_the_last_is_found(tokenizer) -> None:
    found = learned(tokenizer, TWO_TURNS, THINKING)
    assert found == ["the red cat<|im_end|>\n", "<think>\n\n</think>\n\nsleeps<|im_end|>\n"]


def turns(*contents: str) -> list[dict]:
    """Return a chat in which user and assistant take turns."""
    return [{"role": "assistant" if i % 2 else "user", "content": content} for i, content in enumerate(contents)]


def test_thoughts_inside_of_the_content_are_learned_only_where_the_template_shows_them(tokenizer) -> None:
    chat = turns("a?", "<think>\nwhy\n</think>\n\nYes.", "b?", "<think>\nwell\n</think>\n\nNo.")
    assert learned(tokenizer, chat, THINKING) == ["Yes.<|im_end|>\n", "<think>\nwell\n</think>\n\nNo.<|im_end|>\n"]


def test_an_answer_without_its_thoughts_ends_before_the_next_question(tokenizer) -> None:
    # The content as a whole stands only in the last turn.
    same = "<think>\n\n</think>\n\nYes."
    found = learned(tokenizer, turns("a?", same, "SECRET b?", same), THINKING)
    assert found == ["Yes.<|im_end|>\n", "<think>\n\n</think>\n\nYes.<|im_end|>\n"]


def test_calls_without_content_are_learned_though_thoughts_precede_them_while_they_are_last(tokenizer) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    for content in ({"content": ""}, {}):
        chat = [
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "tool_calls": [call], **content},
            {"role": "tool", "content": "sun"},
            {"role": "assistant", "content": "It is sunny."},
        ]
        found = learned(tokenizer, chat, THINKING)
        assert found == [
            "<tool_call>look</tool_call><|im_end|>\n",
            "<think>\n\n</think>\n\nIt is sunny.<|im_end|>\n",
        ]


@pytest.mark.parametrize("answer", ["the red cat", "s", "t", "<b>red</b>", "<think", "<", "\nred"])
def test_an_answer_is_learned_though_the_prompt_opens_thoughts(answer, tokenizer) -> None:
    # "s" and "t" also stand in the header of the turn, and "<" begins the thoughts, too.
    thought = turns("a?", f"<think>\nwhy\n</think>{answer}", "b?", answer)
    assert learned(tokenizer, thought, OPENED) == [f"{answer}<|im_end|>"] * 2
    first, second = learned(tokenizer, thought, BOTH)
    assert first == f"{answer.lstrip()}<|im_end|>\n"
    assert second == f"\n</think>\n\n{answer}<|im_end|>\n"


def test_a_turn_that_does_not_begin_with_its_answer_is_refused_where_the_prompt_opens_thoughts(tokenizer) -> None:
    tokenizer.chat_template = OPENED.replace("m.content.split", "'Well, s. ' ~ m.content.split")
    for answer in ("s", "", "Yes."):
        found = encode_chat(tokenizer, check_chat(turns("a?", answer)), marks=True)
        assert "renders message 1 the same whether or not others follow" in found.reason


def test_an_answer_whose_text_is_another_while_it_is_the_last_is_refused(tokenizer) -> None:
    numbered = THINKING.replace("{{ content }}{% for", "{{ content ~ loop.revindex }}{% for")
    tokenizer.chat_template = numbered
    found = encode_chat(tokenizer, check_chat(turns("a?", "Yes.", "b?", "No.")), marks=True)
    assert "renders message 1 the same whether or not others follow" in found.reason


def test_words_that_occur_twice_are_found_in_their_turn(tokenizer) -> None:
    twice = [
        *TWO_TURNS[:2],
        {"role": "assistant", "content": "red"},
        TWO_TURNS[3],
        {"role": "assistant", "content": "red"},
    ]
    for template in (CHATML, THINKING):
        assert [text.count("red") for text in learned(tokenizer, twice, template)] == [1, 1]


def test_a_chat_that_the_assistant_begins_is_rendered(tokenizer) -> None:
    begun = [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "hi"}]
    (only,) = learned(tokenizer, begun, CHATML)
    assert only.startswith("<|im_start|>assistant\nhello<|im_end|>")


def test_a_default_system_message_before_the_assistants_first_turn_is_not_learned() -> None:
    real = AutoTokenizer.from_pretrained(SMOLLM2)
    begun = [{"role": "assistant", "content": "I am here."}, *TWO_TURNS[1:3]]
    assert learned(real, begun, real.chat_template) == ["I am here.<|im_end|>\n", "the red cat<|im_end|>\n"]
    # Without a prompt for answers, the end of the system message is not known.
    real.chat_template = real.chat_template.partition("{% if add_generation_prompt %}")[0]
    found = encode_chat(real, check_chat(begun), marks=True)
    assert isinstance(found, BadRow)
    assert "expected a chat template with a prompt for answers" in found.reason


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize("template", [CHATML, MARKED, THINKING, PRINTED, AS_JSON, PARTS])
def test_contents_that_are_lists_of_texts_are_read_as_their_text(template, tokenizer) -> None:
    # "s" and "1" also stand in other places of the chat.
    chat = turns("is 1 + 0 = 1?", "s", "how many?", "1", "", "the end")
    listed = [{**message, "content": parts(message["content"])} for message in chat]
    listed[4]["content"] = []
    tokenizer.chat_template = template
    expected, expected_mask = encode_chat(tokenizer, check_chat(chat), marks=True)
    for messages in (listed, [*listed[:1], *chat[1:4], *listed[4:]]):
        ids, mask = encode_chat(tokenizer, check_chat(messages), marks=True)
        assert ids == expected
        assert mask.tolist() == expected_mask.tolist()


@pytest.mark.parametrize("template", [PARTS, ONLY_PARTS])
def test_a_template_that_reads_lists_of_texts_gets_them(template, tokenizer) -> None:
    tokenizer.chat_template = template
    chat = [{"role": "user", "content": parts(" red ", "green ")}, {"role": "assistant", "content": parts("blue")}]
    ids, _ = encode_chat(tokenizer, check_chat(chat), marks=True)
    assert "user\nredgreen<|im_end|>\n<|im_start|>assistant\nblue<|im_end|>" in tokenizer.decode(ids)


def test_several_texts_are_joined_for_a_template_that_does_not_read_lists(tokenizer) -> None:
    tokenizer.chat_template = PRINTED
    chat = [{"role": "user", "content": parts("red ", "green")}, {"role": "assistant", "content": [{"text": "blue"}]}]
    ids, _ = encode_chat(tokenizer, check_chat(chat), marks=True)
    assert tokenizer.decode(ids).startswith(
        "<|im_start|>user\nred green<|im_end|>\n<|im_start|>assistant\nblue<|im_end|>"
    )


@pytest.mark.parametrize("template", [PRINTED, PARTS])
@pytest.mark.parametrize("part", [{"type": "image"}, {"type": "image_url", "image_url": {"url": "x"}}, "text", 3])
def test_parts_other_than_texts_are_bad_rows(part, template, tokenizer) -> None:
    tokenizer.chat_template = template
    chat = [{"role": "user", "content": [*parts("what is it?"), part]}, {"role": "assistant", "content": "a cat"}]
    found = encode_chat(tokenizer, check_chat(chat), marks=True)
    assert "got a content with a part other than text, which is not scored: " in found.reason


@pytest.mark.parametrize("answer", [[{"city": "Paris"}], []])
def test_a_list_that_a_tool_answers_with_is_left_to_the_template(answer, tokenizer) -> None:
    tokenizer.chat_template = AS_JSON
    chat = [{"role": "tool", "content": answer}, {"role": "assistant", "content": parts("Paris")}]
    ids, _ = encode_chat(tokenizer, check_chat(chat), marks=True)
    assert tokenizer.decode(ids).startswith(
        f"<|im_start|>tool\n{json.dumps(answer)}<|im_end|>\n<|im_start|>assistant\nParis<|im_end|>"
    )


def test_a_template_that_hides_its_turns_is_refused(tokenizer) -> None:
    tokenizer.chat_template = BACKWARDS
    found = encode_chat(tokenizer, check_chat(TWO_TURNS), marks=True)
    assert isinstance(found, BadRow)
    assert "renders message 2 the same whether or not others follow" in found.reason
    assert "distillation.dataset.learn=all" in found.reason
    ids, mask = encode_chat(tokenizer, check_chat(TWO_TURNS), marks=False)
    assert len(ids) == len(mask) > 10


def test_the_real_template_and_its_tools(tokenizer) -> None:
    real = AutoTokenizer.from_pretrained(SMOLLM2)
    found = learned(real, TWO_TURNS, real.chat_template)
    assert found == ["the red cat<|im_end|>\n", "sleeps<|im_end|>\n"]
    with_tools = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
    tools = [{"type": "function", "function": {"name": "look", "description": None}}]
    assert learned(tokenizer, TWO_TURNS, with_tools, [{"type": "function", "function": {"name": "look"}}])
    ids, _ = encode_chat(tokenizer, check_chat(TWO_TURNS, tools), marks=True)
    assert tokenizer.decode(ids).startswith('[{"type": "function", "function": {"name": "look"}}]')


def test_what_a_template_refuses_is_a_bad_row(tokenizer) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    found = encode_chat(tokenizer, check_chat(TWO_TURNS), marks=True)
    assert found.reason == "expected messages for the tokenizer's chat template, got roles must alternate"


def test_the_template_is_told_apart_and_has_to_be_there(tokenizer) -> None:
    tokenizer.chat_template = CHATML
    one = template_digest(tokenizer)
    tokenizer.chat_template = MARKED
    assert template_digest(tokenizer) != one
    tokenizer.chat_template = None
    with pytest.raises(TeacherError, match="expected a tokenizer with a chat template, got one without"):
        template_digest(tokenizer)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_template_prints_the_date_of_the_run(tokenizer, template) -> None:
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + template
    assert has_date(tokenizer)
    for date, printed in [("2026-11-28", "28 Nov 2026"), ("2026-11-29", "29 Nov 2026")]:
        ids, mask = encode_chat(tokenizer, check_chat(TWO_TURNS), marks=True, date=date)
        assert tokenizer.decode(ids).startswith(f"{printed}\n<|im_start|>")
        assert "red cat" in tokenizer.decode(np.array(ids)[mask])
    # Only those calls print another date than today's.
    today = tokenizer.apply_chat_template(TWO_TURNS, tokenize=False).partition("\n")[0]
    assert today == f"{datetime.now():%d %b %Y}"


SHARE = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello", "weight": None}]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (SHARE, [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]),
        (json.dumps(TWO_TURNS), TWO_TURNS),
        ({"messages": TWO_TURNS}, TWO_TURNS),
        (np.array(TWO_TURNS[:1], object), TWO_TURNS[:1]),
    ],
)
def test_ways_to_write_a_chat(value, expected) -> None:
    assert json.loads(check_chat(value))["messages"] == expected
    # What was read once is read again, from this package's own files.
    assert check_chat(check_chat(value)) == check_chat(value)


def test_times_and_decimals_in_messages_become_text() -> None:
    # As WildChat stores them.
    message = {
        "role": "user",
        "content": "hi",
        "timestamp": datetime(2026, 11, 30, 8, tzinfo=UTC),
        "cost": Decimal("1.50"),
    }
    (found,) = json.loads(check_chat([message]))["messages"]
    assert found == {**message, "timestamp": "2026-11-30T08:00:00+00:00", "cost": "1.50"}
    arrow = pa.Table.from_pylist([{"messages": [message]}])
    (read,) = arrow_values(arrow, Column(name="messages", kind="chat"))
    assert json.loads(read)["messages"] == [found]


def test_nulls_inside_of_json_text_are_kept() -> None:
    call = {"function": {"name": "look", "arguments": {"city": None, "n": 1}}}
    tools = [{"function": {"name": "look", "default": None}}]
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    chat = {"messages": [{"role": "assistant", "tool_calls": [call]}], "tools": tools}
    for found in (
        check_chat(json.dumps(messages), json.dumps(tools)),
        check_chat(json.dumps({"messages": messages, "tools": tools})),
        check_chat(json.dumps({"messages": messages, "tools": None}), json.dumps(tools)),
    ):
        assert json.loads(found) == chat
        assert check_chat(found) == found
    # Arrow adds nulls to mappings, so theirs are left out.
    call, tools = {"function": {"name": "look", "arguments": {"n": 1}}}, [{"function": {"name": "look"}}]
    assert json.loads(check_chat(messages, tools)) == {
        "messages": [{"role": "assistant", "tool_calls": [call]}],
        "tools": tools,
    }


@pytest.mark.parametrize("tools", ["", " \n", "[]", "null", None, []])
def test_a_chat_without_tools_may_say_so_in_any_way(tools) -> None:
    assert check_chat(TWO_TURNS, tools) == check_chat(TWO_TURNS)


@pytest.mark.parametrize("value", [None, [], "[]"])
def test_a_chat_without_messages_is_an_empty_document(value) -> None:
    assert check_chat(value) is None


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("hello", "expected messages, or JSON of them, got text that is none"),
        (3, "expected a list of messages with role and content, got int"),
        (["hello"], "expected a list of messages with role and content, got list"),
        ([{"content": "x"}], r"expected messages with role and content, got one with \['content'\]"),
        (
            [{"role": "user", "content": {1, 2}}],
            r"expected messages of text, numbers, lists and mappings, got set \{1, 2\}",
        ),
        ([{"role": "user", "content": b"x"}], "expected messages of text, numbers, lists and mappings, got bytes b'x'"),
        ([{"role": "user", "content": "\ud800"}], "not valid Unicode"),
    ],
)
def test_what_is_no_chat_says_why(value, reason) -> None:
    assert re.search(reason, check_chat(value).reason)


MASKED = Column(name="input_ids", kind="ids", mask="labels")


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ([0, 0, 1], [~5, ~6, 7]),
        ([False, True, True], [~5, 6, 7]),
        ([-100, -100, 7], [~5, ~6, 7]),
        ([-100, -100, -100], [~5, ~6, ~7]),
        (np.array([1, 1, 1]), [5, 6, 7]),
    ],
)
def test_masks_and_labels_say_what_is_learned(marks, expected) -> None:
    assert row_value({"input_ids": [5, 6, 7], "labels": marks}, MASKED) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input_ids": [5, 6], "labels": [1]}, "expected 2 entries in 'labels', one for each of the token ids, got 1"),
        (
            {"input_ids": [5, 6], "labels": [-100, 6, 0]},
            "expected 2 entries in 'labels', one for each of the token ids, got 3",
        ),
        ({"input_ids": [5, 6]}, "got NoneType"),
        ({"input_ids": [5, 6], "labels": [6, -100]}, "got 6 at position 0, where the token id is 5"),
        ({"input_ids": [5, -6], "labels": [1, 1]}, "expected token ids of at least 0, got -6"),
        ({"input_ids": ["a"], "labels": [1]}, "which are integers"),
    ],
)
def test_masks_that_cannot_be_right_say_why(row, reason) -> None:
    assert reason in row_value(row, MASKED).reason


def test_padding_takes_its_mask_along() -> None:
    row = {"input_ids": [0, 5, 6, 0], "attention_mask": [0, 1, 1, 0], "labels": [-100, -100, 6, -100]}
    assert row_value(row, MASKED) == [~5, 6]


def ids_of(rows) -> tuple[list, list]:
    spec = TokenizerSpec(path=None, revision=None, trust_remote_code=False, identity=None, add_special_tokens=True,
                         max_length=None, vocab_size=50, is_masked=True)  # fmt: skip
    found = read_documents(rows, spec)
    return [tokens.tolist() for tokens in found.tokens], [mask.tolist() for mask in found.masks]


ROWS = [{"input_ids": [5, 6, 7], "mask": [0, 1, 1]}, {"input_ids": [], "mask": []}, {"input_ids": [8], "mask": [1]}]


@pytest.fixture(params=["list", "json", "parquet", "dataset", "parquet stream", "json stream", "stream"])
def masked_rows(request, tmp_path: Path) -> list:
    """Return the rows as a worker reads them, by every way in."""
    settings = DatasetConfig(name="json", mask_column="mask", max_samples="all")
    if request.param == "stream":
        source = open_stream(settings, iter(ROWS))
        return list(source.head())
    if request.param == "list":
        opened = open_corpus(settings, ROWS)
    elif request.param == "dataset":
        opened = open_corpus(settings, datasets.Dataset.from_list(ROWS))
    else:
        file = write_json_lines(tmp_path / "a.jsonl", ROWS)
        if "parquet" in request.param:
            file = tmp_path / "a.parquet"
            pq.write_table(pa.Table.from_pylist(ROWS), file)
        settings = settings.model_copy(update={"name": file.suffix[1:].removesuffix("l"), "data_files": (str(file),)})
        if "stream" in request.param:
            return list(open_stream(settings).head())
        opened = open_corpus(settings)
    files = opened.files or opened.materialise(tmp_path / "rows")
    return read_rows(slice_files(files, 0, opened.n_rows), opened.column)


def test_every_reader_reads_ids_with_their_mask(masked_rows) -> None:
    assert ids_of(masked_rows) == ([[5, 6, 7], [], [8]], [[False, True, True], [], [True]])


CHATS = [
    {"id": 1, "messages": TWO_TURNS},
    {"id": 2, "messages": []},
    {"id": 3, "messages": TWO_TURNS[1:3], "tools": None},
]


@pytest.mark.parametrize("way", ["list", "json", "parquet", "dataset", "parquet stream", "json stream", "stream"])
def test_every_reader_reads_chats_alike(way, tmp_path) -> None:
    settings = DatasetConfig(name="json", messages_column="messages", max_samples="all")
    file = write_json_lines(tmp_path / "a.jsonl", CHATS)
    if "parquet" in way:
        file = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist(CHATS), file)
    named = settings.model_copy(update={"name": file.suffix[1:].removesuffix("l"), "data_files": (str(file),)})
    if "stream" in way:
        source = open_stream(settings, iter(CHATS)) if way == "stream" else open_stream(named)
        rows = list(source.head())
    else:
        given = {"list": CHATS, "dataset": datasets.Dataset.from_list(CHATS)}.get(way)
        opened = open_corpus(named if given is None else settings, given)
        files = opened.files or opened.materialise(tmp_path / "rows")
        rows = read_rows(slice_files(files, 0, opened.n_rows), opened.column)
        assert opened.column.kind == "chat"
    assert [json.loads(row)["messages"] if row else None for row in rows] == [TWO_TURNS, None, TWO_TURNS[1:3]]


CALL = {"type": "function", "function": {"name": "look", "arguments": {"city": "Paris / FR"}}}
# datasets stores what differs between messages as JSON texts: a field, or whole messages.
MIXED = {
    "content": [
        {"messages": [{"role": "user", "content": 'say "hi"\nplease'}, {"role": "assistant", "content": "hi"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        {"messages": None},
    ],
    "messages": [
        {"messages": [{"role": "user", "content": "a\n?"}, {"role": "assistant", "tool_calls": [CALL]}]},
        {"messages": [{"role": "user", "content": "b"}]},
    ],
}


@pytest.mark.parametrize("rows", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize(
    "way", ["json", "loaded", "saved", "parquet", "parquet stream", "slice of a parquet stream", "stream"]
)
def test_every_reader_decodes_the_values_that_datasets_stores_as_json(way, rows, tmp_path) -> None:
    file = write_json_lines(tmp_path / "a.jsonl", rows)
    loaded = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert "Json(" in repr(loaded.features)
    settings = DatasetConfig(name="json", messages_column="messages", data_files=(str(file),), max_samples="all")
    if "parquet" in way:
        loaded.to_parquet(tmp_path / "a.parquet")
        settings = settings.model_copy(update={"name": "parquet", "data_files": (str(tmp_path / "a.parquet"),)})
    if way == "saved":
        loaded.save_to_disk(tmp_path / "saved")
        settings = settings.model_copy(update={"name": str(tmp_path / "saved"), "data_files": None})
    if "stream" in way:
        sliced = settings.model_copy(update={"split": f"train[:{len(rows)}]"} if "slice" in way else {})
        source = open_stream(settings, loaded.to_iterable_dataset()) if way == "stream" else open_stream(sliced)
        found = list(source.head())
    else:
        opened = open_corpus(settings, loaded if way == "loaded" else None)
        files = opened.files or opened.materialise(tmp_path / "rows")
        found = read_rows(slice_files(files, 0, opened.n_rows), opened.column)
    assert [json.loads(one)["messages"] if one else None for one in found] == [row["messages"] for row in rows]


def test_texts_among_values_of_other_types_are_read_and_the_others_are_bad_rows(tmp_path) -> None:
    file = write_json_lines(tmp_path / "a.jsonl", [{"text": 'a "b"\n'}, {"text": ["c"]}, {"text": None}])
    loaded = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert "Json(" in repr(loaded.features)
    opened = open_corpus(DatasetConfig(), loaded)
    files = opened.files or opened.materialise(tmp_path / "rows")
    text, other, empty = read_rows(slice_files(files, 0, opened.n_rows), opened.column)
    assert (text, empty) == ('a "b"\n', None)
    assert "expected a text, got list" in other.reason


def test_columns_that_are_missing_or_do_not_fit_are_named() -> None:
    with pytest.raises(DatasetError, match=r"dataset\.messages_column: expected one of .*did you mean 'messages'"):
        choose_column(["id", "messages"], DatasetConfig(messages_column="mesages"))
    with pytest.raises(DatasetError, match=r"set distillation\.dataset\.messages_column=messages"):
        choose_column(["id", "messages"], DatasetConfig())
    with pytest.raises(DatasetError, match=r"mask_column: expected null for the column 'text', which holds text"):
        choose_column(["text", "mask"], DatasetConfig(mask_column="mask"))
    with pytest.raises(DatasetError, match=r"dataset\.mask_column: expected one of"):
        choose_column(["input_ids"], DatasetConfig(mask_column="mask"))
    with pytest.raises(DatasetError, match=r"dataset\.mask_column: expected one of .*, got 'meta\.mask'"):
        choose_column(["input_ids", "meta"], DatasetConfig(mask_column="meta.mask"))
    with pytest.raises(DatasetError, match=r"messages_column: expected lists of messages, .*got list<item: int64>"):
        open_corpus(DatasetConfig(messages_column="messages"), datasets.Dataset.from_dict({"messages": [[1]]}))
    tree = {"teacher": {"model_path": "x"}, "dataset": {"name": "y", "messages_column": "a", "text_column": "b"}}
    with pytest.raises(ConfigError, match=r"dataset\.text_column: expected null with messages_column, got 'b'"):
        Config.from_mapping(tree)


def masks_of(documents, masks, **settings) -> list[list[int]]:
    arrays = [np.array(document, np.int32) for document in documents]
    items = make_items(arrays, ItemSettings(**settings), masks=[np.array(mask, bool) for mask in masks])
    return [item.loss_mask.astype(int).tolist() for item in items]


def test_a_positions_mask_is_that_of_the_next_token() -> None:
    documents, masks = [[1, 2, 3, 4], [], [5]], [[0, 0, 1, 1], [], [1]]
    assert masks_of(documents, masks, max_length=8) == [[0, 1, 1, 0], [], [0]]
    # The token after the cut is not there, so it is not learned.
    assert masks_of(documents, masks, max_length=2) == [[0, 0], [], [0]]
    cut = masks_of([list(range(7))], [[0, 1, 0, 1, 1, 1, 1]], max_length=4, long_documents="window", window_stride=2)
    assert cut == [[1, 0, 1, 1], [1, 1], [0]]


def test_a_separator_is_not_learned() -> None:
    documents, masks = [[1, 2, 3], [4, 5, 6]], [[1, 1, 1], [1, 1, 1]]
    packed = masks_of(documents, masks, max_length=5, packing="concat", separator_id=9)
    # 1 2 3 9 4 | 5 6 9: a document's last token and a separator predict nothing that is learned.
    assert packed == [[1, 1, 0, 0, 1], [1, 0, 0]]


def test_a_tokenizer_of_another_template_is_refused(tmp_path) -> None:
    save_tokenizer(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    loaded.chat_template = CHATML
    loaded.save_pretrained(tmp_path)
    spec = TokenizerSpec(path=str(tmp_path), revision=None, trust_remote_code=False, identity=_identify(loaded).digest,
                         add_special_tokens=True, max_length=None, vocab_size=104, chat_template="0" * 64)  # fmt: skip
    with pytest.raises(TeacherError, match="expected the chat template 0000000000000000… that the driver saw"):
        read_documents([check_chat([{"role": "user", "content": WORDS[0]}])], spec)
