"""Published Qwen models by name: what their config.json says, so that a benchmark needs no download.

The numbers are those of `Qwen/Qwen2.5-7B`, `Qwen/Qwen3-8B` and so on at the Hugging Face hub.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from engine.errors import ConfigError
from engine.model.spec import ModelSpec, model_spec_from_config


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The mixture of experts of a shape; names as in config.json, counts of elements."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int | None = None
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.001


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's sizes; names as in config.json, counts of elements."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    experts: Experts | None = None

    def config(self) -> dict[str, Any]:
        """The shape as a parsed config.json."""
        values = {
            name: value for name, value in vars(self).items() if name not in ("architecture", "experts")
        }
        experts = {} if self.experts is None else vars(self.experts)
        known = {name: value for name, value in experts.items() if value is not None}
        return {"architectures": [self.architecture], "hidden_act": "silu", **values, **known}


def _qwen25(
    hidden: int, mlp: int, layers: int, heads: int, groups: int, *, tied: bool, positions: int = 131072,
    epsilon: float = 1e-6,
) -> Shape:  # fmt: skip
    return Shape(
        architecture="Qwen2ForCausalLM",
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=hidden // heads,
        # The models up to 3 B have the smaller embedding.
        vocab_size=151936 if tied else 152064,
        tie_word_embeddings=tied,
        max_position_embeddings=positions,
        rms_norm_eps=epsilon,
    )


def _qwen3(
    hidden: int, mlp: int, layers: int, heads: int, groups: int, *, tied: bool, experts: Experts | None = None
) -> Shape:
    return Shape(
        architecture="Qwen3ForCausalLM" if experts is None else "Qwen3MoeForCausalLM",
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=tied,
        max_position_embeddings=40960,
        experts=experts,
    )


def _tiny(experts: Experts | None = None) -> Shape:
    return Shape(
        architecture="Qwen3ForCausalLM" if experts is None else "Qwen3MoeForCausalLM",
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=512,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
        experts=experts,
    )


_QWEN15_MOE = Shape(
    architecture="Qwen2MoeForCausalLM",
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=128,
    vocab_size=151936,
    tie_word_embeddings=False,
    max_position_embeddings=8192,
    experts=Experts(
        num_experts=60,
        num_experts_per_tok=4,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        norm_topk_prob=False,
    ),
)

SHAPES: Mapping[str, Shape] = {
    "qwen2.5-0.5b": _qwen25(896, 4864, 24, 14, 2, tied=True, positions=32768),
    "qwen2.5-1.5b": _qwen25(1536, 8960, 28, 12, 2, tied=True),
    "qwen2.5-3b": _qwen25(2048, 11008, 36, 16, 2, tied=True, positions=32768),
    "qwen2.5-7b": _qwen25(3584, 18944, 28, 28, 4, tied=False),
    "qwen2.5-14b": _qwen25(5120, 13824, 48, 40, 8, tied=False, epsilon=1e-5),
    "qwen2.5-32b": _qwen25(5120, 27648, 64, 40, 8, tied=False, epsilon=1e-5),
    "qwen2.5-72b": _qwen25(8192, 29568, 80, 64, 8, tied=False, epsilon=1e-5),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, 8, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, 8, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8, tied=False),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, 8, tied=False),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, 8, tied=False),
    "qwen3-30b-a3b": _qwen3(
        2048, 6144, 48, 32, 4, tied=False,
        experts=Experts(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768),
    ),
    "qwen3-235b-a22b": _qwen3(
        4096, 12288, 94, 64, 4, tied=False,
        experts=Experts(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1536),
    ),
    "qwen2-moe-a2.7b": _QWEN15_MOE,
    "qwen1.5-moe-a2.7b": _QWEN15_MOE,
    "tiny": _tiny(),
    "tiny-moe": _tiny(Experts(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)),
}  # fmt: skip


def spec_of_shape(name: str) -> ModelSpec:
    """The spec of a shape, in any spelling of upper and lower case; `qwen3-30b-a3b-8-layers` is one with
    fewer layers. Raises ConfigError for an unknown name, and for layers that a shape does not have.
    """
    some = re.fullmatch(r"(?P<whole>.+)-(?P<layers>\d+)-layers", name.lower())
    shape = SHAPES.get(some["whole"] if some else name.lower())
    if shape is None:
        known = f"shapes are {', '.join(SHAPES)}; with fewer layers as qwen2.5-7b-4-layers"
        raise ConfigError(f"shape {name!r} is not known; {known}")
    if some:
        layers, most = int(some["layers"]), shape.num_hidden_layers
        if not 1 <= layers <= most:
            raise ConfigError(f"shape {name!r}: {some['whole']} has {most} layers; take from 1 to {most}")
        shape = replace(shape, num_hidden_layers=layers)
    return model_spec_from_config(shape.config(), where=f"shape {name}")
