"""Where the time of a step goes, by the timers of Megatron's schedules.

Megatron's timers wait for the device before and after what they time, so steps under them are slower than
others: they are steps of their own, which no throughput is taken from.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# Names in megatron.core: schedules.py, p2p_communication.py and finalize_model_grads.py of 0.16.1 and 0.19.2.
_FORWARD = ("forward-compute",)
_BACKWARD = ("backward-compute",)
_COMMUNICATION = (
    "forward-recv", "forward-send", "backward-recv", "backward-send", "forward-send-backward-recv",
    "backward-send-forward-recv", "forward-send-forward-recv", "backward-send-backward-recv",
    "forward-backward-send-forward-backward-recv", "all-grads-sync", "conditional-embedder-grads-all-reduce",
    "non-tensor-parallel-grads-all-reduce", "embedding-grads-all-reduce",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """Seconds of a step under timers, mean over these steps and over all ranks. The parts add up to
    `step_s`.
    """

    steps: int
    step_s: float
    forward_s: float
    """Forward passes, with the collectives of tensor, context and expert parallelism, and with the gathering
    of weights that is left to them.
    """

    backward_s: float
    """Backward passes, recomputation and the same collectives included, and the part of gradient reduction
    that runs beside them.
    """

    communication_s: float
    """Exchange between pipeline stages, waiting for the other stage included, and the gradient reduction that
    is left when the backward passes have ended.
    """

    optimizer_s: float
    """Gradient norm, clipping, update, and the gathering of weights that is not left to the forward pass."""

    data_s: float
    """Waiting for micro-batches."""

    other_s: float
    """The rest: copies to the device, waiting for slower ranks, the schedule itself, the sum of losses."""


def measure_breakdown(
    take_step: Callable[[], float], models: Sequence[Any], optimizer: Any, *, steps: int
) -> Breakdown:
    """Take `steps` steps under timers; call on every rank. `take_step` runs one and returns the seconds that
    it waited for data.
    """
    rows = [_timed(take_step, models, optimizer) for _ in range(steps)]
    sums = torch.tensor(rows, dtype=torch.float64, device=torch.cuda.current_device()).mean(0)
    dist.all_reduce(sums)
    step, forward, backward, communication, update, data = (sums / dist.get_world_size()).tolist()
    return Breakdown(
        steps=steps,
        step_s=step,
        forward_s=forward,
        backward_s=backward,
        communication_s=communication,
        optimizer_s=update,
        data_s=data,
        other_s=max(0.0, step - forward - backward - communication - update - data),
    )


def _timed(take_step: Callable[[], float], models: Sequence[Any], optimizer: Any) -> list[float]:
    """Seconds on this rank: whole step, forward, backward, communication, optimizer, data."""
    from megatron.core.timers import Timers

    timers = Timers(log_level=2, log_option="minmax")
    configs = [model.module.config for model in models]
    update, spent = optimizer.step, [0.0]

    def timed_update() -> Any:
        torch.cuda.synchronize()
        began = time.perf_counter()
        result = update()
        torch.cuda.synchronize()
        spent[0] += time.perf_counter() - began
        return result

    for config in configs:
        config.timers = timers
    optimizer.step = timed_update
    try:
        torch.cuda.synchronize()
        began = time.perf_counter()
        waited = take_step()
        torch.cuda.synchronize()
        step = time.perf_counter() - began
    finally:
        optimizer.step = update
        for config in configs:
            config.timers = None
    parts = [sum(timers(name).elapsed() for name in names) for names in (_FORWARD, _BACKWARD, _COMMUNICATION)]
    return [step, *parts, spent[0], waited]
