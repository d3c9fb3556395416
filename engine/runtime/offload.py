"""AdamW's master weights and moments in host memory, where the update then happens (Ren et al., 2021,
ZeRO-Offload). The GPU keeps weights and gradients: 6 bytes a parameter in bf16 in place of 18.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from engine.runtime.fsdp import local

# Elements that travel at once, and how many of such pieces are on their way while another one is updated.
_PIECE = 2**25
_AHEAD = 3


@dataclass(frozen=True, kw_only=True)
class Hosted:
    """A flat range of a parameter whose master weight is on the host."""

    main: Tensor
    """What Megatron takes for the master weight, and where gradients arrive. That of a weight in half
    precision has no memory of its own any more, and reads as not a number.
    """
    master: Tensor
    """float32 on the host, in pinned memory beside a GPU."""
    target: Tensor
    """The range of the model's weight, in its dtype."""

    @property
    def gradient(self) -> Tensor:
        """Where it is computed, flat."""
        assert self.main.grad is not None
        return local(self.main.grad).view(-1)


Update = Callable[[Hosted, slice, Tensor], None]


def update_hosted(items: Sequence[Hosted], update: Update) -> None:
    """Have `update` change a part of a master weight by the gradient of the part, on the host, for all parts
    of all `items`, and give the model what comes of it. Gradients come from the GPU, and weights go there,
    while other parts are updated; the current stream waits for the weights.
    """
    pieces = [
        (item, slice(first, min(first + _PIECE, item.master.numel())))
        for item in items
        for first in range(0, item.master.numel(), _PIECE)
    ]
    if not pieces:
        return
    if pieces[0][0].main.is_cuda:
        _Lanes(pieces, update).run()
        return
    for item, part in pieces:
        update(item, part, item.gradient[part])
        item.target[part] = item.master[part]


class _Lanes:
    """Pieces on their way between a GPU and the host."""

    def __init__(self, pieces: Sequence[tuple[Hosted, slice]], update: Update) -> None:
        self.pieces, self.update = pieces, update
        self.current = torch.cuda.current_stream()
        self.inward, self.outward = torch.cuda.Stream(), torch.cuda.Stream()
        longest = max(part.stop - part.start for _, part in pieces)
        self.gradients = [torch.empty(longest, pin_memory=True) for _ in range(_AHEAD)]
        self.weights: dict[tuple[int, torch.dtype], Tensor] = {}
        self.sent = [torch.cuda.Event() for _ in range(_AHEAD)]

    def run(self) -> None:
        self.inward.wait_stream(self.current)
        self.outward.wait_stream(self.current)
        arrived = [self.fetch(number) for number in range(min(_AHEAD, len(self.pieces)))]
        for number, (item, part) in enumerate(self.pieces):
            lane, size = number % _AHEAD, part.stop - part.start
            arrived[number].synchronize()
            self.update(item, part, self.gradients[lane][:size])
            if number + _AHEAD < len(self.pieces):
                arrived.append(self.fetch(number + _AHEAD))
            self.sent[lane].synchronize()
            with torch.cuda.stream(self.outward):
                item.target[part].copy_(self.narrowed(item, part, lane), non_blocking=True)
                self.sent[lane].record(self.outward)
        self.current.wait_stream(self.outward)

    def fetch(self, number: int) -> torch.cuda.Event:
        item, part = self.pieces[number]
        with torch.cuda.stream(self.inward):
            place = self.gradients[number % _AHEAD][: part.stop - part.start]
            place.copy_(item.gradient[part], non_blocking=True)
            return self.inward.record_event()

    def narrowed(self, item: Hosted, part: slice, lane: int) -> Tensor:
        """A master weight in the model's dtype, in pinned memory."""
        dtype = item.target.dtype
        if dtype == item.master.dtype:
            return item.master[part]
        if (lane, dtype) not in self.weights:
            self.weights[lane, dtype] = torch.empty(len(self.gradients[0]), dtype=dtype, pin_memory=True)
        return self.weights[lane, dtype][: part.stop - part.start].copy_(item.master[part])


