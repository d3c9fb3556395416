"""Layers of Transformer Engine, adapted to Braid's packed documents. Import only where Transformer Engine is
installed.
"""

from typing import Any

from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelGroupedLinear,
    TERowParallelLinear,
)
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from engine.model.experts import GroupedExperts, SharedExpert, mark_expert_weight
from engine.model.layers import DocumentParams, LayerParts, apply_rotary
from engine.runtime import mcore


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
        assert packed_seq_params.cos is not None
        assert packed_seq_params.sin is not None
        query = apply_rotary(query, packed_seq_params.cos, packed_seq_params.sin)
        key = apply_rotary(key, packed_seq_params.cos, packed_seq_params.sin)
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


class TEExperts(TEGroupedMLP):
    """The experts of this rank as Transformer Engine's grouped linears: each matrix is a parameter."""

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, *, pg_collection: Any, **unused: Any
    ) -> None:
        super().__init__(
            num_local_experts,
            config,
            mcore.expert_linears(TEColumnParallelGroupedLinear, TERowParallelGroupedLinear),
            pg_collection=pg_collection,
        )
        for axis, linear in enumerate((self.linear_fc1, self.linear_fc2)):
            # Without expert parallelism Megatron would reduce them as if they were no experts'.
            for weight in linear.parameters():
                mark_expert_weight(weight, axis=axis)


def te_parts(*, fused_norm: bool) -> LayerParts:
    """Transformer Engine's layers. Without `fused_norm`, as LoRA needs them: norms are modules of their own,
    and the weights of experts are in one parameter.
    """
    return LayerParts(
        column_linear=TEColumnParallelLinear,
        row_linear=TERowParallelLinear,
        norm=TENorm,
        core_attention=TECoreAttention,
        shared_expert=TESharedExpert,
        experts=TEExperts if fused_norm else GroupedExperts,
        norm_linear=TELayerNormColumnParallelLinear if fused_norm else None,
    )
