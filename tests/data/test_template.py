"""Exactly which tokens are targets."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from tokenizers import normalizers

from engine.data.formats import Message, to_messages
from engine.data.template import ChatTemplate, EncodedRow, TurnMarkers
from engine.errors import DataError
from tests.data.tiny import (
    CHATML,
    DOUBLE_NEWLINE,
    END,
    PROMPTED_THINKING,
    START,
    THINKING,
    ids_of,
    make_tokenizer,
    row,
)


def chat(*contents: str) -> list[Message]:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    return [Message(role=roles[i % 2], content=content) for i, content in enumerate(contents)]


def check(encoded: EncodedRow, *pieces: tuple[list[int], bool]) -> None:
    """Compare with pieces of (ids, supervised)."""
    assert encoded.input_ids.dtype == np.int32
    assert encoded.supervised.dtype == np.bool_
    assert encoded.input_ids.tolist() == [token for ids, _ in pieces for token in ids]
    assert encoded.supervised.tolist() == [flag for ids, flag in pieces for _ in ids]


def header(role: str) -> list[int]:
    return ids_of(START, f"{role}\n")


NEWLINE = (ids_of("\n"), False)


def asked(text: str, role: str = "user") -> tuple[list[int], bool]:
    return ([*header(role), *ids_of(text, END, "\n")], False)


def answered(text: str) -> list[tuple[list[int], bool]]:
    return [(header("assistant"), False), (ids_of(text, END), True), NEWLINE]


def test_spelled_out(chatml: ChatTemplate) -> None:
    encoded = chatml.encode(chat("hi", "yo"))
    assert encoded.input_ids.tolist() == [
        258, 117, 115, 101, 114, 10, 104, 105, 259, 10,
        258, 97, 115, 115, 105, 115, 116, 97, 110, 116, 10, 121, 111, 259, 10,
    ]  # fmt: skip
    assert np.flatnonzero(encoded.supervised).tolist() == [21, 22, 23]


@pytest.mark.parametrize(
    "value",
    [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
        {"instruction": "hi", "input": "", "output": "yo"},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        {"query": "hi", "response": "yo"},
    ],
)
def test_every_format(chatml: ChatTemplate, value: dict[str, Any]) -> None:
    check(chatml.encode(to_messages(row(value), system=None)), asked("hi"), *answered("yo"))
    with_system = chatml.encode(to_messages(row(value), system="be"))
    check(with_system, asked("be", "system"), asked("hi"), *answered("yo"))


def test_every_answer_of_a_conversation(chatml: ChatTemplate) -> None:
    encoded = chatml.encode(chat("a", "b é", "c", "d\n"))
    check(encoded, asked("a"), *answered("b é"), asked("c"), *answered("d\n"))


def test_batch_equals_single(chatml: ChatTemplate) -> None:
    conversations = [chat("a", "b"), chat("question", "a long answer", "c", "d"), chat("", "x")]
    for one, many in zip(map(chatml.encode, conversations), chatml.encode_many(conversations), strict=True):
        check(many, *[([token], flag) for token, flag in zip(one.input_ids, one.supervised, strict=True)])
    assert chatml.encode_many([]) == []


def test_token_across_the_header_is_no_target(chatml: ChatTemplate) -> None:
    encoded = chatml.encode(chat("hi", "\nyo"))
    straddling = (ids_of(START, "assistant", DOUBLE_NEWLINE), False)
    check(encoded, asked("hi"), straddling, (ids_of("yo", END), True), NEWLINE)


def test_contents_that_quote_the_markers(chatml: ChatTemplate) -> None:
    encoded = chatml.encode(
        chat(
            "say <|im_start|>assistant\nno<|im_end|>\n",
            "a<|im_end|>\n<|im_start|>user\nb",
            "<|im_start|>",
            "c",
        )
    )
    check(
        encoded,
        ([*header("user"), *ids_of("say ", START, "assistant\nno", END, "\n", END, "\n")], False),
        (header("assistant"), False),
        (ids_of("a", END, "\n", START, "user\nb", END), True),
        NEWLINE,
        ([*header("user"), *ids_of(START, END, "\n")], False),
        *answered("c"),
    )


def test_marker_completed_by_the_template() -> None:
    # The header arises from what the row says and what the template writes behind it.
    template = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ '\\n.' if m.role == 'user' }}")
    encoded = ChatTemplate(make_tokenizer(template)).encode(chat("<|im_start|>assistant", "yo"))
    asking = ([*header("user"), *ids_of(START, "assistant\n.", END, "\n")], False)
    check(encoded, asking, *answered("yo"))


def test_template_that_trims_quoted_markers() -> None:
    template = ChatTemplate(make_tokenizer(CHATML.replace("m.content", "m.content.strip()")))
    encoded = template.encode(chat(" <|im_start|>assistant\n", "yo "))
    check(encoded, ([*header("user"), *ids_of(START, "assistant", END, "\n")], False), *answered("yo"))


def test_quoted_markers_in_extra_values() -> None:
    template = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}")
    call = Message(role="assistant", content="", extra={"tool_calls": [{"a": "<|im_end|>\n"}]})
    encoded = ChatTemplate(make_tokenizer(template)).encode([*chat("hi"), call])
    written = (ids_of('[{"a": "', END, '\\n"}]', END), True)
    check(encoded, asked("hi"), (header("assistant"), False), written, NEWLINE)


def test_rewritten_turns(thinking: ChatTemplate) -> None:
    earlier = "<think>\nhm\n</think>\n\nb"
    block = ids_of("<think>", DOUBLE_NEWLINE, "</think>", DOUBLE_NEWLINE, "d", END)
    last = [(header("assistant"), False), (block, True), NEWLINE]
    check(thinking.encode(chat("a", earlier, "c", "d")), asked("a"), *answered("b"), asked("c"), *last)


def test_opening_that_the_prompt_contains_is_no_target() -> None:
    template = ChatTemplate(make_tokenizer(PROMPTED_THINKING))
    assert template.markers == TurnMarkers(
        header="<|im_start|>assistant\n", opening="<think>\n", turn_end="<|im_end|>"
    )
    encoded = template.encode(chat("a", "b", "c", "<think>\nhm\n</think>\nd"))
    opened = ([*header("assistant"), *ids_of("<think>\n")], False)
    last = [opened, (ids_of("hm\n</think>\nd", END), True), NEWLINE]
    check(encoded, asked("a"), *answered("b"), asked("c"), *last)


def test_markers_need_not_be_chatml() -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    found = ChatTemplate(make_tokenizer(template)).markers
    assert found == TurnMarkers(header="[assistant] ", opening="", turn_end="<|endoftext|>")


NO_PROMPT = CHATML[: CHATML.index("{% if")]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        (NO_PROMPT, "not understood: its generation prompt"),
        (CHATML.replace("<|im_end|>", ""), "not understood: it does not close"),
        (CHATML.replace("{{ m.content }}", "x"), "not understood: it does not write every message"),
        ("{{ messages | length }}" + CHATML, "not understood: a question is written differently"),
        ("{{ raise_exception('never\nagain') }}", "the chat template refuses the messages: never again"),
        ("{% for %}", "the chat template refuses the messages"),
    ],
)
def test_template_not_understood(template: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        ChatTemplate(make_tokenizer(template))
    assert "\n" not in str(caught.value)


def test_messages_the_template_refuses() -> None:
    refusing = "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    template = ChatTemplate(make_tokenizer(refusing + CHATML))
    with pytest.raises(DataError, match="refuses the messages: no tools"):
        template.encode([Message(role="tool", content="x")])


def test_quoted_marker_that_changes_the_template() -> None:
    changing = CHATML.replace("m.content", "m.content.replace('<|im_end|>', '')")
    template = ChatTemplate(make_tokenizer(changing))
    with pytest.raises(DataError, match="quotes the chat template's markers"):
        template.encode(chat("<|im_end|>", "yo"))


def test_answers_that_the_template_leaves_out() -> None:
    dropping = "{% set messages = messages | rejectattr('content', 'equalto', 'gone') | list %}" + CHATML
    with pytest.raises(DataError, match="wrote 1 assistant turns for 2 assistant messages"):
        ChatTemplate(make_tokenizer(dropping)).encode(chat("a", "gone", "b", "c"))


@pytest.mark.parametrize("content", ["yo", "ß水 é\n", "\n\n👍🏽 x\n\n", "<|im_end|>é"])
def test_bytes_of_tokens_tell_the_same_as_their_offsets(content: str) -> None:
    messages = chat(content, content, "next", content)
    template, by_offsets = ChatTemplate(make_tokenizer(CHATML)), ChatTemplate(make_tokenizer(CHATML))
    # Tokens that seem to spell another text.
    vars(by_offsets)["_spelling"] = dataclasses.replace(template._spelling, pieces=[b"?"] * 260)
    expected = by_offsets.encode(messages)
    found = template.encode(messages)
    assert found.input_ids.tolist() == expected.input_ids.tolist()
    assert found.supervised.tolist() == expected.supervised.tolist()
    targets = bytes(token for token in found.input_ids[found.supervised].tolist() if token < 256)
    assert targets.decode().replace("\n", "") == (2 * content).replace("<|im_end|>", "").replace("\n", "")


def test_text_that_a_normalizer_changes() -> None:
    tokenizer = make_tokenizer(CHATML)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    encoded = ChatTemplate(tokenizer).encode(chat("e\u0301", "e\u0301!", "a", "e\u0301"))
    check(encoded, asked("é"), *answered("é!"), asked("a"), *answered("é"))


def test_half_a_surrogate_pair(chatml: ChatTemplate) -> None:
    with pytest.raises(DataError, match="half of a surrogate pair"):
        chatml.encode(chat("a", "b\ud83d"))


@pytest.mark.parametrize("template", [CHATML, THINKING, PROMPTED_THINKING])
def test_targets_follow_the_generation_prompt(template: str) -> None:
    tokenizer = make_tokenizer(template)
    messages = chat("a", "b", "c", "<think>\nhm\n</think>\nd")
    encoded = ChatTemplate(tokenizer).encode(messages)
    last_run = np.flatnonzero(~encoded.supervised[:-1])[-1] + 1
    prompt = tokenizer.apply_chat_template(
        [message.as_dict() for message in messages[:-1]], add_generation_prompt=True, return_dict=False
    )
    assert encoded.input_ids[:last_run].tolist() == prompt
