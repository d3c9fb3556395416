"""The router of a mixture of experts, and the load-balancing loss over all layers and all pipeline stages.

Transformers defines that loss on the tokens of all layers together (`load_balancing_loss_func`, after Fedus
et al., 2021): with f_e the share of tokens that chose expert e and P_e its mean probability, both over tokens
and layers, it is E * sum(f_e * P_e). Its gradient with respect to a layer's probabilities needs f of the
layers behind it. So sums of every micro-batch travel with its hidden states from stage to stage, in rows
behind them, and the gradient of the sums comes back the same way.

Shape suffixes: T tokens of this rank, H hidden size, E experts.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from engine.model.gradients import give, give_product
from engine.runtime.kernels import product


@dataclass(kw_only=True)
class Balance:
    """What the routers of one chunk have seen of one micro-batch.

    `sums` are float32 [2 * E + 1]: times that each expert was chosen, its summed probability, and the summed
    square of the log-partition function, of the tokens of this rank, padding left out.
    """

    real: Tensor
    """bool [T]: tokens that are no padding."""
    sums: Tensor
    gradient: Tensor | None = None
    """Of the objective with respect to `sums`; there once the chunk's backward pass has begun."""
    closed: bool = False
    """All layers have added theirs: recomputation must not add it again."""

    @classmethod
    def empty(cls, real: Tensor, num_experts: int) -> "Balance":
        """Before the first layer."""
        return cls(real=real, sums=torch.zeros(2 * num_experts + 1, device=real.device))


class Router(MegatronModule):
    """Softmax over experts in float32, then the best `moe_router_topk` of a token, as Qwen's models do."""

    def __init__(self, config: TransformerConfig, pg_collection: Any = None, **unused: Any) -> None:
        super().__init__(config)
        self.weight = torch.nn.Parameter(
            torch.empty(
                config.num_moe_experts,
                config.hidden_size,
                dtype=config.params_dtype,
                device=torch.cuda.current_device(),
            )
        )
        # Each tensor-parallel rank routes its own tokens: Megatron adds up the gradients.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.normalize = not config.moe_router_pre_softmax
        self.balance: Balance | None = None
        """Of the micro-batch at hand; the layer sets it before every call."""
        # Real tokens of this rank that each expert was given, and last those that were dropped, since it was
        # reset.
        load = torch.zeros(config.num_moe_experts + 1, device=torch.cuda.current_device())
        self.register_buffer("load", load, persistent=False)

    def set_layer_number(self, layer_number: int) -> None:
        """Megatron tells; nothing here depends on it."""

    def forward(self, hidden: Tensor, *unused: Any, **ignored: Any) -> tuple[Tensor, Tensor]:
        """[T, 1, H] -> weights float32 [T, E], 0 where an expert was not chosen, and the choice, bool
        [T, E].
        """
        x = hidden.flatten(0, -2)
        logits: Tensor = _Logits.apply(x, self.weight)
        scores = logits.softmax(dim=-1)
        best, experts = scores.topk(self.config.moe_router_topk, dim=-1)
        if self.normalize:
            best = best / best.sum(dim=-1, keepdim=True)
        weights = torch.zeros_like(scores).scatter(1, experts, best)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, experts, True)
        kept = chosen
        if self.config.moe_expert_capacity_factor is not None:
            # Padding takes no real token's place.
            real = chosen if self.balance is None else chosen & self.balance.real[:, None]
            kept = real & self._within_capacity(weights.detach() * real, real)
            weights = weights * kept
        if self.balance is not None:
            weights = self._watch(self.balance, weights, scores, logits, chosen, kept)
        return weights, kept

    def _within_capacity(self, weights: Tensor, chosen: Tensor) -> Tensor:
        """Which tokens an expert can take, bool [T, E]."""
        tokens, experts = chosen.shape
        share = tokens * self.config.moe_router_topk / experts
        capacity = min(tokens, math.ceil(share * self.config.moe_expert_capacity_factor))
        if self.config.moe_token_drop_policy == "position":
            return chosen.cumsum(0) <= capacity
        best = weights.topk(capacity, dim=0).indices
        return torch.zeros_like(chosen).scatter(0, best, True)

    def _watch(
        self,
        balance: Balance,
        weights: Tensor,
        scores: Tensor,
        logits: Tensor,
        chosen: Tensor,
        kept: Tensor,
    ) -> Tensor:
        """Add to the sums, and give `weights` a backward pass that also brings the sums' gradient."""
        real = balance.real.to(scores.dtype)
        assert real.numel() == scores.shape[0], (real.numel(), scores.shape)
        probabilities, partition = real @ scores, real @ logits.logsumexp(dim=-1).square()
        with torch.no_grad():
            count = real @ chosen.to(scores.dtype)
            if not balance.closed:
                self.load: Tensor
                balance.sums += torch.cat((count, probabilities, partition[None]))
                if self.training:
                    given = real @ kept.to(scores.dtype)
                    self.load += torch.cat((given, (count - given).sum()[None]))
        attached: Tensor = _Attach.apply(weights, probabilities, partition, balance)
        return attached


