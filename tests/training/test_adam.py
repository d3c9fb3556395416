"""FusedAdamW updates as torch.optim.AdamW does, and keeps the state that Megatron's checkpoints expect."""

import torch

from engine.runtime.adam import FusedAdamW


def test_updates_equal_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(5, 7, generator=generator), torch.randn(3, generator=generator)]
    mine = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    theirs = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}

    def groups(params: list[torch.nn.Parameter]) -> list[dict]:
        return [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:], "weight_decay": 0.0}]

    optimizer, reference = FusedAdamW(groups(mine), **settings), torch.optim.AdamW(groups(theirs), **settings)
    for _ in range(5):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_state_is_two_moments_and_the_step_belongs_to_the_group() -> None:
    param = torch.nn.Parameter(torch.ones(4))
    optimizer = FusedAdamW([param], lr=1e-3)
    param.grad = torch.ones(4)
    optimizer.step()
    optimizer.step()
    assert set(optimizer.state[param]) == {"exp_avg", "exp_avg_sq"}
    assert optimizer.param_groups[0]["step"] == 2


def test_parameter_without_gradient_stays() -> None:
    param = torch.nn.Parameter(torch.ones(4))
    FusedAdamW([param], lr=1e-3, weight_decay=0.5).step()
    assert torch.equal(param, torch.ones(4))


def test_half_precision_moments_follow_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2000, generator=generator)
    exact, stored = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    reference, optimizer = FusedAdamW([exact], **settings), FusedAdamW([stored], **settings)
    optimizer.moment_dtypes = {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}
    for step in range(50):
        exact.grad = torch.randn(2000, generator=generator) / 100
        stored.grad = exact.grad.clone()
        reference.step()
        optimizer.step()
        if step == 0:  # moments are rounded behind the update: the first one sees none of it
            torch.testing.assert_close(stored, exact, rtol=1e-6, atol=1e-6)
    assert {state.dtype for state in optimizer.state[stored].values()} == {torch.bfloat16}
    moved = (exact - start).norm()
    assert 0 < (stored - exact).norm() < 0.01 * moved


def test_half_precision_moments_load_as_they_were() -> None:
    def made() -> tuple[torch.nn.Parameter, FusedAdamW]:
        param = torch.nn.Parameter(torch.ones(9))
        optimizer = FusedAdamW([param], lr=1e-2)
        optimizer.moment_dtypes = {"exp_avg": torch.bfloat16}
        param.grad = torch.linspace(-1, 1, 9)
        return param, optimizer

    (param, optimizer), (other, loaded) = made(), made()
    optimizer.step()
    loaded.load_state_dict(optimizer.state_dict())
    for name, dtype in {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.float32}.items():
        assert loaded.state[other][name].dtype == dtype
        assert loaded.state[other][name].equal(optimizer.state[param][name])
