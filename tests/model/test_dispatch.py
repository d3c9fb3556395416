"""How tokens come to their experts and back: the order that they are put in, against Megatron's functions,
and the exchange between ranks, against sums over all experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import megatron.core.transformer.moe.moe_utils as theirs
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.model.dispatch import (
    AllGatherDispatcher,
    AllToAllDispatcher,
    OwnDispatcher,
    permute,
    unpermute,
)
from tests.model.kernels import numbers
from tests.support.workers import WorkerPool

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


def through_experts(
    dispatcher: OwnDispatcher, tokens: Tensor, chosen: Tensor, probs: Tensor, factors: Tensor
) -> Tensor:
    """As Megatron's layer calls a dispatcher; an expert multiplies by its factor, [K], and a probability."""
    sent = dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(tokens, chosen, probs))
    rows, shares, weights = dispatcher.dispatch_postprocess(*sent)
    results = rows * (factors.repeat_interleave(shares.to(factors.device)) * weights)[:, None]
    returned = dispatcher.token_combine(dispatcher.combine_preprocess(results))
    return dispatcher.combine_postprocess(returned)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("counts", [(2,) * 7, (2, 0, 1, 2, 2, 1, 0), (0,) * 3], ids=str)
def test_a_rank_with_all_experts(counts: Sequence[int], device: str) -> None:
    """Expert e multiplies by e + 1; tokens that an expert had no room for go without it."""
    top_k, experts = 2, 5
    dropping = any(count < top_k for count in counts)
    config: Any = SimpleNamespace(moe_router_topk=top_k, moe_expert_capacity_factor=1.0 if dropping else None)
    alone: Any = SimpleNamespace(ep=None, expt_tp=None, tp_ep=None)
    dispatcher = OwnDispatcher(experts, config=config, pg_collection=alone)
    chosen = choice(counts, experts, device)
    like = torch.zeros((), device=device)
    tokens, probs = numbers(len(counts), 1, HIDDEN, like=like), numbers(*chosen.shape, like=like, seed=2)
    factors = torch.arange(1, experts + 1, device=device)
    found = through_experts(dispatcher, tokens, chosen, probs, factors)
    torch.testing.assert_close(found, tokens * (chosen * probs * factors).sum(1)[:, None, None])


EXPERTS = 8


@dataclass(frozen=True, kw_only=True)
class Exchanged:
    """What a rank had, chose and got."""

    tokens: Tensor
    chosen: Tensor
    probs: Tensor
    out: Tensor
    of_tokens: Tensor
    of_probs: Tensor
    sent: int


def exchange(
    rank: int, size: int, kind: str, etp: int, counts: Sequence[Sequence[int]], broken: int | None = None
) -> Exchanged:
    """Rank ep * etp + t has the experts of ep, and the t-th share of what they return: t + 1 parts of all.
    Of this rank's own tokens the t-th goes to counts[rank][t] experts. On rank `broken` the probabilities of
    the first token are no numbers.
    """
    same_width = [list(range(width, size, etp)) for width in range(etp)]
    same_experts = [list(range(first, first + etp)) for first in range(0, size, etp)]
    groups: Any = SimpleNamespace(
        ep=dist.new_subgroups_by_enumeration(same_width)[0],
        expt_tp=dist.new_subgroups_by_enumeration(same_experts)[0],
        tp_ep=dist.group.WORLD,
    )
    config: Any = SimpleNamespace(moe_router_topk=2, moe_expert_capacity_factor=1.0)
    dispatcher = {"alltoall": AllToAllDispatcher, "allgather": AllGatherDispatcher}[kind](
        EXPERTS * etp // size, config=config, pg_collection=groups
    )
    chosen, like = choice(counts[rank], EXPERTS, "cpu"), torch.zeros((), dtype=torch.float64)
    tokens = numbers(len(chosen), 1, HIDDEN, like=like, seed=rank).requires_grad_()
    probs = (numbers(*chosen.shape, like=like, seed=10 + rank).sigmoid() * chosen).requires_grad_()
    if rank == broken:
        probs.detach()[0].fill_(torch.nan)
    share = (rank % etp + 1) / (etp * (etp + 1) / 2)
    first = rank // etp * dispatcher.experts
    factors = share * torch.arange(first + 1, first + 1 + dispatcher.experts, dtype=torch.float64)
    out = through_experts(dispatcher, tokens, chosen, probs, factors)
    of_tokens, of_probs = torch.autograd.grad((out * (1 + out.detach())).sum(), (tokens, probs))
    sent = sum(dispatcher.traffic.sent) if isinstance(dispatcher, AllToAllDispatcher) else 0
    return Exchanged(
        tokens=tokens.detach(),
        chosen=chosen,
        probs=probs.detach(),
        out=out.detach(),
        of_tokens=of_tokens,
        of_probs=of_probs,
        sent=sent,
    )


