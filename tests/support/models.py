"""Tiny Qwen checkpoints with random weights, made by transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig

from launch.tiny import build_tokenizer, save_random_model, texts

_COMMON: Mapping[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4,
    "num_hidden_layers": 4, "vocab_size": 512, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
}  # fmt: skip

FEW_KV_HEADS = "qwen3_few_kv_heads"
MODELS: Mapping[str, Any] = {
    "qwen2_tied": lambda **o: Qwen2Config(**{**_COMMON, "tie_word_embeddings": True, **o}),
    "qwen2_untied": lambda **o: Qwen2Config(**{**_COMMON, "tie_word_embeddings": False, **o}),
    "qwen3_head_dim": lambda **o: Qwen3Config(
        **{**_COMMON, "head_dim": 24, "tie_word_embeddings": False, **o}
    ),
    FEW_KV_HEADS: lambda **o: Qwen3Config(
        **{**_COMMON, "head_dim": 16, "num_key_value_heads": 2, "tie_word_embeddings": False, **o}
    ),
    "qwen3_odd_vocabulary": lambda **o: Qwen3Config(
        **{**_COMMON, "head_dim": 16, "vocab_size": 509, "tie_word_embeddings": True, **o}
    ),
}

_EXPERTS: Mapping[str, Any] = {
    **_COMMON, "num_experts": 8, "moe_intermediate_size": 32, "tie_word_embeddings": False,
}  # fmt: skip
MOE_MODELS: Mapping[str, Any] = {
    # A shared expert, and a dense layer first.
    "qwen2_moe": lambda **o: Qwen2MoeConfig(
        **{
            **_EXPERTS,
            "shared_expert_intermediate_size": 48,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [0],
            **o,
        }
    ),
    "qwen3_moe": lambda **o: Qwen3MoeConfig(
        **{**_EXPERTS, "head_dim": 16, "num_experts_per_tok": 3, "norm_topk_prob": True, **o}
    ),
}


def save_tiny_model(
    name: str, directory: Path, *, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Path:
    """Save a model of MODELS or MOE_MODELS with every weight random."""
    config = {**MODELS, **MOE_MODELS}[name](**overrides)
    return save_random_model(config, directory, std=0.1, dtype=dtype)


def save_tiny_model_with_words(name: str, directory: Path, **overrides: Any) -> Path:
    """The same with a tokenizer and a chat template."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = build_tokenizer(texts(), directory)
    return save_tiny_model(name, directory, vocab_size=vocabulary, **overrides)


def save_adapter(model_dir: Path, directory: Path, *, scale: float = 0.1, **settings: Any) -> Path:
    """Save a PEFT adapter of `model_dir` with a random B: a B of zero would hide the gradient of A."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    defaults = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}
    torch.manual_seed(7)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **(defaults | settings)))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(scale * torch.randn(weight.shape))
    model.save_pretrained(directory)
    return directory
