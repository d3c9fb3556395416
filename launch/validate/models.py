"""The small models that layouts are compared on: random weights, in the shapes of their families."""

import shutil
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from launch.validate.tasks import Setup

DENSE = ("qwen2.5", "qwen3")
EXPERTS = "qwen3-moe"
# Eight heads in four groups: TP 8 has more ranks than groups, CP 4 by heads a group for each rank. By whether
# the device is a CPU; kernels for attention on GPUs want heads of 64.
_SIZES: Mapping[bool, Mapping[str, int]] = {
    False: {"hidden_size": 512, "intermediate_size": 1536},
    True: {"hidden_size": 64, "intermediate_size": 96},
}
_STD = 0.05


def models_of(experts: bool) -> Sequence[str]:
    """What a layout is compared on."""
    return (EXPERTS,) if experts else DENSE


def build_models(setup: Setup, kinds: Collection[bool]) -> None:
    """Make those that are not there yet, dense or with experts, with tokenizer and chat template for
    `braid sft`.
    """
    names = [name for experts in sorted(set(kinds)) for name in models_of(experts)]
    missing = [name for name in names if not setup.model_dir(name).exists()]
    if not missing:
        return
    import torch

    from launch.tiny import build_tokenizer, save_random_model, texts

    for name in missing:
        directory = setup.model_dir(name)
        partial = directory.with_name(f"{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        vocabulary = build_tokenizer(texts(), partial)
        config = _config(name, layers=setup.layers, vocabulary=vocabulary, on_cpu=setup.on_cpu)
        save_random_model(config, partial, std=_STD, dtype=torch.float32)
        partial.rename(directory)


def _config(name: str, *, layers: int, vocabulary: int, on_cpu: bool) -> Any:
    from transformers import Qwen2Config, Qwen3Config, Qwen3MoeConfig

    sizes = _SIZES[on_cpu]
    shared = {
        **sizes,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
    }
    head_dim = sizes["hidden_size"] // 8
    if name == "qwen2.5":
        return Qwen2Config(**shared, tie_word_embeddings=True)
    if name == "qwen3":
        return Qwen3Config(**shared, head_dim=head_dim, tie_word_embeddings=False)
    return Qwen3MoeConfig(
        **shared,
        head_dim=head_dim,
        tie_word_embeddings=False,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=sizes["intermediate_size"] // 3,
        norm_topk_prob=True,
    )
