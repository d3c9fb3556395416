"""A tokenizer small enough to write its ids by hand, and chat templates written for the tests."""

from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.data.sources import Row

PAD, START, END = 257, 258, 259
DOUBLE_NEWLINE = 256
SPECIALS = {"<|endoftext|>": PAD, "<|im_start|>": START, "<|im_end|>": END}

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Like Qwen3: think blocks of earlier answers are dropped, and the last answer always has one.
THINKING = (
    "{% for m in messages %}"
    "{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if m.role != 'assistant' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% elif not loop.last %}<|im_start|>assistant\n{{ answer }}<|im_end|>\n"
    "{% elif '</think>' in m.content %}<|im_start|>assistant\n{{ m.content }}<|im_end|>\n"
    "{% else %}<|im_start|>assistant\n<think>\n\n</think>\n\n{{ answer }}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Like the thinking-only models: the prompt already opens the block.
PROMPTED_THINKING = THINKING.removesuffix("{% endif %}") + "<think>\n{% endif %}"


def make_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Every byte is a token with the byte as its id, and `\\n\\n` is token 256."""
    # Byte-level tokenizers show bytes as printable characters: those of the other bytes follow at U+0100.
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    vocab = {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    newline = chr(256 + hidden.index(ord("\n")))
    vocab[newline * 2] = DOUBLE_NEWLINE
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[(newline, newline)]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=template,
        additional_special_tokens=["<|im_start|>"],
    )


def ids_of(*pieces: str | int) -> list[int]:
    """Ids by the rule of `make_tokenizer`, without a tokenizer: strings byte by byte, ints as they are."""
    return [token for piece in pieces for token in ([piece] if isinstance(piece, int) else piece.encode())]


def row(value: dict[str, Any], number: int = 7) -> Row:
    return Row(source="rows.jsonl", number=number, value=value)


def chat_lengths(count: int, *, longest: int = 4096) -> np.ndarray:
    """Tokens of `count` rows, int64, spread as those of chat data are: many short ones, few very long."""
    drawn = np.random.default_rng(0).lognormal(5.5, 1.0, count)
    return np.clip(drawn, 16, longest).astype(np.int64)