COUNTS = {
    "even": ((2,) * 5,) * 4,
    "uneven, a rank without tokens": ((2, 2, 1), (), (0, 3, 8, 2, 2), (1,)),
    "tokens of one rank": ((), (), (), (2, 2, 0)),
    "no tokens": ((), (), (), ()),
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("etp", [1, 2, 4])
@pytest.mark.parametrize("kind", ["alltoall", "allgather"])
def test_ranks_exchange_tokens(
    workers: WorkerPool, kind: str, etp: int, counts: Sequence[Sequence[int]]
) -> None:
    """Results and gradients of all experts, and no token is sent to a rank twice."""
    found: list[Exchanged] = workers.run(exchange, 4, timeout=60.0, kind=kind, etp=etp, counts=counts)
    factors, ranks = torch.arange(1, EXPERTS + 1, dtype=torch.float64), 4 // etp
    for rank in found:
        tokens, probs = rank.tokens.clone().requires_grad_(), rank.probs.clone().requires_grad_()
        out = tokens * (rank.chosen * probs * factors).sum(1)[:, None, None]
        of_tokens, of_probs = torch.autograd.grad((out * (1 + out.detach())).sum(), (tokens, probs))
        torch.testing.assert_close(rank.out, out.detach())
        torch.testing.assert_close(rank.of_tokens, of_tokens)
        torch.testing.assert_close(rank.of_probs, of_probs)
        if kind == "alltoall":
            assert rank.sent == int(rank.chosen.view(-1, ranks, EXPERTS // ranks).any(-1).sum())


@pytest.mark.parametrize("kind", ["alltoall", "allgather"])
def test_what_is_no_number_stays_with_its_token(workers: WorkerPool, kind: str) -> None:
    found: list[Exchanged] = workers.run(
        exchange, 4, timeout=60.0, kind=kind, etp=2, counts=COUNTS["even"], broken=1
    )
    for number, rank in enumerate(found):
        broken = [number == 1, False, False, False, False]
        assert rank.out.isnan().all(-1).flatten().tolist() == broken
        assert rank.out.isnan().any(-1).flatten().tolist() == broken


def test_gradients_can_be_exchanged() -> None:
    """NCCL takes contiguous parts alone, where gloo takes others too."""
    chosen = choice((2,) * 7, 4, "cpu")
    inputs = torch.rand(7, HIDDEN, requires_grad=True), torch.rand(7, 4, requires_grad=True)
    rows, probs, order = permute(inputs[0], chosen, inputs[1], 14)
    gradients = torch.autograd.grad(unpermute(rows * probs[:, None], order).sum(), inputs)
    assert all(gradient.is_contiguous() for gradient in gradients)


@pytest.mark.parametrize("device", DEVICES)
def test_results_are_rounded_once(device: str) -> None:
    """256 + 8 x 0.5 is 260; in bf16 each of the halves is lost, one by one."""
    chosen = torch.ones(1, 9, dtype=torch.bool, device=device)
    tokens = torch.zeros(1, 8, dtype=torch.bfloat16, device=device)
    rows, _, order = permute(tokens, chosen, chosen.float(), 9)
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
            unpermute(rows * found[:, None], order).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
