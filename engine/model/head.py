"""The two ends of a model: the embedding, and the LM head with its loss, without the logits of all tokens.

Shape suffixes: T tokens of a micro-batch, S supervised ones of them, R rows of a block, H hidden size, V rows
of this tensor-parallel rank's part of the vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from engine.model.fused import logit_statistics, logits_to_gradients
from engine.model.gradients import added, gradient_buffer
from engine.model.memory import LOGITS_BLOCK
from engine.runtime.kernels import add_product

# Logits that exist at once. On a GPU few large products are fast; on a CPU whole passes stay near the cache.
_BLOCK_BYTES = {"cuda": LOGITS_BLOCK, "cpu": 2**26}


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The supervised tokens of this context-parallel rank, on the device."""

    index: Tensor
    """int64 [S]: which of the T tokens."""
    labels: Tensor
    """int64 [S]: what follows each."""


class LossHead(ColumnParallelLinear):
    """Megatron's output layer, which can go on to the loss. Tokens without a target take no part in it."""

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        targets: Targets | None = None,
        columns: int = 0,
    ) -> Any:
        """Hidden states [T, 1, H] ([T / tp, 1, H] under sequence parallelism), and `weight` where it is the
        embedding's -> what Megatron's layer returns; given `targets`, the sum of their losses, a float32
        scalar. `columns` of this rank are no padding of the vocabulary.
        """
        if targets is None:
            return super().forward(input_, weight, runtime_gather_output)
        hidden, group = input_, self.tp_group
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=group)
        if weight is None:
            weight = self.weight
        if not torch.is_grad_enabled():
            # Evaluation: the function would compute gradients, which are there before any backward pass.
            hidden, weight = hidden.detach(), weight.detach()
        scale = self.config.grad_scale_func
        return LinearCrossEntropy.apply(
            _Selected.apply(hidden[:, 0], targets.index),
            weight,
            targets.labels,
            columns,
            group if group.size() > 1 else None,
            None if scale is None else scale(torch.ones((), device=hidden.device)),
        )


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of x @ weight.T, with logits of a block of rows at a time.

    The gradient of a block needs its logits, so it is computed while they are there, in the forward pass. A
    weight that has Megatron's gradient buffer, main_grad, gets its gradient there at once, block by block:
    no matrix of the vocabulary is kept until backward. The sum must then be the loss, so that the gradient
    that comes back is `scale`; backward checks it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_SH: Tensor,
        weight_VH: Tensor,
        labels_S: Tensor,
        columns: int,
        group: dist.ProcessGroup | None,
        scale: Tensor | None,
    ) -> Tensor:
        """Hidden states and weight of one dtype, labels int64 of the whole vocabulary -> float32 scalar, the
        same on all ranks of `group`. The first `columns` rows of the weight are real. Gradients are computed
        `scale` times as large (float16).
        """
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        weight, grad_weight = weight_VH[:columns], None
        buffer = gradient_buffer(weight_VH) if wants_weight else None
        if wants_weight and buffer is None:
            grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32)
        sink = grad_weight if buffer is None else buffer
        first = 0 if group is None else group.rank() * len(weight_VH)
        places_S = labels_S - first
        total = torch.zeros((), dtype=torch.float32, device=x_SH.device)
        grad_x = torch.empty_like(x_SH) if wants_x else None
        factor = torch.ones_like(total) if scale is None else scale.float()
        # All ranks of the group take the same blocks, also where some have padding.
        for rows in _blocks(len(x_SH), len(weight_VH) * x_SH.element_size(), x_SH.device):
            x, places = x_SH[rows], places_S[rows]
            logits = x @ weight.T
            losses, normalizer = _losses(logits, places, group)
            total += losses.sum()
            if columns and (wants_x or wants_weight):
                logits_to_gradients(logits, places, normalizer, factor)
            if grad_x is not None:
                torch.mm(logits, weight, out=grad_x[rows])
            if sink is not None:
                add_product(sink[:columns], logits.T, x)
            del logits  # before those of the next block are made
        ctx.save_for_backward(grad_x, grad_weight, factor)
        ctx.weight = None if buffer is None else weight_VH
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the sum is a scalar."""
        grad_x, grad_weight, factor = ctx.saved_tensors
        share = grad_outputs[0] / factor
        if grad_x is not None:
            grad_x = grad_x * share.to(grad_x.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight * share
        if ctx.weight is not None:
            torch._assert_async(share == 1, "the sum of losses is not the loss: its gradient is wrong")
            done = added(ctx.weight)
            # Of a shared weight the embedding's gradient comes later, and is what Megatron waits for.
            grad_weight = None if getattr(ctx.weight, "shared_with_embedding", False) else done
        return grad_x, grad_weight, None, None, None, None


class _Selected(torch.autograd.Function):
    """Rows of a matrix, each at most once: their gradients need not be added up, which takes atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (index,), (grad,) = ctx.saved_tensors, grad_outputs
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, index, grad), None


def _blocks(rows: int, row_bytes: int, device: torch.device) -> list[slice]:
    """Blocks of about as many rows each."""
    count = -(-rows * row_bytes // _BLOCK_BYTES[device.type])
    size = -(-rows // max(count, 1))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, max(size, 1))]


def _losses(logits_RV: Tensor, places: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every row, and the logarithm of the sum of its exponentials over the whole vocabulary;
    float32 [R].
    """
    if not logits_RV.shape[1]:  # a rank whose part is nothing but padding
        maxima = places.new_full(places.shape, float("-inf"), dtype=torch.float32)
        sums, picked = torch.zeros_like(maxima), torch.zeros_like(maxima)
    else:
        maxima, sums, picked = logit_statistics(logits_RV, places)
    if group is not None:
        highest = maxima.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        both = torch.stack((sums * (maxima - highest).exp(), picked))
        dist.all_reduce(both, group=group)
        maxima, (sums, picked) = highest, both.unbind()
    normalizer = maxima + sums.log()
    return normalizer - picked, normalizer


class Embedding(VocabParallelEmbedding):
    """Megatron's embedding; the gradients of a micro-batch's rows are added to the buffer without a matrix of
    the whole vocabulary between.
    """

    def forward(self, input_: Tensor) -> Tensor:
        """Tokens int64 [1, T] -> [1, T, H], or under sequence parallelism [T / tp, 1, H]."""
        places = input_ - self.vocab_start_index
        found = _Rows.apply(self.weight, places.clamp(0, len(self.weight) - 1))
        if self.tp_group.size() > 1:
            elsewhere = (places < 0) | (places >= len(self.weight))
            found = found.masked_fill(elsewhere[..., None], 0.0)
        if self.reduce_scatter_embeddings:
            rows = found.transpose(0, 1).contiguous()
            return reduce_scatter_to_sequence_parallel_region(rows, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(found, group=self.tp_group)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.weight = weight
        return F.embedding(index, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (index,), weight = ctx.saved_tensors, ctx.weight
        index, grad = index.flatten(), grad_outputs[0].flatten(0, -2)
        buffer = gradient_buffer(weight)
        if buffer is None:
            return torch.zeros_like(weight).index_add_(0, index, grad), None
        buffer.index_add_(0, index, grad.to(buffer.dtype))
        return added(weight), None
