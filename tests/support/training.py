"""Jobs for the worker pool: train a few steps under a layout and hand back losses, gradients and weights."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.config.options import MoeOptions, OptimizerOptions, ParallelOptions, RecomputeOptions
from engine.config.parallel import ParallelLayout
from engine.data.template import EncodedRow
from engine.model.lora_spec import CHECKPOINT_PREFIX
from launch.processes import World
from launch.validate import resume, runs
from launch.validate.runs import random_rows, release, release_all


@dataclass(frozen=True, kw_only=True)
class LayoutResult:
    """What a rank saw. Gradients and weights are this rank's shards, by canonical name."""

    losses: list[float]
    grad_norms: list[float]
    eval_loss: float
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    """The last stage's copy of tied embeddings, where it holds one."""

    aux_losses: list[float] = field(default_factory=list)
    replica: int = 0
    """Index among the ranks with the same weights (dp x cp)."""
    tp_rank: int = 0
    expert_replica: int = 0
    """The same for the weights of experts."""
    etp_rank: int = 0
    ep_rank: int = 0


def open_run(
    rank: int,
    world_size: int,
    model_dir: str,
    parallel: ParallelOptions,
    optimizer: OptimizerOptions,
    recompute: RecomputeOptions | None = None,
    *,
    dtype: str = "float32",
    transformer_impl: str = "torch",
    adapter: str | None = None,
    moe: MoeOptions | None = None,
    fp8_recipe: str | None = None,
) -> tuple[Any, Any, Any, list[Any], Any]:
    """Spec, platform, groups, wrapped models with the checkpoint's weights, and optimizer. With `adapter`, a
    PEFT directory, that is what is trained.
    """
    from engine.runtime.platform import open_platform

    platform = open_platform(
        device=os.environ.get("BRAID_TEST_DEVICE", "cpu"),
        dtype=dtype,
        transformer_impl=transformer_impl,
        local_rank=rank,
        fp8_recipe=fp8_recipe,
    )
    run = runs.open_run(
        platform, world_size, model_dir, parallel, optimizer, recompute, adapter=adapter, moe=moe
    )
    return run.spec, platform, run.groups, run.models, run.optimizer


def save_after_idle_step(
    rank: int,
    world_size: int,
    *,
    model_dir: str,
    parallel: ParallelOptions,
    output_dir: str,
    resume: str | None = None,
    **changes: Any,
) -> None:
    """Load a model, or resume from a checkpoint of it, under a layout, take a step with learning rate 0, and
    save; `changes` are further arguments of `open_run`.
    """
    from converters.mcore.companions import write_companions
    from engine.training.checkpoint import CheckpointSaver, layout_degrees, load_checkpoint
    from engine.training.optimizer import set_learning_rate
    from engine.training.resume import TrainerState
    from engine.training.step import train_step

    spec, platform, groups, models, optim = open_run(
        rank, world_size, model_dir, parallel, OptimizerOptions(), **changes
    )
    if resume is not None:
        load_checkpoint(Path(resume), TrainerState.read(Path(resume)), models, optim, groups)
    rows = random_rows(2, vocabulary=spec.vocab_size, longest=16, seed=0)
    set_learning_rate(optim, 0.0, 0.0)
    batches = [runs.collate_rows([row], groups.layout) for row in rows]
    train_step(models, optim, batches, groups, platform.device)
    state = TrainerState(
        step=0,
        total_steps=1,
        global_batch_size=1,
        num_rows=1,
        data_fingerprint="",
        seed=1,
        tokens=0,
        layout=layout_degrees(models, groups),
    )
    saver = CheckpointSaver(
        Path(output_dir),
        groups,
        add_companions=lambda directory: write_companions(model_dir, directory),
        keep=None,
        background=False,
    )
    saver.save(state, models, optim)
    saver.close()
    release(models)


def share_rows(rows: Sequence[EncodedRow], *, groups: Any, size: int) -> list[Any]:
    """A data-parallel rank's micro-batches of `size` rows."""
    mine = rows[groups.dp_rank :: groups.layout.dp]
    return [runs.collate_rows(mine[i : i + size], groups.layout) for i in range(0, len(mine), size)]


