"""AdamW with the state layout of Transformer Engine's and apex's FusedAdam, on torch's own fused kernel.

Megatron's fallback to torch.optim.AdamW keeps a `step` tensor per parameter, which its fully reshardable
checkpoint format cannot load. Here `step` is one number of the parameter group and a parameter's state is its
two moments, so that checkpoints are interchangeable with runs that use Transformer Engine.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from engine.runtime.fsdp import local
from engine.runtime.kernels import fused
from engine.runtime.offload import Hosted, update_hosted


class FusedAdamW(torch.optim.Optimizer):
    """Decoupled weight decay (Loshchilov and Hutter, 2019): w <- w - lr * (m_hat / (sqrt(v_hat) + eps) +
    weight_decay * w).

    Arithmetic is in float32; moments are stored in `moment_dtypes`, where they are, and in that of their
    parameter otherwise. Of a DTensor, this rank's part is updated.
    """

    moment_dtypes: Mapping[str, torch.dtype] = {}
    """By the state's name, exp_avg or exp_avg_sq; float32 for parameters in `hosted`."""

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
        self.hosted: dict[Tensor, Hosted] = {}
        """Parameters that are updated on the host."""

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
                self._make_state(param)
            if here := [param for param in params if param not in self.hosted]:
                self._step_here(group, here, done)
            self._step_on_host(group, [self.hosted[param] for param in params if param in self.hosted], done)

    def make_states(self) -> None:
        """Moments, zero, for all parameters that have none yet."""
        for group in self.param_groups:
            for param in group["params"]:
                self._make_state(param)

    def _make_state(self, param: Tensor) -> None:
        if self.state[param]:
            return
        for name in ("exp_avg", "exp_avg_sq"):
            if param in self.hosted:
                self.state[param][name] = torch.zeros_like(self.hosted[param].master)
            else:
                dtype = self.moment_dtypes.get(name, param.dtype)
                self.state[param][name] = torch.zeros_like(local(param), dtype=dtype)

    def _step_here(self, group: Mapping[str, Any], params: list[Tensor], done: int) -> None:
        first = [self.state[param]["exp_avg"] for param in params]
        second = [self.state[param]["exp_avg_sq"] for param in params]
        gradients = [local(param.grad) for param in params if param.grad is not None]
        own = [local(param) for param in params]
        if {state.dtype for state in first + second} == {param.dtype for param in params}:
            _step_with_torch(group, own, gradients, first, second, done)
        else:
            self._step_mixed(group, own, gradients, first, second, done)

    def _step_on_host(self, group: Mapping[str, Any], items: list[Hosted], done: int) -> None:
        def update(item: Hosted, part: slice, gradient: Tensor) -> None:
            state = self.state[item.main]
            first, second = state["exp_avg"][part], state["exp_avg_sq"][part]
            _step_with_torch(group, [item.master[part]], [gradient], [first], [second], done)

        update_hosted(items, update)

    def _step_mixed(
        self,
        group: Mapping[str, Any],
        params: list[Tensor],
        gradients: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        done: int,
    ) -> None:
        (beta1, beta2), rate = group["betas"], group["lr"]
        # Numbers that change from step to step come in a tensor: as Python numbers they would be compiled in.
        numbers = [
            beta1,
            beta2,
            1 - rate * group["weight_decay"],
            rate / (1 - beta1 ** (done + 1)),
            (1 - beta2 ** (done + 1)) ** 0.5,
            group["eps"],
        ]
        factors = torch.tensor(numbers, dtype=torch.float32, device=params[0].device)
        for param, grad, exp_avg, exp_avg_sq in zip(params, gradients, exp_avgs, exp_avg_sqs, strict=True):
            _update(param, grad, exp_avg, exp_avg_sq, factors)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but moments go where they belong, in their own dtype, and those that are there already
        are not copied.
        """
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            assert len(group["params"]) == len(saved["params"])
            for number, param in zip(saved["params"], group["params"], strict=True):
                if given := state_dict["state"].get(number):
                    self._make_state(param)
                    for name, own in self.state[param].items():
                        if given[name] is not own:
                            own.copy_(given[name])
            group.update({name: value for name, value in saved.items() if name != "params"})


def _step_with_torch(
    group: Mapping[str, Any],
    params: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    done: int,
) -> None:
    adamw(
        params,
        gradients,
        exp_avgs,
        exp_avg_sqs,
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


@fused
def _update(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, factors: Tensor) -> None:
    """One step of AdamW on float32 parameters with moments of any dtype. `factors`: beta1, beta2, the part of
    a weight that decay leaves, the rate over the bias correction of the first moment, the root of that of the
    second, eps.
    """
    beta1, beta2, left, rate, root, eps = factors.unbind()
    first = torch.lerp(grad, exp_avg.float(), beta1)
    second = torch.lerp(grad * grad, exp_avg_sq.float(), beta2)
    param.copy_(param * left - rate * first / (second.sqrt() / root + eps))
    exp_avg.copy_(first)
    exp_avg_sq.copy_(second)
