"""ModelSpec + layout -> Megatron GPTModel chunks of this rank, and the names of their parameters."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from engine.config.options import MoeOptions, RecomputeOptions
from engine.config.parallel import ParallelLayout
from engine.config.recompute import MLP_ACTIVATION, check_recompute, granularity_of
from engine.model.attention import packed_kernel
from engine.model.experts import ExpertLayer, GroupedExperts, MixtureOfExperts, SharedExpert
from engine.model.gpt import BraidGPTModel
from engine.model.layers import (
    CoreAttention,
    GatedMLP,
    GatedRowParallelLinear,
    HeadNorm,
    LayerParts,
    PackedSelfAttention,
    ResidualNorm,
    RMSNorm,
)
from engine.model.lora import A, B, attach_lora
from engine.model.lora_spec import LoraSpec
from engine.model.router import Router
from engine.model.spec import ModelSpec
from engine.runtime import mcore
from engine.runtime.platform import Platform

# Where the torch layers keep a norm -> where Megatron's Transformer Engine layers keep it, the canonical
# name.
_CANONICAL_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def canonical_norms(*, experts: bool) -> dict[str, str]:
    """The table for a layer. Before experts the norm is a module of its own in both: the router reads it."""
    return {name: te for name, te in _CANONICAL_NORMS.items() if not (experts and "mlp" in name)}


def transformer_config(
    spec: ModelSpec,
    layout: ParallelLayout,
    platform: Platform,
    recompute: RecomputeOptions,
    moe: MoeOptions | None = None,
    *,
    lora: bool = False,
) -> TransformerConfig:
    """Megatron's configuration of the model; with `lora` its own weights are frozen. Raises ConfigError where
    the options contradict each other.
    """
    values: dict[str, Any] = {
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "ffn_hidden_size": spec.ffn_hidden_size,
        "num_attention_heads": spec.num_attention_heads,
        "num_query_groups": spec.num_query_groups,
        "kv_channels": spec.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": spec.norm_epsilon,
        "qk_layernorm": spec.qk_norm,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "add_qkv_bias": spec.qkv_bias,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # Weights are loaded over the initial ones at once, so initialising them would only cost time.
        # Megatron still has to go through its initialisation: that is where it marks parameters as
        # tensor-parallel.
        "init_method": _keep,
        "output_layer_init_method": _keep,
        "embedding_init_method": _keep,
        "perform_initialization": True,
        "use_cpu_initialization": False,
        **_parallelism(layout, platform),
        # The only normalisation that is right with masked tokens and uneven rows: by the step's tokens.
        "calculate_per_token_loss": True,
        # Gradients of frozen weights are not computed, so there is nowhere to add them.
        "gradient_accumulation_fusion": not lora,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": platform.use_te,
        **_recompute(recompute, platform, lora=lora),
        "distribute_saved_activations": False,
        **_fp8(platform),
        **(_experts(spec, layout, moe or MoeOptions()) if spec.moe is not None else {}),
    }
    return TransformerConfig(**mcore.known_fields(TransformerConfig, values))


def _parallelism(layout: ParallelLayout, platform: Platform) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "pipeline_model_parallel_layout": layout.megatron_layout(),
        "context_parallel_size": layout.cp,
        "cp_comm_type": layout.cp_comm_type or ("p2p" if platform.use_te else None),
        "sequence_parallel": layout.sequence_parallel,
        "params_dtype": platform.dtype,
        "pipeline_dtype": platform.dtype,
        "bf16": platform.dtype == torch.bfloat16,
        "fp16": platform.dtype == torch.float16,
        # Pipeline stages exchange shapes first; Megatron refuses its default dispatcher beside this.
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        # Batched sends and receives of an interleaved schedule over two ranks would pair up wrongly.
        "overlap_p2p_comm": layout.vpp > 1,
        "batch_p2p_comm": layout.vpp == 1,
    }


def _experts(spec: ModelSpec, layout: ParallelLayout, options: MoeOptions) -> dict[str, Any]:
    moe = spec.moe
    assert moe is not None
    return {
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "num_moe_experts": moe.num_experts,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_router_topk": moe.top_k,
        "moe_router_pre_softmax": not moe.normalize_top_k,
        "moe_router_dtype": "fp32",
        # Braid's router has the loss of all layers together.
        "moe_router_load_balancing_type": "none",
        "moe_expert_capacity_factor": options.moe_expert_capacity_factor,
        "moe_token_drop_policy": options.moe_token_drop_policy or "probs",
        "moe_shared_expert_intermediate_size": moe.shared_ffn_hidden_size,
        "moe_shared_expert_gate": moe.shared_ffn_hidden_size is not None,
        # A list makes Megatron store layers one by one, as it must where they differ.
        "moe_layer_freq": 1 if all(moe.layers) else [int(sparse) for sparse in moe.layers],
    }


def _keep(weight: Tensor) -> Tensor:
    return weight


def _recompute(options: RecomputeOptions, platform: Platform, *, lora: bool) -> dict[str, Any]:
    """Megatron's recompute settings from transformers' switch and Megatron's own flags."""
    check_recompute(options, has_te=platform.use_te, fp8_recipe=platform.fp8_recipe, lora=lora)
    granularity = granularity_of(options)
    if granularity != "full":
        modules = [name for name in options.recompute_modules if name != MLP_ACTIVATION]
        if options.recompute_modules and not modules:
            return {"recompute_granularity": None}
        return {"recompute_granularity": granularity, "recompute_modules": modules or None}
    return {
        "recompute_granularity": granularity,
        "recompute_method": options.recompute_method or "uniform",
        "recompute_num_layers": options.recompute_num_layers or 1,
    }


