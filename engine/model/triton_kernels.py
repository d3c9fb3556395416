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
# Warps of the same of heads: as many as registers allow at once on a GPU of 132 multiprocessors. More would
# be a second round, in which most of them have nothing to do.
_HEADS_WARPS = {"norms": 132 * 20, "bias": 132 * 16, "neither": 132 * 32}
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
    x, weight, grad, residual, scales, out, sums, rows, H,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WEIGHT: tl.constexpr, RESIDUAL: tl.constexpr,
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
        gradient = (gradient - value * mean) * scale
        if RESIDUAL:
            gradient += tl.load(residual + place, mask=here, other=0.0).to(tl.float32)
        tl.store(out + place, gradient.to(out.dtype.element_ty), mask=here)
    if WEIGHT:
        tl.store(sums + tl.program_id(0) * H + column, total, mask=column < H)


@triton.jit(do_not_specialize=["rows"])
def _add_column_sums(sums, total, rows, stride, H, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    found = tl.load(total + column, mask=column < H, other=0.0)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        here = (row < rows)[:, None] & (column < H)[None]
        found += tl.sum(tl.load(sums + row[:, None] * stride + column[None], mask=here, other=0.0), axis=0)
    tl.store(total + column, found, mask=column < H)


@triton.jit
def _swiglu_forward(x, weights, out, F, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < F
    gate = tl.load(x + row * 2 * F + column, mask=here).to(tl.float32)
    up = tl.load(x + row * 2 * F + F + column, mask=here).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    if WEIGHTED:
        value *= tl.load(weights + row)
    tl.store(out + row * F + column, value.to(out.dtype.element_ty), mask=here)


@triton.jit
def _swiglu_backward(x, grad, out, active, F, BLOCK: tl.constexpr, ACTIVE: tl.constexpr):
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
    if ACTIVE:
        tl.store(active + row * F + column, (gate * share * up).to(dtype), mask=here)


@triton.jit
def _weighted_swiglu_backward(x, weights, grad, of_x, of_weights, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, F, BLOCK):
        column = start + tl.arange(0, BLOCK)
        here = column < F
        gate = tl.load(x + row * 2 * F + column, mask=here, other=0.0).to(tl.float32)
        up = tl.load(x + row * 2 * F + F + column, mask=here, other=0.0).to(tl.float32)
        gradient = tl.load(grad + row * F + column, mask=here, other=0.0).to(tl.float32)
        share = tl.sigmoid(gate)
        total += gradient * gate * share * up
        gradient *= weight
        of_gate = gradient * up * share * (1 + gate * (1 - share))
        tl.store(of_x + row * 2 * F + column, of_gate.to(of_x.dtype.element_ty), mask=here)
        tl.store(
            of_x + row * 2 * F + F + column, (gradient * gate * share).to(of_x.dtype.element_ty), mask=here
        )
    tl.store(of_weights + row, tl.sum(total))


@triton.jit
def _angles(cos, sin, token, here, HALF: tl.constexpr):
    """Of each token, [tokens, HALF]: both halves of a head have the same."""
    place = token * 2 * HALF + tl.arange(0, HALF)[None]
    return (
        tl.load(cos + place, mask=here, other=0.0).to(tl.float32),
        tl.load(sin + place, mask=here, other=0.0).to(tl.float32),
    )


@triton.jit
def _turned(first, second, cos, sin):
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _head_weight(weight, HALF: tl.constexpr):
    pair = tl.arange(0, HALF)[None]
    return tl.load(weight + pair).to(tl.float32), tl.load(weight + pair + HALF).to(tl.float32)


@triton.jit
def _heads_forward_part(
    x, bias, weight, out, slot, head, here, angles, eps,
    HALF: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """Heads that stand at `slot` in a token's row become its heads `head`."""
    pair = tl.arange(0, HALF)[None]
    place = slot * 2 * HALF + pair
    first = tl.load(x + place, mask=here, other=0.0).to(tl.float32)
    second = tl.load(x + place + HALF, mask=here, other=0.0).to(tl.float32)
    if BIAS:
        first += tl.load(bias + place, mask=here, other=0.0).to(tl.float32)
        second += tl.load(bias + place + HALF, mask=here, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        first_weight, second_weight = _head_weight(weight, HALF)
        first, second = first * scale * first_weight, second * scale * second_weight
    if TURN:
        turn_cos, turn_sin = angles
        first, second = _turned(first, second, turn_cos, turn_sin)
    target = out + head * 2 * HALF + pair
    dtype = out.dtype.element_ty
    tl.store(target, first.to(dtype), mask=here)
    tl.store(target + HALF, second.to(dtype), mask=here)


@triton.jit
def _heads_forward(
    mixed, bias, q_weight, k_weight, query, key, value, cos, sin, eps, G,
    SHARE: tl.constexpr, HALF: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    x, size = mixed + token * G * (SHARE + 2) * 2 * HALF, G * 2 * HALF
    angles = _angles(cos, sin, token, True, HALF)
    head, group = tl.arange(0, Q_HEADS)[:, None], tl.arange(0, K_HEADS)[:, None]
    slot, here = head // SHARE * (SHARE + 2) + head % SHARE, head < G * SHARE
    _heads_forward_part(
        x, bias, q_weight, query + token * SHARE * size, slot, head, here, angles, eps, HALF, BIAS, NORM, True
    )
    slot, here = group * (SHARE + 2) + SHARE, group < G
    _heads_forward_part(
        x, bias, k_weight, key + token * size, slot, group, here, angles, eps, HALF, BIAS, NORM, True
    )
    _heads_forward_part(
        x, bias, k_weight, value + token * size, slot + 1, group, here, angles, eps, HALF, BIAS, False, False
    )


@triton.jit
def _heads_backward_part(
    grad, x, weight, out, sums, bias_sums, cos, sin, eps, T, G,
    SHARE: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, EACH: tl.constexpr, PLACE: tl.constexpr,
    HEADS: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, TURN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Heads of one kind: EACH in a group, from its PLACE on; HEADS in a token, with what pads them. ROWS are
    worked on at once, each by lanes of one warp: what warps have summed up is added after the loop.
    """
    pair, row = tl.arange(0, HALF)[None], tl.arange(0, ROWS)[:, None]
    nothing = tl.zeros((ROWS, HALF), tl.float32)
    first_total, second_total, first_bias, second_bias = nothing, nothing, nothing, nothing
    if NORM:
        first_weight, second_weight = _head_weight(weight, HALF)
    for start in tl.range(tl.program_id(0) * ROWS, T * HEADS, tl.num_programs(0) * ROWS, num_stages=STAGES):
        token, head = (start + row) // HEADS, (start + row) % HEADS
        here, token = (token < T) & (head < G * EACH), token.to(tl.int64)
        slot = (token * G + head // EACH) * (SHARE + 2) + PLACE + head % EACH
        source, place = grad + (token * G * EACH + head) * 2 * HALF + pair, slot * 2 * HALF + pair
        first = tl.load(source, mask=here, other=0.0).to(tl.float32)
        second = tl.load(source + HALF, mask=here, other=0.0).to(tl.float32)
        if NORM:
            first_x = tl.load(x + place, mask=here, other=0.0).to(tl.float32)
            second_x = tl.load(x + place + HALF, mask=here, other=0.0).to(tl.float32)
        if TURN:
            turn_cos, turn_sin = _angles(cos, sin, token, here, HALF)
            first, second = _turned(first, second, turn_cos, -turn_sin)
        if NORM:
            squares = tl.sum(first_x * first_x + second_x * second_x, axis=1)
            scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
            first_x, second_x = first_x * scale, second_x * scale
            first_total, second_total = first_total + first * first_x, second_total + second * second_x
            first, second = first * first_weight, second * second_weight
            mean = tl.sum(first * first_x + second * second_x, axis=1)[:, None] / (2 * HALF)
            first, second = (first - first_x * mean) * scale, (second - second_x * mean) * scale
        if BIAS:
            first_bias, second_bias = first_bias + first, second_bias + second
        dtype = out.dtype.element_ty
        tl.store(out + place, first.to(dtype), mask=here)
        tl.store(out + place + HALF, second.to(dtype), mask=here)
    if NORM:
        at = sums + tl.program_id(0) * 4 * HALF + tl.arange(0, HALF)
        tl.store(at, tl.sum(first_total, axis=0))
        tl.store(at + HALF, tl.sum(second_total, axis=0))
    if BIAS:
        head = tl.arange(0, HEADS)[:, None]
        slot = tl.program_id(0) * G * (SHARE + 2) + head // EACH * (SHARE + 2) + PLACE + head % EACH
        at, here = bias_sums + slot * 2 * HALF + pair, head < G * EACH
        tl.store(at, _sum_tokens(first_bias, ROWS, HEADS, HALF), mask=here)
        tl.store(at + HALF, _sum_tokens(second_bias, ROWS, HEADS, HALF), mask=here)


@triton.jit
def _sum_tokens(x, ROWS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    return tl.sum(tl.reshape(x, (ROWS // HEADS, HEADS, HALF)), axis=0)


@triton.jit(do_not_specialize=["T"])
def _heads_backward(
    of_query, of_key, of_value, mixed, q_weight, k_weight, out, sums, bias_sums, cos, sin, eps, T, G,
    SHARE: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    _heads_backward_part(
        of_query, mixed, q_weight, out, sums, bias_sums, cos, sin, eps, T, G,
        SHARE, HALF, ROWS, SHARE, 0, Q_HEADS, BIAS, NORM, True, STAGES,
    )  # fmt: skip
    _heads_backward_part(
        of_key, mixed, k_weight, out, sums + 2 * HALF, bias_sums, cos, sin, eps, T, G,
        SHARE, HALF, ROWS, 1, SHARE, K_HEADS, BIAS, NORM, True, STAGES,
    )  # fmt: skip
    _heads_backward_part(
        of_value, mixed, k_weight, out, sums, bias_sums, cos, sin, eps, T, G,
        SHARE, HALF, ROWS, 1, SHARE + 1, K_HEADS, BIAS, False, False, STAGES,
    )  # fmt: skip


@triton.jit
def _logit_statistics(logits, places, maxima, sums, picked, V, LANES: tl.constexpr):
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * V
    place = tl.load(places + row)
    # Each lane has a maximum and a sum of its own, joined at the end. It brings them up to date for eight
    # logits at once: what takes the time here is instructions.
    lane, eight = tl.arange(0, LANES)[:, None] * 8, tl.arange(0, 8)[None]
    highest = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    for first in range(0, V, LANES * 8):
        column = first + lane + eight
        value = tl.load(start + column, mask=column < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(value, axis=1))
        # A lane that has seen nothing yet has no finite maximum to subtract.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - base) + tl.sum(tl.exp(value - base[:, None]), axis=1)
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


@triton.jit
def _sum_rows(x, rows, bounds, out, H, BLOCK: tl.constexpr):
    owner = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < H
    total = tl.zeros((BLOCK,), tl.float32)
    for place in range(tl.load(bounds + owner), tl.load(bounds + owner + 1)):
        row = tl.load(rows + place)
        total += tl.load(x + row * H + column, mask=here, other=0.0).to(tl.float32)
    tl.store(out + owner * H + column, total.to(out.dtype.element_ty), mask=here)


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
    grad: Tensor, x: Tensor, weight: Tensor, scales: Tensor, residual: Tensor | None, *, wants_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradient of x, to which `residual` is added, in its dtype, and where it is wanted that of the
    weight in parts, float32 [parts, H], which add up to it; all contiguous.
    """
    columns = x.shape[-1]
    rows, out = x.numel() // columns, torch.empty_like(x)
    width = triton.next_power_of_2(columns)
    height = max(1, _TILE // width)
    programs = max(1, min(_NORM_PROGRAMS, triton.cdiv(rows, height)))
    sums = torch.empty(programs if wants_weight else 0, columns, dtype=torch.float32, device=x.device)
    _norm_backward[(programs,)](
        x, weight, grad, residual, scales, out, sums, rows, columns,
        ROWS=height, COLUMNS=width, WEIGHT=wants_weight, RESIDUAL=residual is not None, num_warps=8,
    )  # fmt: skip
    return out, sums if wants_weight else None


def add_column_sums(sums: Tensor, total: Tensor) -> None:
    """total [H] += the sum of the rows of `sums` [parts, H], whose rows are contiguous; float32."""
    rows, columns = sums.shape
    if rows:
        _add_column_sums[(triton.cdiv(columns, 16),)](
            sums, total, rows, sums.stride(0), columns, ROWS=1024, COLUMNS=16, num_warps=8
        )


def swiglu_forward(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Contiguous [..., 2 F], gate before up -> silu(gate) * up, [..., F], each row times its weight."""
    width = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width)
    rows = out.numel() // width
    if rows:
        grid = (rows, triton.cdiv(width, 1024))
        _swiglu_forward[grid](x, weights, out, width, BLOCK=1024, WEIGHTED=weights is not None)
    return out


def weighted_swiglu_backward(grad: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous [N, F], [N, 2 F] and float32 [N] -> the gradients of x and of the weights."""
    of_x, of_weights = torch.empty_like(x), torch.empty_like(weights)
    if len(x):
        _weighted_swiglu_backward[(len(x),)](x, weights, grad, of_x, of_weights, grad.shape[1], BLOCK=1024)
    return of_x, of_weights


def swiglu_backward(grad: Tensor, x: Tensor, *, wants_active: bool) -> tuple[Tensor, Tensor | None]:
    """Contiguous [..., F] and [..., 2 F] -> the gradient of x, and what `swiglu_forward` makes of it."""
    width, out = x.shape[-1] // 2, torch.empty_like(x)
    active = torch.empty_like(grad) if wants_active else None
    rows = grad.numel() // width
    if rows:
        _swiglu_backward[(rows, triton.cdiv(width, 1024))](
            x, grad, out, active, width, BLOCK=1024, ACTIVE=wants_active
        )
    return out, active


def heads_forward(
    mixed: Tensor,
    groups: int,
    cos: Tensor,
    sin: Tensor,
    bias: Tensor | None,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous [T, width], as engine.model.fused.split_heads describes it; cos and sin contiguous
    [T, 1, D], D a power of 2; a bias [width]; weights [D] of the norms of queries and keys -> [T, N, D] and
    twice [T, G, D], contiguous.
    """
    tokens, dim = len(mixed), cos.shape[-1]
    share = mixed.shape[-1] // (groups * dim) - 2
    query, key, value = (mixed.new_empty(tokens, n, dim) for n in (groups * share, groups, groups))
    if tokens:
        _heads_forward[(tokens,)](
            mixed, bias, *(norms or (None, None)), query, key, value, cos, sin, eps, groups,
            **_head_sizes(groups, share, dim), BIAS=bias is not None, NORM=norms is not None,
            num_warps=4 if norms is None else 8,
        )  # fmt: skip
    return query, key, value


def heads_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    mixed: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    *,
    wants_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of queries, keys and values, contiguous, and with norms what `heads_forward` took -> that of
    [T, width]; where it is wanted that of the bias in parts, float32 [parts, width], which add up to it; and
    with norms those of both weights, [parts, 2, D]. Not both: norms would need the product with its bias.
    """
    assert norms is None or not wants_bias
    (tokens, heads, dim), groups = grads[0].shape, grads[1].shape[1]
    out = grads[0].new_empty(tokens, (heads + 2 * groups) * dim)
    share = heads // groups
    sizes = _head_sizes(groups, share, dim)
    # Sums of biases are kept per head, which has the same rows of every block then. Else rows are those of
    # heads, one after the other.
    counts = (sizes["Q_HEADS"], sizes["K_HEADS"]) if wants_bias else (heads, groups)
    least = sizes["Q_HEADS"] if wants_bias else 1
    # A thread has 16 bytes of either half of one row: the compiler lets what more it has wait for the first.
    # With sums of biases it has two rows, which makes half as many sums, and reads the next two ahead.
    kind = "norms" if norms is not None else "bias" if wants_bias else "neither"
    size = 1024 if kind == "bias" else 512
    warps = min(16, max(4 if kind == "norms" else 8, least * dim // size))
    rows = max(least, warps * size // dim)
    programs = min(triton.cdiv(tokens * counts[0], rows), _HEADS_WARPS[kind] // warps)
    sums, bias_sums = (
        torch.empty(programs if wanted else 0, *shape, dtype=torch.float32, device=out.device)
        for wanted, shape in ((norms is not None, (2, dim)), (wants_bias, out.shape[1:]))
    )
    if tokens:
        _heads_backward[(programs,)](
            *grads, out if mixed is None else mixed, *(norms or (None, None)), out, sums, bias_sums, cos, sin,
            eps, tokens, groups, SHARE=share, HALF=dim // 2, ROWS=rows, Q_HEADS=counts[0], K_HEADS=counts[1],
            BIAS=wants_bias, NORM=norms is not None, STAGES=2 if kind == "bias" else 1, num_warps=warps,
        )  # fmt: skip
    return out, bias_sums if wants_bias else None, sums if norms is not None else None


def _head_sizes(groups: int, share: int, dim: int) -> dict[str, int]:
    blocks = (triton.next_power_of_2(n) for n in (groups * share, groups))
    return {"SHARE": share, "HALF": dim // 2, **dict(zip(("Q_HEADS", "K_HEADS"), blocks, strict=True))}


def sum_rows(x_NH: Tensor, rows: Tensor, bounds: Tensor) -> Tensor:
    """As engine.model.fused.sum_rows."""
    count, width = len(bounds) - 1, x_NH.shape[1]
    out = x_NH.new_empty(count, width)
    block = min(triton.next_power_of_2(width), _TILE)
    if count:
        grid = (count, triton.cdiv(width, block))
        _sum_rows[grid](x_NH, rows, bounds, out, width, BLOCK=block, num_warps=max(1, min(8, block // 256)))
    return out


def logit_statistics(logits_MV: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As engine.model.head wants them, float32 [M]."""
    rows, width = logits_MV.shape
    maxima, sums, picked = (torch.empty(rows, device=logits_MV.device) for _ in range(3))
    if rows:
        _logit_statistics[(rows,)](logits_MV, places, maxima, sums, picked, width, LANES=512, num_warps=8)
    return maxima, sums, picked


def logit_gradients(logits_MV: Tensor, places: Tensor, normalizer: Tensor, factor: Tensor) -> None:
    """Overwrite logits by (softmax - one-hot) * factor."""
    rows, width = logits_MV.shape
    if rows:
        grid = (rows, triton.cdiv(width, 4096))
        _logit_gradients[grid](logits_MV, places, normalizer, factor, width, BLOCK=4096, num_warps=8)
