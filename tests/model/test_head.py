"""The head with its loss against logits and cross-entropy in fp64."""

import pytest
import torch
import torch.nn.functional as F

import engine.model.head as head
from engine.model.head import LinearCrossEntropy
from engine.runtime.kernels import add_product, product

WIDTH, VOCABULARY = 48, 130


def inputs(rows: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(VOCABULARY, WIDTH, generator=generator) / 5).to(dtype).requires_grad_()
    return x, weight, torch.randint(0, VOCABULARY - 10, (rows,), generator=generator)


def expected(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, columns: int) -> list[torch.Tensor]:
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    loss = F.cross_entropy((wide[0] @ wide[1].T)[:, :columns], labels, reduction="sum")
    return [loss.detach(), *torch.autograd.grad(loss, wide)]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


@pytest.mark.parametrize("block_rows", [1, 7, 64])
@pytest.mark.parametrize("columns", [VOCABULARY, VOCABULARY - 10])
def test_equals_cross_entropy(block_rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head._BLOCK_BYTES, "cpu", block_rows * columns * 4)
    x, weight, labels = inputs(40)
    loss = LinearCrossEntropy.apply(x, weight, labels, columns, None, None)
    (3 * loss).backward()
    wanted = expected(x, weight, labels, columns)
    assert relative(loss.detach(), wanted[0]) < 1e-6
    assert relative(x.grad, 3 * wanted[1]) < 1e-6
    assert relative(weight.grad, 3 * wanted[2]) < 1e-6
    assert not weight.grad[columns:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    x, weight, labels = inputs(64, dtype)
    loss = LinearCrossEntropy.apply(x, weight, labels, VOCABULARY, None, torch.tensor(256.0))
    loss.backward()
    wanted = expected(x, weight, labels, VOCABULARY)
    # Logits and gradients are rounded to 8 or 11 bits.
    bound = {torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    assert loss.dtype == torch.float32
    assert relative(loss.detach(), wanted[0]) < bound
    assert relative(x.grad, wanted[1]) < bound
    assert relative(weight.grad, wanted[2]) < bound


def test_large_logits_are_finite() -> None:
    x, weight, labels = inputs(8)
    loss = LinearCrossEntropy.apply(x * 1e4, weight, labels, VOCABULARY, None, None)
    assert relative(loss.detach(), expected(x * 1e4, weight, labels, VOCABULARY)[0]) < 1e-6


def test_frozen_weight_gets_no_gradient() -> None:
    x, weight, labels = inputs(8)
    LinearCrossEntropy.apply(x, weight.requires_grad_(False), labels, VOCABULARY, None, None).backward()
    assert weight.grad is None
    assert relative(x.grad, expected(x, weight, labels, VOCABULARY)[1]) < 1e-6


@pytest.mark.parametrize("rows", [0, 40])
@pytest.mark.parametrize("scale", [None, 256.0])
@pytest.mark.parametrize("tied", [False, True])
def test_adds_to_the_gradient_buffer(rows: int, scale: float | None, tied: bool) -> None:
    x, weight, labels = inputs(rows)
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(VOCABULARY, WIDTH), False
    weight.shared_with_embedding = tied
    factor = None if scale is None else torch.tensor(scale)
    loss = LinearCrossEntropy.apply(x, weight, labels, VOCABULARY, None, factor)
    (loss * (scale or 1.0)).backward()
    assert weight.grad_added_to_main_grad
    wanted = expected(x, weight, labels, VOCABULARY)[2] * (scale or 1.0)
    assert (weight.main_grad.double() - 1 - wanted).abs().max() < 1e-5 * (scale or 1.0)
    # Of tied weights the gradient that comes is the embedding's: nothing may be mixed into it.
    assert (weight.grad is None) == tied


def test_gradient_in_the_buffer_is_that_of_the_loss_itself() -> None:
    x, weight, labels = inputs(8)
    weight.main_grad = torch.zeros(VOCABULARY, WIDTH)
    loss = LinearCrossEntropy.apply(x, weight, labels, VOCABULARY, None, None)
    with pytest.raises(RuntimeError, match="its gradient is wrong"):
        (2 * loss).backward()


def test_no_targets() -> None:
    x, weight, labels = inputs(0)
    loss = LinearCrossEntropy.apply(x, weight, labels, VOCABULARY, None, None)
    loss.backward()
    assert loss == 0
    assert x.grad.shape == x.shape
    assert not weight.grad.any()


def test_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head._BLOCK_BYTES, "cpu", 5 * VOCABULARY * 4)
    seen, statistics = [], head.logit_statistics

    def watch(logits: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen.append(tuple(logits.shape))
        return statistics(logits, places)

    monkeypatch.setattr(head, "logit_statistics", watch)
    x, weight, labels = inputs(23)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        LinearCrossEntropy.apply(x, weight, labels, VOCABULARY, None, None)
    assert [rows for rows, _ in seen] == [5, 5, 5, 5, 3]
    assert max(kept) <= max(x.numel(), weight.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_add_up_in_fp32(dtype: torch.dtype) -> None:
    a, b = torch.randn(12, 30).to(dtype), torch.randn(30, 7).to(dtype)
    total = product(a, b)
    add_product(total, a, b)
    assert total.dtype == torch.float32
    assert relative(total, 2 * (a.double() @ b.double())) < 1e-6
