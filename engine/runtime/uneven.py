"""Megatron's gathering and scattering of the first dimension, for parts of different lengths on gloo too: it
exchanges even ones only, and parts are padded to the longest.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import mappings
from torch import Tensor


def gather(part: Tensor, lengths: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """[n_r, ...] of rank r -> [sum(n), ...] on every rank, where n are `lengths`. Gradients are added up over
    the ranks.
    """
    if part.is_cuda:
        return mappings.gather_from_sequence_parallel_region(
            part, group=group, output_split_sizes=list(lengths)
        )
    longest = max(lengths)
    whole = mappings.gather_from_sequence_parallel_region(_pad(part, longest), group=group)
    parts = zip(whole.split(longest), lengths, strict=True) if longest else ()
    return torch.cat([padded[:length] for padded, length in parts]) if longest else whole


def reduce_scatter(whole: Tensor, lengths: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """[sum(n), ...] -> on rank r the sum over ranks of its part, [n_r, ...], where n are `lengths`."""
    if whole.is_cuda:
        return mappings.reduce_scatter_to_sequence_parallel_region(
            whole, group=group, input_split_sizes=list(lengths)
        )
    longest = max(lengths)
    padded = [_pad(part, longest) for part in whole.split(list(lengths))]
    own = mappings.reduce_scatter_to_sequence_parallel_region(torch.cat(padded), group=group)
    return own[: lengths[group.rank()]]


def _pad(part: Tensor, length: int) -> Tensor:
    return F.pad(part, (0, 0) * (part.dim() - 1) + (0, length - part.shape[0]))
