"""Jobs for the worker pool: random weights under a layout, and single collectives."""

from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist

from engine.config.options import MoeOptions, ParallelOptions, RecomputeOptions
from engine.config.parallel import ParallelLayout
from engine.model.spec import model_spec_from_config
from engine.runtime.platform import open_platform
from launch.bench.collectives import Message, call_of
from launch.bench.comm import measure
from launch.bench.shapes import SHAPES


def initialized(
    rank: int, world_size: int, *, shape: str, parallel: ParallelOptions, **changes: Any
) -> dict[str, torch.Tensor]:
    """This rank's weights by canonical name; "copy" is the last stage's copy of the embedding."""
    from engine.model.provider import build_chunks, named_weights
    from engine.runtime import mcore
    from launch.bench.weights import initialize_weights

    spec = model_spec_from_config(replace(SHAPES[shape], **changes).config())
    platform = open_platform(device="cpu", dtype="float32", transformer_impl="torch", local_rank=rank)
    layout = ParallelLayout.resolve(parallel, num_layers=spec.num_layers, world_size=world_size)
    groups = mcore.initialize(layout, platform, seed=1)
    chunks = build_chunks(spec, layout, platform, RecomputeOptions(), groups, None, MoeOptions())
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(7.0)  # what is left out shows
    initialize_weights(chunks, layout, groups, seed=3)
    return {
        "copy" if weight.is_copy else weight.name: weight.part(weight.parameter).detach().clone()
        for weight in named_weights(chunks, layout, groups.pp_rank)
    }


def exchanged(rank: int, world_size: int, *, operation: str, ring: bool) -> Message:
    """The buffers after one call, on two ranks; before it, rank r holds 10 r + (0, 1, 2, 3)."""
    message = Message.of(16, world_size, torch.device("cpu"))
    message.whole.copy_(10 * rank + torch.arange(4.0))
    message.part.copy_(10 * rank + torch.arange(2.0))
    message.other.fill_(-1.0)
    call_of(operation, message, dist.group.WORLD, ring=ring)()
    return message


def refused(rank: int, world_size: int, *, text: str) -> dict[str, Any] | str:
    """What is measured where the backend answers all_to_all with an error; the error, if it gets through."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(text)

    platform = open_platform(device="cpu", dtype="float32", transformer_impl="torch", local_rank=rank)
    real, dist.all_to_all_single = dist.all_to_all_single, refuse
    try:
        return asdict(measure("world", dist.group.WORLD, "all_to_all", 1024, 2, platform))
    except RuntimeError as error:
        return str(error)
    finally:
        dist.all_to_all_single = real
