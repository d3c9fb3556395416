"""Causal attention over packed documents by GPU kernels that know their boundaries.

Shape suffixes: T tokens of a rank, K keys, N query heads of this rank, G key/value heads, D head dimension.
"""

from typing import Any

import torch
from torch import Tensor

from engine.model.attention import Segments


def attend_packed(kernel: str, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    """[T, N, D] queries and [K, G, D] keys and values in half precision -> [T, N, D]; `kernel` is what
    engine.model.attention.packed_kernel names.
    """
    if segments.key_index is not None:
        k, v = k.index_select(0, segments.key_index), v.index_select(0, segments.key_index)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if kernel == "FlashAttention 4":
        return _flash_attention_4(q, k, v, segments, scale)
    out: Tensor = (_Tiled if kernel == "Triton" else _Packed).apply(q, k, v, segments, scale)
    return out


def _flash_attention_4(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    from flash_attn.cute import flash_attn_varlen_func

    out: Tensor = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=segments.cu_q,
        cu_seqlens_k=segments.cu_k,
        max_seqlen_q=max(segments.q_lengths),
        max_seqlen_k=max(segments.k_lengths),
        softmax_scale=scale,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )[0]
    return out


class _Tiled(torch.autograd.Function):
    """Braid's kernels for packed sequences."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float
    ) -> Tensor:
        from engine.model import triton_attention

        out, normalizers = triton_attention.forward(query, key, value, segments.tiles[0], scale)
        ctx.save_for_backward(query, key, value, out, normalizers)
        ctx.tiles, ctx.scale = segments.tiles, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        from engine.model import triton_attention

        q, k, v, out, normalizers = ctx.saved_tensors
        of_queries, of_keys = ctx.tiles
        grads = triton_attention.backward(
            grad_outputs[0].contiguous(), q, k, v, out, normalizers, of_queries, of_keys, ctx.scale
        )
        return *grads, None, None


class _Packed(torch.autograd.Function):
    """torch's FlashAttention for packed sequences, where Braid's kernels cannot be compiled.

    torch.nn.attention.varlen calls the same operators, but knows no grouped queries in torch 2.11. cuDNN's
    operator for packed sequences was tried there too: it takes 40 ms a call, and its gradients are wrong.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float
    ) -> Tensor:
        inputs = (query, key, value)
        sizes = (segments.cu_q, segments.cu_k, max(segments.q_lengths), max(segments.k_lengths))
        out, normalizers, *_ = torch.ops.aten._flash_attention_forward(
            *inputs, *sizes, 0.0, True, False, scale=scale
        )
        ctx.sizes, ctx.scale = sizes, scale
        ctx.save_for_backward(*inputs, out, normalizers)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # Without dropout the state of the random generator is not read.
        state = torch.zeros(2, dtype=torch.uint64, device=grad_outputs[0].device)
        grads = torch.ops.aten._flash_attention_backward(
            grad_outputs[0].contiguous(),
            *ctx.saved_tensors,
            *ctx.sizes,
            0.0,
            True,
            state,
            state.new_empty(0),
            scale=ctx.scale,
        )
        return *grads, None, None
