"""Operations between the matrix products, each one kernel on a GPU and plain torch elsewhere.

Suffixes: T tokens, N heads, G key/value heads, D head dimension, F width, R rows and V columns of logits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.runtime.kernels import compiles_for


def _kernels() -> Any:
    from engine.model import triton_kernels

    return triton_kernels


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        out, scales = _kernels().norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scales = ctx.saved_tensors
        grads = _kernels().norm_backward(
            grad_outputs[0].contiguous(), x, weight, scales, wants_weight=ctx.needs_input_grad[1]
        )
        return *grads, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich, 2019)."""
    if compiles_for(x):
        out: Tensor = _RmsNorm.apply(x, weight, eps)
        return out
    return F.rms_norm(x, weight.shape, weight, eps)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        return _kernels().swiglu_forward(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _kernels().swiglu_backward(grad_outputs[0].contiguous(), x)


def swiglu(x: Tensor) -> Tensor:
    """[..., 2 F], gate before up -> silu(gate) * up, [..., F] (Shazeer, 2020)."""
    if compiles_for(x):
        out: Tensor = _SwiGlu.apply(x)
        return out
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class Rotary(torch.autograd.Function):
    """Rotate pairs (i, i + D/2) of every head of queries and keys by a position's angle (Su et al., 2021)."""

    @staticmethod
    def forward(
        ctx: Any, query_TND: Tensor, key_TGD: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """cos and sin are [T, 1, D], with the same numbers in both halves."""
        ctx.save_for_backward(cos, sin)
        return _rotate(query_TND, key_TGD, cos, sin, backward=False)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        query, key = grad_outputs
        return *_rotate(query, key, cos, sin, backward=True), None, None


def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, backward: bool) -> tuple[Tensor, Tensor]:
    half = query.shape[-1] // 2
    if compiles_for(query) and half & (half - 1) == 0:
        query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
        return _kernels().rotary(query, key, cos, sin, backward=backward)
    sin = -sin if backward else sin

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return rotated(query), rotated(key)


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
