"""Causal attention over packed documents in Triton, forward and backward; import only where kernels can be
compiled.

A program works on a tile that engine.model.attention.list_tiles lists. Queries of a head share their group's
keys. Nothing is added up by atomics: results do not depend on timing. After Dao (2023), FlashAttention-2.

Suffixes: T queries, K keys, N query heads, G key/value heads, D head dimension.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.model.attention import TILE

# Rows of a tile (one list serves the forward pass and the gradients of queries), rows of the blocks that pass
# by, warps of a program, blocks that are loaded ahead: the fastest of a handful on an H200, 1.2 times as fast
# as FlashAttention 2 there, both passes together.
_FORWARD = {"TILE": TILE, "STEP": 64, "num_warps": 4, "num_stages": 3}
_QUERY_GRADIENTS = {**_FORWARD, "num_stages": 2}  # the same tiles
_KEY_GRADIENTS = {"TILE": TILE, "STEP": 64, "num_warps": 4, "num_stages": 2}
_LOG2_E = 1.4426950408889634


@triton.jit
def _scores(q, k_T, scale, positions, keys, MASK: tl.constexpr):
    """Scaled scores in base 2, minus infinity where a key lies behind its query."""
    scores = tl.dot(q, k_T) * scale
    if MASK:
        scores = tl.where(positions[:, None] >= keys[None], scores, float("-inf"))
    return scores


@triton.jit
def _forward_range(
    state, q, key, value, k_stride, v_stride, scale, positions, first, last, bound,
    D: tl.constexpr, STEP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Pass over keys [first, last) of a segment that has `bound` keys for this tile."""
    out, total, highest = state
    dim = tl.arange(0, D)
    for start in range(first, last, STEP):
        keys = start + tl.arange(0, STEP)
        if MASK:
            here = keys < bound
            k_T = tl.load(key + keys[None] * k_stride + dim[:, None], mask=here[None], other=0.0)
            v = tl.load(value + keys[:, None] * v_stride + dim[None], mask=here[:, None], other=0.0)
        else:
            k_T = tl.load(key + keys[None] * k_stride + dim[:, None])
            v = tl.load(value + keys[:, None] * v_stride + dim[None])
        scores = _scores(q, k_T, scale, positions, keys, MASK)
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None])
        highest = higher
    return out, total, highest


@triton.jit(do_not_specialize=["T"])
def _forward(
    query, key, value, out, normalizers, table, q_token, q_head, k_token, k_head, v_token, v_head, scale, T,
    N, GROUP: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    tile, head = table + tl.program_id(0) * 5, tl.program_id(1)
    row, rows, k_start = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2).to(tl.int64)
    position, bound = tl.load(tile + 3), tl.load(tile + 4)
    line, dim = tl.arange(0, TILE), tl.arange(0, D)
    here = (line < rows)[:, None]
    places = (row + line)[:, None] * q_token + head * q_head + dim[None]
    q = tl.load(query + places, mask=here, other=0.0)
    key += k_start * k_token + head // GROUP * k_head
    value += k_start * v_token + head // GROUP * v_head
    positions = position + line
    state = (
        tl.zeros((TILE, D), tl.float32),
        tl.zeros((TILE,), tl.float32),
        tl.full((TILE,), float("-inf"), tl.float32),
    )
    # Keys up to the first query's own are seen by all queries of the tile.
    free = (position + 1) // STEP * STEP
    state = _forward_range(
        state, q, key, value, k_token, v_token, scale, positions, 0, free, bound, D, STEP, False
    )
    state = _forward_range(
        state, q, key, value, k_token, v_token, scale, positions, free, bound, bound, D, STEP, True
    )
    result, total, highest = state
    at = (row + line)[:, None] * (N * D) + head * D + dim[None]
    tl.store(out + at, (result / total[:, None]).to(out.dtype.element_ty), mask=here)
    tl.store(normalizers + head * T + row + line, highest + tl.log2(total), mask=line < rows)


@triton.jit(do_not_specialize=["T"])
def _products(grad, out, sums, T, N, D: tl.constexpr, TILE: tl.constexpr):
    """sums [N, T] = sum over D of grad * out."""
    row, head = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE), tl.program_id(1)
    at = row[:, None] * (N * D) + head * D + tl.arange(0, D)[None]
    here = (row < T)[:, None]
    left = tl.load(grad + at, mask=here, other=0.0).to(tl.float32)
    right = tl.load(out + at, mask=here, other=0.0).to(tl.float32)
    tl.store(sums + head * T + row, tl.sum(left * right, axis=1), mask=row < T)


