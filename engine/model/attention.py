"""Causal attention over packed documents with torch's kernels, without a dense mask over all tokens.

Shape suffixes: T tokens of a rank, K keys, N query heads of this rank, G key/value heads, D head dimension.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.runtime.kernels import can_compile, to_device

# Rows of queries that get a mask at once, where a segment sees more keys than it has queries.
_MASK_ROWS = 1024
# Rows of a tile of Braid's own kernels.
TILE = 64


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Which queries see which keys. Queries stand one segment after another; segment i sees the keys
    [k_starts[i], k_starts[i] + k_lengths[i]), of which its last query sees all, the one before all but the
    last, and so on.
    """

    q_lengths: tuple[int, ...]
    k_starts: tuple[int, ...]
    k_lengths: tuple[int, ...]
    cu_q: Tensor
    """int32 [segments + 1] on the device, as kernels for packed sequences want it."""

    cu_k: Tensor
    key_index: Tensor | None
    """int64 [sum of k_lengths] on the device: the keys of all segments one after another; None where that is
    every key once.
    """

    @cached_property
    def tiles(self) -> tuple[Tensor, Tensor]:
        """Of queries and of keys, from `list_tiles`, on the device: for the kernels that work by them."""
        of_queries, of_keys = map(torch.from_numpy, list_tiles(self.q_lengths, self.k_lengths))
        device = self.cu_q.device
        return to_device(of_queries, device), to_device(of_keys, device)

    @classmethod
    def documents(cls, lengths: Sequence[int], device: torch.device) -> "Segments":
        """Every token sees its document up to itself."""
        starts = tuple(itertools.accumulate((0, *lengths[:-1])))
        return cls._make(tuple(lengths), starts, tuple(lengths), device, plain=True)

    @classmethod
    def chunks(cls, lengths: Sequence[int], rank: int, size: int, device: torch.device) -> "Segments":
        """Context-parallel rank `rank` of `size` has the chunks `rank` and `2 * size - 1 - rank` of the
        2 * size equal chunks of every document; keys are those of all ranks, in order.
        """
        own = [(chunk, start, (index + 1) * chunk) for start, index, chunk in own_chunks(lengths, rank, size)]
        q_lengths, k_starts, k_lengths = zip(*own, strict=True)
        return cls._make(q_lengths, k_starts, k_lengths, device, plain=False)

    @classmethod
    def _make(
        cls,
        q_lengths: tuple[int, ...],
        k_starts: tuple[int, ...],
        k_lengths: tuple[int, ...],
        device: torch.device,
        *,
        plain: bool,
    ) -> "Segments":
        def boundaries(lengths: tuple[int, ...]) -> Tensor:
            sums = torch.tensor((0, *itertools.accumulate(lengths)), dtype=torch.int32)
            return to_device(sums, device)

        index = None
        if not plain:
            ranges = [torch.arange(start, start + n) for start, n in zip(k_starts, k_lengths, strict=True)]
            index = to_device(torch.cat(ranges), device)
        return cls(
            q_lengths=q_lengths,
            k_starts=k_starts,
            k_lengths=k_lengths,
            cu_q=boundaries(q_lengths),
            cu_k=boundaries(k_lengths),
            key_index=index,
        )