class _Logits(torch.autograd.Function):
    """x [T, H] and weight [E, H] of one dtype -> float32 [T, E], rounded nowhere between, nor in the backward
    pass. No copy of x in float32 lives on.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.dtype, ctx.weight = x.dtype, weight  # the parameter itself, which has the gradient buffer
        return product(x, weight.T)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,), (x, weight) = grad_outputs, ctx.saved_tensors
        of_x, of_weight = None, None
        if ctx.dtype != torch.bfloat16:
            of_x = (grad @ weight.float()).to(ctx.dtype) if ctx.needs_input_grad[0] else None
            return of_x, give_product(ctx.weight, grad, x.float()) if ctx.needs_input_grad[1] else None
        parts = torch.cat(_thirds(grad), dim=1)
        if ctx.needs_input_grad[0]:
            of_x = parts @ weight.repeat(3, 1)
        if ctx.needs_input_grad[1]:
            of_weight = give(ctx.weight, product(parts.T, x).unflatten(0, (3, -1)).sum(0))
        return of_x, of_weight


def _thirds(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 -> three in bfloat16 that add up to it: each has 8 of the 24 bits. Their products with bfloat16
    are those of float32, and of tensor cores.
    """
    first = x.bfloat16()
    rest = x - first
    second = rest.bfloat16()
    return first, second, (rest - second).bfloat16()


class _Attach(torch.autograd.Function):
    """Passes `weights` on; in the backward pass also gives the sums of a layer their gradient."""

    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, probabilities: Tensor, partition: Tensor, balance: Balance
    ) -> Tensor:
        ctx.balance = balance
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        sums = ctx.balance.gradient
        if sums is None:
            return gradient, None, None, None
        experts = (sums.numel() - 1) // 2
        return gradient, sums[experts : 2 * experts], sums[-1], None


@dataclass(kw_only=True)
class BalanceLoss:
    """The auxiliary losses of a micro-batch on the last stage."""

    coefficient: float
    """Of the load-balancing loss."""
    z_coefficient: float
    """Of the mean squared log-partition function (Zoph et al., 2022)."""
    rows: float
    """Real tokens of the micro-batch, times layers with experts."""
    weight: float
    """By which the objective of this micro-batch counts: its supervised tokens."""
    groups: tuple[dist.ProcessGroup, ...]
    """Over which ranks hold other tokens of the micro-batch."""
    scale: Tensor | None = None
    """float16's loss scale."""
    values: Tensor = field(default_factory=lambda: torch.zeros(2))
    """float32 [2]: both losses, without their coefficients."""

    def gradient(self, sums: Tensor) -> Tensor:
        """Reduce `sums` over the groups, set `values`, and return the objective's gradient for them."""
        for group in self.groups:
            if group.size() > 1:
                dist.all_reduce(sums, group=group)
        experts, rows = (sums.numel() - 1) // 2, max(self.rows, 1.0)
        count, probability = sums[:experts] / rows, sums[experts:-1] / rows
        self.values = torch.stack(((count * probability).sum() * experts, sums[-1] / rows))
        gradient = torch.zeros_like(sums)
        gradient[experts:-1] = count * (self.coefficient * experts * self.weight / rows)
        gradient[-1] = self.z_coefficient * self.weight / rows
        return gradient if self.scale is None else gradient * self.scale


class Join(torch.autograd.Function):
    """The end of a chunk: its sums and those before it join the hidden states, or become the loss.

    forward(hidden [T, 1, H], before float32 [2 * E + 1] or None, balance, loss or None): with `loss` returns
    hidden, without it hidden with the sums as rows behind it.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, before: Tensor | None, balance: Balance, loss: BalanceLoss | None
    ) -> Tensor:
        ctx.balance, ctx.before, ctx.rows = balance, before is not None, 0
        balance.closed = True
        sums = balance.sums if before is None else balance.sums + before
        if loss is not None:
            ctx.gradient = loss.gradient(sums.clone())
            return hidden.view_as(hidden)
        rows = to_rows(sums, hidden)
        ctx.rows, ctx.size = rows.shape[0], sums.numel()
        return torch.cat((hidden, rows))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        if ctx.rows:
            ctx.balance.gradient = from_rows(gradient[-ctx.rows :], ctx.size)
            gradient = gradient[: -ctx.rows]
        else:
            ctx.balance.gradient = ctx.gradient
        return gradient, ctx.balance.gradient if ctx.before else None, None, None


class Part(torch.autograd.Function):
    """The beginning of a chunk: hidden states with sums behind them -> hidden [T, 1, H], sums float32
    [size].
    """

    @staticmethod
    def forward(ctx: Any, joined: Tensor, size: int) -> tuple[Tensor, Tensor]:
        rows = num_rows(size, joined)
        return joined[:-rows].clone(), from_rows(joined[-rows:], size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, sums: Tensor) -> tuple[Tensor, None]:
        return torch.cat((gradient, to_rows(sums, gradient))), None


def num_rows(size: int, like: Tensor) -> int:
    """Rows of `like`, [*, 1, H], that hold `size` float32 numbers bit by bit."""
    return -(-size * 4 // (like.shape[-1] * like.element_size()))


def to_rows(values: Tensor, like: Tensor) -> Tensor:
    """float32 [n] -> the same bits as rows [r, 1, H] of the dtype of `like`."""
    width, rows = like.shape[-1], num_rows(values.numel(), like)
    padded = torch.zeros(rows * width * like.element_size() // 4, dtype=torch.float32, device=like.device)
    padded[: values.numel()] = values
    return padded.view(like.dtype).view(rows, *like.shape[1:])


def from_rows(rows: Tensor, size: int) -> Tensor:
    """The inverse of `to_rows`."""
    return rows.contiguous().view(-1).view(torch.float32)[:size].clone()
