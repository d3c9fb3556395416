"""How tokens come to the experts that the router chose for them, and their results back.

In place of Megatron's dispatchers, which send a token to a rank once for every expert it has there, wait for
the device more often, and add results up by atomics, in the dtype of the run and in any order.

Shape suffixes: T tokens, E experts, K experts of this rank, R ranks of expert parallelism, H hidden size, N
rows: a token has one for every expert it goes to.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from engine.model.fused import sum_rows
from engine.runtime.kernels import OnItsWay
from engine.runtime.uneven import gather, reduce_scatter


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
    """int64 [N]: of the rows in the choice, [T * E]."""

    @classmethod
    def of(cls, chosen_TE: Tensor, count: int) -> "ByExpert":
        """From the choice, bool with `count` that are True. If there are fewer, `first` has to follow.
        Nothing waits for the device.
        """
        tokens, experts = chosen_TE.shape
        by_expert = chosen_TE.T.reshape(-1)
        row = by_expert.cumsum(0) - 1
        numbered = torch.arange(tokens * experts, device=row.device).view(tokens, experts)
        places = _compact(numbered.T.reshape(-1), by_expert, row, count)
        ends = chosen_TE.reshape(-1).cumsum(0)
        row_of_choice = row.view(experts, tokens).T.reshape(-1)
        return cls(
            tokens=places // experts,
            rows=_compact(row_of_choice, chosen_TE.reshape(-1), ends - 1, count),
            bounds=F.pad(ends.view(tokens, experts)[:, -1], (1, 0)),
            places=places,
        )

    def first(self, count: int) -> "ByExpert":
        """Of the rows that there are."""
        return ByExpert(
            tokens=self.tokens[:count], rows=self.rows[:count], bounds=self.bounds, places=self.places[:count]
        )


def _compact(values: Tensor, chosen: Tensor, places: Tensor, count: int) -> Tensor:
    """The chosen values, int64 [count], each at its place. (Indexing by a mask would wait for the device.)"""
    out = values.new_empty(count + 1)
    return out.scatter_(0, places.where(chosen, count), values)[:count]


def permute(
    tokens_TH: Tensor, chosen_TE: Tensor, probs_TE: Tensor, count: int
) -> tuple[Tensor, Tensor, ByExpert]:
    """Rows [N, H] in the order of their experts, their probabilities [N], and what `unpermute` needs; `count`
    is N.
    """
    order = ByExpert.of(chosen_TE, count)
    return spread(tokens_TH, order), probs_TE.reshape(-1).index_select(0, order.places), order


def spread(tokens_TH: Tensor, order: ByExpert) -> Tensor:
    """Each token once for every row that it has, [N, H]."""
    rows: Tensor = _Spread.apply(tokens_TH, order)
    return rows


def unpermute(rows_NH: Tensor, order: ByExpert) -> Tensor:
    """[T, H]: the sum of each token's rows, in float32 before it is rounded once."""
    out: Tensor = _Collect.apply(rows_NH, order)
    return out


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

    `experts` is how many this rank has.
    """

    shape: torch.Size
    chosen: Tensor
    order: ByExpert

    def __init__(self, experts: int, *, config: TransformerConfig, pg_collection: Any) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.experts = experts

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
        """Rows [N, H], how many each expert has, int64 [K], and the probability of each row."""
        shares, count = self._shares()
        rows, row_probs, self.order = permute(hidden_states, self.chosen, probs, count)
        return rows, shares, row_probs

    def _shares(self) -> tuple[Tensor, int]:
        """Rows of each expert, int64 [K] on the device or on the host, and of all of them."""
        count = len(self.chosen) * self.config.moe_router_topk
        if self.config.moe_expert_capacity_factor is not None:
            count = int(self.chosen.sum())
        return self.chosen.sum(dim=0), count

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """[N, H] -> [T, H]."""
        order = self.order
        del self.order, self.chosen  # a layer would keep those of its last micro-batch
        return unpermute(hidden_states, order)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """As they are."""
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """[T, H] -> [T, 1, H]."""
        return hidden_states.view(self.shape)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """How many tokens go where, known to the host."""

    sent: list[int]
    """[R]: from this rank to each rank of expert parallelism."""
    received: list[int]
    """[R]: from each of them."""
    gathered: list[int]
    """Received by each of the ranks that share the same experts' widths."""
    shares: Tensor
    """int64 [K]: rows of each expert of this rank."""

    @classmethod
    def of(cls, every: Tensor, dispatcher: MoETokenDispatcher) -> "Traffic":
        """From int64 [ranks of EP x ETP, E + R] on the host: how many of a rank's tokens chose each expert,
        and how many go to each rank.
        """
        (ranks, rank), width = (dispatcher.ep_size, dispatcher.ep_group.rank()), dispatcher.tp_rank
        counts = every.view(ranks, dispatcher.tp_size, -1)
        shares, tokens = counts[..., :-ranks].sum((0, 1)), counts[..., -ranks:]
        return cls(
            sent=tokens[rank, width].tolist(),
            received=tokens[:, width, rank].tolist(),
            gathered=tokens[..., rank].sum(0).tolist(),
            shares=shares.chunk(ranks)[rank],
        )


