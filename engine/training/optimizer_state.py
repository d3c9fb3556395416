"""The state of Megatron's optimizers as boxes of whole tensors, where each rank holds it.

Under the distributed optimizer a data-parallel rank owns a flat range of the elements of a parameter, which
is at most three boxes of a matrix: the end of a row, whole rows, and the beginning of one. Written like this
nothing has to be gathered to save or scattered to load, and any other layout can read what it needs. Under
Megatron-FSDP the range is of whole rows, and weights lie in such boxes too; where nothing is sharded it is
the whole parameter.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
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


def state_boxes(part: Any, sharded: Mapping[Tensor, Any]) -> Iterator[StateBox]:
    """All of a rank's state in an optimizer. `sharded` has Megatron's description of each model parameter."""
    if not isinstance(part, DistributedOptimizer):
        for parameter in _mains(part):
            yield from _boxes_of(parameter, sharded[parameter], 0, parameter.numel(), copied=True)
    elif part.ddp_config.use_megatron_fsdp:
        yield from row_boxes((rows for rows in _rows(part).values() if rows.trained), sharded)
    else:
        for parameter in part.model_param_group_index_map:
            owned = part._get_model_param_range_map(parameter)["param"]
            yield from _boxes_of(parameter, sharded[parameter], owned.start, owned.end)


def row_boxes(rows: Iterable[Rows], sharded: Mapping[Tensor, Any]) -> Iterator[StateBox]:
    """The boxes of rows of parameters, as far as those are in `sharded`."""
    for item in rows:
        if item.parameter in sharded:
            yield from _boxes_of(item.parameter, sharded[item.parameter], item.start, item.stop)


def _boxes_of(
    parameter: Tensor,
    description: ShardedTensor | ShardedTensorFactory,
    owned: int,
    end: int,
    *,
    copied: bool = False,
) -> Iterator[StateBox]:
    """Elements [owned, end) of a parameter. `copied`: data-parallel ranks have the same ones."""
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
                main=is_main_replica(piece.replica_id if copied else piece.replica_id[:-1]),
            )


def _mains(part: Any) -> dict[Tensor, Tensor]:
    """The master weights of an optimizer that is not distributed, by model parameter; those of parameters in
    fp32 are the parameters.
    """
    mains = [main for group in part.optimizer.param_groups for main in group["params"]]
    if not isinstance(part, Float16OptimizerWithFloat16Params):
        return {main: main for main in mains}
    half = {
        main: model
        for models, own in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
        for model, main in zip(models, own, strict=True)
    }
    return {half.get(main, main): main for main in mains}


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


def states_of(part: Any, parameter: Tensor) -> dict[str, Tensor]:
    """The flat tensors of this rank's range of a parameter, the master weight as `param`."""
    if isinstance(part, DistributedOptimizer) and not part.ddp_config.use_megatron_fsdp:
        found = part._get_main_param_and_optimizer_states(parameter)
        return {name: state for name, state in found.items() if isinstance(state, Tensor) and state.dim()}
    inner, fsdp = part.optimizer, isinstance(part, DistributedOptimizer)
    main = _rows(part)[parameter].main if fsdp else _mains(part)[parameter]
    hosted = inner.hosted.get(main)
    master = local(main.detach()) if hosted is None else hosted.master
    return {name: state.view(-1) for name, state in {"param": master, **inner.state[main]}.items()}


def set_states(part: Any, parameter: Tensor, states: Mapping[str, Tensor]) -> None:
    """Replace what `states_of` gives, and give the model what comes of it under Megatron-FSDP."""
    if isinstance(part, DistributedOptimizer) and not part.ddp_config.use_megatron_fsdp:
        known = part._get_main_param_and_optimizer_states(parameter)
        part._set_main_param_and_optimizer_states(parameter, {**known, **states})
        return
    for name, state in states_of(part, parameter).items():
        state.copy_(states[name])
    if isinstance(part, DistributedOptimizer):
        _rows(part)[parameter].weight.copy_(states["param"])


def settings_of(optimizer: Any) -> Any:
    """What is not of single parameters, as Megatron has it: settings of groups of parameters, the number of
    steps among them, and the loss scale.
    """
    found = []
    for part in optimizer.chained_optimizers:
        groups = part.optimizer.param_groups if part.optimizer is not None else []
        kept = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        entry: dict[str, Any] = {"optimizer": {"param_groups": kept}}
        if getattr(part, "grad_scaler", None) is not None:
            entry["grad_scaler"] = part.grad_scaler.state_dict()
        found.append(entry)
    return found if len(found) > 1 else found[0]


def set_settings(optimizer: Any, state: Any) -> None:
    """Restore the number of steps and the loss scale; other settings are those of the run that goes on. Which
    parameters form a group, and which groups an optimizer, depends on the layout.
    """
    entries = [state] if isinstance(state, dict) else state
    groups = [group for entry in entries for group in entry["optimizer"]["param_groups"]]
    steps = max((group["step"] for group in groups if "step" in group), default=None)
    scale = next((entry["grad_scaler"] for entry in entries if "grad_scaler" in entry), None)
    for part in optimizer.chained_optimizers:
        if steps is not None and part.optimizer is not None:
            for group in part.optimizer.param_groups:
                group["step"] = steps
        if scale is not None and getattr(part, "grad_scaler", None) is not None:
            part.grad_scaler.load_state_dict(scale)


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
