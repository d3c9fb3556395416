"""One linear of each of several experts, whose rows lie one after another.

Shape suffixes: N rows, K experts.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.gradients import added, give, gradient_buffer
from engine.runtime.kernels import add_product, compiles_for, to_device

# One kernel for the matrices of all experts; torch 2.10 made it public.
grouped_mm: Any = getattr(F, "grouped_mm", torch._grouped_mm)


@dataclass(frozen=True)
class Shares:
    """How many rows each expert has, int64 [K], on the host or on `device`, where the rows are."""

    counts: Tensor
    device: torch.device

    @cached_property
    def sizes(self) -> list[int]:
        """On the host, which waits for the device if it has to."""
        sizes: list[int] = self.counts.tolist()
        return sizes

    @cached_property
    def ends(self) -> Tensor:
        """int32 [K] on the device: behind the last row of each expert. Nothing waits for the device."""
        if self.counts.device == self.device:
            return self.counts.cumsum(0, dtype=torch.int32)
        return to_device(torch.tensor(list(accumulate(self.sizes)), dtype=torch.int32), self.device)


def grouped_linear(rows: Tensor, weight: Tensor, shares: Shares) -> Tensor:
    """[N, in], sorted by expert, and [K, out, in] -> [N, out]. The gradient of a weight that has Megatron's
    buffer is added up there in float32.
    """
    out: Tensor = _GroupedLinear.apply(rows, weight, shares)
    return out


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, shares: Shares) -> Tensor:
        rows = rows.contiguous()
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight)
        ctx.weight, ctx.shares = weight, shares  # the parameter itself, which has the gradient buffer
        return _products(rows, weight.transpose(1, 2), shares)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad, (rows, weight) = grad_outputs[0].contiguous(), ctx.saved_tensors
        of_rows = _products(grad, weight, ctx.shares) if ctx.needs_input_grad[0] else None
        of_weight = _give_products(ctx.weight, grad, rows, ctx.shares) if ctx.needs_input_grad[1] else None
        return of_rows, of_weight, None


def _products(rows: Tensor, matrices: Tensor, shares: Shares) -> Tensor:
    """[N, a] and [K, a, b] -> [N, b]."""
    if _one_kernel(rows, matrices):
        return grouped_mm(rows, matrices, offs=shares.ends)
    parts = zip(rows.split(shares.sizes), matrices, strict=True)
    return torch.cat([part @ matrix for part, matrix in parts])


def _give_products(weight: Tensor, grads: Tensor, rows: Tensor, shares: Shares) -> Tensor:
    """As engine.model.gradients.give_product, for [K, out, in], [N, out] and [N, in]."""
    buffer, fast = gradient_buffer(weight), _one_kernel(rows, weight)
    if fast and buffer is not None and compiles_for(rows):
        from engine.model.triton_grouped import add_grouped_products

        add_grouped_products(buffer, grads, rows, shares.ends)
        return added(weight)
    if fast:
        return give(weight, grouped_mm(grads.T, rows, offs=shares.ends))
    parts = zip(grads.split(shares.sizes), rows.split(shares.sizes), strict=True)
    if buffer is None:
        return torch.stack([grad.T @ part for grad, part in parts])
    for total, (grad, part) in zip(buffer, parts, strict=True):
        add_product(total, grad.T, part)
    return added(weight)


def _one_kernel(rows: Tensor, matrices: Tensor) -> bool:
    """Whether torch's kernel of all experts at once takes them: its rows begin at multiples of 16 bytes."""
    widths = (rows.shape[1], *matrices.shape[1:])
    aligned = all(width * rows.element_size() % 16 == 0 for width in widths)
    return rows.is_cuda and rows.dtype == torch.bfloat16 and len(rows) > 0 and aligned
