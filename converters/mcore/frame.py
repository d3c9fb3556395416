"""What makes a directory of `.distcp` files a checkpoint for Megatron-Core, Megatron-LM and Megatron-Bridge.

Beside `.metadata`: `common.pt` and `metadata.json` as Megatron-Core reads them, an empty `_extra_state` for
every module of Transformer Engine, without which Megatron-LM and Megatron-Bridge refuse to load, and
`run_config.yaml`, from which Megatron-Bridge learns the model's shape.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from converters.mcore.places import stacks_layers
from engine.model.spec import ModelSpec, MoeSpec
from engine.storage import layout
from engine.storage.durable import fsync
from engine.storage.metadata import DistBytes, DistTensor

RUN_CONFIG_FILE = "run_config.yaml"

_STATES_FILE = "__1_0.distcp"
_COMMON = {
    "checkpoint_version": 3.0,
    "iteration": 0,
    "num_floating_point_operations_so_far": 0,
    # Layers are stacked, unless a model asks for the contrary by layers of two kinds.
    "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
}


def write_frame(checkpoint_dir: Path, tensors: Sequence[DistTensor], spec: ModelSpec | None = None) -> None:
    """Write everything but the data. `metadata.json` comes last, for it is what Megatron knows a checkpoint
    by. Without `spec` it is no model (a LoRA adapter), and Braid alone loads it. OSError comes from the disk.
    """
    states: list[DistBytes] = []
    if spec is not None:
        length = layout.save_durably([None], checkpoint_dir / _STATES_FILE)
        states = [
            DistBytes(key=key, file=_STATES_FILE, start=0, length=length) for key in extra_state_keys(spec)
        ]
        write_yaml(checkpoint_dir / RUN_CONFIG_FILE, bridge_run_config(spec))
    layout.write_frame(checkpoint_dir, tensors, states, _COMMON)


def write_yaml(path: Path, value: Mapping[str, Any]) -> None:
    """Write YAML durably, in the order given."""
    path.write_text(yaml.safe_dump(dict(value), sort_keys=False), encoding="utf-8")
    fsync(path)


def extra_state_keys(spec: ModelSpec) -> Iterator[str]:
    """The keys under which a Transformer Engine model asks for the state of its quantisers: one a module and
    layer, and of the experts' linears one an expert, whatever the parallelism. They hold None, which stands
    for no state.
    """
    stacked = stacks_layers(spec)
    for layer in range(spec.num_layers):
        prefix = "decoder.layers." if stacked else f"decoder.layers.{layer}."
        lead = [(layer, spec.num_layers)] if stacked else []
        for module in _modules(spec, layer):
            yield _state_key(prefix + module, lead)
        if spec.moe is not None and spec.has_experts(layer):
            for linear, expert in itertools.product(
                ("linear_fc1", "linear_fc2"), range(spec.moe.num_experts)
            ):
                place = (expert, spec.moe.num_experts)
                yield _state_key(f"{prefix}mlp.experts.experts.{linear}", [*lead, place])
    yield _state_key("decoder.final_layernorm", [])


def _modules(spec: ModelSpec, layer: int) -> list[str]:
    """Those of a decoder layer that have a state, but for the experts.

    `core_attention` is asked for by Megatron-Core up to 0.14 only; what is not asked for does no harm.
    """
    modules = ["self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention"]
    if spec.qk_norm:
        modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    if not spec.has_experts(layer):
        return [*modules, "mlp.linear_fc1", "mlp.linear_fc2"]
    modules.append("pre_mlp_layernorm")
    if spec.moe is not None and spec.moe.shared_ffn_hidden_size is not None:
        modules += ["mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"]
    return modules


def _state_key(module: str, lead: Sequence[tuple[int, int]]) -> str:
    """`lead` has the index and the size of every stacked axis."""
    indices, sizes = zip(*(lead or [(0, 1)]), strict=True)
    return f"{module}._extra_state/shard_{'.'.join(map(str, indices))}_{'.'.join(map(str, sizes))}"


def bridge_run_config(spec: ModelSpec) -> dict[str, Any]:
    """The part of Megatron-Bridge's `run_config.yaml` that describes a model: a GPTModelProvider by the names
    of its fields, those that Qwen does not have in common with its defaults.
    """
    silu = {"_target_": "torch.nn.functional.silu", "_call_": False}
    bfloat16 = {"_target_": "torch.bfloat16", "_call_": False}
    model = {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "ffn_hidden_size": spec.ffn_hidden_size,
        "num_attention_heads": spec.num_attention_heads,
        "num_query_groups": spec.num_query_groups,
        "kv_channels": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "seq_length": spec.max_position_embeddings,
        "normalization": "RMSNorm",
        "layernorm_epsilon": spec.norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": silu,
        "add_bias_linear": False,
        "add_qkv_bias": spec.qkv_bias,
        "qk_layernorm": spec.qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "position_embedding_type": "rope",
        "rotary_base": spec.rope.theta,
        "share_embeddings_and_output_weights": spec.tied_embeddings,
        "bf16": True,
        "params_dtype": bfloat16,
        "autocast_dtype": bfloat16,
        **(_bridge_experts(spec.moe) if spec.moe is not None else {}),
    }
    return {
        "model": model,
        "checkpoint": {"save_optim": False, "save_rng": False, "fully_parallel_save": False},
    }


def _bridge_experts(moe: MoeSpec) -> dict[str, Any]:
    """The fields that describe a mixture of experts."""
    return {
        "num_moe_experts": moe.num_experts,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_router_topk": moe.top_k,
        # A softmax over the chosen experts only is one over all, made to add up to 1.
        "moe_router_pre_softmax": not moe.normalize_top_k,
        "moe_shared_expert_intermediate_size": moe.shared_ffn_hidden_size,
        "moe_shared_expert_gate": moe.shared_ffn_hidden_size is not None,
        # A list makes Megatron look for layers one by one.
        "moe_layer_freq": 1 if all(moe.layers) else [int(sparse) for sparse in moe.layers],
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": moe.aux_loss_coef,
        "moe_grouped_gemm": True,
        "moe_token_dispatcher_type": "alltoall",
    }
