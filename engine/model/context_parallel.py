"""Context parallelism: every rank has a part of every document.

A document is cut into 2 * size equal chunks, of which rank r has the chunks r and 2 * size - 1 - r: an early
one, which sees few keys, and a late one, which sees many, so that all ranks have the same work in every
document ("zigzag"; the same cut as Transformer Engine's). Documents are padded to a multiple of 2 * size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor

from engine.model.attention import own_chunks
from engine.runtime.kernels import to_device


def shard_positions(lengths: Sequence[int], rank: int, size: int) -> Tensor:
    """Positions, int64 [T / size], of the tokens of a rank in a sequence of documents of `lengths` tokens."""
    return torch.cat(
        [
            torch.arange(start + index * chunk, start + (index + 1) * chunk)
            for start, index, chunk in own_chunks(lengths, rank, size)
        ]
    )


@dataclass(frozen=True, kw_only=True)
class ContextParallel:
    """The ranks that share the tokens of a micro-batch, and where each of its tokens is."""

    group: dist.ProcessGroup
    rank: int
    size: int
    by_heads: bool
    """Exchange tokens for heads around the attention (all-to-all, Ulysses) instead of gathering keys and
    values.
    """

    order: Tensor
    """int64 [T]: positions of the tokens of rank 0, then of rank 1, and so on."""

    place: Tensor
    """int64 [T]: the inverse of `order`."""

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        *,
        group: dist.ProcessGroup,
        rank: int,
        size: int,
        by_heads: bool,
        device: torch.device,
    ) -> "ContextParallel":
        """For documents of `lengths` tokens, padding included."""
        order = torch.cat([shard_positions(lengths, other, size) for other in range(size)])
        return cls(
            group=group,
            rank=rank,
            size=size,
            by_heads=by_heads,
            order=to_device(order, device),
            place=to_device(torch.argsort(order), device),
        )

    def gather_tokens(self, x: Tensor) -> Tensor:
        """[T / size, ...] of this rank -> [T, ...] of all ranks, in the order of the sequence. Gradients are
        summed over the ranks.
        """
        gathered = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=self.group)
        return self._in_sequence(gathered)

    def tokens_to_heads(self, *parts: Tensor) -> list[Tensor]:
        """[T / size, N, D] of each -> [T, N / size, D]: all tokens of this rank's heads, in the order of the
        sequence. One exchange for all parts, whose numbers of heads may differ.

        Fewer heads than ranks are repeated, as grouped-query attention repeats them.
        """
        by_rank = []
        for part in parts:
            heads = part.shape[1]
            whole = part if heads >= self.size else part.repeat_interleave(self.size // heads, dim=1)
            by_rank.append(whole.unflatten(1, (self.size, -1)).transpose(0, 1))
        exchanged: Tensor = all_to_all(self.group, torch.cat(by_rank, dim=2))
        counts = [part.shape[2] for part in by_rank]
        return list(self._in_sequence(exchanged.flatten(0, 1)).split(counts, dim=1))

    def heads_to_tokens(self, x: Tensor) -> Tensor:
        """[T, N / size, D] -> [T / size, N, D]: the inverse."""
        by_rank = _Permuted.apply(x, self.order, self.place).unflatten(0, (self.size, -1))
        exchanged: Tensor = all_to_all(self.group, by_rank)
        return exchanged.transpose(0, 1).flatten(1, 2)

    def _in_sequence(self, by_rank: Tensor) -> Tensor:
        """Tokens [T, ...] of one rank after another, in the order of the sequence."""
        ordered: Tensor = _Permuted.apply(by_rank, self.place, self.order)
        return ordered


class _Permuted(torch.autograd.Function):
    """Rows in another order. Gradients are put back by the inverse, where those of index_select would be
    added up by atomics.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad_outputs[0].index_select(0, inverse), None, None
