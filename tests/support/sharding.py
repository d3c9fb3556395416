"""Jobs for the worker pool: train with what data-parallel ranks shard, and hand back the weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.config.options import OptimizerOptions, ParallelOptions
from engine.data.template import EncodedRow
from tests.support.training import open_run, release, share_rows


@dataclass(frozen=True, kw_only=True)
class ShardedResult:
    """What a rank saw, and its rows of the parameters by name in the model."""

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, Tensor]


def train_sharded(
    rank: int,
    world_size: int,
    *,
    model_dir: str,
    parallel: ParallelOptions,
    optimizer: OptimizerOptions,
    steps: Sequence[Sequence[EncodedRow]],
    learning_rate: float,
    **changes: Any,
) -> ShardedResult:
    """Train under a layout, one row a micro-batch; `changes` are further arguments of `open_run`."""
    from engine.training.optimizer import set_learning_rate
    from engine.training.step import global_totals, train_step

    spec, platform, groups, models, optim = open_run(
        rank, world_size, model_dir, parallel, optimizer, **changes
    )
    losses, norms = [], []
    for rows in steps:
        set_learning_rate(optim, learning_rate, optimizer.weight_decay)
        result = train_step(models, optim, share_rows(rows, groups=groups, size=1), groups, platform.device)
        done = (result.losses, result.micro_batches)
        losses.append(global_totals(*done, spec.train_flops_per_token, groups, platform.device).loss)
        norms.append(result.grad_norm)
    weights = _weights(models[0])
    release(models)
    return ShardedResult(losses=losses, grad_norms=norms, weights=weights)


def _weights(model: Any) -> dict[str, Tensor]:
    """The rank's rows of every weight, all of them where weights are not sharded."""
    inner = model.module
    if not model.ddp_config.use_megatron_fsdp:
        if model.ddp_config.overlap_param_gather:
            model.start_param_sync(force_sync=True)
        return {name: weight.detach().clone() for name, weight in inner.named_parameters()}
    inner._replace_param_with_distributed_if_needed()
    return {name: weight._local_tensor.detach().clone() for name, weight in inner.module.named_parameters()}


def whole(results: Sequence[ShardedResult]) -> dict[str, Tensor]:
    """The weights of ranks that each have their rows."""
    return {name: torch.cat([result.weights[name] for result in results]) for name in results[0].weights}
