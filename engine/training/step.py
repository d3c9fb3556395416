"""One optimizer step and one evaluation pass through Megatron's pipeline schedules."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from engine.data.batches import MicroBatch
from engine.model.attention import Segments
from engine.model.context_parallel import ContextParallel, shard_positions
from engine.model.head import Targets
from engine.model.layers import DocumentParams, Routing
from engine.runtime.kernels import to_device
from engine.runtime.mcore import Groups


@dataclass(frozen=True, kw_only=True)
class DeviceBatch:
    """A micro-batch on the device. tokens, position_ids int64 [1, T]; labels are in `documents`."""

    tokens: Tensor
    position_ids: Tensor
    num_supervised: Tensor
    """int32 scalar."""

    documents: DocumentParams

    @classmethod
    def place(
        cls, batch: MicroBatch, groups: Groups, device: torch.device, *, experts: bool = False
    ) -> "DeviceBatch":
        """Copy this rank's part of a micro-batch to `device` without waiting for it, or for what the device
        has to do: under context parallelism its chunks of every document, otherwise all tokens. `experts`:
        for a model that has some.
        """
        layout = groups.layout
        lengths = batch.cu_seqlens.diff().tolist()
        own = None
        if layout.cp > 1:
            own = shard_positions(lengths, groups.cp_rank, layout.cp)

        def move(tensor: Tensor) -> Tensor:
            return to_device(tensor if own is None else tensor[own], device)[None]

        documents = _document_params(batch, lengths, groups, device)
        if experts:
            documents.routing = Routing(
                real=move(batch.real_tokens())[0],
                tokens=batch.num_tokens,
                supervised=batch.num_supervised,
            )
        mask, labels = batch.loss_mask, batch.labels
        if own is not None:
            mask, labels = mask[own], labels[own]
        # Found here: to ask the device which tokens are supervised would mean to wait for it. numpy does it
        # at once; torch's threads, which share cores with those of other ranks, take milliseconds to begin.
        index = np.flatnonzero(mask.numpy())
        documents.targets = Targets(
            index=to_device(torch.from_numpy(index), device),
            labels=to_device(torch.from_numpy(labels.numpy()[index]), device),
        )
        return cls(
            tokens=move(batch.tokens),
            position_ids=move(batch.position_ids),
            num_supervised=to_device(torch.tensor(len(index), dtype=torch.int32), device),
            documents=documents,
        )


def _document_params(
    batch: MicroBatch, lengths: Sequence[int], groups: Groups, device: torch.device
) -> DocumentParams:
    """What every attention layer must know of the documents; `lengths` include padding."""
    layout, cp = groups.layout, None
    if layout.cp > 1:
        cp = ContextParallel.of(
            lengths,
            group=groups.cp,
            rank=groups.cp_rank,
            size=layout.cp,
            by_heads=layout.cp_comm_type == "a2a",
            device=device,
        )
    chunked = cp is not None and not cp.by_heads
    cu_seqlens = to_device(batch.cu_seqlens, device)
    return DocumentParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        # Transformer Engine wants to know where documents lie; their padding is as good as a token to it.
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
        segments=Segments.chunks(lengths, groups.cp_rank, layout.cp, device)
        if chunked
        else Segments.documents(lengths, device),
        context_parallel=cp,
    )


def forward_step(iterator: Iterator[DeviceBatch], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """What Megatron's schedules call for each micro-batch and chunk: the output, and how it becomes a
    loss.
    """
    batch = next(iterator)
    output = model(batch.tokens, document_params=batch.documents, position_ids=batch.position_ids)
    return output, partial(sum_loss, batch)


def sum_loss(batch: DeviceBatch, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of token losses, a scalar, the number of supervised tokens, and for the log the detached sum,
    float32 [1]; [3] with those of a router's losses, which count by supervised tokens too.

    The sum is divided once, by the supervised tokens of the whole global batch (finalize_model_grads).
    """
    sums, routing = total.detach()[None], batch.documents.routing
    if routing is not None and routing.losses is not None:
        sums = torch.cat((sums, routing.losses * batch.num_supervised))
    return total, batch.num_supervised.clone(), sums


