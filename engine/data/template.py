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
from functools import cached_property
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


@dataclass(frozen=True, kw_only=True)
class _Spelling:
    """What the tokens of a byte-level tokenizer stand for."""

    pieces: list[bytes]
    """The bytes of every id; empty where there is no such token."""

    lengths: np.ndarray
    """int64 [ids]; number of bytes."""

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerFast") -> "_Spelling":
        # Vocabularies show bytes as printable characters: those of the other bytes follow at U+0100.
        shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        hidden = [byte for byte in range(256) if byte not in shown]
        byte_of = {256 + place: byte for place, byte in enumerate(hidden)}
        vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
        pieces = [b""] * (max([*vocabulary.values(), *added]) + 1)
        for token, index in vocabulary.items():
            # Tokens outside this alphabet are added ones, or make no text; either way no row is misread.
            pieces[index] = token.translate(byte_of).encode("latin-1", errors="ignore")
        for index, content in added.items():
            pieces[index] = content.content.encode()
        return cls(pieces=pieces, lengths=np.array([len(piece) for piece in pieces], dtype=np.int64))


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
        return self.encode_many([messages])[0]

    def encode_many(self, conversations: Sequence[Sequence[Message]]) -> list[EncodedRow]:
        """`encode` for many conversations, tokenised in one batch. DataError: see `render`."""
        return self.tokenize(self.render_many(conversations))

    def render(self, messages: Sequence[Message]) -> RenderedRow:
        """The text of a conversation and the spans of its answers.

        DataError: the template raises, the text is not valid Unicode, or the answers cannot be told apart in
        it.
        """
        return self.render_many([messages])[0]

    def render_many(self, conversations: Sequence[Sequence[Message]]) -> list[RenderedRow]:
        """`render` for many conversations, which is faster. DataError: see `render`, for any of them."""
        if not conversations:
            return []
        plain = [[message.as_dict() for message in messages] for messages in conversations]
        return [
            self._with_answers(messages, text)
            for messages, text in zip(plain, self._apply_many(plain), strict=True)
        ]

    def _with_answers(self, plain: list[dict[str, Any]], text: str) -> RenderedRow:
        """The answers of the conversation `plain` in its rendered text. DataError: see `render`."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError("contains half of a surrogate pair; mend the text") from error
        # Contents that quote a marker would be taken for turns, so the turns are looked for in a rendering
        # without the quotes. Its characters stand at the same places.
        masked = text
        if any(
            self._has_marker(value) for message in plain for key, value in message.items() if key != "role"
        ):
            masked = self._apply([{**self._mask(message), "role": message["role"]} for message in plain])
            if not _same_but_masked(text, masked):
                raise DataError(
                    "a message quotes the chat template's markers, and the template changes with them"
                )
        answers = self._find_answers(masked)
        expected = sum(message["role"] == "assistant" for message in plain)
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
        # Without offsets the backend is a third faster. Its truncation and padding were switched off when the
        # offsets were checked.
        encodings = self._tokenizer.backend_tokenizer.encode_batch_fast(
            [row.text for row in rows], add_special_tokens=False
        )
        return [self._with_targets(row, encoding.ids) for row, encoding in zip(rows, encodings, strict=True)]

    def _with_targets(self, row: RenderedRow, ids: list[int]) -> EncodedRow:
        input_ids, answers, encoded = np.array(ids, dtype=np.int32), row.answers, row.text.encode()
        if b"".join(map(self._spelling.pieces.__getitem__, ids)) == encoded:
            # The tokens spell the text, so their lengths say where in it they are.
            lengths = self._spelling.lengths[input_ids]
            ends = np.cumsum(lengths)
            starts = ends - lengths
            if len(encoded) != len(row.text):
                answers = tuple(_in_bytes(row.text, answer) for answer in answers)
        else:
            # A normalizer has changed the text: the tokenizer tells where the tokens come from.
            found = self._tokenizer(row.text, add_special_tokens=False, return_offsets_mapping=True)
            starts, ends = np.array(found["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        supervised = np.zeros(len(ids), dtype=bool)
        for answer in answers:
            supervised[starts.searchsorted(answer.start) : ends.searchsorted(answer.end, "right")] = True
        return EncodedRow(input_ids=input_ids, supervised=supervised)

    @cached_property
    def _spelling(self) -> "_Spelling":
        return _Spelling.of(self._tokenizer)

    def _apply(self, messages: list[dict[str, Any]], *, generation_prompt: bool = False) -> str:
        return self._apply_many([messages], generation_prompt=generation_prompt)[0]

    def _apply_many(
        self, conversations: list[list[dict[str, Any]]], *, generation_prompt: bool = False
    ) -> list[str]:
        try:
            texts = self._tokenizer.apply_chat_template(
                conversations, tokenize=False, add_generation_prompt=generation_prompt
            )
        except (
            Exception
        ) as error:  # a template is a foreign program: whatever it raises is about the messages
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"the chat template refuses the messages: {reason}") from error
        return [str(text) for text in texts]

    def _has_marker(self, value: Any) -> bool:
        if isinstance(value, str):
            return self._marker_pattern.search(value) is not None
        if isinstance(value, Mapping):
            return any(self._has_marker(key) or self._has_marker(item) for key, item in value.items())
        return isinstance(value, list | tuple) and any(map(self._has_marker, value))

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


def _in_bytes(text: str, span: Span) -> Span:
    """A span of characters as a span of the bytes of the text in UTF-8."""
    start = len(text[: span.start].encode())
    return Span(start=start, end=start + len(text[span.start : span.end].encode()))


def _masked(match: re.Match[str]) -> str:
    # White space stays, so that a template which strips contents strips the same characters.
    return "".join(char if char.isspace() else _MASK for char in match[0])


def _same_but_masked(text: str, masked: str) -> bool:
    return len(text) == len(masked) and all(
        mine == other or other == _MASK for mine, other in zip(text, masked, strict=True)
    )
