"""Exchanges of uneven parts over gloo, which has even ones only: parts are padded to the longest.

In place of the functions of Megatron that its token dispatcher calls.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import mappings
from torch import Tensor


def gather(
    part: Tensor, *arguments: Any, output_split_sizes: Sequence[int] | None = None, **more: Any
) -> Tensor:
    """Megatron's gather_from_sequence_parallel_region. [n_r, ...] of rank r -> [sum(n), ...], where n are
    `output_split_sizes`.
    """
    if output_split_sizes is None:
        return mappings.gather_from_sequence_parallel_region(part, *arguments, **more)
    longest = max(output_split_sizes)
    whole = mappings.gather_from_sequence_parallel_region(_pad(part, longest), *arguments, **more)
    parts = zip(whole.split(longest), output_split_sizes, strict=True) if longest else ()
    return torch.cat([padded[:length] for padded, length in parts]) if longest else whole


def reduce_scatter(
    whole: Tensor,
    group: dist.ProcessGroup | None = None,
    input_split_sizes: Sequence[int] | None = None,
    **more: Any,
) -> Tensor:
    """Megatron's reduce_scatter_to_sequence_parallel_region. [sum(n), ...] -> rank r's sum of [n_r, ...],
    where n are `input_split_sizes`.
    """
    if input_split_sizes is None:
        return mappings.reduce_scatter_to_sequence_parallel_region(whole, group=group, **more)
    assert group is not None
    longest = max(input_split_sizes)
    padded = [_pad(part, longest) for part in whole.split(list(input_split_sizes))]
    own = mappings.reduce_scatter_to_sequence_parallel_region(torch.cat(padded), group=group, **more)
    return own[: input_split_sizes[group.rank()]]


def _pad(part: Tensor, length: int) -> Tensor:
    return F.pad(part, (0, 0) * (part.dim() - 1) + (0, length - part.shape[0]))
