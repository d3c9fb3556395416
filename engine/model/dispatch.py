"""How tokens come to the experts that the router chose for them, and their results back.

Megatron's dispatchers do it; here is the order that they put tokens in, and the dispatchers of ranks that
have all experts and of ranks with different numbers of tokens. Megatron's own functions for the order add
results up by atomics, in the dtype of the run and in any order.

Shape suffixes: T tokens, E experts, H hidden size, N rows: a token has one for every expert it goes to.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher, MoETokenDispatcher
from torch import Tensor

from engine.model.fused import reordered, sum_rows
from engine.runtime.kernels import to_device


@dataclass(frozen=True, kw_only=True)
class ByExpert:
    """Rows sorted by expert, and those of an expert by token."""

    tokens: Tensor
    """int64 [N]: the token of a row."""
    rows: Tensor
    """int64 [N]: the rows of the first token, then those of the second, and so on."""
    bounds: Tensor
    """int64 [T + 1]: token t has rows[bounds[t] : bounds[t + 1]]."""
    places: Tensor
    """int64 [N]: of the chosen ones in the transposed choice, [E * T]."""

    @classmethod
    def of(cls, chosen_TE: Tensor, count: int) -> "ByExpert":
        """From the choice, bool with `count` that are True. Nothing waits for the device."""
        tokens, experts = chosen_TE.shape
        by_expert = chosen_TE.T.reshape(-1)
        row = by_expert.cumsum(0) - 1
        places = _compact(torch.arange(tokens * experts, device=row.device), by_expert, row, count)
        ends = chosen_TE.reshape(-1).cumsum(0)
        row_of_choice = row.view(experts, tokens).T.reshape(-1)
        return cls(
            tokens=places % tokens,
            rows=_compact(row_of_choice, chosen_TE.reshape(-1), ends - 1, count),
            bounds=F.pad(ends.view(tokens, experts)[:, -1], (1, 0)),
            places=places,
        )


def _compact(values: Tensor, chosen: Tensor, places: Tensor, count: int) -> Tensor:
    """The chosen values, int64 [count], each at its place. (Indexing by a mask would wait for the device.)"""
    out = values.new_empty(count + 1)
    return out.scatter_(0, places.where(chosen, count), values)[:count]


def permute(
    tokens_TH: Tensor, chosen_TE: Tensor, probs_TE: Tensor | None, count: int
) -> tuple[Tensor, Tensor | None, ByExpert]:
    """Rows [N, H] in the order of their experts, their probabilities [N], and what `unpermute` needs; `count`
    is N.
    """
    order = ByExpert.of(chosen_TE, count)
    rows: Tensor = _Spread.apply(tokens_TH, order)
    probs = None if probs_TE is None else probs_TE.T.reshape(-1).index_select(0, order.places)
    return rows, probs, order


def unpermute(rows_NH: Tensor, order: ByExpert) -> Tensor:
    """[T, H]: the sum of each token's rows, in float32 before it is rounded once."""
    out: Tensor = _Collect.apply(rows_NH, order)
    return out


def sort_chunks(
    rows_NH: Tensor, sizes: Tensor, order: Tensor, probs: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Rows that came in chunks of `sizes`, and their probabilities [N], chunk by chunk in another order; both
    int64 of all chunks, on the host.
    """
    shares = sizes[order]
    starts, new_starts = sizes.cumsum(0) - sizes, shares.cumsum(0) - shares
    moved = (starts[order] - new_starts).repeat_interleave(shares)
    index = to_device(moved + torch.arange(len(moved)), rows_NH.device)
    inverse = torch.empty_like(index).scatter_(0, index, torch.arange(len(index), device=index.device))
    rows = reordered(rows_NH, index, inverse)
    return rows, None if probs is None else reordered(probs, index, inverse)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: ByExpert) -> Tensor:
        ctx.order = order
        return tokens.index_select(0, order.tokens)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        order = ctx.order
        return sum_rows(grad_outputs[0].contiguous(), order.tokens, order.rows, order.bounds), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: ByExpert) -> Tensor:
        ctx.order = order
        return sum_rows(rows.contiguous(), order.tokens, order.rows, order.bounds)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0].index_select(0, ctx.order.tokens), None


class OwnDispatcher(MoETokenDispatcher):
    """Of a rank that has all experts: rows come in their order at once, nothing is exchanged, and only
    where tokens are dropped something waits for the device, for how many are left.
    """

    shape: torch.Size
    chosen: Tensor
    order: ByExpert

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[T, 1, H] -> [T, H], and the probabilities as they are."""
        self.shape, self.chosen = hidden_states.shape, routing_map
        return hidden_states.flatten(0, -2), probs

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Both as they are."""
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [N, H], how many each expert has, int64 [E] on the device, and the probability of each row."""
        count = len(hidden_states) * self.config.moe_router_topk
        if self.config.moe_expert_capacity_factor is not None:
            count = int(self.chosen.sum())
        rows, row_probs, self.order = permute(hidden_states, self.chosen, probs, count)
        assert row_probs is not None
        return rows, self.chosen.sum(dim=0), row_probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """[N, H] -> [T, H]."""
        return unpermute(hidden_states, self.order)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """As they are."""
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """[T, H] -> [T, 1, H]."""
        return hidden_states.view(self.shape)


class AllGatherDispatcher(MoEAllGatherTokenDispatcher):
    """Every rank sees the tokens of all, works on those of its experts, and results are added up. Ranks with
    fewer tokens than others pad, with rows that no expert gets.
    """

    routing_map: Tensor
    own: int

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """[T, H] and [T, E] of this rank -> those of all ranks, padding included."""
        self.own = hidden_states.shape[0]
        most = torch.tensor(self.own, device=hidden_states.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.tp_ep_group)
        missing = int(most) - self.own
        arguments: Mapping[str, Any] = {"group": self.tp_ep_group}
        with torch.no_grad():
            chosen = F.pad(self.routing_map.to(torch.uint8), (0, 0, 0, missing))
            self.routing_map = gather_from_sequence_parallel_region(chosen, **arguments).bool()
        return (
            gather_from_sequence_parallel_region(F.pad(hidden_states, (0, 0, 0, missing)), **arguments),
            gather_from_sequence_parallel_region(F.pad(probs, (0, 0, 0, missing)), **arguments),
        )

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Results of this rank's experts for all tokens -> all experts' results for its own, [T, H]."""
        summed = reduce_scatter_to_sequence_parallel_region(hidden_states, group=self.tp_ep_group)
        return summed[: self.own]
