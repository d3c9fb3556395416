"""Checkpoints of model, optimizer, random generators and data position in Megatron's torch_dist format.

A checkpoint is a directory `checkpoint-<step>` that is complete or absent: everything is written under
another name, and the last action is the rename. It is layout-free: another TP/PP/VPP/DP loads it.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel

from engine.errors import CheckpointError
from engine.model.lora import adapter_state
from engine.runtime import mcore
from engine.training.resume import STATE_FILE, TrainerState, list_checkpoints

# Megatron's default emits flattened ranges, which its own save refuses; this form reshards to any layout.
_OPTIMIZER_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


def save_checkpoint(
    output_dir: Path,
    state: TrainerState,
    models: Sequence[DistributedDataParallel],
    optimizer: Any,
    groups: mcore.Groups,
    *,
    add_companions: Callable[[Path], Any],
    keep: int | None,
) -> Path:
    """Write `checkpoint-<step>`; call on every rank. `add_companions(directory)` adds what exports need, on
    rank 0.

    `keep` is how many checkpoints stay. Whatever goes wrong, nothing half-written is left.
    """
    final = output_dir / f"checkpoint-{state.step}"
    partial = output_dir / f".checkpoint-{state.step}.partial"
    if groups.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    if state.step == 0:
        # Before the first step the optimizer has no moments; asking it for what it would load makes them.
        _sharded_state(models, optimizer, groups, loading=True)
    try:
        dist_checkpointing.save(_sharded_state(models, optimizer, groups, loading=False), str(partial))
        if groups.rank == 0:
            add_companions(partial)
            (partial / STATE_FILE).write_text(
                json.dumps(dataclasses.asdict(state), indent=2), encoding="utf-8"
            )
    except BaseException:  # torch's CheckpointException is no Exception
        shutil.rmtree(partial, ignore_errors=True)
        raise
    dist.barrier()
    if groups.rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        for old in list_checkpoints(output_dir)[: -keep if keep else 0]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def load_checkpoint(
    checkpoint: Path, models: Sequence[DistributedDataParallel], optimizer: Any, groups: mcore.Groups
) -> TrainerState:
    """Restore model, optimizer and, under the same layout, random generators. Call on every rank."""
    state = TrainerState.read(checkpoint)
    same_layout = state.layout == layout_degrees(groups)
    wanted = _sharded_state(models, optimizer, groups, loading=True, with_rng=same_layout)
    try:
        loaded = dist_checkpointing.load(wanted, str(checkpoint))
    except (dist_checkpointing.core.CheckpointingException, OSError, EOFError) as error:
        raise CheckpointError(f"{checkpoint} cannot be loaded: {_first_line(error)}") from error
    for index, model in enumerate(models):
        # A checkpoint of LoRA training has adapters only, the base keeps its weights.
        found = model.module.load_state_dict(loaded[f"model{index}"], strict=model.module.lora is None)
        assert not found.unexpected_keys, found.unexpected_keys
    optimizer.load_state_dict(loaded["optimizer"])
    if same_layout:
        mcore.set_rng_state(loaded["rng"])
    return state


def layout_degrees(groups: mcore.Groups) -> dict[str, int]:
    """The degrees that decide whether per-rank states fit."""
    layout = groups.layout
    return {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "cp": layout.cp, "dp": layout.dp}


def _sharded_state(
    models: Sequence[DistributedDataParallel],
    optimizer: Any,
    groups: mcore.Groups,
    *,
    loading: bool,
    with_rng: bool = True,
) -> dict[str, Any]:
    chunks = {
        f"model{i}": model.module.sharded_state_dict()
        if model.module.lora is None
        else adapter_state(model.module, layers, groups)
        for i, (model, layers) in enumerate(zip(models, groups.layout.chunks_of(groups.pp_rank), strict=True))
    }
    sharded = dict(chunks)
    sharded["optimizer"] = optimizer.sharded_state_dict(
        chunks, is_loading=loading, metadata=_OPTIMIZER_FORMAT
    )
    if with_rng:
        layout = groups.layout
        sharded["rng"] = ShardedObject(
            "rng",
            mcore.rng_state(),
            (layout.pp, layout.dp, layout.cp, layout.tp),
            (groups.pp_rank, groups.dp_rank, groups.cp_rank, groups.tp_rank),
            replica_id=0,
        )
    return sharded


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
