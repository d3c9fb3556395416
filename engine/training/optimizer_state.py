"""The state of Megatron's distributed optimizer as boxes of whole tensors, where each rank holds it.

A data-parallel rank owns a flat range of the elements of a parameter, which is at most three boxes of a
matrix: the end of a row, whole rows, and the beginning of one. Written like this nothing has to be gathered
to save or scattered to load, and any other layout can read what it needs.

Under Megatron-FSDP the range is of whole rows, and weights lie in such boxes too.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from engine.model.gpt import BraidGPTModel
from engine.model.lora import adapter_state
from engine.runtime.fsdp import Rows, local
from engine.runtime.mcore import Groups

_PREFIX = "optimizer.state"


@dataclass(frozen=True, kw_only=True)
class StateBox:
    """Elements [start, stop) of this rank's flat range of a parameter, and the box that they are."""

    parameter: Tensor
    key: str
    """Of the parameter in the checkpoint."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    stop: int
    main: bool
    """False for copies that another rank of the model writes."""

    def state_key(self, name: str) -> str:
        """Key of the state `name`: param (the master weight), exp_avg or exp_avg_sq."""
        return f"{_PREFIX}.{name}.{self.key}"


def distributed_parts(optimizer: Any) -> list[DistributedOptimizer] | None:
    """The distributed optimizers inside an optimizer; None if it is of another kind."""
    parts = list(getattr(optimizer, "chained_optimizers", [optimizer]))
    return parts if all(isinstance(part, DistributedOptimizer) for part in parts) else None


def state_boxes(part: DistributedOptimizer, sharded: Mapping[Tensor, Any]) -> Iterator[StateBox]:
    """All of a rank's state. `sharded` has Megatron's description of each model parameter."""
    if part.ddp_config.use_megatron_fsdp:
        yield from row_boxes((rows for rows in _rows(part).values() if rows.trained), sharded)
        return
    for parameter in part.model_param_group_index_map:
        owned = part._get_model_param_range_map(parameter)["param"]
        yield from _boxes_of(parameter, sharded[parameter], owned.start, owned.end)


def row_boxes(rows: Iterable[Rows], sharded: Mapping[Tensor, Any]) -> Iterator[StateBox]:
    """The boxes of rows of parameters, as far as those are in `sharded`."""
    for item in rows:
        if item.parameter in sharded:
            yield from _boxes_of(item.parameter, sharded[item.parameter], item.start, item.stop)


def _boxes_of(
    parameter: Tensor, description: ShardedTensor | ShardedTensorFactory, owned: int, end: int
) -> Iterator[StateBox]:
    """Elements [owned, end) of a parameter."""
    for piece, begin in _pieces(description):
        first, last = max(owned, begin), min(end, begin + math.prod(piece.local_shape))
        for start, stop, at, sizes in _boxes(first - begin, last - begin, tuple(piece.local_shape)):
            lead = piece.prepend_axis_num
            inner = zip(piece.global_offset[lead:], at, strict=True)
            yield StateBox(
                parameter=parameter,
                key=piece.key,
                shape=tuple(piece.global_shape),
                offsets=(*piece.global_offset[:lead], *(o + a for o, a in inner)),
                sizes=(*(1 for _ in range(lead)), *sizes),
                start=start + begin - owned,
                stop=stop + begin - owned,
                # The last number says which data-parallel copy of the parameter it is.
                main=is_main_replica(piece.replica_id[:-1]),
            )


def _rows(part: DistributedOptimizer) -> dict[Tensor, Rows]:
    (model,) = part.model_chunks  # there are no pipelines under Megatron-FSDP
    rows: dict[Tensor, Rows] = model.rows
    return rows


def _pieces(description: ShardedTensor | ShardedTensorFactory) -> Iterator[tuple[ShardedTensor, int]]:
    """The tensors that a parameter is stored as, with the flat position in it at which each begins."""
    if isinstance(description, ShardedTensor):
        yield description, 0
        return
    # Without memory, which a parameter has not always under Megatron-FSDP.
    whole = torch.empty_like(description.data, device="meta")
    for piece in _leaves(dataclasses.replace(description, data=whole).build()):
        assert piece.data.is_contiguous(), piece.key
        yield piece, piece.data.storage_offset()


def _leaves(value: Any) -> Iterator[ShardedTensor]:
    if isinstance(value, ShardedTensor):
        yield value
    else:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)


def _boxes(
    first: int, last: int, shape: tuple[int, ...]
) -> Iterator[tuple[int, int, tuple[int, ...], tuple[int, ...]]]:
    """Flat elements [first, last) of a tensor as (start, stop, offsets, sizes) of boxes in it."""
    if len(shape) == 1:
        if first < last:
            yield first, last, (first,), (last - first,)
        return
    inner = math.prod(shape[1:])
    while first < last:
        row, within = divmod(first, inner)
        whole = (last - first) // inner if within == 0 else 0
        if whole:
            stop = first + whole * inner
            yield first, stop, (row, *(0 for _ in shape[1:])), (whole, *shape[1:])
        else:
            stop = min(last, (row + 1) * inner)
            for start, end, at, sizes in _boxes(within, within + stop - first, shape[1:]):
                yield start + row * inner, end + row * inner, (row, *at), (1, *sizes)
        first = stop


def states_of(part: DistributedOptimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The flat tensors of this rank's range of a parameter, the master weight as `param`."""
    if part.ddp_config.use_megatron_fsdp:
        main, inner = _rows(part)[parameter].main, part.optimizer
        hosted = inner.hosted.get(main)
        master = local(main.detach()).view(-1) if hosted is None else hosted.master
        return {"param": master, **{name: state.view(-1) for name, state in inner.state[main].items()}}
    found = part._get_main_param_and_optimizer_states(parameter)
    return {name: state for name, state in found.items() if isinstance(state, Tensor) and state.dim()}


