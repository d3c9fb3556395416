"""Layers of plain torch for Megatron's decoder: what its local specification lacks, and nothing that must be
compiled.

Shape suffixes: T tokens of a micro-batch, N heads of this rank, D head dimension, H hidden size.
"""

import dataclasses
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from engine.model.attention import Segments, attend
from engine.model.context_parallel import ContextParallel
from engine.model.fused import rms_norm, rms_norm_and_input, split_heads, swiglu, swiglu_again
from engine.model.gradients import give_product
from engine.model.head import Targets
from engine.model.router import Balance
from engine.model.spec import RopeSpec
from engine.runtime import mcore


@dataclasses.dataclass
class DocumentParams(PackedSeqParams):
    """Megatron's packed-sequence parameters plus what Braid's attention reads; travels to every layer of
    every stage.
    """

    segments: Segments | None = None
    """Which queries of this rank see which keys, with sizes on the host, so that no layer waits for the
    device to learn them.
    """

    context_parallel: ContextParallel | None = None
    """None where this rank has all tokens."""

    cos: Tensor | None = None
    """[T, 1, D] in the model's dtype for the tokens of this rank; positions restart at 0 in every document.
    """

    sin: Tensor | None = None

    routing: "Routing | None" = None
    """Of a model with experts."""

    targets: Targets | None = None
    """None: the model returns a loss for every token of `labels`."""

    balance: Balance | None = None
    """What the routers of a chunk have seen; every chunk has its own."""


@dataclasses.dataclass(kw_only=True)
class Routing:
    """What the load-balancing loss of a micro-batch needs, and on the last stage its values."""

    real: Tensor
    """bool [T]: tokens of this context-parallel rank that are no padding."""
    tokens: int
    """Real tokens of the whole micro-batch."""
    supervised: int
    """Supervised tokens of the whole micro-batch."""
    losses: Tensor | None = None
    """float32 [2]: load-balancing and z loss, without their coefficients; there after the last chunk."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerParts:
    """The classes that a decoder layer is made of, and what it keeps."""

    column_linear: type
    row_linear: type
    norm: type
    residual_norm: type
    """Before attention and MLP."""
    core_attention: type
    shared_expert: type
    norm_linear: type | None = None
    """A column-parallel linear with the norm before it in itself; None: norms are modules of their own."""
    gated_linear: type | None = None
    """The second linear of a dense MLP with silu(gate) * up in itself; None: `row_linear`."""
    recompute_activation: bool = False
    """silu(gate) * up of a dense MLP is computed again in the backward pass."""


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, x / rms(x) * weight (Zhang and Sennrich, 2019).

    Under sequence parallelism each rank sees part of the tokens; the weight is marked so that Megatron sums
    its gradient over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class GatedMLP(MLP):
    """Megatron's MLP with silu(gate) * up in one kernel; `recompute_activation` computes it again in the
    backward pass instead of keeping it.
    """

    def __init__(
        self,
        *arguments: Any,
        recompute_activation: bool = False,
        pg_collection: Any = None,
        tp_group: Any = None,
        is_mtp_layer: bool = False,
        **more: Any,
    ) -> None:
        # megatron-core 0.19 translates what a layer hands over for its own MLP only.
        group = tp_group if pg_collection is None else pg_collection.tp
        super().__init__(*arguments, tp_group=group, **more)
        self.recompute_activation = recompute_activation

    def forward(self, hidden_states: Tensor, *unused: Any, **more: Any) -> tuple[Tensor, Tensor | None]:
        """[T, 1, H] -> [T, 1, H] and no bias."""
        both, _ = self.linear_fc1(hidden_states)
        if isinstance(self.linear_fc2, GatedRowParallelLinear):
            return self.linear_fc2(both)
        active = swiglu(both)
        if not self.recompute_activation or not self.training:
            return self.linear_fc2(active)
        address, source = active.untyped_storage().data_ptr(), both.detach()

        def drop(saved: Tensor) -> Any:
            return saved.shape if saved.untyped_storage().data_ptr() == address else saved

        def restore(kept: Any) -> Tensor:
            return kept if isinstance(kept, Tensor) else swiglu(source).view(kept)

        with torch.autograd.graph.saved_tensors_hooks(drop, restore):
            return self.linear_fc2(active)


class GatedRowParallelLinear(RowParallelLinear):
    """The second linear of a gated MLP with silu(gate) * up before it, which is computed again in the
    backward pass by the kernel that differentiates it.
    """

    def _forward_impl(self, input: Tensor, weight: Tensor, *unused: Any, **more: Any) -> Tensor:
        """Gate before up [T, 1, 2 F] of this rank -> [T, 1, H], this rank's part of the sum."""
        out: Tensor = _GatedProduct.apply(input, weight)
        return out


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(both, weight)
        ctx.weight = weight  # the parameter itself, which has the gradient buffer
        return swiglu(both) @ weight.T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None]:
        both, weight = ctx.saved_tensors
        (grad,) = grad_outputs
        active, of_both = swiglu_again(both, grad @ weight)
        if not ctx.needs_input_grad[1]:
            return of_both, None
        return of_both, give_product(ctx.weight, grad.flatten(0, -2), active.flatten(0, -2))