@dataclass(frozen=True, kw_only=True)
class StepTotals:
    """Sums over the global batch, the same on every rank."""

    loss: float
    """Mean over supervised tokens, in nats; not a number where there are none."""

    supervised: int
    tokens: int
    flops: float
    """Model FLOPs, forward and backward; see ModelSpec.train_flops_per_token."""

    stop: bool
    """Some rank was asked to stop."""

    aux_loss: float
    """Load-balancing loss of the routers, without its coefficient: mean over micro-batches by their
    supervised tokens; 0 for a dense model.
    """

    z_loss: float
    """The same of the z-loss."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step leaves; losses stay on the device (see global_totals)."""

    losses: list[Tensor]
    micro_batches: Sequence[MicroBatch]
    grad_norm: float | None
    updated: bool
    """False where the update was left out: gradients are not finite, or overflowed float16."""


def run_pipeline(
    models: Sequence[DistributedDataParallel],
    batches: Sequence[MicroBatch],
    groups: Groups,
    *,
    device: torch.device,
    forward_only: bool,
) -> list[Tensor]:
    """Run all micro-batches through the schedule of the layout; loss sums on the last stage (see sum_loss),
    an empty list elsewhere.
    """
    experts = models[0].module.spec.moe is not None
    # Each when the first chunk asks for it, while the device works on those before.
    placed = (DeviceBatch.place(batch, groups, device, experts=experts) for batch in batches)
    iterators = itertools.tee(placed, len(models))
    single = len(models) == 1
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators[0] if single else list(iterators),
        model=list(models),
        num_microbatches=len(batches),
        # With variable_seq_lengths the stages exchange the real shapes; this only has to be consistent.
        seq_length=max(batch.tokens.numel() for batch in batches),
        micro_batch_size=1,
        forward_only=forward_only,
    )


def train_step(
    models: Sequence[DistributedDataParallel],
    optimizer: Any,
    batches: Sequence[MicroBatch],
    groups: Groups,
    device: torch.device,
) -> StepResult:
    """Forward, backward, gradient reduction, clipping and update for this rank's share of one global
    batch.
    """
    for model in models:
        model.zero_grad_buffer()
    optimizer.zero_grad()
    losses = run_pipeline(models, batches, groups, device=device, forward_only=False)
    updated, grad_norm, _ = optimizer.step()
    return StepResult(
        losses=losses,
        micro_batches=batches,
        grad_norm=None if grad_norm is None else float(grad_norm),
        updated=bool(updated),
    )


def global_totals(
    losses: Sequence[Tensor],
    batches: Iterable[MicroBatch],
    flops_per_token: Callable[[int], float],
    groups: Groups,
    device: torch.device,
    *,
    stop: bool = False,
) -> StepTotals:
    """Add up loss and token counts over all ranks: one small all-reduce. Call on every rank.

    `flops_per_token(n)` are the FLOPs of a token in a document of n tokens; `stop` is whether this rank was
    asked to stop, which all ranks learn in the same step.
    """
    sums = torch.zeros(7, dtype=torch.float64, device=device)
    sums[4] = stop
    if groups.reports_loss:
        if losses:
            found = torch.stack(list(losses)).double().sum(0)
            sums[0] = found[0]
            sums[5 : 4 + len(found)] = found[1:]
        # Context-parallel ranks have losses of their own, of the same batches.
        for batch in batches if groups.cp_rank == 0 else ():
            sums[1] += batch.num_supervised
            sums[2] += batch.num_tokens
            sums[3] += sum(n * flops_per_token(n) for n in batch.lengths)
    dist.all_reduce(sums)
    loss, supervised, tokens, flops, stops, aux_loss, z_loss = sums.tolist()
    return StepTotals(
        loss=loss / supervised if supervised else float("nan"),
        supervised=int(supervised),
        tokens=int(tokens),
        flops=flops,
        stop=stops > 0,
        aux_loss=aux_loss / supervised if supervised else float("nan"),
        z_loss=z_loss / supervised if supervised else float("nan"),
    )


@torch.no_grad()
def evaluate(
    models: Sequence[DistributedDataParallel],
    steps: Iterable[Sequence[MicroBatch]],
    flops_per_token: Callable[[int], float],
    groups: Groups,
    device: torch.device,
) -> StepTotals:
    """Mean loss over all supervised tokens of the evaluation rows, under the layout of the run."""
    for model in models:
        model.eval()
    losses: list[Tensor] = []
    seen: list[MicroBatch] = []
    for batches in steps:
        losses += run_pipeline(models, batches, groups, device=device, forward_only=True)
        seen += batches
    for model in models:
        model.train()
    return global_totals(losses, seen, flops_per_token, groups, device)
