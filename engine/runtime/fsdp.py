"""Megatron-FSDP around a model: its gradients, or gradients and weights, sharded over data-parallel ranks."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _CoalescingManager
from torch.distributed.tensor import DTensor

from engine.runtime.mcore import Groups

FSDP_BUCKET = 40_000_000
"""Elements of what is reduced at once, outside of decoder layers whose weights are sharded."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a rank has of a parameter: whole rows of it, or none."""

    name: str
    parameter: Tensor
    """Of the model. With weights sharded it has memory only while its layer is at work."""
    main: Tensor
    """What an optimizer sees: a DTensor of the rows in fp32."""
    start: int
    stop: int
    """The rows as a range of the parameter's elements."""
    weight: Tensor
    """The rows in the model's dtype, flat."""
    gradient: Tensor | None
    """Those of the gradient, flat; None where nothing is trained."""

    @property
    def trained(self) -> bool:
        return self.gradient is not None


def shard_fully(chunk: Any, config: Any, groups: Groups) -> Any:
    """Megatron's wrapper, in the place of DistributedDataParallel. `config` is its DDP configuration, with
    `use_megatron_fsdp`. For layouts without pipeline and expert parallelism, with data-parallel ranks.
    """
    from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
    from megatron.core.distributed.fsdp.src.megatron_fsdp import FSDPDistributedIndex, param_and_grad_buffer

    device = next(chunk.parameters()).device
    if device.type == "cpu":
        param_and_grad_buffer._coalescing_manager = _one_by_one

    class Sharded(FullyShardedDataParallel):
        def _init_dist_index(self, pg_collection: Any) -> Any:
            """Megatron's own names CUDA whatever the device is, and wants einops for an arange. What a tensor
            rank has of a parameter is shared like a whole one; that there are others nobody has to know.
            """
            self.tp_group = groups.tp if groups.layout.tp == 1 else groups.pp
            dense, experts = (
                DeviceMesh.from_group(
                    [group, self.tp_group],
                    device_type=device.type,
                    mesh=[[rank] for rank in dist.get_process_group_ranks(group)],
                    mesh_dim_names=("dp_cp", "tp"),
                )
                for group in (groups.dp_cp, groups.expert_dp)
            )
            return FSDPDistributedIndex(
                device_mesh=dense, expt_device_mesh=experts, dp_shard_dim="dp_cp", tp_dim="tp"
            )

        def _fix_tensor_parallel_attributes(self, module: Any) -> None:
            """Megatron 0.16 asks here for classes of Transformer Engine."""

    # A product cannot be added to a buffer that is sharded, nor written to it in another dtype.
    for part in (chunk.config, *chunk.modules()):
        if hasattr(part, "gradient_accumulation_fusion"):
            part.gradient_accumulation_fusion = False
    with _numbered_device(device), _hooks_on_what_is_trained():
        sharded = Sharded(config=chunk.config, ddp_config=config, module=chunk, device=device)
    inner = sharded.module
    # What the engine asks the module of a wrapper, which here is a wrapper too.
    inner.spec, inner.lora, inner.routers = chunk.spec, chunk.lora, chunk.routers

    def forward(*inputs: Any, **named: Any) -> Any:
        """Megatron 0.16 calls the model's `forward`, past the hook that ends a backward pass: buckets then
        are not emptied, and every gradient of the next micro-batch reduces one again.
        """
        inner._replace_param_with_raw_if_needed()
        return chunk(*inputs, **named)

    inner.forward = forward
    sharded.rows = {rows.parameter: rows for rows in _rows(inner.param_and_grad_buffer)}
    return sharded


def local(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def gather_weights(sharded: Any) -> None:
    """Let the next forward pass see rows that were set from elsewhere, as it does after an update."""
    sharded.module.synchronize_param_gather()
    sharded.start_param_sync()


def _rows(buffers: Any) -> Iterator[Rows]:
    mains = dict(buffers.optimizer_named_parameters)
    for group in buffers.parameter_groups:
        weights, gradients = group.model_weight_buffer, group.main_grad_buffer
        for item, parameter in enumerate(group.params):
            start, stop = weights._get_item_slice_in_shard(item)
            name = buffers.param_to_name[parameter]
            yield Rows(
                name=name,
                parameter=parameter,
                main=mains[name],
                start=start,
                stop=stop,
                weight=weights.get_item(item, only_shard=True),
                gradient=gradients.get_item(item, only_shard=True) if gradients is not None else None,
            )


@contextlib.contextmanager
def _one_by_one(*unused: Any, **named: Any) -> Iterator[Any]:
    """In the place of torch's manager, which puts several collectives together: gloo then takes all tensors
    to be of the first one's dtype, and writes past the end of those that have smaller numbers.
    """
    together, gather = _CoalescingManager(), dist.all_gather_into_tensor

    def gather_and_note(*arguments: Any, **options: Any) -> Any:
        work = gather(*arguments, **options)
        together.append(work)
        return work

    with mock.patch.object(dist, "all_gather_into_tensor", gather_and_note):
        yield together


@contextlib.contextmanager
def _numbered_device(device: torch.device) -> Iterator[None]:
    """Megatron-FSDP writes the current device into names such as cuda:0, only to warn of others."""
    if device.type == "cuda":
        yield
        return
    with mock.patch.object(torch.cuda, "current_device", return_value=0):
        yield


@contextlib.contextmanager
def _hooks_on_what_is_trained() -> Iterator[None]:
    """Megatron 0.16 wants to hear of the gradients of all parameters, and torch knows none of frozen ones."""
    register = Tensor.register_post_accumulate_grad_hook

    def register_if_trained(parameter: Tensor, hook: Any) -> Any:
        return register(parameter, hook) if parameter.requires_grad else None

    with mock.patch.object(Tensor, "register_post_accumulate_grad_hook", register_if_trained):
        yield
