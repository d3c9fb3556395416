"""The linears of a decoder layer by transformers' names, and where Megatron has them. Pure data, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from engine.model.spec import ModelSpec

# Megatron's fused linears -> the projections of transformers in them, in order: of an attention, of an MLP or
# shared expert, of the experts of a layer, which transformers has in one parameter each.
_ATTENTION: Mapping[str, tuple[str, ...]] = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
}
_MLP: Mapping[str, tuple[str, ...]] = {
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
_EXPERTS: Mapping[str, tuple[str, ...]] = {
    "linear_fc1": ("gate_up_proj",),
    "linear_fc2": ("down_proj",),
}


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A linear of a decoder layer that an adapter can be in, or one of all its experts."""

    layer: int
    """Index in the whole model."""
    linear: str
    """Megatron's linear that it is in, by its name in the layer."""
    name: str
    """As `q_proj`; of experts `gate_up_proj` or `down_proj`."""
    module: str
    """transformers' name, to which PEFT applies its patterns: of a module, or of the parameter of experts."""
    out_features: int
    in_features: int
    experts: int | None = None
    """How many experts have such a matrix, in one parameter; None for a linear."""

    parameter: bool = False
    """Whether PEFT reaches it by `target_parameters` only, as it does those of experts."""

    @property
    def linear_module(self) -> str:
        """transformers' name of the linear whose weight it is."""
        return self.module.removesuffix(".weight")

    @property
    def parameter_name(self) -> str:
        """What is the same in all layers of the name of a parameter, such as mlp.experts.down_proj."""
        return self.module.split(".", 3)[3]

    @property
    def row_parallel(self) -> bool:
        """Whether tensor parallelism cuts its inputs rather than its outputs."""
        return self.name in ("o_proj", "down_proj")

    def num_parameters(self, rank: int, experts: int | None = None) -> int:
        """Elements of its A and B; with `experts` of that many of the experts that it has."""
        count = 1 if self.experts is None else experts or self.experts
        return count * rank * (self.out_features + self.in_features)


def projections(spec: ModelSpec, layer: int) -> list[Projection]:
    """Every place for an adapter in a decoder layer, in the model's order. Routers are none."""
    hidden, width, moe = spec.hidden_size, spec.ffn_hidden_size, spec.moe
    q, kv = spec.num_attention_heads * spec.head_dim, spec.num_query_groups * spec.head_dim

    def block(
        linears: Mapping[str, tuple[str, ...]],
        megatron: str,
        hf: str,
        sizes: Mapping[str, tuple[int, int]],
        experts: int | None = None,
        weight: str = "",
    ) -> list[Projection]:
        return [
            Projection(
                layer=layer,
                linear=f"{megatron}.{linear}",
                name=name,
                module=f"model.layers.{layer}.{hf}.{name}{weight}",
                out_features=sizes[name][0],
                in_features=sizes[name][1],
                experts=experts,
                parameter=experts is not None or bool(weight),
            )
            for linear, names in linears.items()
            for name in names
        ]

    def mlp(width: int) -> dict[str, tuple[int, int]]:
        return {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}

    attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    found = block(_ATTENTION, "self_attention", "self_attn", attention)
    if moe is None or not spec.has_experts(layer):
        # In a Qwen3-MoE these names mean experts to PEFT, whatever stands before them: what can be named of a
        # dense layer is the parameter.
        weight = ".weight" if moe is not None and spec.family != "qwen2" else ""
        return found + block(_MLP, "mlp", "mlp", mlp(width), weight=weight)
    if moe.shared_ffn_hidden_size is not None:
        found += block(_MLP, "mlp.shared_experts", "mlp.shared_expert", mlp(moe.shared_ffn_hidden_size))
    width = moe.ffn_hidden_size
    fused = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
    return found + block(_EXPERTS, "mlp.experts", "mlp.experts", fused, experts=moe.num_experts)
