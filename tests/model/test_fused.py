"""The operations between the matrix products against fp64, as plain torch and as Triton kernels.

The kernels' own checks are in tests/model/kernels.py: Triton's interpreter runs them on a CPU, compiled
kernels on a GPU.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.model import fused
from engine.model.fused import (
    logit_statistics,
    logits_to_gradients,
    rms_norm,
    rms_norm_and_input,
    split_heads,
    swiglu,
    swiglu_again,
    weighted_swiglu,
)
from engine.runtime.kernels import can_compile
from tests.model.kernels import (
    BOUNDS,
    EPSILON,
    INTERPRETED,
    LARGE,
    SMALL,
    assert_close,
    numbers,
    places,
    relative,
    rotated,
    tables,
)

ROOT = Path(__file__).resolve().parent.parent.parent
HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Plain torch rounds to bf16 after every operation, the kernels once.
PLAIN_BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def like(request: pytest.FixtureRequest, device: str) -> Tensor:
    return torch.zeros((), dtype=request.param, device=device)


@pytest.fixture
def bound(like: Tensor) -> float:
    return BOUNDS[like.dtype] if like.is_cuda else PLAIN_BOUNDS[like.dtype]


def follows(
    function: Callable[..., Tensor], formula: Callable[..., Tensor], *inputs: Tensor, bound: float
) -> None:
    """Value and gradients of `function` against those of `formula` on the same numbers in fp64."""
    narrow = [tensor.detach().requires_grad_() for tensor in inputs]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out, wanted = function(*narrow), formula(*wide)
    upstream = numbers(*out.shape, like=inputs[0], seed=9)
    found = [out, *torch.autograd.grad(out, narrow, upstream)]
    expected = [wanted, *torch.autograd.grad(wanted, wide, upstream.double())]
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape
        assert a.dtype == inputs[0].dtype
        assert relative(a, b) <= bound, f"{'value' if number == 0 else f'gradient {number}'}"


def norm_formula(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight


@pytest.mark.parametrize("shape", [(5, 1, 100), (7, 3, 16), (1, 8)])
def test_norm_equals_its_formula(like: Tensor, bound: float, shape: tuple[int, ...]) -> None:
    x, weight = numbers(*shape, like=like, scale=3.0), 1 + numbers(shape[-1], like=like, scale=0.3, seed=1)
    follows(lambda x, w: rms_norm(x, w, EPSILON), norm_formula, x, weight, bound=bound)


@pytest.mark.parametrize("used", ["both", "norm", "input"])
def test_norm_hands_its_input_on(like: Tensor, bound: float, used: str) -> None:
    """Gradients of a residual connection come together, whichever of the two is read."""

    def chosen(normed: Tensor, x: Tensor) -> Tensor:
        return {"both": normed + 2 * x, "norm": normed, "input": 2 * x}[used]

    x, weight = numbers(5, 1, 100, like=like), 1 + numbers(100, like=like, scale=0.3, seed=1)
    inputs = (x,) if used == "input" else (x, weight)

    def fused(x: Tensor, w: Tensor = weight) -> Tensor:
        return chosen(*rms_norm_and_input(x, w, EPSILON))

    def formula(x: Tensor, w: Tensor = weight) -> Tensor:
        return chosen(norm_formula(x, w), x)

    follows(fused, formula, *inputs, bound=bound)


def test_norm_of_the_queries_within_a_fused_product(like: Tensor, bound: float) -> None:
    """Megatron hands q and k on as views of the product of the fused linear."""
    both = numbers(9, 1, 6, 32, like=like)
    x, weight = both[:, :, 1:4], 1 + numbers(32, like=like, scale=0.3, seed=1)
    assert not x.is_contiguous()
    follows(lambda x, w: rms_norm(x, w, EPSILON), norm_formula, x, weight, bound=bound)


def test_norm_with_a_frozen_weight_gives_it_no_gradient(like: Tensor, bound: float) -> None:
    x, weight = numbers(6, 48, like=like).requires_grad_(), 1 + numbers(48, like=like, scale=0.3, seed=1)
    out = rms_norm(x, weight, EPSILON)
    out.backward(numbers(6, 48, like=like, seed=9))
    assert weight.grad is None
    wide = x.detach().double().requires_grad_()
    norm_formula(wide, weight.double()).backward(numbers(6, 48, like=like, seed=9).double())
    assert relative(x.grad, wide.grad) <= bound


def swiglu_formula(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return gate / (1 + (-gate).exp()) * up


@pytest.mark.parametrize("shape", [(6, 1, 2060), (3, 14), (2, 3, 4)])
def test_swiglu_equals_its_formula(like: Tensor, bound: float, shape: tuple[int, ...]) -> None:
    follows(swiglu, swiglu_formula, numbers(*shape, like=like, scale=2.0), bound=bound)


def test_swiglu_of_a_view(like: Tensor, bound: float) -> None:
    x = numbers(40, 7, like=like).T
    assert not x.is_contiguous()
    follows(swiglu, swiglu_formula, x, bound=bound)


@pytest.mark.parametrize("shape", [(5, 2060), (40, 14), (0, 8)])
def test_swiglu_with_a_weight_for_every_row(like: Tensor, bound: float, shape: tuple[int, int]) -> None:
    """The weights are float32 whatever x is, and so are their gradients."""
    x, grad = numbers(*shape, like=like, scale=2.0), numbers(shape[0], shape[1] // 2, like=like, seed=1)
    narrow = x.clone().requires_grad_(), numbers(len(x), like=like.float(), seed=2).requires_grad_()
    wide = tuple(tensor.detach().double().requires_grad_() for tensor in narrow)
    out, wanted = weighted_swiglu(*narrow), swiglu_formula(wide[0]) * wide[1][:, None]
    found = (out, *torch.autograd.grad(out, narrow, grad))
    expected = (wanted, *torch.autograd.grad(wanted, wide, grad.double()))
    assert [tensor.dtype for tensor in found] == [x.dtype, x.dtype, torch.float32]
    assert all(relative(a, b) <= bound for a, b in zip(found, expected, strict=True))


def test_swiglu_again_is_its_backward_pass_and_its_value(like: Tensor) -> None:
    x, grad = numbers(6, 1, 2060, like=like).requires_grad_(), numbers(6, 1, 1030, like=like, seed=1)
    out = swiglu(x)
    (of_x,) = torch.autograd.grad(out, x, grad)
    for found, wanted in zip(swiglu_again(x.detach(), grad), (out, of_x), strict=True):
        assert torch.equal(found, wanted)


HEADS = {"alone": (False, False), "with a bias": (True, False), "normed": (False, True)}


@pytest.mark.parametrize("case", HEADS)
@pytest.mark.parametrize("dim", [16, 24, 128])  # half of 24 is no power of 2
def test_heads_of_a_fused_product(like: Tensor, bound: float, dim: int, case: str) -> None:
    """Values and gradients, whose upstream gradients are views."""
    biased, normed = HEADS[case]
    tokens, heads, groups = 9, 4, 2
    width = (heads + 2 * groups) * dim
    inputs = [numbers(2 * tokens, width, like=like)[::2]]
    assert not inputs[0].is_contiguous()
    inputs += [numbers(width, like=like, seed=1)] if biased else []
    inputs += [numbers(dim, like=like, seed=2 + i) for i in range(2)] if normed else []
    cos, sin = tables(tokens, dim, like)

    def split(mixed: Tensor, *more: Tensor) -> Tensor:
        bias, norms = (more[0] if biased else None), (more if normed else None)
        found = split_heads(mixed, groups, cos, sin, bias=bias, norms=norms, eps=EPSILON)
        assert [x.shape for x in found] == [(tokens, n, dim) for n in (heads, groups, groups)]
        return torch.cat(found, dim=1)

    def formula(mixed: Tensor, *more: Tensor) -> Tensor:
        whole = (mixed + more[0] if biased else mixed).reshape(tokens, groups, -1, dim)
        parts = [whole[:, :, :-2].flatten(1, 2), whole[:, :, -2], whole[:, :, -1]]
        for i in range(2):
            if normed:
                parts[i] = parts[i] * (parts[i].square().mean(-1, keepdim=True) + EPSILON).rsqrt() * more[i]
            parts[i] = rotated(parts[i], cos, sin)
        return torch.cat(parts, dim=1)

    follows(split, formula, *inputs, bound=bound)


def test_nothing_in_gives_nothing_out(like: Tensor) -> None:
    x, weight = numbers(0, 1, 48, like=like).requires_grad_(), numbers(48, like=like).requires_grad_()
    rms_norm(x, weight, EPSILON).sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    x = numbers(0, 1, 48, like=like).requires_grad_()
    swiglu(x).sum().backward()
    assert x.grad.shape == x.shape
    x = numbers(0, 8 * 16, like=like).requires_grad_()
    sum(out.sum() for out in split_heads(x, 2, *tables(0, 16, like))).backward()
    assert x.grad.shape == x.shape
    none = torch.zeros(0, dtype=torch.int64, device=like.device)
    assert [x.shape for x in logit_statistics(numbers(0, 9, like=like), none)] == [(0,)] * 3


def softmax_gradient(logits: Tensor, labels: Tensor, normalizer: Tensor) -> Tensor:
    inside = (labels >= 0) & (labels < logits.shape[1])
    gradient = (logits.double() - normalizer[:, None]).exp()
    rows = torch.arange(len(labels), device=labels.device)
    gradient[rows[inside], labels[inside]] -= 1
    return gradient


@pytest.mark.parametrize(("rows", "width"), [(7, 130), (9, 9001), (1, 1)])
def test_statistics_of_a_part_of_the_vocabulary(like: Tensor, rows: int, width: int) -> None:
    """Labels may lie outside of the part, on ranks on either side: their logit is 0 here."""
    logits, labels = numbers(rows, width, like=like, scale=3.0), places(rows, width, like.device)
    wide = logits.double()
    maxima, sums, picked = logit_statistics(logits, labels)
    assert_close(maxima, wide.amax(-1), torch.float32)
    assert_close(sums, (wide - wide.amax(-1, keepdim=True)).exp().sum(-1), torch.float32)
    for row, label in enumerate(labels.tolist()):
        assert picked[row] == (logits[row, label].float() if 0 <= label < width else 0)


def test_statistics_of_huge_logits_are_finite(like: Tensor) -> None:
    logits = torch.tensor([[1e4, -1e4, 9984.0], [-3e4, -3e4, -3e4]]).to(like)
    maxima, sums, _ = logit_statistics(logits, torch.tensor([0, 1], device=like.device))
    assert maxima.tolist() == logits.float().amax(-1).tolist()
    assert sums[1] == 3
    assert torch.isfinite(sums).all()


@pytest.mark.parametrize(("rows", "width"), [(7, 130), (9, 9001)])
def test_gradients_take_the_place_of_logits(like: Tensor, bound: float, rows: int, width: int) -> None:
    logits, labels = numbers(rows, width, like=like, scale=3.0), places(rows, width, like.device)
    normalizer = logits.double().logsumexp(-1) + 1.0  # the columns of other ranks have a share
    wanted = 256 * softmax_gradient(logits, labels, normalizer)
    address = logits.data_ptr()
    logits_to_gradients(logits, labels, normalizer.float(), torch.tensor(256.0, device=like.device))
    assert logits.data_ptr() == address
    assert relative(logits, wanted) <= max(bound, 1e-5)  # fp32 logarithms of sums
    # A label on another rank leaves the row nothing but probabilities.
    outside = (labels < 0) | (labels >= width)
    assert outside.any()
    assert (logits[outside] >= 0).all()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are called."""
    from engine.model import triton_kernels

    called: list[str] = []

    class Counter:
        def __getattr__(self, name: str) -> Any:
            called.append(name)
            return getattr(triton_kernels, name)

    monkeypatch.setattr(fused, "_kernels", Counter)
    return called


