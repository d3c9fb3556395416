"""Plain torch turned into few GPU kernels, and products that add up in fp32."""

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])


@functools.cache
def can_compile() -> bool:
    """Whether torch.compile makes GPU kernels here: Triton generates them, and calls a C compiler for what
    launches them.
    """
    import importlib.util

    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    return compiler is not None and importlib.util.find_spec("triton") is not None


def compiles_for(tensor: Tensor) -> bool:
    """Whether what is done to `tensor` can be a compiled kernel."""
    return tensor.is_cuda and can_compile()


def fused(function: _Function) -> _Function:
    """`function` of plain torch operations, compiled to as few kernels as torch makes of it where its first
    argument is on a GPU; elsewhere, and where nothing can be compiled, as it is written.

    Sizes that change between calls become parameters of the kernels. For code without gradients: what torch
    records for the backward pass would be chosen by the compiler.
    """
    compiled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(first: Tensor, *arguments: Any) -> Any:
        nonlocal compiled
        if not compiles_for(first):
            return function(first, *arguments)
        compiled = compiled or torch.compile(function, fullgraph=True)
        return compiled(first, *arguments)

    return call  # type: ignore[return-value]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor on the host that is made when the device comes to it. From memory that is not pinned
    the host would wait for all that the device has to do before.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class OnItsWay:
    """A copy of a tensor for the host, made when the device comes to it."""

    def __init__(self, tensor: Tensor) -> None:
        self._there = None
        if tensor.is_cuda:
            self._copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()
        else:
            self._copy = tensor

    def arrived(self) -> Tensor:
        """Waits for it, and not for what the device has been given since."""
        if self._there is not None:
            self._there.synchronize()
        return self._copy


def product(a: Tensor, b: Tensor) -> Tensor:
    """[n, k] and [k, m] of one dtype -> a @ b, float32 [n, m], rounded nowhere between."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b for float32 [n, m], [n, k] and [k, m], in the product itself: no rounding to the dtype
    of a and b, and no tensor for the product.
    """
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.float(), b.float())
