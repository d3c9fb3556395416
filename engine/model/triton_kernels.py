"""GPU kernels of operations whose time is memory traffic, in Triton, which comes with torch. Import only
where kernels can be compiled; `engine.model.fused` chooses between them and plain torch.

Arithmetic is float32; each value is read once, but for logits, and each result written once. Suffixes: T
tokens, M rows, H columns, N heads, D head dimension, F width, V columns of logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs that share the rows of a norm's backward pass, each with a sum of its own of the weight's gradient.
_NORM_PROGRAMS = 528
# Elements that a program works on at once.
_TILE = 4096


@triton.jit(do_not_specialize=["rows"])
def _norm_forward(x, weight, out, scales, rows, eps, H, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    here = (row < rows)[:, None] & (column < H)[None]
    place = row.to(tl.int64)[:, None] * H + column[None]
    value = tl.load(x + place, mask=here, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / H + eps)
    factor = tl.load(weight + column, mask=column < H, other=0.0).to(tl.float32)
    tl.store(out + place, (value * scale[:, None] * factor[None]).to(out.dtype.element_ty), mask=here)
    tl.store(scales + row, scale, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def _norm_backward(
    x, weight, grad, scales, out, sums, rows, H,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    factor = tl.load(weight + column, mask=column < H, other=0.0).to(tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        here = (row < rows)[:, None] & (column < H)[None]
        place = row.to(tl.int64)[:, None] * H + column[None]
        scale = tl.load(scales + row, mask=row < rows, other=0.0)[:, None]
        value = tl.load(x + place, mask=here, other=0.0).to(tl.float32) * scale
        gradient = tl.load(grad + place, mask=here, other=0.0).to(tl.float32)
        if WEIGHT:
            total += tl.sum(value * gradient, axis=0)
        gradient *= factor[None]
        mean = tl.sum(value * gradient, axis=1)[:, None] / H
        tl.store(out + place, ((gradient - value * mean) * scale).to(out.dtype.element_ty), mask=here)
    if WEIGHT:
        tl.store(sums + tl.program_id(0) * H + column, total, mask=column < H)


@triton.jit
def _swiglu_forward(x, out, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < F
    gate = tl.load(x + row * 2 * F + column, mask=here).to(tl.float32)
    up = tl.load(x + row * 2 * F + F + column, mask=here).to(tl.float32)
    tl.store(out + row * F + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=here)


@triton.jit
def _swiglu_backward(x, grad, out, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < F
    gate = tl.load(x + row * 2 * F + column, mask=here).to(tl.float32)
    up = tl.load(x + row * 2 * F + F + column, mask=here).to(tl.float32)
    gradient = tl.load(grad + row * F + column, mask=here).to(tl.float32)
    share = tl.sigmoid(gate)
    of_gate = gradient * up * share * (1 + gate * (1 - share))
    dtype = out.dtype.element_ty
    tl.store(out + row * 2 * F + column, of_gate.to(dtype), mask=here)
    tl.store(out + row * 2 * F + F + column, (gradient * gate * share).to(dtype), mask=here)


@triton.jit
def _rotate_heads(x, out, token, first_cos, second_cos, first_sin, second_sin, stride_token, stride_head,
                  N, HALF: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    head, pair = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None]
    here = head < N
    start = x + token * stride_token + head * stride_head + pair
    first = tl.load(start, mask=here).to(tl.float32)
    second = tl.load(start + HALF, mask=here).to(tl.float32)
    target = out + token * N * 2 * HALF + head * 2 * HALF + pair
    dtype = out.dtype.element_ty
    tl.store(target, (first * first_cos - second * first_sin).to(dtype), mask=here)
    tl.store(target + HALF, (second * second_cos + first * second_sin).to(dtype), mask=here)


@triton.jit
def _rotary(query, key, query_out, key_out, cos, sin, sign, q_token, q_head, k_token, k_head, N, G,
            HALF: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    place = token * 2 * HALF + tl.arange(0, HALF)[None]
    first_cos = tl.load(cos + place).to(tl.float32)
    second_cos = tl.load(cos + place + HALF).to(tl.float32)
    first_sin = tl.load(sin + place).to(tl.float32) * sign
    second_sin = tl.load(sin + place + HALF).to(tl.float32) * sign
    _rotate_heads(query, query_out, token, first_cos, second_cos, first_sin, second_sin, q_token, q_head,
                  N, HALF, Q_HEADS)  # fmt: skip
    _rotate_heads(key, key_out, token, first_cos, second_cos, first_sin, second_sin, k_token, k_head,
                  G, HALF, K_HEADS)  # fmt: skip


@triton.jit
def _logit_statistics(logits, places, maxima, sums, picked, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * V
    place = tl.load(places + row)
    # Each lane keeps a maximum and a sum of its own, joined at the end.
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, V, BLOCK):
        column = first + tl.arange(0, BLOCK)
        value = tl.load(start + column, mask=column < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, value)
        # A lane that has seen nothing yet has no finite maximum to subtract.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - base) + tl.exp(value - base)
        highest = higher
    best = tl.max(highest, axis=0)
    tl.store(maxima + row, best)
    tl.store(sums + row, tl.sum(total * tl.exp(highest - best), axis=0))
    inside = (place >= 0) & (place < V)
    tl.store(picked + row, tl.load(start + place, mask=inside, other=0.0).to(tl.float32))


@triton.jit
def _logit_gradients(logits, places, normalizer, factor, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < V
    at = logits + row.to(tl.int64) * V + column
    probability = tl.exp(tl.load(at, mask=here).to(tl.float32) - tl.load(normalizer + row))
    gradient = tl.where(column == tl.load(places + row), probability - 1.0, probability)
    tl.store(at, (gradient * tl.load(factor)).to(logits.dtype.element_ty), mask=here)


def norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Contiguous [..., H] and [H] -> x / rms(x) * weight in the dtype of x, and 1 / rms float32 [M]."""
    columns = x.shape[-1]
    rows = x.numel() // columns
    out, scales = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        width = triton.next_power_of_2(columns)
        height = max(1, _TILE // width)
        grid = (triton.cdiv(rows, height),)
        _norm_forward[grid](
            x, weight, out, scales, rows, eps, columns, ROWS=height, COLUMNS=width, num_warps=8
        )
    return out, scales


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scales: Tensor, *, wants_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and, where it is wanted, of the weight, in their dtypes; all contiguous."""
    columns = x.shape[-1]
    rows, out = x.numel() // columns, torch.empty_like(x)
    width = triton.next_power_of_2(columns)
    height = max(1, _TILE // width)
    programs = max(1, min(_NORM_PROGRAMS, triton.cdiv(rows, height)))
    sums = torch.empty(programs if wants_weight else 0, columns, dtype=torch.float32, device=x.device)
    _norm_backward[(programs,)](
        x, weight, grad, scales, out, sums, rows, columns,
        ROWS=height, COLUMNS=width, WEIGHT=wants_weight, num_warps=8,
    )  # fmt: skip
    return out, sums.sum(0).to(weight.dtype) if wants_weight else None


def swiglu_forward(x: Tensor) -> Tensor:
    """Contiguous [..., 2 F], gate before up -> silu(gate) * up, [..., F]."""
    width = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width)
    rows = out.numel() // width
    if rows:
        _swiglu_forward[(rows, triton.cdiv(width, 1024))](x, out, width, BLOCK=1024)
    return out


def swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Contiguous [..., F] and [..., 2 F] -> the gradient of x."""
    width, out = x.shape[-1] // 2, torch.empty_like(x)
    rows = grad.numel() // width
    if rows:
        _swiglu_backward[(rows, triton.cdiv(width, 1024))](x, grad, out, width, BLOCK=1024)
    return out


def rotary(
    query_TND: Tensor, key_TGD: Tensor, cos: Tensor, sin: Tensor, *, backward: bool
) -> tuple[Tensor, Tensor]:
    """[T, N, D] and [T, G, D] whose last dimension is contiguous, D a power of 2, and [T, 1, D] contiguous ->
    both rotated, contiguous; `backward` by the negative angle.
    """
    (tokens, heads, dim), groups = query_TND.shape, key_TGD.shape[1]
    query_out, key_out = (x.new_empty(x.shape) for x in (query_TND, key_TGD))
    if tokens:
        _rotary[(tokens,)](
            query_TND, key_TGD, query_out, key_out, cos, sin, -1.0 if backward else 1.0,
            query_TND.stride(0), query_TND.stride(1), key_TGD.stride(0), key_TGD.stride(1), heads, groups,
            HALF=dim // 2, Q_HEADS=triton.next_power_of_2(heads), K_HEADS=triton.next_power_of_2(groups),
        )  # fmt: skip
    return query_out, key_out


def logit_statistics(logits_MV: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As engine.model.head wants them, float32 [M]."""
    rows, width = logits_MV.shape
    maxima, sums, picked = (torch.empty(rows, device=logits_MV.device) for _ in range(3))
    if rows:
        _logit_statistics[(rows,)](logits_MV, places, maxima, sums, picked, width, BLOCK=4096, num_warps=8)
    return maxima, sums, picked


def logit_gradients(logits_MV: Tensor, places: Tensor, normalizer: Tensor, factor: Tensor) -> None:
    """Overwrite logits by (softmax - one-hot) * factor."""
    rows, width = logits_MV.shape
    if rows:
        grid = (rows, triton.cdiv(width, 4096))
        _logit_gradients[grid](logits_MV, places, normalizer, factor, width, BLOCK=4096, num_warps=8)
