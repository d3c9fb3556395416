"""A conversation becomes token ids, and it is known which of them are targets.

The text is what the tokenizer's own chat template renders for the whole conversation, because templates
rewrite turns depending on what follows (Qwen3 drops earlier think blocks and adds an empty one to the last
turn). The answers are then found in that text by the header and the turn end that the template puts around
them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.data.formats import Message
from engine.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A private-use character: no template looks for it and no marker contains it.
_MASK = "\ue000"


@dataclass(frozen=True, kw_only=True)
class EncodedRow:
    """Token ids of a conversation."""

    input_ids: np.ndarray
    """int32 [T]."""

    supervised: np.ndarray
    """bool [T]; supervised[t] says that token t is a target, predicted from the tokens before it."""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, kw_only=True)
class Span:
    """Characters [start, end) of a rendered text."""

    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class RenderedRow:
    """The text of a conversation and where its answers are."""

    text: str
    """The whole conversation as the chat template writes it."""

    answers: tuple[Span, ...]
    """One span for each assistant message, in order; the turn-end marker belongs to it."""


@dataclass(frozen=True, kw_only=True)
class TurnMarkers:
    """What a chat template writes around an answer."""

    header: str
    """Text that opens every assistant turn, `<|im_start|>assistant\\n` in ChatML."""

    opening: str
    """What the generation prompt adds to the header (`<think>\\n` of thinking models); often empty."""

    turn_end: str
    """Text that closes every assistant turn, `<|im_end|>` in ChatML."""


class ChatTemplate:
    """Renders and tokenises conversations with the chat template of a fast tokenizer.

    The constructor probes the template for its turn markers. DataError: the tokenizer has no chat template,
    is not a fast one, or the template is not understood (no generation prompt, no turn end, answers not
    written out).
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self._tokenizer = tokenizer
        self._name = tokenizer.name_or_path or "the tokenizer"
        if not tokenizer.chat_template:
            raise DataError(f"{self._name} has no chat template; use a model whose tokenizer brings one")
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(f"{self._name} is not a fast tokenizer; its directory needs a tokenizer.json")
        self.markers = self._probe_markers()
        texts = {self.markers.header.strip(), self.markers.turn_end}
        # A special token alone can grow into a marker by what the template writes behind the content.
        texts |= {token for token in tokenizer.all_special_tokens if any(token in text for text in texts)}
        longest_first = sorted(texts, key=len, reverse=True)
        self._marker_pattern = re.compile("|".join(map(re.escape, longest_first)))
        self._check_offsets()

    @property
    def identity(self) -> tuple[str, ...]:
        """Everything that decides how a conversation becomes ids, as text, for fingerprints."""
        tokenizer = self._tokenizer
        return (
            json.dumps(tokenizer.chat_template),
            json.dumps(tokenizer.special_tokens_map, default=str, sort_keys=True),
            tokenizer.backend_tokenizer.to_str(),
        )

    def encode(self, messages: Sequence[Message]) -> EncodedRow:
        """Token ids and targets of one conversation. DataError: see `render`."""
        return self.tokenize([self.render(messages)])[0]

    def encode_many(self, conversations: Sequence[Sequence[Message]]) -> list[EncodedRow]:
        """`encode` for many conversations, tokenised in one batch. DataError: see `render`."""
        return self.tokenize([self.render(messages) for messages in conversations])

    def render(self, messages: Sequence[Message]) -> RenderedRow:
        """The text of a conversation and the spans of its answers.

        DataError: the template raises, the text is not valid Unicode, or the answers cannot be told apart in
        it.
        """
        plain = [message.as_dict() for message in messages]
        text = self._apply(plain)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError("contains half of a surrogate pair; mend the text") from error
        # Contents that quote a marker would be taken for turns, so the turns are looked for in a rendering
        # without the quotes. Its characters stand at the same places.
        unquoted = [{**self._mask(message), "role": message["role"]} for message in plain]
        masked = text if unquoted == plain else self._apply(unquoted)
        if masked is not text and not _same_but_masked(text, masked):
            raise DataError(
                "a message quotes the chat template's markers, and the template changes with them"
            )
        answers = self._find_answers(masked)
        expected = sum(message.role == "assistant" for message in messages)
        if len(answers) != expected:
            raise DataError(
                f"the chat template wrote {len(answers)} assistant turns for {expected} assistant messages; "
                "its answers cannot be told apart"
            )
        return RenderedRow(text=text, answers=answers)

    def tokenize(self, rows: Sequence[RenderedRow]) -> list[EncodedRow]:
        """Token ids and targets of rendered conversations, in one batch.

        A token is a target when all its characters lie in an answer.
        """
        if not rows:
            return []
        batch = self._tokenizer(
            [row.text for row in rows],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        encoded = []
        for row, ids, offsets in zip(rows, batch["input_ids"], batch["offset_mapping"], strict=True):
            flat = np.fromiter(chain.from_iterable(offsets), dtype=np.int64, count=2 * len(ids))
            bounds = flat.reshape(-1, 2)
            supervised = np.zeros(len(ids), dtype=bool)
            for answer in row.answers:
                first = np.searchsorted(bounds[:, 0], answer.start, side="left")
                behind = np.searchsorted(bounds[:, 1], answer.end, side="right")
                supervised[first:behind] = True
            encoded.append(EncodedRow(input_ids=np.asarray(ids, dtype=np.int32), supervised=supervised))
        return encoded

    def _apply(self, messages: list[dict[str, Any]], *, generation_prompt: bool = False) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=generation_prompt
                )
            )
        except (
            Exception
        ) as error:  # a template is a foreign program: whatever it raises is about the messages
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"the chat template refuses the messages: {reason}") from error

    def _mask(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._marker_pattern.sub(_masked, value)
        if isinstance(value, Mapping):
            return {self._mask(key): self._mask(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._mask(item) for item in value]
        return value

    def _find_answers(self, text: str) -> tuple[Span, ...]:
        header, opening, turn_end = self.markers.header, self.markers.opening, self.markers.turn_end
        spans = []
        at = text.find(header)
        while at >= 0:
            start = at + len(header)
            if text.startswith(opening, start):
                start += len(opening)
            end = text.find(turn_end, start)
            if end < 0:
                break
            spans.append(Span(start=start, end=end + len(turn_end)))
            at = text.find(header, end + len(turn_end))
        return tuple(spans)

    def _probe_markers(self) -> TurnMarkers:
        asked_1, answered_1, asked_2, answered_2 = _probe_messages()
        before = self._apply([asked_1])
        with_prompt = self._apply([asked_1], generation_prompt=True)
        single = self._apply([asked_1, answered_1])
        double = self._apply([asked_1, answered_1, asked_2, answered_2])
        if not all(text.startswith(before) for text in (with_prompt, single, double)):
            raise self._not_understood("a question is written differently when an answer follows")
        words = [message["content"] for message in (asked_1, answered_1, asked_2, answered_2)]
        if any(double.count(word) != 1 for word in words) or single.count(words[1]) != 1:
            raise self._not_understood("it does not write every message once")
        prompt = with_prompt[len(before) :]
        # The last turn and earlier ones may open differently: what they share with the prompt is the header.
        last_turn, last_rest = single[len(before) :].split(words[1])
        first_turn, first_rest = double[len(before) :].split(words[1])
        header = _common_prefix(prompt, last_turn, first_turn)
        if not header.strip():
            raise self._not_understood("its generation prompt does not open an assistant turn")
        turn_end = _common_prefix(last_rest, first_rest, double.split(words[3])[1]).rstrip()
        if not turn_end:
            raise self._not_understood("it does not close an assistant turn")
        return TurnMarkers(header=header, opening=prompt[len(header) :], turn_end=turn_end)

    def _check_offsets(self) -> None:
        """See on a probe that the tokenizer's offsets, by which targets are found, can be relied on."""
        row = self.render([Message(**message) for message in _probe_messages()])
        batch = self._tokenizer(row.text, add_special_tokens=False, return_offsets_mapping=True)
        bounds = batch["offset_mapping"]
        starts, ends = [start for start, _ in bounds], [end for _, end in bounds]
        if starts != [0, *ends[:-1]] or ends[-1] != len(row.text):
            raise DataError(
                f"the token offsets of {self._name} do not cover the text; use a byte-level tokenizer"
            )
        if not {answer.end for answer in row.answers} <= set(ends):
            raise self._not_understood("its turn end shares a token with the text behind it")

    def _not_understood(self, reason: str) -> DataError:
        return DataError(
            f"the chat template of {self._name} is not understood: {reason}; use one with turns like ChatML's"
        )


def _probe_messages() -> list[dict[str, Any]]:
    words = ("firstquestion", "firstanswer", "secondquestion", "secondanswer")
    return [
        {"role": "assistant" if index % 2 else "user", "content": f"probe {word} probe"}
        for index, word in enumerate(words)
    ]


def _common_prefix(*texts: str) -> str:
    length = 0
    while all(text[length : length + 1] == texts[0][length : length + 1] != "" for text in texts):
        length += 1
    return texts[0][:length]


def _masked(match: re.Match[str]) -> str:
    # White space stays, so that a template which strips contents strips the same characters.
    return "".join(char if char.isspace() else _MASK for char in match[0])


def _same_but_masked(text: str, masked: str) -> bool:
    return len(text) == len(masked) and all(
        mine == other or other == _MASK for mine, other in zip(text, masked, strict=True)
    )