@pytest.mark.gpu
def test_on_a_gpu_every_operation_is_a_kernel(counted: list[str]) -> None:
    """A fallback to plain torch would give the same numbers, slower."""
    assert can_compile(), "Triton and a C compiler belong to a GPU machine"
    like = torch.zeros((), dtype=torch.bfloat16, device="cuda")
    x, weight = numbers(4, 64, like=like).requires_grad_(), numbers(64, like=like).requires_grad_()
    swiglu(rms_norm(x, weight, EPSILON)).sum().backward()
    mixed = numbers(4, 8 * 16, like=like).requires_grad_()
    sum(out.sum() for out in split_heads(mixed, 2, *tables(4, 16, like))).backward()
    logits, labels = numbers(4, 9, like=like), places(4, 9, like.device)
    maxima, sums, _ = logit_statistics(logits, labels)
    logits_to_gradients(logits, labels, maxima + sums.log(), torch.ones((), device="cuda"))
    both_ways = [f"{name}_{way}" for name in ("norm", "swiglu", "heads") for way in ("forward", "backward")]
    once = ["logit_statistics", "logit_gradients"]
    assert sorted(counted) == sorted([*both_ways, *once])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("check", [*SMALL, *LARGE])
def test_kernel_equals_fp64(check: str, dtype: torch.dtype) -> None:
    torch.cuda.empty_cache()
    (SMALL | LARGE)[check](torch.zeros((), dtype=dtype, device="cuda"))


# A torch for CUDA always brings Triton: there its absence is a failure, not a reason to skip.
@pytest.mark.skipif(
    not HAS_TRITON and torch.version.cuda is None,
    reason="torch's CPU builds come without Triton; pip install triton",
)
def test_kernels_equal_fp64_in_tritons_interpreter() -> None:
    """In a process of its own: Triton chooses between compiler and interpreter when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.model.kernels"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(BOUNDS) * len(SMALL | INTERPRETED)} checks passed" in done.stdout


@pytest.mark.skipif(HAS_TRITON, reason="Triton is installed; its kernels are tested instead")
def test_without_triton_nothing_asks_for_it() -> None:
    assert not can_compile()
    assert "engine.model.triton_kernels" not in sys.modules
