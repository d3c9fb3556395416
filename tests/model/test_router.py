"""The router and the experts of one rank, without process groups, against transformers and against plain
counting.
"""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeExperts,
    Qwen3MoeTopKRouter,
    load_balancing_loss_func,
)

from engine.model.experts import GroupedExperts
from engine.model.router import (
    Balance,
    BalanceLoss,
    Join,
    Part,
    Router,
    _thirds,
    from_rows,
    num_rows,
    to_rows,
)

HIDDEN, EXPERTS, TOP_K, WIDTH = 16, 8, 3, 12


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a run takes the CPU for a CUDA device."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")


def config(*, normalize: bool = True, **changes: Any) -> TransformerConfig:
    values = {
        "num_layers": 1, "hidden_size": HIDDEN, "num_attention_heads": 2, "num_moe_experts": EXPERTS,
        "moe_router_topk": TOP_K, "moe_ffn_hidden_size": WIDTH, "moe_router_pre_softmax": not normalize,
        "moe_router_load_balancing_type": "none", "moe_token_dispatcher_type": "alltoall",
        "add_bias_linear": False,
    }  # fmt: skip
    return TransformerConfig(**(values | changes))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def router(**changes: Any) -> Router:
    made = Router(config(**changes))
    with torch.no_grad():
        made.weight.copy_(numbers(EXPERTS, HIDDEN, seed=1))
    return made


def dropping(factor: float, policy: str) -> Router:
    return router(moe_expert_capacity_factor=factor, moe_token_drop_policy=policy)


def tokens(count: int, seed: int = 2) -> Tensor:
    return numbers(count, 1, HIDDEN, seed=seed)


# Weights


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("definition", "config_type"),
    [(Qwen2MoeTopKRouter, Qwen2MoeConfig), (Qwen3MoeTopKRouter, Qwen3MoeConfig)],
    ids=["qwen2", "qwen3"],
)
def test_weights_are_those_of_transformers(definition: Any, config_type: Any, normalize: bool) -> None:
    mine, x = router(normalize=normalize), tokens(37)
    its = definition(
        config_type(
            hidden_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=TOP_K, norm_topk_prob=normalize
        )
    )
    its.load_state_dict({"weight": mine.weight.detach()})
    weights, chosen = mine(x)
    _, best, indices = its(x)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.zeros(37, EXPERTS).scatter(1, indices, best), rtol=0, atol=1e-7)
    assert torch.equal(chosen, torch.zeros(37, EXPERTS, dtype=torch.bool).scatter(1, indices, True))
    assert bool(((weights.sum(1) - 1).abs() < 1e-6).all()) is normalize
    upstream = numbers(37, EXPERTS, seed=3)
    (weights * upstream).sum().backward()
    (best * upstream.gather(1, indices)).sum().backward()
    torch.testing.assert_close(mine.weight.grad, its.weight.grad)


def test_halves_are_routed_in_fp32() -> None:
    """Logits of bf16 numbers, not bf16 logits: the choice is that of the float32 product."""
    mine, x = router(params_dtype=torch.bfloat16), tokens(64).bfloat16()
    assert mine.weight.dtype == torch.bfloat16
    weights, chosen = mine(x)
    logits = x.flatten(0, 1).float() @ mine.weight.float().T
    best, indices = logits.softmax(-1).topk(TOP_K)
    wanted = torch.zeros(64, EXPERTS).scatter(1, indices, best / best.sum(-1, keepdim=True))
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, wanted)
    assert torch.equal(chosen, wanted > 0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_gradient_of_halves_is_rounded_nowhere(device: str) -> None:
    """That of the weight in Megatron's buffer; that of the tokens once, to their dtype."""
    mine, x = router(params_dtype=torch.bfloat16).to(device), tokens(64).bfloat16().to(device)
    mine.weight.main_grad = torch.ones(EXPERTS, HIDDEN, device=device)
    x.requires_grad_()
    upstream = numbers(64, EXPERTS, seed=3).to(device)
    weights, _ = mine(x)
    weights.backward(upstream)
    wide, exact_x = (tensor.detach().double().requires_grad_() for tensor in (mine.weight, x))
    best, indices = (exact_x.flatten(0, 1) @ wide.T).softmax(-1).topk(TOP_K)
    exact = torch.zeros(64, EXPERTS, dtype=torch.float64, device=device)
    exact.scatter(1, indices, best / best.sum(-1, keepdim=True)).backward(upstream.double())
    assert mine.weight.grad_added_to_main_grad
    torch.testing.assert_close(mine.weight.main_grad.double() - 1, wide.grad, rtol=1e-5, atol=1e-5)
    assert x.grad is not None
    assert exact_x.grad is not None
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=2**-8, atol=1e-5)


def test_three_parts_are_all_of_a_number() -> None:
    x = numbers(4096, seed=6) * numbers(4096, seed=7).mul(8).exp()
    assert torch.equal(sum(part.double() for part in _thirds(x)), x.double())


# Capacity


