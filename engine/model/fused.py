"""Operations between the matrix products, each one kernel on a GPU and plain torch elsewhere.

Suffixes: T tokens, N heads, G key/value heads, D head dimension, F width, R rows and V columns of logits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.gradients import give_sums
from engine.runtime.kernels import compiles_for


def _kernels() -> Any:
    from engine.model import triton_kernels

    return triton_kernels


class _RmsNorm(torch.autograd.Function):
    """The norm of x, and x: what comes back for the latter is added in the norm's own backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        source = x.contiguous()
        out, scales = _kernels().norm_forward(source, weight, eps)
        ctx.save_for_backward(source, weight, scales)
        ctx.weight = weight  # the parameter itself, which has the gradient buffer
        return out, x

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scales = ctx.saved_tensors
        grad, residual = (None if grad is None else grad.contiguous() for grad in grad_outputs)
        if grad is None:
            return residual, None, None
        of_x, parts = _kernels().norm_backward(
            grad, x, weight, scales, residual, wants_weight=ctx.needs_input_grad[1]
        )
        return of_x, None if parts is None else give_sums(ctx.weight, parts), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich, 2019)."""
    return rms_norm_and_input(x, weight, eps)[0]


def rms_norm_and_input(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm`, and x for whoever else reads it, so that both gradients of x are one."""
    if compiles_for(x):
        found: tuple[Tensor, Tensor] = _RmsNorm.apply(x, weight, eps)
        return found
    return F.rms_norm(x, weight.shape, weight, eps), x


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        return _kernels().swiglu_forward(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        out, _ = _kernels().swiglu_backward(grad_outputs[0].contiguous(), x, wants_active=False)
        return out


def swiglu(x: Tensor) -> Tensor:
    """[..., 2 F], gate before up -> silu(gate) * up, [..., F] (Shazeer, 2020)."""
    if compiles_for(x):
        out: Tensor = _SwiGlu.apply(x)
        return out
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class _WeightedSwiGlu(torch.autograd.Function):
    """Keeps what it is given, nothing between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weights)
        return _kernels().swiglu_forward(x, weights) if compiles_for(x) else _weighted(x, weights)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        x, weights = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        if compiles_for(x):
            found: tuple[Tensor, Tensor] = _kernels().weighted_swiglu_backward(grad, x, weights)
            return found
        with torch.enable_grad():
            sources = x.detach().requires_grad_(), weights.detach().requires_grad_()
            again = _weighted(*sources)
        of_x, of_weights = torch.autograd.grad(again, sources, grad)
        return of_x, of_weights


def _weighted(x: Tensor, weights: Tensor) -> Tensor:
    return (swiglu(x) * weights[:, None]).to(x.dtype)


def weighted_swiglu(x_NF: Tensor, weights: Tensor) -> Tensor:
    """`swiglu` of every row times its weight, float32 [N]: [N, 2 F] -> [N, F] of the dtype of x."""
    out: Tensor = _WeightedSwiGlu.apply(x_NF, weights)
    return out


def swiglu_again(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """What `swiglu` made of x, [..., F], and the gradient of x, from that of the former."""
    if compiles_for(x):
        of_x, active = _kernels().swiglu_backward(grad.contiguous(), x.contiguous(), wants_active=True)
        return active, of_x
    with torch.enable_grad():
        source = x.detach().requires_grad_()
        again = swiglu(source)
    return again.detach(), torch.autograd.grad(again, source, grad)[0]


def split_heads(
    mixed_TW: Tensor,
    groups: int,
    cos: Tensor,
    sin: Tensor,
    *,
    bias: Tensor | None = None,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T, N, D], keys and values [T, G, D] from the product of the fused linear, in which every group
    has its N / G queries, a key and a value. In this order: the linear's `bias` is added, queries and keys
    are divided by their root mean square and multiplied by `norms` (weights [D] of the one and the other),
    and rotated, pairs (i, i + D/2) by the angle of the token's position (Su et al., 2021), whose cos and sin
    are [T, 1, D] with the same numbers in both halves.
    """
    half = cos.shape[-1] // 2
    weights = (None, None) if norms is None else norms
    if compiles_for(mixed_TW) and half & (half - 1) == 0:
        found: tuple[Tensor, Tensor, Tensor] = _Heads.apply(mixed_TW, groups, cos, sin, bias, *weights, eps)
        return found
    whole = mixed_TW if bias is None else mixed_TW + bias
    dim = cos.shape[-1]
    heads = whole.view(len(whole), groups, whole.shape[1] // (groups * dim), dim)
    query, key, value = heads.split((heads.shape[2] - 2, 1, 1), dim=2)
    rotated = []
    for x, weight in zip((query, key), weights, strict=True):
        normed = (x if weight is None else F.rms_norm(x, weight.shape, weight, eps)).flatten(1, 2)
        first, second = normed.chunk(2, dim=-1)
        rotated.append(normed * cos + torch.cat((-second, first), dim=-1) * sin)
    return rotated[0], rotated[1], value[:, :, 0]


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mixed: Tensor,
        groups: int,
        cos: Tensor,
        sin: Tensor,
        bias: Tensor | None,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mixed = mixed.contiguous()
        norms = None if q_weight is None or k_weight is None else (q_weight, k_weight)
        ctx.eps, ctx.bias, ctx.norms = eps, bias, norms  # parameters, which have gradient buffers
        ctx.save_for_backward(cos, sin, *((mixed, *norms) if norms else ()))
        found: tuple[Tensor, Tensor, Tensor] = _kernels().heads_forward(
            mixed, groups, cos, sin, bias, norms, eps
        )
        return found

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, *rest = ctx.saved_tensors
        mixed, norms = (rest[0], tuple(rest[1:])) if ctx.norms else (None, None)
        grads = tuple(grad.contiguous() for grad in grad_outputs)
        out, bias_parts, norm_parts = _kernels().heads_backward(
            grads, mixed, cos, sin, norms, ctx.eps, wants_bias=ctx.needs_input_grad[4]
        )
        of_bias = None if bias_parts is None else give_sums(ctx.bias, bias_parts)
        of_norms: list[Tensor | None] = [None, None]
        if norm_parts is not None:
            for place, weight in enumerate(ctx.norms):
                if ctx.needs_input_grad[5 + place]:
                    of_norms[place] = give_sums(weight, norm_parts[:, place])
        return out, None, None, None, of_bias, *of_norms, None


def sum_rows(x_NH: Tensor, owners: Tensor, rows: Tensor, bounds: Tensor) -> Tensor:
    """Sums [M, H] of the rows of x that belong to the same owner, added up in float32 in the order of `rows`.

    `owners` int64 [N] are in [0, M), one for every row. `rows` int64 [N] has the rows of owner 0 first, then
    those of owner 1; owner m has rows[bounds[m] : bounds[m + 1]], bounds int64 [M + 1].
    """
    if compiles_for(x_NH):
        return _kernels().sum_rows(x_NH, rows, bounds)
    wide = torch.promote_types(x_NH.dtype, torch.float32)
    sums = torch.zeros(len(bounds) - 1, x_NH.shape[1], dtype=wide, device=x_NH.device)
    return sums.index_add_(0, owners, x_NH.to(wide)).to(x_NH.dtype)


def logit_statistics(logits_RV: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row: the largest logit, the sum of exponentials relative to it, and the logit at its place, 0
    where that is none of [0, V); float32 [R].
    """
    if compiles_for(logits_RV):
        return _kernels().logit_statistics(logits_RV, places)
    values, width = logits_RV.float(), logits_RV.shape[1]
    maxima = values.amax(-1)
    sums = (values - maxima[:, None]).exp_().sum(-1)
    picked = values.gather(-1, places.clamp(0, width - 1)[:, None])[:, 0]
    return maxima, sums, torch.where((places >= 0) & (places < width), picked, 0.0)


def logits_to_gradients(logits_RV: Tensor, places: Tensor, normalizer: Tensor, factor: Tensor) -> None:
    """Overwrite logits by (softmax - one-hot) * factor; `normalizer` float32 [R] is the logarithm of the sum
    of a row's exponentials, `factor` a float32 scalar.
    """
    if compiles_for(logits_RV):
        _kernels().logit_gradients(logits_RV, places, normalizer, factor)
        return
    gradients = (logits_RV.float() - normalizer[:, None]).exp_()
    inside = (places >= 0) & (places < logits_RV.shape[1])
    own = -inside.float()[:, None]
    gradients.scatter_add_(-1, places.clamp(0, logits_RV.shape[1] - 1)[:, None], own)
    logits_RV.copy_(gradients.mul_(factor))
