"""What the Triton kernels must compute, checked against the formulas in fp64: on a GPU, or by Triton's
interpreter on a CPU (`TRITON_INTERPRET=1 python -m tests.model.kernels`).

Kernels are called as they are, without what chooses between them and plain torch.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from unittest import mock

import torch
from torch import Tensor

from engine.model.attention import list_tiles

# Relative norm of the error: results are rounded once, to 8 bits in bf16.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
EPSILON = 1e-6


def relative(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


def assert_close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """`found` has the shape of `wanted` and `dtype`, and differs by no more than that explains."""
    assert found.shape == wanted.shape
    assert found.dtype == dtype
    error = relative(found, wanted)
    assert error <= BOUNDS[dtype], f"relative error {error:.2e} in {dtype}"


def numbers(*shape: int, like: Tensor, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Normal numbers with the dtype and the device of `like`."""
    generator = torch.Generator(like.device).manual_seed(seed)
    made = torch.randn(*shape, generator=generator, device=like.device, dtype=torch.float32)
    return (made * scale).to(like.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding in fp64, by its definition: pair (i, i + D/2) as a complex number."""
    first, second = x.double().chunk(2, dim=-1)
    (c, _), (s, _) = (table.double().chunk(2, dim=-1) for table in (cos, sin))
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1)


def tables(tokens: int, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, D] of positions that begin again in the middle."""
    positions = torch.arange(tokens, device=like.device) % max(tokens // 2, 1)
    frequencies = 10000.0 ** -(torch.arange(0, dim, 2, device=like.device).float() / dim)
    angles = (positions[:, None] * frequencies[None]).repeat(1, 2)[:, None]
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def assert_sums(parts: Tensor | None, wanted: Tensor) -> None:
    """Parts of a gradient, [parts, n], add up to it, on top of what Megatron's buffer has."""
    from engine.model.gradients import give_sums

    assert parts is not None
    assert parts.shape[1:] == wanted.shape
    total = numbers(*wanted.shape, like=parts, seed=8)
    truth = total.double() + wanted
    weight = torch.empty(wanted.shape, device=parts.device)
    weight.main_grad = total
    give_sums(weight, parts)
    assert weight.grad_added_to_main_grad
    assert_close(total, truth, torch.float32)
    assert_close(give_sums(torch.empty_like(weight), parts), wanted, torch.float32)


def check_norm(like: Tensor, shape: Sequence[int]) -> None:
    """Values and both gradients; without the weight's where nobody wants it."""
    import engine.model.triton_kernels as kernels

    x, grad = numbers(*shape, like=like, scale=3.0), numbers(*shape, like=like, seed=1)
    weight = 1 + numbers(shape[-1], like=like, scale=0.3, seed=2)
    wide = [tensor.double().requires_grad_() for tensor in (x, weight)]
    scales = (wide[0].square().mean(-1, keepdim=True) + EPSILON).rsqrt()
    wanted = wide[0] * scales * wide[1]
    of_x, of_weight = torch.autograd.grad(wanted, wide, grad.double())

    out, kept = kernels.norm_forward(x, weight, EPSILON)
    assert_close(out, wanted, like.dtype)
    assert_close(kept, scales.flatten(), torch.float32)
    found_x, parts = kernels.norm_backward(grad, x, weight, kept, None, wants_weight=True)
    assert_close(found_x, of_x, like.dtype)
    assert_sums(parts, of_weight)
    frozen_x, nothing = kernels.norm_backward(grad, x, weight, kept, None, wants_weight=False)
    assert nothing is None
    assert torch.equal(frozen_x, found_x)
    residual = numbers(*shape, like=like, seed=3)
    both, again = kernels.norm_backward(grad, x, weight, kept, residual, wants_weight=True)
    assert_close(both, of_x + residual.double(), like.dtype)
    assert again is not None
    assert torch.equal(again, parts)


def check_sum_rows(like: Tensor, owners: int, width: int, most: int) -> None:
    """Every owner has 0 to `most` rows, which stand in any order."""
    import engine.model.triton_kernels as kernels

    generator = torch.Generator(like.device).manual_seed(5)
    counts = torch.randint(0, most + 1, (owners,), generator=generator, device=like.device)
    bounds = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    total = int(bounds[-1])
    rows = torch.randperm(total, generator=generator, device=like.device)
    x = numbers(total, width, like=like)
    owner = torch.arange(owners, device=like.device).repeat_interleave(counts)
    wanted = x.new_zeros(owners, width, dtype=torch.float64).index_add_(0, owner, x[rows].double())
    assert_close(kernels.sum_rows(x, rows, bounds), wanted, like.dtype)


def check_swiglu(like: Tensor, shape: Sequence[int]) -> None:
    """`shape` is that of the result."""
    import engine.model.triton_kernels as kernels

    x = numbers(*shape[:-1], 2 * shape[-1], like=like, scale=2.0)
    grad = numbers(*shape, like=like, seed=1)
    wide = x.double().requires_grad_()
    gate, up = wide.chunk(2, dim=-1)
    wanted = gate / (1 + (-gate).exp()) * up
    (of_x,) = torch.autograd.grad(wanted, wide, grad.double())
    assert_close(kernels.swiglu_forward(x), wanted, like.dtype)
    for wants_active in (False, True):
        found, active = kernels.swiglu_backward(grad, x, wants_active=wants_active)
        assert_close(found, of_x, like.dtype)
        assert (active is not None) == wants_active
        if active is not None:
            assert torch.equal(active, kernels.swiglu_forward(x))


def check_weighted_swiglu(like: Tensor, rows: int, width: int) -> None:
    """A row's weight, float32, and its gradient."""
    import engine.model.triton_kernels as kernels

    x = numbers(rows, 2 * width, like=like, scale=2.0)
    weights = numbers(rows, like=torch.zeros((), device=like.device), seed=2)
    grad = numbers(rows, width, like=like, seed=1)
    wide = [tensor.double().requires_grad_() for tensor in (x, weights)]
    gate, up = wide[0].chunk(2, dim=-1)
    wanted = gate / (1 + (-gate).exp()) * up * wide[1][:, None]
    of_x, of_weights = torch.autograd.grad(wanted, wide, grad.double())
    assert_close(kernels.swiglu_forward(x, weights), wanted, like.dtype)
    found_x, found_weights = kernels.weighted_swiglu_backward(grad, x, weights)
    assert_close(found_x, of_x, like.dtype)
    assert_close(found_weights, of_weights, torch.float32)


def check_heads(
    like: Tensor, tokens: int, heads: int, groups: int, dim: int, *, bias: bool = False, norms: bool = False
) -> None:
    """Queries, keys and values from the product of a fused linear, and back."""
    import engine.model.triton_kernels as kernels

    width = (heads + 2 * groups) * dim
    mixed = numbers(tokens, width, like=like, scale=2.0)
    shift = numbers(width, like=like, seed=1) if bias else None
    weights = tuple(numbers(dim, like=like, seed=2 + i) for i in range(2)) if norms else None
    cos, sin = tables(tokens, dim, like)
    sizes = ((tokens, heads, dim), (tokens, groups, dim), (tokens, groups, dim))
    grads = tuple(numbers(*size, like=like, seed=4 + i) for i, size in enumerate(sizes))
    inputs = (mixed, *([] if shift is None else [shift]), *(weights or ()))
    wide = [x.double().requires_grad_() for x in inputs]
    whole = (wide[0] if shift is None else wide[0] + wide[1]).view(tokens, groups, -1, dim)
    parts = [whole[:, :, :-2].flatten(1, 2), whole[:, :, -2], whole[:, :, -1]]
    for i in range(2):
        if norms:
            scale = (parts[i].square().mean(-1, keepdim=True) + EPSILON).rsqrt()
            parts[i] = parts[i] * scale * wide[i - 2]
        parts[i] = rotated(parts[i], cos, sin)
    found = kernels.heads_forward(mixed, groups, cos, sin, shift, weights, EPSILON)
    for out, truth in zip(found, parts, strict=True):
        assert out.is_contiguous()
        assert_close(out, truth, like.dtype)
    exact = torch.autograd.grad(parts, wide, [grad.double() for grad in grads])
    of_mixed, of_bias, of_norms = kernels.heads_backward(
        grads, mixed if norms else None, cos, sin, weights, EPSILON, wants_bias=bias
    )
    assert_close(of_mixed, exact[0], like.dtype)
    assert (of_bias is not None) == bias
    assert (of_norms is not None) == norms
    if bias:
        assert_sums(of_bias, exact[1])
    if of_norms is not None:
        for place in range(2):
            assert_sums(of_norms[:, place], exact[place - 2])


def check_heads_in_turns(like: Tensor, tokens: int, *, bias: bool = False, norms: bool = False) -> None:
    """Programs that have several blocks each, which takes many tokens unless programs are few."""
    import engine.model.triton_kernels as kernels

    with mock.patch.dict(kernels._HEADS_WARPS, {"norms": 8, "bias": 16, "neither": 16}):
        check_heads(like, tokens, 3, 1, 128, bias=bias, norms=norms)


def places(rows: int, width: int, device: torch.device) -> Tensor:
    """Labels within the columns, on their borders, and on other ranks on either side."""
    found = torch.randint(0, width, (rows,), generator=torch.Generator().manual_seed(rows))
    special = torch.tensor([0, width - 1, -1, width, -(2**33), 2**33])[:rows]
    found[: len(special)] = special
    return found.to(device)


def check_logits(like: Tensor, rows: int, width: int) -> None:
    """Statistics, and gradients in place, with softmax sums of a vocabulary that is wider than the block."""
    import engine.model.triton_kernels as kernels

    logits = numbers(rows, width, like=like, scale=3.0)
    if rows > 1:
        logits[1] += 80  # exponentials that would overflow
    labels = places(rows, width, like.device)
    inside = (labels >= 0) & (labels < width)
    wide = logits.double()
    highest = wide.amax(-1)
    maxima, sums, picked = kernels.logit_statistics(logits, labels)
    assert_close(maxima, highest, torch.float32)
    assert_close(sums, (wide - highest[:, None]).exp().sum(-1), torch.float32)
    own = wide.gather(-1, labels.clamp(0, width - 1)[:, None])[:, 0]
    assert_close(picked, torch.where(inside, own, 0.0), torch.float32)
    assert not picked[~inside].any()

    normalizer = wide.logsumexp(-1) + 1.0  # other ranks' columns have their share of the sum
    factor = torch.tensor(256.0, device=like.device)
    one_hot = torch.zeros_like(wide)
    one_hot[torch.arange(rows, device=like.device)[inside], labels[inside]] = 1
    wanted = ((wide - normalizer[:, None]).exp() - one_hot) * 256
    kernels.logit_gradients(logits, labels, normalizer.float(), factor)
    assert_close(logits, wanted, like.dtype)


def check_empty(like: Tensor) -> None:
    """A rank may have no token, and a micro-batch no target."""
    import engine.model.triton_kernels as kernels

    def nothing(*shape: int) -> Tensor:
        return numbers(*shape, like=like)

    weight, labels = nothing(48), torch.zeros(0, dtype=torch.int64, device=like.device)
    out, scales = kernels.norm_forward(nothing(0, 1, 48), weight, EPSILON)
    assert out.shape == (0, 1, 48)
    found, of_weight = kernels.norm_backward(out, out, weight, scales, None, wants_weight=True)
    assert found.shape == out.shape
    assert of_weight is not None
    assert_sums(of_weight, torch.zeros_like(weight))
    assert kernels.swiglu_forward(nothing(0, 20)).shape == (0, 10)
    found, active = kernels.swiglu_backward(nothing(0, 10), nothing(0, 20), wants_active=True)
    assert found.shape == (0, 20)
    assert active is not None
    assert active.shape == (0, 10)
    angles, width = tables(0, 16, like), 8 * 16
    heads = kernels.heads_forward(nothing(0, width), 2, *angles, None, None, EPSILON)
    assert [x.shape for x in heads] == [(0, 4, 16), (0, 2, 16), (0, 2, 16)]
    pair = (numbers(16, like=like), numbers(16, like=like))
    for norms in (pair, None):
        found, of_bias, of_norms = kernels.heads_backward(
            heads, nothing(0, width), *angles, norms, EPSILON, wants_bias=norms is None
        )
        assert found.shape == (0, width)
        parts = of_bias if of_norms is None else of_norms[:, 0]
        assert_sums(parts, torch.zeros(width if norms is None else 16, device=like.device))
    assert [x.shape for x in kernels.logit_statistics(nothing(0, 9), labels)] == [(0,)] * 3
    kernels.logit_gradients(nothing(0, 9), labels, scales, torch.ones((), device=like.device))


def check_attention(like: Tensor, q_lengths: Sequence[int], k_lengths: Sequence[int], groups: int) -> None:
    """Packed documents, or queries that are the last of more keys; keys and values as views."""
    import engine.model.triton_attention as kernels

    if like.dtype == torch.bfloat16:  # Triton's interpreter multiplies no matrices of bf16
        like = like.half()
    bound = {torch.float32: 1e-5, torch.float16: 1e-3}[like.dtype]
    heads, dim, scale = 2 * groups, 16, 0.25
    fused = numbers(sum(k_lengths), 2 * groups, dim, like=like)
    inputs = [numbers(sum(q_lengths), heads, dim, like=like, seed=1), fused[:, :groups], fused[:, groups:]]
    grad = numbers(sum(q_lengths), heads, dim, like=like, seed=2)
    tiles = [torch.from_numpy(found) for found in list_tiles(q_lengths, k_lengths)]
    out, normalizers = kernels.forward(*inputs, tiles[0], scale)
    gradients = kernels.backward(grad, *inputs, out, normalizers, *tiles, scale)
    wide = [x.double().requires_grad_() for x in inputs]
    parts = []
    for q, k, v in zip(wide[0].split(q_lengths), *(x.split(k_lengths) for x in wide[1:]), strict=True):
        scores = torch.einsum("qnd,knd->nqk", q, k.repeat_interleave(2, 1)) * scale
        seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        parts.append(torch.einsum("nqk,knd->qnd", weights, v.repeat_interleave(2, 1)))
    wanted = torch.cat(parts)
    exact = torch.autograd.grad(wanted, wide, grad.double())
    for found, truth in zip((out, *gradients), (wanted, *exact), strict=True):
        assert found.dtype == like.dtype
        assert relative(found, truth) <= bound


def check_grouped(like: Tensor, counts: Sequence[int], out: int, into: int) -> None:
    """Products of experts' rows are added to a part of a buffer; experts without rows keep what they have."""
    import engine.model.triton_grouped as kernels

    if not like.is_cuda and like.dtype == torch.bfloat16:
        like = like.half()  # the interpreter multiplies no matrices of bf16
    grads, inputs = numbers(sum(counts), out, like=like), numbers(sum(counts), into, like=like, seed=1)
    ends = torch.tensor(counts, device=like.device).cumsum(0).int()
    border, size = 4, len(counts) * out * into
    buffer = numbers(border + size + border, like=like.float(), scale=8.0, seed=2)
    before, total = buffer.clone(), buffer[border:-border].view(-1, out, into)
    pairs = zip(grads.double().split(counts), inputs.double().split(counts), strict=True)
    wanted = before.double()
    wanted[border:-border].view_as(total).add_(torch.stack([a.T @ b for a, b in pairs]))
    kernels.add_grouped_products(total, grads, inputs, ends)
    assert_close(buffer, wanted, torch.float32)
    assert torch.equal(buffer[:border], before[:border])
    assert torch.equal(buffer[-border:], before[-border:])
    for index, expert in enumerate(before[border:-border].view_as(total)):
        assert counts[index] or torch.equal(total[index], expert)


Check = Callable[[Tensor], None]

# Sizes that are no multiple of any block, and more rows than one program takes.
SMALL: Mapping[str, Check] = {
    "norm, one row": lambda like: check_norm(like, (1, 16)),
    "norm, odd width": lambda like: check_norm(like, (5, 1, 100)),
    "norm of heads": lambda like: check_norm(like, (7, 3, 16)),
    "norm, several blocks of rows": lambda like: check_norm(like, (301, 24)),
    "norm wider than a block": lambda like: check_norm(like, (3, 5000)),
    "sums of rows": lambda like: check_sum_rows(like, 37, 100, 5),
    "sums of rows, wider than a block": lambda like: check_sum_rows(like, 3, 5000, 2),
    "swiglu": lambda like: check_swiglu(like, (6, 1, 1030)),
    "swiglu, narrow": lambda like: check_swiglu(like, (3, 7)),
    "weighted swiglu": lambda like: check_weighted_swiglu(like, 5, 1030),
    "weighted swiglu, narrow": lambda like: check_weighted_swiglu(like, 300, 7),
    "heads, one group": lambda like: check_heads(like, 9, 4, 1, 16),
    "heads, as many groups": lambda like: check_heads(like, 9, 3, 3, 16, bias=True),
    "heads, several blocks": lambda like: check_heads_in_turns(like, 45),
    "heads with a bias, no power of 2": lambda like: check_heads(like, 5, 28, 4, 8, bias=True),
    "normed heads": lambda like: check_heads(like, 5, 6, 2, 16, norms=True),
    "normed heads, several blocks": lambda like: check_heads_in_turns(like, 45, norms=True),
    "heads with a bias, several blocks": lambda like: check_heads_in_turns(like, 45, bias=True),
    "heads with a bias, several tokens": lambda like: check_heads(like, 21, 6, 3, 128, bias=True),
    "logits, narrow": lambda like: check_logits(like, 7, 130),
    "logits, several blocks": lambda like: check_logits(like, 8, 9001),
    "empty": check_empty,
}

# In the interpreter alone: on a GPU tests/model/test_attention.py and test_grouped.py have more, in half
# precision, which is all that these kernels are used for.
INTERPRETED: Mapping[str, Check] = {
    "attention, documents": lambda like: check_attention(like, (5, 200, 1, 131), (5, 200, 1, 131), 2),
    "attention, chunks": lambda like: check_attention(like, (64, 40), (130, 300), 1),
    "experts, several tiles": lambda like: check_grouped(like, (5, 0, 64, 0, 133), 136, 264),
    "experts, whole tiles": lambda like: check_grouped(like, (0, 65, 128), 128, 256),
    "experts, odd sizes": lambda like: check_grouped(like, (3, 70, 0), 7, 1),
    "experts without rows": lambda like: check_grouped(like, (0, 0), 8, 8),
}

# Shapes of published models (hidden 3584 and F 18944 are Qwen2.5-7B's), for a GPU.
LARGE: Mapping[str, Check] = {
    "norm, hidden 3584": lambda like: check_norm(like, (4099, 1, 3584)),
    "norm, hidden 5120": lambda like: check_norm(like, (1000, 1, 5120)),
    "norm of heads, 128": lambda like: check_norm(like, (2049, 40, 128)),
    "sums of rows, 8 experts of 128": lambda like: check_sum_rows(like, 8192, 2048, 16),
    "swiglu, F 18944": lambda like: check_swiglu(like, (2051, 1, 18944)),
    "weighted swiglu, F 768": lambda like: check_weighted_swiglu(like, 65536, 768),
    "28 / 4 heads of 128": lambda like: check_heads(like, 4099, 28, 4, 128, bias=True),
    "40 / 8 heads of 128, normed": lambda like: check_heads(like, 4099, 40, 8, 128, norms=True),
    "28 / 4 heads of 64": lambda like: check_heads(like, 4099, 28, 4, 64),
    "64 / 8 heads of 64, normed": lambda like: check_heads(like, 4099, 64, 8, 64, norms=True),
    "logits of 152064": lambda like: check_logits(like, 517, 152064),
    "logits of 151665": lambda like: check_logits(like, 33, 151665),
}


def main() -> int:
    """Every small check in both dtypes; a line for each that fails, and how many were made."""
    failures = 0
    for dtype in BOUNDS:
        for name, check in (SMALL | INTERPRETED).items():
            try:
                check(torch.zeros((), dtype=dtype))
            except Exception as error:
                failures += 1
                print(f"{name}, {dtype}: {error!r}")
    print(f"{len(BOUNDS) * len(SMALL | INTERPRETED) - failures} checks passed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
