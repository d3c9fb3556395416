"""Gradients of weights, which go to Megatron's fp32 buffers, main_grad, from where they are computed."""

import torch
from torch import Tensor

from engine.runtime.kernels import add_product, product


def gradient_buffer(weight: Tensor) -> Tensor | None:
    """Where gradients of a weight are added up. Megatron-FSDP has none: its buffer is of one micro-batch, and
    holds an older one's until it copies the gradient there.
    """
    return None if getattr(weight, "__fsdp_param__", False) else getattr(weight, "main_grad", None)


def added(weight: Tensor) -> Tensor:
    """Tell Megatron that the gradient is in its buffer, and return what a backward pass gives for it: it
    waits for one to come all the same, and does not look at it.
    """
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)


def give_product(weight: Tensor, grads: Tensor, inputs: Tensor) -> Tensor:
    """Add the gradient of a weight [out, in], from those of a linear's outputs [T, out] and its inputs
    [T, in], to Megatron's buffer in the product itself; what a backward pass then returns for it. Without a
    buffer that is the gradient.
    """
    buffer = gradient_buffer(weight)
    if buffer is None:
        return product(grads.T, inputs).to(weight.dtype)
    add_product(buffer, grads.T, inputs)
    return added(weight)


def give(weight: Tensor, gradient: Tensor) -> Tensor:
    """Add a weight's gradient to Megatron's buffer; what a backward pass then returns for it, as
    `give_product`.
    """
    buffer = gradient_buffer(weight)
    if buffer is None:
        return gradient.to(weight.dtype)
    buffer.add_(gradient)
    return added(weight)


def give_sums(weight: Tensor, parts: Tensor) -> Tensor:
    """Add the gradient of a weight [n], which a kernel has left in parts, float32 [parts, n], to Megatron's
    buffer; what a backward pass then returns for it, as `give_product`.
    """
    from engine.model.triton_kernels import add_column_sums

    buffer = gradient_buffer(weight)
    if buffer is None:
        return parts.sum(0).to(weight.dtype)
    add_column_sums(parts, buffer)
    return added(weight)
