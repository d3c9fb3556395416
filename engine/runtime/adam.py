"""AdamW with the state layout of Transformer Engine's and apex's FusedAdam, on torch's own fused kernel.

Megatron's fallback to torch.optim.AdamW keeps a `step` tensor per parameter, which its fully reshardable
checkpoint format cannot load. Here `step` is one number of the parameter group and a parameter's state is its
two moments, so that checkpoints are interchangeable with runs that use Transformer Engine.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw


class FusedAdamW(torch.optim.Optimizer):
    """Decoupled weight decay (Loshchilov and Hutter, 2019): w <- w - lr * (m_hat / (sqrt(v_hat) + eps) +
    weight_decay * w).

    Moments have the dtype and device of their parameter.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        **unused: Any,
    ) -> None:
        assert adam_w_mode, "only decoupled weight decay is implemented"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. `closure` is not used."""
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None and param.numel()]
            if not params:
                continue
            done = int(group.get("step", 0))
            group["step"] = done + 1
            for param in params:
                if not self.state[param]:
                    self.state[param]["exp_avg"] = torch.zeros_like(param)
                    self.state[param]["exp_avg_sq"] = torch.zeros_like(param)
            adamw(
                params,
                [param.grad for param in params],
                [self.state[param]["exp_avg"] for param in params],
                [self.state[param]["exp_avg_sq"] for param in params],
                [],
                # The kernel adds one to the step itself, and wants it where the parameter is.
                [torch.full((), float(done), device=param.device) for param in params],
                foreach=False,
                capturable=False,
                differentiable=False,
                fused=True,
                grad_scale=None,
                found_inf=None,
                has_complex=False,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
