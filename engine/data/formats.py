"""Rows of four formats become one list of chat messages."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from engine.data.sources import Row
from engine.errors import DataError

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_EXTRA_KEYS = ("reasoning_content", "tool_calls", "name")
_FORMATS = "messages, conversations (ShareGPT), instruction/output (Alpaca), query/response"


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str
    """system, user, assistant or tool."""

    content: str
    """The text; empty only for users, systems, tools, and assistants that call tools."""

    extra: Mapping[str, Any] = field(default_factory=dict)
    """`reasoning_content`, `tool_calls` and `name` where the row gives them, for the chat template."""

    def as_dict(self) -> dict[str, Any]:
        """The message as chat templates expect it."""
        return {"role": self.role, "content": self.content, **self.extra}


def to_messages(row: Row, *, system: str | None) -> list[Message]:
    """The conversation in `row`, ending with an answer of the assistant.

    The format is told by the keys: `messages`, `conversations` (ShareGPT), `instruction` (Alpaca) or `query`.
    A `system` key of the row, unless empty, becomes the first message; the argument fills in for rows that
    bring no system.

    DataError, with source and row number: unknown format, wrong type, unknown role, no or an empty answer.
    """
    value = row.value
    if value.get("tools"):
        _fail(row, "brings `tools`, which are not rendered; write them into the system message instead")
    if value.get("messages") is not None:
        messages = _conversation(row, "messages")
    elif value.get("conversations") is not None:
        messages = _conversation(row, "conversations")
    elif value.get("instruction") is not None:
        messages = _pair(row, _alpaca_question(row), value.get("output"), answer_key="output")
    elif value.get("query") is not None:
        messages = _pair(row, value["query"], value.get("response"), answer_key="response")
    else:
        keys = ", ".join(sorted(map(str, value))) or "none"
        _fail(row, f"no recognised keys (found: {keys}); the formats are {_FORMATS}")
    if not any(message.role == "assistant" for message in messages):
        _fail(row, "has no assistant answer; there is nothing to train on")
    if messages[-1].role != "assistant":
        _fail(row, f"the last message is from {messages[-1].role}; it must be the assistant's answer")
    return _with_system(row, messages, system)


def _with_system(row: Row, messages: list[Message], system: str | None) -> list[Message]:
    if messages[0].role == "system":
        return messages
    own = row.value.get("system")
    # Files that carry the key in every row write "" where a row has no system message.
    text = _text(row, "system", own) if own else system
    return messages if text is None else [Message(role="system", content=text), *messages]


def _conversation(row: Row, key: str) -> list[Message]:
    items = row.value[key]
    if not isinstance(items, list):
        _fail(row, f"`{key}` is {_kind(items)}, not a list of messages")
    if not items:
        _fail(row, f"`{key}` is empty; there is nothing to train on")
    return [_message(row, f"{key}[{index}]", item) for index, item in enumerate(items)]


def _message(row: Row, where: str, item: Any) -> Message:
    if not isinstance(item, dict):
        _fail(row, f"`{where}` is {_kind(item)}, not an object with role and content")
    role_key, content_key = ("from", "value") if "from" in item else ("role", "content")
    name = item.get(role_key)
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        _fail(row, f"`{where}` has the unknown {role_key} {name!r}; use system, user, assistant or tool")
    if item.get("loss") in (False, 0):
        _fail(row, f"`{where}` switches its loss off, which is not supported; remove the key `loss`")
    # Parquet fills in null for keys that only other rows have.
    extra = {key: item[key] for key in _EXTRA_KEYS if item.get(key) is not None}
    content = item.get(content_key)
    if role == "assistant":
        if not extra.get("tool_calls"):
            return Message(role=role, content=_answer(row, f"{where}.{content_key}", content), extra=extra)
        content = content or ""
    return Message(role=role, content=_text(row, f"{where}.{content_key}", content), extra=extra)


def _alpaca_question(row: Row) -> str:
    instruction = _text(row, "instruction", row.value["instruction"])
    given = row.value.get("input")
    text = "" if given is None else _text(row, "input", given)
    return f"{instruction}\n{text}" if text else instruction


def _pair(row: Row, question: Any, answer: Any, *, answer_key: str) -> list[Message]:
    question_key = "query" if answer_key == "response" else "instruction"
    messages: list[Message] = []
    history = row.value.get("history")
    if not isinstance(history, list | None):
        _fail(row, f"`history` is {_kind(history)}, not a list of [question, answer] pairs")
    for index, turn in enumerate(history or []):
        if not isinstance(turn, list) or len(turn) != 2:
            _fail(row, f"`history[{index}]` is not a [question, answer] pair")
        messages.append(Message(role="user", content=_text(row, f"history[{index}][0]", turn[0])))
        messages.append(Message(role="assistant", content=_answer(row, f"history[{index}][1]", turn[1])))
    messages.append(Message(role="user", content=_text(row, question_key, question)))
    messages.append(Message(role="assistant", content=_answer(row, answer_key, answer)))
    return messages


def _answer(row: Row, where: str, value: Any) -> str:
    if value is None:
        _fail(row, f"has no assistant answer: `{where}` is missing; there is nothing to train on")
    text = _text(row, where, value)
    if not text:
        _fail(row, f"has an empty assistant answer: `{where}`; fill it in or remove the row")
    return text


def _text(row: Row, where: str, value: Any) -> str:
    if not isinstance(value, str):
        _fail(row, f"`{where}` is {_kind(value)}, not a string")
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _fail(row: Row, problem: str) -> NoReturn:
    raise DataError(f"{row.place}: {problem}")