def offload(part: DistributedOptimizer, fraction: float) -> None:
    """Move master weights of at least `fraction` of the elements that a distributed optimizer owns to the
    host. Its inner optimizer, a FusedAdamW, updates them there.
    """
    if part.ddp_config.use_megatron_fsdp:
        for model in part.model_chunks:
            _offload_rows(part.optimizer.hosted, model, fraction)
        return
    hosted, pairs = part.optimizer.hosted, list(_pairs(part))
    wanted = fraction * sum(main.numel() for _, main, _ in pairs)
    done = 0
    for model, main, half in pairs:
        if done >= wanted:
            break
        done += main.numel()
        owned = part._get_model_param_range_map(model)["param"]
        hosted[main] = Hosted(
            main=main,
            master=_to_host(main.detach()),
            target=model.detach().view(-1)[owned.start : owned.end],
        )
        if half:
            main.data = torch.full((), float("nan"), device=main.device).expand(main.shape)
    _redirect(part)


def _to_host(tensor: Tensor) -> Tensor:
    copy = tensor.to("cpu", torch.float32, copy=True)
    return copy.pin_memory() if tensor.is_cuda else copy


def _offload_rows(hosted: dict[Tensor, Hosted], model: Any, fraction: float) -> None:
    """The same under Megatron-FSDP. A group of parameters has one buffer of master weights there, so that
    whole groups move.
    """
    buffers = model.param_and_grad_buffer
    groups = [group for group in buffers.parameter_groups if group.main_weight_buffer is not None]
    wanted = fraction * sum(group.main_weight_buffer.data.numel() for group in groups)
    done = 0
    for group in groups:
        if done >= wanted:
            break
        done += group.main_weight_buffer.data.numel()
        for rows in (model.rows[parameter] for parameter in group.params):
            own = local(rows.main.detach())
            hosted[rows.main] = Hosted(main=rows.main, master=_to_host(own.view(-1)), target=rows.weight)
            unreadable = torch.full((), float("nan"), device=own.device).expand(own.shape)
            # Two DTensors refer to the buffer, of which one is Megatron's own.
            for tensor in (rows.main, buffers.dist_main_weight[rows.name]):
                tensor._local_tensor = unreadable
        group.main_weight_buffer = None  # so that nothing is copied from it after an update


def _pairs(part: DistributedOptimizer) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Every weight of the model, this rank's range of its master weight, and whether it is in half
    precision.
    """
    kinds = (
        (part.model_float16_groups, part.shard_fp32_from_float16_groups, True),
        (part.model_fp32_groups, part.shard_fp32_groups, False),
    )
    for model_groups, main_groups, half in kinds:
        for models, mains in zip(model_groups, main_groups, strict=True):
            for model, main in zip(models, mains, strict=True):
                yield model, main, half


def _redirect(part: DistributedOptimizer) -> None:
    """Have Megatron's optimizer find states on the host, and leave weights alone that came from there."""
    hosted = part.optimizer.hosted
    copy, get, put = (
        part._copy_main_params_to_model_params,
        part._get_main_param_and_optimizer_states,
        part._set_main_param_and_optimizer_states,
    )

    def copy_others() -> None:
        with _without(part, hosted):
            copy()

    def get_states(model: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = get(model)
        if (item := hosted.get(found["param"])) is not None:
            found["param"] = item.master
        return found

    def set_states(model: Tensor, states: dict[str, Any]) -> None:
        if (item := hosted.get(get(model)["param"])) is None:
            put(model, states)
            return
        for name, state in get_states(model).items():
            state.copy_(states[name])
        item.target.copy_(item.master)

    part._copy_main_params_to_model_params = copy_others
    part._get_main_param_and_optimizer_states = get_states
    part._set_main_param_and_optimizer_states = set_states


@contextlib.contextmanager
def _without(part: DistributedOptimizer, hosted: dict[Tensor, Hosted]) -> Iterator[None]:
    """Hide weights in half precision whose master weights are on the host."""
    models, mains = part.model_float16_groups, part.shard_fp32_from_float16_groups
    left = [
        [(model, main) for model, main in zip(*both, strict=True) if main not in hosted]
        for both in zip(models, mains, strict=True)
    ]
    part.model_float16_groups = [[model for model, _ in group] for group in left]
    part.shard_fp32_from_float16_groups = [[main for _, main in group] for group in left]
    try:
        yield
    finally:
        part.model_float16_groups, part.shard_fp32_from_float16_groups = models, mains