class RotaryTable(torch.nn.Module):
    """cos and sin of the rotary embedding for given positions, with the scaling that transformers applies."""

    def __init__(self, rope: RopeSpec, *, head_dim: int, max_position_embeddings: int) -> None:
        super().__init__()
        inverse_frequencies, self.attention_scaling = _inverse_frequencies(
            rope, head_dim, max_position_embeddings
        )
        self.register_buffer("inverse_frequencies", inverse_frequencies, persistent=False)

    @torch.no_grad()
    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """position_ids int64 [T] -> cos and sin, each [T, 1, D] of `dtype`."""
        self.inverse_frequencies: Tensor
        frequencies = position_ids.float()[:, None] * self.inverse_frequencies.to(position_ids.device)[None]
        angles = torch.cat((frequencies, frequencies), dim=-1)[:, None]
        scale = self.attention_scaling
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def _inverse_frequencies(rope: RopeSpec, head_dim: int, max_position_embeddings: int) -> tuple[Tensor, float]:
    """[D / 2] float32 and the factor on cos and sin. Scaled kinds are computed by transformers, their
    definition.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    if rope.rope_type == "default":
        return 1.0 / rope.theta**exponents, 1.0
    from transformers import Qwen2Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = Qwen2Config(
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=max_position_embeddings,
        rope_parameters={"rope_theta": rope.theta, "rope_type": rope.rope_type, **rope.parameters},
    )
    config.head_dim = head_dim
    return ROPE_INIT_FUNCTIONS[rope.rope_type](config, torch.device("cpu"))


class ResidualNorm(RMSNorm):
    """A norm before attention or an MLP, which hands the residual on where Megatron's layer takes it from
    there.
    """

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        if mcore.norms_give_residuals():
            return rms_norm_and_input(x, self.weight, self.eps)
        return super().forward(x)


class HeadNorm(RMSNorm):
    """The norm of queries or of keys: called without them it gives its weight, for a kernel that norms heads
    among other things. (Megatron waits for a gathered parameter when its module is called.)
    """

    def forward(self, x: Tensor | None) -> Tensor:
        return self.weight if x is None else super().forward(x)


class PackedSelfAttention(SelfAttention):
    """Megatron's self-attention over packed documents.

    Rotary embedding is applied here, by position id, together with all else that stands between the fused
    linear and attention, instead of in Megatron's attention, which knows only positions that run through the
    whole micro-batch.
    """

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        # With fewer groups than ranks Megatron puts heads together from several ranks.
        self.whole_groups = self.config.num_query_groups >= self.world_size
        if self.whole_groups and isinstance(self.linear_qkv, ColumnParallelLinear):
            self.linear_qkv.skip_bias_add = True
        self.documents: DocumentParams | None = None

    def forward(
        self, *arguments: Any, packed_seq_params: DocumentParams | None = None, **more: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As Megatron's."""
        self.documents = packed_seq_params
        try:
            found: tuple[Tensor, Tensor | None] = super().forward(
                *arguments, packed_seq_params=packed_seq_params, **more
            )
        finally:
            self.documents = None
        return found

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, *arguments: Any, **more: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[T, 1, H] -> queries [T, 1, N, D], keys and values [T, 1, G, D], rotated."""
        documents = self.documents
        assert documents is not None
        assert documents.cos is not None
        assert documents.sin is not None
        if self.whole_groups:
            mixed, bias = self.linear_qkv(hidden_states)
            weights = None
            if isinstance(self.q_layernorm, HeadNorm):
                weights = self.q_layernorm(None), self.k_layernorm(None)
            groups, eps = self.num_query_groups_per_partition, self.config.layernorm_epsilon
        else:
            heads = super().get_query_key_value_tensors(hidden_states, *arguments, **more)
            mixed, bias, weights = torch.cat(heads, dim=2).flatten(2), None, None
            groups, eps = 1, 0.0
            assert heads[1].shape[2] == 1, "a rank has one group"
        query, key, value = split_heads(
            mixed[:, 0], groups, documents.cos, documents.sin, bias=bias, norms=weights, eps=eps
        )
        return query[:, None], key[:, None], value[:, None]


class CoreAttention(torch.nn.Module):
    """Causal grouped-query attention over packed documents with torch's kernels, context-parallel or not."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **unused: Any
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(
        self,
        query_TND: Tensor,
        key_TND: Tensor,
        value_TND: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: DocumentParams | None = None,
    ) -> Tensor:
        """[T, N, D] queries and [T, G, D] keys and values -> [T, N * D]. A token attends to its document up
        to itself.
        """
        assert packed_seq_params is not None
        cp, segments = packed_seq_params.context_parallel, packed_seq_params.segments
        assert segments is not None
        if cp is None:
            return attend(query_TND, key_TND, value_TND, segments, self.softmax_scale).flatten(1)
        if cp.by_heads:
            query, key, value = cp.tokens_to_heads(query_TND, key_TND, value_TND)
            return cp.heads_to_tokens(attend(query, key, value, segments, self.softmax_scale)).flatten(1)
        # One exchange for keys and values together.
        key, value = cp.gather_tokens(torch.stack((key_TND, value_TND), dim=1)).unbind(1)
        return attend(query_TND, key, value, segments, self.softmax_scale).flatten(1)
