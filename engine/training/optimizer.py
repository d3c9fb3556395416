"""Megatron's data-parallel wrapper and (distributed) optimizer around the model chunks."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

from engine.config.options import OptimizerOptions
from engine.model.gpt import BraidGPTModel
from engine.runtime import mcore
from engine.runtime.fsdp import FSDP_BUCKET, local, shard_fully
from engine.runtime.offload import offload
from engine.training.optimizer_state import model_state


def wrap_data_parallel(
    chunks: Sequence[BraidGPTModel], options: OptimizerOptions, groups: mcore.Groups
) -> list[DistributedDataParallel]:
    """Gradient buffers in fp32, reduced over the data-parallel ranks while the backward pass runs; or
    Megatron-FSDP, where gradients, or weights too, are to be sharded over several of them.
    """
    overlap = groups.layout.dp * groups.layout.cp > 1
    values: dict[str, Any] = {
        "grad_reduce_in_fp32": True,
        "use_distributed_optimizer": options.use_distributed_optimizer,
        "overlap_grad_reduce": overlap and options.overlap_grad_reduce,
        "overlap_param_gather": overlap and _overlaps_param_gather(options),
        "check_for_nan_in_grad": False,
    }
    # Of a single rank Megatron-FSDP would add up gradients twice.
    if overlap and options.fully_sharded:
        values |= {
            "use_megatron_fsdp": True,
            "data_parallel_sharding_strategy": options.data_parallel_sharding_strategy,
            # All gradients would be one bucket, and whole on every rank until the last of them is there.
            "bucket_size": FSDP_BUCKET,
            # grad_reduce_in_fp32 in the words of Megatron 0.19.
            "megatron_fsdp_main_grads_dtype": torch.float32,
            "megatron_fsdp_grad_comm_dtype": torch.float32,
            # Megatron-FSDP turns them on in its own copy; the schedules read this one.
            "overlap_grad_reduce": True,
            "overlap_param_gather": options.data_parallel_sharding_strategy == "optim_grads_params",
        }
    config = DistributedDataParallelConfig(**mcore.known_fields(DistributedDataParallelConfig, values))
    if config.use_megatron_fsdp:
        return [_shard_fully(chunk, config, groups) for chunk in chunks]
    return [
        DistributedDataParallel(
            config=chunk.config,
            ddp_config=config,
            module=chunk,
            # Later chunks of an interleaved schedule reduce in one bucket, as Megatron's own trainer has it.
            disable_bucketing=index > 0,
        )
        for index, chunk in enumerate(chunks)
    ]


def _shard_fully(chunk: BraidGPTModel, config: Any, groups: mcore.Groups) -> Any:
    """What the chunk is in a checkpoint is asked while its weights are whole."""
    (layers,) = groups.layout.chunks_of(groups.pp_rank)
    described = model_state(chunk, layers, groups)
    sharded = shard_fully(chunk, config, groups)
    sharded.described = described
    return sharded


def _overlaps_param_gather(options: OptimizerOptions) -> bool:
    # Megatron gathers ahead only where gradients are reduced ahead too.
    return options.use_distributed_optimizer and options.overlap_grad_reduce and options.overlap_param_gather


def build_optimizer(
    models: Sequence[DistributedDataParallel],
    options: OptimizerOptions,
    groups: mcore.Groups,
    dtype: torch.dtype,
) -> Any:
    """AdamW over fp32 master weights, which are on the host where that is asked for. Biases and norms
    (one-dimensional weights) take no weight decay.
    """
    values = {
        "optimizer": "adam",
        "lr": options.learning_rate or 0.0,  # set_learning_rate sets it before every step
        "min_lr": options.min_lr,
        "weight_decay": options.weight_decay,
        "adam_beta1": options.adam_beta1,
        "adam_beta2": options.adam_beta2,
        "adam_eps": options.adam_epsilon,
        # With no limit the norm is still computed and reported, and nothing is scaled.
        "clip_grad": options.max_grad_norm if options.max_grad_norm > 0 else float("inf"),
        "use_distributed_optimizer": options.use_distributed_optimizer,
        "overlap_param_gather": groups.layout.dp * groups.layout.cp > 1 and _overlaps_param_gather(options),
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "params_dtype": dtype,
        "log_num_zeros_in_grad": False,
        # float16: losses are summed over tokens, not averaged, so gradients are far from underflow;
        # Megatron's 2**32 would overflow, and leave out, the first two dozen updates.
        "initial_loss_scale": 2.0**8,
    }
    config = OptimizerConfig(**mcore.known_fields(OptimizerConfig, values))
    moments = {name: getattr(torch, getattr(options, f"{name}_dtype")) for name in ("exp_avg", "exp_avg_sq")}
    for name, moment_dtype in moments.items():
        # Megatron allows it in its own constructor only with an optimizer of Transformer Engine.
        setattr(config, f"{name}_dtype", moment_dtype)
    optimizer = get_megatron_optimizer(config, list(models), use_gloo_process_groups=False)
    if not isinstance(optimizer, ChainedOptimizer):  # under Megatron-FSDP
        optimizer = ChainedOptimizer([optimizer])
    for part in optimizer.chained_optimizers:
        if part.optimizer is not None:  # a rank without parameters to train
            for group in part.optimizer.param_groups:  # of which Megatron-FSDP lists those without rows too
                group["params"] = [param for param in group["params"] if local(param).numel()]
            part.optimizer.moment_dtypes = moments
            if options.optimizer_cpu_offload:
                offload(part, options.optimizer_offload_fraction)
    _guard_update(optimizer)
    _connect_schedules(models, optimizer)
    return optimizer


def _guard_update(optimizer: Any) -> None:
    """Leave the update out where the norm of the gradients is not a finite number, as Megatron does where
    float16 overflows. The norm is the same on every rank, so all of them do.
    """
    compute, update = optimizer.get_grad_norm, optimizer.step_with_ready_grads
    last: list[float] = [0.0]

    def get_grad_norm() -> float:
        last[0] = compute()
        return last[0]

    def step_with_ready_grads() -> bool:
        return bool(math.isfinite(last[0]) and update())

    optimizer.get_grad_norm, optimizer.step_with_ready_grads = get_grad_norm, step_with_ready_grads


def _connect_schedules(models: Sequence[DistributedDataParallel], optimizer: Any) -> None:
    """Tell Megatron's pipeline schedules how to reduce, scale and postpone gradients."""
    config = models[0].module.config
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if models[0].ddp_config.overlap_grad_reduce:
        postpone = [model.no_sync for model in models]
        config.no_sync_func = postpone if len(postpone) > 1 else postpone[0]


def set_learning_rate(optimizer: Any, learning_rate: float, weight_decay: float) -> None:
    """Set both for the coming step; Megatron keeps a multiplier of each per parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