@triton.jit
def _query_range(
    total, q, grad, normalizer, product, key, value, k_stride, v_stride, scale, positions, first, last, bound,
    D: tl.constexpr, STEP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    dim = tl.arange(0, D)
    for start in range(first, last, STEP):
        keys = start + tl.arange(0, STEP)
        if MASK:
            here = (keys < bound)[None]
            k_T = tl.load(key + keys[None] * k_stride + dim[:, None], mask=here, other=0.0)
            v_T = tl.load(value + keys[None] * v_stride + dim[:, None], mask=here, other=0.0)
        else:
            k_T = tl.load(key + keys[None] * k_stride + dim[:, None])
            v_T = tl.load(value + keys[None] * v_stride + dim[:, None])
        weights = tl.exp2(_scores(q, k_T, scale, positions, keys, MASK) - normalizer[:, None])
        slopes = weights * (tl.dot(grad, v_T) - product[:, None])
        total = tl.dot(slopes.to(k_T.dtype), tl.trans(k_T), total)
    return total


@triton.jit(do_not_specialize=["T"])
def _query_gradients(
    query, key, value, grad, normalizers, products, out, table,
    q_token, q_head, k_token, k_head, v_token, v_head, scale, factor, T, N,
    GROUP: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    tile, head = table + tl.program_id(0) * 5, tl.program_id(1)
    row, rows, k_start = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2).to(tl.int64)
    position, bound = tl.load(tile + 3), tl.load(tile + 4)
    line, dim = tl.arange(0, TILE), tl.arange(0, D)
    here = (line < rows)[:, None]
    q = tl.load(query + (row + line)[:, None] * q_token + head * q_head + dim[None], mask=here, other=0.0)
    at = (row + line)[:, None] * (N * D) + head * D + dim[None]
    gradient = tl.load(grad + at, mask=here, other=0.0)
    normalizer = tl.load(normalizers + head * T + row + line, mask=line < rows, other=0.0)
    product = tl.load(products + head * T + row + line, mask=line < rows, other=0.0)
    key += k_start * k_token + head // GROUP * k_head
    value += k_start * v_token + head // GROUP * v_head
    positions = position + line
    free = (position + 1) // STEP * STEP
    total = _query_range(
        tl.zeros((TILE, D), tl.float32), q, gradient, normalizer, product, key, value, k_token, v_token,
        scale, positions, 0, free, bound, D, STEP, False,
    )  # fmt: skip
    total = _query_range(
        total, q, gradient, normalizer, product, key, value, k_token, v_token, scale,
        positions, free, bound, bound, D, STEP, True,
    )  # fmt: skip
    tl.store(out + at, (total * factor).to(out.dtype.element_ty), mask=here)


@triton.jit
def _key_range(
    state, k, v, query, grad, normalizers, products, q_stride, g_stride, scale, offset, first, last, count,
    D: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Pass over queries [first, last) of the `count` that see a tile of keys."""
    of_keys, of_values = state
    dim, keys = tl.arange(0, D), tl.arange(0, TILE)
    for start in range(first, last, STEP):
        line = start + tl.arange(0, STEP)
        here = line < count
        q_T = tl.load(query + line[None] * q_stride + dim[:, None], mask=here[None], other=0.0)
        gradient = tl.load(grad + line[:, None] * g_stride + dim[None], mask=here[:, None], other=0.0)
        normalizer = tl.load(normalizers + line, mask=here, other=float("inf"))
        product = tl.load(products + line, mask=here, other=0.0)
        # No query beyond the last one: its weights are 2 ** -inf.
        weights = tl.exp2(tl.dot(k, q_T) * scale - normalizer[None])
        if MASK:
            weights = tl.where(keys[:, None] <= (offset + line)[None], weights, 0.0)
        of_values = tl.dot(weights.to(gradient.dtype), gradient, of_values)
        slopes = weights * (tl.dot(v, tl.trans(gradient)) - product[None])
        of_keys = tl.dot(slopes.to(q_T.dtype), tl.trans(q_T), of_keys)
    return of_keys, of_values


@triton.jit(do_not_specialize=["T"])
def _key_gradients(
    query, key, value, grad, normalizers, products, key_out, value_out, table,
    q_token, q_head, k_token, k_head, v_token, v_head, scale, factor, T, N,
    GROUP: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    tile, head = table + tl.program_id(0) * 5, tl.program_id(1)
    row, rows, q_start = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2).to(tl.int64)
    count, offset = tl.load(tile + 3), tl.load(tile + 4)
    line, dim = tl.arange(0, TILE), tl.arange(0, D)
    here = (line < rows)[:, None]
    k = tl.load(
        key + (row + line)[:, None] * k_token + head // GROUP * k_head + dim[None], mask=here, other=0.0
    )
    v = tl.load(
        value + (row + line)[:, None] * v_token + head // GROUP * v_head + dim[None], mask=here, other=0.0
    )
    query += q_start * q_token + head * q_head
    grad += q_start * (N * D) + head * D
    normalizers += head * T + q_start
    products += head * T + q_start
    state = (tl.zeros((TILE, D), tl.float32), tl.zeros((TILE, D), tl.float32))
    # Queries behind these see the whole tile; the last block may be short.
    ragged = tl.minimum(tl.cdiv(tl.maximum(TILE - 1 - offset, 0), STEP) * STEP, tl.cdiv(count, STEP) * STEP)
    state = _key_range(
        state, k, v, query, grad, normalizers, products, q_token, N * D, scale, offset, 0, ragged, count,
        D, TILE, STEP, True,
    )  # fmt: skip
    state = _key_range(
        state, k, v, query, grad, normalizers, products, q_token, N * D, scale, offset, ragged, count, count,
        D, TILE, STEP, False,
    )  # fmt: skip
    of_keys, of_values = state
    at = (row + line)[:, None] * (N * D) + head * D + dim[None]
    tl.store(key_out + at, (of_keys * factor).to(key_out.dtype.element_ty), mask=here)
    tl.store(value_out + at, of_values.to(value_out.dtype.element_ty), mask=here)


def forward(
    q_TND: Tensor, k_KGD: Tensor, v_KGD: Tensor, table: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """[T, N, D] queries, [K, G, D] keys and values, whose last dimension is contiguous, and the tiles of
    queries on the device -> [T, N, D] contiguous, and logarithms of the sums of exponentials, base 2,
    float32 [N, T].
    """
    tokens, heads, dim = q_TND.shape
    out = q_TND.new_empty(q_TND.shape)
    normalizers = torch.empty(heads, tokens, dtype=torch.float32, device=q_TND.device)
    _forward[(len(table), heads)](
        q_TND, k_KGD, v_KGD, out, normalizers, table, *_strides(q_TND, k_KGD, v_KGD), scale * _LOG2_E, tokens,
        heads, GROUP=heads // k_KGD.shape[1], D=dim, **_FORWARD,
    )  # fmt: skip
    return out, normalizers


def backward(
    grad: Tensor,
    q_TND: Tensor,
    k_KGD: Tensor,
    v_KGD: Tensor,
    out: Tensor,
    normalizers: Tensor,
    query_tiles: Tensor,
    key_tiles: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `forward` took and returned, and the gradient of its output, contiguous -> those of its inputs."""
    (tokens, heads, dim), (count, groups, _) = q_TND.shape, k_KGD.shape
    products = torch.empty_like(normalizers)
    _products[(triton.cdiv(tokens, 64), heads)](grad, out, products, tokens, heads, D=dim, TILE=64)
    of_queries = torch.empty_like(out)
    # Every head has gradients of its own for the keys and values of its group, added up behind.
    of_keys, of_values = (k_KGD.new_empty(count, heads, dim) for _ in range(2))
    strides = _strides(q_TND, k_KGD, v_KGD)
    _key_gradients[(len(key_tiles), heads)](
        q_TND, k_KGD, v_KGD, grad, normalizers, products, of_keys, of_values, key_tiles, *strides,
        scale * _LOG2_E, scale, tokens, heads,
        GROUP=heads // groups, D=dim, **_KEY_GRADIENTS,
    )  # fmt: skip
    _query_gradients[(len(query_tiles), heads)](
        q_TND, k_KGD, v_KGD, grad, normalizers, products, of_queries, query_tiles, *strides,
        scale * _LOG2_E, scale, tokens, heads,
        GROUP=heads // groups, D=dim, **_QUERY_GRADIENTS,
    )  # fmt: skip
    if groups == heads:
        return of_queries, of_keys, of_values
    shared = (count, groups, heads // groups, dim)
    return of_queries, of_keys.view(shared).sum(2), of_values.view(shared).sum(2)


def _strides(*tensors: Tensor) -> list[int]:
    return [tensor.stride(axis) for tensor in tensors for axis in (0, 1)]
