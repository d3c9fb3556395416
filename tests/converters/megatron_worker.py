"""A Megatron job on the CPU: load a converted checkpoint as strictly as Megatron can, compare, save it again.
Run by test_dist_ckpt.

    python -m tests.converters.megatron_worker STORE SAVE_TO [TP_SIZE HF_DIR CHECKPOINT]...

The last one is saved, which takes seconds: Megatron's writer spawns a process each time.

One process plays every tensor-parallel rank in turn: the format knows boxes of tensors, not processes.
"""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.api

from converters.hf.reader import HfReader
from converters.mapping import GatedMLP, Replicated, Sharded, Weight, weight_map
from converters.mcore.frame import extra_state_keys
from converters.mcore.places import place_of
from engine.model.spec import load_model_spec


def sharded(weight: Weight, part: torch.Tensor, layers: int, rank: int, world: int) -> dict[str, Any]:
    """What Megatron's modules say of their parameters, by hand: the layers stacked, gate and up apart."""
    # Imported here: Megatron's writer spawns a process that imports this module, too.
    from megatron.core.dist_checkpointing import ShardedTensor

    place = place_of(weight.name)
    stacking = [] if place.layer is None else [(0, place.layer, layers)]
    lead = len(stacking)

    def make(tensor: torch.Tensor, *split: tuple[int, int, int]) -> Any:
        return ShardedTensor.from_rank_offsets(
            place.key, tensor.clone(), *stacking, *split, prepend_axis_num=lead
        )

    if isinstance(weight, GatedMLP):
        gate, up = part.chunk(2)
        return {
            weight.name + ".gate": make(gate, (lead, rank, 2 * world)),
            weight.name + ".up": make(up, (lead, world + rank, 2 * world)),
        }
    if isinstance(weight, Replicated):
        return {weight.name: make(part)}
    axis = weight.axis if isinstance(weight, Sharded) else 0
    return {weight.name: make(part, (lead + axis, rank, world))}


def state(hf_dir: str, tp_size: int) -> dict[str, Any]:
    """The sharded tensors of every tensor-parallel rank, filled from the Hugging Face directory."""
    spec, reader = load_model_spec(hf_dir), HfReader(hf_dir)
    result: dict[str, Any] = {}
    for weight in weight_map(spec).values():
        for rank in range(1 if isinstance(weight, Replicated) else tp_size):
            part = weight.to_megatron(reader.read_slice, rank, tp_size)
            items = sharded(weight, part, spec.num_layers, rank, tp_size)
            result |= {f"{name} of rank {rank}": item for name, item in items.items()}
    return result


def extra_states(hf_dir: str) -> dict[str, Any]:
    """What modules of Transformer Engine ask for besides: one object a module and layer."""
    from megatron.core.dist_checkpointing import ShardedObject

    result: dict[str, Any] = {}
    for unique in extra_state_keys(load_model_spec(hf_dir)):
        key, _, shard = unique.partition("/shard_")
        index, count = map(int, shard.split("_"))
        item = ShardedObject(key=key, data="unset", global_shape=(count,), global_offset=(index,))
        assert item.unique_key == unique
        result[unique] = item
    assert {(item.key, item.global_shape, item.global_offset) for item in result.values()} >= {
        ("decoder.layers.self_attention.linear_qkv._extra_state", (3,), (2,)),
        ("decoder.final_layernorm._extra_state", (1,), (0,)),
    }
    return result


def load(tp_size: int, hf_dir: str, checkpoint: str) -> dict[str, Any]:
    """Load, once with Megatron's default strictness and once in which the keys have to be the same on both
    sides, and compare; the sharded tensors.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    wanted = state(hf_dir, tp_size)
    for options in ({}, {"strict": StrictHandling.RAISE_ALL}):
        request, states = state(hf_dir, tp_size), extra_states(hf_dir)
        for item in request.values():
            item.data.zero_()
        loaded = dist_checkpointing.load({"model": request | states}, checkpoint, **options)
        for name, item in wanted.items():
            assert torch.equal(loaded["model"][name], item.data), name
        assert {name: loaded["model"][name] for name in states} == dict.fromkeys(states)
        assert loaded["iteration"] == 0
        assert loaded["checkpoint_version"] == 3.0
    assert dist_checkpointing.check_is_distributed_checkpoint(checkpoint)
    assert dist_checkpointing.load_content_metadata(checkpoint) == {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }
    return wanted


def refuse(hf_dir: str, checkpoint: str) -> None:
    """What `load` relies on: a key that is missing, or not asked for, does not go unnoticed."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedObject
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.validation import StrictHandling

    tensors, states = state(hf_dir, 1), extra_states(hf_dir)
    surplus = ShardedObject(
        key="decoder.layers.mlp.router._extra_state", data=None, global_shape=(3,), global_offset=(0,)
    )

    def without(items: Mapping[str, Any], name: str) -> dict[str, Any]:
        return {key: item for key, item in items.items() if key != name}

    attempts: Iterable[tuple[dict[str, Any], dict[str, Any]]] = (
        ({}, tensors | states | {"surplus": surplus}),
        ({"strict": StrictHandling.RAISE_ALL}, tensors | without(states, next(iter(states)))),
        ({"strict": StrictHandling.RAISE_ALL}, without(tensors, next(iter(tensors))) | states),
    )
    for options, request in attempts:
        try:
            dist_checkpointing.load({"model": request}, checkpoint, **options)
        except (CheckpointingException, dist.checkpoint.api.CheckpointException):
            continue
        raise AssertionError(f"{options} loads another set of keys")


def save(model: dict[str, Any], save_to: str) -> None:
    """Save beside a piece of optimizer state."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    optimizer = ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.x", torch.ones(2))
    Path(save_to).mkdir()
    dist_checkpointing.save({"model": model, "optimizer": {"x": optimizer}, "step": 3}, save_to)


def main(store: str, save_to: str, *jobs: str) -> None:
    """Run the jobs, three arguments each."""
    torch.set_num_threads(1)
    # Megatron's writer calls these two whatever the device.
    torch.cuda.synchronize = lambda *args: None
    torch.cuda.current_device = lambda: torch.device("cpu")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    for job in range(0, len(jobs), 3):
        tp_size, *paths = jobs[job : job + 3]
        model = load(int(tp_size), *paths)
    refuse(*paths)
    save(model, save_to)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
