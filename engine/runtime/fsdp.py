"""Megatron-FSDP around a model: its gradients, or gradients and weights, sharded over data-parallel ranks."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from engine.runtime.mcore import Groups


def shard_fully(chunk: Any, config: Any, groups: Groups) -> Any:
    """Megatron's wrapper, in the place of DistributedDataParallel. `config` is its DDP configuration, with
    `use_megatron_fsdp`. For layouts of data and context parallelism only.
    """
    from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
    from megatron.core.distributed.fsdp.src.megatron_fsdp import FSDPDistributedIndex

    device = next(chunk.parameters()).device

    class Sharded(FullyShardedDataParallel):
        def _init_dist_index(self, pg_collection: Any) -> Any:
            """Megatron's own names CUDA whatever the device is, and wants einops for an arange."""
            self.tp_group = groups.tp
            mesh = DeviceMesh.from_group(
                [groups.dp_cp, groups.tp],
                device_type=device.type,
                mesh=[[rank] for rank in dist.get_process_group_ranks(groups.dp_cp)],
                mesh_dim_names=("dp_cp", "tp"),
            )
            return FSDPDistributedIndex(device_mesh=mesh, dp_shard_dim="dp_cp", tp_dim="tp")

    # A product cannot be added to a buffer that is sharded, nor written to it in another dtype.
    for part in (chunk.config, *chunk.modules()):
        if hasattr(part, "gradient_accumulation_fusion"):
            part.gradient_accumulation_fusion = False
    with _numbered_device(device):
        sharded = Sharded(config=chunk.config, ddp_config=config, module=chunk, device=device)
    inner = sharded.module
    # What the engine asks the module of a wrapper, which here is a wrapper too.
    inner.spec, inner.lora = chunk.spec, chunk.lora

    def forward(*inputs: Any, **named: Any) -> Any:
        """Megatron 0.16 calls the model's `forward`, past the hook that ends a backward pass: buckets then
        are not emptied, and every gradient of the next micro-batch reduces one again.
        """
        inner._replace_param_with_raw_if_needed()
        return chunk(*inputs, **named)

    inner.forward = forward
    return sharded


@contextlib.contextmanager
def _numbered_device(device: torch.device) -> Iterator[None]:
    """Megatron-FSDP writes the current device into names such as cuda:0, only to warn of others."""
    if device.type == "cuda":
        yield
        return
    with mock.patch.object(torch.cuda, "current_device", return_value=0):
        yield
