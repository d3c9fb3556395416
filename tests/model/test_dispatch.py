"""The order that tokens are put in for their experts, against Megatron's own functions."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import megatron.core.transformer.moe.moe_utils as theirs
import pytest
import torch
from torch import Tensor

from engine.model.dispatch import OwnDispatcher, permute, sort_chunks, unpermute
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
@pytest.mark.parametrize("sizes", [(3, 0, 2, 4, 1, 7), (0,) * 6, (0, 0, 5, 0, 0, 0)], ids=str)
def test_chunks_are_sorted_as_megatron_sorts_them(sizes: Sequence[int], device: str) -> None:
    """What three ranks sent to two experts, and back; values and gradients, bit by bit."""
    like = torch.zeros((), dtype=torch.bfloat16, device=device)
    inputs = numbers(sum(sizes), HIDDEN, like=like), numbers(sum(sizes), like=like.float(), seed=2)
    upstream = numbers(sum(sizes), HIDDEN, like=like, seed=3), numbers(sum(sizes), like=like.float(), seed=4)
    order = torch.arange(6).view(3, 2).T.reshape(-1)
    results = []
    for way in (sort_chunks, theirs.sort_chunks_by_idxs):
        rows, probs = (x.clone().requires_grad_() for x in inputs)
        out, moved = way(rows, torch.tensor(sizes), order, probs)
        assert moved is not None
        gradients = torch.autograd.grad((out, moved), (rows, probs), upstream)
        back, _ = way(out, torch.tensor(sizes)[order], order.argsort(), None)
        assert torch.equal(back, rows)
        results.append((out, moved, *gradients))
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("counts", [(2,) * 7, (2, 0, 1, 2, 2, 1, 0), (0,) * 3], ids=str)
def test_a_rank_with_all_experts(counts: Sequence[int], device: str) -> None:
    """Expert e multiplies by e + 1; tokens that an expert had no room for go without it."""
    top_k, experts = 2, 5
    dropping = any(count < top_k for count in counts)
    config: Any = SimpleNamespace(moe_router_topk=top_k, moe_expert_capacity_factor=1.0 if dropping else None)
    alone: Any = SimpleNamespace(ep=None, expt_tp=None, tp_ep=None)
    dispatcher = OwnDispatcher(config=config, pg_collection=alone)
    chosen = choice(counts, experts, device)
    like = torch.zeros((), device=device)
    tokens, probs = numbers(len(counts), 1, HIDDEN, like=like), numbers(*chosen.shape, like=like, seed=2)
    sent = dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(tokens, chosen, probs))
    rows, shares, weights = dispatcher.dispatch_postprocess(*sent)
    assert shares.tolist() == chosen.sum(0).tolist()
    factors = torch.arange(1, experts + 1, device=device).repeat_interleave(shares)
    results = dispatcher.combine_preprocess(rows * (factors * weights)[:, None])
    found = dispatcher.combine_postprocess(dispatcher.token_combine(results))
    shared = (chosen * probs * torch.arange(1, experts + 1, device=device)).sum(1)
    torch.testing.assert_close(found, tokens * shared[:, None, None])


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