def _fp8(platform: Platform) -> dict[str, Any]:
    """Values in e4m3 and gradients in e5m2 where a whole tensor has one scale; blocks do with e4m3 alone."""
    if platform.fp8_recipe is None:
        return {}
    return {
        "fp8": "e4m3" if platform.fp8_recipe == "blockwise" else "hybrid",
        "fp8_recipe": platform.fp8_recipe,
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
    }


def block_spec(
    config: TransformerConfig, parts: LayerParts, *, sparse: Sequence[bool], dispatcher: str
) -> Any:
    """Megatron's specification of a chunk of decoder layers; `sparse` says which of them have experts."""
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    return TransformerBlockSubmodules(
        layer_specs=[_layer_spec(config, parts, dispatcher if experts else None) for experts in sparse],
        layer_norm=parts.norm,
    )


def layer_parts(
    platform: Platform, recompute: RecomputeOptions, *, lora: bool, own_attention: bool
) -> LayerParts:
    """What layers are made of on a platform; LoRA reads what norms return. Without `own_attention`
    Transformer Engine's layers have Transformer Engine's attention too.
    """
    recompute_activation = MLP_ACTIVATION in recompute.recompute_modules
    if platform.use_te:
        from engine.model.te_layers import te_parts

        parts = te_parts(fused_norm=not lora, recompute_activation=recompute_activation)
        return replace(parts, core_attention=CoreAttention) if own_attention else parts
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    return LayerParts(
        column_linear=ColumnParallelLinear,
        row_linear=RowParallelLinear,
        # LoRA reads what goes into the linear.
        gated_linear=GatedRowParallelLinear if recompute_activation and not lora else None,
        norm=RMSNorm,
        residual_norm=ResidualNorm,
        core_attention=CoreAttention,
        shared_expert=SharedExpert,
        recompute_activation=recompute_activation,
    )


def has_own_attention(platform: Platform, layout: ParallelLayout, head_dim: int) -> bool:
    """Whether Braid computes attention. Beside Transformer Engine it does with FlashAttention 4, which is
    faster on a Hopper, and where no ranks share a sequence.
    """
    if not platform.use_te:
        return True
    kernel = packed_kernel(platform.device, platform.dtype, head_dim)
    return layout.cp == 1 and kernel == "FlashAttention 4"


def attention_name(platform: Platform, layout: ParallelLayout, head_dim: int) -> str:
    """What computes attention on a platform, for people."""
    if not has_own_attention(platform, layout, head_dim):
        return "Transformer Engine"
    kernel = packed_kernel(platform.device, platform.dtype, head_dim)
    return kernel or "torch's scaled_dot_product_attention"