def list_tiles(q_lengths: Sequence[int], k_lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Tiles of queries and of keys, at most TILE rows each, int32 [tiles, 5]. Those with most work come
    first, so that the last ones to run are short.

    Segment s has q_lengths[s] queries, which are the last of the positions of its k_lengths[s] keys; segments
    stand one after another. A tile of queries: first row, rows, first key of its segment, position of its
    first query among those keys, keys that its last one sees. A tile of keys: first row, rows, first query
    that sees it, queries from there on, and how far that query's position lies behind the tile's first key.
    """
    q_starts, k_starts = (np.cumsum([0, *lengths[:-1]]) for lengths in (q_lengths, k_lengths))
    of_queries, of_keys = [], []
    for q_start, q_count, k_start, k_count in zip(q_starts, q_lengths, k_starts, k_lengths, strict=True):
        shift = k_count - q_count
        for first in range(0, q_count, TILE):
            rows = min(TILE, q_count - first)
            of_queries.append((q_start + first, rows, k_start, shift + first, shift + first + rows))
        for first in range(0, k_count, TILE):
            seen_from = max(0, first - shift)
            rows = min(TILE, k_count - first)
            of_keys.append(
                (k_start + first, rows, q_start + seen_from, q_count - seen_from, seen_from + shift - first)
            )
    queries = np.array(of_queries, dtype=np.int32).reshape(-1, 5)
    keys = np.array(of_keys, dtype=np.int32).reshape(-1, 5)
    return queries[np.argsort(-queries[:, 4], kind="stable")], keys[np.argsort(-keys[:, 3], kind="stable")]


def own_chunks(lengths: Sequence[int], rank: int, size: int) -> Iterator[tuple[int, int, int]]:
    """(start of the document, index of the chunk in it, tokens of the chunk) of every chunk that
    context-parallel rank `rank` of `size` has, in order.
    """
    start = 0
    for length in lengths:
        assert length % (2 * size) == 0, f"{length} tokens are not cut into {2 * size} equal chunks"
        for index in (rank, 2 * size - 1 - rank):
            yield start, index, length // (2 * size)
        start += length


@cache
def packed_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Which kernel for packed sequences attention takes: FlashAttention 4 where the package flash-attn-4 is
    installed and the card is a Hopper or Blackwell, Braid's in Triton, or torch's FlashAttention 2; None
    where there is none.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    if head_dim % 8 or head_dim > 256:
        return None
    if torch.cuda.get_device_capability(device)[0] in (9, 10) and head_dim in (64, 128):
        with contextlib.suppress(ImportError):
            import flash_attn.cute

            assert flash_attn.cute
            return "FlashAttention 4"
    return "Triton" if can_compile() and head_dim in (64, 128) else "FlashAttention 2"


def attend(query_TND: Tensor, key_KGD: Tensor, value_KGD: Tensor, segments: Segments, scale: float) -> Tensor:
    """[T, N, D] queries and [K, G, D] keys and values -> [T, N, D].

    Kernels for packed sequences where `packed_kernel` names one; elsewhere scaled_dot_product_attention,
    segment by segment.
    """
    kernel = packed_kernel(query_TND.device, query_TND.dtype, query_TND.shape[-1])
    if kernel is not None:
        from engine.model.packed_attention import attend_packed

        return attend_packed(kernel, query_TND, key_KGD, value_KGD, segments, scale)
    lengths = segments.q_lengths
    if segments.key_index is None and len(set(lengths)) == 1:
        return _square(query_TND, key_KGD, value_KGD, len(lengths), scale)
    parts = []
    spans = zip(query_TND.split(lengths), segments.k_starts, segments.k_lengths, strict=True)
    for q, start, count in spans:
        k, v = key_KGD.narrow(0, start, count), value_KGD.narrow(0, start, count)
        parts.append(_square(q, k, v, 1, scale) if q.shape[0] == count else _Tail.apply(q, k, v, scale))
    return torch.cat(parts)


def _square(q: Tensor, k: Tensor, v: Tensor, documents: int, scale: float) -> Tensor:
    """`documents` documents of one length, one after another: [T, N, D] -> [T, N, D]."""
    q, k, v = (x.unflatten(0, (documents, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).flatten(0, 1)


class _Tail(torch.autograd.Function):
    """Queries that are the last of more keys: [T, N, D] and [K, G, D] -> [T, N, D].

    Worked off in blocks of rows, and computed again in the backward pass: neither ever holds a mask of all
    rows.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        return torch.cat([_masked(q, k, v, start, scale) for start in range(0, q.shape[0], _MASK_ROWS)])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        totals = [torch.zeros_like(x) for x in (q, k, v)]
        for start in range(0, q.shape[0], _MASK_ROWS):
            with torch.enable_grad():
                out = _masked(q, k, v, start, ctx.scale)
            parts = torch.autograd.grad(out, (q, k, v), grad_outputs[0][start : start + _MASK_ROWS])
            for total, part in zip(totals, parts, strict=True):
                total += part
        return (*totals, None)


def _masked(q: Tensor, k: Tensor, v: Tensor, start: int, scale: float) -> Tensor:
    """The block of rows from `start` on, with a mask for it."""
    rows, before = q[start : start + _MASK_ROWS], k.shape[0] - q.shape[0] + start
    seen = before + rows.shape[0]
    out = F.scaled_dot_product_attention(
        rows.transpose(0, 1)[None],
        k[:seen].transpose(0, 1)[None],
        v[:seen].transpose(0, 1)[None],
        attn_mask=torch.ones(rows.shape[0], seen, dtype=torch.bool, device=q.device).tril(before),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)