def train_layout(
    rank: int,
    world_size: int,
    *,
    model_dir: str,
    parallel: ParallelOptions,
    optimizer: OptimizerOptions,
    steps: Sequence[Sequence[EncodedRow]],
    learning_rates: Sequence[float],
    micro_batch_size: int = 1,
    **changes: Any,
) -> LayoutResult:
    """Train the given global batches under a layout, starting from a Hugging Face checkpoint; `changes` are
    further arguments of `open_run`.
    """
    from engine.training.optimizer import set_learning_rate
    from engine.training.step import evaluate, global_totals, run_pipeline, train_step

    spec, platform, groups, models, optim = open_run(
        rank, world_size, model_dir, parallel, optimizer, **changes
    )
    layout = groups.layout

    share = partial(share_rows, groups=groups, size=micro_batch_size)
    eval_loss = evaluate(models, [share(steps[0])], spec.train_flops_per_token, groups, platform.device).loss
    run_pipeline(models, share(steps[0]), groups, device=platform.device, forward_only=False)
    gradients, copies = local_tensors(models, layout, groups, gradients=True)
    losses, norms, aux_losses = [], [], []
    for rows, learning_rate in zip(steps, learning_rates, strict=True):
        set_learning_rate(optim, learning_rate, optimizer.weight_decay)
        result = train_step(models, optim, share(rows), groups, platform.device)
        done = (result.losses, result.micro_batches)
        totals = global_totals(*done, spec.train_flops_per_token, groups, platform.device)
        losses.append(totals.loss)
        aux_losses.append(totals.aux_loss)
        norms.append(result.grad_norm)
    for model in models:
        if model.ddp_config.overlap_param_gather:
            model.start_param_sync(force_sync=True)
    weights, weight_copies = local_tensors(models, layout, groups, gradients=False)
    release(models)
    return LayoutResult(
        losses=losses,
        grad_norms=norms,
        eval_loss=eval_loss,
        gradients=gradients,
        weights=weights,
        copies=_named("gradient", copies) | _named("weight", weight_copies),
        aux_losses=aux_losses,
        replica=groups.dp_cp_rank,
        tp_rank=groups.tp_rank,
        expert_replica=groups.expert_dp.rank(),
        etp_rank=groups.etp_rank,
        ep_rank=groups.ep_rank,
    )


def loss_curve(
    rank: int,
    world_size: int,
    *,
    model_dir: str,
    optimizer: OptimizerOptions,
    steps: Sequence[Sequence[EncodedRow]],
    learning_rates: Sequence[float],
    micro_batch_size: int,
    **changes: Any,
) -> list[float]:
    """The losses of training, without what large models would take long to hand back."""
    spec, platform, groups, models, optim = open_run(
        rank, world_size, model_dir, ParallelOptions(), optimizer, **changes
    )
    run = runs.OpenRun(spec=spec, platform=platform, groups=groups, models=models, optimizer=optim)
    batches = [share_rows(rows, groups=groups, size=micro_batch_size) for rows in steps]
    losses = runs.train(run, optimizer, batches, learning_rates).losses
    release(models)
    return losses


def _named(kind: str, tensors: dict[str, Any]) -> dict[str, Any]:
    return {f"{kind} {name}": tensor for name, tensor in tensors.items()}


def local_tensors(
    models: Sequence[Any], layout: ParallelLayout, groups: Any, *, gradients: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """This rank's weights or gradients by canonical name, or those of its adapters; the tied copy apart."""
    from engine.model.lora import named_adapters
    from engine.model.provider import NamedWeight, named_weights

    if gradients:
        for model in models:
            _complete_gradients(model, groups)
    tensors: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    chunks = [model.module for model in models]
    named: list[Any] = [
        adapter
        for chunk, layers in zip(chunks, layout.chunks_of(groups.pp_rank), strict=True)
        for adapter in named_adapters(chunk, layers, groups)
    ]
    for weight in named or named_weights(chunks, layout, groups.pp_rank):
        value = weight.parameter.main_grad if gradients else weight.parameter.detach()
        value = weight.part(value) if isinstance(weight, NamedWeight) else value
        target = copies if weight.name in tensors or getattr(weight, "is_copy", False) else tensors
        target[weight.name] = value.float().cpu().clone()
    return tensors, copies


def _complete_gradients(model: Any, groups: Any) -> None:
    """The distributed optimizer leaves each rank only its shard of the reduced gradients: gather the
    others'.
    """
    if not model.ddp_config.use_distributed_optimizer:
        return
    for group, buffers in ((groups.dp_cp, model.buffers), (groups.expert_dp, model.expert_parallel_buffers)):
        for bucket in (bucket for buffer in buffers for bucket in buffer.buckets):
            if group.size() > 1:
                data = bucket.grad_data
                shard = data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(data, shard, group=group)


def merge(results: Sequence[LayoutResult], weight_map: dict[str, Any], kind: str) -> dict[str, Tensor]:
    """Hugging Face tensors from the shards of all ranks of replica 0."""
    shards: dict[str, dict[int, Tensor]] = {}
    for result in results:
        for name, tensor in getattr(result, kind).items():
            replica, rank = result.replica, result.tp_rank
            if ".mlp.experts." in name:
                # Every expert's weight has a name of its own, the adapters of all experts have one.
                of_all = name.startswith(CHECKPOINT_PREFIX)
                replica, rank = result.expert_replica, result.ep_rank if of_all else result.etp_rank
            if replica == 0:
                assert rank not in shards.setdefault(name, {}), f"{name} is held twice"
                shards[name][rank] = tensor
    assert shards.keys() == weight_map.keys()
    merged: dict[str, Tensor] = {}
    for name, by_rank in shards.items():
        weight, parts = weight_map[name], [by_rank[tp] for tp in sorted(by_rank)]
        if parts[0].shape == weight.shape:  # whole on every rank, and the same
            assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs between ranks"
            merged |= weight.to_hf(parts[0])
        else:
            merged |= weight.to_hf(weight.merge(parts))
    return merged


def run_sft(rank: int, world_size: int, *, argv: Sequence[str]) -> None:
    """`braid sft` on an open group."""
    world = World(rank=rank, size=world_size, local_rank=rank, local_size=world_size, started=True)
    resume.run_sft(world, argv)
    release_all()
