"""Layers of Transformer Engine, adapted to Braid's packed documents. Import only where Transformer Engine is
installed.
"""

from typing import Any

from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelLinear,
)
from torch import Tensor

from engine.model.experts import SharedExpert
from engine.model.layers import DocumentParams, LayerParts, apply_rotary


class TECoreAttention(TEDotProductAttention):
    """Transformer Engine's fused attention, with the rotary embedding applied by position id as in
    CoreAttention.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: DocumentParams | None = None,
        **arguments: Any,
    ) -> Tensor:
        """[T, N, D] queries and [T, G, D] keys and values -> [T, N * D]."""
        assert packed_seq_params is not None
        query, key = apply_rotary(query, key, packed_seq_params)
        return super().forward(
            query,
            key,
            value,
            attention_mask,
            attn_mask_type=attn_mask_type,
            attention_bias=attention_bias,
            packed_seq_params=packed_seq_params,
            **arguments,
        )


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
        core_attention=TECoreAttention,
        shared_expert=TESharedExpert,
        recompute_activation=recompute_activation,
        norm_linear=TELayerNormColumnParallelLinear if fused_norm else None,
    )