def set_states(part: DistributedOptimizer, parameter: Tensor, states: Mapping[str, Tensor]) -> None:
    """Replace what `states_of` gives."""
    if part.ddp_config.use_megatron_fsdp:
        for name, state in states_of(part, parameter).items():
            state.copy_(states[name])
        _rows(part)[parameter].weight.copy_(states["param"])
        return
    known = part._get_main_param_and_optimizer_states(parameter)
    part._set_main_param_and_optimizer_states(parameter, {**known, **states})


def load_groups(optimizer: Any, state: Any) -> None:
    """Restore what an optimizer's `state_dict` gives: the settings of parameter groups, the number of steps
    among them, and the loss scale.
    """
    part, *others = optimizer.chained_optimizers
    if others or not (isinstance(part, DistributedOptimizer) and part.ddp_config.use_megatron_fsdp):
        optimizer.load_state_dict(state)
        return
    # Megatron's own wants the state of every parameter here.
    groups = part.optimizer.param_groups
    stored = [{**group, "params": []} for group in state["optimizer"]["param_groups"]]
    for group, saved in zip(groups, part._filter_and_reorder_param_groups(groups, stored), strict=True):
        group.update({**saved, "params": group["params"]})
    if part.grad_scaler is not None and "grad_scaler" in state:
        part.grad_scaler.load_state_dict(state["grad_scaler"])


def descriptions(model_states: Mapping[str, Any]) -> dict[Tensor, Any]:
    """Megatron's descriptions of model parameters, by parameter."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    sharded, _ = extract_sharded_tensors_and_factories(dict(model_states))
    return {item.data: item for item in nested_values(sharded) if isinstance(item.data, torch.nn.Parameter)}


def model_state(chunk: BraidGPTModel, layers: range, groups: Groups) -> dict[str, Any]:
    """Megatron's description of a chunk, or of its adapters; its layers have the global indices `layers`."""
    state: dict[str, Any] = (
        chunk.sharded_state_dict() if chunk.lora is None else adapter_state(chunk, layers, groups)
    )
    return state