class AllToAllDispatcher(OwnDispatcher):
    """A token is sent once to every rank that has experts for it, however many; there its rows are made, and
    what these experts return is added up before it goes back.
    """

    traffic: Traffic
    sent: ByExpert
    """Of the tokens, by the ranks they go to."""

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[T, 1, H] -> the tokens by the rank they go to, [sent, H], and of each the probabilities of that
        rank's experts, [sent, K], -1 where it did not choose them.
        """
        self.shape = hidden_states.shape
        wanted_TR = routing_map.view(len(routing_map), self.ep_size, self.experts).any(-1)
        own = torch.cat([routing_map.sum(0), wanted_TR.sum(0)])
        every = own.new_empty(self.ep_size * self.tp_size * len(own))
        dist.all_gather_into_tensor(every, own, group=self.tp_ep_group)
        counts = OnItsWay(every)
        # What does not depend on the numbers keeps the device at work while the host reads them.
        order = ByExpert.of(wanted_TR, wanted_TR.numel())
        marked = probs.where(routing_map, -1.0).view(-1, self.experts)
        self.traffic = Traffic.of(counts.arrived(), self)
        self.sent = order.first(sum(self.traffic.sent))
        return spread(hidden_states.flatten(0, -2), self.sent), marked.index_select(0, self.sent.places)

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Of this rank's tokens -> of those that chose an expert of it, [gathered, H] and [gathered, K]."""
        hidden_states, probs = self._receive(hidden_states), self._receive(probs)
        self.chosen = probs.detach() != -1.0  # true of what is no number, as the counts have it
        return hidden_states, probs

    def _receive(self, sent: Tensor) -> Tensor:
        received: Tensor = all_to_all(self.ep_group, sent, self.traffic.received, self.traffic.sent)
        return gather(received, self.traffic.gathered, self.tp_group) if self.tp_size > 1 else received

    def _shares(self) -> tuple[Tensor, int]:
        return self.traffic.shares, int(self.traffic.shares.sum())

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Results of this rank's experts for what came -> of all for its own tokens, [sent, H]."""
        if self.tp_size > 1:
            hidden_states = reduce_scatter(hidden_states, self.traffic.gathered, self.tp_group)
        out: Tensor = all_to_all(self.ep_group, hidden_states, self.traffic.sent, self.traffic.received)
        return out

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """[sent, H] -> [T, 1, H]."""
        sent = self.sent
        del self.sent
        return unpermute(hidden_states, sent).view(self.shape)


class AllGatherDispatcher(OwnDispatcher):
    """Every rank sees the tokens of all, works on those of its experts, and results are added up. Ranks with
    fewer tokens than others pad, with rows that no expert gets.
    """

    own: int

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """[T, H] and [T, E] of this rank -> of all ranks, padding included, [T, H] and [T, K]."""
        self.own = len(hidden_states)
        most = torch.tensor(self.own, device=hidden_states.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.tp_ep_group)
        padding = (0, 0, 0, int(most) - self.own)
        first = self.ep_group.rank() * self.experts
        mine = slice(first, first + self.experts)

        def of_all(part: Tensor) -> Tensor:
            whole: Tensor = gather_from_sequence_parallel_region(F.pad(part, padding), group=self.tp_ep_group)
            return whole

        with torch.no_grad():
            self.chosen = of_all(self.chosen.to(torch.uint8))[:, mine].bool()
        return of_all(hidden_states), of_all(probs)[:, mine]

    def _shares(self) -> tuple[Tensor, int]:
        shares = self.chosen.sum(dim=0).cpu()
        return shares, int(shares.sum())

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Results of this rank's experts for all tokens -> all experts' results for its own, [T, H]."""
        summed = reduce_scatter_to_sequence_parallel_region(hidden_states, group=self.tp_ep_group)
        return summed[: self.own]
