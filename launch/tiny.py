"""A tiny random Qwen3 checkpoint with a tokenizer of its own, made from the shipped data: no download."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

DATA_DIR = Path(__file__).resolve().parent.parent / "configs" / "data"

# ChatML as Qwen's chat models use it: every turn between <|im_start|>ROLE and <|im_end|>.
CHAT_TEMPLATE = """{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def read_messages(path: Path) -> list[list[dict[str, str]]]:
    """The conversations of a JSONL file of `messages` rows."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines if line.strip()]


def build_tokenizer(texts: Iterable[str], directory: Path, *, vocab_size: int = 2048) -> int:
    """Train a byte-level BPE tokenizer and save it as a transformers tokenizer; returns its number of
    tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=4096
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(directory))
    return len(fast)


def build_tiny_qwen3(directory: Path, *, seed: int = 0, **overrides: int) -> Path:
    """Save a random Qwen3 checkpoint (about 2 million weights) with tokenizer and configs into
    `directory`.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    vocab_size = build_tokenizer(texts(), directory)
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 48,
        "max_position_embeddings": 1024,
    }
    config = Qwen3Config(**(shape | overrides), tie_word_embeddings=False, bos_token_id=None, eos_token_id=2)
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        # LoRA leaves the head as it is, and through one of random weights this small no token can stand out.
        model.lm_head.weight.mul_(5.0)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(str(directory))
    return directory


def save_random_model(config: Any, directory: Path, *, std: float, dtype: Any) -> Path:
    """Save a model of a transformers configuration with every weight random, normal around 1 in norms and
    around 0 elsewhere: constant norms and biases would hide a wrong order.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1234)
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(99)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            center = 1.0 if "norm" in name else 0.0
            weight.copy_(center + std * torch.randn(weight.shape, generator=generator))
    model.to(dtype).save_pretrained(directory)
    return directory


def texts() -> Iterator[str]:
    """Everything that the shipped conversations say."""
    for name in ("qa.jsonl", "demo.jsonl"):
        for messages in read_messages(DATA_DIR / name):
            yield from (message["content"] for message in messages)
