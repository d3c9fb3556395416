"""Layers of Transformer Engine, adapted to Braid's packed documents. Import only where Transformer Engine is
installed.
"""

from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelLinear,
)

from engine.model.experts import SharedExpert
from engine.model.layers import LayerParts


class TESharedExpert(SharedExpert):
    """The expert that every token goes to, of Transformer Engine's linears."""

    column_linear = TEColumnParallelLinear
    row_linear = TERowParallelLinear


def te_parts(*, fused_norm: bool, recompute_activation: bool) -> LayerParts:
    """Transformer Engine's layers; without `fused_norm`, as LoRA needs it, norms are modules of their own."""
    return LayerParts(
        column_linear=TEColumnParallelLinear,
        row_linear=TERowParallelLinear,
        norm=TENorm,
        residual_norm=TENorm,
        core_attention=TEDotProductAttention,
        shared_expert=TESharedExpert,
        recompute_activation=recompute_activation,
        norm_linear=TELayerNormColumnParallelLinear if fused_norm else None,
    )
