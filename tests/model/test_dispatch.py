"""The order that tokens are put in for their experts, against Megatron's own functions."""

from collections.abc import Callable, Sequence

import megatron.core.transformer.moe.moe_utils as theirs
import pytest
import torch
from torch import Tensor

from engine.model.dispatch import permute, unpermute
from tests.model.kernels import numbers

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HIDDEN = 24


def choice(counts: Sequence[int], experts: int, device: str) -> Tensor:
    """Token t goes to counts[t] experts."""
    generator = torch.Generator().manual_seed(1)
    chosen = torch.zeros(len(counts), experts, dtype=torch.bool)
    for token, count in enumerate(counts):
        chosen[token, torch.randperm(experts, generator=generator)[:count]] = True
    return chosen.to(device)


CHOICES: dict[str, tuple[Sequence[int], int]] = {
    "two of eight each": ((2,) * 13, 8),
    "experts without tokens": ((1, 1), 16),
    "tokens without experts": ((0, 3, 0, 1, 0), 4),
    "all experts": ((5,) * 3, 5),
    "no tokens": ((), 4),
    "nothing chosen": ((0, 0), 4),
}


def ours(tokens: Tensor, chosen: Tensor, probs: Tensor, work: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    rows, found, order = permute(tokens, chosen, probs, int(chosen.sum()))
    assert found is not None
    return unpermute(work(rows, found), order)


def megatrons(
    tokens: Tensor, chosen: Tensor, probs: Tensor, work: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    rows, found, order, *_ = theirs.permute(tokens, chosen, probs=probs, num_out_tokens=int(chosen.sum()))
    return theirs.unpermute(work(rows, found), order, restore_shape=tokens.shape)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CHOICES)
def test_equals_megatrons_order(case: str, device: str) -> None:
    """Values and gradients of something that depends on where a row stands, in fp64; on a GPU in fp32, as the
    kernel adds up.
    """
    counts, experts = CHOICES[case]
    chosen = choice(counts, experts, device)
    like = torch.zeros((), dtype=torch.float64 if device == "cpu" else torch.float32, device=device)
    inputs = numbers(len(counts), HIDDEN, like=like), numbers(*chosen.shape, like=like, seed=2)
    places = numbers(int(chosen.sum()), like=like, seed=3)

    def work(rows: Tensor, probs: Tensor) -> Tensor:
        return (rows * probs[:, None]).sin() * places[:, None]

    results = []
    for way in (ours, megatrons):
        tokens, probs = (x.clone().requires_grad_() for x in inputs)
        out = way(tokens, chosen, probs, work)
        results.append((out, *torch.autograd.grad(out.square().sum(), (tokens, probs))))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_results_are_rounded_once(device: str) -> None:
    """256 + 8 x 0.5 is 260; in bf16 each of the halves is lost, one by one."""
    chosen = torch.ones(1, 9, dtype=torch.bool, device=device)
    rows, _, order = permute(torch.zeros(1, 8, dtype=torch.bfloat16, device=device), chosen, None, 9)
    rows[0], rows[1:] = 256.0, 0.5
    assert unpermute(rows, order).tolist() == [[260.0] * 8]


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    chosen = choice((2,) * 64, 8, "cuda")
    tokens = torch.randn(64, HIDDEN, device="cuda", requires_grad=True)
    probs = torch.rand(64, 8, device="cuda", requires_grad=True)
    for mode in ("default", "error"):  # kernels are compiled before
        torch.cuda.set_sync_debug_mode(mode)
        try:
            rows, found, order = permute(tokens, chosen, probs, 128)
            assert found is not None
            unpermute(rows * found[:, None], order).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
