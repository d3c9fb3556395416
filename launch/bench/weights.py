"""Random weights, made where they are needed: no checkpoint is read, no rank sends another its own."""

import zlib
from collections.abc import Sequence

import torch

from engine.config.parallel import ParallelLayout
from engine.model.gpt import BraidGPTModel
from engine.model.provider import NamedWeight, named_weights
from engine.runtime.mcore import Groups

_STD = 0.02


@torch.no_grad()
def initialize_weights(
    chunks: Sequence[BraidGPTModel], layout: ParallelLayout, groups: Groups, *, seed: int
) -> None:
    """Matrices normal with standard deviation 0.02, norms 1, biases 0; adapters are left alone.

    Numbers depend on the seed, the weight's name and the part of it that a rank has: what several ranks hold
    alike is the same on all of them. Another layout has other numbers.
    """
    generator = torch.Generator(device=next(chunks[0].parameters()).device)
    for weight in named_weights(chunks, layout, groups.pp_rank):
        part = weight.part(weight.parameter)
        if part.dim() == 1:
            part.fill_(0.0 if weight.name.endswith("bias") else 1.0)
            continue
        key = f"{seed} {weight.name} {_shard(weight, groups)}"
        part.normal_(0.0, _STD, generator=generator.manual_seed(zlib.crc32(key.encode())))


def _shard(weight: NamedWeight, groups: Groups) -> int:
    """Index of this rank's part among the parts of a weight."""
    if weight.expert is not None:
        return groups.etp_rank
    return groups.tp_rank if getattr(weight.parameter, "tensor_model_parallel", False) else 0
