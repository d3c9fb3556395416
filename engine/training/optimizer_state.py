"""The state of Megatron's distributed optimizer as boxes of whole tensors, where each rank holds it.

A data-parallel rank owns a flat range of the elements of a parameter, which is at most three boxes of a
matrix: the end of a row, whole rows, and the beginning of one. Written like this nothing has to be gathered
to save or scattered to load, and any other layout can read what it needs.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

_PREFIX = "optimizer.state"


@dataclass(frozen=True, kw_only=True)
class StateBox:
    """Elements [start, stop) of this rank's flat state of a parameter, and the box that they are."""

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
    for parameter in part.model_param_group_index_map:
        owned = part._get_model_param_range_map(parameter)["param"]
        for piece, begin in _pieces(sharded[parameter]):
            first = max(owned.start, begin)
            last = min(owned.end, begin + math.prod(piece.local_shape))
            for start, stop, at, sizes in _boxes(first - begin, last - begin, tuple(piece.local_shape)):
                lead = piece.prepend_axis_num
                inner = zip(piece.global_offset[lead:], at, strict=True)
                yield StateBox(
                    parameter=parameter,
                    key=piece.key,
                    shape=tuple(piece.global_shape),
                    offsets=(*piece.global_offset[:lead], *(o + a for o, a in inner)),
                    sizes=(*(1 for _ in range(lead)), *sizes),
                    start=start + begin - owned.start,
                    stop=stop + begin - owned.start,
                    # The last number says which data-parallel copy of the parameter it is.
                    main=is_main_replica(piece.replica_id[:-1]),
                )


def _pieces(description: ShardedTensor | ShardedTensorFactory) -> Iterator[tuple[ShardedTensor, int]]:
    """The tensors that a parameter is stored as, with the flat position in it at which each begins."""
    if isinstance(description, ShardedTensor):
        yield description, 0
        return
    for piece in _leaves(description.build()):
        assert piece.data.is_contiguous(), piece.key
        offset = piece.data.data_ptr() - description.data.data_ptr()
        yield piece, offset // piece.data.itemsize


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
    found = part._get_main_param_and_optimizer_states(parameter)
    return {name: state for name, state in found.items() if isinstance(state, Tensor) and state.dim()}


def set_states(part: DistributedOptimizer, parameter: Tensor, states: Mapping[str, Tensor]) -> None:
    """Replace what `states_of` gives."""
    known = part._get_main_param_and_optimizer_states(parameter)
    part._set_main_param_and_optimizer_states(parameter, {**known, **states})


def descriptions(model_states: Mapping[str, Any]) -> dict[Tensor, Any]:
    """Megatron's descriptions of model parameters, by parameter."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    sharded, _ = extract_sharded_tensors_and_factories(dict(model_states))
    return {item.data: item for item in nested_values(sharded) if isinstance(item.data, torch.nn.Parameter)}