def _layer_spec(config: TransformerConfig, parts: LayerParts, dispatcher: str | None) -> Any:
    """`dispatcher` is that of the layer's experts, None for a dense layer."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.transformer.attention import SelfAttentionSubmodules
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    qk_norm = HeadNorm if config.qk_layernorm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=parts.norm_linear or parts.column_linear,
        core_attention=parts.core_attention,
        linear_proj=parts.row_linear,
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    dense, fused = dispatcher is None, parts.norm_linear is not None
    return ModuleSpec(
        module=TransformerLayer if dense else ExpertLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if fused else parts.residual_norm,
            self_attention=ModuleSpec(
                module=PackedSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=attention,
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp if dense and fused else parts.residual_norm,
            mlp=_mlp_spec(parts, dispatcher),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={} if fused else canonical_norms(experts=not dense),
        ),
    )


def _mlp_spec(parts: LayerParts, dispatcher: str | None) -> Any:
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.moe_layer import MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    if dispatcher is None:
        linears = MLPSubmodules(
            linear_fc1=parts.norm_linear or parts.column_linear,
            linear_fc2=parts.gated_linear or parts.row_linear,
        )
        return ModuleSpec(
            module=GatedMLP,
            params={"recompute_activation": parts.recompute_activation},
            submodules=linears,
        )
    return ModuleSpec(
        module=MixtureOfExperts,
        params={"dispatcher": dispatcher},
        submodules=MoESubmodules(experts=GroupedExperts, shared_experts=parts.shared_expert, router=Router),
    )


def build_chunks(
    spec: ModelSpec,
    layout: ParallelLayout,
    platform: Platform,
    recompute: RecomputeOptions,
    groups: mcore.Groups,
    lora: LoraSpec | None = None,
    moe: MoeOptions | None = None,
) -> list[BraidGPTModel]:
    """The model chunks of this rank (one, or one per virtual stage), on its device, with unset weights.

    With `lora` they are frozen but for its adapters.
    """
    moe = moe or MoeOptions()
    spec.check_tensor_parallel(layout.tp)
    spec.check_expert_parallel(layout.ep, layout.etp)
    layout.check_cp_comm_type(has_te=platform.use_te)
    config = transformer_config(spec, layout, platform, recompute, moe, lora=lora is not None)
    chunks = []
    for index, vp_stage in enumerate(mcore.virtual_stages(layout)):
        layers = layout.chunks_of(groups.pp_rank)[index]
        pre_process, post_process = mcore.stage_flags(vp_stage)
        chunk = BraidGPTModel(
            spec=spec,
            moe_options=moe,
            config=config,
            transformer_layer_spec=block_spec(
                config,
                layer_parts(
                    platform,
                    recompute,
                    lora=lora is not None,
                    own_attention=has_own_attention(platform, layout, spec.head_dim),
                ),
                sparse=[spec.has_experts(layer) for layer in layers],
                dispatcher=moe.moe_token_dispatcher_type,
            ),
            vocab_size=spec.padded_vocab_size(layout.tp),
            max_sequence_length=spec.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=spec.tied_embeddings,
            # Rotary embedding goes by position id; see PackedSelfAttention.
            position_embedding_type="none",
            vp_stage=vp_stage,
        )
        if lora is not None:
            attach_lora(chunk, lora, layers)
        chunks.append(chunk.to(platform.device))
    return chunks


@dataclass(frozen=True, kw_only=True)
class NamedWeight:
    """A parameter of this rank under its canonical Megatron name (see converters.mapping), or the part of it
    that is one expert's.
    """

    name: str
    parameter: torch.nn.Parameter
    is_copy: bool
    """The last pipeline stage's copy of tied embeddings, kept equal to the first stage's by Megatron."""

    expert: int | None = None
    """Index in the parameter, whose first dimension are the experts of this rank."""

    def part(self, tensor: Tensor) -> Tensor:
        """What belongs to this name of the parameter, or of a tensor of its shape."""
        return tensor if self.expert is None else tensor[self.expert]


def named_weights(
    chunks: Sequence[BraidGPTModel], layout: ParallelLayout, pp_rank: int
) -> Iterator[NamedWeight]:
    """Every parameter of this rank but adapters. The last stage's copy of tied embeddings carries the
    embedding's name.
    """
    for chunk, layers in zip(chunks, layout.chunks_of(pp_rank), strict=True):
        for own_name, parameter in chunk.named_parameters():
            if own_name.endswith((A, B)):
                continue
            name = own_name.replace(".base_layer.", ".")
            canonical = canonical_name(name, first_layer=layers.start, spec=chunk.spec)
            if ".mlp.experts." in name:
                first = chunk.pg_collection.ep.rank() * parameter.shape[0]
                for index in range(parameter.shape[0]):
                    own = f"{canonical}{first + index}"
                    yield NamedWeight(name=own, parameter=parameter, is_copy=False, expert=index)
                continue
            yield NamedWeight(
                name=canonical,
                parameter=parameter,
                is_copy=name == "output_layer.weight" and chunk.spec.tied_embeddings,
            )


def canonical_name(name: str, *, first_layer: int, spec: ModelSpec) -> str:
    """The canonical name of a chunk's parameter `name`; `first_layer` is the global index of the chunk's
    first layer.
    """
    if name == "output_layer.weight" and spec.tied_embeddings:
        return "embedding.word_embeddings.weight"
    prefix, found, rest = name.partition("decoder.layers.")
    if not found or prefix:
        return name
    local, _, rest = rest.partition(".")
    experts = spec.has_experts(first_layer + int(local))
    for torch_name, te_name in canonical_norms(experts=experts).items():
        if rest.startswith(torch_name):
            rest = te_name + rest.removeprefix(torch_name)
    return f"decoder.layers.{first_layer + int(local)}.{rest}"