def kept_by_hand(weights: Tensor, real: Tensor, capacity: int, policy: str) -> set[tuple[int, int]]:
    """Expert by expert: its real tokens in the order of the policy, as many as it has room for."""
    kept = set()
    for expert in range(EXPERTS):
        asking = [t for t in range(len(weights)) if weights[t, expert] > 0 and real[t]]
        if policy == "probs":
            asking.sort(key=lambda t, e=expert: -float(weights[t, e]))
        kept |= {(token, expert) for token in asking[:capacity]}
    return kept


@pytest.mark.parametrize("padding", [0, 13])
@pytest.mark.parametrize("factor", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("policy", ["probs", "position"])
def test_what_an_expert_keeps(policy: str, factor: float, padding: int) -> None:
    """Padding, here the rows that would have the best chances, gets no place."""
    count = 50
    x, real = tokens(count), torch.ones(count, dtype=torch.bool)
    real[:padding] = False
    x[:padding] *= 4
    free, limited = router(), dropping(factor, policy)
    limited.balance = Balance.empty(real, EXPERTS)
    every, chosen = free(x)
    every = every.detach()
    weights, kept = limited(x)
    capacity = math.ceil(count * TOP_K / EXPERTS * factor)
    wanted = kept_by_hand(every, real, capacity, policy)
    assert {(t, e) for t, e in kept.nonzero().tolist()} == wanted
    assert kept.sum(0).max() <= capacity
    assert torch.equal(weights, every * kept)
    asked = int(chosen[real].sum())
    assert 0 < len(wanted) < asked
    assert limited.load.tolist() == [*kept[real].sum(0).tolist(), asked - len(wanted)]


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_a_capacity_for_all_drops_nothing(policy: str) -> None:
    free, limited, x = router(), dropping(float(EXPERTS), policy), tokens(21)
    for one in (free, limited):
        one.balance = Balance.empty(torch.ones(21, dtype=torch.bool), EXPERTS)
    expected, found = free(x), limited(x)
    assert torch.equal(expected[0], found[0])
    assert torch.equal(expected[1], found[1])
    assert torch.equal(free.load, limited.load)
    assert (int(free.load.sum()), int(free.load[-1])) == (21 * TOP_K, 0)


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_a_dropped_token_gives_its_expert_no_gradient(policy: str) -> None:
    """The weights of the others are as without a capacity: nothing is made to add up to 1 again."""
    limited, x = dropping(0.1, policy), tokens(30).requires_grad_()
    weights, kept = limited(x)
    lost = ~kept.any(dim=1)
    assert 0 < int(lost.sum()) < 30
    (weights * numbers(30, EXPERTS, seed=4)).sum().backward()
    assert x.grad is not None
    assert bool((x.grad[lost] == 0).all())
    assert bool((x.grad[~lost] != 0).any(dim=-1).all())


# What is counted


def test_load_adds_up_over_micro_batches_and_only_in_training() -> None:
    mine, total = router(), torch.zeros(EXPERTS + 1)
    for seed, size in ((5, 7), (6, 12)):
        real = torch.arange(size) < size - 2
        mine.balance = Balance.empty(real, EXPERTS)
        _, chosen = mine(tokens(size, seed))
        total[:-1] += chosen[real].sum(0)
        assert torch.equal(mine.load, total)
    mine.eval()
    balance = mine.balance = Balance.empty(torch.ones(7, dtype=torch.bool), EXPERTS)
    mine(tokens(7, 5))
    assert torch.equal(mine.load, total)
    assert balance.sums[:EXPERTS].sum() == 7 * TOP_K  # the loss is there in evaluation, too
    mine.train()
    mine.balance = None
    mine(tokens(7, 5))
    assert torch.equal(mine.load, total)


def test_what_is_recomputed_is_not_counted_twice() -> None:
    mine, x = dropping(0.5, "probs"), tokens(9)
    balance = mine.balance = Balance.empty(torch.arange(9) < 7, EXPERTS)
    first, _ = mine(x)
    once, load = balance.sums.clone(), mine.load.clone()
    mine(x)
    assert torch.equal(balance.sums, 2 * once)  # a second layer would add its own
    balance.sums.copy_(once)
    mine.load.copy_(load)
    balance.closed = True
    again, _ = mine(x)
    assert torch.equal(again, first)
    assert torch.equal(balance.sums, once)
    assert torch.equal(mine.load, load)


def balance_loss(rows: float, **changes: Any) -> BalanceLoss:
    return BalanceLoss(
        **({"coefficient": 0.3, "z_coefficient": 0.2, "weight": 5.0, "groups": ()} | changes), rows=rows
    )


def test_the_balance_loss_of_a_layer_is_that_of_transformers() -> None:
    """Its value, and its gradient beside that of the weights, with padding left out."""
    mine, x = router(), tokens(20)
    real = torch.arange(20) % 5 != 0
    upstream, downstream = numbers(20, EXPERTS, seed=7), numbers(20, 1, HIDDEN, seed=8)
    balance = mine.balance = Balance.empty(real, EXPERTS)
    weights, _ = mine(x)
    loss = balance_loss(float(real.sum()))
    # The layer's output stands between the router and the end of the chunk.
    hidden = (weights * upstream).sum(1)[:, None, None] * downstream
    Join.apply(hidden, None, balance, loss).sum().backward()

    weight = mine.weight.detach().clone().requires_grad_()
    logits = x.flatten(0, 1) @ weight.T
    best, indices = logits.softmax(-1).topk(TOP_K)
    plain = torch.zeros(20, EXPERTS).scatter(1, indices, best / best.sum(-1, keepdim=True))
    auxiliary = load_balancing_loss_func((logits,), EXPERTS, TOP_K, real[None])
    squares = logits.logsumexp(-1)[real].square().mean()
    objective = ((plain * upstream).sum(1)[:, None, None] * downstream).sum()
    (objective + 5.0 * (0.3 * auxiliary + 0.2 * squares)).backward()
    torch.testing.assert_close(loss.values, torch.stack((auxiliary, squares)).detach())
    torch.testing.assert_close(mine.weight.grad, weight.grad)


# From stage to stage


@pytest.mark.parametrize("width", [4, 16, 34, 4096])
@pytest.mark.parametrize("size", [1, 2 * EXPERTS + 1, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_travel_bit_by_bit(dtype: torch.dtype, size: int, width: int) -> None:
    """As rows behind hidden states of any dtype, NaN and subnormal numbers too."""
    values = numbers(size) * 10.0 ** torch.arange(-40, 40).repeat(4)[:size]
    values[0] = 3e38
    if size > 3:
        values[1], values[2], values[3] = math.nan, -math.inf, 1e-45
    like = torch.zeros(5, 1, width, dtype=dtype)
    rows = to_rows(values, like)
    assert rows.shape == (num_rows(size, like), 1, width)
    assert rows.dtype == dtype
    assert (rows.shape[0] - 1) * width * dtype.itemsize < 4 * size <= rows.numel() * dtype.itemsize
    found = from_rows(torch.cat((like, rows))[5:], size)
    assert found.dtype == torch.float32
    assert torch.equal(found.view(torch.int32), values.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_join_and_part_are_inverse(dtype: torch.dtype) -> None:
    """Between two stages: the sums of the first go on, the gradient of the sums comes back."""
    hidden, size = tokens(6).to(dtype).requires_grad_(), 2 * EXPERTS + 1
    balance = Balance.empty(torch.ones(6, dtype=torch.bool), EXPERTS)
    balance.sums += numbers(size, seed=9)
    joined = Join.apply(hidden, None, balance, None)
    assert balance.closed
    assert joined.shape[0] == 6 + num_rows(size, hidden)
    states, sums = Part.apply(joined, size)
    assert torch.equal(states, hidden)
    assert torch.equal(sums, balance.sums)
    mine, its = numbers(6, 1, HIDDEN, seed=10).to(dtype), numbers(size, seed=11)
    torch.autograd.backward((states, sums), (mine, its))
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, mine)
    assert balance.gradient is not None
    assert torch.equal(balance.gradient, its)


# Experts


class Alone:
    """A process group of one rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def test_experts_are_those_of_transformers() -> None:
    """Values and gradients; one expert has no token."""
    groups = SimpleNamespace(ep=Alone(), expt_tp=Alone(), expt_dp=Alone())
    mine = GroupedExperts(EXPERTS, config(), pg_collection=groups)
    its = Qwen3MoeExperts(
        Qwen3MoeConfig(hidden_size=HIDDEN, num_experts=EXPERTS, moe_intermediate_size=WIDTH)
    )
    up, down = (0.1 * numbers(EXPERTS, *shape, seed=12) for shape in ((2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)))
    with torch.no_grad():
        for parameter, value in (
            (mine.linear_fc1.weight, up), (mine.linear_fc2.weight, down),
            (its.gate_up_proj, up), (its.down_proj, down),
        ):  # fmt: skip
            parameter.copy_(value)
    x, weights = numbers(15, HIDDEN, seed=14), numbers(15, 2, seed=15)
    experts = torch.stack((torch.arange(15) % 4, 5 + torch.arange(15) % 3), dim=1)  # nobody goes to expert 4
    order = experts.flatten().argsort(stable=True)
    counts = experts.flatten().bincount(minlength=EXPERTS)
    assert counts[4] == 0
    output, bias = mine(x.repeat_interleave(2, dim=0)[order], counts, weights.flatten()[order])
    assert bias is None
    found = torch.zeros(15, HIDDEN).index_add(0, order // 2, output)
    expected = its(x, experts, weights)
    torch.testing.assert_close(found, expected)
    for result in (found, expected):
        (result * numbers(15, HIDDEN, seed=16)).sum().backward()
    torch.testing.assert_close(mine.linear_fc1.weight.grad, its.gate_up_proj.grad)
    torch.testing.assert_close(mine.linear_fc2.weight.grad, its.down_proj.grad)
