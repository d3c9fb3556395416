"""Megatron's own model on the CPU, of a mixture of experts, and a converted checkpoint: keys, shapes, values.
Run by test_moe, once a rank.

    python -m tests.converters.moe_worker STORE RANK EP_SIZE [HF_DIR CHECKPOINT SAVE_TO]...

The model is a GPTModel of Megatron's local specification, whose experts are a SequentialMLP. It does not run
without Transformer Engine, but it says what it stores. What was loaded is saved again.
"""

import sys
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from converters.hf.reader import HfReader
from converters.mapping import weight_map
from converters.mcore.frame import bridge_run_config, extra_state_keys
from engine.model.spec import ModelSpec, load_model_spec

_LOCAL_NORMS = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
"""Where the local specification has the norm before the MLP, also that before experts, which Transformer
Engine's has as a module of its own.
"""


def build(spec: ModelSpec, ep_size: int) -> Any:
    """The GPTModel of a rank that `run_config.yaml` describes."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    described = bridge_run_config(spec)["model"]
    fields = {name: described[name] for name in described if name in TransformerConfig.__dataclass_fields__}
    config = TransformerConfig(
        **fields
        | {
            "activation_func": torch.nn.functional.silu,
            "params_dtype": torch.bfloat16,
            "autocast_dtype": torch.bfloat16,
            "moe_grouped_gemm": False,
            "moe_token_dispatcher_type": "allgather",  # the others want streams of a GPU
            "expert_model_parallel_size": ep_size,
            "use_cpu_initialization": True,
        }
    )
    layers = []
    for layer in range(spec.num_layers):
        experts = described["num_moe_experts"] if spec.has_experts(layer) else None
        made = get_gpt_layer_local_spec(
            num_experts=experts, qk_layernorm=spec.qk_norm, normalization="RMSNorm"
        )
        if experts is not None:
            names = made.submodules.sharded_state_dict_keys_map
            kept = {name: to for name, to in names.items() if name not in _LOCAL_NORMS}
            made.submodules = replace(made.submodules, sharded_state_dict_keys_map=kept)
        layers.append(made)
    norm = layers[0].submodules.input_layernorm
    return GPTModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm),
        vocab_size=spec.padded_vocab_size(1),
        max_sequence_length=spec.max_position_embeddings,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=spec.tied_embeddings,
    )


def asked(model: Any, spec: ModelSpec) -> dict[str, Any]:
    """The tensors that the model asks for. The states that it asks for are those that a checkpoint has."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    state = model.sharded_state_dict(metadata={"singleton_local_shards": False})
    states = {n: item for n, item in state.items() if isinstance(item, ShardedObject)}
    keys = {item.unique_key for item in states.values()}
    assert sum(".experts.experts." in key for key in keys) >= 2
    surplus = keys - set(extra_state_keys(spec))
    assert all(".embedding." in f".{key}" for key in surplus), surplus
    return {name: item for name, item in state.items() if name not in states}


def check(hf_dir: str, checkpoint: str, ep_size: int, rank: int) -> dict[str, Any]:
    """Load, with nothing missing on either side, and compare each parameter with the Hugging Face tensors."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    spec, reader = load_model_spec(hf_dir), HfReader(hf_dir)
    model = build(spec, ep_size).bfloat16()  # its norms are fp32 otherwise
    for parameter in model.parameters():
        parameter.data.zero_()
    options = {"strict": StrictHandling.RETURN_ALL}
    loaded, missing, unexpected = dist_checkpointing.load(asked(model, spec), checkpoint, **options)
    # States of Transformer Engine's modules are all that this model does not ask for.
    assert all("._extra_state" in key for key in missing | unexpected), (missing, unexpected)
    model.load_state_dict(loaded, strict=False)
    stored, seen = dict(model.named_parameters()), set()
    for weight in weight_map(spec).values():
        name = local_name(weight.name, spec, first=rank * local_experts(spec, ep_size), ep_size=ep_size)
        if name is not None:
            seen.add(name)
            full = weight.to_megatron(reader.read_slice)
            assert torch.equal(stored[name], full), (weight.name, name)
    assert seen == stored.keys(), stored.keys() - seen
    return asked(model, spec)


def local_experts(spec: ModelSpec, ep_size: int) -> int:
    """How many of a rank."""
    assert spec.moe is not None
    return spec.moe.num_experts // ep_size


def local_name(name: str, spec: ModelSpec, *, first: int, ep_size: int) -> str | None:
    """The model's name of a canonical one; None of an expert that is another rank's."""
    head, _, expert = name.partition(".mlp.experts.")
    if expert:
        linear, _, index = expert.partition(".weight")
        local = int(index) - first
        mine = 0 <= local < local_experts(spec, ep_size)
        return f"{head}.mlp.experts.local_experts.{local}.{linear}.weight" if mine else None
    return name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.").replace(
        "mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."
    )


def main(store: str, rank: str, ep: str, *jobs: str) -> None:
    """Run the jobs, three arguments each."""
    from megatron.core import dist_checkpointing, parallel_state

    torch.set_num_threads(1)
    # Megatron calls these two whatever the device.
    torch.cuda.synchronize = lambda *args: None
    torch.cuda.current_device = lambda: torch.device("cpu")
    ep_size = int(ep)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=ep_size)
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=ep_size, expert_tensor_parallel_size=1, create_gloo_process_groups=False
    )
    for job in range(0, len(jobs), 3):
        state = check(jobs[job], jobs[job + 1], ep_size, int(rank))
        dist_checkpointing.save(state, jobs[job + 2])
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
