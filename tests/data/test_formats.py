"""Four row formats give the same conversations; every row that cannot be used is named."""

from typing import Any

import pytest

from engine.data.formats import to_messages
from engine.errors import DataError
from tests.data.tiny import row

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


def turns(value: dict[str, Any], system: str | None = None) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in to_messages(row(value), system=system)]


SHORT = [("user", "hi"), ("assistant", "yo")]
LONG = [("user", "q1"), ("assistant", "a1"), *SHORT]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"messages": [USER, ANSWER]}, SHORT),
        ({"messages": [USER, ANSWER], "conversations": None, "id": 3}, SHORT),
        ({"instruction": "hi", "output": "yo"}, SHORT),
        ({"instruction": "hi", "input": "", "output": "yo", "system": ""}, SHORT),
        ({"instruction": "hi", "input": None, "output": "yo", "history": None}, SHORT),
        ({"instruction": "hi", "input": "x", "output": "yo"}, [("user", "hi\nx"), ("assistant", "yo")]),
        ({"instruction": "hi", "output": "yo", "history": [["q1", "a1"]]}, LONG),
        ({"instruction": "hi", "output": "yo", "system": "be"}, [("system", "be"), *SHORT]),
        ({"query": "hi", "response": "yo"}, SHORT),
        ({"query": "hi", "response": "yo", "history": [["q1", "a1"]]}, LONG),
        ({"query": "hi", "response": "yo", "system": "be"}, [("system", "be"), *SHORT]),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}, SHORT),
        ({"messages": [{"role": "user", "content": ""}, ANSWER]}, [("user", ""), ("assistant", "yo")]),
    ],
)
def test_format(value: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert turns(value) == expected


@pytest.mark.parametrize("tool", ["tool", "observation", "function_response"])
@pytest.mark.parametrize("assistant", ["gpt", "assistant", "chatgpt"])
@pytest.mark.parametrize("user", ["human", "user"])
def test_sharegpt_names(user: str, assistant: str, tool: str) -> None:
    names = ["system", user, assistant, tool, assistant]
    value = {"conversations": [{"from": name, "value": str(i)} for i, name in enumerate(names)]}
    assert turns(value) == [
        ("system", "0"), ("user", "1"), ("assistant", "2"), ("tool", "3"), ("assistant", "4"),
    ]  # fmt: skip


def test_system_comes_from_the_messages_then_the_row_then_the_option() -> None:
    own = {"role": "system", "content": "own"}
    assert turns({"messages": [own, USER, ANSWER], "system": "key"}, "option")[0] == ("system", "own")
    assert turns({"messages": [USER, ANSWER], "system": "key"}, "option")[0] == ("system", "key")
    assert turns({"messages": [USER, ANSWER], "system": ""}, "option")[0] == ("system", "option")
    assert turns({"query": "hi", "response": "yo"}, "option")[0] == ("system", "option")


def test_extra_keys_reach_the_template() -> None:
    call = {**ANSWER, "content": None, "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    result = {"role": "tool", "content": "42", "name": "f"}
    answer = {**ANSWER, "reasoning_content": "hmm", "tool_calls": None, "id": 9}
    messages = to_messages(row({"messages": [USER, call, result, answer]}), system=None)
    assert [message.as_dict() for message in messages] == [
        USER,
        {**call, "content": ""},
        result,
        {**ANSWER, "reasoning_content": "hmm"},
    ]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (
            {"text": "hi", "id": 1},
            "no recognised keys (found: id, text); the formats are messages, conversations",
        ),
        ({}, "no recognised keys (found: none)"),
        ({"messages": "hi"}, "`messages` is str, not a list"),
        ({"messages": []}, "`messages` is empty"),
        ({"messages": ["hi"]}, "`messages[0]` is str, not an object"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "`messages[0]` has the unknown role 'bot'"),
        ({"conversations": [{"from": ["x"], "value": "x"}]}, "`conversations[0]` has the unknown from ['x']"),
        ({"messages": [{"content": "x"}]}, "`messages[0]` has the unknown role None"),
        ({"messages": [{"role": "user", "content": None}, ANSWER]}, "`messages[0].content` is null"),
        ({"messages": [{"role": "user", "content": [1]}, ANSWER]}, "`messages[0].content` is list"),
        ({"messages": [USER]}, "no assistant answer"),
        ({"messages": [USER, ANSWER, USER]}, "the last message is from user"),
        ({"messages": [USER, {**ANSWER, "content": ""}]}, "empty assistant answer: `messages[1].content`"),
        ({"messages": [USER, {**ANSWER, "content": None}]}, "no assistant answer: `messages[1].content`"),
        ({"messages": [USER, {**ANSWER, "loss": False}]}, "`messages[1]` switches its loss off"),
        ({"messages": [USER, ANSWER], "tools": [{}]}, "brings `tools`"),
        ({"messages": [USER, ANSWER], "system": 3}, "`system` is int, not a string"),
        ({"instruction": "hi"}, "no assistant answer: `output` is missing"),
        ({"instruction": "hi", "output": ""}, "empty assistant answer: `output`"),
        ({"instruction": 3, "output": "yo"}, "`instruction` is int"),
        ({"instruction": "hi", "input": {}, "output": "yo"}, "`input` is dict"),
        ({"instruction": "hi", "output": "yo", "history": "q"}, "`history` is str"),
        ({"query": "hi", "response": 4}, "`response` is int"),
        (
            {"query": "hi", "response": "yo", "history": [["q"]]},
            "`history[0]` is not a [question, answer] pair",
        ),
        (
            {"query": "hi", "response": "yo", "history": [["q", ""]]},
            "empty assistant answer: `history[0][1]`",
        ),
        ({"query": "hi", "response": "yo", "history": [[None, "a"]]}, "`history[0][0]` is null"),
    ],
)
def test_unusable_row(value: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError) as caught:
        to_messages(row(value), system=None)
    assert str(caught.value).startswith("rows.jsonl, row 7: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
