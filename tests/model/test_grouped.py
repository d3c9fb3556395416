"""A linear of each of several experts, against the experts one by one in fp64."""

import pytest
import torch

from engine.model import grouped
from engine.model.grouped import Shares, grouped_linear
from tests.model.kernels import check_grouped, numbers

IN = 128
COUNTS = {
    "experts without rows": [0, 5, 0, 33, 1, 0],
    "one expert": [70],
    "one row": [0, 1],
    "no rows": [0, 0],
}


@pytest.mark.parametrize("buffered", [False, True], ids=["returned", "into the buffer"])
@pytest.mark.parametrize("width", [256, 64, 8, 4], ids=lambda width: f"{width} features")
@pytest.mark.parametrize("counts", COUNTS.values(), ids=list(COUNTS))
@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.float32, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_equals_the_experts_one_by_one(
    device: str, dtype: torch.dtype, counts: list[int], width: int, buffered: bool
) -> None:
    """What a buffer is given is rounded nowhere: products of bf16 fit float32."""
    like = torch.zeros((), dtype=dtype, device=device)
    rows = numbers(sum(counts), IN, like=like).requires_grad_()
    weight = torch.nn.Parameter(numbers(len(counts), width, IN, like=like, seed=2))
    upstream = numbers(sum(counts), width, like=like, seed=3)
    start = numbers(len(counts), width, IN, like=like.float(), seed=4)
    if buffered:
        weight.main_grad = start.clone()  # type: ignore[attr-defined]
    out = grouped_linear(rows, weight, Shares(torch.tensor(counts, device=device), rows.device))
    out.backward(upstream)
    wide = [t.detach().double().requires_grad_() for t in (rows, weight)]
    parts = zip(wide[0].split(counts), wide[1], strict=True)
    expected = torch.cat([part @ matrix.T for part, matrix in parts])
    expected.backward(upstream.double())
    rounding = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    for found, wanted in ((out, expected), (rows.grad, wide[0].grad)):
        torch.testing.assert_close(found.double(), wanted, **rounding)
    if buffered:
        assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
        added = weight.main_grad.double() - start  # type: ignore[attr-defined]
        torch.testing.assert_close(added, wide[1].grad, rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(weight.grad.double(), wide[1].grad, **rounding)
        assert not any(grad.any() for grad, count in zip(weight.grad, counts, strict=True) if not count)


@pytest.mark.parametrize("width", [64, 4], ids=["one kernel", "one by one"])
def test_micro_batches_without_rows_hide_no_gradient(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron asks once a step whether a weight's gradients go to the buffer: all do, or none does. As on a
    GPU where nothing can be compiled.
    """
    monkeypatch.setattr(grouped, "_one_kernel", lambda rows, matrices: len(rows) > 0 and width > 4)
    weight = torch.nn.Parameter(numbers(2, width, IN, like=torch.zeros((), dtype=torch.bfloat16)))
    weight.main_grad = torch.zeros(2, width, IN)  # type: ignore[attr-defined]
    wanted = torch.zeros(2, width, IN)
    for counts in ([0, 0], [25, 15], [0, 0]):
        rows = numbers(sum(counts), IN, like=weight)
        grouped_linear(rows, weight, Shares(torch.tensor(counts), rows.device)).sum().backward()
        assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
        for expert, part in enumerate(rows.float().split(counts)):
            wanted[expert] += part.sum(0)
    torch.testing.assert_close(weight.main_grad, wanted, rtol=1e-2, atol=1e-2)  # type: ignore[attr-defined]


def test_a_frozen_weight_keeps_no_rows() -> None:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape), lambda x: x):
        rows = numbers(40, IN, like=torch.zeros(())).requires_grad_()
        grouped_linear(rows, numbers(2, 64, IN, like=rows), Shares(torch.tensor([25, 15]), rows.device))
    assert kept == [(2, 64, IN)]


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_nothing_waits_for_the_device(where: str) -> None:
    """Where the numbers of rows are known does not matter."""
    like = torch.zeros((), dtype=torch.bfloat16, device="cuda")
    rows, weight = numbers(40, IN, like=like).requires_grad_(), numbers(2, 64, IN, like=like)
    weight.requires_grad_()
    weight.main_grad = torch.zeros(2, 64, IN, device="cuda")  # type: ignore[attr-defined]
    counts = torch.tensor([25, 15], device=where)
    for mode in ("default", "error"):  # kernels are compiled before
        torch.cuda.set_sync_debug_mode(mode)
        try:
            grouped_linear(rows, weight, Shares(counts, rows.device)).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


SIZES = {
    "gate and up": ((1031, 0, 900, 64, 1, 0, 2000), 1536, 2048),
    "down": ((1024, 129, 0, 63), 2048, 768),
    "parts of tiles": ((70, 0, 300), 200, 328),
    "odd sizes": ((70, 0, 300), 13, 131),
    "nothing": ((0, 0), 128, 128),
}


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
def test_products_are_added_to_the_buffer(size: str) -> None:
    counts, out, into = SIZES[size]
    check_grouped(torch.zeros((), dtype=torch.bfloat16, device="cuda"), counts, out, into)


@pytest.mark.gpu
def test_sums_do_not_depend_on_timing() -> None:
    from engine.model.triton_grouped import add_grouped_products

    like = torch.zeros((), dtype=torch.bfloat16, device="cuda")
    grads, inputs = numbers(4096, 1536, like=like), numbers(4096, 2048, like=like, seed=1)
    ends = torch.tensor([1000, 1000, 2500, 4096], dtype=torch.int32, device="cuda")
    totals = [numbers(4, 1536, 2048, like=like.float(), seed=2) for _ in range(5)]
    for total in totals:
        add_grouped_products(total, grads, inputs, ends)
    assert all(torch.equal(total, totals[0]) for total in totals)
